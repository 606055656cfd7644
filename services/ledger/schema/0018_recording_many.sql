-- Many records at the cost of few: what was done row by row is done once for all rows of a statement. What is checked stays the same.

-- As before, but the end of a tenant's chain is read and written once for all postings of a statement.
CREATE OR REPLACE FUNCTION seal_entries() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
DECLARE
    posting record;
    head chain_heads;
    numbers bigint[] := '{}';
    sealed bigint[] := '{}';
    hashes bytea[] := '{}';
BEGIN
    FOR posting IN
        SELECT i.posting_id, i.tenant, i.hold_id, i.operation_id, i.kind, i.booked_at, sum(i.amount_nanousd) AS sum_nanousd,
               string_agg(i.account || '=' || i.amount_nanousd, ' ' ORDER BY i.account COLLATE "C") AS amounts,
               bool_and(h.hold_id IS NOT NULL) AS of_its_hold
        FROM inserted i LEFT JOIN LATERAL (
            SELECT hold_id FROM holds WHERE (hold_id, tenant, operation_id) = (i.hold_id, i.tenant, i.operation_id) OFFSET 0
        ) h ON true
        GROUP BY i.posting_id, i.tenant, i.hold_id, i.operation_id, i.kind, i.booked_at
        ORDER BY i.tenant, i.posting_id
    LOOP
        IF posting.sum_nanousd <> 0 THEN
            RAISE EXCEPTION 'a posting does not sum to zero' USING ERRCODE = 'check_violation';
        END IF;
        IF NOT posting.of_its_hold THEN
            RAISE EXCEPTION 'a posting is not of its hold''s tenant and operation' USING ERRCODE = 'check_violation';
        END IF;
        IF head.tenant IS DISTINCT FROM posting.tenant THEN
            PERFORM move_chain_head(head, numbers, sealed, hashes);
            head := chain_head_of(posting.tenant);
            numbers := '{}'; sealed := '{}'; hashes := '{}';
        END IF;
        head.commit_number := head.commit_number + 1;
        head.hash := posting_hash(head.hash, posting.tenant, head.commit_number, posting.posting_id, posting.hold_id, posting.operation_id,
                                  posting.kind, posting.booked_at, posting.amounts);
        numbers := numbers || head.commit_number;
        sealed := sealed || posting.posting_id;
        hashes := hashes || head.hash;
    END LOOP;
    PERFORM move_chain_head(head, numbers, sealed, hashes);
    RETURN NULL;
END
$$;

-- The end of a tenant's chain, locked. It is the last row that a transaction locks: counters go before it, so that nobody who has it
-- waits for anybody else.
CREATE FUNCTION chain_head_of(p_tenant text) RETURNS chain_heads LANGUAGE plpgsql AS $$
DECLARE
    head chain_heads;
BEGIN
    SELECT * INTO head FROM chain_heads WHERE tenant = p_tenant FOR UPDATE;
    IF NOT FOUND THEN
        INSERT INTO chain_heads VALUES (p_tenant, 0, decode(repeat('00', 32), 'hex')) ON CONFLICT DO NOTHING;
        SELECT * INTO STRICT head FROM chain_heads WHERE tenant = p_tenant FOR UPDATE;
    END IF;
    RETURN head;
END
$$;

-- Put links at the end of the chain and move its head there. Without links nothing happens.
CREATE FUNCTION move_chain_head(p_head chain_heads, p_numbers bigint[], p_postings bigint[], p_hashes bytea[]) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF cardinality(p_numbers) = 0 THEN
        RETURN;
    END IF;
    INSERT INTO chain_links (tenant, commit_number, posting_id, hash)
    SELECT p_head.tenant, link.* FROM unnest(p_numbers, p_postings, p_hashes) AS link (commit_number, posting_id, hash);
    UPDATE chain_heads SET commit_number = p_head.commit_number, hash = p_head.hash WHERE tenant = p_head.tenant;
END
$$;
DROP FUNCTION seal_posting(text, bigint, uuid, uuid, text, timestamptz, text);

-- A step is no money: it is written with its operation, by the same function, and goes with it. Looking for its operation again, for each
-- of eight steps, cost more than writing them.
ALTER TABLE steps DROP CONSTRAINT steps_tenant_operation_id_fkey;

