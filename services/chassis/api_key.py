"""What an API key looks like, so that one that nobody made is told without asking anybody. Which keys there are is not known here.

A key ends with a checksum of all before it. Anybody can compute it: it keeps typing errors, cut copies and thoughtless guesses from being
looked up, and lets scanners of source code tell a key from other text. Keys made before it have none.
"""

import re
import secrets
import string
import zlib

PREFIX = "trk_"
_SHAPE = re.compile(r"(trk_([0-9a-f]{16})_[A-Za-z0-9_-]{43})([0-9A-Za-z]{6})?", re.ASCII)
_DIGITS = string.digits + string.ascii_uppercase + string.ascii_lowercase


def made() -> tuple[str, str]:
    """A new key's id, which is no secret, and the whole key. Its 256 random bits need no slow hash: there is nothing to guess."""
    key_id = secrets.token_hex(8)
    return key_id, sealed(f"{PREFIX}{key_id}_{secrets.token_urlsafe(32)}")


def sealed(body: str) -> str:
    """`body` with its checksum."""
    return body + _checksum(body)


def id_in(key: str) -> str | None:
    """The id in what looks like a key that was made; None if it cannot have been."""
    match = _SHAPE.fullmatch(key)
    if match is None or match[3] not in (None, _checksum(match[1])):
        return None
    return match[2]


def _checksum(body: str) -> str:
    """CRC-32 as six digits to the base 62."""
    left, digits = zlib.crc32(body.encode()), ""
    for _ in range(6):
        left, digit = divmod(left, 62)
        digits = _DIGITS[digit] + digits
    return digits
