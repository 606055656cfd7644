"""API keys in PostgreSQL. A secret is seen once, when it is made; what is kept of it cannot be turned back."""

import hashlib
import hmac
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from services.chassis import api_key
from services.chassis.clock import Clock
from services.chassis.errors import NotAuthenticated, NotFound, Overloaded
from services.chassis.principal import Principal
from services.ledger.domain import ApiKey
from services.ledger.paging import Page
from services.ledger.postgres_database import Connection, Database

KEYS_OF_TENANT_MAX = 10_000
_COLUMNS = "key_id, tenant, user_id, name, roles, scopes, created_at, expires_at, revoked_at IS NOT NULL AS revoked"


class PostgresKeys:
    """Makes, shows, ends and recognises keys."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database, self._clock = database, clock

    async def create(
        self, tenant: str, user: str, name: str, roles: Sequence[str], scopes: Sequence[str], expires_at: datetime | None
    ) -> tuple[ApiKey, str]:
        key_id, secret = api_key.made()

        async def work(connection: Connection) -> Any:
            async with connection.transaction():
                if await connection.fetchval("SELECT count(*) FROM api_keys WHERE tenant = $1", tenant) >= KEYS_OF_TENANT_MAX:
                    raise Overloaded(f"a tenant may have {KEYS_OF_TENANT_MAX} keys")
                await connection.execute("SELECT ensure_user($1, $2)", tenant, user)
                return await connection.fetchrow(
                    "INSERT INTO api_keys (key_id, tenant, user_id, name, roles, scopes, secret_sha256, created_at, expires_at)"
                    f" VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) ON CONFLICT (key_id) DO UPDATE SET name = $4 RETURNING {_COLUMNS}",
                    *(key_id, tenant, user, name, list(roles), list(scopes), _digest(secret), self._clock.now(), expires_at),
                )

        return _key_of(await self._database.of(tenant).run(work)), secret

    async def page(self, tenant: str, *, size: int, after: tuple[datetime, str] | None) -> Page[ApiKey]:
        beyond = "" if after is None else " AND (created_at, key_id) > ($3, $4)"
        rows = await self._database.of(tenant).fetch(
            f"SELECT {_COLUMNS} FROM api_keys WHERE tenant = $1{beyond} ORDER BY created_at, key_id LIMIT $2",
            tenant,
            size + 1,
            *(after or ()),
        )
        last = rows[size - 1] if len(rows) > size else None
        return Page([_key_of(row) for row in rows[:size]], (last["created_at"], last["key_id"]) if last else None)

    async def revoke(self, tenant: str, key_id: str) -> None:
        revoked = await self._database.of(tenant).value(
            "UPDATE api_keys SET revoked_at = coalesce(revoked_at, now()) WHERE tenant = $1 AND key_id = $2 RETURNING true", tenant, key_id
        )
        if not revoked:
            raise NotFound("no such key", kind="api_key")

    async def resolve(self, secret: str) -> Principal:
        key_id = api_key.id_in(secret)
        row = key_id and await self._database.self_scoped().row(f"SELECT {_COLUMNS}, secret_sha256 FROM find_key($1)", key_id)
        kept = row["secret_sha256"] if row else bytes(32)
        if not hmac.compare_digest(_digest(secret), kept) or not row:
            raise NotAuthenticated("the API key is not known", cause="unknown")
        key = _key_of(row)
        if key.revoked:
            raise NotAuthenticated("the API key was revoked", cause="revoked")
        if key.expires_at is not None and key.expires_at <= self._clock.now():
            raise NotAuthenticated("the API key has expired", cause="expired")
        return Principal(key.tenant, key.user, frozenset(key.roles), key.key_id, frozenset(key.scopes))


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def _key_of(row: Any) -> ApiKey:
    return ApiKey(
        row["key_id"],
        row["tenant"],
        row["user_id"],
        row["name"],
        tuple(row["roles"]),
        tuple(row["scopes"]),
        row["created_at"],
        row["expires_at"],
        row["revoked"],
    )
