"""Signed tokens nobody here wrote (Wycheproof): every bad one is refused, every good one of an accepted algorithm is taken."""

import base64
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jwt
import pytest

from services.chassis.errors import NotAuthenticated, Unavailable
from services.gateway.identity import Keys, PublishedKeys, SharedSecret, Tokens

MISLABELLED = frozenset({370, 372})
"""370 is called invalid and has nothing wrong in it; 372 is called valid and has a `?` in its header. Their verdicts are swapped."""
CLAIMS = {"sub": "ada", "tenant": "acme", "exp": int(time.time()) + 3600}


class SignatureOnly:
    """Checks the signature and leaves the content, which in these vectors is no set of claims."""

    def decode(self, token: str, key: Any, *, algorithms: list[str], **_: Any) -> dict[str, Any]:
        jwt.PyJWS().decode(token, key, algorithms=algorithms)
        return CLAIMS


def keys_of(group: dict[str, Any]) -> Keys:
    """The group's keys, as an issuer would publish them, or as the secret they are."""
    material = group.get("public") or group["private"]
    entries = material.get("keys", [material])
    if len(entries) == 1 and (entries[0]["kty"], entries[0].get("alg"), entries[0].get("use")) == ("oct", "HS256", "sig"):
        return SharedSecret(base64.urlsafe_b64decode(entries[0]["k"] + "=="))
    document = json.dumps({"keys": entries}).encode()

    async def read() -> bytes:
        return document

    return PublishedKeys(read)


def algorithm_of(token: str) -> str:
    try:
        return str(jwt.get_unverified_header(token).get("alg"))
    except jwt.PyJWTError:
        return "malformed"


def symmetric_in_a_set(group: dict[str, Any]) -> bool:
    """Whether the good key is a secret among published ones, which we never take."""
    return any(entry["kty"] == "oct" for entry in (group.get("public") or group["private"]).get("keys", []))


async def verdict_on(group: dict[str, Any], token: str) -> bool:
    try:
        tokens = Tokens(keys_of(group), issuer="", audience="", leeway_s=0)
        tokens._decoder = SignatureOnly()  # type: ignore[assignment]
        await tokens.principal(token)
    except (NotAuthenticated, Unavailable, ValueError):
        return False
    return True


@pytest.mark.parametrize("name", ["json_web_signature_test", "json_web_key_test", "json_web_crypto_test"])
async def test_good_signatures_are_taken_and_bad_ones_are_not(data_dir: Path, name: str) -> None:
    """A good one may be refused only because its algorithm is not on our list, or its key is not fit for it."""
    groups = json.loads((data_dir / "jose" / f"{name}.json").read_text())["testGroups"]
    counts: Counter[str] = Counter()
    unjustified = []
    for group in groups:
        for case in group["tests"]:
            token = case.get("jws")
            if not isinstance(token, str):
                continue
            accepted = await verdict_on(group, token)
            good = (case["result"] == "valid") != (group["comment"] == "base64" and case["tcId"] in MISLABELLED)
            if not good:
                assert not accepted, (group["comment"], case["tcId"], case["comment"])
                counts["refused"] += 1
            elif accepted:
                counts["accepted"] += 1
            elif algorithm_of(token) in Tokens.ALGORITHMS and not symmetric_in_a_set(group):
                unjustified.append((group["comment"], case["tcId"], case["comment"], algorithm_of(token)))

    assert unjustified == []
    assert counts["accepted"] + counts["refused"] > 0


async def test_encrypted_tokens_are_all_refused(data_dir: Path) -> None:
    """Nobody asked for them, in whatever file of the suite they are."""
    refused: Counter[str] = Counter()
    for path in sorted((data_dir / "jose").glob("*.json")):
        for group in json.loads(path.read_text())["testGroups"]:
            for case in group["tests"]:
                if (token := case.get("jwe")) is not None:
                    text = token if isinstance(token, str) else json.dumps(token)
                    assert not await verdict_on(group, text), (path.stem, case["tcId"])
                    refused[path.stem] += 1

    assert refused.keys() == {"json_web_crypto_test", "json_web_encryption_test"}


def test_every_vector_of_the_suite_is_a_token_that_is_tried(data_dir: Path) -> None:
    """Signed or encrypted: none is passed over because it has another form. What is not compact would come as its text."""
    for path in (data_dir / "jose").glob("*.json"):
        suite = json.loads(path.read_text())
        cases = [case for group in suite["testGroups"] for case in group["tests"]]

        assert len(cases) == suite["numberOfTests"]
        assert all(isinstance(case.get("jws"), str) or "jwe" in case for case in cases), path.stem
