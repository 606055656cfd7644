-- Money moves in fewer statements: beginning one costs more than what it does to a few rows.

-- As before, but what the moves and calls do to counters, holds and books is found out first and then written, each in one statement.
-- What is left of each budget is counted here from one call to the next.
CREATE OR REPLACE FUNCTION settle_and_reserve(p_tenant text, p_moves jsonb, p_calls jsonb, p_at timestamptz) RETURNS TABLE (
    outcome text, hold_id uuid, amount_nanousd bigint, price_id bigint, expires_at timestamptz,
    state text, scope text, left_nanousd bigint, resets_at timestamptz, output_tokens_max bigint
) LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
#variable_conflict use_column
DECLARE
    moment timestamptz := coalesce(p_at, clock_timestamp());
    day date := (moment AT TIME ZONE 'UTC')::date;
    month date := date_trunc('month', moment AT TIME ZONE 'UTC')::date;
    moved uuid[];
    moved_for uuid[];
    movers text[];
    mover_keys text[];
    moved_made timestamptz[];
    kinds text[];
    held bigint[];
    spent bigint[];
    missing boolean;
    counters spending[];
    limits text[];
    limited text[];
    lefts bigint[];
    ends timestamptz[];
    tightest integer;
    asked record;
    looked_up bigint;
    in_force bigint;
    fresh holds;
    made holds[] := '{}';
