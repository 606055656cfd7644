-- What a tenant as a whole and each API key may use besides the user, and how long an answer may take; 0 = no limit of that kind.

ALTER TABLE plans
    ADD COLUMN tenant_requests_per_minute integer NOT NULL DEFAULT 0 CHECK (tenant_requests_per_minute BETWEEN 0 AND 10000000),
    ADD COLUMN tenant_tokens_per_minute   bigint NOT NULL DEFAULT 0 CHECK (tenant_tokens_per_minute BETWEEN 0 AND 100000000000),
    ADD COLUMN tenant_concurrent_answers  integer NOT NULL DEFAULT 0 CHECK (tenant_concurrent_answers BETWEEN 0 AND 100000),
    ADD COLUMN key_requests_per_minute    integer NOT NULL DEFAULT 0 CHECK (key_requests_per_minute BETWEEN 0 AND 10000000),
    ADD COLUMN key_tokens_per_minute      bigint NOT NULL DEFAULT 0 CHECK (key_tokens_per_minute BETWEEN 0 AND 100000000000),
    ADD COLUMN key_concurrent_answers     integer NOT NULL DEFAULT 0 CHECK (key_concurrent_answers BETWEEN 0 AND 100000),
    ADD COLUMN answer_deadline_ms         integer NOT NULL DEFAULT 0 CHECK (answer_deadline_ms BETWEEN 0 AND 3000000);

CREATE OR REPLACE VIEW members AS
SELECT u.tenant, u.user_id, u.display_name, u.created_at, s.started_at AS subscribed_at,
       p.name AS plan, p.requests_per_minute, p.tokens_per_minute, p.concurrent_answers, p.monthly_budget_nanousd, p.tiers,
       p.tenant_requests_per_minute, p.tenant_tokens_per_minute, p.tenant_concurrent_answers,
       p.key_requests_per_minute, p.key_tokens_per_minute, p.key_concurrent_answers, p.answer_deadline_ms
FROM users u
LEFT JOIN subscriptions s ON s.tenant = u.tenant AND s.user_id = u.user_id AND s.ended_at IS NULL
LEFT JOIN LATERAL (
    SELECT * FROM plans
    WHERE plans.name = coalesce(s.plan, 'free') AND plans.tenant IN ('', u.tenant)
    ORDER BY plans.tenant <> '' DESC
    LIMIT 1
) p ON true;
