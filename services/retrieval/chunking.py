"""Extracted text to chunks: cut where the document itself has a joint, within a size in tokens. Pure but for the token counter it is given.

Every chunk is a stretch of the extracted text, `text[start:end]`, and every block lies in chunks as a whole or in pieces: nothing is lost
and nothing is said twice.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from services.retrieval.domain import Block, BlockKind, Chunk, Extracted

TOKENS_MAX = 200
"""With title and headings in front this stays within the embedder's 256."""
TOKENS_SMALL = 60
"""A section this small says too little alone; it goes together with its neighbours."""
CONTEXT_CHARACTERS_MAX = 200
CHARACTERS_PER_TOKEN_MAX = 12
"""A stretch with more characters than this times its tokens is no language (base64, long URLs) and is cut by characters."""

CountTokens = Callable[[Sequence[str]], list[int]]

_SENTENCE_END = re.compile(r"(?<=[.!?。！？])[\"'”’)\]]*\s+|\n\s*\n")
_LINE_END = re.compile(r"\n+")
_WORD_END = re.compile(r"\s+")


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
    pieces = _packed(_pieces(extracted, count_tokens))
    return [
        Chunk(ordinal, extracted.text[piece.start : piece.end], piece.start, piece.end, piece.heading_path)
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
        if match.start() > begin:
            yield replace(piece, start=begin, end=match.start())
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


def _packed(pieces: Iterator[_Piece]) -> list[_Piece]:
    """Pieces of one section go together as long as they fit; a heading goes with what follows it, a small section with its neighbour."""
    packed: list[_Piece] = []
    for piece in pieces:
        last = packed[-1] if packed else None
        if last is None or last.tokens + piece.tokens > TOKENS_MAX or not _belong_together(last, piece):
            packed.append(piece)
            continue
        path = last.heading_path if piece.heading_path == last.heading_path or not last.heading else piece.heading_path
        if piece.heading_path != last.heading_path and not last.heading:
            path = _shared(last.heading_path, piece.heading_path)
        packed[-1] = _Piece(last.start, piece.end, last.tokens + piece.tokens, path, last.heading and piece.heading)
    return packed


def _belong_together(last: _Piece, piece: _Piece) -> bool:
    if piece.heading_path == last.heading_path or last.heading:
        return True
    # The next section joins a small one only as a sibling below the same heading, or deeper.
    return last.tokens <= TOKENS_SMALL and bool(_shared(last.heading_path, piece.heading_path) or not last.heading_path)


def _shared(left: tuple[str, ...], right: tuple[str, ...]) -> tuple[str, ...]:
    """What both paths begin with."""
    count = 0
    while count < min(len(left), len(right)) and left[count] == right[count]:
        count += 1
    return left[:count]
