-- Which tool was called how often, with what outcome, and how long did it take? A call of a tool of the suite is a step of its operation; one
-- of a client's tools is made elsewhere and has none.
CREATE VIEW tool_calls AS
SELECT s.tenant, (s.created_at AT TIME ZONE 'UTC')::date AS day, s.facts ->> 'tool' AS tool, s.facts ->> 'outcome' AS outcome, count(*) AS calls,
       round(sum(s.duration_ms))::bigint AS duration_ms
FROM steps s
WHERE s.name = 'tool' AND s.status <> 'skipped'
GROUP BY 1, 2, 3, 4;
