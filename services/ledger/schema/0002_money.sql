-- Prices, budgets, holds and the books. All money is int64 nano-USD.

-- A price is never changed: a new version is added. The tenant '' is for every tenant; a tenant's own price goes before it.
CREATE TABLE prices (
    price_id                        bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenant                          text NOT NULL,
    provider                        text NOT NULL CHECK (length(provider) BETWEEN 1 AND 64),
    model                           text NOT NULL CHECK (length(model) BETWEEN 1 AND 128),
    version                         integer NOT NULL CHECK (version >= 1),
    valid_from                      timestamptz NOT NULL,
    input_nanousd_per_mtok          bigint NOT NULL CHECK (input_nanousd_per_mtok >= 0),
    output_nanousd_per_mtok         bigint NOT NULL CHECK (output_nanousd_per_mtok >= 0),
    cache_read_nanousd_per_mtok     bigint NOT NULL CHECK (cache_read_nanousd_per_mtok >= 0),
    cache_write_5m_nanousd_per_mtok bigint NOT NULL CHECK (cache_write_5m_nanousd_per_mtok >= 0),
    cache_write_1h_nanousd_per_mtok bigint NOT NULL CHECK (cache_write_1h_nanousd_per_mtok >= 0),
    long_context_above_tokens       bigint NOT NULL CHECK (long_context_above_tokens >= 0),
    long_input_nanousd_per_mtok     bigint NOT NULL CHECK (long_input_nanousd_per_mtok >= 0),
    long_output_nanousd_per_mtok    bigint NOT NULL CHECK (long_output_nanousd_per_mtok >= 0),
    source                          text NOT NULL,
    created_at                      timestamptz NOT NULL DEFAULT now(),
    UNIQUE (provider, model, version)
);

-- What may be spent in a period. `subject` is a user, a key id, or the tenant's own name.
CREATE TABLE budgets (
    tenant        text NOT NULL REFERENCES tenants,
    scope         text NOT NULL CHECK (scope IN ('tenant', 'user', 'key')),
    subject       text NOT NULL,
    period        text NOT NULL CHECK (period IN ('day', 'month')),
    limit_nanousd bigint NOT NULL CHECK (limit_nanousd >= 0),
    updated_at    timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant, scope, subject, period)
);

-- What is spent and held, one row for each subject and period that had any. Kept whether or not there is a budget, so
-- that a budget set in the middle of a month knows what the month has seen. It equals the sum of the entries.
CREATE TABLE spending (
    tenant        text NOT NULL,
    scope         text NOT NULL CHECK (scope IN ('tenant', 'user', 'key')),
    subject       text NOT NULL,
    period        text NOT NULL CHECK (period IN ('day', 'month')),
    period_start  date NOT NULL,
    spent_nanousd bigint NOT NULL DEFAULT 0 CHECK (spent_nanousd >= 0),
    held_nanousd  bigint NOT NULL DEFAULT 0 CHECK (held_nanousd >= 0),
    PRIMARY KEY (tenant, scope, subject, period, period_start)
) WITH (fillfactor = 50); -- updated with every hold: room for it on the page keeps the index out of it

