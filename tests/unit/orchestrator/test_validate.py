"""Verdicts and citations."""

import pytest

from services.orchestrator.domain import Passage
from services.orchestrator.validate import CitationReader, judge

PASSAGES = [Passage(n, f"d{n}", f"c{n}", "", "", "", 0, 1, 1.0) for n in (1, 2, 12)]


@pytest.mark.parametrize(
    ("text", "finish_reason", "unknown", "verdict"),
    [
        ("Yes [1].", "end_turn", set(), "passed"),
        ("Yes [1].", "stop_sequence", set(), "passed"),
        ("Yes [9].", "end_turn", {9}, "citation_unknown"),
        ("Yes", "max_tokens", set(), "cut"),
        ("Yes", "context_window", set(), "cut"),
        ("Yes", "tool_use", set(), "cut"),
        ("Yes", "", set(), "cut"),
        (" \n", "end_turn", set(), "empty"),
        ("", "refusal", set(), "refused"),
        ("I cannot", "refusal", set(), "refused"),
    ],
)
def test_only_a_whole_answer_with_real_citations_passes(text: str, finish_reason: str, unknown: set[int], verdict: str) -> None:
    """Every other end has its own word."""
    assert judge(text, finish_reason, unknown) == verdict


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
