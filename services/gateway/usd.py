"""Money as people write it: decimal US dollars in a string, to and from whole nano-USD. No float on the way."""

import re

NANO = 1_000_000_000
_DECIMAL = re.compile(r"(\d{1,9})(?:\.(\d{1,9}))?", re.ASCII)


def parse(text: str) -> int:
    """nano-USD of a decimal such as `1.50`. Raises ValueError for anything else than up to nine digits before and after the point."""
    match = _DECIMAL.fullmatch(text)
    if match is None:
        raise ValueError("not a decimal amount")
    whole, fraction = match.group(1), match.group(2) or ""
    return int(whole) * NANO + int(fraction.ljust(9, "0"))


def render(nanousd: int) -> str:
    """Exact decimal of `nanousd` with at least two places."""
    sign, amount = ("-", -nanousd) if nanousd < 0 else ("", nanousd)
    fraction = f"{amount % NANO:09d}".rstrip("0").ljust(2, "0")
    return f"{sign}{amount // NANO}.{fraction}"