CREATE TABLE holds (
    hold_id               uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    tenant                text NOT NULL,
    user_id               text NOT NULL,
    api_key_id            text NOT NULL,
    operation_id          uuid NOT NULL,
    attempt               integer NOT NULL CHECK (attempt >= 1),
    provider              text NOT NULL,
    model                 text NOT NULL,
    price_id              bigint NOT NULL REFERENCES prices,
    input_tokens_max      bigint NOT NULL CHECK (input_tokens_max >= 0),
    output_tokens_max     bigint NOT NULL CHECK (output_tokens_max >= 0),
    amount_nanousd        bigint NOT NULL CHECK (amount_nanousd >= 0),
    state                 text NOT NULL DEFAULT 'reserved' CHECK (state IN ('reserved', 'settled', 'voided', 'expired', 'reconciled')),
    created_at            timestamptz NOT NULL,
    expires_at            timestamptz NOT NULL,
    resolved_at           timestamptz,
    input_tokens          bigint NOT NULL DEFAULT 0 CHECK (input_tokens >= 0),
    output_tokens         bigint NOT NULL DEFAULT 0 CHECK (output_tokens >= 0),
    cache_read_tokens     bigint NOT NULL DEFAULT 0 CHECK (cache_read_tokens >= 0),
    cache_write_tokens    bigint NOT NULL DEFAULT 0 CHECK (cache_write_tokens >= 0),
    cache_write_1h_tokens bigint NOT NULL DEFAULT 0 CHECK (cache_write_1h_tokens BETWEEN 0 AND cache_write_tokens),
    cost_nanousd          bigint NOT NULL DEFAULT 0 CHECK (cost_nanousd >= 0),
    estimated             boolean NOT NULL DEFAULT false,
    UNIQUE (tenant, operation_id, attempt),
    FOREIGN KEY (tenant, user_id) REFERENCES users,
    CHECK ((state = 'reserved') = (resolved_at IS NULL))
);
CREATE INDEX holds_open ON holds (expires_at) WHERE state = 'reserved';

-- The books. Each posting moves money between three accounts of its hold and sums to zero; nothing is ever changed.
CREATE TABLE entries (
    posting_id     bigint NOT NULL,
    account        text NOT NULL CHECK (account IN ('available', 'held', 'spent')),
    tenant         text NOT NULL,
    hold_id        uuid NOT NULL REFERENCES holds,
    operation_id   uuid NOT NULL,
    kind           text NOT NULL CHECK (kind IN ('reserve', 'settle', 'void', 'expire', 'correct')),
    amount_nanousd bigint NOT NULL CHECK (amount_nanousd <> 0),
    booked_at      timestamptz NOT NULL,
    PRIMARY KEY (posting_id, account),
    UNIQUE (hold_id, kind, account)
);
CREATE SEQUENCE postings AS bigint OWNED BY entries.posting_id;
CREATE INDEX entries_of_operation ON entries (tenant, operation_id);

CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% is append-only', TG_TABLE_NAME USING ERRCODE = 'restrict_violation';
END
$$;
CREATE TRIGGER entries_are_never_changed BEFORE UPDATE OR DELETE OR TRUNCATE ON entries
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER prices_are_never_changed BEFORE UPDATE OR DELETE OR TRUNCATE ON prices
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();

CREATE FUNCTION refuse_unbalanced() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM inserted GROUP BY posting_id HAVING sum(amount_nanousd) <> 0) THEN
        RAISE EXCEPTION 'a posting does not sum to zero' USING ERRCODE = 'check_violation';
    END IF;
    RETURN NULL;
END
$$;
CREATE TRIGGER entries_balance AFTER INSERT ON entries
    REFERENCING NEW TABLE AS inserted FOR EACH STATEMENT EXECUTE FUNCTION refuse_unbalanced();

-- The counters a hold of this principal and moment belongs to. Sorted as every transaction locks them, so that none waits in a circle.
CREATE FUNCTION counters_of(p_tenant text, p_user text, p_key text, p_at timestamptz)
RETURNS TABLE (scope text, subject text, period text, period_start date) LANGUAGE sql IMMUTABLE ROWS 6 AS $$
    SELECT s.scope, s.subject, p.period, date_trunc(p.period, p_at AT TIME ZONE 'UTC')::date
    FROM (VALUES ('key', p_key), ('tenant', p_tenant), ('user', p_user)) AS s (scope, subject)
    CROSS JOIN (VALUES ('day'), ('month')) AS p (period)
    WHERE s.subject <> ''
    ORDER BY s.scope, p.period
$$;

-- The price in force for a tenant at a moment.
CREATE FUNCTION price_in_force(p_tenant text, p_provider text, p_model text, p_at timestamptz) RETURNS bigint LANGUAGE sql STABLE AS $$
    SELECT price_id FROM prices
    WHERE provider = p_provider AND model = p_model AND tenant IN ('', p_tenant) AND valid_from <= p_at
    ORDER BY tenant <> '' DESC, valid_from DESC, version DESC
    LIMIT 1
