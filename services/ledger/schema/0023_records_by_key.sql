-- What is found by its key is found by it however many rows there are. Plans are kept, and made while PostgreSQL may still take the tables to
-- be small: then it reads a table from its start, or all holds of a tenant, and goes on doing so until it is analyzed.

-- As before; a hold is one by its id alone, and whose it is is looked at afterwards.
CREATE OR REPLACE FUNCTION find_hold(p_tenant text, p_user text, p_any_user boolean, p_hold uuid) RETURNS SETOF holds LANGUAGE plpgsql ROWS 1
AS $$
BEGIN
    PERFORM enter_tenant(p_tenant, true);
    RETURN QUERY SELECT h.* FROM (SELECT * FROM holds WHERE hold_id = p_hold OFFSET 0) h
    WHERE h.tenant = p_tenant AND (h.user_id = p_user OR p_any_user) AND h.price_id IS NOT NULL; -- a lease is no call's
END
$$;

-- The holds of operations, each of which has to be its user's; locked, by operation in the order of ids and by attempt.
-- Planned once: looking at how many there are this time takes longer than finding them.
CREATE FUNCTION holds_of(p_tenant text, p_operations uuid[], p_users text[]) RETURNS SETOF holds LANGUAGE plpgsql ROWS 2
SET plan_cache_mode = force_generic_plan AS $$
BEGIN
    RETURN QUERY SELECT found.*
    FROM (SELECT * FROM unnest(p_operations, p_users) AS named (operation_id, user_id) ORDER BY 1 OFFSET 0) mine
    CROSS JOIN LATERAL (
        SELECT * FROM holds h WHERE (h.tenant, h.operation_id, h.user_id) = (p_tenant, mine.operation_id, mine.user_id)
        ORDER BY h.attempt FOR UPDATE
    ) found;
END
$$;

-- As before, but for how a lease is found.
CREATE OR REPLACE FUNCTION open_late(p_calls jsonb, p_at timestamptz) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    moment timestamptz := coalesce(p_at, clock_timestamp());
    counters jsonb;
    made jsonb;
BEGIN
    PERFORM 1 FROM leases l WHERE l.lease_id IN (SELECT c.lease_id FROM calls_in(p_calls) c) ORDER BY l.lease_id FOR SHARE;
    PERFORM ensure_user(mine.tenant, mine.user_id)
    FROM (SELECT DISTINCT c.tenant, c.user_id FROM calls_in(p_calls) c ORDER BY 1, 2) mine
    WHERE NOT EXISTS (SELECT FROM users u WHERE u.tenant = mine.tenant AND u.user_id = mine.user_id);

    -- Counters before new holds, as reserve_hold does: it may be at the very same attempt. A call counts where its lease does, if that is open.
    SELECT jsonb_agg(k) INTO counters FROM (SELECT DISTINCT * FROM counters_of_calls(p_calls)) k;
    PERFORM lock_spending(counters);

    WITH fresh AS (
        INSERT INTO holds AS h (tenant, user_id, api_key_id, operation_id, attempt, provider, model, price_id, lease_id,
                                input_tokens_max, output_tokens_max, amount_nanousd, created_at, expires_at)
        SELECT c.tenant, c.user_id, coalesce(lease.api_key_id, c.api_key_id), c.operation_id, c.attempt, c.provider, c.model, c.price_id,
               named.lease_id, c.input_tokens_max, c.output_tokens_max, CASE WHEN lease.hold_id IS NULL THEN 0 ELSE c.amount_nanousd END,
               coalesce(lease.created_at, c.created_at), moment + interval '1 hour'
        FROM calls_in(p_calls) c
        LEFT JOIN LATERAL (SELECT l.lease_id, l.ended_at FROM leases l WHERE l.lease_id = c.lease_id OFFSET 0) named ON true
        LEFT JOIN LATERAL (
            SELECT x.hold_id, x.tenant, x.user_id, x.api_key_id, x.created_at FROM holds x WHERE x.hold_id = named.lease_id OFFSET 0
        ) lease ON named.ended_at IS NULL AND (lease.tenant, lease.user_id) = (c.tenant, c.user_id)
        ORDER BY c.tenant, c.operation_id, c.attempt
        ON CONFLICT (tenant, operation_id, attempt) DO NOTHING
        RETURNING h.hold_id, h.tenant, h.user_id, h.api_key_id, h.operation_id, h.amount_nanousd, h.created_at
    )
    SELECT jsonb_agg(to_jsonb(fresh)) INTO made FROM fresh WHERE amount_nanousd > 0;
    IF made IS NULL THEN
        RETURN;
    END IF;
    UPDATE spending s SET held_nanousd = s.held_nanousd + d.drawn
    FROM (
        SELECT m.tenant, c.scope, c.subject, c.period, c.period_start, sum(m.amount_nanousd)::bigint AS drawn
        FROM calls_in(made) m, counters_of(m.tenant, m.user_id, m.api_key_id, m.created_at) c
        GROUP BY 1, 2, 3, 4, 5
    ) d
    WHERE (s.tenant, s.scope, s.subject, s.period, s.period_start) = (d.tenant, d.scope, d.subject, d.period, d.period_start);
    INSERT INTO entries (posting_id, account, tenant, hold_id, operation_id, kind, amount_nanousd, booked_at)
    SELECT f.posting_id, a.account, f.tenant, f.hold_id, f.operation_id, 'reserve', a.amount, moment
    FROM (SELECT nextval('postings') AS posting_id, m.* FROM calls_in(made) m) f
    CROSS JOIN LATERAL (VALUES ('available', -f.amount_nanousd), ('held', f.amount_nanousd)) AS a (account, amount);
END
$$;

-- The checks of references are planned where they are first needed, so these settings are theirs as well.
DO $$
DECLARE
    called regprocedure;
BEGIN
    FOR called IN
        SELECT oid FROM pg_proc WHERE pronamespace = current_schema()::regnamespace AND proname IN (
            'find_hold', 'holds_of', 'open_late', 'reserve_hold', 'resolve_holds', 'book_operations', 'lend_credit', 'return_credit'
        )
    LOOP
        EXECUTE format('ALTER FUNCTION %s SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off', called);
    END LOOP;
END
$$;
