"""The laws of the books, as queries: how many rows each is about, and which rows break it. How they are asked is in `verify`."""

from dataclasses import dataclass

from services.ledger.postgres_usage import MEASURES


@dataclass(frozen=True, slots=True)
class Law:
    """What must hold for all rows of a kind."""

    text: str
    counted: str
    """A query for how many rows the law is about."""
    broken: str
    """A query for the rows that break it, in a lasting order: `at`, the table and key, and `wrong`, what is wrong there."""


TOKENS = ("input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens", "cache_write_1h_tokens")


def _columns(alias: str, names: tuple[str, ...] = TOKENS) -> str:
    return ", ".join(f"{alias}.{name}" for name in names)


def _undated(name: str) -> str:
    """A model's name without the date of its snapshot, as `prices` looks for it."""
    return rf"regexp_replace({name}, '-(\d{{8}}|\d{{4}}-\d{{2}}-\d{{2}}|latest)$', '')"


_BY = ("tenant", "starts_at", "model", "tier", "cache_verdict")
"""What every table of sums is by."""
_OF_USER = ("user_id", "api_key_id")
_KEPT = "starts_at >= (SELECT purged_before FROM usage_retention)"


def _other_sums(table: str, rows: str, key: tuple[str, ...] = _BY, where: str = "true") -> str:
    """Rows of a table of sums that are not the sums of `rows` by `key`, and groups of those that it does not have."""
    differences = ", ".join(
        f"CASE WHEN s.{name} IS DISTINCT FROM r.{name} THEN format('{name} %s, not %s', coalesce(s.{name}, 0), coalesce(r.{name}, 0)) END"
        for name in MEASURES
    )
    return f"""
        SELECT format('{table} {" ".join(f"{name}=%s" for name in key)}', {", ".join(key)}) AS at,
               'says ' || concat_ws(', ', {differences}) AS wrong
        FROM (SELECT * FROM {table} WHERE {where}) s
        FULL JOIN (
            SELECT {", ".join(key)}, {", ".join(f"sum({name})::bigint AS {name}" for name in MEASURES)}
            FROM ({rows}) f WHERE {where} GROUP BY {", ".join(key)}
        ) r USING ({", ".join(key)})
        WHERE ({_columns("s", MEASURES)}) IS DISTINCT FROM ({_columns("r", MEASURES)})
    """


def _summed(grain: str) -> str:
    """What the operations add that are in the sums. Hashed, however few seem to wait."""
    return f"""
        SELECT f.*, date_trunc('{grain}', f.created_at, 'UTC') AS starts_at FROM usage_facts f
        WHERE (f.tenant, f.operation_id) NOT IN (SELECT u.tenant, u.operation_id FROM usage_unrolled u)
    """


def _coarser(table: str) -> str:
    """The rows of another table of sums, by the day."""
    return (
        f"SELECT date_trunc('day', starts_at, 'UTC') AS starts_at, tenant, model, tier, cache_verdict, {', '.join(MEASURES)} FROM {table}"
    )


