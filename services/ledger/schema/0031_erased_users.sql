-- Who was erased stays erased: what comes late of an answer that was accepted before is not written under their id again.

-- Raise TR410 if the user of an operation was erased after it was accepted, and no money is set aside for it under that id since: such
-- money must find its record. The users stay locked, as writing anything of theirs locks them anyway: an erasure is over, and is seen, or
-- it waits, and finds what is written here.
CREATE FUNCTION refuse_erased(p_tenants text[], p_users text[], p_operations uuid[], p_accepted timestamptz[]) RETURNS void LANGUAGE plpgsql
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
BEGIN
    PERFORM 1 FROM users u WHERE (u.tenant, u.user_id) IN (SELECT * FROM unnest(p_tenants, p_users)) ORDER BY u.tenant, u.user_id FOR KEY SHARE;
    IF EXISTS (
        SELECT FROM unnest(p_tenants, p_users, p_operations, p_accepted) AS o (tenant, user_id, operation_id, accepted_at)
        WHERE deleted_since(o.tenant, o.user_id, '', o.accepted_at) AND NOT EXISTS (
            SELECT FROM holds h WHERE (h.tenant, h.operation_id, h.user_id) = (o.tenant, o.operation_id, o.user_id)
        )
    ) THEN
        RAISE EXCEPTION 'the user was erased after the operation was accepted' USING ERRCODE = 'TR410';
    END IF;
END
$$;

-- As before, but not for who was erased.
CREATE OR REPLACE FUNCTION open_late_holds(p_calls jsonb, p_at timestamptz) RETURNS SETOF holds LANGUAGE plpgsql
SECURITY DEFINER SET search_path FROM CURRENT SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
DECLARE
    moment timestamptz := coalesce(p_at, clock_timestamp());
    told holds[] := (SELECT array_agg(c) FROM calls_in(p_calls) c);
    counters jsonb;
    made holds[];
BEGIN
    IF EXISTS (
        SELECT FROM unnest(told) c WHERE c.tenant <> coalesce(nullif(current_setting('tailrace.tenant', true), ''), c.tenant)
    ) THEN
        RAISE EXCEPTION 'a call is of another tenant than is worked for' USING ERRCODE = 'insufficient_privilege';
    END IF;
    PERFORM 1 FROM leases l WHERE (l.lease_id, l.tenant) IN (SELECT c.lease_id, c.tenant FROM unnest(told) c)
    ORDER BY l.lease_id FOR SHARE;
    PERFORM ensure_user(mine.tenant, mine.user_id)
    FROM (SELECT DISTINCT c.tenant, c.user_id FROM unnest(told) c ORDER BY 1, 2) mine
    WHERE NOT EXISTS (SELECT FROM users u WHERE u.tenant = mine.tenant AND u.user_id = mine.user_id);
    PERFORM refuse_erased(array_agg(c.tenant), array_agg(c.user_id), array_agg(c.operation_id), array_agg(c.created_at)) FROM unnest(told) c;

    -- Counters before new holds, as reserve_hold does: it may be at the very same attempt. A call counts where its lease does, if that is open.
    SELECT jsonb_agg(k) INTO counters FROM (SELECT DISTINCT * FROM counters_of_calls(p_calls)) k;
    PERFORM lock_spending(counters);

    WITH fresh AS (
        INSERT INTO holds AS h (tenant, user_id, api_key_id, operation_id, attempt, provider, model, price_id, lease_id,
                                input_tokens_max, output_tokens_max, amount_nanousd, created_at, expires_at)
        SELECT c.tenant, c.user_id, coalesce(lease.api_key_id, c.api_key_id), c.operation_id, c.attempt, c.provider, c.model, c.price_id,
               named.lease_id, c.input_tokens_max, c.output_tokens_max, CASE WHEN lease.hold_id IS NULL THEN 0 ELSE c.amount_nanousd END,
               coalesce(lease.created_at, c.created_at), moment + interval '1 hour'
        FROM unnest(told) c
        LEFT JOIN LATERAL (
            SELECT l.lease_id, l.ended_at, l.tenant FROM leases l WHERE l.lease_id = c.lease_id OFFSET 0
        ) named ON named.tenant = c.tenant
        LEFT JOIN LATERAL (
            SELECT x.hold_id, x.tenant, x.user_id, x.api_key_id, x.created_at FROM holds x WHERE x.hold_id = named.lease_id OFFSET 0
        ) lease ON named.ended_at IS NULL AND (lease.tenant, lease.user_id) = (c.tenant, c.user_id)
        ORDER BY c.tenant, c.operation_id, c.attempt
        ON CONFLICT (tenant, operation_id, attempt) DO NOTHING
        RETURNING h.*
    )
    SELECT array_agg(f) INTO made FROM fresh f;
    IF EXISTS (SELECT FROM unnest(made) m WHERE m.amount_nanousd > 0) THEN
        UPDATE spending s SET held_nanousd = s.held_nanousd + d.drawn
        FROM (
            SELECT m.tenant, c.scope, c.subject, c.period, c.period_start, sum(m.amount_nanousd)::bigint AS drawn
            FROM unnest(made) m, counters_of(m.tenant, m.user_id, m.api_key_id, m.created_at) c
            WHERE m.amount_nanousd > 0
            GROUP BY 1, 2, 3, 4, 5
        ) d
        WHERE (s.tenant, s.scope, s.subject, s.period, s.period_start) = (d.tenant, d.scope, d.subject, d.period, d.period_start);
        INSERT INTO entries (posting_id, account, tenant, hold_id, operation_id, kind, amount_nanousd, booked_at)
        SELECT f.posting_id, a.account, f.tenant, f.hold_id, f.operation_id, 'reserve', a.amount, moment
        FROM (SELECT nextval('postings') AS posting_id, m.* FROM unnest(made) m WHERE m.amount_nanousd > 0) f
        CROSS JOIN LATERAL (VALUES ('available', -f.amount_nanousd), ('held', f.amount_nanousd)) AS a (account, amount);
    END IF;
    RETURN QUERY SELECT m.* FROM unnest(made) m;
