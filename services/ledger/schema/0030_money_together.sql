-- Money of one tenant that is given back and set aside at the same moment goes in one transaction: its calls lock the tenant's rows, so one
-- waits for the other anyway, and each transaction that is saved saves a flush of the log.

-- What reserve_hold does between locking the counters and posting: look for the hold, count what is left, make the hold and count it.
CREATE FUNCTION try_hold(
    p_tenant text, p_user text, p_key text, p_operation uuid, p_attempt integer, p_provider text, p_model text,
    p_price_id bigint, p_prompt numeric, p_output_rate bigint, p_input_max bigint, p_output_max bigint, p_output_min bigint,
    p_ttl interval, p_moment timestamptz,
    OUT outcome text, OUT hold_id uuid, OUT amount_nanousd bigint, OUT price_id bigint, OUT expires_at timestamptz,
    OUT state text, OUT scope text, OUT left_nanousd bigint, OUT resets_at timestamptz, OUT output_tokens_max bigint
) LANGUAGE plpgsql SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
#variable_conflict use_column
DECLARE
    plan_limit bigint;
    known holds;
BEGIN
    price_id := p_price_id;
    output_tokens_max := p_output_max;
    amount_nanousd := div(p_prompt + output_tokens_max::numeric * p_output_rate + 999999, 1000000);
    SELECT * INTO known FROM holds h WHERE h.tenant = p_tenant AND h.operation_id = p_operation AND h.attempt = p_attempt;

    IF NOT FOUND THEN
        IF amount_nanousd > 0 THEN
            SELECT monthly_budget_nanousd INTO plan_limit FROM members WHERE tenant = p_tenant AND user_id = p_user;
            SELECT l.scope, l.left_nanousd, (l.period_start + ('1 ' || l.period)::interval) AT TIME ZONE 'UTC'
            INTO scope, left_nanousd, resets_at
            FROM (
                SELECT b.scope, b.limit_nanousd - s.spent_nanousd - s.held_nanousd AS left_nanousd, s.period, s.period_start
                FROM counters_of(p_tenant, p_user, p_key, p_moment) c
                JOIN spending s ON s.tenant = p_tenant
                 AND (s.scope, s.subject, s.period, s.period_start) = (c.scope, c.subject, c.period, c.period_start)
                JOIN budgets b ON b.tenant = p_tenant AND (b.scope, b.subject, b.period) = (c.scope, c.subject, c.period)
                UNION ALL
                SELECT 'plan', plan_limit - s.spent_nanousd - s.held_nanousd, s.period, s.period_start
                FROM spending s
                WHERE plan_limit > 0 AND s.tenant = p_tenant AND s.scope = 'user' AND s.subject = p_user AND s.period = 'month'
                  AND s.period_start = date_trunc('month', p_moment AT TIME ZONE 'UTC')::date
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
                output_tokens_max, nullif(p_output_max, output_tokens_max), amount_nanousd, p_moment, p_moment + p_ttl)
        ON CONFLICT (tenant, operation_id, attempt) DO NOTHING
        RETURNING h.hold_id, h.expires_at, h.state INTO hold_id, expires_at, state;
        IF FOUND THEN
            outcome := 'held';
            IF amount_nanousd > 0 THEN
                UPDATE spending s SET held_nanousd = s.held_nanousd + try_hold.amount_nanousd
                FROM counters_of(p_tenant, p_user, p_key, p_moment) c
                WHERE s.tenant = p_tenant AND (s.scope, s.subject, s.period, s.period_start) = (c.scope, c.subject, c.period, c.period_start);
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

-- What is set aside goes from one account to the other. Nothing is posted for what costs nothing.
CREATE FUNCTION post_holds(p_tenant text, p_holds uuid[], p_operations uuid[], p_amounts bigint[], p_moment timestamptz) RETURNS void
LANGUAGE sql AS $$
    INSERT INTO entries (posting_id, account, tenant, hold_id, operation_id, kind, amount_nanousd, booked_at)
    SELECT m.posting_id, a.account, p_tenant, m.hold_id, m.operation_id, 'reserve', a.amount, p_moment
    FROM (
        SELECT nextval('postings') AS posting_id, h.* FROM unnest(p_holds, p_operations, p_amounts) AS h (hold_id, operation_id, amount)
        WHERE h.amount > 0
    ) m
    CROSS JOIN LATERAL (VALUES ('available', -m.amount), ('held', m.amount)) AS a (account, amount)
$$;

-- See 0008 for what it says and in which order it locks.
CREATE OR REPLACE FUNCTION reserve_hold(
    p_tenant text, p_user text, p_key text, p_operation uuid, p_attempt integer, p_provider text, p_model text,
    p_price_id bigint, p_prompt numeric, p_output_rate bigint, p_input_max bigint, p_output_max bigint, p_output_min bigint,
    p_ttl interval, p_at timestamptz,
    OUT outcome text, OUT hold_id uuid, OUT amount_nanousd bigint, OUT price_id bigint, OUT expires_at timestamptz,
    OUT state text, OUT scope text, OUT left_nanousd bigint, OUT resets_at timestamptz, OUT output_tokens_max bigint
) LANGUAGE plpgsql SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
#variable_conflict use_column
DECLARE
    moment timestamptz := coalesce(p_at, clock_timestamp());
