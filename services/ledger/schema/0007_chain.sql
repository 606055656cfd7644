-- The books, sealed: each posting of a tenant has the tenant's next commit number, and a hash over itself and all before it.
-- A row that is changed, taken away or slipped in later breaks the chain from there on; `tailrace ledger verify` names the place.

-- Where each tenant's chain ends. Its row is the lock that gives postings their order.
CREATE TABLE chain_heads (
    tenant        text PRIMARY KEY,
    commit_number bigint NOT NULL CHECK (commit_number >= 0),
    hash          bytea NOT NULL CHECK (length(hash) = 32)
) WITH (fillfactor = 50); -- updated with every posting: room for it on the page keeps the index out of it

CREATE TABLE chain_links (
    tenant        text NOT NULL,
    commit_number bigint NOT NULL CHECK (commit_number >= 1),
    posting_id    bigint NOT NULL UNIQUE,
    hash          bytea NOT NULL CHECK (length(hash) = 32),
    PRIMARY KEY (tenant, commit_number)
);
CREATE TRIGGER chain_links_are_never_changed BEFORE UPDATE OR DELETE OR TRUNCATE ON chain_links
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();

-- The hash of a posting: SHA-256 over the hash before it (32 zero bytes at first) and this line, in UTF-8:
--   <bytes of the tenant>:<tenant> <commit number> <posting> <hold> <operation> <kind> <booked at, microseconds since 1970> <account>=<amount> …
-- with the accounts in the order of the alphabet. The length before the tenant makes every line mean one thing only.
CREATE FUNCTION posting_hash(
    p_before bytea, p_tenant text, p_number bigint, p_posting bigint, p_hold uuid, p_operation uuid, p_kind text, p_booked_at timestamptz,
    p_amounts text
) RETURNS bytea LANGUAGE sql STABLE AS $$
    SELECT sha256(p_before || convert_to(concat_ws(' ',
        octet_length(p_tenant) || ':' || p_tenant, p_number, p_posting, p_hold, p_operation, p_kind,
        (extract(epoch FROM p_booked_at) * 1000000)::bigint, p_amounts), 'UTF8'))
$$;

-- The postings as wholes: one row each, with the accounts in the order that is hashed.
CREATE VIEW postings_booked AS
SELECT posting_id, tenant, hold_id, operation_id, kind, booked_at, sum(amount_nanousd) AS sum_nanousd,
       string_agg(account || '=' || amount_nanousd, ' ' ORDER BY account COLLATE "C") AS amounts
FROM entries
GROUP BY posting_id, tenant, hold_id, operation_id, kind, booked_at;

-- Put one posting at the end of its tenant's chain. The head is the last row that a transaction locks: counters go before it, so
-- that nobody who has it waits for anybody else.
CREATE FUNCTION seal_posting(
    p_tenant text, p_posting bigint, p_hold uuid, p_operation uuid, p_kind text, p_booked_at timestamptz, p_amounts text
) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    head chain_heads;
BEGIN
    SELECT * INTO head FROM chain_heads WHERE tenant = p_tenant FOR UPDATE;
    IF NOT FOUND THEN
        INSERT INTO chain_heads VALUES (p_tenant, 0, decode(repeat('00', 32), 'hex')) ON CONFLICT DO NOTHING;
        SELECT * INTO STRICT head FROM chain_heads WHERE tenant = p_tenant FOR UPDATE;
    END IF;
    head.commit_number := head.commit_number + 1;
    head.hash := posting_hash(head.hash, p_tenant, head.commit_number, p_posting, p_hold, p_operation, p_kind, p_booked_at, p_amounts);
    INSERT INTO chain_links (tenant, commit_number, posting_id, hash) VALUES (p_tenant, head.commit_number, p_posting, head.hash);
    UPDATE chain_heads SET commit_number = head.commit_number, hash = head.hash WHERE tenant = p_tenant;
END
$$;

-- What was booked before there was a chain, in the order it was booked.
SELECT seal_posting(tenant, posting_id, hold_id, operation_id, kind, booked_at, amounts)
FROM (SELECT * FROM postings_booked ORDER BY tenant, posting_id) booked;

-- Runs for whatever writes entries. A posting is written by one statement, sums to zero, and belongs to the tenant and operation of its hold.
CREATE FUNCTION seal_entries() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    posting record;
BEGIN
    FOR posting IN
        SELECT i.posting_id, i.tenant, i.hold_id, i.operation_id, i.kind, i.booked_at, sum(i.amount_nanousd) AS sum_nanousd,
               string_agg(i.account || '=' || i.amount_nanousd, ' ' ORDER BY i.account COLLATE "C") AS amounts,
               bool_and(h.hold_id IS NOT NULL) AS of_its_hold
        FROM inserted i LEFT JOIN holds h ON (h.hold_id, h.tenant, h.operation_id) = (i.hold_id, i.tenant, i.operation_id)
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
DROP TRIGGER entries_balance ON entries;
DROP FUNCTION refuse_unbalanced();
CREATE TRIGGER entries_are_sealed AFTER INSERT ON entries
    REFERENCING NEW TABLE AS inserted FOR EACH STATEMENT EXECUTE FUNCTION seal_entries();

-- The accounts of tenants, users and API keys: what the log says that each has spent and set aside, in the day and month the hold was
-- made. An entry belongs to the three accounts that its hold names. `spending` must always be equal to this.
CREATE VIEW balances AS
SELECT h.tenant, c.scope, c.subject, c.period, c.period_start,
       coalesce(sum(e.amount_nanousd) FILTER (WHERE e.account = 'spent'), 0)::bigint AS spent_nanousd,
       coalesce(sum(e.amount_nanousd) FILTER (WHERE e.account = 'held'), 0)::bigint AS held_nanousd