-- Who writes operations lets the sums know of all of them at once.
CREATE OR REPLACE FUNCTION queue_for_usage() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO usage_unrolled (tenant, operation_id) SELECT tenant, operation_id FROM inserted;
    RETURN NULL;
END
$$;
DROP TRIGGER operations_are_summed ON operations;
CREATE TRIGGER operations_are_summed AFTER INSERT ON operations
    REFERENCING NEW TABLE AS inserted FOR EACH STATEMENT EXECUTE FUNCTION queue_for_usage();

-- An operation is the sum of its attempts: looked at when attempts are written, for all of them at once, and at the commit for operations
-- that say they have used anything. One without use and without attempts is the sum of none.
-- Its plan is kept, and made while the tables may still be small: it must look rows up by their key all the same.
CREATE FUNCTION refuse_attempts_of_other_sums() RETURNS trigger LANGUAGE plpgsql SET enable_seqscan = off SET enable_hashjoin = off AS $$
DECLARE
    wrong uuid;
BEGIN
    SELECT o.operation_id INTO wrong
    FROM (SELECT DISTINCT tenant, operation_id FROM inserted) mine
    CROSS JOIN LATERAL (
        SELECT * FROM operations found WHERE (found.tenant, found.operation_id) = (mine.tenant, mine.operation_id) OFFSET 0
    ) o
    CROSS JOIN LATERAL (
        SELECT sum(cost_nanousd) AS cost, sum(input_tokens) AS input, sum(output_tokens) AS output, sum(cache_read_tokens) AS cache_read,
               sum(cache_write_tokens) AS cache_write, sum(cache_write_1h_tokens) AS cache_write_1h
        FROM attempts a WHERE a.tenant = mine.tenant AND a.operation_id = mine.operation_id
    ) s
    WHERE (s.cost, s.input, s.output, s.cache_read, s.cache_write, s.cache_write_1h)
        IS DISTINCT FROM (o.cost_nanousd::numeric, o.input_tokens::numeric, o.output_tokens::numeric, o.cache_read_tokens::numeric,
                          o.cache_write_tokens::numeric, o.cache_write_1h_tokens::numeric)
    LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'operation % is not the sum of its attempts', wrong USING ERRCODE = 'check_violation';
    END IF;
    RETURN NULL;
END
$$;
DROP TRIGGER attempts_make_their_operation ON attempts;
CREATE TRIGGER attempts_make_their_operation AFTER INSERT ON attempts
    REFERENCING NEW TABLE AS inserted FOR EACH STATEMENT EXECUTE FUNCTION refuse_attempts_of_other_sums();
CREATE OR REPLACE FUNCTION refuse_other_than_attempts() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (
        SELECT (coalesce(sum(cost_nanousd), 0), coalesce(sum(input_tokens), 0), coalesce(sum(output_tokens), 0),
                coalesce(sum(cache_read_tokens), 0), coalesce(sum(cache_write_tokens), 0), coalesce(sum(cache_write_1h_tokens), 0))
            IS DISTINCT FROM (NEW.cost_nanousd::numeric, NEW.input_tokens::numeric, NEW.output_tokens::numeric,
                NEW.cache_read_tokens::numeric, NEW.cache_write_tokens::numeric, NEW.cache_write_1h_tokens::numeric)
        FROM attempts WHERE tenant = NEW.tenant AND operation_id = NEW.operation_id
    ) THEN
        RAISE EXCEPTION 'operation % is not the sum of its attempts', NEW.operation_id USING ERRCODE = 'check_violation';
    END IF;
    RETURN NULL;
END
$$;
DROP TRIGGER operations_are_their_attempts ON operations;
CREATE CONSTRAINT TRIGGER operations_are_their_attempts AFTER INSERT ON operations DEFERRABLE INITIALLY DEFERRED FOR EACH ROW
    WHEN (NEW.cost_nanousd + NEW.input_tokens + NEW.output_tokens + NEW.cache_read_tokens + NEW.cache_write_tokens > 0)
    EXECUTE FUNCTION refuse_other_than_attempts();

