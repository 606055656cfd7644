-- Credit leases: a slice of the budgets that a recorder may draw on while it cannot reach the ledger. A lease is a hold that belongs to
-- no call, so the books and the counters know it as any other; it never expires by itself as a hold does, but by `leases`.

ALTER TABLE holds ALTER COLUMN price_id DROP NOT NULL;
ALTER TABLE holds ADD CONSTRAINT holds_of_calls_are_priced CHECK (price_id IS NOT NULL OR provider = '');
-- The lease that a call was begun on. A hold of nothing with a lease is a call whose lease had ended before it became known.
ALTER TABLE holds ADD COLUMN lease_id uuid REFERENCES holds;

CREATE TABLE leases (
    lease_id   uuid PRIMARY KEY REFERENCES holds,
    tenant     text NOT NULL,
    expires_at timestamptz NOT NULL,
    ended_at   timestamptz
);
CREATE INDEX leases_open ON leases (expires_at) WHERE ended_at IS NULL;

-- The least that any budget of a principal has left at a moment; NULL without a budget. The caller has locked the counters.
CREATE FUNCTION credit_left(p_tenant text, p_user text, p_key text, p_at timestamptz) RETURNS bigint LANGUAGE sql STABLE AS $$
    SELECT min(l.left_nanousd)
    FROM (
        SELECT b.limit_nanousd - s.spent_nanousd - s.held_nanousd AS left_nanousd
        FROM counters_of(p_tenant, p_user, p_key, p_at) c
        JOIN spending s ON s.tenant = p_tenant AND (s.scope, s.subject, s.period, s.period_start) = (c.scope, c.subject, c.period, c.period_start)
        JOIN budgets b ON b.tenant = p_tenant AND (b.scope, b.subject, b.period) = (c.scope, c.subject, c.period)
        UNION ALL
        SELECT m.monthly_budget_nanousd - s.spent_nanousd - s.held_nanousd
        FROM members m
        JOIN spending s ON s.tenant = p_tenant AND s.scope = 'user' AND s.subject = p_user AND s.period = 'month'
            AND s.period_start = date_trunc('month', p_at AT TIME ZONE 'UTC')::date
        WHERE m.tenant = p_tenant AND m.user_id = p_user AND m.monthly_budget_nanousd > 0
    ) l
$$;

-- Lend a slice of what is left, or prolong a lease.
--   lent   amount_nanousd may be drawn
--   ended  the lease was given back, has expired, is another principal's, or belongs to a day that is over: its counters are not today's
--   empty  too little is left to lend any of it
CREATE FUNCTION lend_credit(
    p_lease uuid, p_tenant text, p_user text, p_key text, p_percent integer, p_least bigint, p_most bigint, p_life interval, p_at timestamptz,
    OUT outcome text, OUT amount_nanousd bigint
) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    moment timestamptz := coalesce(p_at, clock_timestamp());
    lease holds;
    ends timestamptz;
    available bigint;
    posting bigint;
