-- Credit leases: a slice of the budgets that a recorder may draw on while it cannot reach the ledger. A lease is a hold that belongs to
-- no call, so the books and the counters know it as any other; it never expires by itself as a hold does, but by `leases`.

ALTER TABLE holds ALTER COLUMN price_id DROP NOT NULL;
ALTER TABLE holds ADD CONSTRAINT holds_of_calls_are_priced CHECK (price_id IS NOT NULL OR provider = '');
-- The lease that a call was begun on. A hold of nothing with a lease is a call whose lease had ended before it became known.
ALTER TABLE holds ADD COLUMN lease_id uuid REFERENCES holds;

CREATE TABLE leases (
    lease_id   uuid PRIMARY KEY REFERENCES holds,
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
    VALUES (p_lease, p_tenant, p_user, p_key, p_lease, 1, '', '', NULL, 0, 0, amount_nanousd, moment, 'infinity');
    INSERT INTO leases (lease_id, expires_at) VALUES (p_lease, moment + p_life);
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

-- Make holds of calls that were begun on a lease, those that are known left alone. While the lease is open it has set their money aside,
-- so no budget is asked, and they count in the periods of the lease. Returns false, and does nothing, if it is not open.
CREATE FUNCTION draw_on_lease(p_lease uuid, p_tenant text, p_user text, p_draws jsonb, p_at timestamptz) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    moment timestamptz := coalesce(p_at, clock_timestamp());
    lease holds;
    drawn bigint;
BEGIN
    PERFORM 1 FROM leases l WHERE l.lease_id = p_lease AND l.ended_at IS NULL FOR SHARE;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    SELECT * INTO lease FROM holds h WHERE h.hold_id = p_lease AND h.tenant = p_tenant AND h.user_id = p_user;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    PERFORM lock_counters(lease.tenant, lease.user_id, lease.api_key_id, lease.created_at);
    WITH fresh AS (
        INSERT INTO holds AS h (tenant, user_id, api_key_id, operation_id, attempt, provider, model, price_id, lease_id,
                                input_tokens_max, output_tokens_max, amount_nanousd, created_at, expires_at)
        SELECT lease.tenant, lease.user_id, lease.api_key_id, d.operation_id, d.attempt, d.provider, d.model, d.price_id, p_lease,
               d.input_tokens_max, d.output_tokens_max, d.amount_nanousd, lease.created_at, moment + interval '1 hour'
        FROM jsonb_populate_recordset(NULL::holds, p_draws) d
        ORDER BY d.operation_id, d.attempt
        ON CONFLICT (tenant, operation_id, attempt) DO NOTHING
        RETURNING h.hold_id, h.operation_id, h.amount_nanousd
    ), posted AS (
        INSERT INTO entries (posting_id, account, tenant, hold_id, operation_id, kind, amount_nanousd, booked_at)
        SELECT f.posting_id, a.account, lease.tenant, f.hold_id, f.operation_id, 'reserve', a.amount, moment
        FROM (SELECT nextval('postings') AS posting_id, fresh.* FROM fresh WHERE amount_nanousd > 0) f
        CROSS JOIN LATERAL (VALUES ('available', -f.amount_nanousd), ('held', f.amount_nanousd)) AS a (account, amount)
    )
    SELECT coalesce(sum(amount_nanousd), 0)::bigint INTO drawn FROM fresh;
    UPDATE spending s SET held_nanousd = s.held_nanousd + drawn
    FROM counters_of(lease.tenant, lease.user_id, lease.api_key_id, lease.created_at) c
    WHERE s.tenant = lease.tenant AND (s.scope, s.subject, s.period, s.period_start) = (c.scope, c.subject, c.period, c.period_start);
    RETURN true;
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
    PERFORM draw_on_lease(p_lease, p_tenant, p_user, p_draws, moment);
    PERFORM resolve_holds(jsonb_build_array(jsonb_build_object(
        'hold_id', p_lease, 'state', 'voided', 'kind', 'void', 'held', -lease.amount_nanousd, 'spent', 0, 'cost_nanousd', 0, 'estimated', false,
        'input_tokens', 0, 'output_tokens', 0, 'cache_read_tokens', 0, 'cache_write_tokens', 0, 'cache_write_1h_tokens', 0
    )), moment);
    UPDATE leases l SET ended_at = moment WHERE l.lease_id = p_lease;
    RETURN lease.amount_nanousd;
END
$$;