BEGIN
    PERFORM enter_tenant(p_tenant, true);
    IF jsonb_array_length(p_moves) > 0 THEN
        WITH moving AS (
            UPDATE holds h
            SET state = m.state, resolved_at = moment, cost_nanousd = m.cost_nanousd, estimated = m.estimated,
                input_tokens = m.input_tokens, output_tokens = m.output_tokens, cache_read_tokens = m.cache_read_tokens,
                cache_write_tokens = m.cache_write_tokens, cache_write_1h_tokens = m.cache_write_1h_tokens
            FROM moves_in(p_moves) m
            WHERE h.hold_id = m.hold_id AND h.tenant IS NOT DISTINCT FROM p_tenant -- by its id alone, whatever there was to plan with
            RETURNING h.hold_id, h.operation_id, h.user_id, h.api_key_id, h.created_at, m.kind, m.held, m.spent
        )
        SELECT array_agg(m.hold_id), array_agg(m.operation_id), array_agg(m.user_id), array_agg(m.api_key_id), array_agg(m.created_at),
               array_agg(m.kind), array_agg(m.held), array_agg(m.spent)
        INTO moved, moved_for, movers, mover_keys, moved_made, kinds, held, spent FROM moving m;
        IF coalesce(cardinality(moved), 0) < jsonb_array_length(p_moves) THEN
            RAISE EXCEPTION 'a hold is of another tenant than is worked for, or gone' USING ERRCODE = 'insufficient_privilege';
        END IF;
    END IF;

    -- The counters of all of them, locked, with what the moves make of them.
    SELECT array_agg(ROW(p_tenant, k.scope, k.subject, k.period, k.period_start, s.spent_nanousd + k.spent, s.held_nanousd + k.held)::spending),
           bool_or(s.tenant IS NULL)
    INTO counters, missing
    FROM (
        SELECT c.scope, c.subject, c.period, c.period_start, sum(o.held)::bigint AS held, sum(o.spent)::bigint AS spent
        FROM (
            SELECT * FROM unnest(movers, mover_keys, moved_made, held, spent)
            UNION ALL
            SELECT r.user_id, r.api_key_id, moment, 0, 0 FROM reservations_in(p_calls) r
        ) o (user_id, api_key_id, made_at, held, spent)
        CROSS JOIN LATERAL counters_of(p_tenant, o.user_id, o.api_key_id, o.made_at) c
        GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4
    ) k
    LEFT JOIN LATERAL (
        SELECT c.tenant, c.spent_nanousd, c.held_nanousd FROM spending c WHERE c.tenant = p_tenant
        AND (c.scope, c.subject, c.period, c.period_start) = (k.scope, k.subject, k.period, k.period_start) FOR UPDATE
    ) s ON true;
    IF missing THEN
        RAISE EXCEPTION 'a counter is missing' USING ERRCODE = 'object_not_in_prerequisite_state';
    END IF;

    IF jsonb_array_length(p_calls) > 0 THEN
        SELECT array_agg(l.scope), array_agg(l.subject), array_agg(l.left_nanousd),
               array_agg((l.period_start + ('1 ' || l.period)::interval) AT TIME ZONE 'UTC')
        INTO limits, limited, lefts, ends
        FROM (
            SELECT b.scope, b.subject, b.limit_nanousd - c.spent_nanousd - c.held_nanousd AS left_nanousd, c.period, c.period_start
            FROM unnest(counters) c
            JOIN budgets b ON b.tenant = p_tenant AND (b.scope, b.subject, b.period) = (c.scope, c.subject, c.period)
            WHERE c.period_start = CASE c.period WHEN 'day' THEN day ELSE month END
            UNION ALL
            SELECT 'plan', c.subject, m.monthly_budget_nanousd - c.spent_nanousd - c.held_nanousd, c.period, c.period_start
            FROM unnest(counters) c
            JOIN members m ON m.tenant = p_tenant AND m.user_id = c.subject AND m.monthly_budget_nanousd > 0
            WHERE c.scope = 'user' AND c.period = 'month' AND c.period_start = month
        ) l;
    END IF;
    FOR asked IN
        SELECT r.*, h.hold_id AS known_id, h.user_id AS known_user, h.provider AS known_provider, h.model AS known_model,
               h.input_tokens_max AS known_input, coalesce(h.output_tokens_wanted, h.output_tokens_max) AS known_output,
               h.amount_nanousd AS known_amount, h.price_id AS known_price, h.expires_at AS known_until, h.state AS known_state,
               h.output_tokens_max AS known_output_max
        FROM reservations_in(p_calls) r
        LEFT JOIN LATERAL (
            SELECT * FROM holds x WHERE x.tenant = p_tenant AND x.operation_id = r.operation_id AND x.attempt = r.attempt OFFSET 0
        ) h ON true
    LOOP
        hold_id := NULL; amount_nanousd := NULL; expires_at := NULL; state := NULL; scope := NULL; left_nanousd := NULL; resets_at := NULL;
        price_id := asked.price_id;
        output_tokens_max := asked.output_tokens_max;
        IF asked.price_id IS DISTINCT FROM looked_up THEN
            looked_up := asked.price_id;
            SELECT price_in_force(p_tenant, p.provider, p.model, moment) INTO in_force FROM prices p WHERE p.price_id = looked_up;
        END IF;
        IF in_force IS DISTINCT FROM asked.price_id THEN
            outcome := 'price_changed';
            RETURN NEXT;
            CONTINUE;
        ELSIF asked.known_id IS NOT NULL THEN
            IF (asked.known_user, asked.known_provider, asked.known_model, asked.known_input, asked.known_output)
                IS DISTINCT FROM (asked.user_id, asked.provider, asked.model, asked.input_tokens_max, asked.output_tokens_max) THEN
                outcome := 'conflict';
            ELSE
                outcome := 'known';
                hold_id := asked.known_id; amount_nanousd := asked.known_amount; price_id := asked.known_price;
                expires_at := asked.known_until; state := asked.known_state; output_tokens_max := asked.known_output_max;
            END IF;
            RETURN NEXT;
            CONTINUE;
        END IF;

        amount_nanousd := div(asked.prompt + output_tokens_max::numeric * asked.output_rate + 999999, 1000000);
        tightest := NULL;
        FOR place IN 1 .. coalesce(cardinality(limits), 0) LOOP
            CONTINUE WHEN limited[place] <> CASE limits[place] WHEN 'tenant' THEN p_tenant WHEN 'key' THEN asked.api_key_id ELSE asked.user_id END
                OR lefts[place] >= left_nanousd;
            tightest := place; left_nanousd := lefts[place];
        END LOOP;
        IF left_nanousd < amount_nanousd THEN
            output_tokens_max := CASE WHEN asked.output_rate > 0
                THEN div(left_nanousd::numeric * 1000000 - asked.prompt, asked.output_rate) ELSE 0 END;
            IF asked.output_tokens_min = 0 OR output_tokens_max < asked.output_tokens_min THEN
                outcome := 'exhausted'; scope := limits[tightest]; resets_at := ends[tightest];
                RETURN NEXT;
                CONTINUE;
            END IF;
            amount_nanousd := div(asked.prompt + output_tokens_max::numeric * asked.output_rate + 999999, 1000000);
        END IF;
        FOR place IN 1 .. coalesce(cardinality(limits), 0) LOOP
            CONTINUE WHEN limited[place] <> CASE limits[place] WHEN 'tenant' THEN p_tenant WHEN 'key' THEN asked.api_key_id ELSE asked.user_id END;
            lefts[place] := lefts[place] - amount_nanousd;
        END LOOP;

        outcome := 'held'; state := 'reserved'; hold_id := gen_random_uuid();
        expires_at := moment + asked.ttl_ms * interval '1 millisecond';
        fresh.hold_id := hold_id; fresh.user_id := asked.user_id; fresh.api_key_id := asked.api_key_id;
        fresh.operation_id := asked.operation_id; fresh.attempt := asked.attempt; fresh.provider := asked.provider;
        fresh.model := asked.model; fresh.price_id := price_id; fresh.input_tokens_max := asked.input_tokens_max;
        fresh.output_tokens_max := output_tokens_max; fresh.output_tokens_wanted := nullif(asked.output_tokens_max, output_tokens_max);
        fresh.amount_nanousd := amount_nanousd; fresh.expires_at := expires_at;
        made := made || fresh;
        RETURN NEXT;
    END LOOP;

    IF made <> '{}' THEN
        INSERT INTO holds (hold_id, tenant, user_id, api_key_id, operation_id, attempt, provider, model, price_id, input_tokens_max,
                           output_tokens_max, output_tokens_wanted, amount_nanousd, created_at, expires_at)
        SELECT m.hold_id, p_tenant, m.user_id, m.api_key_id, m.operation_id, m.attempt, m.provider, m.model, m.price_id, m.input_tokens_max,
               m.output_tokens_max, m.output_tokens_wanted, m.amount_nanousd, moment, m.expires_at
        FROM unnest(made) m;
    END IF;
    UPDATE spending s SET spent_nanousd = c.spent_nanousd, held_nanousd = c.held_nanousd + taken.amount
    FROM unnest(counters) c
    CROSS JOIN LATERAL (
        SELECT coalesce(sum(m.amount_nanousd), 0)::bigint AS amount FROM unnest(made) m
        WHERE c.period_start = CASE c.period WHEN 'day' THEN day ELSE month END
          AND c.subject = CASE c.scope WHEN 'tenant' THEN p_tenant WHEN 'key' THEN m.api_key_id ELSE m.user_id END
    ) taken
    WHERE s.tenant = p_tenant AND (s.scope, s.subject, s.period, s.period_start) = (c.scope, c.subject, c.period, c.period_start)
      AND (s.spent_nanousd, s.held_nanousd) <> (c.spent_nanousd, c.held_nanousd + taken.amount);
    INSERT INTO entries (posting_id, account, tenant, hold_id, operation_id, kind, amount_nanousd, booked_at)
    SELECT p.posting_id, a.account, p_tenant, p.hold_id, p.operation_id, p.kind, a.amount, moment
    FROM (
        SELECT nextval('postings') AS posting_id, booked.* FROM (
            SELECT * FROM unnest(moved, moved_for, kinds, held, spent)
            UNION ALL
            SELECT m.hold_id, m.operation_id, 'reserve', m.amount_nanousd, 0 FROM unnest(made) m
        ) booked (hold_id, operation_id, kind, held, spent)
    ) p
    CROSS JOIN LATERAL (VALUES ('available', -p.held - p.spent), ('held', p.held), ('spent', p.spent)) AS a (account, amount)
    WHERE a.amount <> 0;