FROM entries e JOIN holds h USING (hold_id), counters_of(h.tenant, h.user_id, h.api_key_id, h.created_at) c
GROUP BY 1, 2, 3, 4, 5;

-- Have the counters of a principal and moment, all of them, locked. Missing rows are made before any is locked, and locks are taken in one
-- order: so a row that somebody has made but not committed is only ever waited for by who holds no lock yet.
CREATE FUNCTION lock_counters(p_tenant text, p_user text, p_key text, p_at timestamptz) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    present integer;
BEGIN
    SELECT count(*) INTO present FROM counters_of(p_tenant, p_user, p_key, p_at) c
    JOIN spending s ON s.tenant = p_tenant AND (s.scope, s.subject, s.period, s.period_start) = (c.scope, c.subject, c.period, c.period_start);
    IF present < (CASE WHEN p_key = '' THEN 4 ELSE 6 END) THEN
        INSERT INTO spending (tenant, scope, subject, period, period_start)
        SELECT p_tenant, c.scope, c.subject, c.period, c.period_start FROM counters_of(p_tenant, p_user, p_key, p_at) c
        ORDER BY c.scope, c.period ON CONFLICT DO NOTHING;
    END IF;
    PERFORM 1 FROM spending s JOIN counters_of(p_tenant, p_user, p_key, p_at) c USING (scope, subject, period, period_start)
    WHERE s.tenant = p_tenant ORDER BY s.scope, s.period FOR UPDATE OF s;
END
$$;

-- As before, but the entries come last: the end of the chain is locked after the counters, here as in reserve_hold.
CREATE OR REPLACE FUNCTION resolve_holds(p_moves jsonb, p_at timestamptz) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    moment timestamptz := coalesce(p_at, clock_timestamp());
    moved integer;
BEGIN
    UPDATE holds h
    SET state = m.state, resolved_at = moment, cost_nanousd = m.cost_nanousd, estimated = m.estimated,
        input_tokens = m.input_tokens, output_tokens = m.output_tokens, cache_read_tokens = m.cache_read_tokens,
        cache_write_tokens = m.cache_write_tokens, cache_write_1h_tokens = m.cache_write_1h_tokens
    FROM jsonb_populate_recordset(NULL::holds, p_moves) m
    WHERE h.hold_id = m.hold_id AND h.tenant = coalesce(nullif(current_setting('tailrace.tenant', true), ''), h.tenant);
    GET DIAGNOSTICS moved = ROW_COUNT;
    IF moved < jsonb_array_length(p_moves) THEN
        RAISE EXCEPTION 'a hold is of another tenant than is worked for, or gone' USING ERRCODE = 'insufficient_privilege';
    END IF;

    INSERT INTO spending (tenant, scope, subject, period, period_start)
    SELECT h.tenant, c.scope, c.subject, c.period, c.period_start
    FROM jsonb_to_recordset(p_moves) AS m (hold_id uuid, held bigint, spent bigint)
    JOIN holds h USING (hold_id), counters_of(h.tenant, h.user_id, h.api_key_id, h.created_at) c
    WHERE m.held <> 0 OR m.spent <> 0
    GROUP BY 1, 2, 3, 4, 5 ORDER BY 1, 2, 3, 4, 5
    ON CONFLICT DO NOTHING;

    PERFORM 1 FROM spending s
    JOIN (
        SELECT DISTINCT h.tenant, c.*
        FROM jsonb_to_recordset(p_moves) AS m (hold_id uuid)
        JOIN holds h USING (hold_id), counters_of(h.tenant, h.user_id, h.api_key_id, h.created_at) c
    ) mine USING (tenant, scope, subject, period, period_start)
    ORDER BY s.tenant, s.scope, s.subject, s.period, s.period_start FOR UPDATE OF s;

    UPDATE spending s
    SET held_nanousd = s.held_nanousd + d.held, spent_nanousd = s.spent_nanousd + d.spent
    FROM (
        SELECT h.tenant, c.scope, c.subject, c.period, c.period_start, sum(m.held)::bigint AS held, sum(m.spent)::bigint AS spent
        FROM jsonb_to_recordset(p_moves) AS m (hold_id uuid, held bigint, spent bigint)
        JOIN holds h USING (hold_id), counters_of(h.tenant, h.user_id, h.api_key_id, h.created_at) c
        GROUP BY 1, 2, 3, 4, 5
    ) d
    WHERE (s.tenant, s.scope, s.subject, s.period, s.period_start) = (d.tenant, d.scope, d.subject, d.period, d.period_start)
      AND (d.held <> 0 OR d.spent <> 0);

    INSERT INTO entries (posting_id, account, tenant, hold_id, operation_id, kind, amount_nanousd, booked_at)
    SELECT m.posting_id, a.account, h.tenant, h.hold_id, h.operation_id, m.kind, a.amount, moment
    FROM (
        SELECT nextval('postings') AS posting_id, r.*
        FROM jsonb_to_recordset(p_moves) AS r (hold_id uuid, kind text, held bigint, spent bigint)
    ) m
    JOIN holds h USING (hold_id)
    CROSS JOIN LATERAL (VALUES ('available', -m.held - m.spent), ('held', m.held), ('spent', m.spent)) AS a (account, amount)
    WHERE a.amount <> 0;
END
$$;
