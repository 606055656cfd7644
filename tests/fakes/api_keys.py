"""API keys of the shape that ours have, by names that tests give them. No ledger made them."""

import base64
import hashlib

from services.chassis import api_key


def key_named(name: str, *, sealed: bool = True) -> str:
    """The key of `name`; not `sealed` = as keys were made before they had a checksum."""
    digest = hashlib.sha256(name.encode()).digest()
    body = f"{api_key.PREFIX}{digest[:8].hex()}_{base64.urlsafe_b64encode(digest).decode().rstrip('=')}"
    return api_key.sealed(body) if sealed else body
