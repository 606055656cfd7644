"""However a stream is cut into pieces, it says the same."""

import itertools
from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from services.chassis.money import Price, Usage
from services.orchestrator.citations import CitationReader
from services.orchestrator.compose import Template, compose
from services.orchestrator.domain import Draft, Passage, Prompt, Turn
from services.orchestrator.event_bytes import EventBytes
from services.orchestrator.standalone import normalise

PASSAGES = [Passage(n, f"d{n}", f"c{n}", "", "", "", 0, 1, 1.0) for n in (1, 2, 12)]


def pieces(whole: str | bytes, cuts: list[int]) -> list[str | bytes]:
    """`whole` cut at the given places."""
    places = sorted({min(cut, len(whole)) for cut in cuts} | {0, len(whole)})
    return [whole[left:right] for left, right in itertools.pairwise(places)]


@given(
    st.lists(st.text(alphabet='abc é:{}"\\', max_size=12), max_size=8),
    st.sampled_from([b"\n", b"\r\n", b"\r"]),
    st.lists(st.integers(0, 400)),
)
def test_events_are_the_same_however_the_bytes_arrive(datas: list[str], newline: bytes, cuts: list[int]) -> None:
    """Any chunking, any line ending of the standard: the same data in the same order."""
    stream = b"".join(b"event: x" + newline + b"data: " + data.encode() + newline + newline for data in datas)
    reader = EventBytes("p")
    read = [data for piece in pieces(stream, cuts) for data in reader.feed(piece)]  # type: ignore[arg-type]
    if newline == b"\r":  # a last \r may still be half of \r\n
        read += list(reader.feed(b"\n"))

    assert read == [data.encode() for data in datas]


@given(st.text(alphabet="ab[]12, 3🙂é", max_size=60), st.lists(st.integers(0, 60)))
def test_citations_are_the_same_however_the_text_arrives(text: str, cuts: list[int]) -> None:
    """Markers cut in two are found, once, at the offsets they have in the whole text."""
    whole, cut = CitationReader(PASSAGES), CitationReader(PASSAGES)
    expected = whole.read(text)
    found = [citation for piece in pieces(text, cuts) for citation in cut.read(piece)]  # type: ignore[arg-type]

    assert found == expected
    assert (cut.cited, cut.unknown) == (whole.cited, whole.unknown)
    assert all(text[c.start] == "[" and text[c.end - 1] == "]" for c in found)


@given(st.text(max_size=80))
def test_normalising_twice_changes_nothing_more(text: str) -> None:
    """The key of a stored question is the key of the question."""
    assert normalise(normalise(text)) in (normalise(text), normalise(normalise(normalise(text))))


@given(
    st.text(max_size=200),
    st.lists(st.text(max_size=200), max_size=5),
    st.lists(st.tuples(st.text(max_size=100), st.text(max_size=100)), max_size=4),
    st.integers(600, 3000),
)
def test_prompt_never_exceeds_its_budget_and_keeps_the_question(
    question: str, texts: list[str], talk: list[tuple[str, str]], budget: int
) -> None:
    """Passages stay a prefix of what was found, turns a suffix of what was said."""
    found = [Passage(n + 1, "d", "c", "t", "u", text, 0, 1, 1.0) for n, text in enumerate(texts)]
    turns = [Turn("a", asked, said, (), datetime(2026, 1, 1, tzinfo=UTC), True) for asked, said in talk]
    if len(question.encode()) * 3 > budget - 400:
        question = question[:20]
    prompt = compose(Template("t", "system"), question, found, turns, budget)

    assert prompt.input_tokens_max <= budget
    assert prompt.passages == tuple(found[: len(prompt.passages)])
    assert prompt.messages[-1].role == "user"


@given(
    st.lists(st.text(min_size=1, max_size=30), max_size=20),
    st.booleans(),
    st.integers(0, 1000) | st.none(),
    st.integers(0, 1000) | st.none(),
)
def test_account_of_a_call_is_never_below_what_the_provider_said(
    written: list[str], final: bool, input_tokens: int | None, output_tokens: int | None
) -> None:
    """A reported final count is believed to the token; anything else is marked as an estimate and never lower than what is known."""
    draft = Draft(lambda _: None, sent=True, input_tokens=input_tokens, output_tokens=output_tokens, usage_is_final=final)
    for piece in written:
        draft.write(piece)
    usage, estimated = draft.usage(Prompt("t", "", (), "q", (), 400))

    assert estimated == (input_tokens is None or output_tokens is None or not final)
    assert usage.output_tokens >= (output_tokens or 0)
    if final and output_tokens is not None:
        assert usage.output_tokens == output_tokens
    assert Price("p", "m", input=3, output=7).cost_nanousd(usage) >= 0
    assert usage == usage + Usage()