END
$$;

-- As the one that reads JSON, which asks this one from now on. `p_changes` names each counter once.
CREATE FUNCTION lock_spending(p_changes spending[]) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    present integer;
BEGIN
    SELECT count(*) INTO present FROM unnest(p_changes) mine JOIN spending s USING (tenant, scope, subject, period, period_start);
    IF present < cardinality(p_changes) THEN
        INSERT INTO spending (tenant, scope, subject, period, period_start)
        SELECT mine.tenant, mine.scope, mine.subject, mine.period, mine.period_start FROM unnest(p_changes) mine ORDER BY 1, 2, 3, 4, 5
        ON CONFLICT DO NOTHING;
    END IF;
    PERFORM 1 FROM unnest(p_changes) mine JOIN spending s USING (tenant, scope, subject, period, period_start)
    ORDER BY s.tenant, s.scope, s.subject, s.period, s.period_start FOR UPDATE OF s;
END
$$;
CREATE OR REPLACE FUNCTION lock_spending(p_changes jsonb) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM lock_spending(ARRAY(SELECT c FROM spending_in(p_changes) c));
END
$$;

-- As before, but a hold is looked at once, and all that a user's holds of a day move is counted together.
CREATE OR REPLACE FUNCTION resolve_holds(p_moves jsonb, p_at timestamptz) RETURNS void LANGUAGE plpgsql
SECURITY DEFINER SET search_path FROM CURRENT SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
DECLARE
    moment timestamptz := coalesce(p_at, clock_timestamp());
    tenants text[];
    moved uuid[];
    moved_for uuid[];
    movers text[];
    mover_keys text[];
    days timestamptz[];
    kinds text[];
    held bigint[];
    spent bigint[];
    changes spending[];
