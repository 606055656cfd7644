-- What is lent can be called back. A budget that many share used to be lent to them bit by bit until nothing was left to reserve, while
-- most of it was only set aside. Whoever is turned away for want of what is lent marks it, and its holders return it within seconds.

ALTER TABLE leases ADD COLUMN recalled_at timestamptz;
-- Which budget it was missing in: `tenant`, `user` or `key`.
ALTER TABLE leases ADD COLUMN recalled_for text CHECK (recalled_for IN ('tenant', 'user', 'key'));
CREATE INDEX leases_of_tenant ON leases (tenant, ended_at);

-- Whether a lease's hold counts in a budget of this scope of a payer.
CREATE FUNCTION shares_budget(p_hold holds, p_scope text, p_tenant text, p_user text, p_key text) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT p_hold.tenant = p_tenant AND CASE p_scope
        WHEN 'tenant' THEN true WHEN 'key' THEN p_hold.api_key_id = p_key ELSE p_hold.user_id = p_user END
$$;

-- The least that any budget of a principal has left beyond what is lent of it, to anybody; NULL without a budget. The caller has locked the
-- counters.
CREATE FUNCTION credit_free(p_tenant text, p_user text, p_key text, p_at timestamptz) RETURNS bigint LANGUAGE sql STABLE AS $$
    SELECT min(l.left_nanousd - (
        SELECT coalesce(sum(h.amount_nanousd), 0)::bigint FROM leases open JOIN holds h ON h.hold_id = open.lease_id
        WHERE open.tenant = p_tenant AND open.ended_at IS NULL AND shares_budget(h, l.scope, p_tenant, p_user, p_key)
    ))
    FROM (
        SELECT b.scope, b.limit_nanousd - s.spent_nanousd - s.held_nanousd AS left_nanousd
        FROM counters_of(p_tenant, p_user, p_key, p_at) c
        JOIN spending s ON s.tenant = p_tenant AND (s.scope, s.subject, s.period, s.period_start) = (c.scope, c.subject, c.period, c.period_start)
        JOIN budgets b ON b.tenant = p_tenant AND (b.scope, b.subject, b.period) = (c.scope, c.subject, c.period)
        UNION ALL
        SELECT 'user', m.monthly_budget_nanousd - s.spent_nanousd - s.held_nanousd
        FROM members m
        JOIN spending s ON s.tenant = p_tenant AND s.scope = 'user' AND s.subject = p_user AND s.period = 'month'
            AND s.period_start = date_trunc('month', p_at AT TIME ZONE 'UTC')::date
        WHERE m.tenant = p_tenant AND m.user_id = p_user AND m.monthly_budget_nanousd > 0
    ) l
$$;

-- Whether anything was recalled for a budget of this principal within the last minute.
CREATE FUNCTION credit_was_recalled(p_tenant text, p_user text, p_key text, p_at timestamptz) RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT EXISTS (
        SELECT FROM leases l JOIN holds h ON h.hold_id = l.lease_id
        WHERE l.tenant = p_tenant AND (l.ended_at IS NULL OR l.ended_at > p_at - interval '1 minute')
          AND l.recalled_at > p_at - interval '1 minute' AND shares_budget(h, l.recalled_for, p_tenant, p_user, p_key)
    )
$$;

-- Recall what is lent of a budget and return how much that is, with what was given back since `p_elapsed` ago: a call that was refused then
-- may be admitted now.
CREATE FUNCTION recall_credit(p_tenant text, p_user text, p_key text, p_scope text, p_elapsed interval, p_at timestamptz) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    moment timestamptz := coalesce(p_at, clock_timestamp());
BEGIN
    PERFORM enter_tenant(p_tenant, true);
    UPDATE leases SET recalled_at = moment, recalled_for = p_scope WHERE lease_id IN (
        SELECT l.lease_id FROM leases l JOIN holds h ON h.hold_id = l.lease_id
        WHERE l.tenant = p_tenant AND l.ended_at IS NULL AND l.recalled_at IS NULL AND shares_budget(h, p_scope, p_tenant, p_user, p_key)
        FOR UPDATE OF l SKIP LOCKED -- who waits for none stands in nobody's way; the next one turned away marks it
    );
    RETURN (
        SELECT coalesce(sum(h.amount_nanousd), 0)::bigint FROM leases l JOIN holds h ON h.hold_id = l.lease_id
        WHERE l.tenant = p_tenant AND (l.ended_at IS NULL OR l.ended_at >= moment - p_elapsed)
          AND shares_budget(h, p_scope, p_tenant, p_user, p_key)
    );
END
$$;

-- As before, but for how much is lent and what was recalled.
CREATE OR REPLACE FUNCTION lend_credit(
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
    SELECT l.expires_at INTO ends FROM leases l WHERE l.lease_id = p_lease AND l.ended_at IS NULL AND l.recalled_at IS NULL FOR UPDATE;
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
    -- Never more than a tenth of what is left beyond all that is lent: a lease is a precaution, and what it takes is missing elsewhere
    -- meanwhile. So however many share a budget, what is lent of it is never more than what is left.
    amount_nanousd := CASE WHEN available IS NULL THEN p_most
        ELSE least(greatest(available / 100 * p_percent, p_least), p_most, credit_free(p_tenant, p_user, p_key, moment) / 10) END;
    IF credit_was_recalled(p_tenant, p_user, p_key, moment) THEN -- somebody was turned away for what was lent: it would be recalled again
        amount_nanousd := 0;
    END IF;
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
