-- Usage that is asked for in milliseconds: every operation is added once to sums by hour and by day. What is not added yet stands in
-- `usage_unrolled`, written by the transaction that wrote the operation; so sums and rest together say at every moment what the rows say.

-- Times are counted in buckets whose bounds grow by a tenth, from 0.01 ms: counts add up, percentiles do not. Bucket n ends at
-- 0.01 * 1.1^n ms; read at 2.1/2.2 of its end, a time is off by at most 4.8 %. Times beyond the last bucket, 10^9 ms, are in the last.
CREATE FUNCTION time_bucket(p_ms double precision) RETURNS bigint LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT CASE WHEN p_ms <= 0.01 THEN 0 ELSE least(ceil(ln(p_ms / 0.01) / ln(1.1)), 266) END::bigint
$$;

-- A histogram is an array of bucket << 40 | count, ordered by bucket, each bucket once. This makes one of any such pairs.
CREATE FUNCTION histogram(p_pairs bigint[]) RETURNS bigint[] LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS $$
BEGIN
    IF cardinality(p_pairs) <= 1 THEN -- as of most users in most hours
        RETURN p_pairs;
    END IF;
    RETURN (
        SELECT array_agg((bucket << 40) | seen ORDER BY bucket)
        FROM (SELECT pair >> 40 AS bucket, sum(pair & 1099511627775)::bigint AS seen FROM unnest(p_pairs) pair GROUP BY 1) buckets
    );
END
$$;

-- NULL = recorded before this was kept.
ALTER TABLE operations
    ADD COLUMN calls_sent integer CHECK (calls_sent >= 0),
    ADD COLUMN prompt_cache_saved_nanousd bigint,
    ADD COLUMN tiering_saved_nanousd bigint;

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
           SELECT count(*) FROM attempts a WHERE a.tenant = o.tenant AND a.operation_id = o.operation_id AND NOT a.not_sent
       ))::bigint AS attempts,
       o.input_tokens, o.output_tokens, o.cache_read_tokens, o.cache_write_tokens, o.cache_write_1h_tokens,
       o.cost_nanousd, o.cache_saved_nanousd,
       coalesce(o.prompt_cache_saved_nanousd, 0) AS prompt_cache_saved_nanousd,
       coalesce(o.tiering_saved_nanousd, 0) AS tiering_saved_nanousd,
       (time_bucket(o.duration_ms) << 40) | 1 AS duration_pair,
       CASE WHEN o.first_token_ms > 0 THEN (time_bucket(o.first_token_ms) << 40) | 1 END AS first_token_pair
FROM operations o;

-- Of a tenant, by hour.
CREATE TABLE usage_hours (
    tenant                     text NOT NULL,
    starts_at                  timestamptz NOT NULL,
    model                      text NOT NULL,
    tier                       text NOT NULL,
    cache_verdict              text NOT NULL,
    operations                 bigint NOT NULL,
    failed                     bigint NOT NULL,
    cancelled                  bigint NOT NULL,
    estimated                  bigint NOT NULL,
    cache_hits                 bigint NOT NULL,
    coalesced                  bigint NOT NULL,
    attempts                   bigint NOT NULL,
    input_tokens               bigint NOT NULL,
    output_tokens              bigint NOT NULL,
    cache_read_tokens          bigint NOT NULL,
    cache_write_tokens         bigint NOT NULL,
    cache_write_1h_tokens      bigint NOT NULL,
    cost_nanousd               bigint NOT NULL,
    cache_saved_nanousd        bigint NOT NULL,
    prompt_cache_saved_nanousd bigint NOT NULL,
    tiering_saved_nanousd      bigint NOT NULL,
    durations                  bigint[] NOT NULL,
    first_tokens               bigint[] NOT NULL,
    PRIMARY KEY (tenant, starts_at, model, tier, cache_verdict)
) WITH (fillfactor = 70);
-- Of a tenant, by day in UTC.
CREATE TABLE usage_days (LIKE usage_hours INCLUDING ALL) WITH (fillfactor = 70);
-- Of each user and key, by day in UTC. By hour there would be nearly as many rows as operations.
CREATE TABLE usage_user_days (
    user_id    text NOT NULL,
    api_key_id text NOT NULL,
    LIKE usage_hours,
    PRIMARY KEY (tenant, user_id, starts_at, api_key_id, model, tier, cache_verdict)
) WITH (fillfactor = 70);
CREATE INDEX usage_user_days_of_tenant ON usage_user_days (tenant, starts_at);

-- Operations that the sums do not have yet. It is short-lived and small: vacuum looks at it often.
CREATE TABLE usage_unrolled (
    tenant       text NOT NULL,
    operation_id uuid NOT NULL,
    PRIMARY KEY (tenant, operation_id)
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000, autovacuum_analyze_scale_factor = 0,
        autovacuum_analyze_threshold = 5000);
INSERT INTO usage_unrolled SELECT tenant, operation_id FROM operations;

CREATE FUNCTION queue_for_usage() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO usage_unrolled (tenant, operation_id) VALUES (NEW.tenant, NEW.operation_id);
    RETURN NULL;
END
$$;
CREATE TRIGGER operations_are_summed AFTER INSERT ON operations FOR EACH ROW EXECUTE FUNCTION queue_for_usage();

-- Operations accepted before `purged_before` may have been removed; one row.
CREATE TABLE usage_retention (
    only_row      boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    purged_before timestamptz NOT NULL
);
INSERT INTO usage_retention (purged_before) VALUES ('-infinity');
-- NULL = nothing was ever removed. It is no tenant's, so that work for a tenant sees it by this alone.
CREATE FUNCTION purged_before() RETURNS timestamptz LANGUAGE sql STABLE SECURITY DEFINER SET search_path FROM CURRENT AS $$
    SELECT purged_before FROM usage_retention WHERE isfinite(purged_before)
$$;
CREATE INDEX operations_by_age ON operations (created_at);
