"""Who are you: a bearer token or an API key to a Principal. What a principal may do is decided elsewhere.

Tokens follow RFC 8725: a closed list of algorithms, each bound to the key's own type; no key, address or option of verification is ever
taken from the token itself.
"""

import asyncio
import hashlib
import json
import math
import os
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx
import jwt
import structlog
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.exceptions import PyJWTError
from jwt.utils import base64url_decode

from services.chassis import api_key
from services.chassis.ending import ended
from services.chassis.errors import DomainError, NotAuthenticated, Unavailable
from services.chassis.principal import ROLES, Principal
from services.gateway.guesses import Guesses
from services.gateway.memo import Memo

log = structlog.get_logger(__name__)

TOKEN_BYTES_MAX = 8192
API_KEY_AGE_MAX_S = 5.0
"""How long a revoked key may go on."""
API_KEYS_KNOWN_MAX = 8192
"""Keys that were good once, of which no flood of made-up ones keeps anybody from asking again."""
KEYS_MAX = 64
RSA_BITS_MIN = 2048
SECRET_BYTES_MIN = 32
REFRESH_S = 300.0
"""Keys are read anew after this, so that a withdrawn key ends."""
READ_PAUSE_S = 10.0
"""Between two readings at least: neither a source that fails nor a flood of made-up key ids has the issuer asked more often."""
FILE_PAUSE_S = 0.5
"""As `READ_PAUSE_S` of a local file, which asks nobody and may be written just after the start."""
READ_TIMEOUT_S = 5.0
"""For the whole key set, however slowly it drips: who has no known key waits meanwhile."""
DOCUMENT_BYTES_MAX = 256 * 1024


@dataclass(frozen=True, slots=True)
class VerificationKey:
    """A public key (or shared secret) with the one algorithm it may be used with."""

    kid: str
    algorithm: str
    material: Any


def parse_jwks(document: bytes) -> tuple[VerificationKey, ...]:
    """The usable keys of a set. Keys that are not for signatures, too weak or of another kind are left out; nothing usable is an error.

    Raises ValueError.
    """
    if len(document) > DOCUMENT_BYTES_MAX:
        raise ValueError("the key set is too large")
    parsed = json.loads(document)
    entries = parsed.get("keys") if isinstance(parsed, dict) else None
    if not isinstance(entries, list):
        raise ValueError("not a JSON Web Key Set")
    keys = tuple(key for entry in entries[:KEYS_MAX] if (key := _usable(entry)))
    if not keys:
        raise ValueError("no usable key in the set")
    named = [key.kid for key in keys if key.kid]
    if len(set(named)) != len(named):
        raise ValueError("two keys with one id")
    return keys


_ALGORITHM_BY_KIND = {"OKP Ed25519": "EdDSA", "EC P-256": "ES256", "RSA": "RS256"}


def _usable(entry: Any) -> VerificationKey | None:
    if not isinstance(entry, dict) or entry.get("use", "sig") != "sig":
        return None
    purposes = entry.get("key_ops", ["verify"])
    if not isinstance(purposes, list) or "verify" not in purposes:
        return None
    kind = f"{entry.get('kty')} {entry.get('crv', '')}".strip()
    algorithm = _ALGORITHM_BY_KIND.get(kind)
    if algorithm is None or entry.get("alg", algorithm) != algorithm:
        return None
    kid = entry.get("kid", "")
    if not isinstance(kid, str) or len(kid) > 256:
        return None
    public = {name: value for name, value in entry.items() if name in ("kty", "crv", "x", "y", "n", "e")}
    try:
        material = jwt.PyJWK(public, algorithm=algorithm).key
    except (PyJWTError, ValueError, TypeError):
        return None
    if isinstance(material, rsa.RSAPublicKey) and not _is_strong(material):
        return None
    return VerificationKey(kid, algorithm, material)


