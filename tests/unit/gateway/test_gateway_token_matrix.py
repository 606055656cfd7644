"""Hostile tokens by the table, several hundred of them, each with one thing wrong; and the good ones beside them."""

import base64
import hashlib
import hmac
import json
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization

from services.chassis.errors import NotAuthenticated
from services.gateway.identity import SECONDS_MAX, AllKeys, PublishedKeys, SharedSecret, Tokens
from tests.unit.gateway.test_gateway_identity import ED25519, P256, RSA, SECRET, Published, b64, document, jwk_of

NOW = 1_900_000_000.0
LEEWAY_S = 30
LIFETIME_S = 3600
GOOD = {"iss": "issuer", "aud": "tailrace", "sub": "ada", "tenant": "acme", "iat": NOW - 10, "exp": NOW + 600, "jti": "t-1"}
HEADER = {"alg": "EdDSA", "typ": "JWT", "kid": "ed"}
PUBLIC = document(jwk_of(ED25519, "ed"), jwk_of(P256, "ec"), jwk_of(RSA, "rsa"))


def tokens(now: float = NOW) -> Tokens:
    keys = AllKeys([SharedSecret(SECRET), PublishedKeys(Published(PUBLIC).read)])
    return Tokens(keys, issuer="issuer", audience="tailrace", leeway_s=LEEWAY_S, lifetime_max_s=LIFETIME_S, now=lambda: now)


def raw(header: Any, payload: Any, sign: Any = ED25519.sign) -> str:
    """A compact token of whatever is given, rightly signed."""
    parts = [part if isinstance(part, str) else json.dumps(part) for part in (header, payload)]
    signing = ".".join(b64(part.encode()) for part in parts)
    return f"{signing}.{b64(sign(signing.encode()))}"


def good(header: dict[str, Any] | None = None, **claims: Any) -> str:
    """A rightly signed token with changes; what is set to `...` is left out."""
    changed = [{**HEADER, **(header or {})}, {**GOOD, **claims}]
    return raw(*({name: value for name, value in part.items() if value is not ...} for part in changed))


def hmac_with(secret: bytes) -> Any:
    return lambda signing: hmac.new(secret, signing, hashlib.sha256).digest()


