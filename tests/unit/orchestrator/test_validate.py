"""Verdicts and citations."""

import pytest

from services.orchestrator.citations import CitationReader
from services.orchestrator.domain import Passage
from services.orchestrator.validate import judge

PASSAGES = [Passage(n, f"d{n}", f"c{n}", "", "", "", 0, 1, 1.0) for n in (1, 2, 12)]


@pytest.mark.parametrize(
    ("text", "finish_reason", "verdict"),
    [
        ("Gateways listen [1].", "end_turn", "passed"),
        ("Gateways listen [1].", "stop_sequence", "passed"),
        ("No citation at all.", "end_turn", "passed"),
        ("Gateways listen [9].", "end_turn", "citation_unknown"),
        ("Elephants migrate southwards in autumn [1].", "end_turn", "ungrounded"),
        ("Yes", "max_tokens", "cut"),
        ("Yes", "context_window", "context_overflow"),
        ("", "context_window", "context_overflow"),
        ("Yes", "tool_use", "cut"),
        ("Yes", "", "cut"),
        (" \n", "end_turn", "empty"),
        ("", "refusal", "refused"),
        ("I cannot", "refusal", "refused"),
        ("and then the gateway went on and on " * 12, "max_tokens", "repeated"),
    ],
)
def test_only_a_whole_and_sound_answer_passes(text: str, finish_reason: str, verdict: str) -> None:
    """Every other end has its own word."""
    citations = CitationReader([Passage(1, "d", "c", "", "", "The gateways listen on port 8080.", 0, 1, 1.0)])
    citations.read(text)

    assert judge(text, finish_reason, citations) == verdict


def test_marker_with_many_numbers_is_many_citations_of_one_place() -> None:
    """`[1, 12]` cites both, at the same offsets; a number without a passage is counted apart."""
    reader = CitationReader(PASSAGES)
    found = reader.read("Ja, schön [1, 12] und [3].")

    assert [(c.number, c.start, c.end, c.document_id) for c in found] == [(1, 10, 17, "d1"), (12, 10, 17, "d12")]
    assert (reader.cited, reader.unknown) == ({1, 12}, {3})


def test_offsets_are_code_points() -> None:
    """A character outside the basic plane counts once."""
    (citation,) = CitationReader(PASSAGES).read("🙂🙂 [2]")

    assert (citation.start, citation.end) == (3, 6)


def test_brackets_that_are_no_markers_are_left_alone() -> None:
    """Links, code and dates cite nothing."""
    reader = CitationReader(PASSAGES)

    assert reader.read("[a](b) x[] [1a] [2026-01-01] [") + reader.read("nothing]") == []
    assert not reader.unknown
