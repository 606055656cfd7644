"""The development issuer's keys and tokens."""

import json
import stat
import time
from pathlib import Path

import jwt
import pytest

from services.local.issuer import AUDIENCE, ISSUER, Issuer


def verified(token: str, folder: Path) -> dict[str, object]:
    """The claims, checked as a verifier does that knows only the published keys."""
    keys = {key["kid"]: jwt.PyJWK(key) for key in json.loads((folder / "dev-jwks.json").read_text())["keys"]}
    kid = jwt.get_unverified_header(token)["kid"]
    claims: dict[str, object] = jwt.decode(token, keys[kid], algorithms=["EdDSA"], audience=AUDIENCE, issuer=ISSUER)
    return claims


def test_a_token_is_valid_by_the_published_key(tmp_path: Path) -> None:
    """Claims come out as they went in, and expire."""
    claims = verified(Issuer(tmp_path).mint("ada", "acme", ["user", "admin", "user"], 60), tmp_path)

    assert (claims["sub"], claims["tenant"], claims["roles"]) == ("ada", "acme", ["admin", "user"])
    assert 0 < int(str(claims["exp"])) - time.time() <= 60


def test_the_key_outlives_the_process(tmp_path: Path) -> None:
    """A token of the first run is valid in the second."""
    token = Issuer(tmp_path).mint("ada", "acme", ["user"])
    Issuer(tmp_path)

    assert verified(token, tmp_path)["sub"] == "ada"


def test_another_directory_does_not_accept_it(tmp_path: Path) -> None:
    """Two suites side by side are two issuers, also by key id."""
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    token = Issuer(first).mint("ada", "acme", ["user"])
    Issuer(second)
    with pytest.raises(KeyError):
        verified(token, second)


def test_secrets_are_readable_by_their_owner_alone_and_the_public_half_holds_none(tmp_path: Path) -> None:
    """Key and tokens are 0600; the published keys have no private part."""
    issuer = Issuer(tmp_path)
    issuer.write_tokens(tmp_path)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir() if path.name != "dev-jwks.json"}
    published = json.loads((tmp_path / "dev-jwks.json").read_text())["keys"]

    assert modes == {"dev-key.pem": 0o600, "dev-token": 0o600, "admin-token": 0o600}
    assert [key for key in published if "d" in key] == []
