-- Holds that cannot be moved but as holds.py says, by whatever statement; and calls that are given as many tokens as can be paid.

ALTER TABLE holds
    -- What was asked for, where less could be paid. NULL = output_tokens_max is what was asked for.
    ADD COLUMN output_tokens_wanted bigint CHECK (output_tokens_wanted > output_tokens_max),
    -- What a call cost above what was held: its provider broke its bound, or it had no hold and was booked late, with nothing held.
    ADD COLUMN overage_nanousd bigint GENERATED ALWAYS AS (greatest(cost_nanousd - amount_nanousd, 0)) STORED;

CREATE FUNCTION refuse_illegal_hold() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        IF NEW.state <> 'reserved' THEN
            RAISE EXCEPTION 'a hold begins as reserved, not as %', NEW.state USING ERRCODE = 'restrict_violation';
        END IF;
    ELSIF (NEW.hold_id, NEW.tenant, NEW.user_id, NEW.api_key_id, NEW.operation_id, NEW.attempt, NEW.provider, NEW.model, NEW.price_id,
           NEW.input_tokens_max, NEW.output_tokens_max, NEW.output_tokens_wanted, NEW.amount_nanousd, NEW.created_at)
        IS DISTINCT FROM
          (OLD.hold_id, OLD.tenant, OLD.user_id, OLD.api_key_id, OLD.operation_id, OLD.attempt, OLD.provider, OLD.model, OLD.price_id,
           OLD.input_tokens_max, OLD.output_tokens_max, OLD.output_tokens_wanted, OLD.amount_nanousd, OLD.created_at) THEN
        RAISE EXCEPTION 'what a hold is for does not change: %', OLD.hold_id USING ERRCODE = 'restrict_violation';
    ELSIF NEW.state = OLD.state THEN
        -- Only how long an open hold lives may change without a move.
        IF (NEW.resolved_at, NEW.cost_nanousd, NEW.estimated, NEW.input_tokens, NEW.output_tokens, NEW.cache_read_tokens,
            NEW.cache_write_tokens, NEW.cache_write_1h_tokens, CASE WHEN NEW.state <> 'reserved' THEN NEW.expires_at END)
           IS DISTINCT FROM
           (OLD.resolved_at, OLD.cost_nanousd, OLD.estimated, OLD.input_tokens, OLD.output_tokens, OLD.cache_read_tokens,
            OLD.cache_write_tokens, OLD.cache_write_1h_tokens, CASE WHEN OLD.state <> 'reserved' THEN OLD.expires_at END) THEN
            RAISE EXCEPTION 'a hold that is % changes by a move only: %', OLD.state, OLD.hold_id USING ERRCODE = 'restrict_violation';
        END IF;
    ELSIF (OLD.state, NEW.state) NOT IN (('reserved', 'settled'), ('reserved', 'voided'), ('reserved', 'expired'), ('expired', 'reconciled')) THEN
        RAISE EXCEPTION 'a hold that was % is not %: %', OLD.state, NEW.state, OLD.hold_id USING ERRCODE = 'restrict_violation';
    END IF;
    IF NEW.state IN ('reserved', 'voided', 'expired')
        AND (NEW.input_tokens, NEW.output_tokens, NEW.cache_read_tokens, NEW.cache_write_tokens, NEW.cost_nanousd)
            <> (0, 0, 0, 0, (CASE NEW.state WHEN 'expired' THEN NEW.amount_nanousd ELSE 0 END)) THEN
        RAISE EXCEPTION 'a hold that is % does not cost or use that: %', NEW.state, NEW.hold_id USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER holds_move_legally BEFORE INSERT OR UPDATE ON holds FOR EACH ROW EXECUTE FUNCTION refuse_illegal_hold();
CREATE TRIGGER holds_are_never_deleted BEFORE DELETE OR TRUNCATE ON holds FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();