BEGIN
    WITH moving AS (
        UPDATE holds h
        SET state = m.state, resolved_at = moment, cost_nanousd = m.cost_nanousd, estimated = m.estimated,
            input_tokens = m.input_tokens, output_tokens = m.output_tokens, cache_read_tokens = m.cache_read_tokens,
            cache_write_tokens = m.cache_write_tokens, cache_write_1h_tokens = m.cache_write_1h_tokens
        FROM moves_in(p_moves) m
        WHERE h.hold_id = m.hold_id AND h.tenant = coalesce(nullif(current_setting('tailrace.tenant', true), ''), h.tenant)
        RETURNING h.tenant, h.hold_id, h.operation_id, h.user_id, h.api_key_id, date_trunc('day', h.created_at, 'UTC') AS day,
                  m.kind, m.held, m.spent
    )
    SELECT array_agg(m.tenant), array_agg(m.hold_id), array_agg(m.operation_id), array_agg(m.user_id), array_agg(m.api_key_id),
           array_agg(m.day), array_agg(m.kind), array_agg(m.held), array_agg(m.spent)
    INTO tenants, moved, moved_for, movers, mover_keys, days, kinds, held, spent FROM moving m;
    IF coalesce(cardinality(moved), 0) < jsonb_array_length(p_moves) THEN
        RAISE EXCEPTION 'a hold is of another tenant than is worked for, or gone' USING ERRCODE = 'insufficient_privilege';
    END IF;

    SELECT array_agg(ROW(d.*)::spending) INTO changes FROM (
        SELECT o.tenant, c.scope, c.subject, c.period, c.period_start, sum(o.spent)::bigint, sum(o.held)::bigint
        FROM (
            SELECT m.tenant, m.user_id, m.api_key_id, m.day, sum(m.held) AS held, sum(m.spent) AS spent
            FROM unnest(tenants, movers, mover_keys, days, held, spent) AS m (tenant, user_id, api_key_id, day, held, spent)
            WHERE m.held <> 0 OR m.spent <> 0
            GROUP BY 1, 2, 3, 4
        ) o, counters_of(o.tenant, o.user_id, o.api_key_id, o.day) c
        GROUP BY 1, 2, 3, 4, 5
    ) d;
    IF changes IS NULL THEN
        RETURN;
    END IF;
    PERFORM lock_spending(changes);
    UPDATE spending s SET held_nanousd = s.held_nanousd + d.held_nanousd, spent_nanousd = s.spent_nanousd + d.spent_nanousd
    FROM unnest(changes) d
    WHERE (s.tenant, s.scope, s.subject, s.period, s.period_start) = (d.tenant, d.scope, d.subject, d.period, d.period_start)
      AND (d.held_nanousd <> 0 OR d.spent_nanousd <> 0);
    INSERT INTO entries (posting_id, account, tenant, hold_id, operation_id, kind, amount_nanousd, booked_at)
    SELECT m.posting_id, a.account, m.tenant, m.hold_id, m.operation_id, m.kind, a.amount, moment
    FROM (
        SELECT nextval('postings') AS posting_id, r.*
        FROM unnest(tenants, moved, moved_for, kinds, held, spent) AS r (tenant, hold_id, operation_id, kind, held, spent)
    ) m
    CROSS JOIN LATERAL (VALUES ('available', -m.held - m.spent), ('held', m.held), ('spent', m.spent)) AS a (account, amount)
    WHERE a.amount <> 0;
END
$$;

