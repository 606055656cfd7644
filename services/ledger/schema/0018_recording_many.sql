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
CREATE FUNCTION refuse_attempts_of_other_sums() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    wrong uuid;
BEGIN
    SELECT o.operation_id INTO wrong
    FROM (SELECT DISTINCT tenant, operation_id FROM inserted) mine
    JOIN operations o USING (tenant, operation_id)
    CROSS JOIN LATERAL (
        SELECT sum(cost_nanousd) AS cost, sum(input_tokens) AS input, sum(output_tokens) AS output, sum(cache_read_tokens) AS cache_read,
               sum(cache_write_tokens) AS cache_write, sum(cache_write_1h_tokens) AS cache_write_1h
        FROM attempts a WHERE a.tenant = o.tenant AND a.operation_id = o.operation_id
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
DROP TRIGGER operations_are_their_attempts ON operations;
CREATE CONSTRAINT TRIGGER operations_are_their_attempts AFTER INSERT ON operations DEFERRABLE INITIALLY DEFERRED FOR EACH ROW
    WHEN (NEW.cost_nanousd + NEW.input_tokens + NEW.output_tokens + NEW.cache_read_tokens + NEW.cache_write_tokens > 0)
    EXECUTE FUNCTION refuse_other_than_attempts();

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