END
$$;

-- As before, but not for who was erased.
CREATE OR REPLACE FUNCTION book_operations(p_operations json, p_attempts json, p_steps json, p_moves jsonb) RETURNS uuid[] LANGUAGE plpgsql
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
DECLARE
    told operations[] := (SELECT array_agg(o) FROM json_populate_recordset(NULL::operations, p_operations) o);
    new_ones uuid[];
BEGIN
    PERFORM ensure_user(mine.tenant, mine.user_id)
    FROM (SELECT DISTINCT o.tenant, o.user_id FROM unnest(told) o ORDER BY 1, 2) mine
    WHERE NOT EXISTS (SELECT FROM users u WHERE u.tenant = mine.tenant AND u.user_id = mine.user_id);
    PERFORM refuse_erased(array_agg(o.tenant), array_agg(o.user_id), array_agg(o.operation_id), array_agg(o.created_at)) FROM unnest(told) o;
    IF EXISTS (SELECT FROM unnest(told) o WHERE o.session_id <> '' AND deleted_since(o.tenant, o.user_id, o.session_id, o.created_at)) THEN
        told := (
            SELECT array_agg(json_populate_record(o, CASE WHEN deleted_since(o.tenant, o.user_id, o.session_id, o.created_at)
                                                     THEN '{"session_id": ""}' ELSE '{}' END::json))
            FROM unnest(told) o
        );
    END IF;
    IF jsonb_array_length(p_moves) > 0 THEN -- before anything else is locked: counters come first in every transaction
        PERFORM resolve_holds(p_moves, clock_timestamp());
    END IF;

    WITH named AS (
        INSERT INTO operation_ids AS k SELECT o.tenant, o.operation_id, o.created_at FROM unnest(told) o
        ON CONFLICT DO NOTHING RETURNING k.operation_id
    )
    SELECT coalesce(array_agg(n.operation_id), '{}') INTO new_ones FROM named n;
    WITH written AS (
        INSERT INTO operations AS o SELECT t.* FROM unnest(told) t WHERE t.operation_id = ANY (new_ones)
        RETURNING o.tenant, o.user_id, o.operation_id
    )
    SELECT coalesce(array_agg(w.operation_id), '{}') INTO new_ones
    FROM written w, pg_notify('tailrace_operations', json_build_array(w.tenant, w.user_id, w.operation_id)::text);
    INSERT INTO attempts SELECT * FROM json_populate_recordset(NULL::attempts, p_attempts) a WHERE a.operation_id = ANY (new_ones);
    INSERT INTO steps SELECT * FROM json_populate_recordset(NULL::steps, p_steps) s WHERE s.operation_id = ANY (new_ones);
    RETURN new_ones;
END
$$;