def _is_strong(key: rsa.RSAPublicKey) -> bool:
    """Whether an RSA key is large enough and was not made by the broken generator of CVE-2017-15361.

    Source: Nemec et al., The Return of Coppersmith's Attack (2017): such a modulus is a power of 65537 modulo every small prime.
    """
    numbers = key.public_numbers()
    if key.key_size < RSA_BITS_MIN or numbers.e < 65537:
        return False
    return not all(numbers.n % prime in {pow(65537, power, prime) for power in range(prime)} for prime in _ROCA_PRIMES)


_ROCA_PRIMES = (11, 13, 17, 19, 37, 53, 61, 71, 73, 79, 97, 103, 107, 109, 127, 151, 157)


class Keys(Protocol):
    """Where verification keys come from."""

    async def find(self, kid: str, algorithm: str) -> VerificationKey | None:
        """The key named `kid`, or the only one for `algorithm` if the token names none. Raises Unavailable."""
        ...

    async def probe(self) -> None:
        """Raises if there are no keys."""
        ...


class SharedSecret:
    """One HS256 secret of at least 32 bytes (RFC 7518, 3.2)."""

    def __init__(self, secret: bytes) -> None:
        if len(secret) < SECRET_BYTES_MIN:
            raise ValueError(f"a shared secret needs at least {SECRET_BYTES_MIN} bytes")
        self._key = VerificationKey("", "HS256", secret)

    async def find(self, kid: str, algorithm: str) -> VerificationKey | None:
        return self._key if algorithm == "HS256" else None

    async def probe(self) -> None:
        return


class PublishedKeys:
    """A key set that is published somewhere: read when needed, kept, read again when it is old or a token names a key it lacks.

    Who is there with a known key waits for no reading: that goes on beside. While the set cannot be read, the keys known so far go on.
    It is read at most once in `pause_s`, however often and by whomever it is asked for. Call `close` at the end.
    """

    def __init__(
        self,
        read: Callable[[], Awaitable[bytes]],
        clock: Callable[[], float] = time.monotonic,
        *,
        pause_s: float = READ_PAUSE_S,
        refresh_s: float = REFRESH_S,
    ) -> None:
        self._read = read
        self._clock = clock
        self._pause_s = pause_s
        self._refresh_s = refresh_s
        self._keys: tuple[VerificationKey, ...] = ()
        self._tried_at = -math.inf
        self._due_at = -math.inf
        self._readable = True
        self._reading: asyncio.Task[None] | None = None

    async def find(self, kid: str, algorithm: str) -> VerificationKey | None:
        reading = self._begin_reading() if self._clock() >= self._due_at else self._reading
        key = self._pick(kid, algorithm)
        # While they are being read, what is known is out of date: the first tokens of a new key come together.
        if key is None and (reading := reading or self._begin_reading()) is not None:
            await asyncio.wait([reading])
            key = self._pick(kid, algorithm)
        self._require_keys()
        return key

    async def probe(self) -> None:
        reading = self._begin_reading() if self._clock() >= self._due_at else self._reading
        if not self._keys and reading is not None:
            await asyncio.wait([reading])
        self._require_keys()

    async def close(self) -> None:
        """Give up a reading that is under way."""
        if self._reading is not None:
            await ended(self._reading)

    def _pick(self, kid: str, algorithm: str) -> VerificationKey | None:
        fitting = [key for key in self._keys if (key.kid == kid if kid else key.algorithm == algorithm)]
        return fitting[0] if len(fitting) == 1 else None

    def _require_keys(self) -> None:
        if not self._keys:
            raise Unavailable("the token issuer's keys cannot be read", dependency="jwks", retry_after_ms=1000)

    def _begin_reading(self) -> "asyncio.Task[None] | None":
        """Begin to read the keys, unless somebody did; return the reading under way. None if it is too soon for another."""
        if self._reading is None and self._clock() - self._tried_at >= self._pause_s:
            self._tried_at = self._clock()
            self._reading = asyncio.create_task(self._refresh(), name="read-keys")
        return self._reading

    async def _refresh(self) -> None:
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                self._keys = parse_jwks(await self._read())
            self._due_at, readable = self._clock() + self._refresh_s, True
        except Exception as error:
            self._due_at, readable = self._clock() + self._pause_s, False
            if self._readable:
                log.warning("keys_unreadable", error=type(error).__name__, known=len(self._keys))
        finally:
            self._reading = None
        if readable and not self._readable:
            log.info("keys_readable_again", known=len(self._keys))
        self._readable = readable


