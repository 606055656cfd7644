"""The tool `calculator`: arithmetic in decimals, exact where decimals can be. No expression is ever run as code."""

import decimal
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

from services.orchestrator.domain import Question, ToolSpec
from services.orchestrator.tools.toolbox import Output, ToolFailed

EXPRESSION_CHARACTERS_MAX = 500
DEPTH_MAX = 40
DIGITS = 40
"""Digits a result is worked out with; what needs more is rounded, and says so."""
EXPONENT_MAX = 1_000
"""Results lie between 1e-1000 and 1e+1000: a power tower must not fill the memory."""
_TOKEN = re.compile(r"\s*(?:(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,4})?)|(?P<name>[a-z]+)|(?P<mark>\*\*|//|[-+*/%^(),]))")
_PI = Decimal("3.1415926535897932384626433832795028841971693993751")
_E = Decimal("2.7182818284590452353602874713526624977572470936999")


def _whole(value: Decimal, rounding: str) -> Decimal:
    return value.to_integral_value(rounding=rounding)


def _divided(value: Decimal, by: Decimal) -> tuple[Decimal, Decimal]:
    """Quotient rounded down, and the remainder, which has the sign of its divisor then."""
    quotient, remainder = divmod(value, by)
    return (quotient - 1, remainder + by) if remainder and (remainder < 0) != (by < 0) else (quotient, remainder)


def _round(value: Decimal, places: Decimal = Decimal(0)) -> Decimal:
    if places != places.to_integral_value() or not -DIGITS <= places <= DIGITS:
        raise ToolFailed(f"round takes a whole number of places, at most {DIGITS}")
    with decimal.localcontext():  # what is rounded on purpose is exact all the same
        return value.quantize(Decimal(1).scaleb(-int(places)), rounding=decimal.ROUND_HALF_UP)


_FUNCTIONS: dict[str, tuple[int, int, Callable[..., Decimal]]] = {
    "abs": (1, 1, abs),
    "ceil": (1, 1, lambda value: _whole(value, decimal.ROUND_CEILING)),
    "exp": (1, 1, lambda value: value.exp()),
    "floor": (1, 1, lambda value: _whole(value, decimal.ROUND_FLOOR)),
    "ln": (1, 1, lambda value: value.ln()),
    "log": (1, 1, lambda value: value.log10()),
    "max": (1, 50, max),
    "min": (1, 50, min),
    "round": (1, 2, _round),
    "sqrt": (1, 1, lambda value: value.sqrt()),
    "sum": (1, 50, lambda *values: sum(values, Decimal(0))),
}
"""Least and most arguments, and what it does."""
_CONSTANTS = {"pi": _PI, "e": _E}


def evaluate(expression: str) -> tuple[Decimal, bool]:
    """The value of an expression, and whether it is exact. Raises ToolFailed, which says where it went wrong."""
    if len(expression) > EXPRESSION_CHARACTERS_MAX:
        raise ToolFailed(f"the expression has more than {EXPRESSION_CHARACTERS_MAX} characters")
    context = decimal.Context(
        prec=DIGITS,
        Emin=-EXPONENT_MAX,
        Emax=EXPONENT_MAX,
        traps=[decimal.InvalidOperation, decimal.DivisionByZero, decimal.Overflow],
    )
    with decimal.localcontext(context) as running:
        try:
            value = _Reader(expression).whole()
        except decimal.DivisionByZero:
            raise ToolFailed("division by zero") from None
        except decimal.Overflow:
            raise ToolFailed(f"the result is larger than 1e{EXPONENT_MAX}") from None
        except decimal.InvalidOperation:
            raise ToolFailed("this has no value among the real numbers, or too many digits") from None
        return value, not running.flags[decimal.Inexact]


