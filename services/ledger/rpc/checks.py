"""What a request must satisfy before anything is done with it. Every refusal names the field and its bound."""

import math
import re
from collections.abc import Collection
from datetime import UTC, datetime
from uuid import UUID

from google.protobuf.timestamp_pb2 import Timestamp

from services.chassis.errors import NotFound, RequestInvalid
from services.chassis.money import Usage
from services.chassis.principal import ROLES, SCOPES
from services.chassis.wire import usage_value
from tailrace.common.v1 import common_pb2

TOKENS_MAX = 1_000_000_000
"""More tokens than this in one call is a mistake, whoever counted them."""
MONEY_MAX = 10**18
MILLISECONDS_MAX = 1e9


def text(value: str, field: str, characters_max: int, *, empty: bool = True) -> str:
    """An id or name. Texts of questions and answers go through `prose`."""
    if len(value) > characters_max or (not value and not empty):
        raise RequestInvalid(
            f"{field} must have {0 if empty else 1} to {characters_max} characters", field=field, bound=str(characters_max)
        )
    if "\x00" in value:
        raise RequestInvalid(f"{field} must not contain NUL", field=field)
    return value


def prose(value: str, field: str, characters_max: int) -> str:
    """A text of people or models, kept whatever is in it; PostgreSQL cannot hold NUL."""
    if len(value) > characters_max:
        raise RequestInvalid(f"{field} may have {characters_max} characters", field=field, bound=str(characters_max))
    return value.replace("\x00", "\ufffd")


def between(value: int, field: str, low: int, high: int) -> int:
    if not low <= value <= high:
        raise RequestInvalid(f"{field} must be {low} to {high}", field=field, bound=f"{low}-{high}")
    return value


def size(value: int, default: int, high: int, field: str = "page_size") -> int:
    """A page size; 0 = the default."""
    return between(value or default, field, 1, high)


def one_of(value: str, field: str, allowed: Collection[str]) -> str:
    if value not in allowed:
        raise RequestInvalid(f"{field} must be one of: {', '.join(name or 'empty' for name in allowed)}", field=field)
    return value


def matching(value: str, field: str, pattern: re.Pattern[str], bound: str) -> str:
    if not pattern.fullmatch(value):
        raise RequestInvalid(f"{field} must be {bound}", field=field, bound=bound)
    return value


def uuid(value: str, field: str) -> UUID:
    """An id that the caller chose."""
    if len(value) != 36:
        raise RequestInvalid(f"{field} must be a UUID", field=field, bound="UUID")
    try:
        return UUID(value)
    except ValueError:
        raise RequestInvalid(f"{field} must be a UUID", field=field, bound="UUID") from None


def known_uuid(value: str, kind: str) -> UUID:
    """An id that we gave out. One that we never could have is as unknown as any other."""
    try:
        return UUID(value) if len(value) == 36 else UUID("")
    except ValueError:
        raise NotFound(f"no such {kind}", kind=kind) from None


def milliseconds(value: float, field: str) -> float:
    if not (math.isfinite(value) and 0 <= value <= MILLISECONDS_MAX):
        raise RequestInvalid(f"{field} must be a time in milliseconds", field=field, bound=f"0-{MILLISECONDS_MAX:.0f}")
    return value


def moment(message: Timestamp, field: str) -> datetime:
    try:
        return message.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise RequestInvalid(f"{field} is not a time", field=field) from None


def usage(message: common_pb2.Usage, field: str) -> Usage:
    for name in ("input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens", "cache_write_1h_tokens"):
        between(getattr(message, name), f"{field}.{name}", 0, TOKENS_MAX)
    try:
        return usage_value(message)
    except ValueError:
        bound = "0 to cache_write_tokens"
        raise RequestInvalid(
            f"{field}.cache_write_1h_tokens must be {bound}", field=f"{field}.cache_write_1h_tokens", bound=bound
        ) from None


def roles(values: Collection[str], field: str) -> tuple[str, ...]:
    between(len(values), field, 0, 16)
    return tuple(sorted({one_of(value, field, sorted(ROLES)) for value in values}))


def scopes(values: Collection[str], field: str) -> tuple[str, ...]:
    between(len(values), field, 0, 16)
    return tuple(sorted({one_of(value, field, sorted(SCOPES)) for value in values}))