def keys_in_file(path: Path) -> Callable[[], Awaitable[bytes]]:
    """Reads a key set from a small local file."""

    async def read() -> bytes:
        with path.open("rb") as file:
            return file.read(DOCUMENT_BYTES_MAX + 1)

    return read


def keys_at_url(client: httpx.AsyncClient, url: str) -> Callable[[], Awaitable[bytes]]:
    """Reads a key set from where its issuer publishes it, at no other place and no further than its bound."""

    async def read() -> bytes:
        async with client.stream("GET", url, follow_redirects=False) as response:
            response.raise_for_status()
            document = bytearray()
            async for chunk in response.aiter_bytes():
                document += chunk
                if len(document) > DOCUMENT_BYTES_MAX:
                    break
            return bytes(document)

    return read


class AllKeys:
    """Several sources as one; the first that knows the key wins."""

    def __init__(self, sources: Iterable[Keys]) -> None:
        self._sources = tuple(sources)

    async def find(self, kid: str, algorithm: str) -> VerificationKey | None:
        for source in self._sources:
            if key := await source.find(kid, algorithm):
                return key
        return None

    async def probe(self) -> None:
        for source in self._sources:
            await source.probe()


_DIGEST_KEY = os.urandom(32)
"""So that what is remembered of a secret is of no use outside this process."""


def _digest_of(credential: str) -> bytes:
    """What a credential is remembered by."""
    return hashlib.blake2b(credential.encode("utf-8", "surrogatepass"), digest_size=32, key=_DIGEST_KEY).digest()


_COMPACT = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+", re.ASCII)
"""Three parts of base64url without padding (RFC 7515, 7.1). Python's decoder would skip over anything else."""


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a name came twice")
    return members


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _strict_object(text: bytes) -> dict[str, Any]:
    """A JSON object in which no name comes twice, at any depth: two readers must never see two contents. Raises ValueError."""
    parsed = json.loads(text.decode("utf-8"), object_pairs_hook=_without_doubles, parse_constant=_no_constant)
    if not isinstance(parsed, dict):
        raise ValueError("not an object")
    return parsed


class _Decoder(jwt.PyJWT):
    """PyJWT with a strict reading of the claims; the library means this method to be overridden."""

    def _decode_payload(self, decoded: dict[str, Any]) -> dict[str, Any]:
        try:
            return _strict_object(decoded["payload"])
        except (ValueError, RecursionError) as error:
            raise jwt.DecodeError("the claims cannot be read") from error


TOKENS_KNOWN_MAX = 8192
"""How many tokens are remembered that were found good, so that each is verified in full once and not with every request."""
REFUSED_HEADERS = frozenset({"crit", "b64", "zip", "enc", "cty", "jwk", "jku", "x5u", "x5c", "p2c", "p2s", "epk", "apu", "apv"})
"""What would bring its own key, address, compression or encryption. It is refused and not only left unread: no honest issuer sends it."""
KID_LENGTH_MAX = 256
GROUPS_MAX = 64


@dataclass(frozen=True, slots=True)
class Verified:
    """A token that holds, and what of it matters besides its principal. Times are Unix seconds."""

    principal: Principal
    token_id: str
    """`jti`; empty if it has none."""
    issued_at: float
    """`iat`; 0 if it does not say."""
    expires_at: float

    def lifetime_s(self, now: float) -> int:
        """Whole seconds until it ends."""
        return math.floor(self.expires_at - now)


