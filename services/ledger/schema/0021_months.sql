-- What grows with traffic lies in months: operations, their attempts and their steps, by the moment their answer was accepted (UTC). What is
-- asked of a time reads its months alone, and what was kept long enough goes by dropping tables, not by deleting rows.
-- Books (holds, entries, counters, the chain) and sums of usage are no part of this: they are for ever. Conversations neither: they are read by
-- their key, and last as long as their owner wants.

-- An index of a partitioned table can be unique only within a month, so that an operation is there once is kept here, for all months. It also
-- says in which of them the operation is, to whoever has its id alone.
CREATE TABLE operation_ids (
    tenant       text NOT NULL,
    operation_id uuid NOT NULL,
    created_at   timestamptz NOT NULL,
    PRIMARY KEY (tenant, operation_id)
);

-- Views are bound to the tables they were made for; made again at the end.
DROP VIEW tenant_costs, model_failures, savings, usage_by_day, usage_facts, estimated_operations, failed_attempts;

ALTER TABLE operations RENAME TO operations_before;
ALTER TABLE attempts RENAME TO attempts_before;
ALTER TABLE steps RENAME TO steps_before;
CREATE TABLE operations (LIKE operations_before INCLUDING DEFAULTS INCLUDING CONSTRAINTS) PARTITION BY RANGE (created_at);
-- Attempts and steps are in the month of their operation.
CREATE TABLE attempts (LIKE attempts_before INCLUDING DEFAULTS INCLUDING CONSTRAINTS, created_at timestamptz NOT NULL)
    PARTITION BY RANGE (created_at);
CREATE TABLE steps (LIKE steps_before INCLUDING DEFAULTS INCLUDING CONSTRAINTS, created_at timestamptz NOT NULL)
    PARTITION BY RANGE (created_at);
-- For months that have no table: what comes from long ago, or late to a month that was dropped. Nothing is refused for its age.
CREATE TABLE operations_other PARTITION OF operations DEFAULT;
CREATE TABLE attempts_other PARTITION OF attempts DEFAULT;
CREATE TABLE steps_other PARTITION OF steps DEFAULT;

-- Have tables for the months from that of `p_from` to that of `p_to`; return how many months are new. Tables are made first and attached
-- then, which does not wait for those who read. A month that has rows in the table for other months stays there.
CREATE FUNCTION make_months(p_from timestamptz, p_to timestamptz) RETURNS integer LANGUAGE plpgsql SET lock_timeout = '2s' AS $$
DECLARE
    month timestamp := date_trunc('month', p_from AT TIME ZONE 'UTC');
    suffix text;
    whole text;
    taken boolean;
    made integer := 0;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('tailrace months')); -- replicas take turns
    WHILE month <= p_to AT TIME ZONE 'UTC' LOOP
        suffix := to_char(month, '_YYYY_MM');
        IF to_regclass('operations' || suffix) IS NULL THEN
            SELECT EXISTS (
                SELECT FROM operations_other
                WHERE created_at >= month AT TIME ZONE 'UTC' AND created_at < (month + interval '1 month') AT TIME ZONE 'UTC'
            ) INTO taken;
            IF NOT taken THEN
                FOREACH whole IN ARRAY ARRAY['operations', 'attempts', 'steps'] LOOP
                    EXECUTE format('CREATE TABLE %I (LIKE %I INCLUDING DEFAULTS INCLUDING CONSTRAINTS)', whole || suffix, whole);
                    EXECUTE format('ALTER TABLE %I ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)', whole, whole || suffix,
                                   month AT TIME ZONE 'UTC', (month + interval '1 month') AT TIME ZONE 'UTC');
                END LOOP;
                made := made + 1;
            END IF;
        END IF;
        month := month + interval '1 month';
    END LOOP;
    RETURN made;
END
$$;

-- Drop the oldest month that ended before `p_before` and whose operations are all in the sums; return its name, NULL if there is none.
-- Everybody waits for whom this waits for, so it does not wait long.
CREATE FUNCTION drop_month(p_before timestamptz) RETURNS text LANGUAGE plpgsql SET lock_timeout = '300ms' AS $$
DECLARE
    suffix text;
    ended timestamptz;
