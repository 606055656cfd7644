"""Tokens that end before their time: at every gateway, for every way of signing in, whatever becomes of Redis."""

import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
import redis.asyncio as redis

from services.chassis.errors import NotFound, Overloaded, Unavailable
from services.gateway import revocations
from services.gateway.revocations import Revocations
from services.local.stores import Valkey
from tests.integration.gateway.conftest import Front, problem_of

NOW = 1_900_000_000.0
LIFETIME_S = 3600


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Valkey]:
    """A Valkey that may be taken away."""
    valkey = Valkey(tmp_path / "valkey")
    await valkey.start()
    yield valkey
    await valkey.stop()


class Gateways:
    """Several gateways' lists over one store."""

    def __init__(self, store: Valkey) -> None:
        self._store = store
        self.now = NOW
        self.stale = 0
        self.clients: list[Any] = []

    def one(self) -> Revocations:
        client = redis.Redis.from_url(self._store.url, socket_timeout=1, socket_connect_timeout=1)
        self.clients.append(client)
        return Revocations(client, lifetime_max_s=LIFETIME_S, on_stale=self._stale, now=lambda: self.now)

    def _stale(self) -> None:
        self.stale += 1


@pytest.fixture
async def gateways(store: Valkey) -> AsyncIterator[Gateways]:
    made = Gateways(store)
    yield made
    for client in made.clients:
        await client.aclose()


async def test_a_revoked_token_ends_here_at_once_and_elsewhere_with_the_next_pull(gateways: Gateways) -> None:
    """Nobody else's token is touched: the tenant is part of the name."""
    here, elsewhere = gateways.one(), gateways.one()
    assert not await elsewhere.holds("acme", "ada", "t-1", NOW)
    await here.revoke_token("acme", "t-1", NOW + 60)

    assert await here.holds("acme", "ada", "t-1", NOW)
    assert not await elsewhere.holds("acme", "ada", "t-1", NOW)
    await elsewhere.pull()
    assert await elsewhere.holds("acme", "ada", "t-1", NOW)
    for tenant, token_id in (("globex", "t-1"), ("acme", "t-2"), ("acme", ""), ('acme","t-1', ""), ("acm", "et-1")):
        assert not await elsewhere.holds(tenant, "ada", token_id, NOW)


async def test_signing_a_user_out_everywhere_ends_what_was_issued_until_then(gateways: Gateways) -> None:
    """To the second; a token that does not say when it was issued counts as older."""
    here = gateways.one()
    until = await here.revoke_user("acme", "ada")

    assert until == NOW
    assert [await here.holds("acme", "ada", "t", at) for at in (0.0, NOW - 1, NOW, NOW + 1)] == [True, True, True, False]
    assert not await here.holds("acme", "bob", "t", NOW - 1)
    assert not await here.holds("globex", "ada", "t", NOW - 1)


async def test_a_later_sign_out_is_not_undone_by_an_earlier_one(gateways: Gateways) -> None:
    """A gateway whose clock is behind changes nothing."""
    here = gateways.one()
    await here.revoke_user("acme", "ada")
    gateways.now = NOW - 100
    await here.revoke_user("acme", "ada")

    assert await here.holds("acme", "ada", "t", NOW - 50)


async def test_a_revocation_can_be_taken_back(gateways: Gateways) -> None:
    """By its own tenant; what is not there is not found."""
    here, elsewhere = gateways.one(), gateways.one()
    await here.revoke_token("acme", "t-1", NOW + 60)
    await here.revoke_user("acme", "ada")
    for kind, tenant, subject in (("tokens", "globex", "t-1"), ("users", "globex", "ada"), ("users", "acme", "t-1")):
        with pytest.raises(NotFound):
            await here.restore(kind, tenant, subject)
    await here.restore("tokens", "acme", "t-1")
    await here.restore("users", "acme", "ada")

    for gateway in (here, elsewhere):
        await gateway.pull()
        assert not await gateway.holds("acme", "ada", "t-1", NOW)


async def test_while_redis_is_away_the_last_list_holds(gateways: Gateways, store: Valkey) -> None:
    """Counted; a change is refused and not promised; a gateway that never read the list takes nobody."""
    here, new = gateways.one(), gateways.one()
    await here.revoke_token("acme", "t-1", NOW + 60)
    await store.stop()
    await here.pull()

    assert await here.holds("acme", "ada", "t-1", NOW)
    assert not await here.holds("acme", "ada", "t-2", NOW)
    assert gateways.stale == 1
    with pytest.raises(Unavailable):
        await here.revoke_token("acme", "t-2", NOW + 60)
    with pytest.raises(Unavailable):
        await new.holds("acme", "ada", "t-2", NOW)


@pytest.mark.parametrize("since", [0, 1, 3, 5])
async def test_what_redis_forgot_is_told_to_it_by_who_had_read_it(gateways: Gateways, since: int) -> None:
    """A store that lost its data knows everything again, whatever was revoked meanwhile, also for a gateway that starts then."""
    here, other = gateways.one(), gateways.one()
    for number in range(3):
        await here.revoke_token("acme", f"t-{number}", NOW + 60)
    await here.revoke_user("acme", "bob")
    await gateways.clients[0].flushall()
    for number in range(since):
        await other.revoke_token("acme", f"new-{number}", NOW + 60)
    await here.pull()
    for gateway in (here, other, gateways.one()):
        await gateway.pull()
        names = [*(f"t-{number}" for number in range(3)), *(f"new-{number}" for number in range(since))]
        assert [name for name in names if not await gateway.holds("acme", "ada", name, NOW)] == []
        assert await gateway.holds("acme", "bob", "t", NOW)


