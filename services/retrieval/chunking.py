"""Extracted text to chunks: cut where the document itself has a joint, within a size in tokens. Pure but for the token counter it is given.

Every chunk is a stretch of the extracted text, `text[start:end]`, and every block lies in chunks as a whole or in pieces: nothing is lost
and nothing is said twice.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from services.retrieval.domain import Block, BlockKind, Chunk, Extracted

TOKENS_MAX = 200
"""With title and headings in front this stays within the embedder's 256."""
TOKENS_SMALL = 60
"""A section this small says too little alone; it goes together with its neighbours."""
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
    heading: bool = False


def context_of(title: str, heading_path: tuple[str, ...]) -> str:
    """What is put in front of a chunk for embedding and word search, so that it is found by its place in the document, too."""
    names = [name for place, name in enumerate((title, *heading_path)) if name and (place == 0 or name != title)]
    return " > ".join(names)[:CONTEXT_CHARACTERS_MAX]


def in_context(title: str, chunk: Chunk) -> str:
    """The chunk as it is embedded."""
    context = context_of(title, chunk.heading_path)
    return f"{context}\n{chunk.text}" if context else chunk.text


def chunked(extracted: Extracted, count_tokens: CountTokens) -> list[Chunk]:
    """Cut `extracted` into chunks in reading order."""
    pieces = _packed(extracted.text, _pieces(extracted, count_tokens))
    return [
        Chunk(
            ordinal,
            extracted.text[piece.start : piece.end],
            piece.start,
            piece.end,
            piece.heading_path,
            page=bisect_right(extracted.page_starts, piece.start),
        )
        for ordinal, piece in enumerate(pieces)
    ]


def _pieces(extracted: Extracted, count_tokens: CountTokens) -> Iterator[_Piece]:
    """Blocks, and what blocks that are too large fall into."""
    sizes = count_tokens([extracted.text[block.start : block.end] for block in extracted.blocks])
    for block, tokens in zip(extracted.blocks, sizes, strict=True):
        if tokens <= TOKENS_MAX:
            yield _Piece(block.start, block.end, tokens, block.heading_path, block.kind is BlockKind.HEADING)
        else:
            yield from _cut(extracted.text, block, count_tokens)


def _cut(text: str, block: Block, count_tokens: CountTokens) -> Iterator[_Piece]:
    """A block in pieces: by lines where lines mean something, else by sentences; what is still too large by words, then by characters."""
    whole = _Piece(block.start, block.end, 0, block.heading_path)
    by_line = block.kind in (BlockKind.CODE, BlockKind.TABLE, BlockKind.LIST)
    joints = (_LINE_END, _WORD_END) if by_line else (_SENTENCE_END, _LINE_END, _WORD_END)
    yield from _joined(_split(text, whole, joints, count_tokens))


def _split(text: str, piece: _Piece, joints: tuple[re.Pattern[str], ...], count_tokens: CountTokens) -> Iterator[_Piece]:
    parts = list(_parts(text, piece, joints[0])) if joints else list(_by_characters(piece))
    sizes = count_tokens([text[part.start : part.end] for part in parts])
    for part, tokens in zip(parts, sizes, strict=True):
        if tokens <= TOKENS_MAX:
            yield replace(part, tokens=tokens)
        elif joints:
            yield from _split(text, part, joints[1:], count_tokens)
        else:
            # One token is at least one character here, so a quarter of the characters is the next try.
            yield from _split(text, part, (), count_tokens)


def _parts(text: str, piece: _Piece, joint: re.Pattern[str]) -> Iterator[_Piece]:
    begin = piece.start
    for match in joint.finditer(text, piece.start, piece.end):
        assert match.lastindex is not None
        gap = match.start(match.lastindex)
        if gap > begin:
            yield replace(piece, start=begin, end=gap)
        begin = match.end()
    if begin < piece.end:
        yield replace(piece, start=begin, end=piece.end)


def _by_characters(piece: _Piece) -> Iterator[_Piece]:
    step = max(1, min(TOKENS_MAX, (piece.end - piece.start + 1) // 2))
    for begin in range(piece.start, piece.end, step):
        yield replace(piece, start=begin, end=min(begin + step, piece.end))


def _joined(parts: Iterator[_Piece]) -> Iterator[_Piece]:
    """Neighbours put together again as long as they fit. Token counts of parts add up to at least that of the whole."""
    gathered: _Piece | None = None
    for part in parts:
        if gathered is not None and gathered.tokens + part.tokens <= TOKENS_MAX:
            gathered = replace(gathered, end=part.end, tokens=gathered.tokens + part.tokens)
            continue
        if gathered is not None:
            yield gathered
        gathered = part
    if gathered is not None:
        yield gathered


def _packed(text: str, pieces: Iterator[_Piece]) -> list[_Piece]:
    """Pieces of one section together as long as they fit, then small sections with their neighbours."""

    def adjoin(last: _Piece, piece: _Piece) -> bool:
        """Whether nothing lies between them that is no part of the content, such as a comment or a rule."""
        return not text[last.end : piece.start].strip()

    sections: list[_Piece] = []
    for piece in pieces:
        last = sections[-1] if sections else None
        # A heading is never left alone for the sake of a few tokens.
        most = TOKENS_MAX + HEADING_TOKENS_MAX if last and last.heading else TOKENS_MAX
        if (
            last is not None
            and piece.heading_path == last.heading_path
            and not piece.heading
            and last.tokens + piece.tokens <= most
            and adjoin(last, piece)
        ):
            sections[-1] = _together(last, piece, piece.heading_path)
        else:
            sections.append(piece)
    packed: list[_Piece] = []
    for piece in sections:
        last = packed[-1] if packed else None
        if last is not None and _belong_together(last, piece) and adjoin(last, piece):
            below = piece.heading_path[: len(last.heading_path)] == last.heading_path
            path = piece.heading_path if last.heading and below else _shared(last.heading_path, piece.heading_path)
            packed[-1] = _together(last, piece, path)
        else:
            packed.append(piece)
    return packed


def _together(left: _Piece, right: _Piece, path: tuple[str, ...]) -> _Piece:
    return _Piece(left.start, right.end, left.tokens + right.tokens, path, left.heading and right.heading)


def _belong_together(last: _Piece, piece: _Piece) -> bool:
    """A heading with nothing below it yet goes forward; besides, a small section joins one that has a heading in common."""
    if last.heading:
        return last.tokens + piece.tokens <= TOKENS_MAX + HEADING_TOKENS_MAX
    small = min(last.tokens, piece.tokens) <= TOKENS_SMALL and last.tokens + piece.tokens <= TOKENS_MAX
    related = bool(_shared(last.heading_path, piece.heading_path)) or not (last.heading_path and piece.heading_path)
    return small and related and not piece.heading


def _shared(left: tuple[str, ...], right: tuple[str, ...]) -> tuple[str, ...]:
    """What both paths begin with."""
    count = 0
    while count < min(len(left), len(right)) and left[count] == right[count]:
        count += 1
    return left[:count]