$$;

-- Set `p_amount` aside, or say why not. One call, because it stands between a question and its first token.
--   held           a new hold
--   known          this (operation, attempt) has a hold already; its state says which way it went
--   conflict       it has one, for another call
--   price_changed  the amount was counted with a price that is not in force any more
--   exhausted      a budget has not enough left: scope, left_nanousd, resets_at
CREATE FUNCTION reserve_hold(
    p_tenant text, p_user text, p_key text, p_operation uuid, p_attempt integer, p_provider text, p_model text,
    p_price_id bigint, p_amount bigint, p_input_max bigint, p_output_max bigint, p_ttl interval, p_at timestamptz,
    OUT outcome text, OUT hold_id uuid, OUT amount_nanousd bigint, OUT price_id bigint, OUT expires_at timestamptz,
    OUT state text, OUT scope text, OUT left_nanousd bigint, OUT resets_at timestamptz
) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    moment timestamptz := coalesce(p_at, clock_timestamp());
    plan_limit bigint;
    known holds;
    posting bigint;
    locked integer;
BEGIN
    SELECT price_in_force(p_tenant, asked.provider, asked.model, moment) INTO price_id FROM prices asked WHERE asked.price_id = p_price_id;
    IF price_id IS DISTINCT FROM p_price_id THEN
        outcome := 'price_changed';
        RETURN;
    END IF;
    SELECT monthly_budget_nanousd INTO plan_limit FROM members WHERE tenant = p_tenant AND user_id = p_user;
    IF NOT FOUND THEN
        PERFORM ensure_user(p_tenant, p_user);
        SELECT monthly_budget_nanousd INTO plan_limit FROM members WHERE tenant = p_tenant AND user_id = p_user;
    END IF;

    INSERT INTO holds AS h (tenant, user_id, api_key_id, operation_id, attempt, provider, model, price_id,
                            input_tokens_max, output_tokens_max, amount_nanousd, created_at, expires_at)
    VALUES (p_tenant, p_user, p_key, p_operation, p_attempt, p_provider, p_model, p_price_id,
            p_input_max, p_output_max, p_amount, moment, moment + p_ttl)
    ON CONFLICT (tenant, operation_id, attempt) DO NOTHING
    RETURNING h.hold_id, h.amount_nanousd, h.expires_at, h.state INTO hold_id, amount_nanousd, expires_at, state;
    IF NOT FOUND THEN
        SELECT * INTO known FROM holds h WHERE h.tenant = p_tenant AND h.operation_id = p_operation AND h.attempt = p_attempt;
        IF (known.user_id, known.provider, known.model, known.input_tokens_max, known.output_tokens_max)
            IS DISTINCT FROM (p_user, p_provider, p_model, p_input_max, p_output_max) THEN
            outcome := 'conflict';
            RETURN;
        END IF;
        outcome := 'known';
        hold_id := known.hold_id; amount_nanousd := known.amount_nanousd; price_id := known.price_id;
        expires_at := known.expires_at; state := known.state;
        RETURN;
    END IF;

    outcome := 'held';
    IF p_amount = 0 THEN -- nothing to pay for, so nothing to ask, and no row that all of a tenant's calls would queue for
        RETURN;
    END IF;

    PERFORM 1 FROM spending s JOIN counters_of(p_tenant, p_user, p_key, moment) c USING (scope, subject, period, period_start)
    WHERE s.tenant = p_tenant ORDER BY s.scope, s.period FOR UPDATE OF s;
    GET DIAGNOSTICS locked = ROW_COUNT;
    IF locked < (CASE WHEN p_key = '' THEN 4 ELSE 6 END) THEN
        INSERT INTO spending (tenant, scope, subject, period, period_start)
        SELECT p_tenant, c.scope, c.subject, c.period, c.period_start FROM counters_of(p_tenant, p_user, p_key, moment) c
        ORDER BY c.scope, c.period ON CONFLICT DO NOTHING;
        PERFORM 1 FROM spending s JOIN counters_of(p_tenant, p_user, p_key, moment) c USING (scope, subject, period, period_start)
        WHERE s.tenant = p_tenant ORDER BY s.scope, s.period FOR UPDATE OF s;
    END IF;

    SELECT l.scope, l.left_nanousd, (l.period_start + ('1 ' || l.period)::interval) AT TIME ZONE 'UTC'
    INTO scope, left_nanousd, resets_at
    FROM (
        SELECT b.scope, b.limit_nanousd - s.spent_nanousd - s.held_nanousd AS left_nanousd, s.period, s.period_start
        FROM counters_of(p_tenant, p_user, p_key, moment) c
        JOIN spending s ON s.tenant = p_tenant AND (s.scope, s.subject, s.period, s.period_start) = (c.scope, c.subject, c.period, c.period_start)
        JOIN budgets b ON b.tenant = p_tenant AND (b.scope, b.subject, b.period) = (c.scope, c.subject, c.period)
        UNION ALL
        SELECT 'plan', plan_limit - s.spent_nanousd - s.held_nanousd, s.period, s.period_start
        FROM spending s
        WHERE plan_limit > 0 AND s.tenant = p_tenant AND s.scope = 'user' AND s.subject = p_user AND s.period = 'month'
          AND s.period_start = date_trunc('month', moment AT TIME ZONE 'UTC')::date
    ) l
    WHERE l.left_nanousd < p_amount
    ORDER BY l.left_nanousd LIMIT 1;
    IF FOUND THEN
        DELETE FROM holds h WHERE h.hold_id = reserve_hold.hold_id; -- nobody has seen it: it never was
        outcome := 'exhausted';
        hold_id := NULL;
        RETURN;
    END IF;

    UPDATE spending s SET held_nanousd = s.held_nanousd + p_amount
    FROM counters_of(p_tenant, p_user, p_key, moment) c
    WHERE s.tenant = p_tenant AND (s.scope, s.subject, s.period, s.period_start) = (c.scope, c.subject, c.period, c.period_start);
    posting := nextval('postings');
    INSERT INTO entries (posting_id, account, tenant, hold_id, operation_id, kind, amount_nanousd, booked_at)
    VALUES (posting, 'available', p_tenant, hold_id, p_operation, 'reserve', -p_amount, moment),
           (posting, 'held', p_tenant, hold_id, p_operation, 'reserve', p_amount, moment);