BEGIN
    FOR suffix, ended IN
        SELECT m.suffix, m.ended FROM (
            SELECT right(c.relname, 8) AS suffix, (to_date(right(c.relname, 7), 'YYYY_MM') + interval '1 month') AT TIME ZONE 'UTC' AS ended
            FROM (
                SELECT p.relname FROM pg_inherits i JOIN pg_class p ON p.oid = i.inhrelid
                WHERE i.inhparent = to_regclass('operations') AND p.relname ~ '^operations_\d{4}_\d{2}$' OFFSET 0
            ) c
        ) m
        WHERE m.ended <= p_before ORDER BY 1
    LOOP
        LOCK TABLE operations, attempts, steps IN ACCESS EXCLUSIVE MODE; -- in the order in which they are recorded
        IF NOT EXISTS (SELECT FROM usage_unrolled u WHERE u.created_at >= ended - interval '1 month' AND u.created_at < ended) THEN
            EXECUTE format('DROP TABLE %I, %I, %I', 'steps' || suffix, 'attempts' || suffix, 'operations' || suffix);
            RETURN substr(suffix, 2);
        END IF;
    END LOOP;
    RETURN NULL;
END
$$;

-- What is there moves into its months. Indexes and triggers come after the rows, which is faster.
INSERT INTO operation_ids SELECT tenant, operation_id, created_at FROM operations_before ORDER BY created_at;
SELECT make_months(greatest(coalesce(min(created_at), now()), now() - interval '10 years'), now() + interval '2 months') FROM operations_before;
INSERT INTO operations SELECT * FROM operations_before ORDER BY created_at;
INSERT INTO attempts SELECT a.*, o.created_at FROM attempts_before a JOIN operations_before o USING (tenant, operation_id);
INSERT INTO steps SELECT s.*, o.created_at FROM steps_before s JOIN operations_before o USING (tenant, operation_id);
DROP TABLE steps_before, attempts_before, operations_before;

-- What waits to be summed says in which month it lies.
ALTER TABLE usage_unrolled ADD COLUMN created_at timestamptz;
DELETE FROM usage_unrolled u WHERE NOT EXISTS (SELECT FROM operation_ids k WHERE (k.tenant, k.operation_id) = (u.tenant, u.operation_id));
UPDATE usage_unrolled u SET created_at = k.created_at FROM operation_ids k WHERE (k.tenant, k.operation_id) = (u.tenant, u.operation_id);
ALTER TABLE usage_unrolled ALTER COLUMN created_at SET NOT NULL;
CREATE OR REPLACE FUNCTION queue_for_usage() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO usage_unrolled (tenant, operation_id, created_at) SELECT tenant, operation_id, created_at FROM inserted;
    RETURN NULL;
END
$$;

CREATE INDEX operation_ids_by_age ON operation_ids (created_at);
-- Lists are read by it backwards, and one operation by all of it.
ALTER TABLE operations
    ADD PRIMARY KEY (tenant, created_at, operation_id),
    ADD FOREIGN KEY (tenant, user_id) REFERENCES users;
CREATE INDEX operations_newest_of_user ON operations (tenant, user_id, created_at DESC, operation_id DESC);
CREATE INDEX operations_of_session ON operations (tenant, session_id, created_at DESC, operation_id DESC);
CREATE INDEX operations_recorded ON operations (recorded_at);
CREATE INDEX operations_by_age ON operations USING brin (created_at) WITH (autosummarize = on);
ALTER TABLE attempts
    ADD PRIMARY KEY (tenant, operation_id, attempt, created_at),
    ADD FOREIGN KEY (hold_id) REFERENCES holds;
CREATE INDEX attempts_of_provider_request ON attempts (provider_request_id) WHERE provider_request_id <> '';
ALTER TABLE steps ADD PRIMARY KEY (tenant, operation_id, ordinal, created_at);

-- As before, and the month is looked in alone. An attempt whose operation is not there, or in another month, is refused here too: a foreign
-- key into a partitioned table would have every month looked through when one is dropped.
CREATE OR REPLACE FUNCTION refuse_attempts_of_other_sums() RETURNS trigger LANGUAGE plpgsql SET enable_seqscan = off SET enable_hashjoin = off AS $$
DECLARE
    wrong uuid;
