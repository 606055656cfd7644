-- Subscriptions that change or end with their period, which is the calendar month in UTC: what a plan gives in money is counted by it, and a
-- plan that changed in the middle of a month would meet what the former one has spent. Nothing has to run at the turn of the month: which
-- subscription is in force follows from its times. `subscriptions_running` holds the one without an end, be it in force or to come.

CREATE INDEX subscriptions_of_user ON subscriptions (tenant, user_id, started_at);

CREATE OR REPLACE VIEW members AS
SELECT u.tenant, u.user_id, u.display_name, u.created_at, s.started_at AS subscribed_at,
       p.name AS plan, p.requests_per_minute, p.tokens_per_minute, p.concurrent_answers, p.monthly_budget_nanousd, p.tiers,
       p.tenant_requests_per_minute, p.tenant_tokens_per_minute, p.tenant_concurrent_answers,
       p.key_requests_per_minute, p.key_tokens_per_minute, p.key_concurrent_answers, p.answer_deadline_ms,
       coalesce(n.started_at, s.ended_at) AS changes_at,
       CASE WHEN n.started_at IS NOT NULL THEN n.plan WHEN s.ended_at IS NOT NULL THEN 'free' END AS next_plan
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

-- Put a user on a plan, or on none with NULL, from now on or from the end of the running period. What was to come before is forgotten.
CREATE FUNCTION change_subscription(p_tenant text, p_user text, p_plan text, p_at_period_end boolean) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    moment timestamptz := CASE WHEN p_at_period_end THEN (date_trunc('month', now() AT TIME ZONE 'UTC') + interval '1 month') AT TIME ZONE 'UTC'
        ELSE now() END;
    current subscriptions;
BEGIN
    -- The user's row is the lock: two changes at once follow one another.
    PERFORM 1 FROM users WHERE tenant = p_tenant AND user_id = p_user FOR NO KEY UPDATE;
    DELETE FROM subscriptions WHERE tenant = p_tenant AND user_id = p_user AND started_at > now();
    SELECT * INTO current FROM subscriptions
    WHERE tenant = p_tenant AND user_id = p_user AND started_at <= now() AND (ended_at IS NULL OR ended_at > now());
    IF current.plan = p_plan THEN
        UPDATE subscriptions SET ended_at = NULL WHERE subscription_id = current.subscription_id;
        RETURN;
    END IF;
    UPDATE subscriptions SET ended_at = greatest(started_at, moment) WHERE subscription_id = current.subscription_id;
    IF p_plan IS NOT NULL THEN
        INSERT INTO subscriptions (tenant, user_id, plan, started_at) VALUES (p_tenant, p_user, p_plan, moment);
    END IF;
END
$$;