@dataclass(frozen=True, slots=True)
class _Known:
    """A token whose signature and claims were found good: what of that can change since, and what it says."""

    algorithm: str
    kid: str
    """As the token's header has them; the key they lead to may be withdrawn."""
    key: VerificationKey
    not_before: float | None
    issued_at: float | None
    verified: Verified


class Tokens:
    """Verifies JWTs of one issuer for one audience.

    A token that was found good is remembered by a digest, and its signature is not computed again while the same key is published. Its
    times, and whether its key still holds, are looked at every time.
    """

    ALGORITHMS = frozenset({"EdDSA", "ES256", "RS256", "HS256"})

    def __init__(
        self,
        keys: Keys,
        *,
        issuer: str,
        audience: str,
        leeway_s: int,
        lifetime_max_s: int = 2_678_400,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._keys = keys
        self._issuer = issuer
        self._audience = audience
        self._leeway_s = leeway_s
        self.lifetime_max_s = lifetime_max_s
        self.now = now
        self._decoder = _Decoder()
        self._known: OrderedDict[bytes, _Known] = OrderedDict()
        """By digest, the one used last at the end. Strangers cannot crowd it: only good tokens get in."""

    async def principal(self, token: str) -> Principal:
        """The principal of a valid token. Raises as `verify`."""
        return (await self.verify(token)).principal

    async def verify(self, token: str) -> Verified:
        """What a valid token says. Raises NotAuthenticated with a cause, Unavailable without keys."""
        if len(token) > TOKEN_BYTES_MAX:
            raise NotAuthenticated(f"a token has at most {TOKEN_BYTES_MAX} bytes", cause="too_long")
        digest = _digest_of(token)
        known = self._known.get(digest)
        if known is None or known.key is not await self._keys.find(known.kid, known.algorithm):
            known = await self._examined(token)
            self._known[digest] = known
            if len(self._known) > TOKENS_KNOWN_MAX:
                self._known.popitem(last=False)
        try:
            self._require_now(known)
        except NotAuthenticated:
            self._known.pop(digest, None)
            raise
        self._known.move_to_end(digest)
        return known.verified

    async def _examined(self, token: str) -> _Known:
        """Everything about a token but whether its times are right now."""
        header = self._header(token)
        algorithm, kid = header["alg"], header.get("kid", "")
        key = await self._keys.find(kid, algorithm)
        if key is None or algorithm != key.algorithm:
            raise NotAuthenticated("the token is signed with a key that is not known here", cause="unknown_key")
        try:
            claims = self._decoder.decode(
                token,
                key.material,
                algorithms=[algorithm],
                audience=self._audience,
                issuer=self._issuer,
                # Times are checked by ourselves, by our clock, to the second and by type.
                options={"require": ["exp", "iss", "aud", "sub"], "verify_exp": False, "verify_nbf": False, "verify_iat": False},
            )
        except (jwt.InvalidIssuerError, jwt.InvalidAudienceError):
            raise NotAuthenticated("the token is from or for somebody else", cause="issuer_or_audience") from None
        except jwt.MissingRequiredClaimError as error:
            raise NotAuthenticated(f"the token lacks the claim {error.claim}", cause="claim", claim=error.claim) from None
        except (PyJWTError, ValueError, TypeError, OverflowError):
            raise NotAuthenticated("the token is not valid", cause="invalid") from None
        return self._known_by(claims, algorithm, kid, key)

    def _known_by(self, claims: Mapping[str, Any], algorithm: str, kid: str, key: VerificationKey) -> _Known:
        expires_at, not_before, issued_at = (_time_in(claims, name) for name in ("exp", "nbf", "iat"))
        if expires_at is None:
            raise NotAuthenticated("the token has expired", cause="expired")
        token_id = claims.get("jti", "")
        if token_id != "" and not _is_name(token_id, 256):
            raise NotAuthenticated("the claim jti has 1-256 printable characters", cause="claim", claim="jti")
        audience = claims.get("aud")
        if isinstance(audience, list) and not all(isinstance(one, str) for one in audience):
            raise NotAuthenticated("the token is from or for somebody else", cause="issuer_or_audience")
        verified = Verified(_principal_of(claims), token_id, issued_at or 0.0, expires_at)
        return _Known(algorithm, kid, key, not_before, issued_at, verified)

    def _require_now(self, known: _Known) -> None:
        """Raise NotAuthenticated unless the token holds at this moment."""
        now, leeway_s, expires_at = self.now(), self._leeway_s, known.verified.expires_at
        if expires_at + leeway_s <= now:
            raise NotAuthenticated("the token has expired", cause="expired")
        if any(start is not None and start > now + leeway_s for start in (known.not_before, known.issued_at)):
            raise NotAuthenticated("the token is not valid yet", cause="not_yet")
        if expires_at - (now if known.issued_at is None else known.issued_at) > self.lifetime_max_s + leeway_s:
            raise NotAuthenticated(f"a token may last {self.lifetime_max_s} s", cause="claim", claim="exp")

    def _header(self, token: str) -> dict[str, Any]:
        """The token's header, if it asks for nothing that is not offered."""
        if _COMPACT.fullmatch(token) is None:
            raise NotAuthenticated("the token is malformed", cause="malformed")
        try:
            header = _strict_object(base64url_decode(token.partition(".")[0]))
        except (ValueError, RecursionError):
            raise NotAuthenticated("the token is malformed", cause="malformed") from None
        algorithm, kind, kid = header.get("alg"), header.get("typ", "JWT"), header.get("kid", "")
        if not isinstance(algorithm, str) or algorithm not in self.ALGORITHMS:
            raise NotAuthenticated("the token's algorithm is not accepted", cause="algorithm")
        if not REFUSED_HEADERS.isdisjoint(header) or not isinstance(kid, str) or len(kid) > KID_LENGTH_MAX:
            raise NotAuthenticated("the token's header is not accepted", cause="header")
        # In full it is a media type, which may leave out `application/` (RFC 7515, 4.1.9; RFC 9068, 4).
        if not isinstance(kind, str) or kind.lower().removeprefix("application/") not in ("jwt", "at+jwt"):
            raise NotAuthenticated("this is not an access token", cause="type")
        return header


def _principal_of(claims: Mapping[str, Any]) -> Principal:
    user, tenant, roles = claims.get("sub"), claims.get("tenant"), claims.get("roles", ["user"])
    if not _is_name(user, 256):
        raise NotAuthenticated("the claim sub needs 1-256 printable characters", cause="claim", claim="sub")
    if not _is_name(tenant, 128):
        raise NotAuthenticated("the claim tenant needs 1-128 printable characters", cause="claim", claim="tenant")
    if not isinstance(roles, list) or len(roles) > 16 or not all(isinstance(role, str) for role in roles):
        raise NotAuthenticated("the claim roles is a list of at most 16 names", cause="claim", claim="roles")
    groups = claims.get("groups", [])
    if not isinstance(groups, list) or len(groups) > GROUPS_MAX or not all(_is_name(group, 128) for group in groups):
        raise NotAuthenticated(
            f"the claim groups is a list of at most {GROUPS_MAX} names of 1-128 printable characters", cause="claim", claim="groups"
        )
    assert isinstance(user, str)
    assert isinstance(tenant, str)
    return Principal(tenant, user, ROLES.intersection(roles), groups=frozenset(groups))


def _time_in(claims: Mapping[str, Any], name: str) -> float | None:
    value = claims.get(name)
    if name not in claims:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= SECONDS_MAX:
        raise NotAuthenticated(f"the claim {name} is a time in seconds", cause="claim", claim=name)
    return float(value)


SECONDS_MAX = 2**53
"""Whole seconds up to here are exact in a float."""


def _is_name(value: object, length_max: int) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= length_max and value.isprintable() and value.strip() == value


class Revoked(Protocol):
    """Which tokens ended before their time."""

    async def holds(self, tenant: str, user: str, token_id: str, issued_at: float) -> bool:
        """Whether a token was revoked. Raises Unavailable."""
        ...


Resolve = Callable[[str], Awaitable[Principal | None]]


class Identity:
    """Turns credentials into principals."""

    def __init__(self, tokens: Tokens, resolve_api_key: Resolve, revocations: Revoked, guesses: Guesses | None = None) -> None:
        self._tokens = tokens
        self._revocations = revocations
        self.now = tokens.now
        self.lifetime_max_s = tokens.lifetime_max_s
        self._resolve = resolve_api_key
        self._known: Memo[bytes, Principal | None] = Memo(4096, API_KEY_AGE_MAX_S)
        self._once_good: OrderedDict[bytes, None] = OrderedDict()
        """API keys by their digests, the one used last at the end."""
        self._guesses = guesses or Guesses()

    async def principal(self, credential: str, address: str = "") -> Principal:
        """Whose credential this is that came from `address`. Raises NotAuthenticated, RateLimited, Unavailable."""
        if not credential.startswith(api_key.PREFIX):
            return (await self.verified(credential)).principal
        principal = None
        if api_key.id_in(credential) is not None:
            digest = _digest_of(credential)
            principal = await self._known.get(digest, lambda: self._ask(credential, digest, address))
        if principal is None:
            raise NotAuthenticated("the API key is not valid", cause="api_key")
        return principal

    async def verified(self, token: str) -> Verified:
        """What a token says that is valid and was not revoked. Raises NotAuthenticated, Unavailable."""
        verified = await self._tokens.verify(token)
        principal = verified.principal
        if await self._revocations.holds(principal.tenant, principal.user, verified.token_id, verified.issued_at):
            raise NotAuthenticated("the token was revoked", cause="revoked")
        return verified

    def forget_api_keys(self) -> None:
        """Ask the ledger about every API key again."""
        self._known.clear()

    async def _ask(self, secret: str, digest: bytes, address: str) -> Principal | None:
        give_back = None if digest in self._once_good else self._guesses.take(address)
        try:
            principal = await self._resolve(secret)
        except DomainError as error:
            if error.code in ("NOT_FOUND", "UNAUTHENTICATED", "INVALID_ARGUMENT"):
                return None
            if give_back is not None:
                give_back()  # nobody said that it is not good
            raise
        if principal is not None:
            self._once_good[digest] = None
            self._once_good.move_to_end(digest)
            if len(self._once_good) > API_KEYS_KNOWN_MAX:
                self._once_good.popitem(last=False)
            if give_back is not None:
                give_back()
        return principal


def has_credential(headers: Iterable[tuple[str, str]]) -> bool:
    """Whether a header is there that names a credential, good or bad."""
    return any(name in ("authorization", "x-api-key") for name, _ in headers)


def credential_in(headers: Iterable[tuple[str, str]]) -> str:
    """The one credential among `headers` (names in lower case): `authorization: Bearer …` or `x-api-key: …`. Raises NotAuthenticated."""
    found: set[str] = set()
    for name, value in headers:
        if name == "authorization":
            scheme, _, credential = value.partition(" ")
            if scheme.lower() != "bearer" or not credential.strip():
                raise NotAuthenticated("the authorization header is not `Bearer <token>`", cause="scheme")
            found.add(credential.strip())
        elif name == "x-api-key" and value.strip():
            found.add(value.strip())
    if not found:
        raise NotAuthenticated("send `authorization: Bearer <token>`", cause="missing")
    if len(found) > 1:
        raise NotAuthenticated("the request carries more than one credential", cause="ambiguous")
    return found.pop()