BEGIN
    SELECT l.expires_at INTO ends FROM leases l WHERE l.lease_id = p_lease AND l.ended_at IS NULL FOR UPDATE;
    SELECT * INTO lease FROM holds h WHERE h.hold_id = p_lease;
    IF FOUND THEN
        IF ends IS NULL OR ends <= moment OR (lease.tenant, lease.user_id, lease.api_key_id) <> (p_tenant, p_user, p_key)
            OR date_trunc('day', lease.created_at AT TIME ZONE 'UTC') <> date_trunc('day', moment AT TIME ZONE 'UTC') THEN
            outcome := 'ended';
            RETURN;
        END IF;
        UPDATE leases l SET expires_at = moment + p_life WHERE l.lease_id = p_lease;
        outcome := 'lent';
        amount_nanousd := lease.amount_nanousd;
        RETURN;
    END IF;

    IF NOT EXISTS (SELECT FROM users WHERE tenant = p_tenant AND user_id = p_user) THEN
        PERFORM ensure_user(p_tenant, p_user);
    END IF;
    PERFORM lock_counters(p_tenant, p_user, p_key, moment);
    available := credit_left(p_tenant, p_user, p_key, moment);
    -- Never more than a tenth of what is left: a lease is a precaution, and what it takes is missing elsewhere meanwhile.
    amount_nanousd := CASE WHEN available IS NULL THEN p_most
        ELSE least(greatest(available / 100 * p_percent, p_least), p_most, available / 10) END;
    IF amount_nanousd <= 0 THEN
        outcome := 'empty';
        RETURN;
    END IF;

    INSERT INTO holds (hold_id, tenant, user_id, api_key_id, operation_id, attempt, provider, model, price_id,
                       input_tokens_max, output_tokens_max, amount_nanousd, created_at, expires_at)
    VALUES (p_lease, p_tenant, p_user, p_key, p_lease, 1, '', '', NULL, 0, 0, amount_nanousd, moment, 'infinity')
    ON CONFLICT DO NOTHING;
    IF NOT FOUND THEN -- it is another tenant's, whose rows are not seen here
        outcome := 'ended';
        RETURN;
    END IF;
    INSERT INTO leases (lease_id, tenant, expires_at) VALUES (p_lease, p_tenant, moment + p_life);
    UPDATE spending s SET held_nanousd = s.held_nanousd + lend_credit.amount_nanousd
    FROM counters_of(p_tenant, p_user, p_key, moment) c
    WHERE s.tenant = p_tenant AND (s.scope, s.subject, s.period, s.period_start) = (c.scope, c.subject, c.period, c.period_start);
    posting := nextval('postings');
    INSERT INTO entries (posting_id, account, tenant, hold_id, operation_id, kind, amount_nanousd, booked_at)
    VALUES (posting, 'available', p_tenant, p_lease, p_lease, 'reserve', -amount_nanousd, moment),
           (posting, 'held', p_tenant, p_lease, p_lease, 'reserve', amount_nanousd, moment);
    outcome := 'lent';
END
$$;

-- The counters of calls that have no hold yet: of their own principal and moment, and of their lease's.
CREATE FUNCTION counters_of_calls(p_calls jsonb)
RETURNS TABLE (tenant text, scope text, subject text, period text, period_start date) LANGUAGE sql STABLE AS $$
    SELECT o.tenant, c.scope, c.subject, c.period, c.period_start
    FROM (
        SELECT called.tenant, called.user_id, called.api_key_id, called.created_at FROM jsonb_populate_recordset(NULL::holds, p_calls) called
        UNION
        SELECT lease.tenant, lease.user_id, lease.api_key_id, lease.created_at
        FROM jsonb_populate_recordset(NULL::holds, p_calls) called JOIN holds lease ON lease.hold_id = called.lease_id
    ) o, counters_of(o.tenant, o.user_id, o.api_key_id, o.created_at) c
$$;

-- Make holds of calls that had none, those that are known left alone. A call that was begun on a lease which is still open gets what was
-- drawn for it: the lease has set that aside, so no budget is asked, and it counts in the periods of the lease. Any other gets a hold of
-- nothing: then all it costs is above it. An element is a row of `holds`.
CREATE FUNCTION open_late(p_calls jsonb, p_at timestamptz) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    moment timestamptz := coalesce(p_at, clock_timestamp());
    made jsonb;