-- As before, but a user's calls of a day are counted together.
CREATE OR REPLACE FUNCTION counters_of_calls(p_calls jsonb)
RETURNS TABLE (tenant text, scope text, subject text, period text, period_start date) LANGUAGE sql STABLE AS $$
    SELECT o.tenant, c.scope, c.subject, c.period, c.period_start
    FROM (
        SELECT called.tenant, called.user_id, called.api_key_id, date_trunc('day', called.created_at, 'UTC') AS day FROM calls_in(p_calls) called
        UNION
        SELECT lease.tenant, lease.user_id, lease.api_key_id, date_trunc('day', lease.created_at, 'UTC')
        FROM calls_in(p_calls) called
        CROSS JOIN LATERAL (
            SELECT x.tenant, x.user_id, x.api_key_id, x.created_at FROM holds x WHERE x.hold_id = called.lease_id OFFSET 0
        ) lease
    ) o, counters_of(o.tenant, o.user_id, o.api_key_id, o.day) c
$$;

-- Whether any of these users, or a conversation of any of them, may have been deleted at `p_since` or later: mostly nobody was, and then
-- there is no need to ask for each. As sure as deleted_since.
CREATE FUNCTION deleted_any_since(p_tenants text[], p_since timestamptz) RETURNS boolean LANGUAGE sql STABLE AS $$
    SELECT EXISTS (SELECT FROM deleted_sessions d WHERE d.tenant = ANY (p_tenants) AND d.deleted_at >= p_since)
$$;

-- As before, but for deleted_any_since.
CREATE OR REPLACE FUNCTION refuse_erased(p_tenants text[], p_users text[], p_operations uuid[], p_accepted timestamptz[]) RETURNS void
LANGUAGE plpgsql SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
BEGIN
    PERFORM 1 FROM users u WHERE (u.tenant, u.user_id) IN (SELECT * FROM unnest(p_tenants, p_users)) ORDER BY u.tenant, u.user_id FOR KEY SHARE;
    IF deleted_any_since(p_tenants, (SELECT min(a) FROM unnest(p_accepted) a)) AND EXISTS (
        SELECT FROM unnest(p_tenants, p_users, p_operations, p_accepted) AS o (tenant, user_id, operation_id, accepted_at)
        WHERE deleted_since(o.tenant, o.user_id, '', o.accepted_at) AND NOT EXISTS (
            SELECT FROM holds h WHERE (h.tenant, h.operation_id, h.user_id) = (o.tenant, o.operation_id, o.user_id)
        )
    ) THEN
        RAISE EXCEPTION 'the user was erased after the operation was accepted' USING ERRCODE = 'TR410';
    END IF;
END
$$;

-- As before, but for deleted_any_since.
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
    IF (SELECT deleted_any_since(array_agg(o.tenant), min(o.created_at)) FROM unnest(told) o) AND EXISTS (
        SELECT FROM unnest(told) o WHERE o.session_id <> '' AND deleted_since(o.tenant, o.user_id, o.session_id, o.created_at)
    ) THEN
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

-- As before, but the user is locked before the turn is looked for: who erases them, or deletes the conversation, comes before or after the
-- whole of it, and not between the two.
CREATE OR REPLACE FUNCTION put_summary(
    p_tenant text, p_user text, p_session text, p_answer_id uuid, p_summary text, p_made_by text, p_created_at timestamptz
) RETURNS boolean LANGUAGE plpgsql SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
DECLARE
    reached integer;
BEGIN
    PERFORM 1 FROM users WHERE tenant = p_tenant AND user_id = p_user FOR KEY SHARE;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    SELECT ordinal INTO reached FROM turns
    WHERE tenant = p_tenant AND user_id = p_user AND answer_id = p_answer_id AND session_id = p_session;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    INSERT INTO summaries (tenant, user_id, session_id, through, summary, made_by, created_at)
    VALUES (p_tenant, p_user, p_session, reached, p_summary, p_made_by, p_created_at)
    ON CONFLICT (tenant, user_id, session_id, through) DO UPDATE
    SET summary = excluded.summary, made_by = excluded.made_by, created_at = excluded.created_at;
    DELETE FROM summaries s WHERE s.tenant = p_tenant AND s.user_id = p_user AND s.session_id = p_session AND s.through NOT IN (
        SELECT k.through FROM summaries k WHERE k.tenant = p_tenant AND k.user_id = p_user AND k.session_id = p_session
        ORDER BY k.through DESC LIMIT 16
    );
    RETURN true;
END
$$;
