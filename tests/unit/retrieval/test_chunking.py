"""Where documents are cut."""

from collections.abc import Sequence

import pytest

from services.retrieval.chunking import (
    HEADING_TOKENS_MAX,
    LEAD_TOKENS_MAX,
    TOKENS_MAX,
    TOKENS_MIN,
    WINDOW_TOKENS,
    chunked,
    context_of,
    in_context,
)
from services.retrieval.domain import Chunk, Upload
from services.retrieval.parsers import read


def count_words(texts: Sequence[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def cut(text: str, title: str = "") -> list[Chunk]:
    return chunked(read(Upload(text.encode(), source_uri="a.md")), count_words, title)


def words(count: int, word: str = "word") -> str:
    return " ".join([word] * count)


def test_sections_that_say_enough_are_kept_apart() -> None:
    """Each has its heading in its text and its path."""
    first, second = cut(f"# A\n\n{words(90)}\n\n## B\n\n{words(90)}\n")

    assert (("A",), ("A", "B")) == (first.heading_path, second.heading_path)
    assert second.text.startswith("## B\n\nword")


def test_small_sections_of_one_parent_go_together() -> None:
    """A line under a heading says too little alone; the path is what the sections share."""
    (chunk,) = cut("# A\n\n## B\n\nOne line.\n\n## C\n\nAnother line.\n")

    assert ("A",) == chunk.heading_path


def test_a_heading_is_never_left_at_the_end_of_a_chunk() -> None:
    """It goes with what it is the heading of, even if that is large."""
    headings = count_words([context_of("", ("A", "B"))])[0]
    chunks = cut(f"# A\n\n{words(50)}\n\n## B\n\n{words(WINDOW_TOKENS - HEADING_TOKENS_MAX - headings)}\n")

    assert 2 == len(chunks)
    assert chunks[1].text.startswith("## B")


def test_what_is_no_content_is_in_no_chunk() -> None:
    """A comment between two paragraphs is not taken along with them."""
    chunks = cut("One line.\n\n<!-- a note to authors -->\n\nAnother line.\n")

    assert ["One line.", "Another line."] == [chunk.text for chunk in chunks]


def test_a_long_paragraph_is_cut_between_sentences() -> None:
    """No sentence is torn while sentences fit."""
    sentence = f"{words(29)} end."
    chunks = cut(" ".join([sentence] * 20))

    assert all(chunk.text.startswith("word") and chunk.text.endswith("end.") for chunk in chunks)
    assert max(count_words([chunk.text for chunk in chunks])) <= TOKENS_MAX


def test_a_long_code_block_is_cut_between_lines() -> None:
    """Lines of code stay whole."""
    line = "x = call(a, b, c)  # a comment"
    chunks = cut("```python\n" + "\n".join([line] * 100) + "\n```\n")

    assert len(chunks) > 2
    assert {line} == {part for chunk in chunks for part in chunk.text.split("\n")} - {"```python", "```"}


@pytest.mark.parametrize(
    ("title", "path", "context"),
    [("Guide", ("Guide", "Pools"), "Guide > Pools"), ("", ("A", "B"), "A > B"), ("Guide", (), "Guide"), ("", (), "")],
)
def test_the_context_names_the_place_once(title: str, path: tuple[str, ...], context: str) -> None:
    """A title that is also the first heading is not said twice; without context the text stands alone."""
    assert context == context_of(title, path)
    assert f"{context}\ntext".strip() == in_context(title, Chunk(0, "text", 0, 4, path))


def numbered(count: int) -> str:
    """Sentences of eight words, none of which says what another says."""
    return " ".join(f"Line {place} of this text has words enough." for place in range(count))


def test_what_leads_up_to_a_chunk_helps_to_find_it_and_is_not_shown() -> None:
    """The last words before a cut are embedded on both sides of it, and belong to one."""
    first, second = cut(numbered(45))

    assert first.text.endswith(second.lead)
    assert 0 < count_words([second.lead])[0] <= LEAD_TOKENS_MAX
    assert "" == first.lead
    assert first.end <= second.start
    assert f"{second.lead} {second.text}" == in_context("", second)


def test_a_chunk_is_read_by_the_embedder_to_its_end() -> None:
    """Title, headings and lead take no room from what the chunk says itself: all of it together fits."""
    title = words(40, "title")
    text = "\n\n".join(f"## B {place}\n\n{numbered(70)}" for place in range(3))
    chunks = cut(f"# A\n\n{text}", title)

    assert max(count_words([in_context(title, chunk) for chunk in chunks])) <= WINDOW_TOKENS
    assert any(chunk.lead for chunk in chunks)


def test_a_title_never_leaves_a_chunk_without_room() -> None:
    """Where it would, the chunk keeps a size that says something, and its end is found by words alone."""
    chunks = cut(f"# A\n\n{words(400)}", " ".join("t" * 100))

    assert TOKENS_MIN == max(count_words([chunk.text for chunk in chunks[1:]]))


@pytest.mark.parametrize("between", ["\n\n## Next\n\n", "\n\n<!-- a note to authors -->\n\n"])
def test_nothing_leads_from_one_section_into_the_next(between: str) -> None:
    """What stood under another heading, or before something that is no content, says nothing of what follows."""
    chunks = cut(f"# A\n\n{words(150)}{between}{words(150, 'other')}\n")

    assert ["", ""] == [chunk.lead for chunk in chunks]