BEGIN
    PERFORM 1 FROM leases l WHERE l.lease_id IN (SELECT c.lease_id FROM jsonb_populate_recordset(NULL::holds, p_calls) c)
    ORDER BY l.lease_id FOR SHARE;
    INSERT INTO tenants (tenant) SELECT DISTINCT c.tenant FROM jsonb_populate_recordset(NULL::holds, p_calls) c
    WHERE NOT EXISTS (SELECT FROM tenants t WHERE t.tenant = c.tenant) ORDER BY 1 ON CONFLICT DO NOTHING;
    INSERT INTO users (tenant, user_id) SELECT DISTINCT c.tenant, c.user_id FROM jsonb_populate_recordset(NULL::holds, p_calls) c
    WHERE NOT EXISTS (SELECT FROM users u WHERE u.tenant = c.tenant AND u.user_id = c.user_id) ORDER BY 1, 2 ON CONFLICT DO NOTHING;

    -- Counters before new holds, as reserve_hold does: it may be at the very same attempt. A call counts where its lease does, if that is open.
    INSERT INTO spending (tenant, scope, subject, period, period_start)
    SELECT DISTINCT k.tenant, k.scope, k.subject, k.period, k.period_start FROM counters_of_calls(p_calls) k ORDER BY 1, 2, 3, 4, 5
    ON CONFLICT DO NOTHING;
    PERFORM 1 FROM spending s JOIN (SELECT DISTINCT * FROM counters_of_calls(p_calls)) mine USING (tenant, scope, subject, period, period_start)
    ORDER BY s.tenant, s.scope, s.subject, s.period, s.period_start FOR UPDATE OF s;

    WITH fresh AS (
        INSERT INTO holds AS h (tenant, user_id, api_key_id, operation_id, attempt, provider, model, price_id, lease_id,
                                input_tokens_max, output_tokens_max, amount_nanousd, created_at, expires_at)
        SELECT c.tenant, c.user_id, coalesce(lease.api_key_id, c.api_key_id), c.operation_id, c.attempt, c.provider, c.model, c.price_id,
               named.lease_id, c.input_tokens_max, c.output_tokens_max, CASE WHEN lease.hold_id IS NULL THEN 0 ELSE c.amount_nanousd END,
               coalesce(lease.created_at, c.created_at), moment + interval '1 hour'
        FROM jsonb_populate_recordset(NULL::holds, p_calls) c
        LEFT JOIN leases named ON named.lease_id = c.lease_id
        LEFT JOIN holds lease ON lease.hold_id = named.lease_id AND named.ended_at IS NULL
            AND (lease.tenant, lease.user_id) = (c.tenant, c.user_id)
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
        FROM jsonb_populate_recordset(NULL::holds, made) m, counters_of(m.tenant, m.user_id, m.api_key_id, m.created_at) c
        GROUP BY 1, 2, 3, 4, 5
    ) d
    WHERE (s.tenant, s.scope, s.subject, s.period, s.period_start) = (d.tenant, d.scope, d.subject, d.period, d.period_start);
    INSERT INTO entries (posting_id, account, tenant, hold_id, operation_id, kind, amount_nanousd, booked_at)
    SELECT f.posting_id, a.account, f.tenant, f.hold_id, f.operation_id, 'reserve', a.amount, moment
    FROM (SELECT nextval('postings') AS posting_id, m.* FROM jsonb_populate_recordset(NULL::holds, made) m) f
    CROSS JOIN LATERAL (VALUES ('available', -f.amount_nanousd), ('held', f.amount_nanousd)) AS a (account, amount);
END
$$;

-- End a lease: what was drawn and is not known yet becomes holds, the rest is available again. Returns what was given back, 0 if the lease
-- had ended before, NULL if there is none.
CREATE FUNCTION return_credit(p_lease uuid, p_tenant text, p_user text, p_draws jsonb, p_at timestamptz) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    moment timestamptz := coalesce(p_at, clock_timestamp());
    lease holds;
BEGIN
    SELECT h.* INTO lease FROM holds h WHERE h.hold_id = p_lease AND h.tenant = p_tenant AND h.user_id = p_user AND h.provider = '';
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    PERFORM 1 FROM leases l WHERE l.lease_id = p_lease AND l.ended_at IS NULL FOR UPDATE;
    IF NOT FOUND THEN
        RETURN 0;
    END IF;
    IF jsonb_array_length(p_draws) > 0 THEN
        PERFORM open_late(p_draws, moment);
    END IF;
    PERFORM resolve_holds(jsonb_build_array(jsonb_build_object(
        'hold_id', p_lease, 'state', 'voided', 'kind', 'void', 'held', -lease.amount_nanousd, 'spent', 0, 'cost_nanousd', 0, 'estimated', false,
        'input_tokens', 0, 'output_tokens', 0, 'cache_read_tokens', 0, 'cache_write_tokens', 0, 'cache_write_1h_tokens', 0
    )), moment);
    UPDATE leases l SET ended_at = moment WHERE l.lease_id = p_lease;
    RETURN lease.amount_nanousd;
END
$$;

-- Record many operations with what became of their holds, all or nothing. Returns for each whether it is new.
CREATE FUNCTION record_operations(p_records jsonb, p_moves jsonb) RETURNS boolean[] LANGUAGE plpgsql AS $$
DECLARE
    record jsonb;
    fresh boolean[] := '{}';
BEGIN
    IF jsonb_array_length(p_moves) > 0 THEN -- all at once, so that their counters are locked in the order of every other transaction
        PERFORM resolve_holds(p_moves, clock_timestamp());
    END IF;
    FOR record IN SELECT value FROM jsonb_array_elements(p_records) WITH ORDINALITY ORDER BY ordinality LOOP
        fresh := fresh || record_operation(record->'operation', record->'attempts', record->'steps', '[]');
    END LOOP;
    RETURN fresh;
END
$$;