BEGIN
    PERFORM enter_tenant(p_tenant, true);
    SELECT price_in_force(p_tenant, asked.provider, asked.model, moment) INTO price_id FROM prices asked WHERE asked.price_id = p_price_id;
    IF price_id IS DISTINCT FROM p_price_id THEN
        outcome := 'price_changed';
        RETURN;
    END IF;
    PERFORM 1 FROM users u WHERE u.tenant = p_tenant AND u.user_id = p_user;
    IF NOT FOUND THEN
        PERFORM ensure_user(p_tenant, p_user);
    END IF;
    IF p_prompt + p_output_max::numeric * p_output_rate > 0 THEN -- else there is no row that all of a tenant's calls would queue for
        PERFORM lock_counters(p_tenant, p_user, p_key, moment);
    END IF;
    SELECT t.* INTO outcome, hold_id, amount_nanousd, price_id, expires_at, state, scope, left_nanousd, resets_at, output_tokens_max
    FROM try_hold(p_tenant, p_user, p_key, p_operation, p_attempt, p_provider, p_model, p_price_id, p_prompt, p_output_rate,
                  p_input_max, p_output_max, p_output_min, p_ttl, moment) t;
    IF outcome = 'held' AND amount_nanousd > 0 THEN
        PERFORM post_holds(p_tenant, ARRAY[hold_id], ARRAY[p_operation], ARRAY[amount_nanousd], moment);
    END IF;
END
$$;

-- Calls as settle_and_reserve is given them, planned for as few as there mostly are; see moves_in.
CREATE FUNCTION reservations_in(p_calls jsonb) RETURNS TABLE (
    user_id text, api_key_id text, operation_id uuid, attempt integer, provider text, model text, price_id bigint, prompt numeric,
    output_rate bigint, input_tokens_max bigint, output_tokens_max bigint, output_tokens_min bigint, ttl_ms bigint
) LANGUAGE sql IMMUTABLE STRICT ROWS 4 AS $$
    SELECT * FROM jsonb_to_recordset(p_calls) AS c (
        user_id text, api_key_id text, operation_id uuid, attempt integer, provider text, model text, price_id bigint, prompt numeric,
        output_rate bigint, input_tokens_max bigint, output_tokens_max bigint, output_tokens_min bigint, ttl_ms bigint
    )
$$;

-- First the moves, as resolve_holds_of does them, then the calls in their order, each with what reserve_hold would say: what the moves free
-- is there for the calls. All are of one API key, or of none, whose counters are locked before the tenant's; and every user and counter must
-- be there. So whoever has the tenant's counters waits for nobody who wants them.
CREATE FUNCTION settle_and_reserve(p_tenant text, p_moves jsonb, p_calls jsonb, p_at timestamptz) RETURNS TABLE (
    outcome text, hold_id uuid, amount_nanousd bigint, price_id bigint, expires_at timestamptz,
    state text, scope text, left_nanousd bigint, resets_at timestamptz, output_tokens_max bigint
) LANGUAGE plpgsql SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
#variable_conflict use_column
DECLARE
    moment timestamptz := coalesce(p_at, clock_timestamp());
    missing boolean;
    asked record;
    looked_up bigint;
    in_force bigint;
    made uuid[] := '{}';
    made_for uuid[] := '{}';
    amounts bigint[] := '{}';
BEGIN
    PERFORM enter_tenant(p_tenant, true);
    IF jsonb_array_length(p_moves) > 0 THEN
        PERFORM resolve_holds(p_moves, moment);
    END IF;

    SELECT bool_or(s.tenant IS NULL) INTO missing
    FROM (
        SELECT DISTINCT d.* FROM reservations_in(p_calls) r CROSS JOIN LATERAL counters_of(p_tenant, r.user_id, r.api_key_id, moment) d
        ORDER BY 1, 2, 3, 4
    ) k
    LEFT JOIN LATERAL (
        SELECT c.tenant FROM spending c WHERE c.tenant = p_tenant
        AND (c.scope, c.subject, c.period, c.period_start) = (k.scope, k.subject, k.period, k.period_start) FOR UPDATE
    ) s ON true;
    IF missing THEN
        RAISE EXCEPTION 'a counter is missing' USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;
    FOR asked IN SELECT * FROM reservations_in(p_calls) LOOP
        IF asked.price_id IS DISTINCT FROM looked_up THEN
            looked_up := asked.price_id;
            SELECT price_in_force(p_tenant, p.provider, p.model, moment) INTO in_force FROM prices p WHERE p.price_id = asked.price_id;
        END IF;
        IF in_force IS DISTINCT FROM asked.price_id THEN
            outcome := 'price_changed';
        ELSE
            SELECT t.* INTO outcome, hold_id, amount_nanousd, price_id, expires_at, state, scope, left_nanousd, resets_at, output_tokens_max
            FROM try_hold(
                p_tenant, asked.user_id, asked.api_key_id, asked.operation_id, asked.attempt, asked.provider, asked.model, asked.price_id,
                asked.prompt, asked.output_rate, asked.input_tokens_max, asked.output_tokens_max, asked.output_tokens_min,
                asked.ttl_ms * interval '1 millisecond', moment
            ) t;
        END IF;
        IF outcome = 'held' THEN
            made := made || hold_id; made_for := made_for || asked.operation_id; amounts := amounts || amount_nanousd;
        END IF;
        RETURN NEXT;
    END LOOP;
    IF made <> '{}' THEN
        PERFORM post_holds(p_tenant, made, made_for, amounts, moment);
    END IF;
END
$$;
