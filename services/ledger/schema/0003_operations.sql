-- What happened: one operation a question, one attempt a provider call, one step a timed part. Counts and ids, no text.

CREATE TABLE operations (
    tenant                text NOT NULL,
    operation_id          uuid NOT NULL,
    user_id               text NOT NULL,
    session_id            text NOT NULL,
    api_key_id            text NOT NULL,
    trace_id              text NOT NULL,
    status                text NOT NULL CHECK (status IN ('done', 'failed', 'cancelled')),
    tier                  text NOT NULL,
    model                 text NOT NULL,
    provider              text NOT NULL,
    collection            text NOT NULL,
    finish_reason         text NOT NULL,
    error_reason          text NOT NULL,
    input_tokens          bigint NOT NULL CHECK (input_tokens >= 0),
    output_tokens         bigint NOT NULL CHECK (output_tokens >= 0),
    cache_read_tokens     bigint NOT NULL CHECK (cache_read_tokens >= 0),
    cache_write_tokens    bigint NOT NULL CHECK (cache_write_tokens >= 0),
    cache_write_1h_tokens bigint NOT NULL CHECK (cache_write_1h_tokens BETWEEN 0 AND cache_write_tokens),
    cost_nanousd          bigint NOT NULL CHECK (cost_nanousd >= 0),
    estimated             boolean NOT NULL,
    cache_verdict         text NOT NULL,
    cache_similarity      double precision,
    cache_source_id       text,
    cache_age_s           bigint,
    cache_saved_nanousd   bigint NOT NULL CHECK (cache_saved_nanousd >= 0),
    cache_reason          text NOT NULL,
    created_at            timestamptz NOT NULL,
    recorded_at           timestamptz NOT NULL,
    first_token_ms        double precision NOT NULL CHECK (first_token_ms >= 0),
    duration_ms           double precision NOT NULL CHECK (duration_ms >= 0),
    PRIMARY KEY (tenant, operation_id),
    FOREIGN KEY (tenant, user_id) REFERENCES users
);
CREATE INDEX operations_newest ON operations (tenant, created_at DESC, operation_id DESC);
CREATE INDEX operations_newest_of_user ON operations (tenant, user_id, created_at DESC, operation_id DESC);
CREATE INDEX operations_of_session ON operations (tenant, session_id, created_at DESC, operation_id DESC);
CREATE INDEX operations_recorded ON operations (recorded_at);

CREATE TABLE attempts (
    tenant                text NOT NULL,
    operation_id          uuid NOT NULL,
    attempt               integer NOT NULL CHECK (attempt >= 1),
    hold_id               uuid NOT NULL REFERENCES holds,
    provider              text NOT NULL,
    model                 text NOT NULL,
    provider_request_id   text NOT NULL,
    price_version         integer NOT NULL,
    input_tokens          bigint NOT NULL CHECK (input_tokens >= 0),
    output_tokens         bigint NOT NULL CHECK (output_tokens >= 0),
    cache_read_tokens     bigint NOT NULL CHECK (cache_read_tokens >= 0),
    cache_write_tokens    bigint NOT NULL CHECK (cache_write_tokens >= 0),
    cache_write_1h_tokens bigint NOT NULL CHECK (cache_write_1h_tokens BETWEEN 0 AND cache_write_tokens),
    cost_nanousd          bigint NOT NULL CHECK (cost_nanousd >= 0),
    finish_reason         text NOT NULL,
    error_reason          text NOT NULL,
    first_token_ms        double precision NOT NULL CHECK (first_token_ms >= 0),
    duration_ms           double precision NOT NULL CHECK (duration_ms >= 0),
    estimated             boolean NOT NULL,
    not_sent              boolean NOT NULL,
    PRIMARY KEY (tenant, operation_id, attempt),
    FOREIGN KEY (tenant, operation_id) REFERENCES operations
);

CREATE TABLE steps (
    tenant       text NOT NULL,
    operation_id uuid NOT NULL,
    ordinal      integer NOT NULL CHECK (ordinal >= 1),
    name         text NOT NULL,
    status       text NOT NULL CHECK (status IN ('done', 'skipped', 'failed')),
    started_ms   double precision NOT NULL CHECK (started_ms >= 0),
    duration_ms  double precision NOT NULL CHECK (duration_ms >= 0),
    facts        jsonb NOT NULL,
    PRIMARY KEY (tenant, operation_id, ordinal),
    FOREIGN KEY (tenant, operation_id) REFERENCES operations
);

-- Everything one record says, or nothing. Returns false if the operation was recorded before.
CREATE FUNCTION record_operation(p_operation jsonb, p_attempts jsonb, p_steps jsonb, p_moves jsonb) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    o operations := jsonb_populate_record(NULL::operations, p_operation);
BEGIN
    o.recorded_at := clock_timestamp();
    IF NOT EXISTS (SELECT FROM users WHERE tenant = o.tenant AND user_id = o.user_id) THEN
        PERFORM ensure_user(o.tenant, o.user_id);
    END IF;
    INSERT INTO operations SELECT o.* ON CONFLICT DO NOTHING;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    IF jsonb_array_length(p_moves) > 0 THEN
        PERFORM resolve_holds(p_moves, o.recorded_at);
    END IF;
    INSERT INTO attempts SELECT * FROM jsonb_populate_recordset(NULL::attempts, p_attempts);
    INSERT INTO steps SELECT * FROM jsonb_populate_recordset(NULL::steps, p_steps);
    PERFORM pg_notify('tailrace_operations', json_build_array(o.tenant, o.user_id, o.operation_id)::text);
    RETURN true;
END
$$;
