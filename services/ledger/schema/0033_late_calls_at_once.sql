-- A record of a call that nobody has told of before costs less: its hold is written once, as it ends, and not set aside first only to be
-- moved in the same breath. Steps come as columns, which are read faster than as many objects that repeat whose they are.

-- As before, but a call that is told of when it is over may begin as settled or voided. What it takes with it comes from a lease, or is nothing.
CREATE OR REPLACE FUNCTION refuse_illegal_hold() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    erased boolean := false;
BEGIN
    IF TG_OP = 'INSERT' THEN
        IF NEW.state <> 'reserved' AND (
            NEW.state NOT IN ('settled', 'voided') OR NEW.provider = '' OR (NEW.amount_nanousd > 0 AND NEW.lease_id IS NULL)
        ) THEN
            RAISE EXCEPTION 'a hold begins as reserved, or is of a call that is over, not as %', NEW.state USING ERRCODE = 'restrict_violation';
        END IF;
    ELSE
        erased := OLD.state <> 'reserved' AND NEW.user_id LIKE 'erased-%' AND OLD.user_id NOT LIKE 'erased-%'
            AND (NEW.api_key_id = OLD.api_key_id OR NEW.api_key_id LIKE 'erased-%');
        IF (NEW.hold_id, NEW.tenant, NEW.operation_id, NEW.attempt, NEW.provider, NEW.model, NEW.price_id, NEW.lease_id,
            NEW.input_tokens_max, NEW.output_tokens_max, NEW.output_tokens_wanted, NEW.amount_nanousd, NEW.created_at)
            IS DISTINCT FROM
           (OLD.hold_id, OLD.tenant, OLD.operation_id, OLD.attempt, OLD.provider, OLD.model, OLD.price_id, OLD.lease_id,
            OLD.input_tokens_max, OLD.output_tokens_max, OLD.output_tokens_wanted, OLD.amount_nanousd, OLD.created_at)
            OR ((NEW.user_id, NEW.api_key_id) IS DISTINCT FROM (OLD.user_id, OLD.api_key_id) AND NOT erased) THEN
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
        ELSIF erased OR (OLD.state, NEW.state)
            NOT IN (('reserved', 'settled'), ('reserved', 'voided'), ('reserved', 'expired'), ('expired', 'reconciled')) THEN
            RAISE EXCEPTION 'a hold that was % is not %: %', OLD.state, NEW.state, OLD.hold_id USING ERRCODE = 'restrict_violation';
        END IF;
    END IF;
    IF NEW.state IN ('reserved', 'voided', 'expired')
        AND (NEW.input_tokens, NEW.output_tokens, NEW.cache_read_tokens, NEW.cache_write_tokens, NEW.cost_nanousd)
            <> (0, 0, 0, 0, (CASE NEW.state WHEN 'expired' THEN NEW.amount_nanousd ELSE 0 END)) THEN
        RAISE EXCEPTION 'a hold that is % does not cost or use that: %', NEW.state, NEW.hold_id USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN NEW;
END
$$;

-- Book calls that nobody has told of before and that are over: rows of `holds` as they end, settled or voided. What is drawn from a lease
-- (amount_nanousd) is taken from it and given back here, and both are posted, as if the call had been told of when it began; what is spent
-- counts where the lease does, if that is open. Raises TR409 if there is a hold of any of these attempts: then nothing is booked.
-- In the owner's name, as resolve_holds is, and with the same look at whose calls they are. The users are there, and locked.
CREATE FUNCTION book_late(p_calls json) RETURNS void LANGUAGE plpgsql
SECURITY DEFINER SET search_path FROM CURRENT SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
DECLARE
    moment timestamptz := clock_timestamp();
    told holds[] := (SELECT array_agg(c ORDER BY c.tenant, c.operation_id, c.attempt) FROM json_populate_recordset(NULL::holds, p_calls) c);
    call holds;
    lease record;
    changes spending[];
    made integer;
