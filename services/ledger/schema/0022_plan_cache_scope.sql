-- Whom the answers of a plan share the answer cache with: all users of their `tenant`, only themselves (`user`), or nobody (`off`). Empty, as in
-- plans that do not say: as the orchestrator is set.

ALTER TABLE plans ADD COLUMN cache_scope text NOT NULL DEFAULT '' CHECK (cache_scope IN ('', 'tenant', 'user', 'off'));

CREATE OR REPLACE VIEW members AS
SELECT u.tenant, u.user_id, u.display_name, u.created_at, s.started_at AS subscribed_at,
       p.name AS plan, p.requests_per_minute, p.tokens_per_minute, p.concurrent_answers, p.monthly_budget_nanousd, p.tiers,
       p.tenant_requests_per_minute, p.tenant_tokens_per_minute, p.tenant_concurrent_answers,
       p.key_requests_per_minute, p.key_tokens_per_minute, p.key_concurrent_answers, p.answer_deadline_ms,
       coalesce(n.started_at, s.ended_at) AS changes_at,
       CASE WHEN n.started_at IS NOT NULL THEN n.plan WHEN s.ended_at IS NOT NULL THEN 'free' END AS next_plan,
       p.tools, p.cache_scope
FROM users u
LEFT JOIN subscriptions s ON s.tenant = u.tenant AND s.user_id = u.user_id
    AND s.started_at <= now() AND (s.ended_at IS NULL OR s.ended_at > now())
LEFT JOIN subscriptions n ON n.tenant = u.tenant AND n.user_id = u.user_id AND n.ended_at IS NULL AND n.started_at > now()
LEFT JOIN LATERAL (
    SELECT * FROM plans
    WHERE plans.name = coalesce(s.plan, 'free') AND plans.tenant IN ('', u.tenant)
    ORDER BY plans.tenant <> '' DESC
    LIMIT 1
) p ON true;