-- Set the worst case of a call aside, or say why not. One call, because it stands between a question and its first token.
--   held           a new hold; its output_tokens_max is lower than what was asked for, but not below p_output_min, if only that can be paid
--   known          this (operation, attempt) has a hold already; its state says which way it went
--   conflict       it has one, for another call
--   price_changed  the worst case was counted with a price that is not in force any more
--   exhausted      a budget has not enough left: scope, left_nanousd, resets_at
-- p_prompt is what the prompt may cost, and p_output_rate what each output token may, in millionths of a nano-USD. p_output_min 0 = all or
-- nothing. Locks are taken in the order counters, the new hold, the end of the chain.
CREATE FUNCTION reserve_hold(
    p_tenant text, p_user text, p_key text, p_operation uuid, p_attempt integer, p_provider text, p_model text,
    p_price_id bigint, p_prompt numeric, p_output_rate bigint, p_input_max bigint, p_output_max bigint, p_output_min bigint,
    p_ttl interval, p_at timestamptz,
    OUT outcome text, OUT hold_id uuid, OUT amount_nanousd bigint, OUT price_id bigint, OUT expires_at timestamptz,
    OUT state text, OUT scope text, OUT left_nanousd bigint, OUT resets_at timestamptz, OUT output_tokens_max bigint
) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    moment timestamptz := coalesce(p_at, clock_timestamp());
    plan_limit bigint;
    known holds;
    posting bigint;