LAWS = (
    Law(
        "every posting sums to zero",
        "SELECT count(DISTINCT posting_id) FROM entries",
        """
        SELECT 'entries posting_id=' || posting_id AS at, 'sums to ' || sum(amount_nanousd) AS wrong
        FROM entries GROUP BY posting_id HAVING sum(amount_nanousd) <> 0 ORDER BY posting_id
        """,
    ),
    Law(
        "the entries of every operation sum to zero",
        "SELECT count(*) FROM (SELECT DISTINCT tenant, operation_id FROM entries) o",
        """
        SELECT format('entries tenant=%s operation_id=%s', tenant, operation_id) AS at, 'sum to ' || sum(amount_nanousd) AS wrong
        FROM entries GROUP BY tenant, operation_id HAVING sum(amount_nanousd) <> 0 ORDER BY tenant, operation_id
        """,
    ),
    Law(
        "every entry is of its hold's tenant and operation",
        "SELECT count(*) FROM entries",
        """
        SELECT format('entries posting_id=%s account=%s', e.posting_id, e.account) AS at,
               format('is of tenant %s, operation %s, and its hold of tenant %s, operation %s',
                      e.tenant, e.operation_id, coalesce(h.tenant, '(gone)'), h.operation_id) AS wrong
        FROM entries e LEFT JOIN holds h USING (hold_id)
        WHERE (h.tenant, h.operation_id) IS DISTINCT FROM (e.tenant, e.operation_id)
        ORDER BY e.posting_id, e.account
        """,
    ),
    Law(
        "every posting has one place in its tenant's chain, and every place a posting",
        "SELECT count(*) FROM chain_links",
        """
        SELECT CASE WHEN p.posting_id IS NULL THEN format('chain_links tenant=%s commit_number=%s', l.tenant, l.commit_number)
                    ELSE 'entries posting_id=' || p.posting_id END AS at,
               CASE WHEN p.posting_id IS NULL THEN format('the entries of posting %s are gone', l.posting_id)
                    WHEN l.posting_id IS NULL THEN 'is not in the chain'
                    ELSE format('is of tenant %s and in the chain of tenant %s', p.tenant, l.tenant) END AS wrong
        FROM chain_links l FULL JOIN (SELECT DISTINCT posting_id, tenant FROM entries) p USING (posting_id)
        WHERE l.tenant IS DISTINCT FROM p.tenant
        ORDER BY posting_id
        """,
    ),
    Law(
        "commit numbers have no gaps and end where the head says",
        "SELECT count(*) FROM chain_heads",
        """
        SELECT at, wrong FROM (
            SELECT tenant, commit_number, format('chain_links tenant=%s commit_number=%s', tenant, commit_number) AS at,
                   format('follows number %s', coalesce(lag(commit_number) OVER w, 0)) AS wrong,
                   commit_number = coalesce(lag(commit_number) OVER w, 0) + 1 AS good
            FROM chain_links WINDOW w AS (PARTITION BY tenant ORDER BY commit_number)
            UNION ALL
            SELECT tenant, coalesce(h.commit_number, l.last), 'chain_heads tenant=' || tenant,
                   format('says that the last number is %s, and it is %s', coalesce(h.commit_number, 0), coalesce(l.last, 0)),
                   h.commit_number = l.last
            FROM chain_heads h FULL JOIN (SELECT tenant, max(commit_number) AS last FROM chain_links GROUP BY tenant) l USING (tenant)
        ) c
        WHERE good IS NOT TRUE
        ORDER BY tenant, commit_number
        """,
    ),
    Law(
        "every posting hashes to what the chain says, up to the head",
        "SELECT count(*) FROM chain_links",
        """
        SELECT at, wrong FROM (
            SELECT l.tenant, l.commit_number,
                   format('chain_links tenant=%s commit_number=%s posting_id=%s', l.tenant, l.commit_number, l.posting_id) AS at,
                   'the hash is not that of the link before and the entries of the posting' AS wrong,
                   l.hash = posting_hash(
                       coalesce(lag(l.hash) OVER (PARTITION BY l.tenant ORDER BY l.commit_number), decode(repeat('00', 32), 'hex')),
                       p.tenant, l.commit_number, p.posting_id, p.hold_id, p.operation_id, p.kind, p.booked_at, p.amounts) AS good
            FROM chain_links l JOIN postings_booked p USING (posting_id)
            UNION ALL
            SELECT h.tenant, h.commit_number + 1, 'chain_heads tenant=' || h.tenant,
                   'the hash is not that of the last link', h.hash = l.hash
            FROM chain_heads h JOIN chain_links l USING (tenant, commit_number)
        ) c
        WHERE NOT good
        ORDER BY tenant, commit_number
        """,
    ),
    Law(
        "every hold's entries are exactly those of its state, amount and cost",
        "SELECT count(*) FROM holds",
        """
        WITH due AS (
            SELECT h.hold_id, string_agg(m.kind || ' ' || m.amounts, ', ' ORDER BY m.place) AS moves
            FROM holds h CROSS JOIN LATERAL (
                SELECT p.place, p.kind, string_agg(a.account || '=' || a.amount, ' ' ORDER BY a.account COLLATE "C") AS amounts
                FROM (VALUES
                    (1, 'reserve', h.amount_nanousd, 0, true),
                    (2, 'settle', -h.amount_nanousd, h.cost_nanousd, h.state = 'settled'),
                    (2, 'void', -h.amount_nanousd, 0, h.state = 'voided'),
                    (2, 'expire', -h.amount_nanousd, h.amount_nanousd, h.state IN ('expired', 'reconciled')),
                    (3, 'correct', 0, h.cost_nanousd - h.amount_nanousd, h.state = 'reconciled')
                ) AS p (place, kind, held, spent, made)
                CROSS JOIN LATERAL (VALUES ('available', -p.held - p.spent), ('held', p.held), ('spent', p.spent)) AS a (account, amount)
                WHERE p.made AND a.amount <> 0
                GROUP BY p.place, p.kind
            ) m
            GROUP BY h.hold_id
        ), booked AS (
            SELECT hold_id, string_agg(kind || ' ' || amounts, ', ' ORDER BY posting_id) AS moves FROM postings_booked GROUP BY hold_id
        )
        SELECT 'holds hold_id=' || hold_id AS at,
               format('is %s at %s of %s, should have booked [%s] and has booked [%s]',
                      h.state, h.cost_nanousd, h.amount_nanousd, due.moves, booked.moves) AS wrong
        FROM holds h LEFT JOIN due USING (hold_id) LEFT JOIN booked USING (hold_id)
        WHERE due.moves IS DISTINCT FROM booked.moves
           OR h.state IN ('reserved', 'voided') AND h.cost_nanousd <> 0
           OR h.state = 'expired' AND h.cost_nanousd <> h.amount_nanousd
        ORDER BY h.created_at, hold_id
        """,
    ),
    Law(
        "every hold has the price of its model, and costs what it used at that price",
        "SELECT count(*) FROM holds WHERE provider <> ''",
        f"""
        SELECT 'holds hold_id=' || hold_id AS at,
               CASE WHEN named THEN format('is %s and cost %s, and what it used costs %s at its price', state, cost_nanousd, due)
                    ELSE format('is of %s of %s, and its price of %s of %s', model, provider, price_model, price_provider) END AS wrong
        FROM (
            SELECT h.hold_id, h.created_at, h.state, h.cost_nanousd, h.provider, h.model,
                   p.provider AS price_provider, p.model AS price_model,
                   coalesce(p.provider = h.provider AND p.model IN (h.model, {_undated("h.model")})
                            AND p.tenant IN ('', h.tenant), false) AS named,
                   ({_columns("h")}) = (0, 0, 0, 0, 0) AS unused,
                   div(CASE WHEN l.dear AND p.input_nanousd_per_mtok > 0
                            THEN div(u.prompt * p.long_input_nanousd_per_mtok + p.input_nanousd_per_mtok - 1, p.input_nanousd_per_mtok)
                            WHEN l.dear THEN u.prompt_tokens * p.long_input_nanousd_per_mtok
                            ELSE u.prompt END
                       + h.output_tokens::numeric * CASE WHEN l.dear THEN p.long_output_nanousd_per_mtok ELSE p.output_nanousd_per_mtok END
                       + 999999, 1000000) AS due
            FROM holds h LEFT JOIN prices p USING (price_id)
            CROSS JOIN LATERAL (
                SELECT h.input_tokens::numeric * p.input_nanousd_per_mtok + h.cache_read_tokens::numeric * p.cache_read_nanousd_per_mtok
                       + (h.cache_write_tokens - h.cache_write_1h_tokens)::numeric * p.cache_write_5m_nanousd_per_mtok
                       + h.cache_write_1h_tokens::numeric * p.cache_write_1h_nanousd_per_mtok AS prompt,
                       (h.input_tokens + h.cache_read_tokens + h.cache_write_tokens)::numeric AS prompt_tokens
            ) u
            CROSS JOIN LATERAL (
                SELECT p.long_context_above_tokens > 0 AND u.prompt_tokens > p.long_context_above_tokens AS dear
            ) l
            WHERE h.provider <> ''
        ) c
        WHERE NOT named
           OR CASE WHEN state IN ('settled', 'reconciled') THEN cost_nanousd <> due ELSE NOT unused END
        ORDER BY created_at, hold_id
        """,
    ),
    Law(
        "every attempt used and cost what its hold did, which is resolved, of the same model at the same price",
        "SELECT count(*) FROM attempts",
        # A provider may answer under a name of its own; one that has a price of its own is another model.
        f"""
        SELECT format('attempts tenant=%s operation_id=%s attempt=%s', a.tenant, a.operation_id, a.attempt) AS at,
               CASE WHEN a.cost_nanousd IS DISTINCT FROM h.cost_nanousd OR h.operation_id IS DISTINCT FROM a.operation_id
                    THEN format('costs %s, and hold %s of operation %s (%s) cost %s',
                                a.cost_nanousd, a.hold_id, h.operation_id, coalesce(h.state, 'gone'), h.cost_nanousd)
                    ELSE format('used %s tokens of %s of %s at price version %s, and hold %s (%s) %s of %s of %s at %s',
                                ({_columns("a")}), a.model, a.provider, a.price_version,
                                a.hold_id, h.state, ({_columns("h")}), h.model, h.provider, p.version) END AS wrong
        FROM attempts a LEFT JOIN holds h USING (hold_id) LEFT JOIN prices p USING (price_id)
        WHERE (a.tenant, a.operation_id, a.attempt, a.cost_nanousd, a.provider, a.price_version, {_columns("a")})
              IS DISTINCT FROM (h.tenant, h.operation_id, h.attempt, h.cost_nanousd, h.provider, p.version, {_columns("h")})
           OR h.state NOT IN ('settled', 'voided', 'reconciled')
           OR NOT a.not_sent AND a.estimated <> h.estimated
           OR a.model <> h.model AND {_undated("a.model")} <> {_undated("h.model")}
              AND EXISTS (SELECT FROM prices other WHERE other.provider = a.provider AND other.model IN (a.model, {_undated("a.model")}))
        ORDER BY a.tenant, a.operation_id, a.attempt
        """,
    ),
    Law(
        "every operation used and cost what its attempts did, and tells how many were sent and whether any is estimated",
        "SELECT count(*) FROM operations",
        f"""
        SELECT format('operations tenant=%s operation_id=%s', o.tenant, o.operation_id) AS at,
               CASE WHEN o.cost_nanousd <> coalesce(a.cost, 0)
                    THEN format('costs %s, and its attempts %s', o.cost_nanousd, coalesce(a.cost, 0))
                    WHEN ({_columns("o")}) IS DISTINCT FROM ({", ".join(f"coalesce(a.{name}, 0)" for name in TOKENS)})
                    THEN format('used %s tokens, and its attempts %s', ({_columns("o")}), ({_columns("a")}))
                    WHEN o.calls_sent <> coalesce(a.sent, 0)
                    THEN format('tells of %s calls, and %s of its attempts were sent', o.calls_sent, coalesce(a.sent, 0))
                    ELSE 'does not say that it is estimated, and an attempt is' END AS wrong
        FROM operations o
        LEFT JOIN (
            SELECT tenant, operation_id, sum(cost_nanousd) AS cost, {", ".join(f"sum({name}) AS {name}" for name in TOKENS)},
                   count(*) FILTER (WHERE NOT not_sent) AS sent, bool_or(estimated) AS estimated
            FROM attempts GROUP BY tenant, operation_id
        ) a USING (tenant, operation_id)
        WHERE o.cost_nanousd <> coalesce(a.cost, 0)
           OR ({_columns("o")}) IS DISTINCT FROM ({", ".join(f"coalesce(a.{name}, 0)" for name in TOKENS)})
           OR o.calls_sent <> coalesce(a.sent, 0) -- null: from before calls were counted
           OR a.estimated AND NOT o.estimated
        ORDER BY o.tenant, o.operation_id
        """,
    ),
    Law(
        "every operation is there once, in the month that its id says",
        "SELECT count(*) FROM operations",
        """
        SELECT format('operations tenant=%s operation_id=%s', o.tenant, o.operation_id) AS at,
               format('is of %s, and its id says %s', o.created_at, coalesce(k.created_at::text, '(gone)')) AS wrong
        FROM operations o LEFT JOIN operation_ids k USING (tenant, operation_id)
        WHERE k.created_at IS DISTINCT FROM o.created_at
        ORDER BY o.tenant, o.operation_id, o.created_at
        """,
    ),
    Law(
        "every counter is the replay of its account's entries, and none is negative",
        "SELECT count(*) FROM spending",
        """
        SELECT format('spending tenant=%s scope=%s subject=%s period=%s period_start=%s',
                      tenant, scope, subject, period, period_start) AS at,
               format('says %s spent and %s held, and the entries %s and %s', coalesce(s.spent_nanousd, 0), coalesce(s.held_nanousd, 0),
                      coalesce(b.spent_nanousd, 0), coalesce(b.held_nanousd, 0)) AS wrong
        FROM spending s FULL JOIN balances b USING (tenant, scope, subject, period, period_start)
        WHERE (coalesce(s.spent_nanousd, 0), coalesce(s.held_nanousd, 0)) <> (coalesce(b.spent_nanousd, 0), coalesce(b.held_nanousd, 0))
           OR least(s.spent_nanousd, s.held_nanousd) < 0
        ORDER BY tenant, scope, subject, period, period_start
        """,
    ),
    Law(
        "the sums of usage are those of the operations in them, as far back as all of those are kept",
        "SELECT (SELECT count(*) FROM usage_hours) + (SELECT count(*) FROM usage_user_days)",
        f"""
        SELECT at, wrong FROM (
            {_other_sums("usage_hours", _summed("hour"), where=_KEPT)}
            UNION ALL {_other_sums("usage_user_days", _summed("day"), (*_BY, *_OF_USER), _KEPT)}
        ) c
        ORDER BY at
        """,
    ),
    Law(
        "the sums of usage by day are those by hour, and those of all users",
        "SELECT count(*) FROM usage_days",
        f"""
        SELECT at, wrong FROM (
            {_other_sums("usage_days", _coarser("usage_hours"))} UNION ALL {_other_sums("usage_days", _coarser("usage_user_days"))}
        ) c
        ORDER BY at
        """,
    ),
)
