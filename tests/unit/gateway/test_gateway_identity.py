"""Who is accepted, and everything that is not."""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import time
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from services.chassis.errors import DomainError, NotAuthenticated, NotFound, RateLimited, Unavailable
from services.chassis.principal import Principal
from services.gateway import guesses, identity
from services.gateway.guesses import Guesses
from services.gateway.identity import AllKeys, Identity, PublishedKeys, SharedSecret, Tokens, credential_in, parse_jwks
from services.gateway.rpc import address_in
from tests.fakes.api_keys import key_named

SECRET = b"a shared secret of thirty-two bytes or more"
ED25519, P256 = ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256R1())
RSA = rsa.generate_private_key(65537, 2048)
NOW = int(time.time())
CLAIMS = {"iss": "issuer", "aud": "tailrace", "sub": "ada", "tenant": "acme", "exp": NOW + 36_000}


class Unrevoked:
    """No token was revoked."""

    async def holds(self, tenant: str, user: str, token_id: str, issued_at: float) -> bool:
        return False


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def jwk_of(key: Any, kid: str, **more: Any) -> dict[str, Any]:
    """The public half of `key`."""
    for kind, algorithm in (
        (ed25519.Ed25519PrivateKey, jwt.algorithms.OKPAlgorithm),
        (ec.EllipticCurvePrivateKey, jwt.algorithms.ECAlgorithm),
        (rsa.RSAPrivateKey, jwt.algorithms.RSAAlgorithm),
    ):
        if isinstance(key, kind):
            return {**json.loads(algorithm.to_jwk(key.public_key())), "kid": kid, **more}
    raise AssertionError(key)


def document(*keys: dict[str, Any]) -> bytes:
    return json.dumps({"keys": keys}).encode()


class Published:
    """A key set somewhere else, which counts how often it is read."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.reads = 0
        self.away = False

    async def read(self) -> bytes:
        self.reads += 1
        if self.away:
            raise OSError("away")
        return self.content


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def tokens(*, with_secret: bool = False, leeway_s: int = 30) -> Tokens:
    published = Published(document(jwk_of(ED25519, "ed"), jwk_of(P256, "ec"), jwk_of(RSA, "rsa")))
    keys = PublishedKeys(published.read)
    return Tokens(AllKeys([SharedSecret(SECRET), keys] if with_secret else [keys]), issuer="issuer", audience="tailrace", leeway_s=leeway_s)


def signed(
    key: Any = ED25519, algorithm: str = "EdDSA", kid: str | None = "ed", header: dict[str, Any] | None = None, **claims: Any
) -> str:
    """A token; a claim set to None is left out."""
    payload = {name: value for name, value in {**CLAIMS, **claims}.items() if value is not None}
    return jwt.encode(payload, key, algorithm=algorithm, headers={**({"kid": kid} if kid else {}), **(header or {})})


@pytest.mark.parametrize(("key", "algorithm", "kid"), [(ED25519, "EdDSA", "ed"), (P256, "ES256", "ec"), (RSA, "RS256", "rsa")])
async def test_a_good_token_becomes_its_principal(key: Any, algorithm: str, kid: str) -> None:
    """By the key it names, or by the only one that fits."""
    expected = Principal("acme", "ada", frozenset({"user"}))

    assert await tokens().principal(signed(key, algorithm, kid)) == expected
    assert await tokens().principal(signed(key, algorithm, None)) == expected


async def test_roles_are_those_we_know() -> None:
    """Others are left out; none at all is nobody."""
    assert (await tokens().principal(signed(roles=["admin", "emperor", "user"]))).roles == {"admin", "user"}
    assert (await tokens().principal(signed(roles=["emperor"]))).roles == frozenset()


@pytest.mark.parametrize(
    ("claims", "cause"),
    [
        ({"exp": NOW - 31}, "expired"),
        ({"exp": None}, "claim"),
        ({"sub": None}, "claim"),
        ({"iss": None}, "claim"),
        ({"aud": None}, "claim"),
        ({"tenant": None}, "claim"),
        ({"iss": "other"}, "issuer_or_audience"),
        ({"iss": ["issuer"]}, None),
        ({"aud": "other"}, "issuer_or_audience"),
        ({"nbf": NOW + 36_000}, "not_yet"),
        ({"iat": NOW + 36_000}, "not_yet"),
        ({"exp": "soon"}, "claim"),
        ({"exp": 1e400}, "invalid"),
        ({"sub": 7}, "invalid"),
        ({"sub": ""}, "claim"),
        ({"sub": "a" * 257}, "claim"),
        ({"sub": "a\0b"}, "claim"),
        ({"sub": "a\nb"}, "claim"),
        ({"tenant": ["acme"]}, "claim"),
        ({"tenant": " acme"}, "claim"),
        ({"tenant": "t" * 129}, "claim"),
        ({"roles": "admin"}, "claim"),
        ({"roles": {"admin": True}}, "claim"),
        ({"roles": [1]}, "claim"),
        ({"roles": ["user"] * 17}, "claim"),
    ],
)
async def test_a_token_with_a_wrong_claim_is_refused(claims: dict[str, Any], cause: str | None) -> None:
    """By its cause; the token's own words are not repeated."""
    payload = {name: value for name, value in {**CLAIMS, **claims}.items() if value is not None}
    header = b64(json.dumps({"alg": "EdDSA", "kid": "ed"}).encode())
    body = f"{header}.{b64(json.dumps(payload).encode())}"

    with pytest.raises(NotAuthenticated) as caught:
        await tokens().principal(f"{body}.{b64(ED25519.sign(body.encode()))}")

    assert cause is None or caught.value.metadata["cause"] == cause


