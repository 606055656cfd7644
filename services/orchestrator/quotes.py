"""What of a passage can be quoted so that it says something alone: a sentence, a row under the names of its columns, a block of code.

Passages are Markdown, or what ingestion makes of other formats: tables as lines with ` | ` between cells, code without a fence. Pure.
"""

import itertools
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from services.orchestrator.reading import SENTENCE_CHARACTERS_MAX, clean, split_sentences

HEADER_CHARACTERS_MAX = 350
CODE_LINES_MAX = 16
"""Of a longer block the lines around the one that answers are quoted."""
CODE_CHARACTERS_MAX = 1_200
CODE_SHARE_MIN = 0.6
"""So many lines of a paragraph must look like code for it to be taken for code where nothing marks it."""
_CELL_END = re.compile(r"(?<!\\)\|")
_RULE = re.compile(r"\|?:?-+:?(?:\|:?-+:?)+\|?|\|:?-+:?\|")
"""Below a table's header, white space gone."""
_BORDER = re.compile(r"\s*\+[-=+]{3,}\+\s*\Z")
_NUMBER = re.compile(r"[^\w]{0,3}\d[\d.,:/ -]*[^\w]{0,2}\w{0,3}\Z")
_FENCE = re.compile(r"\s*(`{3,}|~{3,})([^`]*)\Z")
_TICKS = re.compile(r"`{3,}")
_CODE = re.compile(
    r"""\w\(|[{};\\]\s*$|^\s*["']?[\w.\[\]-]+["']?\s*[:+-]?=\s*\S|^\s*[\]})]|^\s*["'][\w-]+["']\s*:"""
    r"|^\s*(?:\$|>>>|#!|//|@)\s*\S|^\s*</?[a-z][^<>]*>|^\s*(?:from \S+ )?import \S|^\s*(?:def|class|return|func|fn|var|let|const) \S"
    r"|\s--?[a-z][\w-]*(?:[ =]|$)|=>|->|::"
)
"""What a line of code has and a line of prose has not, as a rule."""
_PROSE = re.compile(r"`|^\s*(?:[-*+•]|\d{1,3}[.)])\s|[a-z]{2}\.\s*$")
"""What a line of prose that speaks of code has."""


@dataclass(frozen=True, slots=True)
class Quote:
    """A part of a passage as it is said."""

    text: str
    """As it is said, code fenced."""
    own: str
    """What it is chosen for: the sentence, the row's cells, the line of the code."""
    beside: str = ""
    """What it is said under: the names of the columns, the words that lead to the code."""
    block: int = 0
    """The table or block of code that it is of, from 1; 0 = none."""
    is_code: bool = False


def quotable(text: str) -> list[Quote]:
    """All quotes of a passage in reading order. Every line of a block of code is one, with the same block around it."""
    found: list[Quote] = []
    blocks = 0
    for kind, lines in _stretches(text):
        if kind == "prose":
            found += (Quote(sentence, sentence) for sentence in split_sentences("\n".join(lines)))
        else:
            blocks += 1
            found += _rows(lines, blocks) if kind == "table" else _code(lines, blocks, found[-1].own if found else "")
    return found


def _stretches(text: str) -> Iterator[tuple[str, list[str]]]:
    """The text as `prose`, `table` and `code`, the last with a fence as its first line."""
    lines, prose, place = text.splitlines(), list[str](), 0
    for kind, begin, end, code in _blocks(lines):
        prose += lines[place:begin]
        place = end
        if kind == "code":
            prose += ["```", "```"]  # so that it is seen to lead to code
        if prose:
            yield "prose", prose
            prose = []
        yield kind, code if kind == "code" else lines[begin:end]
    if rest := prose + lines[place:]:
        yield "prose", rest


def _blocks(lines: Sequence[str]) -> Iterator[tuple[str, int, int, list[str]]]:
    """Kind, first line and the one after the last of each table and block of code, and of code the lines to be said."""
    place = 0
    if (closed := _torn_code(lines)) is not None:
        yield "code", 0, closed + 1, ["", *lines[:closed]]
        place = closed + 1
    while place < len(lines):
        if (fence := _FENCE.match(lines[place])) is not None:
            end = next((n for n in range(place + 1, len(lines)) if lines[n].strip().startswith(fence[1])), len(lines))
            yield "code", place, min(end + 1, len(lines)), [fence[2].strip(), *lines[place + 1 : end]]
            place = end + 1
        elif (end := _table_end(lines, place)) > place:
            yield "table", place, end, []
            place = end
        elif (end := _bare_code_end(lines, place)) > place:
            yield "code", place, end, ["", *lines[place:end]]
            place = end
        else:
            place += 1