BEGIN
    IF EXISTS (
        SELECT FROM unnest(told) c WHERE c.tenant <> coalesce(nullif(current_setting('tailrace.tenant', true), ''), c.tenant)
    ) THEN
        RAISE EXCEPTION 'a call is of another tenant than is worked for' USING ERRCODE = 'insufficient_privilege';
    END IF;
    PERFORM 1 FROM leases l WHERE (l.lease_id, l.tenant) IN (SELECT c.lease_id, c.tenant FROM unnest(told) c WHERE c.lease_id IS NOT NULL)
    ORDER BY l.lease_id FOR SHARE;

    FOR place IN 1 .. cardinality(told) LOOP
        call := told[place];
        CONTINUE WHEN call.lease_id IS NULL AND call.amount_nanousd = 0;
        SELECT l.lease_id, x.api_key_id, x.created_at INTO lease
        FROM leases l LEFT JOIN holds x ON x.hold_id = l.lease_id AND l.ended_at IS NULL AND (x.tenant, x.user_id) = (call.tenant, call.user_id)
        WHERE (l.lease_id, l.tenant) = (call.lease_id, call.tenant);
        call.lease_id := lease.lease_id; -- nobody else's
        IF lease.created_at IS NULL THEN
            call.amount_nanousd := 0;
        ELSE
            call.api_key_id := lease.api_key_id;
            call.created_at := lease.created_at;
        END IF;
        told[place] := call;
    END LOOP;

    -- Counters before new holds, as reserve_hold does: it may be at the very same attempt.
    SELECT array_agg(ROW(d.*)::spending) INTO changes FROM (
        SELECT o.tenant, c.scope, c.subject, c.period, c.period_start, sum(o.spent)::bigint, 0
        FROM (
            SELECT t.tenant, t.user_id, t.api_key_id, date_trunc('day', t.created_at, 'UTC') AS day, sum(t.cost_nanousd) AS spent
            FROM unnest(told) t WHERE t.cost_nanousd > 0 OR t.amount_nanousd > 0 GROUP BY 1, 2, 3, 4
        ) o, counters_of(o.tenant, o.user_id, o.api_key_id, o.day) c
        GROUP BY 1, 2, 3, 4, 5
    ) d;
    IF changes IS NOT NULL THEN
        PERFORM lock_spending(changes);
    END IF;

    INSERT INTO holds (hold_id, tenant, user_id, api_key_id, operation_id, attempt, provider, model, price_id, lease_id, input_tokens_max,
                       output_tokens_max, amount_nanousd, created_at, expires_at, resolved_at, state, cost_nanousd, estimated, input_tokens,
                       output_tokens, cache_read_tokens, cache_write_tokens, cache_write_1h_tokens)
    SELECT t.hold_id, t.tenant, t.user_id, t.api_key_id, t.operation_id, t.attempt, t.provider, t.model, t.price_id, t.lease_id, t.input_tokens_max,
           t.output_tokens_max, t.amount_nanousd, t.created_at, moment, moment, t.state, t.cost_nanousd, t.estimated, t.input_tokens,
           t.output_tokens, t.cache_read_tokens, t.cache_write_tokens, t.cache_write_1h_tokens
    FROM unnest(told) t
    ON CONFLICT (tenant, operation_id, attempt) DO NOTHING;
    GET DIAGNOSTICS made = ROW_COUNT;
    IF made < cardinality(told) THEN
        RAISE EXCEPTION 'an attempt has a hold already' USING ERRCODE = 'TR409';
    END IF;
    IF changes IS NULL THEN
        RETURN;
    END IF;

    UPDATE spending s SET spent_nanousd = s.spent_nanousd + d.spent_nanousd
    FROM unnest(changes) d
    WHERE (s.tenant, s.scope, s.subject, s.period, s.period_start) = (d.tenant, d.scope, d.subject, d.period, d.period_start)
      AND d.spent_nanousd <> 0;
    INSERT INTO entries (posting_id, account, tenant, hold_id, operation_id, kind, amount_nanousd, booked_at)
    SELECT p.posting_id, a.account, p.tenant, p.hold_id, p.operation_id, p.kind, a.amount, moment
    FROM (
        SELECT nextval('postings') AS posting_id, moved.* FROM (
            SELECT t.tenant, t.hold_id, t.operation_id, m.*
            FROM unnest(told) WITH ORDINALITY AS t CROSS JOIN LATERAL (VALUES
                (1, 'reserve', t.amount_nanousd, 0),
                (2, CASE t.state WHEN 'settled' THEN 'settle' ELSE 'void' END, -t.amount_nanousd, t.cost_nanousd)
            ) AS m (turn, kind, held, spent)
            WHERE m.held <> 0 OR m.spent <> 0
            ORDER BY t.ordinality, m.turn
        ) moved
    ) p
    CROSS JOIN LATERAL (VALUES ('available', -p.held - p.spent), ('held', p.held), ('spent', p.spent)) AS a (account, amount)
    WHERE a.amount <> 0;
END
$$;

-- As book_operations, which replicas of the version before go on asking, with the calls that book_late is for, and steps as columns: each
-- names the place of its operation. All records or none: returns whether all of them are new; if not, the caller undoes what was done.
CREATE FUNCTION book_records(
    p_operations json, p_attempts json, p_moves jsonb, p_calls json,
    p_step_of integer[], p_ordinals integer[], p_names text[], p_statuses text[], p_started_ms float8[], p_durations_ms float8[], p_facts text[]
) RETURNS boolean LANGUAGE plpgsql SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
DECLARE
    told operations[] := (SELECT array_agg(o) FROM json_populate_recordset(NULL::operations, p_operations) o);
    own CONSTANT text := (told[1]).tenant; -- of one tenant, all of them
    ids uuid[];
    moments timestamptz[];
    made integer;