async def test_the_list_is_bounded_and_ended_entries_leave(gateways: Gateways, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full list says so; an entry that is there can be renewed; time makes room."""
    monkeypatch.setattr(revocations, "REVOCATIONS_MAX", 3)
    here = gateways.one()
    for number in range(3):
        await here.revoke_token("acme", f"t-{number}", NOW + 60)
    with pytest.raises(Overloaded):
        await here.revoke_token("acme", "t-3", NOW + 60)
    await here.revoke_token("acme", "t-0", NOW + 120)
    gateways.now = NOW + 61
    await here.revoke_token("acme", "t-3", NOW + 160)
    await here.revoke_token("acme", "t-4", NOW + 160)

    assert [await here.holds("acme", "ada", f"t-{number}", NOW) for number in range(5)] == [True, False, False, True, True]


async def test_a_tenant_that_fills_its_share_leaves_the_others_theirs(gateways: Gateways, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, and not by what a name begins with; what is there can still be renewed, and time makes room."""
    monkeypatch.setattr(revocations, "TENANT_MAX", 2)
    here = gateways.one()
    for tenant in ("acme", "acme2", 'acme","x', "acm"):
        for number in range(2):
            await here.revoke_token(tenant, f"t-{number}", NOW + 60)
            await here.revoke_user(tenant, f"u-{number}")
        with pytest.raises(Overloaded) as of_tokens:
            await here.revoke_token(tenant, "t-2", NOW + 60)
        with pytest.raises(Overloaded):
            await here.revoke_user(tenant, "u-2")
        await here.revoke_token(tenant, "t-1", NOW + 90)
        assert of_tokens.value.metadata["bound"] == "2"

    gateways.now += 61
    await here.revoke_token("acme", "t-2", gateways.now + 60)


async def test_the_hot_path_asks_redis_nothing(gateways: Gateways) -> None:
    """10,000 looks, not one command more than the looking itself."""
    here, watcher = gateways.one(), gateways.one()
    await here.pull()
    await watcher.pull()

    async def commands() -> int:
        return int((await gateways.clients[1].info("stats"))["total_commands_processed"])

    before = await commands()
    began = time.perf_counter()
    for _ in range(10_000):
        assert not await here.holds("acme", "ada", "t-1", NOW)
    spent_us = (time.perf_counter() - began) * 100
    assert await commands() - before == 1
    print(f"one look takes {spent_us:.2f} us")


# --- over HTTP ---


def id_of(token: str) -> str:
    return str(jwt.decode(token, options={"verify_signature": False})["jti"])


async def test_an_admin_ends_a_token_for_header_and_cookie_and_takes_it_back(front: Front, admin: httpx.AsyncClient) -> None:
    """Only that one, and only in the admin's own tenant."""
    user = f"user-{secrets.token_hex(4)}"
    token, other = front.token(user), front.token(user)
    async with httpx.AsyncClient(base_url=front.url, trust_env=False) as client:

        async def statuses() -> list[int]:
            ways = ({"authorization": f"Bearer {token}"}, {"cookie": f"tailrace={token}"}, {"authorization": f"Bearer {other}"})
            return [(await client.get("/v1/session", headers=way)).status_code for way in ways]

        async with front.client("eve", "globex", ("admin",)) as foreign:
            assert (await foreign.post("/v1/admin/revocations", json={"jti": id_of(token)})).status_code == 201
        assert await statuses() == [200, 200, 200]
        made = await admin.post("/v1/admin/revocations", json={"jti": id_of(token)})
        assert await statuses() == [401, 401, 200]
        back = await admin.delete(f"/v1/admin/revocations/tokens/{id_of(token)}")
        assert await statuses() == [200, 200, 200]
        everywhere = await admin.post("/v1/admin/revocations", json={"user": user})
        assert await statuses() == [401, 401, 401]
        problem_of(await client.post("/v1/session", json={"token": other}), 401, "NOT_AUTHENTICATED")

    assert (made.status_code, made.json()["jti"], back.status_code) == (201, id_of(token), 204)
    assert (everywhere.status_code, everywhere.json()["user"]) == (201, user)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "jti"),
        ({"jti": "t", "user": "u"}, "jti"),
        ({"user": "u", "expires_at": "2030-01-01"}, "expires_at"),
        ({"jti": "t", "expires_at": "2020-01-01"}, "expires_at"),
        ({"jti": "t", "expires_at": "2999-01-01"}, "expires_at"),
        ({"jti": "t", "expires_at": "soon"}, "expires_at"),
        ({"jti": "t" * 257}, "jti"),
        ({"user": "u" * 257}, "user"),
    ],
)
async def test_a_revocation_that_makes_no_sense_is_refused(admin: httpx.AsyncClient, body: dict[str, str], field: str) -> None:
    """By the field."""
    assert problem_of(await admin.post("/v1/admin/revocations", json=body), 400, "REQUEST_INVALID")["field"] == field


async def test_taking_back_what_is_not_there_is_not_found(admin: httpx.AsyncClient) -> None:
    """And an unknown kind is refused."""
    problem_of(await admin.delete("/v1/admin/revocations/tokens/none"), 404, "NOT_FOUND")
    problem_of(await admin.delete("/v1/admin/revocations/keys/none"), 400, "REQUEST_INVALID")