async def test_expiry_has_a_little_leeway_and_no_more() -> None:
    """Clocks differ by seconds."""
    ended = signed(exp=int(time.time()) - 10)

    assert (await tokens(leeway_s=30).principal(ended)).user == "ada"
    with pytest.raises(NotAuthenticated):
        await tokens(leeway_s=5).principal(ended)


def forged(header: dict[str, Any], signature: bytes = b"") -> str:
    return f"{b64(json.dumps(header).encode())}.{b64(json.dumps(CLAIMS).encode())}.{b64(signature)}"


def confused() -> str:
    """Signed by HMAC with the public RSA key as if it were a secret."""
    pem = RSA.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    body = forged({"alg": "HS256", "kid": "rsa"}).rsplit(".", 1)[0]
    return f"{body}.{b64(hmac.digest(pem, body.encode(), hashlib.sha256))}"


STRANGER = ed25519.Ed25519PrivateKey.generate()
FORGERIES = {
    "none": forged({"alg": "none"}),
    "None": forged({"alg": "None"}),
    "no algorithm": forged({"kid": "ed"}),
    "algorithm is no string": forged({"alg": ["EdDSA"]}),
    "algorithm not on the list": forged({"alg": "PS256", "kid": "rsa"}),
    "empty signature": forged({"alg": "EdDSA", "kid": "ed"}),
    "key confusion": confused(),
    "key of another kind": signed(P256, "ES256", "ed"),
    "key of a stranger": signed(STRANGER),
    "key brought along": signed(STRANGER, header={"jwk": jwk_of(STRANGER, "ed")}),
    "key elsewhere": signed(STRANGER, header={"jku": "https://example.org/jwks.json"}),
    "certificate brought along": signed(STRANGER, header={"x5u": "https://example.org/x", "x5c": ["MIIB"]}),
    "unknown key": signed(kid="other"),
    "key id as a path": signed(kid="../../../../dev/null"),
    "critical extension": signed(header={"crit": ["exp"]}),
    "detached content": signed(header={"b64": False, "crit": ["b64"]}),
    "not an access token": signed(header={"typ": "logout+jwt"}),
    "secret without a secret": signed(SECRET, "HS256", None),
    "signature changed": signed()[:-6] + "AAAAAA",
    "two parts": "a.b",
    "five parts": "a.b.c.d.e",
    "no parts": "",
    "not base64": "!.!.!",
    "deep header": f"{b64(b'[' * 4000)}.e30.e30",
    "header is a list": f"{b64(b'[]')}.e30.e30",
    "longer than the bound": signed() + "A" * 8192,
    "not ascii": "ä.ö.ü",
}


@pytest.mark.parametrize("token", FORGERIES.values(), ids=FORGERIES.keys())
async def test_a_forgery_is_refused(token: str) -> None:
    """Whatever it claims about its own verification."""
    with pytest.raises(NotAuthenticated):
        await tokens().principal(token)


async def test_a_shared_secret_counts_only_where_one_is_set() -> None:
    """And then beside the published keys."""
    both = tokens(with_secret=True)

    assert (await both.principal(signed(SECRET, "HS256", None))).user == "ada"
    assert (await both.principal(signed())).user == "ada"
    with pytest.raises(NotAuthenticated):
        await both.principal(confused())