def hostile() -> dict[str, str]:
    """Name of what is wrong, and the token."""
    table: dict[str, str] = {}
    whole = good()
    head, body, signature = whole.split(".")
    for name in ("none", "None", "NONE", "nOnE", "nonE", "", "NULL", "none "):
        table[f"alg {name!r} unsigned"] = f"{b64(json.dumps({**HEADER, 'alg': name}).encode())}.{body}."
        table[f"alg {name!r} with a signature"] = raw({**HEADER, "alg": name}, GOOD)
    for name in ("HS384", "HS512", "RS384", "RS512", "PS256", "ES384", "ES512", "ES256K", "eddsa", "hs256", "dir", "A128KW", "RSA-OAEP"):
        table[f"alg {name}"] = raw({**HEADER, "alg": name}, GOOD)
    for value in (None, 1, True, ["EdDSA"], {"alg": "EdDSA"}):
        table[f"alg {value!r}"] = raw({**HEADER, "alg": value}, GOOD)
    pem = RSA.public_key().public_bytes(*_PEM)
    for secret_name, secret in (("PEM", pem), ("PEM stripped", pem.strip()), ("JWKS", PUBLIC), ("empty", b""), ("other", b"x" * 32)):
        for kid in ("rsa", "ed", "ec", "", "none"):
            table[f"HS256 with {secret_name} as {kid!r}"] = raw({"alg": "HS256", "typ": "JWT", "kid": kid}, GOOD, hmac_with(secret))
    for algorithm in ("RS256", "ES256", "HS256"):
        table[f"key of EdDSA called {algorithm}"] = raw({**HEADER, "alg": algorithm}, GOOD)
    jwk = jwk_of(ED25519, "ed")
    for name, value in {
        "jwk": jwk,
        "jku": "https://evil.example/jwks.json",
        "x5u": "https://evil.example/cert.pem",
        "x5c": ["MIIB"],
        "zip": "DEF",
        "enc": "A128GCM",
        "cty": "JWT",
        "b64": False,
        "p2c": 10**9,
        "p2s": "salt",
        "epk": jwk,
        "apu": "x",
        "apv": "x",
    }.items():
        table[f"header {name}"] = good({name: value})
        table[f"header {name} of null"] = good({name: None})
    for value in ([], ["exp"], ["b64"], ["unknown"], "exp", None, {}):
        table[f"crit {value!r}"] = good({"crit": value, "unknown": 1})
    for kid in (
        "../../../../dev/null",
        "/dev/null",
        "' OR 1=1 --",
        "ed' UNION SELECT 'x",
        "https://evil.example/key",
        "file:///etc/passwd",
        "ed\0",
        "ED",
        " ed",
        "ed ",
        "ec",
        "rsa",
        "|/bin/sh",
        "x" * 300,
        "%65d",
    ):
        table[f"kid {kid[:30]!r}"] = good({"kid": kid})
    for kid in (None, 1, True, ["ed"], {"kid": "ed"}):
        table[f"kid {kid!r}"] = good({"kid": kid})
    for typ in (
        "JWE",
        "id+jwt",
        "dpop+jwt",
        "logout+jwt",
        "application/id+jwt",
        "text/jwt",
        "application/",
        "JOSE",
        "",
        None,
        1,
        ["JWT"],
        True,
    ):
        table[f"typ {typ!r}"] = good({"typ": typ})
    for name in ("exp", "iss", "aud", "sub", "tenant"):
        table[f"{name} missing"] = good(**{name: ...})
    for name in ("iss", "sub", "tenant"):
        for value in (None, 1, True, [], ["issuer"], [GOOD[name]], {}, "", " ", f"{GOOD[name]} ", f"{GOOD[name]}\0", "x" * 300):
            table[f"{name} {str(value)[:20]!r}"] = good(**{name: value})
    for value in ("issuer/", "ISSUER", "https://issuer", "issuer.evil.example", "evilissuer"):
        table[f"iss {value!r}"] = good(iss=value)
    for value in (
        None,
        1,
        True,
        {},
        "",
        [],
        ["other"],
        ["tailrace", 1],
        ["Tailrace"],
        [["tailrace"]],
        "tailrace ",
        "TAILRACE",
        "tailrace,x",
    ):
        table[f"aud {value!r}"] = good(aud=value)
    for name in ("exp", "nbf", "iat"):
        for value in (None, True, "1", str(int(NOW + 60)), [], [NOW], {}, "", -1, SECONDS_MAX * 2, 10**400):
            table[f"{name} {str(value)[:24]!r}"] = good(**{name: value})
        for text in ("NaN", "Infinity", "-Infinity", "1e999"):
            payload = json.dumps({key: value for key, value in GOOD.items() if key != name})
            table[f"{name} {text}"] = raw(HEADER, payload[:-1] + f', "{name}": {text}}}')
    table["expired at the second"] = good(exp=NOW - LEEWAY_S)
    table["expired long ago"] = good(exp=1)
    table["exp 0"] = good(exp=0)
    table["nbf a second too far"] = good(nbf=NOW + LEEWAY_S + 1)
    table["iat a second too far"] = good(iat=NOW + LEEWAY_S + 1)
    table["exp too far from iat"] = good(iat=NOW, exp=NOW + LIFETIME_S + LEEWAY_S + 1)
    table["exp too far from now"] = good(iat=..., exp=NOW + LIFETIME_S + LEEWAY_S + 1)
    for value in (None, 1, True, ["t"], "", " ", "x" * 300, "a\nb"):
        if value != "":
            table[f"jti {str(value)[:20]!r}"] = good(jti=value)
    for value in (None, 1, "admin", {"admin": True}, [1], [None], ["x"] * 17):
        table[f"roles {str(value)[:20]!r}"] = good(roles=value)
    for name, value in GOOD.items():
        text = json.dumps(GOOD)
        table[f"claim {name} twice"] = raw(HEADER, text[:-1] + f", {json.dumps(name)}: {json.dumps(value)}}}")
        table[f"claim {name} twice, other first"] = raw(HEADER, f'{{{json.dumps(name)}: "other", ' + text[1:])
    table["claim twice, once escaped"] = raw(HEADER, json.dumps(GOOD)[:-1] + ', "\\u0073ub": "eve"}')
    table["claim twice inside"] = raw(HEADER, json.dumps(GOOD)[:-1] + ', "more": {"a": 1, "a": 2}}')
    for name, value in HEADER.items():
        text = json.dumps(HEADER)
        table[f"header {name} twice"] = raw(text[:-1] + f", {json.dumps(name)}: {json.dumps(value)}}}", GOOD)
        table[f"header {name} twice, none first"] = raw(f'{{{json.dumps(name)}: "none", ' + text[1:], GOOD)
    for payload in ("null", "1", '"x"', "[]", "[{}]", "", " ", "{", "{}", "true", "[" * 3000, '{"a":' * 1000):
        table[f"payload {payload[:10]!r}"] = raw(HEADER, payload)
    for header in ("null", "1", '"x"', "[]", "", " ", "{", "{}", "[" * 3000, '{"alg":' * 500):
        table[f"header {header[:10]!r}"] = raw(header, GOOD)
    table["no signature"] = f"{head}.{body}."
    table["no signature, no dot"] = f"{head}.{body}"
    table["null signature"] = f"{head}.{body}.{b64(bytes(64))}"
    table["signature of another"] = f"{head}.{body}.{good(sub='eve').split('.')[2]}"
    table["signature cut"] = whole[:-4]
    table["signature lengthened"] = whole + "AAAA"
    table["signature changed"] = f"{head}.{body}.{'B' if signature[0] == 'A' else 'A'}{signature[1:]}"
    table["body of another"] = f"{head}.{good(sub='eve').split('.')[1]}.{signature}"
    for mark in ("=", "==", "\n", " ", "\t", "+", "/", "é", "\0", "."):
        table[f"{mark!r} after"] = whole + mark
        table[f"{mark!r} before"] = mark + whole
        table[f"{mark!r} inside"] = f"{head}{mark}.{body}.{signature}"
    table["JSON, flattened"] = json.dumps({"protected": head, "payload": body, "signature": signature})
    table["JSON, general"] = json.dumps({"payload": body, "signatures": [{"protected": head, "signature": signature}]})
    table["JWE in five parts"] = f"{b64(json.dumps({'alg': 'dir', 'enc': 'A128GCM'}).encode())}..AAAA.AAAA.AAAA"
    table["five parts"] = f"{whole}.AAAA.AAAA"
    table["too long"] = good(padding="x" * 8000)
    table["nothing"] = ""
    table["dots"] = ".."
    table["signed by nobody"] = raw(HEADER, GOOD, lambda _: b"")
    table["ES256 of zeros"] = raw({"alg": "ES256", "typ": "JWT", "kid": "ec"}, GOOD, lambda _: bytes(64))
    table["RS256 of zeros"] = raw({"alg": "RS256", "typ": "JWT", "kid": "rsa"}, GOOD, lambda _: bytes(256))
    return table