BEGIN
    PERFORM enter_tenant(p_tenant, true);
    SELECT price_in_force(p_tenant, asked.provider, asked.model, moment) INTO price_id FROM prices asked WHERE asked.price_id = p_price_id;
    IF price_id IS DISTINCT FROM p_price_id THEN
        outcome := 'price_changed';
        RETURN;
    END IF;
    SELECT monthly_budget_nanousd INTO plan_limit FROM members WHERE tenant = p_tenant AND user_id = p_user;
    IF NOT FOUND THEN
        PERFORM ensure_user(p_tenant, p_user);
        SELECT monthly_budget_nanousd INTO plan_limit FROM members WHERE tenant = p_tenant AND user_id = p_user;
    END IF;

    output_tokens_max := p_output_max;
    amount_nanousd := div(p_prompt + output_tokens_max::numeric * p_output_rate + 999999, 1000000);
    IF amount_nanousd > 0 THEN -- else there is nothing to ask, and no row that all of a tenant's calls would queue for
        PERFORM lock_counters(p_tenant, p_user, p_key, moment);
    END IF;
    SELECT * INTO known FROM holds h WHERE h.tenant = p_tenant AND h.operation_id = p_operation AND h.attempt = p_attempt;

    IF NOT FOUND THEN
        IF amount_nanousd > 0 THEN
            SELECT l.scope, l.left_nanousd, (l.period_start + ('1 ' || l.period)::interval) AT TIME ZONE 'UTC'
            INTO scope, left_nanousd, resets_at
            FROM (
                SELECT b.scope, b.limit_nanousd - s.spent_nanousd - s.held_nanousd AS left_nanousd, s.period, s.period_start
                FROM counters_of(p_tenant, p_user, p_key, moment) c
                JOIN spending s ON s.tenant = p_tenant
                 AND (s.scope, s.subject, s.period, s.period_start) = (c.scope, c.subject, c.period, c.period_start)
                JOIN budgets b ON b.tenant = p_tenant AND (b.scope, b.subject, b.period) = (c.scope, c.subject, c.period)
                UNION ALL
                SELECT 'plan', plan_limit - s.spent_nanousd - s.held_nanousd, s.period, s.period_start
                FROM spending s
                WHERE plan_limit > 0 AND s.tenant = p_tenant AND s.scope = 'user' AND s.subject = p_user AND s.period = 'month'
                  AND s.period_start = date_trunc('month', moment AT TIME ZONE 'UTC')::date
            ) l
            ORDER BY l.left_nanousd LIMIT 1;
            IF left_nanousd < amount_nanousd THEN
                output_tokens_max := CASE WHEN p_output_rate > 0 THEN div(left_nanousd::numeric * 1000000 - p_prompt, p_output_rate) ELSE 0 END;
                IF p_output_min = 0 OR output_tokens_max < p_output_min THEN
                    outcome := 'exhausted';
                    RETURN;
                END IF;
                amount_nanousd := div(p_prompt + output_tokens_max::numeric * p_output_rate + 999999, 1000000);
            END IF;
        END IF;

        INSERT INTO holds AS h (tenant, user_id, api_key_id, operation_id, attempt, provider, model, price_id, input_tokens_max,
                                output_tokens_max, output_tokens_wanted, amount_nanousd, created_at, expires_at)
        VALUES (p_tenant, p_user, p_key, p_operation, p_attempt, p_provider, p_model, p_price_id, p_input_max,
                output_tokens_max, nullif(p_output_max, output_tokens_max), amount_nanousd, moment, moment + p_ttl)
        ON CONFLICT (tenant, operation_id, attempt) DO NOTHING
        RETURNING h.hold_id, h.expires_at, h.state INTO hold_id, expires_at, state;
        IF FOUND THEN
            outcome := 'held';
            IF amount_nanousd > 0 THEN
                UPDATE spending s SET held_nanousd = s.held_nanousd + reserve_hold.amount_nanousd
                FROM counters_of(p_tenant, p_user, p_key, moment) c
                WHERE s.tenant = p_tenant AND (s.scope, s.subject, s.period, s.period_start) = (c.scope, c.subject, c.period, c.period_start);
                posting := nextval('postings');
                INSERT INTO entries (posting_id, account, tenant, hold_id, operation_id, kind, amount_nanousd, booked_at)
                VALUES (posting, 'available', p_tenant, hold_id, p_operation, 'reserve', -amount_nanousd, moment),
                       (posting, 'held', p_tenant, hold_id, p_operation, 'reserve', amount_nanousd, moment);
            END IF;
            RETURN;
        END IF;
        SELECT * INTO known FROM holds h WHERE h.tenant = p_tenant AND h.operation_id = p_operation AND h.attempt = p_attempt;
    END IF;

    IF (known.user_id, known.provider, known.model, known.input_tokens_max, coalesce(known.output_tokens_wanted, known.output_tokens_max))
        IS DISTINCT FROM (p_user, p_provider, p_model, p_input_max, p_output_max) THEN
        outcome := 'conflict';
        RETURN;
    END IF;
    outcome := 'known';
    hold_id := known.hold_id; amount_nanousd := known.amount_nanousd; price_id := known.price_id;
    expires_at := known.expires_at; state := known.state; output_tokens_max := known.output_tokens_max;
END
$$;

-- What replicas of the former version call while they are replaced: all or nothing, with the amount counted by them.
CREATE OR REPLACE FUNCTION reserve_hold(
    p_tenant text, p_user text, p_key text, p_operation uuid, p_attempt integer, p_provider text, p_model text,
    p_price_id bigint, p_amount bigint, p_input_max bigint, p_output_max bigint, p_ttl interval, p_at timestamptz,
    OUT outcome text, OUT hold_id uuid, OUT amount_nanousd bigint, OUT price_id bigint, OUT expires_at timestamptz,
    OUT state text, OUT scope text, OUT left_nanousd bigint, OUT resets_at timestamptz
) LANGUAGE sql AS $$
    SELECT r.outcome, r.hold_id, r.amount_nanousd, r.price_id, r.expires_at, r.state, r.scope, r.left_nanousd, r.resets_at
    FROM reserve_hold(p_tenant, p_user, p_key, p_operation, p_attempt, p_provider, p_model, p_price_id, p_amount::numeric * 1000000, 0,
                      p_input_max, p_output_max, 0, p_ttl, p_at) r
$$;
