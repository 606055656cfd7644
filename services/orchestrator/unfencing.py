"""Takes a Markdown block of code from around JSON that is still being written. Pure; what the JSON is worth is judged elsewhere."""

import re

_OPENING = re.compile(r"\s*```[A-Za-z0-9_-]{0,16}[ \t]*\r?\n")
_MAYBE_OPENING = re.compile(r"\s{0,64}(?:`{0,3}|```[A-Za-z0-9_-]{0,16}[ \t]{0,16}\r?)\Z")
"""What may still become an opening. Bounded: nothing else is kept from the reader."""
_PLAIN = re.compile(r'[^"\s`]+')
_IN_STRING = re.compile(r'[^"\\]+')
_CLOSING = re.compile(r"`{0,3}[ \t\r\n]*")


class Unfencing:
    """Reads a text in pieces and gives back what is to be shown of each, however it is cut.

    Kept back are the fence and the space around the JSON in it, and nothing of a text that has no fence. What follows a fence that was
    closed is given back as it is, for the check of the grammar to refuse.
    """

    def __init__(self) -> None:
        self._held = ""
        self._state = "before"
        """`before` anything that tells, `plain` without a fence, `inside` one, in a `string` there, or `after` it."""
        self._escaped = False
        self._closing = ""
        """What came of the fence's end."""

    def feed(self, piece: str) -> str:
        """What is to be shown now, perhaps nothing."""
        if self._state == "plain":
            return piece
        if self._state != "before":
            return self._inside(piece)
        self._held += piece
        if opening := _OPENING.match(self._held):
            rest, self._held, self._state = self._held[opening.end() :], "", "inside"
            return self._inside(rest)
        if _MAYBE_OPENING.match(self._held):
            return ""
        shown, self._held, self._state = self._held, "", "plain"
        return shown

    def _inside(self, piece: str) -> str:
        """The JSON of a fence. A grave accent outside of a string ends it; space is held until something follows."""
        shown: list[str] = []
        place = 0
        while place < len(piece) and self._state != "after":
            if self._state == "string":
                place = self._in_string(piece, place, shown)
            elif piece[place] == "`":
                self._held, self._state = "", "after"
            elif piece[place].isspace():
                self._held += piece[place]
                place += 1
            else:
                found = _PLAIN.match(piece, place)
                text = found[0] if found else piece[place]
                self._state = "inside" if found else "string"
                shown.append(self._held + text)
                self._held = ""
                place += len(text)
        if self._state == "after":
            shown.append(self._after(piece[place:]))
        return "".join(shown)

    def _in_string(self, piece: str, place: int, shown: list[str]) -> int:
        if self._escaped:
            self._escaped = False
            shown.append(piece[place])
            return place + 1
        if found := _IN_STRING.match(piece, place):
            shown.append(found[0])
            return found.end()
        if piece[place] == "\\":
            self._escaped = True
        else:
            self._state = "inside"
        shown.append(piece[place])
        return place + 1

    def _after(self, piece: str) -> str:
        """What follows the JSON: nothing of it is shown while it is the rest of a fence."""
        whole = self._closing + piece
        if _CLOSING.fullmatch(whole):
            self._closing = whole[:3] + " " * bool(whole[3:])  # all that matters of it, however much space follows
            return ""
        self._closing = "```"
        return whole.lstrip("`").lstrip() or whole
