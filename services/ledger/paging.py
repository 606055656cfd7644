"""Pages of long lists and the opaque tokens that lead from one to the next. Pure."""

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Generic, TypeVar
from uuid import UUID

import msgspec

from services.chassis.errors import RequestInvalid

T = TypeVar("T")
Key = tuple[str, ...]
TOKEN_CHARACTERS_MAX = 1024


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """Some rows of a list, and the key of the last one if there are more."""

    rows: Sequence[T]
    last: tuple[datetime | str, ...] | None


def token_of(last: tuple[datetime | str, ...] | None) -> str:
    """The token that goes on after `last`; empty if there is nothing to go on to."""
    if last is None:
        return ""
    parts = [part.isoformat() if isinstance(part, datetime) else part for part in last]
    return base64.urlsafe_b64encode(msgspec.json.encode(parts)).decode().rstrip("=")


def key_of(token: str, parts: int) -> Key | None:
    """The key in a token, None for an empty one. Raises RequestInvalid unless we made it."""
    if not token:
        return None
    try:
        if len(token) > TOKEN_CHARACTERS_MAX:
            raise ValueError("too long")
        key = msgspec.json.decode(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)), type=tuple[str, ...])
        if len(key) != parts:
            raise ValueError("another list's")
    except (ValueError, binascii.Error, msgspec.DecodeError) as error:
        raise RequestInvalid("the page token is not one of ours", field="page_token") from error
    return key


def moment_and_id(token: str) -> tuple[datetime, str] | None:
    """The key of a list that is sorted by time and id."""
    if (key := key_of(token, 2)) is None:
        return None
    try:
        moment = datetime.fromisoformat(key[0])
    except ValueError as error:
        raise RequestInvalid("the page token is not one of ours", field="page_token") from error
    if moment.tzinfo is None:
        raise RequestInvalid("the page token is not one of ours", field="page_token")
    return moment, key[1]


def moment_and_uuid(token: str) -> tuple[datetime, UUID] | None:
    """The same with a UUID."""
    if (key := moment_and_id(token)) is None:
        return None
    try:
        return key[0], UUID(key[1])
    except ValueError as error:
        raise RequestInvalid("the page token is not one of ours", field="page_token") from error