BEGIN
    SELECT mine.operation_id INTO wrong
    FROM (SELECT DISTINCT tenant, operation_id, created_at FROM inserted) mine
    LEFT JOIN LATERAL (
        SELECT * FROM operations found
        WHERE (found.tenant, found.created_at, found.operation_id) = (mine.tenant, mine.created_at, mine.operation_id) OFFSET 0
    ) o ON true
    CROSS JOIN LATERAL (
        SELECT sum(cost_nanousd) AS cost, sum(input_tokens) AS input, sum(output_tokens) AS output, sum(cache_read_tokens) AS cache_read,
               sum(cache_write_tokens) AS cache_write, sum(cache_write_1h_tokens) AS cache_write_1h
        FROM attempts a WHERE (a.tenant, a.operation_id, a.created_at) = (mine.tenant, mine.operation_id, mine.created_at)
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
CREATE TRIGGER attempts_make_their_operation AFTER INSERT ON attempts
    REFERENCING NEW TABLE AS inserted FOR EACH STATEMENT EXECUTE FUNCTION refuse_attempts_of_other_sums();
-- That an operation which used anything has attempts is looked at when it is committed, since they are written after it; that their sum is
-- right was looked at when they were. Deferred triggers fire for rows, so a statement leaves one row that stands for all it wrote until then.
CREATE TABLE recordings (
    recording_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenants      text[] NOT NULL,
    ids          uuid[] NOT NULL,
    moments      timestamptz[] NOT NULL
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);
DROP FUNCTION refuse_other_than_attempts();
CREATE FUNCTION note_used_operations() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
BEGIN
    INSERT INTO recordings (tenants, ids, moments)
    SELECT array_agg(i.tenant), array_agg(i.operation_id), array_agg(i.created_at) FROM inserted i
    WHERE i.cost_nanousd + i.input_tokens + i.output_tokens + i.cache_read_tokens + i.cache_write_tokens > 0 HAVING count(*) > 0;
    RETURN NULL;
END
$$;
CREATE TRIGGER operations_are_noted AFTER INSERT ON operations
    REFERENCING NEW TABLE AS inserted FOR EACH STATEMENT EXECUTE FUNCTION note_used_operations();
CREATE FUNCTION refuse_without_attempts() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT
SET enable_seqscan = off SET enable_hashjoin = off AS $$
DECLARE
    wrong uuid;
BEGIN
    SELECT o.operation_id INTO wrong FROM unnest(NEW.tenants, NEW.ids, NEW.moments) AS o (tenant, operation_id, created_at)
    WHERE NOT EXISTS (
        SELECT FROM attempts a WHERE (a.tenant, a.operation_id, a.created_at) = (o.tenant, o.operation_id, o.created_at) OFFSET 0
    ) LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'operation % is not the sum of its attempts', wrong USING ERRCODE = 'check_violation';
    END IF;
    DELETE FROM recordings WHERE recording_id = NEW.recording_id;
    RETURN NULL;
END
$$;
CREATE CONSTRAINT TRIGGER operations_are_their_attempts AFTER INSERT ON recordings DEFERRABLE INITIALLY DEFERRED FOR EACH ROW
    EXECUTE FUNCTION refuse_without_attempts();
CREATE TRIGGER operations_are_summed AFTER INSERT ON operations
    REFERENCING NEW TABLE AS inserted FOR EACH STATEMENT EXECUTE FUNCTION queue_for_usage();

-- An operation is in one month, whoever writes it: what is there under its id and another moment is another record of it.
CREATE FUNCTION refuse_second_months() RETURNS trigger LANGUAGE plpgsql SET enable_seqscan = off SET enable_hashjoin = off AS $$
BEGIN
    INSERT INTO operation_ids SELECT i.tenant, i.operation_id, i.created_at FROM inserted i ON CONFLICT DO NOTHING;
    IF EXISTS (
        SELECT FROM inserted i CROSS JOIN LATERAL (
            SELECT k.created_at FROM operation_ids k WHERE (k.tenant, k.operation_id) = (i.tenant, i.operation_id) OFFSET 0
        ) known
        WHERE known.created_at <> i.created_at
    ) THEN
        RAISE EXCEPTION 'an operation is there under another moment' USING ERRCODE = 'unique_violation';
    END IF;
    RETURN NULL;
END
$$;
CREATE TRIGGER operations_are_there_once AFTER INSERT ON operations
    REFERENCING NEW TABLE AS inserted FOR EACH STATEMENT EXECUTE FUNCTION refuse_second_months();

-- What record_operations did; now attempts and steps name the moment of their operation too, and whether an operation is new is told by its id
-- alone, in whichever month it lies.
CREATE FUNCTION book_operations(p_operations json, p_attempts json, p_steps json, p_moves jsonb) RETURNS uuid[] LANGUAGE plpgsql AS $$
DECLARE
    new_ones uuid[];
BEGIN
    PERFORM ensure_user(mine.tenant, mine.user_id)
    FROM (SELECT DISTINCT o.tenant, o.user_id FROM json_populate_recordset(NULL::operations, p_operations) o ORDER BY 1, 2) mine
    WHERE NOT EXISTS (SELECT FROM users u WHERE u.tenant = mine.tenant AND u.user_id = mine.user_id);
    IF jsonb_array_length(p_moves) > 0 THEN -- before anything else is locked: counters come first in every transaction
        PERFORM resolve_holds(p_moves, clock_timestamp());
    END IF;

    WITH named AS (
        INSERT INTO operation_ids AS k SELECT o.* FROM json_populate_recordset(NULL::operation_ids, p_operations) o
        ON CONFLICT DO NOTHING RETURNING k.operation_id
    )
    SELECT coalesce(array_agg(n.operation_id), '{}') INTO new_ones FROM named n;
    WITH written AS (
        -- Each has a moment of its own: who reads on from the last one seen must not miss its neighbour.
        INSERT INTO operations AS o SELECT told.* FROM json_array_elements(p_operations) each, json_populate_record(
            json_populate_record(NULL::operations, json_build_object('recorded_at', clock_timestamp())), each.value) told
        WHERE told.operation_id = ANY (new_ones) RETURNING o.tenant, o.user_id, o.operation_id
    )
    SELECT coalesce(array_agg(w.operation_id), '{}') INTO new_ones
    FROM written w, pg_notify('tailrace_operations', json_build_array(w.tenant, w.user_id, w.operation_id)::text);
    INSERT INTO attempts SELECT * FROM json_populate_recordset(NULL::attempts, p_attempts) a WHERE a.operation_id = ANY (new_ones);
    INSERT INTO steps SELECT * FROM json_populate_recordset(NULL::steps, p_steps) s WHERE s.operation_id = ANY (new_ones);
    RETURN new_ones;
END
$$;

-- Rows that belong to operations, with the moment of theirs.
CREATE FUNCTION dated(p_rows json, p_operations json) RETURNS json LANGUAGE sql IMMUTABLE AS $$
    SELECT coalesce(json_agg(mine.value::jsonb || jsonb_build_object('created_at', o.value -> 'created_at')), '[]')
    FROM json_array_elements(p_rows) mine JOIN json_array_elements(p_operations) o
    ON (o.value ->> 'tenant', o.value ->> 'operation_id') = (mine.value ->> 'tenant', mine.value ->> 'operation_id')
$$;

-- As the versions before this one call them, during an upgrade.
CREATE OR REPLACE FUNCTION record_operations(p_operations json, p_attempts json, p_steps json, p_moves jsonb) RETURNS uuid[] LANGUAGE sql AS $$
    SELECT book_operations(p_operations, dated(p_attempts, p_operations), dated(p_steps, p_operations), p_moves)
$$;
CREATE OR REPLACE FUNCTION record_operation(p_operation jsonb, p_attempts jsonb, p_steps jsonb, p_moves jsonb) RETURNS boolean LANGUAGE sql AS $$
    SELECT cardinality(record_operations(json_build_array(p_operation), p_attempts::json, p_steps::json, p_moves)) = 1
$$;

-- What one operation adds to each measure: the only place where it is said, for sums and rows alike.
CREATE VIEW usage_facts AS
SELECT o.tenant, o.operation_id, o.created_at, o.user_id, o.api_key_id, o.session_id, o.model, o.tier, o.cache_verdict,
       1::bigint AS operations,
       (o.status = 'failed')::integer::bigint AS failed,
       (o.status = 'cancelled')::integer::bigint AS cancelled,
       o.estimated::integer::bigint AS estimated,
       (o.cache_verdict IN ('exact', 'semantic'))::integer::bigint AS cache_hits,
       (o.cache_verdict = 'coalesced')::integer::bigint AS coalesced,
       coalesce(o.calls_sent, (
           SELECT count(*) FROM attempts a WHERE (a.tenant, a.operation_id, a.created_at) = (o.tenant, o.operation_id, o.created_at) AND NOT a.not_sent
       ))::bigint AS attempts,
       o.input_tokens, o.output_tokens, o.cache_read_tokens, o.cache_write_tokens, o.cache_write_1h_tokens,
       o.cost_nanousd, o.cache_saved_nanousd,
       coalesce(o.prompt_cache_saved_nanousd, 0) AS prompt_cache_saved_nanousd,
       coalesce(o.tiering_saved_nanousd, 0) AS tiering_saved_nanousd,
       (time_bucket(o.duration_ms) << 40) | 1 AS duration_pair,
       CASE WHEN o.first_token_ms > 0 THEN (time_bucket(o.first_token_ms) << 40) | 1 END AS first_token_pair
FROM operations o;

-- What was asked, called, served again and spent, by day in UTC. The other views of usage are made of it.
CREATE VIEW usage_by_day AS
SELECT tenant, (starts_at AT TIME ZONE 'UTC')::date AS day, model, tier, cache_verdict,
       sum(operations)::bigint AS operations, sum(failed)::bigint AS failed, sum(cancelled)::bigint AS cancelled,
       sum(estimated)::bigint AS estimated, sum(attempts)::bigint AS attempts,
       sum(cache_hits)::bigint AS cache_hits, sum(coalesced)::bigint AS coalesced,
       sum(input_tokens)::bigint AS input_tokens, sum(output_tokens)::bigint AS output_tokens,
       sum(cache_read_tokens)::bigint AS cache_read_tokens, sum(cache_write_tokens)::bigint AS cache_write_tokens,
       sum(cost_nanousd)::bigint AS cost_nanousd, sum(cache_saved_nanousd)::bigint AS cache_saved_nanousd,
       sum(prompt_cache_saved_nanousd)::bigint AS prompt_cache_saved_nanousd, sum(tiering_saved_nanousd)::bigint AS tiering_saved_nanousd
FROM (
    SELECT tenant, starts_at, model, tier, cache_verdict, operations, failed, cancelled, estimated, attempts, cache_hits, coalesced,
           input_tokens, output_tokens, cache_read_tokens, cache_write_tokens, cost_nanousd, cache_saved_nanousd,
           prompt_cache_saved_nanousd, tiering_saved_nanousd
    FROM usage_days
    UNION ALL
    SELECT f.tenant, f.created_at, f.model, f.tier, f.cache_verdict, f.operations, f.failed, f.cancelled, f.estimated, f.attempts,
           f.cache_hits, f.coalesced, f.input_tokens, f.output_tokens, f.cache_read_tokens, f.cache_write_tokens, f.cost_nanousd,
           f.cache_saved_nanousd, f.prompt_cache_saved_nanousd, f.tiering_saved_nanousd
    FROM usage_unrolled JOIN usage_facts f USING (tenant, operation_id, created_at)
) parts
GROUP BY 1, 2, 3, 4, 5;

-- What did a tenant cost on a day?
CREATE VIEW tenant_costs AS
SELECT tenant, day, sum(operations)::bigint AS operations, sum(cost_nanousd)::bigint AS cost_nanousd FROM usage_by_day GROUP BY 1, 2;

-- Which model failed most?
CREATE VIEW model_failures AS
SELECT day, model, sum(failed)::bigint AS failed, sum(operations)::bigint AS operations,
       round(100 * sum(failed) / sum(operations), 2) AS failed_percent
FROM usage_by_day GROUP BY 1, 2;

-- What did the answer cache, prompt caching and tiers save?
CREATE VIEW savings AS
SELECT tenant, day, sum(cache_hits)::bigint AS cache_hits, sum(coalesced)::bigint AS coalesced,
       sum(cache_saved_nanousd)::bigint AS cache_saved_nanousd, sum(prompt_cache_saved_nanousd)::bigint AS prompt_cache_saved_nanousd,
       sum(tiering_saved_nanousd)::bigint AS tiering_saved_nanousd
FROM usage_by_day GROUP BY 1, 2;

-- Which operations are estimated, that is, booked by tokens the provider did not tell?
CREATE VIEW estimated_operations AS
SELECT o.tenant, o.operation_id, o.created_at, o.user_id, o.model, o.status, o.cost_nanousd FROM operations o WHERE o.estimated;

-- Which provider calls failed, with what, and what did they cost all the same?
CREATE VIEW failed_attempts AS
SELECT a.tenant, (o.created_at AT TIME ZONE 'UTC')::date AS day, a.provider, a.model, a.error_reason, count(*) AS attempts,
       count(*) FILTER (WHERE a.not_sent) AS not_sent, sum(a.cost_nanousd)::bigint AS cost_nanousd
FROM attempts a JOIN operations o USING (tenant, operation_id, created_at)
WHERE a.error_reason <> ''
GROUP BY 1, 2, 3, 4, 5;
