"""Summaries by rule."""

from datetime import UTC, datetime

from services.orchestrator.domain import Turn
from services.orchestrator.summaries import SUMMARY_CHARACTERS_MAX, by_rule


def turn(question: str, text: str) -> Turn:
    return Turn("a", question, text, (), datetime(2026, 1, 1, tzinfo=UTC), True)


def test_each_turn_is_a_line_with_how_its_answer_began() -> None:
    """Without markers, whose passages are not there any more; after what was known before."""
    turns = [turn("Which\nport?", "It listens on 8080 [1, 2]. It also speaks gRPC [1]."), turn("Why?", "")]

    assert by_rule("- Before — yes.", turns) == "- Before — yes.\n- Which port? — It listens on 8080.\n- Why? — (no answer)"


def test_the_oldest_lines_go_where_a_summary_grows_too_long() -> None:
    """A bound holds, also for one line alone."""
    summary = ""
    for number in range(60):
        summary = by_rule(summary, [turn(f"question {number} " + "q" * 500, "word " * 200)])

    assert len(summary) <= SUMMARY_CHARACTERS_MAX
    assert summary.splitlines()[-1].startswith("- question 59")
    assert "question 0 " not in summary
