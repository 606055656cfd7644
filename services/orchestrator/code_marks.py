"""Where a Markdown text that comes in pieces stands in code. Pure.

Of CommonMark 0.31 what can be told without reading on: a fenced block, and a span that ends on the line where it began.
"""

import re

_PART = re.compile(r"`+|~+|\n|[^`~\n]+")
_BEFORE_FENCE = " \t>-*+0123456789.)"
"""What may stand on the line before a fence: the marks of lists and quotations."""
FENCE_MIN = 3


class CodeMarks:
    """Follows the marks that open and close code. However a text is cut, it says the same."""

    def __init__(self) -> None:
        self._fence = ""
        """The mark that opened the block."""
        self._span = 0
        """Length of the mark that opened the span; 0 = outside."""
        self._run = ""
        """Marks that may go on with the next piece."""
        self._begins = True
        """Whether nothing but the marks of lists has come on this line."""
        self._opening = False
        """Whether this is the line that opened the block."""

    def read(self, piece: str) -> None:
        for part in _PART.findall(piece):
            if part[0] in "`~":
                if self._run and self._run[0] != part[0]:
                    self._settle()
                self._run += part
                continue
            self._settle()
            if part == "\n":
                self._span, self._begins, self._opening = 0, True, False
            elif part.strip(_BEFORE_FENCE):
                self._begins = False

    @property
    def inside(self) -> bool:
        """Whether what follows, being no such mark itself, is code."""
        self._settle()
        return bool(self._fence or self._span)

    def _settle(self) -> None:
        """Take in a run of marks that has ended."""
        run, self._run = self._run, ""
        if not run:
            return
        if self._fence:
            if self._begins and run.startswith(self._fence):
                self._fence = ""
            elif self._opening and run[0] == self._fence[0] == "`":  # no block: its first line has none of its own marks
                self._span, self._fence = (0 if run == self._fence else len(self._fence)), ""
        elif self._span:
            if run == "`" * self._span:
                self._span = 0
        elif self._begins and len(run) >= FENCE_MIN:
            self._fence, self._opening = run, True
        elif run[0] == "`":
            self._span = len(run)
        self._begins = False
