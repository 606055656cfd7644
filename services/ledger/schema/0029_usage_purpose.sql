-- As before, and what an operation was made for: whoever asked by it had to look for every operation again, in every month there is.
CREATE OR REPLACE VIEW usage_facts AS
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
       CASE WHEN o.first_token_ms > 0 THEN (time_bucket(o.first_token_ms) << 40) | 1 END AS first_token_pair,
       coalesce(nullif(o.purpose, ''), 'answer') AS purpose
FROM operations o;