BEGIN
    SELECT array_agg(o.operation_id), array_agg(o.created_at) INTO ids, moments FROM unnest(told) o;
    PERFORM ensure_user(mine.tenant, mine.user_id)
    FROM (SELECT DISTINCT o.tenant, o.user_id FROM unnest(told) o ORDER BY 1, 2) mine
    WHERE NOT EXISTS (SELECT FROM users u WHERE u.tenant = mine.tenant AND u.user_id = mine.user_id);
    PERFORM refuse_erased(array_agg(o.tenant), array_agg(o.user_id), ids, moments) FROM unnest(told) o;
    IF (SELECT deleted_any_since(array_agg(o.tenant), min(o.created_at)) FROM unnest(told) o) AND EXISTS (
        SELECT FROM unnest(told) o WHERE o.session_id <> '' AND deleted_since(o.tenant, o.user_id, o.session_id, o.created_at)
    ) THEN
        told := (
            SELECT array_agg(json_populate_record(o, CASE WHEN deleted_since(o.tenant, o.user_id, o.session_id, o.created_at)
                                                     THEN '{"session_id": ""}' ELSE '{}' END::json))
            FROM unnest(told) o
        );
    END IF;
    -- Before anything else is locked: counters come first in every transaction.
    IF json_array_length(p_calls) > 0 THEN
        PERFORM book_late(p_calls);
    END IF;
    IF jsonb_array_length(p_moves) > 0 THEN
        PERFORM resolve_holds(p_moves, clock_timestamp());
    END IF;

    INSERT INTO operation_ids SELECT o.tenant, o.operation_id, o.created_at FROM unnest(told) o ON CONFLICT DO NOTHING;
    GET DIAGNOSTICS made = ROW_COUNT;
    IF made < cardinality(told) THEN
        RETURN false;
    END IF;
    INSERT INTO operations SELECT o.* FROM unnest(told) o;
    PERFORM pg_notify('tailrace_operations', json_build_array(o.tenant, o.user_id, o.operation_id)::text) FROM unnest(told) o;
    INSERT INTO attempts SELECT * FROM json_populate_recordset(NULL::attempts, p_attempts);
    INSERT INTO steps (tenant, operation_id, ordinal, name, status, started_ms, duration_ms, facts, created_at)
    SELECT own, ids[s.place], s.ordinal, s.name, s.status, s.started_ms, s.duration_ms, s.facts::jsonb, moments[s.place]
    FROM unnest(p_step_of, p_ordinals, p_names, p_statuses, p_started_ms, p_durations_ms, p_facts)
        AS s (place, ordinal, name, status, started_ms, duration_ms, facts);
    RETURN true;
END
$$;

-- As before, and for many attempts only the months between the first and the last of them are planned for and looked in.
DO $do$
DECLARE
    wrong_one CONSTANT text := $query$
        SELECT mine.operation_id
        FROM (SELECT DISTINCT tenant, operation_id, created_at FROM inserted) mine
        LEFT JOIN LATERAL (
            SELECT cost_nanousd, input_tokens, output_tokens, cache_read_tokens, cache_write_tokens, cache_write_1h_tokens
            FROM operations found
            WHERE (found.tenant, found.created_at, found.operation_id) = (mine.tenant, mine.created_at, mine.operation_id) %1$s OFFSET 0
        ) o ON true
        CROSS JOIN LATERAL (
            SELECT sum(cost_nanousd) AS cost, sum(input_tokens) AS input, sum(output_tokens) AS output, sum(cache_read_tokens) AS cache_read,
                   sum(cache_write_tokens) AS cache_write, sum(cache_write_1h_tokens) AS cache_write_1h
            FROM attempts a
            WHERE (a.tenant, a.operation_id, a.created_at) = (mine.tenant, mine.operation_id, mine.created_at) %2$s
        ) s
        WHERE (s.cost, s.input, s.output, s.cache_read, s.cache_write, s.cache_write_1h)
            IS DISTINCT FROM (o.cost_nanousd::numeric, o.input_tokens::numeric, o.output_tokens::numeric, o.cache_read_tokens::numeric,
                              o.cache_write_tokens::numeric, o.cache_write_1h_tokens::numeric)
        LIMIT 1
    $query$;
BEGIN
    EXECUTE format($function$
        CREATE OR REPLACE FUNCTION refuse_attempts_of_other_sums() RETURNS trigger LANGUAGE plpgsql
        SECURITY DEFINER SET search_path FROM CURRENT SET enable_seqscan = off SET enable_hashjoin = off AS $body$
        DECLARE
            wrong uuid;
            earliest timestamptz;
            latest timestamptz;
            many boolean;
        BEGIN
            SELECT min(created_at), max(created_at), count(*) > 8 INTO earliest, latest, many FROM inserted;
            IF many THEN
                EXECUTE %1$L INTO wrong USING earliest, latest;
            ELSE
                wrong := (%2$s);
            END IF;
            IF wrong IS NOT NULL THEN
                RAISE EXCEPTION 'operation %% is not the sum of its attempts', wrong USING ERRCODE = 'check_violation';
            END IF;
            RETURN NULL;
        END
        $body$
    $function$, format(wrong_one, 'AND found.created_at BETWEEN $1 AND $2', 'AND a.created_at BETWEEN $1 AND $2'), format(wrong_one, '', ''));
END
$do$;

-- That an entry is of a hold is looked at where it is sealed, with whose hold it is; and holds are never deleted. Once is enough.
ALTER TABLE entries DROP CONSTRAINT entries_hold_id_fkey;