-- As before, but what moves on which counters is found out once, and used to make, lock and change them.
CREATE OR REPLACE FUNCTION resolve_holds(p_moves jsonb, p_at timestamptz) RETURNS void LANGUAGE plpgsql
SECURITY DEFINER SET search_path FROM CURRENT AS $$
DECLARE
    moment timestamptz := coalesce(p_at, clock_timestamp());
    moved integer;
    changes jsonb;
BEGIN
    UPDATE holds h
    SET state = m.state, resolved_at = moment, cost_nanousd = m.cost_nanousd, estimated = m.estimated,
        input_tokens = m.input_tokens, output_tokens = m.output_tokens, cache_read_tokens = m.cache_read_tokens,
        cache_write_tokens = m.cache_write_tokens, cache_write_1h_tokens = m.cache_write_1h_tokens
    FROM moves_in(p_moves) m
    WHERE h.hold_id = m.hold_id AND h.tenant = coalesce(nullif(current_setting('tailrace.tenant', true), ''), h.tenant);
    GET DIAGNOSTICS moved = ROW_COUNT;
    IF moved < jsonb_array_length(p_moves) THEN
        RAISE EXCEPTION 'a hold is of another tenant than is worked for, or gone' USING ERRCODE = 'insufficient_privilege';
    END IF;

    SELECT jsonb_agg(d) INTO changes FROM (
        SELECT h.tenant, c.scope, c.subject, c.period, c.period_start, sum(m.held)::bigint AS held_nanousd, sum(m.spent)::bigint AS spent_nanousd
        FROM moves_in(p_moves) m
        JOIN holds h USING (hold_id), counters_of(h.tenant, h.user_id, h.api_key_id, h.created_at) c
        WHERE m.held <> 0 OR m.spent <> 0
        GROUP BY 1, 2, 3, 4, 5
    ) d;
    IF changes IS NULL THEN
        RETURN;
    END IF;
    PERFORM lock_spending(changes);
    UPDATE spending s SET held_nanousd = s.held_nanousd + d.held_nanousd, spent_nanousd = s.spent_nanousd + d.spent_nanousd
    FROM spending_in(changes) d
    WHERE (s.tenant, s.scope, s.subject, s.period, s.period_start) = (d.tenant, d.scope, d.subject, d.period, d.period_start)
      AND (d.held_nanousd <> 0 OR d.spent_nanousd <> 0);

    INSERT INTO entries (posting_id, account, tenant, hold_id, operation_id, kind, amount_nanousd, booked_at)
    SELECT m.posting_id, a.account, h.tenant, h.hold_id, h.operation_id, m.kind, a.amount, moment
    FROM (
        SELECT nextval('postings') AS posting_id, r.*
        FROM moves_in(p_moves) r
    ) m
    JOIN holds h USING (hold_id)
    CROSS JOIN LATERAL (VALUES ('available', -m.held - m.spent), ('held', m.held), ('spent', m.spent)) AS a (account, amount)
    WHERE a.amount <> 0;
END
$$;

-- Its plans are kept, and made while `holds` may still be empty: they must look holds up by their key all the same.
ALTER FUNCTION resolve_holds(jsonb, timestamptz) SET enable_seqscan = off;
ALTER FUNCTION resolve_holds(jsonb, timestamptz) SET enable_hashjoin = off;
ALTER FUNCTION resolve_holds(jsonb, timestamptz) SET enable_mergejoin = off;

-- Rows of `spending`, planned for as few as there mostly are; see moves_in.
CREATE FUNCTION spending_in(p_changes jsonb) RETURNS SETOF spending LANGUAGE sql IMMUTABLE STRICT ROWS 4 AS $$
    SELECT * FROM jsonb_populate_recordset(NULL::spending, p_changes)
$$;

-- Have these counters, locked. Missing ones are made before any is locked, and locks are taken in one order; see lock_counters.
CREATE FUNCTION lock_spending(p_changes jsonb) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    present integer;
BEGIN
    SELECT count(*) INTO present FROM spending_in(p_changes) mine JOIN spending s USING (tenant, scope, subject, period, period_start);
    IF present < jsonb_array_length(p_changes) THEN
        INSERT INTO spending (tenant, scope, subject, period, period_start)
        SELECT mine.tenant, mine.scope, mine.subject, mine.period, mine.period_start FROM spending_in(p_changes) mine ORDER BY 1, 2, 3, 4, 5
        ON CONFLICT DO NOTHING;
    END IF;
    PERFORM 1 FROM spending_in(p_changes) mine JOIN spending s USING (tenant, scope, subject, period, period_start)
    ORDER BY s.tenant, s.scope, s.subject, s.period, s.period_start FOR UPDATE OF s;