class _Reader:
    """Reads by descent: sum, product, sign, power, atom. `^` and `**` bind to the right and before a sign, as in mathematics."""

    def __init__(self, expression: str) -> None:
        self._tokens = _split(expression)
        self._at = 0
        self._depth = 0

    def whole(self) -> Decimal:
        value = self._sum()
        if self._at < len(self._tokens):
            raise ToolFailed(f"did not expect {self._tokens[self._at]!r}")
        return +value

    def _peek(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _take(self, *wanted: str) -> str:
        if self._peek() not in wanted or not self._peek():
            return ""
        self._at += 1
        return self._tokens[self._at - 1]

    def _sum(self) -> Decimal:
        self._depth += 1
        if self._depth > DEPTH_MAX:
            raise ToolFailed(f"nested deeper than {DEPTH_MAX} levels")
        value = self._product()
        while mark := self._take("+", "-"):
            value = value + self._product() if mark == "+" else value - self._product()
        self._depth -= 1
        return value

    def _product(self) -> Decimal:
        value = self._signed()
        while mark := self._take("*", "/", "//", "%"):
            other = self._signed()
            if mark == "*":
                value = value * other
            elif mark == "/":
                value = value / other
            else:
                value = _divided(value, other)[mark == "%"]
        return value

    def _signed(self) -> Decimal:
        negative = False
        while mark := self._take("+", "-"):
            negative ^= mark == "-"
        value = self._power()
        return -value if negative else value

    def _power(self) -> Decimal:
        base = self._atom()
        if not self._take("^", "**"):
            return base
        self._depth += 1
        if self._depth > DEPTH_MAX:
            raise ToolFailed(f"nested deeper than {DEPTH_MAX} levels")
        exponent = self._signed()
        self._depth -= 1
        if abs(exponent) > 10 * EXPONENT_MAX:
            raise ToolFailed(f"an exponent is larger than {10 * EXPONENT_MAX}")
        return Decimal(base**exponent)

    def _atom(self) -> Decimal:
        token = self._peek()
        if not token:
            raise ToolFailed("the expression ends too early")
        self._at += 1
        if token == "(":  # noqa: S105 - a bracket
            value = self._sum()
            self._close()
            return value
        if token[0].isdigit() or token[0] == ".":
            return +Decimal(token)
        if token in _CONSTANTS:
            return +_CONSTANTS[token]
        if token not in _FUNCTIONS:
            names = ", ".join((*_FUNCTIONS, *_CONSTANTS))
            raise ToolFailed(f"did not expect {token!r}; there are: {names}" if token.isalpha() else f"did not expect {token!r}")
        least, most, function = _FUNCTIONS[token]
        if not self._take("("):
            raise ToolFailed(f"{token} needs its arguments in brackets")
        arguments = [self._sum()]
        while self._take(","):
            arguments.append(self._sum())
        self._close()
        if not least <= len(arguments) <= most:
            raise ToolFailed(f"{token} takes {least} to {most} arguments")
        value = function(*arguments)
        if not value.is_finite():
            raise ToolFailed(f"{token} has no value there")
        return value

    def _close(self) -> None:
        if not self._take(")"):
            raise ToolFailed("a bracket is not closed")


def _split(expression: str) -> list[str]:
    tokens, at = [], 0
    text = expression.strip().lower()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise ToolFailed(f"did not expect {text[at]!r} at character {at + 1}")
        tokens.append(match[match.lastgroup or 0])
        at = match.end()
    return tokens


def written(value: Decimal) -> str:
    """A value as people write it: no exponent unless it is very long, no zeros at the end."""
    if value == 0:
        return "0"
    plain = value.normalize(decimal.Context(prec=DIGITS))
    return format(plain, "f") if -DIGITS <= plain.adjusted() <= DIGITS else str(plain)


class Calculator:
    """The tool."""

    spec = ToolSpec(
        "calculator",
        "Works out an arithmetic expression exactly, in decimals. Operators + - * / // % ^ and brackets; functions "
        f"{', '.join(_FUNCTIONS)} (log is to base 10); constants pi and e. Use it for every calculation instead of doing it yourself.",
        {
            "type": "object",
            "properties": {
                "expression": {
                    "type": "string",
                    "minLength": 1,
                    "maxLength": EXPRESSION_CHARACTERS_MAX,
                    "description": "For example (19.99 * 3) * 1.19. No thousands separators, units or percent signs.",
                }
            },
            "required": ["expression"],
            "additionalProperties": False,
        },
    )
    output_schema: Mapping[str, Any] | None = None

    async def call(self, arguments: Mapping[str, Any], asked: Question) -> Output:
        value, exact = evaluate(arguments["expression"])
        return Output(f"{written(value)}{'' if exact else f' (rounded to {DIGITS} digits)'}")
