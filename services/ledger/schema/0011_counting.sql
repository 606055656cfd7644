-- An operation is the sum of its attempts, at every commit; and a view for each question that an operator asks in psql.

CREATE FUNCTION refuse_other_than_attempts() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    whole operations;
BEGIN
    SELECT * INTO whole FROM operations WHERE tenant = NEW.tenant AND operation_id = NEW.operation_id;
    IF FOUND AND (
        SELECT (coalesce(sum(cost_nanousd), 0), coalesce(sum(input_tokens), 0), coalesce(sum(output_tokens), 0),
                coalesce(sum(cache_read_tokens), 0), coalesce(sum(cache_write_tokens), 0), coalesce(sum(cache_write_1h_tokens), 0))
            IS DISTINCT FROM (whole.cost_nanousd::numeric, whole.input_tokens::numeric, whole.output_tokens::numeric,
                whole.cache_read_tokens::numeric, whole.cache_write_tokens::numeric, whole.cache_write_1h_tokens::numeric)
        FROM attempts WHERE tenant = NEW.tenant AND operation_id = NEW.operation_id
    ) THEN
        RAISE EXCEPTION 'operation % is not the sum of its attempts', NEW.operation_id USING ERRCODE = 'check_violation';
    END IF;
    RETURN NULL;
END
$$;
-- Deferred, because the operation is written before its attempts.
CREATE CONSTRAINT TRIGGER operations_are_their_attempts AFTER INSERT ON operations
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse_other_than_attempts();
CREATE CONSTRAINT TRIGGER attempts_make_their_operation AFTER INSERT ON attempts
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse_other_than_attempts();

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
    FROM usage_unrolled JOIN usage_facts f USING (tenant, operation_id)
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

-- Who has used up a budget of the running period, or that of the plan?
CREATE VIEW over_budget AS
SELECT b.tenant, b.scope, b.subject, b.period, b.limit_nanousd, s.spent_nanousd, s.held_nanousd
FROM budgets b
JOIN spending s USING (tenant, scope, subject, period)
WHERE s.period_start = date_trunc(b.period, now() AT TIME ZONE 'UTC')::date AND s.spent_nanousd + s.held_nanousd >= b.limit_nanousd
UNION ALL
SELECT m.tenant, 'plan', m.user_id, 'month', m.monthly_budget_nanousd, s.spent_nanousd, s.held_nanousd
FROM members m
JOIN spending s ON s.tenant = m.tenant AND s.scope = 'user' AND s.subject = m.user_id AND s.period = 'month'
WHERE m.monthly_budget_nanousd > 0 AND s.period_start = date_trunc('month', now() AT TIME ZONE 'UTC')::date
  AND s.spent_nanousd + s.held_nanousd >= m.monthly_budget_nanousd;

-- Which operations are estimated, that is, booked by tokens the provider did not tell?
CREATE VIEW estimated_operations AS
SELECT o.tenant, o.operation_id, o.created_at, o.user_id, o.model, o.status, o.cost_nanousd FROM operations o WHERE o.estimated;

-- Which provider calls failed, with what, and what did they cost all the same?
CREATE VIEW failed_attempts AS
SELECT a.tenant, (o.created_at AT TIME ZONE 'UTC')::date AS day, a.provider, a.model, a.error_reason, count(*) AS attempts,
       count(*) FILTER (WHERE a.not_sent) AS not_sent, sum(a.cost_nanousd)::bigint AS cost_nanousd
FROM attempts a JOIN operations o USING (tenant, operation_id)
WHERE a.error_reason <> ''
GROUP BY 1, 2, 3, 4, 5;

-- Who spends most this month?
CREATE VIEW spenders AS
SELECT tenant, scope, subject, spent_nanousd, held_nanousd FROM spending
WHERE period = 'month' AND period_start = date_trunc('month', now() AT TIME ZONE 'UTC')::date;

-- Which money is set aside, for what, and since when?
CREATE VIEW open_holds AS
SELECT tenant, hold_id, operation_id, attempt, user_id, model, amount_nanousd, created_at, expires_at, expires_at < now() AS expired
FROM holds WHERE state = 'reserved';