END
$$;

-- As before, but leases are looked up by their key, however many holds there are.
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
            SELECT x.hold_id, x.api_key_id, x.created_at FROM holds x
            WHERE x.hold_id = named.lease_id AND named.ended_at IS NULL AND (x.tenant, x.user_id) = (c.tenant, c.user_id) OFFSET 0
        ) lease ON true
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

-- Rows of `holds`; see moves_in.
CREATE FUNCTION calls_in(p_calls jsonb) RETURNS SETOF holds LANGUAGE sql IMMUTABLE STRICT ROWS 2 AS $$
    SELECT * FROM jsonb_populate_recordset(NULL::holds, p_calls)
$$;

CREATE OR REPLACE FUNCTION counters_of_calls(p_calls jsonb)
RETURNS TABLE (tenant text, scope text, subject text, period text, period_start date) LANGUAGE sql STABLE AS $$
    SELECT o.tenant, c.scope, c.subject, c.period, c.period_start
    FROM (
        SELECT called.tenant, called.user_id, called.api_key_id, called.created_at FROM calls_in(p_calls) called
        UNION
        SELECT lease.tenant, lease.user_id, lease.api_key_id, lease.created_at
        FROM calls_in(p_calls) called
        CROSS JOIN LATERAL (
            SELECT x.tenant, x.user_id, x.api_key_id, x.created_at FROM holds x WHERE x.hold_id = called.lease_id OFFSET 0
        ) lease
    ) o, counters_of(o.tenant, o.user_id, o.api_key_id, o.created_at) c
$$;

-- Record many operations of one tenant with what became of their holds, all or nothing; each stands once in `p_operations`, and names the
-- columns of its table as attempts and steps do. Returns which of them are new. What is not new is left as it is, and so are its attempts
-- and steps. The record_operations before this one is what replicas of the former version call.
CREATE FUNCTION record_operations(p_operations json, p_attempts json, p_steps json, p_moves jsonb) RETURNS uuid[] LANGUAGE plpgsql AS $$
DECLARE
    new_ones uuid[];
BEGIN
    PERFORM ensure_user(mine.tenant, mine.user_id)
    FROM (SELECT DISTINCT o.tenant, o.user_id FROM json_populate_recordset(NULL::operations, p_operations) o ORDER BY 1, 2) mine
    WHERE NOT EXISTS (SELECT FROM users u WHERE u.tenant = mine.tenant AND u.user_id = mine.user_id);
    IF jsonb_array_length(p_moves) > 0 THEN -- before anything else is locked: counters come first in every transaction
        PERFORM resolve_holds(p_moves, clock_timestamp());
    END IF;

    WITH written AS (
        -- Each has a moment of its own: who reads on from the last one seen must not miss its neighbour.
        INSERT INTO operations AS o SELECT told.* FROM json_array_elements(p_operations) each, json_populate_record(
            json_populate_record(NULL::operations, json_build_object('recorded_at', clock_timestamp())), each.value) told
        ON CONFLICT DO NOTHING RETURNING o.tenant, o.user_id, o.operation_id
    ), announced AS MATERIALIZED (
        SELECT w.operation_id, pg_notify('tailrace_operations', json_build_array(w.tenant, w.user_id, w.operation_id)::text) FROM written w
    )
    SELECT coalesce(array_agg(a.operation_id), '{}') INTO new_ones FROM announced a;
    INSERT INTO attempts SELECT * FROM json_populate_recordset(NULL::attempts, p_attempts) a WHERE a.operation_id = ANY (new_ones);
    INSERT INTO steps SELECT * FROM json_populate_recordset(NULL::steps, p_steps) s WHERE s.operation_id = ANY (new_ones);
    RETURN new_ones;
END
$$;
