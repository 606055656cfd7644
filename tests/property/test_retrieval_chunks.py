"""Chunks are exact stretches of the extracted text, whatever the text is."""

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from services.chassis.errors import DocumentRejected
from services.retrieval.chunking import HEADING_TOKENS_MAX, TOKENS_MAX, chunked
from services.retrieval.domain import Extracted, Upload
from services.retrieval.parsers import read

CAUSES = {"empty", "binary", "charset", "malformed", "unsupported_type", "archive", "truncated", "encrypted", "dtd", "no_text"}
"""What so few bytes can be refused for."""
_WORD = re.compile(r"\w{1,4}|[^\w\s]")


def count_tokens(texts: list[str] | tuple[str, ...]) -> list[int]:
    """Like a subword tokenizer: long words are several tokens, signs one each."""
    return [len(_WORD.findall(text)) for text in texts]


words = st.text("abcdefgh äß日本—.,!?\"'()*_#`|-", min_size=1, max_size=30)
lines = st.one_of(
    words,
    st.builds("{} {}".format, st.sampled_from(["#", "##", "###", "-", "1.", ">", "|", "```", "    ", "---"]), words),
    st.just("```"),
    st.just(""),
    st.builds(lambda word, times: " ".join([word] * times), words, st.integers(1, 300)),
    st.builds(lambda letter, times: letter * times, st.sampled_from("ax日."), st.integers(1, 2000)),
)
documents = st.lists(lines, max_size=40).map("\n".join)


def extracted_from(text: str, name: str) -> Extracted | None:
    try:
        return read(Upload(text.encode(), source_uri=name))
    except DocumentRejected:
        return None


@pytest.mark.parametrize("name", ["a.md", "a.txt", "a.html"])
@given(text=documents)
@example(text="He said “Stop!” Then he left. " * 80)
@example(text="# One\n\n## Two\n\n### Three\n\n" + "word " * 400 + "\n\n# Four")
@example(text="?\n" + "_ " * 229 + "\n?")
@example(text="。" * 900)
@settings(max_examples=60, deadline=None)
def test_chunks_are_exact_and_lose_nothing_of_any_block(name: str, text: str) -> None:
    """Offsets are exact, chunks are in order and apart, every visible character of every block is in one, and none is too large."""
    extracted = extracted_from(text, name)
    if extracted is None:
        return
    chunks = chunked(extracted, count_tokens)

    assert list(range(len(chunks))) == [chunk.ordinal for chunk in chunks]
    last = 0
    for chunk in chunks:
        assert chunk.text == extracted.text[chunk.start : chunk.end]
        assert last <= chunk.start < chunk.end
        assert count_tokens([chunk.text])[0] <= TOKENS_MAX + HEADING_TOKENS_MAX
        last = chunk.end
    covered = {place for chunk in chunks for place in range(chunk.start, chunk.end)}
    for block in extracted.blocks:
        for place in range(block.start, block.end):
            assert place in covered or extracted.text[place].isspace()


@given(content=st.binary(max_size=400), name=st.sampled_from(["a", "a.md", "a.html", "a.txt"]))
@example(content=b"\xff\xfe\x00\xd8", name="a.txt")
@example(content=b"\xef\xbb\xbf", name="a.md")
@example(content=b"\x1f\x8b", name="a.txt")
@example(content=b"PK\x03\x04", name="a.txt")
@example(content=b"%PDF-", name="a")
@example(content=b"<?xml?><!DOCTYPE a [", name="a")
@example(content=b"{\\rtf", name="a")
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_text_or_a_typed_refusal(content: bytes, name: str) -> None:
    """No file makes a parser fail in a way of its own."""
    try:
        extracted = read(Upload(content, source_uri=name))
    except DocumentRejected as refused:
        assert refused.metadata["cause"] in CAUSES
        return
    assert extracted.text.strip()
    assert all(0 <= block.start < block.end <= len(extracted.text) for block in extracted.blocks)