def _torn_code(lines: Sequence[str]) -> int | None:
    """The line that closes a block of code whose beginning is in the passage before, if there is one."""
    fences = [place for place, line in enumerate(lines) if _FENCE.match(line)]
    if len(fences) % 2 == 0 or lines[fences[0]].strip().strip("`~"):
        return None
    before = lines[: fences[0]]
    after = list(itertools.takewhile(str.strip, lines[fences[0] + 1 :]))
    torn = _looks_like_code(before) if any(map(str.strip, before)) else not _looks_like_code(after)
    return fences[0] if torn else None


def _table_end(lines: Sequence[str], begin: int) -> int:
    end = begin
    while end < len(lines) and (_is_row(lines[end]) or (_BORDER.match(lines[end]) and "|" in "".join(lines[end - 1 : end + 2]))):
        end += 1
    alone = end - begin == 1 and not (lines[begin].strip().startswith("|") and lines[begin].strip().endswith("|"))
    return begin if alone else end


def _is_row(line: str) -> bool:
    stripped = line.strip()
    return bool(stripped) and (" | " in line or _is_rule(line) or (stripped.startswith("|") and stripped.count("|") > 1))


def _is_rule(line: str) -> bool:
    return "-" in line and _RULE.fullmatch("".join(line.split())) is not None


def _bare_code_end(lines: Sequence[str], begin: int) -> int:
    """The end of a paragraph of code that nothing marks as such."""
    if not lines[begin].strip() or (begin and lines[begin - 1].strip()):
        return begin
    end = begin
    while end < len(lines) and lines[end].strip() and not _FENCE.match(lines[end]):
        end += 1
    return end if end - begin > 1 and _looks_like_code(lines[begin:end]) else begin


def _looks_like_code(lines: Sequence[str]) -> bool:
    written = [line for line in lines if line.strip()]
    marked = sum(bool(_CODE.search(line)) and not _PROSE.search(line) for line in written)
    return bool(written) and marked >= CODE_SHARE_MIN * len(written)


def _rows(lines: Sequence[str], block: int) -> Iterator[Quote]:
    table = [line for line in lines if not (_is_rule(line) or _BORDER.match(line))]
    framed = any(_is_rule(line) for line in lines) or all(line.strip().startswith("|") and line.strip().endswith("|") for line in table)
    rows = [_cells(line, framed=framed) for line in table]
    header = rows[0] if rows and _has_header(lines, rows[0], framed=framed) else []
    names = " ".join(filter(None, header))
    for row in rows[1:] if header else rows:
        named = [(name, cell) for name, cell in zip([*header, *([""] * len(row))], row, strict=False) if cell]
        said = ("; " if header else " | ").join(f"{name}: {cell}" if name else cell for name, cell in named)
        if len(named) < 2 or not any(map(str.isalpha, said)):
            continue
        if len(said) <= SENTENCE_CHARACTERS_MAX:
            yield Quote(said, " ".join(cell for _, cell in named), names, block)
            continue
        for _, cell in named[1:]:
            for sentence in split_sentences(cell):
                yield Quote(f"{named[0][1]}: {sentence}", f"{named[0][1]} {sentence}", names, block)


def _cells(line: str, *, framed: bool) -> list[str]:
    if framed:
        return [clean(cell.replace("\\|", "|")) for cell in _CELL_END.split(line.strip().removeprefix("|").removesuffix("|"))]
    return [clean(cell) for cell in line.rstrip().split(" | ")]


def _has_header(lines: Sequence[str], first: Sequence[str], *, framed: bool) -> bool:
    """Whether the first row names the columns. Part of a framed table that has lost its rule has lost its header, too."""
    if framed:
        return any(_is_rule(line) or (_BORDER.match(line) and "=" in line) for line in lines)
    named = [cell for cell in first if cell]
    return len(named) > 1 and not any(map(_NUMBER.match, named)) and sum(map(len, named)) <= HEADER_CHARACTERS_MAX


def _code(lines: Sequence[str], block: int, lead: str) -> Iterator[Quote]:
    """Each line with the block around it. The first of `lines` is what the fence says of the language."""
    language, body = lines[0], [line.rstrip() for line in lines[1:]]
    while body and not body[-1]:
        body.pop()
    for place, line in enumerate(body):
        if not any(map(str.isalpha, line)):
            continue
        begin = max(0, min(place - CODE_LINES_MAX // 2, len(body) - CODE_LINES_MAX))
        said = body[begin : begin + CODE_LINES_MAX]
        if sum(map(len, said)) > CODE_CHARACTERS_MAX:
            said = [line[:CODE_CHARACTERS_MAX]]
        code = textwrap.dedent("\n".join(said)).strip("\n")
        mark = "`" * max((len(run) + 1 for run in _TICKS.findall(code)), default=3)
        yield Quote(f"{mark}{language}\n{code}\n{mark}", line.strip(), lead, block, is_code=True)
