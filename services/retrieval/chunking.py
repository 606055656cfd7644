"""Extracted text to chunks: cut where the document itself has a joint, within a size in tokens. Pure but for the token counter it is given.

Every chunk is a stretch of the extracted text, `text[start:end]`, and every block lies in chunks as a whole or in pieces: nothing is lost
and nothing is said twice. Chunks overlap in what they are found by, never in what is shown.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from services.retrieval.domain import BlockKind, Chunk, Extracted

CUT = "2"
"""Changed whenever the same text is cut otherwise: a document that comes again is then cut anew, whether or not its content changed."""
WINDOW_TOKENS = 254
"""What the default embedder reads of a text, its own two signs set aside; the rest would not be found by meaning."""
TOKENS_MAX = 232
"""Larger chunks are found no better and bring more along that was not asked for; smaller ones cut answers off."""
TOKENS_MIN = 128
"""A chunk may be this large however long its title and headings are."""
LEAD_TOKENS_MAX = 60
"""Of what comes before a chunk, so much helps to find it; more would hide what it says itself."""
TOKENS_SMALL = 60
"""A section this small says too little alone; it goes together with its neighbours."""
LEAD_CHARACTERS_MAX = 600
"""Where a lead is looked for: 60 tokens are hardly ever more."""
HEADING_TOKENS_MAX = 30
CONTEXT_CHARACTERS_MAX = 200

CountTokens = Callable[[Sequence[str]], list[int]]

# What lies between two parts is the group that matched; it is white space only, so that no character is lost.
_SENTENCE_END = re.compile(r"[.!?。！？][\"'”’)\]]*(\s+)|(\n\s*\n)|[。！？]()")
_LINE_END = re.compile(r"(\n+)")
_WORD_END = re.compile(r"(\s+)")


@dataclass(frozen=True, slots=True)
class _Piece:
    start: int
    end: int
    tokens: int
    heading_path: tuple[str, ...]
    tokens_max: int
    """How large a chunk under these headings may be."""
    heading: bool = False


def context_of(title: str, heading_path: tuple[str, ...]) -> str:
    """What is put in front of a chunk for embedding and word search, so that it is found by its place in the document, too."""
    names = [name for place, name in enumerate((title, *heading_path)) if name and (place == 0 or name != title)]
    return " > ".join(names)[:CONTEXT_CHARACTERS_MAX]


def in_context(title: str, chunk: Chunk) -> str:
    """The chunk as it is found: its place in the document, what leads up to it, and itself."""
    context = context_of(title, chunk.heading_path)
    text = f"{chunk.lead} {chunk.text}" if chunk.lead else chunk.text
    return f"{context}\n{text}" if context else text


def chunked(extracted: Extracted, count_tokens: CountTokens, title: str = "") -> list[Chunk]:
    """Cut `extracted` into chunks in reading order. `title` is what `in_context` will put in front of them."""
    text = extracted.text
    pieces = _packed(text, _pieces(extracted, count_tokens, title))
    leads = _leads(text, pieces, count_tokens, title)
    return [
        Chunk(
            ordinal,
            text[piece.start : piece.end],
            piece.start,
            piece.end,
            piece.heading_path,
            page=bisect_right(extracted.page_starts, piece.start),
            lead=lead,
        )
        for ordinal, (piece, lead) in enumerate(zip(pieces, leads, strict=True))
    ]


def _pieces(extracted: Extracted, count_tokens: CountTokens, title: str) -> Iterator[_Piece]:
    """Blocks, and what blocks that are too large fall into."""
    sizes = count_tokens([extracted.text[block.start : block.end] for block in extracted.blocks])
    paths = list(dict.fromkeys(block.heading_path for block in extracted.blocks))
    contexts = dict(zip(paths, count_tokens([context_of(title, path) for path in paths]), strict=True))
    for block, tokens in zip(extracted.blocks, sizes, strict=True):
        # Under headings a chunk may begin with one, which comes on top.
        room = WINDOW_TOKENS - contexts[block.heading_path] - (HEADING_TOKENS_MAX if block.heading_path else 0)
        most = max(TOKENS_MIN, min(TOKENS_MAX, room))
        piece = _Piece(block.start, block.end, tokens, block.heading_path, most, block.kind is BlockKind.HEADING)
        if tokens <= most:
            yield piece
        else:
            yield from _cut(extracted.text, piece, block.kind, count_tokens)


def _cut(text: str, whole: _Piece, kind: BlockKind, count_tokens: CountTokens) -> Iterator[_Piece]:
    """A block in pieces: by lines where lines mean something, else by sentences; what is still too large by words, then by characters."""
    by_line = kind in (BlockKind.CODE, BlockKind.TABLE, BlockKind.LIST)
    joints = (_LINE_END, _WORD_END) if by_line else (_SENTENCE_END, _LINE_END, _WORD_END)
    yield from _joined(_split(text, replace(whole, heading=False), joints, count_tokens))


def _split(text: str, piece: _Piece, joints: tuple[re.Pattern[str], ...], count_tokens: CountTokens) -> Iterator[_Piece]:
    spans = list(_spans(text, piece.start, piece.end, joints[0])) if joints else list(_by_characters(piece))
    sizes = count_tokens([text[begin:end] for begin, end in spans])
    for (begin, end), tokens in zip(spans, sizes, strict=True):
        part = replace(piece, start=begin, end=end, tokens=tokens)
        if tokens <= piece.tokens_max:
            yield part
        else:
            # One token is at least one character here, so where no joints are left, a quarter of the characters is the next try.
            yield from _split(text, part, joints[1:], count_tokens)


def _spans(text: str, start: int, end: int, joint: re.Pattern[str]) -> Iterator[tuple[int, int]]:
    """What lies between joints, in order."""
    begin = start
    for match in joint.finditer(text, start, end):
        assert match.lastindex is not None
        gap = match.start(match.lastindex)
        if gap > begin:
            yield begin, gap
        begin = match.end()
    if begin < end:
        yield begin, end


def _by_characters(piece: _Piece) -> Iterator[tuple[int, int]]:
    step = max(1, min(piece.tokens_max, (piece.end - piece.start + 1) // 2))
    for begin in range(piece.start, piece.end, step):
        yield begin, min(begin + step, piece.end)


def _joined(parts: Iterator[_Piece]) -> Iterator[_Piece]:
    """Neighbours put together again as long as they fit. Token counts of parts add up to at least that of the whole."""
    gathered: list[_Piece] = []
    tokens = 0
    for part in parts:
        if gathered and tokens + part.tokens > gathered[0].tokens_max:
            yield _whole(gathered, tokens)
            gathered, tokens = [], 0
        gathered.append(part)
        tokens += part.tokens
    if gathered:
        yield _whole(gathered, tokens)


def _whole(parts: list[_Piece], tokens: int) -> _Piece:
    return parts[0] if len(parts) == 1 else replace(parts[0], end=parts[-1].end, tokens=tokens)


def _packed(text: str, pieces: Iterator[_Piece]) -> list[_Piece]:
    """Pieces of one section together as long as they fit, then small sections with their neighbours."""

    sections: list[_Piece] = []
    for piece in pieces:
        last = sections[-1] if sections else None
        # A heading is never left alone for the sake of a few tokens.
        most = piece.tokens_max + HEADING_TOKENS_MAX if last and last.heading else piece.tokens_max
        if (
            last is not None
            and piece.heading_path == last.heading_path
            and not piece.heading
            and last.tokens + piece.tokens <= most
            and _adjoin(text, last, piece)
        ):
            sections[-1] = _together(last, piece, piece.heading_path)
        else:
            sections.append(piece)
    packed: list[_Piece] = []
    for piece in sections:
        last = packed[-1] if packed else None
        if last is not None and _belong_together(last, piece) and _adjoin(text, last, piece):
            below = piece.heading_path[: len(last.heading_path)] == last.heading_path
            path = piece.heading_path if last.heading and below else _shared(last.heading_path, piece.heading_path)
            packed[-1] = _together(last, piece, path)
        else:
            packed.append(piece)
    return packed


def _together(left: _Piece, right: _Piece, path: tuple[str, ...]) -> _Piece:
    most = min(left.tokens_max, right.tokens_max)
    return _Piece(left.start, right.end, left.tokens + right.tokens, path, most, left.heading and right.heading)


def _belong_together(last: _Piece, piece: _Piece) -> bool:
    """A heading with nothing below it yet goes forward; besides, a small section joins one that has a heading in common."""
    most = min(last.tokens_max, piece.tokens_max)
    if last.heading:
        return last.tokens + piece.tokens <= most + HEADING_TOKENS_MAX
    small = min(last.tokens, piece.tokens) <= TOKENS_SMALL and last.tokens + piece.tokens <= most
    related = bool(_shared(last.heading_path, piece.heading_path)) or not (last.heading_path and piece.heading_path)
    return small and related and not piece.heading


def _leads(text: str, pieces: Sequence[_Piece], count_tokens: CountTokens, title: str) -> list[str]:
    """For each piece the last words of the one before, where it goes on in the same section: as many as the window has room for."""
    places = [place for place in range(1, len(pieces)) if _goes_on(text, pieces[place - 1], pieces[place])]
    contexts = count_tokens([context_of(title, pieces[place].heading_path) for place in places])
    leads = [""] * len(pieces)
    for place, context in zip(places, contexts, strict=True):
        last, piece = pieces[place - 1], pieces[place]
        room = min(LEAD_TOKENS_MAX, WINDOW_TOKENS - context - piece.tokens)
        begin = max(last.start, last.end - LEAD_CHARACTERS_MAX)
        words = list(_spans(text, begin, last.end, _WORD_END))
        if begin > last.start:
            words = words[1:]  # it may have been torn
        sizes = count_tokens([text[start:end] for start, end in words])
        first = len(words)
        while first and sizes[first - 1] <= room:
            first -= 1
            room -= sizes[first]
        if first < len(words):
            leads[place] = text[words[first][0] : last.end]
    return leads


def _goes_on(text: str, last: _Piece, piece: _Piece) -> bool:
    return piece.heading_path == last.heading_path and _adjoin(text, last, piece)


def _adjoin(text: str, last: _Piece, piece: _Piece) -> bool:
    """Whether nothing lies between them that is no part of the content, such as a comment or a rule."""
    return not text[last.end : piece.start].strip()


def _shared(left: tuple[str, ...], right: tuple[str, ...]) -> tuple[str, ...]:
    """What both paths begin with."""
    count = 0
    while count < min(len(left), len(right)) and left[count] == right[count]:
        count += 1
    return left[:count]