END
$$;

-- Write down what became of holds that the caller has locked: their new state, the postings, and the counters of the
-- period each hold was made in. An element: {hold_id, state, kind, held, spent, cost_nanousd, estimated, …_tokens}, where
-- `held` and `spent` are what moves on those accounts.
CREATE FUNCTION resolve_holds(p_moves jsonb, p_at timestamptz) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    moment timestamptz := coalesce(p_at, clock_timestamp());
BEGIN
    UPDATE holds h
    SET state = m.state, resolved_at = moment, cost_nanousd = m.cost_nanousd, estimated = m.estimated,
        input_tokens = m.input_tokens, output_tokens = m.output_tokens, cache_read_tokens = m.cache_read_tokens,
        cache_write_tokens = m.cache_write_tokens, cache_write_1h_tokens = m.cache_write_1h_tokens
    FROM jsonb_populate_recordset(NULL::holds, p_moves) m
    WHERE h.hold_id = m.hold_id;

    INSERT INTO entries (posting_id, account, tenant, hold_id, operation_id, kind, amount_nanousd, booked_at)
    SELECT m.posting_id, a.account, h.tenant, h.hold_id, h.operation_id, m.kind, a.amount, moment
    FROM (
        SELECT nextval('postings') AS posting_id, r.*
        FROM jsonb_to_recordset(p_moves) AS r (hold_id uuid, kind text, held bigint, spent bigint)
    ) m
    JOIN holds h USING (hold_id)
    CROSS JOIN LATERAL (VALUES ('available', -m.held - m.spent), ('held', m.held), ('spent', m.spent)) AS a (account, amount)
    WHERE a.amount <> 0;

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
END
$$;
