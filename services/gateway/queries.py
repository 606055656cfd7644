"""Fields of query strings as values, each with its bound. Pure."""

import re
from datetime import UTC, date, datetime

from services.chassis.errors import RequestInvalid

PAGE_SIZE_MAX = 1000
TOKEN_LENGTH_MAX = 1024


def page(query: dict[str, str]) -> tuple[int, str]:
    """`page_size` (0 = the service's default) and `page_token`."""
    token = query.get("page_token", "")
    if len(token) > TOKEN_LENGTH_MAX or "\0" in token:
        raise RequestInvalid("not a page token", field="page_token", bound=f"at most {TOKEN_LENGTH_MAX} characters")
    return number(query, "page_size", 1, PAGE_SIZE_MAX), token


def number(query: dict[str, str], field: str, least: int, most: int) -> int:
    """A count between `least` and `most`; 0 if it is missing."""
    value = query.get(field, "")
    if not value:
        return 0
    if not re.fullmatch(r"[0-9]{1,9}", value) or not least <= int(value) <= most:
        raise RequestInvalid(f"{field} is out of bounds", field=field, bound=f"{least}-{most}")
    return int(value)


def moment(query: dict[str, str], field: str) -> datetime | None:
    """A date (its first instant in UTC) or an RFC 3339 time; None if it is missing."""
    value = query.get(field, "")
    return at(value, field) if value else None


def at(value: str, field: str) -> datetime:
    """As `moment`, of a value from anywhere."""
    bound = "YYYY-MM-DD or RFC 3339 with an offset"
    try:
        if re.fullmatch(r"\d{4}-\d{2}-\d{2}", value, re.ASCII):
            day = date.fromisoformat(value)
            return datetime(day.year, day.month, day.day, tzinfo=UTC)
        # In a query an unescaped + is a blank.
        parsed = datetime.fromisoformat(value.replace(" ", "+") if re.search(r"T.* \d\d:?\d\d$", value) else value)
        if parsed.tzinfo is None:
            raise ValueError("no offset")
        return parsed.astimezone(UTC)
    except (ValueError, OverflowError):
        raise RequestInvalid(f"{field} is not a time", field=field, bound=bound) from None
