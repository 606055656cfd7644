-- Who there is and what they may do. A row with the tenant '' is meant for every tenant; a tenant's own row goes before it.

CREATE TABLE tenants (
    tenant     text PRIMARY KEY CHECK (length(tenant) BETWEEN 1 AND 128),
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE users (
    tenant       text NOT NULL REFERENCES tenants,
    user_id      text NOT NULL CHECK (length(user_id) BETWEEN 1 AND 256),
    display_name text NOT NULL DEFAULT '' CHECK (length(display_name) <= 256),
    created_at   timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant, user_id)
);

CREATE TABLE plans (
    tenant                 text NOT NULL,
    name                   text NOT NULL CHECK (name ~ '^[a-z0-9_-]{1,64}$'),
    requests_per_minute    integer NOT NULL CHECK (requests_per_minute BETWEEN 1 AND 1000000),
    tokens_per_minute      bigint NOT NULL CHECK (tokens_per_minute BETWEEN 1 AND 1000000000),
    concurrent_answers     integer NOT NULL CHECK (concurrent_answers BETWEEN 1 AND 10000),
    monthly_budget_nanousd bigint NOT NULL CHECK (monthly_budget_nanousd >= 0),
    tiers                  text[] NOT NULL,
    updated_at             timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant, name)
);

CREATE TABLE subscriptions (
    subscription_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenant          text NOT NULL,
    user_id         text NOT NULL,
    plan            text NOT NULL,
    started_at      timestamptz NOT NULL DEFAULT now(),
    ended_at        timestamptz CHECK (ended_at >= started_at),
    FOREIGN KEY (tenant, user_id) REFERENCES users
);
-- A user has at most one subscription at a time; the former ones stay as history.
CREATE UNIQUE INDEX subscriptions_running ON subscriptions (tenant, user_id) WHERE ended_at IS NULL;

CREATE TABLE api_keys (
    key_id        text PRIMARY KEY CHECK (length(key_id) BETWEEN 8 AND 64),
    tenant        text NOT NULL,
    user_id       text NOT NULL,
    name          text NOT NULL CHECK (length(name) BETWEEN 1 AND 128),
    roles         text[] NOT NULL CHECK (roles <@ ARRAY['user', 'service', 'admin']),
    secret_sha256 bytea NOT NULL CHECK (length(secret_sha256) = 32),
    created_at    timestamptz NOT NULL DEFAULT now(),
    expires_at    timestamptz,
    revoked_at    timestamptz,
    FOREIGN KEY (tenant, user_id) REFERENCES users
);
CREATE INDEX api_keys_of_tenant ON api_keys (tenant, created_at);

-- Every user with the plan in force, which is `free` without a subscription.
CREATE VIEW members AS
SELECT u.tenant, u.user_id, u.display_name, u.created_at, s.started_at AS subscribed_at,
       p.name AS plan, p.requests_per_minute, p.tokens_per_minute, p.concurrent_answers, p.monthly_budget_nanousd, p.tiers
FROM users u
LEFT JOIN subscriptions s ON s.tenant = u.tenant AND s.user_id = u.user_id AND s.ended_at IS NULL
LEFT JOIN LATERAL (
    SELECT * FROM plans
    WHERE plans.name = coalesce(s.plan, 'free') AND plans.tenant IN ('', u.tenant)
    ORDER BY plans.tenant <> '' DESC
    LIMIT 1
) p ON true;

CREATE FUNCTION ensure_user(p_tenant text, p_user text) RETURNS void LANGUAGE sql AS $$
    INSERT INTO tenants (tenant) VALUES (p_tenant) ON CONFLICT DO NOTHING;
    INSERT INTO users (tenant, user_id) VALUES (p_tenant, p_user) ON CONFLICT DO NOTHING;
$$;
