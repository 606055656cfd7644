-- Which of the suite's own tools the answers of a plan may use: names, `server__*` for all of an MCP server, `*` for all. What was there before
-- gets those that reach nothing but the user's own documents.

ALTER TABLE plans
    ADD COLUMN tools text[] NOT NULL DEFAULT '{calculator,current_time,search_documents}' CHECK (cardinality(tools) <= 64);

CREATE OR REPLACE VIEW members AS
SELECT u.tenant, u.user_id, u.display_name, u.created_at, s.started_at AS subscribed_at,
       p.name AS plan, p.requests_per_minute, p.tokens_per_minute, p.concurrent_answers, p.monthly_budget_nanousd, p.tiers,
       p.tenant_requests_per_minute, p.tenant_tokens_per_minute, p.tenant_concurrent_answers,
       p.key_requests_per_minute, p.key_tokens_per_minute, p.key_concurrent_answers, p.answer_deadline_ms,
       coalesce(n.started_at, s.ended_at) AS changes_at,
       CASE WHEN n.started_at IS NOT NULL THEN n.plan WHEN s.ended_at IS NOT NULL THEN 'free' END AS next_plan,
       p.tools
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
