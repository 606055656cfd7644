-- Holds are found by their key, however many there are: what resolves one must not grow with all that were.

-- Moves as rows. STRICT, so that it is not drawn into the queries that use it: then they are planned for as few rows as there mostly are.
CREATE FUNCTION moves_in(p_moves jsonb) RETURNS TABLE (
    hold_id uuid, state text, kind text, held bigint, spent bigint, cost_nanousd bigint, estimated boolean, input_tokens bigint,
    output_tokens bigint, cache_read_tokens bigint, cache_write_tokens bigint, cache_write_1h_tokens bigint
) LANGUAGE sql IMMUTABLE STRICT ROWS 2 AS $$
    SELECT * FROM jsonb_to_recordset(p_moves) AS r (
        hold_id uuid, state text, kind text, held bigint, spent bigint, cost_nanousd bigint, estimated boolean, input_tokens bigint,
        output_tokens bigint, cache_read_tokens bigint, cache_write_tokens bigint, cache_write_1h_tokens bigint
    )
$$;

CREATE OR REPLACE FUNCTION resolve_holds(p_moves jsonb, p_at timestamptz) RETURNS void LANGUAGE plpgsql
SECURITY DEFINER SET search_path FROM CURRENT AS $$
DECLARE
    moment timestamptz := coalesce(p_at, clock_timestamp());
    moved integer;
BEGIN
    UPDATE holds h
    SET state = m.state, resolved_at = moment, cost_nanousd = m.cost_nanousd, estimated = m.estimated,
        input_tokens = m.input_tokens, output_tokens = m.output_tokens, cache_read_tokens = m.cache_read_tokens,
        cache_write_tokens = m.cache_write_tokens, cache_write_1h_tokens = m.cache_write_1h_tokens
    FROM moves_in(p_moves) m
    WHERE h.hold_id = m.hold_id AND h.tenant = coalesce(nullif(current_setting('tailrace.tenant', true), ''), h.tenant);
    GET DIAGNOSTICS moved = ROW_COUNT;
    IF moved < jsonb_array_length(p_moves) THEN
        RAISE EXCEPTION 'a hold is of another tenant than is worked for, or gone' USING ERRCODE = 'insufficient_privilege';
    END IF;

    INSERT INTO spending (tenant, scope, subject, period, period_start)
    SELECT h.tenant, c.scope, c.subject, c.period, c.period_start
    FROM moves_in(p_moves) m
    JOIN holds h USING (hold_id), counters_of(h.tenant, h.user_id, h.api_key_id, h.created_at) c
    WHERE m.held <> 0 OR m.spent <> 0
    GROUP BY 1, 2, 3, 4, 5 ORDER BY 1, 2, 3, 4, 5
    ON CONFLICT DO NOTHING;

    PERFORM 1 FROM spending s
    JOIN (
        SELECT DISTINCT h.tenant, c.*
        FROM moves_in(p_moves) m
        JOIN holds h USING (hold_id), counters_of(h.tenant, h.user_id, h.api_key_id, h.created_at) c
    ) mine USING (tenant, scope, subject, period, period_start)
    ORDER BY s.tenant, s.scope, s.subject, s.period, s.period_start FOR UPDATE OF s;

    UPDATE spending s
    SET held_nanousd = s.held_nanousd + d.held, spent_nanousd = s.spent_nanousd + d.spent
    FROM (
        SELECT h.tenant, c.scope, c.subject, c.period, c.period_start, sum(m.held)::bigint AS held, sum(m.spent)::bigint AS spent
        FROM moves_in(p_moves) m
        JOIN holds h USING (hold_id), counters_of(h.tenant, h.user_id, h.api_key_id, h.created_at) c
        GROUP BY 1, 2, 3, 4, 5
    ) d
    WHERE (s.tenant, s.scope, s.subject, s.period, s.period_start) = (d.tenant, d.scope, d.subject, d.period, d.period_start)
      AND (d.held <> 0 OR d.spent <> 0);

    INSERT INTO entries (posting_id, account, tenant, hold_id, operation_id, kind, amount_nanousd, booked_at)
    SELECT m.posting_id, a.account, h.tenant, h.hold_id, h.operation_id, m.kind, a.amount, moment
    FROM (
        SELECT nextval('postings') AS posting_id, r.*
        FROM moves_in(p_moves) r
    ) m
    JOIN holds h USING (hold_id)
    CROSS JOIN LATERAL (VALUES ('available', -m.held - m.spent), ('held', m.held), ('spent', m.spent)) AS a (account, amount)
    WHERE a.amount <> 0;
END
$$;

CREATE OR REPLACE FUNCTION seal_entries() RETURNS trigger LANGUAGE plpgsql
SECURITY DEFINER SET search_path FROM CURRENT AS $$
DECLARE
    posting record;
BEGIN
    FOR posting IN
        SELECT i.posting_id, i.tenant, i.hold_id, i.operation_id, i.kind, i.booked_at, sum(i.amount_nanousd) AS sum_nanousd,
               string_agg(i.account || '=' || i.amount_nanousd, ' ' ORDER BY i.account COLLATE "C") AS amounts,
               bool_and(h.hold_id IS NOT NULL) AS of_its_hold
        FROM inserted i LEFT JOIN LATERAL (
            SELECT hold_id FROM holds WHERE (hold_id, tenant, operation_id) = (i.hold_id, i.tenant, i.operation_id) OFFSET 0
        ) h ON true
        GROUP BY i.posting_id, i.tenant, i.hold_id, i.operation_id, i.kind, i.booked_at
        ORDER BY i.tenant, i.posting_id
    LOOP
        IF posting.sum_nanousd <> 0 THEN
            RAISE EXCEPTION 'a posting does not sum to zero' USING ERRCODE = 'check_violation';
        END IF;
        IF NOT posting.of_its_hold THEN
            RAISE EXCEPTION 'a posting is not of its hold''s tenant and operation' USING ERRCODE = 'check_violation';
        END IF;
        PERFORM seal_posting(posting.tenant, posting.posting_id, posting.hold_id, posting.operation_id, posting.kind, posting.booked_at,
                             posting.amounts);
    END LOOP;
    RETURN NULL;
END
$$;

-- One hold of a call, for who may see it. A function, because it enters its tenant by itself.
CREATE FUNCTION find_hold(p_tenant text, p_user text, p_any_user boolean, p_hold uuid) RETURNS SETOF holds LANGUAGE plpgsql ROWS 1 AS $$
BEGIN
    PERFORM enter_tenant(p_tenant, true);
    RETURN QUERY SELECT * FROM holds
    WHERE tenant = p_tenant AND hold_id = p_hold AND (user_id = p_user OR p_any_user) AND price_id IS NOT NULL; -- a lease is no call's
END
$$;

-- As resolve_holds, for one tenant that it enters by itself.
CREATE FUNCTION resolve_holds_of(p_tenant text, p_moves jsonb, p_at timestamptz) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM enter_tenant(p_tenant, true);
    PERFORM resolve_holds(p_moves, p_at);
END
$$;
