"""The development issuer: a signing key of this state directory, its public half as a JWKS, and tokens. Not for production."""

import base64
import json
import os
import secrets
import time
from collections.abc import Iterable
from pathlib import Path

import jwt
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

ISSUER = "tailrace-dev"
AUDIENCE = "tailrace"
TENANT = "local"
LIFETIME_S = 30 * 24 * 3600


class Issuer:
    """Signs tokens with the key in `state_dir`, which is made on first use together with `dev-jwks.json`."""

    def __init__(self, state_dir: Path) -> None:
        key_path, jwks_path = state_dir / "dev-key.pem", state_dir / "dev-jwks.json"
        if not key_path.exists():
            pem = Ed25519PrivateKey.generate().private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            write_secret(key_path, pem.decode())
        key = serialization.load_pem_private_key(key_path.read_bytes(), password=None)
        if not isinstance(key, Ed25519PrivateKey):
            raise ValueError(f"{key_path} is not an Ed25519 key")
        self._key = key
        public = key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        jwk = {"crv": "Ed25519", "kty": "OKP", "x": _base64url(public)}
        self._kid = _thumbprint(jwk)
        keys = {"keys": [{**jwk, "kid": self._kid, "alg": "EdDSA", "use": "sig"}]}
        draft = jwks_path.with_suffix(".new")  # the gateway may be reading
        draft.write_text(json.dumps(keys, indent=1))
        draft.rename(jwks_path)

    def mint(self, user: str, tenant: str, roles: Iterable[str], lifetime_s: int = LIFETIME_S, groups: Iterable[str] = ()) -> str:
        """A signed token."""
        now = int(time.time())
        claims = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": user,
            "tenant": tenant,
            "roles": sorted(set(roles)),
            "groups": sorted(set(groups)),
            "iat": now,
            "exp": now + lifetime_s,
            "jti": secrets.token_urlsafe(12),
        }
        return jwt.encode(claims, self._key, algorithm="EdDSA", headers={"kid": self._kid})

    def write_tokens(self, state_dir: Path) -> None:
        """Write `dev-token` and `admin-token`, fresh, readable by their owner alone."""
        write_secret(state_dir / "dev-token", self.mint("dev", TENANT, ["user"]))
        write_secret(state_dir / "admin-token", self.mint("admin", TENANT, ["user", "admin"]))


def write_secret(path: Path, text: str) -> None:
    """Replace `path` with a file that only its owner can read."""
    draft = path.with_name(path.name + ".new")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    draft.rename(path)


def _base64url(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _thumbprint(jwk: dict[str, str]) -> str:
    """RFC 7638: the key's own digest is its id, so a new key never has an old one's."""
    digest = hashes.Hash(hashes.SHA256())
    digest.update(json.dumps(jwk, sort_keys=True, separators=(",", ":")).encode())
    return _base64url(digest.finalize())