def test_keys_that_are_weak_foreign_or_for_something_else_are_left_out() -> None:
    """One good key among them is enough; none is an error."""
    weak = rsa.generate_private_key(65537, 1024)
    bad = [
        jwk_of(weak, "weak"),
        jwk_of(ED25519, "enc", use="enc"),
        jwk_of(ED25519, "ops", key_ops=["sign"]),
        jwk_of(ED25519, "odd", key_ops=7),
        jwk_of(RSA, "alg", alg="RS512"),
        {"kty": "oct", "k": b64(SECRET), "kid": "oct"},
        {"kty": "EC", "crv": "secp256k1", "x": "AA", "y": "AA", "kid": "curve"},
        {"kty": "OKP", "crv": "Ed25519", "x": "!", "kid": "broken"},
        {"kty": ["RSA"]},
        7,
    ]

    assert [key.kid for key in parse_jwks(json.dumps({"keys": [*bad, jwk_of(ED25519, "good")]}).encode())] == ["good"]
    for empty in (json.dumps({"keys": bad}).encode(), b"{}", b"[]", b'{"keys": {}}', b"x" * (identity.DOCUMENT_BYTES_MAX + 1)):
        with pytest.raises(ValueError, match=r"[Kk]ey|large"):
            parse_jwks(empty)
    with pytest.raises(ValueError, match="one id"):
        parse_jwks(document(jwk_of(ED25519, "same"), jwk_of(P256, "same")))


async def test_a_new_key_is_found_at_once_and_a_withdrawn_one_ends() -> None:
    """Rotation needs no restart."""
    published, clock = Published(document(jwk_of(ED25519, "old"))), Clock()
    keys = PublishedKeys(published.read, clock)
    assert await keys.find("old", "EdDSA") is not None

    published.content = document(jwk_of(P256, "new"))
    clock.now += identity.READ_PAUSE_S
    found = await keys.find("new", "ES256")

    assert found is not None
    assert await keys.find("old", "EdDSA") is None
    assert published.reads == 2