def controls() -> dict[str, str]:
    """Tokens beside the hostile ones that are good, up to the boundary."""
    return {
        "plain": good(),
        "the last second": good(exp=NOW - LEEWAY_S + 1),
        "nbf at the boundary": good(nbf=NOW + LEEWAY_S),
        "iat at the boundary": good(iat=NOW + LEEWAY_S),
        "the longest life": good(iat=NOW, exp=NOW + LIFETIME_S + LEEWAY_S),
        "no iat, nbf, jti": good(iat=..., jti=...),
        "fractions": good(iat=NOW - 0.5, exp=NOW + 60.25),
        "audience among others": good(aud=["other", "tailrace"]),
        "no typ": good({"typ": ...}),
        "at+jwt": good({"typ": "at+jwt"}),
        "at+jwt in full": good({"typ": "application/at+jwt"}),
        "JWT in full": good({"typ": "application/JWT"}),
        "no kid": good({"kid": ...}),
        "a thumbprint": good({"x5t": "AAAA", "nonce": "n"}),
        "claims nobody knows": good(scope="read", nested={"a": {"b": [1]}}),
        "unicode": good(sub="Åsa 🌊"),
        "ES256": jwt.encode(GOOD, P256, "ES256", {"kid": "ec"}),
        "RS256": jwt.encode(GOOD, RSA, "RS256", {"kid": "rsa"}),
        "HS256": jwt.encode(GOOD, SECRET, "HS256"),
    }


_PEM = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
HOSTILE, CONTROLS = hostile(), controls()


def test_the_table_is_as_long_as_it_should_be() -> None:
    """No two entries are one token, but for what cannot differ."""
    assert len(set(HOSTILE.values())) >= 300
    assert not set(HOSTILE.values()) & set(CONTROLS.values())


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_token_is_refused(name: str) -> None:
    """As not authenticated, which is a 401, and never as a failure of ours."""
    with pytest.raises(NotAuthenticated):
        await tokens().principal(HOSTILE[name])


@pytest.mark.parametrize("name", CONTROLS)
async def test_a_good_token_is_accepted(name: str) -> None:
    """So that the table above refuses for the right reason."""
    verified = await tokens().verify(CONTROLS[name])

    assert verified.principal.tenant == "acme"
    assert verified.token_id in ("t-1", "")
    assert base64.urlsafe_b64decode(CONTROLS[name].split(".")[0] + "==").startswith(b"{")