def counted(verifier: Tokens, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tokens whose signature `verifier` computes from now on."""
    computed: list[str] = []
    decode = verifier._decoder.decode

    def noting(token: str, *args: Any, **options: Any) -> Any:
        computed.append(token)
        return decode(token, *args, **options)

    monkeypatch.setattr(verifier._decoder, "decode", noting)
    return computed


async def test_a_signature_is_computed_once_but_times_are_looked_at_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is remembered of a token is no reason to take it after its end, or before its beginning by a clock that was set back."""
    now = [float(NOW)]
    published = Published(document(jwk_of(ED25519, "ed")))
    verifier = Tokens(PublishedKeys(published.read), issuer="issuer", audience="tailrace", leeway_s=30, now=lambda: now[0])
    computed = counted(verifier, monkeypatch)
    token = jwt.encode({**CLAIMS, "nbf": NOW - 5, "exp": NOW + 60}, ED25519, "EdDSA", headers={"kid": "ed"})
    first = await verifier.verify(token)
    assert await verifier.verify(token) is first

    assert computed == [token]
    for moment, cause in ((NOW + 90.0, "expired"), (NOW - 36.0, "not_yet")):
        now[0] = moment
        with pytest.raises(NotAuthenticated) as caught:
            await verifier.verify(token)
        assert caught.value.metadata["cause"] == cause
    now[0] = NOW + 89.0
    assert (await verifier.verify(token)).principal.user == "ada"


async def some_turns() -> None:
    """Enough for what goes on beside, if it waits for nothing."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_known_token_ends_with_its_key_and_is_examined_anew_by_another_of_that_name() -> None:
    """A key that was withdrawn takes along every token it signed, also those that were found good before, once the keys were read again."""
    published, clock = Published(document(jwk_of(ED25519, "name"), jwk_of(P256, "ec"))), Clock()
    verifier = Tokens(PublishedKeys(published.read, clock), issuer="issuer", audience="tailrace", leeway_s=30)
    token = jwt.encode(CLAIMS, ED25519, "EdDSA", headers={"kid": "name"})
    await verifier.verify(token)
    causes = []
    for keys in ([jwk_of(P256, "ec")], [jwk_of(ed25519.Ed25519PrivateKey.generate(), "name")]):
        published.content = document(*keys)
        clock.now += identity.REFRESH_S
        await verifier.verify(signed(P256, "ES256", "ec"))  # whoever comes first begins the reading and does not wait for it
        await some_turns()
        with pytest.raises(NotAuthenticated) as caught:
            await verifier.verify(token)
        causes.append(caught.value.metadata["cause"])

    assert causes == ["unknown_key", "invalid"]


async def test_only_good_tokens_are_remembered_and_no_more_than_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flood of bad ones must not crowd out those that are good, nor a flood of good ones the memory."""
    monkeypatch.setattr(identity, "TOKENS_KNOWN_MAX", 3)
    verifier = tokens()
    computed = counted(verifier, monkeypatch)
    good = [jwt.encode({**CLAIMS, "sub": f"user-{number}"}, ED25519, "EdDSA", headers={"kid": "ed"}) for number in range(4)]
    for token in good[:3]:
        await verifier.verify(token)
    forged = good[0][:-6] + "AAAAAA"
    for _ in range(5):
        with pytest.raises(NotAuthenticated):
            await verifier.verify(forged)
    assert computed == [*good[:3], *[forged] * 5]

    computed.clear()
    for token in (good[0], good[3], good[0], good[1]):  # the one used last stays, the one longest ago goes
        await verifier.verify(token)

    assert computed == [good[3], good[1]]


async def test_a_flood_of_unknown_keys_reads_once_in_ten_seconds() -> None:
    """Strangers do not decide how often the issuer is asked."""
    published, clock = Published(document(jwk_of(ED25519, "ed"))), Clock()
    keys = PublishedKeys(published.read, clock)
    for number in range(1000):
        clock.now += 0.01
        assert await keys.find(f"made-up-{number}", "EdDSA") is None

    assert published.reads <= 2


@pytest.mark.parametrize("known", [True, False])
async def test_a_source_that_fails_is_asked_once_in_ten_seconds(known: bool) -> None:
    """Whether there are keys to go on with or not, however many ask."""
    published, clock = Published(document(jwk_of(ED25519, "ed"))), Clock()
    keys = PublishedKeys(published.read, clock)
    if known:
        assert await keys.find("ed", "EdDSA") is not None
        clock.now += identity.REFRESH_S
    published.away, published.reads = True, 0
    for _ in range(1000):
        with contextlib.suppress(Unavailable):
            await asyncio.gather(keys.find("ed", "EdDSA"), keys.find("made-up", "EdDSA"), keys.probe())
        await some_turns()
        clock.now += 0.1

    assert 5 <= published.reads <= 10


async def test_known_keys_go_on_while_the_issuer_is_away() -> None:
    """Without any there is nothing to go on with: the dependency is named."""
    published, clock = Published(document(jwk_of(ED25519, "ed"))), Clock()
    published.away = True
    keys = PublishedKeys(published.read, clock)
    with pytest.raises(Unavailable) as caught:
        await keys.find("ed", "EdDSA")
    published.away = False
    clock.now += identity.READ_PAUSE_S
    assert await keys.find("ed", "EdDSA") is not None
    published.away = True
    clock.now += 10 * identity.REFRESH_S

    assert caught.value.metadata["dependency"] == "jwks"
    assert await keys.find("ed", "EdDSA") is not None


GOOD, BAD, GONE, OLD = key_named("good"), key_named("bad"), key_named("gone"), key_named("good of old", sealed=False)
ROBOT = Principal("acme", "robot", frozenset({"service"}), "k-1")


async def test_an_api_key_is_asked_about_once_in_a_while() -> None:
    """Good and bad answers are kept for seconds; trouble is not kept. Keys made before they had a checksum are as good."""
    asked: list[str] = []
    trouble = [Unavailable("away", dependency="ledger")]

    async def resolve(secret: str) -> Principal | None:
        asked.append(secret)
        if trouble:
            raise trouble.pop()
        if secret == GONE:
            raise NotFound("none")
        return ROBOT if secret in (GOOD, OLD) else None

    who = Identity(tokens(), resolve, Unrevoked())
    with pytest.raises(Unavailable):
        await who.principal(GOOD)
    for _ in range(3):
        for good in (GOOD, OLD):
            assert (await who.principal(good)).api_key_id == "k-1"
        for bad in (BAD, GONE):
            with pytest.raises(NotAuthenticated):
                await who.principal(bad)

    assert asked == [GOOD, GOOD, OLD, BAD, GONE]
    who.forget_api_keys()
    await who.principal(GOOD)
    assert asked[-1] == GOOD


async def test_what_nobody_made_is_not_looked_up() -> None:
    """It has another shape, or its checksum does not fit: one character changed, or the checksum of another."""

    async def resolve(secret: str) -> Principal | None:
        raise AssertionError(secret)

    who = Identity(tokens(), resolve, Unrevoked())
    changed = [GOOD[:place] + ("a" if GOOD[place] != "a" else "b") + GOOD[place + 1 :] for place in range(len(GOOD))]
    made_up = [
        *changed,
        GOOD[:-6] + BAD[-6:],
        GOOD[:-1],
        GOOD + "0",
        GOOD + "\n",
        " " + GOOD,
        "trk_",
        "trk_" + "x" * 300,
        "trk_ä",
        OLD[:-1],
    ]
    for impossible in made_up:
        with pytest.raises(NotAuthenticated) as refused:
            await who.principal(impossible)
        assert refused.value.metadata["cause"] in ("api_key", "malformed")


async def test_made_up_keys_are_looked_up_a_few_at_a_time_and_stand_in_nobodys_way() -> None:
    """Of one address and of all. Keys that were good before go on, so do other addresses; a good one is no guess."""
    now, asked = 100.0, list[str]()

    async def resolve(secret: str) -> Principal | None:
        asked.append(secret)
        await asyncio.sleep(0)
        return ROBOT if secret in (GOOD, OLD) else None

    async def refused(address: str, numbers: range) -> list[DomainError]:
        found = await asyncio.gather(*(who.principal(key_named(f"made up {n}"), address) for n in numbers), return_exceptions=True)
        return [error for error in found if isinstance(error, DomainError)]

    who = Identity(tokens(), resolve, Unrevoked(), Guesses(lambda: now))
    for _ in range(3 * guesses.EACH_MAX):
        await who.principal(OLD, "192.0.2.1")
        who.forget_api_keys()
    asked.clear()
    errors = await refused("192.0.2.1", range(500))
    assert len(asked) == guesses.EACH_MAX
    limited = [error for error in errors if isinstance(error, RateLimited)]
    assert len(limited) == 500 - guesses.EACH_MAX
    assert limited[0].retry_after_ms == 1001
    with pytest.raises(RateLimited):
        await who.principal(GOOD, "192.0.2.1")
    who.forget_api_keys()
    assert await who.principal(OLD, "192.0.2.1") == ROBOT
    assert await who.principal(GOOD, "192.0.2.2") == ROBOT
    asked.clear()
    now += 3
    await refused("192.0.2.1", range(500, 600))
    assert len(asked) == 3
    await refused("2001:db8::1", range(600, 700))
    await refused("2001:db8::2", range(700, 800))
    assert len(asked) == 3 + guesses.EACH_MAX

    asked.clear()
    for other in range(100):
        await refused(f"198.51.100.{other}", range(1000 * other, 1000 * other + 50))
    assert guesses.ALL_MAX - 2 * guesses.EACH_MAX <= len(asked) <= guesses.ALL_MAX
    who.forget_api_keys()
    assert await who.principal(GOOD, "192.0.2.1") == ROBOT


async def test_behind_a_proxy_all_addresses_are_one_and_none_is_counted() -> None:
    """Only all together are."""
    limit = Guesses(lambda: 0.0, by_source=False)
    for _ in range(guesses.ALL_MAX):
        limit.take("192.0.2.1")
    with pytest.raises(RateLimited):
        limit.take("192.0.2.2")


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:192.0.2.1:4711", "192.0.2.1"),
        ("ipv6:%5B2001:db8::1%5D:4711", "2001:db8::1"),
        ("ipv6:[::1]:4711", "::1"),
        ("unix:", ""),
    ],
)
def test_the_address_of_a_caller_over_grpc(peer: str, address: str) -> None:
    """As HTTP names it."""
    assert address_in(peer) == address


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([("authorization", "Bearer abc")], "abc"),
        ([("authorization", "bearer  abc ")], "abc"),
        ([("x-api-key", "trk_1")], "trk_1"),
        ([("authorization", "Bearer same"), ("x-api-key", "same")], "same"),
        ([("authorization", "Basic abc")], "scheme"),
        ([("authorization", "Bearer")], "scheme"),
        ([("authorization", "Bearer ")], "scheme"),
        ([("authorization", "")], "scheme"),
        ([("authorization", "Bearer a"), ("authorization", "Bearer b")], "ambiguous"),
        ([("authorization", "Bearer a"), ("x-api-key", "b")], "ambiguous"),
        ([("cookie", "token=abc")], "missing"),
        ([], "missing"),
    ],
)
def test_there_is_exactly_one_credential(headers: list[tuple[str, str]], expected: str) -> None:
    """Two different ones are refused, not chosen from."""
    try:
        assert credential_in(headers) == expected
    except NotAuthenticated as error:
        assert error.metadata["cause"] == expected
