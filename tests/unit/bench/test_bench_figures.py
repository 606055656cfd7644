"""What a benchmark computes and prints, without running one."""

import copy
from pathlib import Path
from typing import Any

import pytest

from bench import corpus, report
from bench.floor import floor
from bench.measure import spread

FIGURES: dict[str, Any] = {
    "machine": {"cpus": 2, "load": 0.5, "platform": "Linux", "python": "3.11"},
    "corpus": {"source": "tales", "documents": 1000, "chunks": 1010, "chunks_per_s": 25.0, "prompt_bytes": 7000},
    "start": {"first_s": 6.0, "again_s": 3.0},
    "first_token": [
        {
            "streams": streams,
            "direct": {"p50": 20.5, "p95": 21.0, "n": 150},
            "through": {"p50": 35.5, "p95": 50.0, "n": 150},
            "added": {"p50": 15.0, "p95": 29.0},
            "ratio_p50": 1.73,
        }
        for streams in (1, 20)
    ],
    "cpu": {
        "tokens_per_answer": 200,
        "per_token_us": {"gateway": 60.0, "orchestrator": 90.0},
        "per_request_us": {"gateway": 2000, "orchestrator": 6000},
        "per_token_all_in_us": {"gateway": 70.0, "orchestrator": 120.0},
    },
    "floor": {"server_us": 60.0, "client_us": 65.0},
    "idle": {"gateway": 900, "orchestrator": 1100},
    "hits": {
        "exact": {"asked": 200, "hits": 200, "first": {"p50": 6.0, "p95": 9.0, "n": 200}, "done": {"p50": 7.0, "p95": 10.0, "n": 200}},
        "semantic": {"asked": 100, "hits": 0},
    },
    "memory": {"processes": {"gateway": {"pss_mib": 80.0, "rss_mib": 95.0}}, "pss_mib": 700.0, "rss_mib": 1300.0},
    "took_s": 120.0,
}


def test_a_spread_is_the_median_and_the_value_that_one_in_twenty_passes() -> None:
    """p95 of 1 to 100 is 96: five values are at least as large."""
    assert spread([float(n) for n in range(1, 101)]) == {"p50": 50.5, "p95": 96.0, "n": 100}
    assert spread([3.0]) == {"p50": 3.0, "p95": 3.0, "n": 1}


def test_a_figure_above_its_mark_stands_out() -> None:
    """Every mark says `ok` or `ABOVE`; hits that never came are said, not averaged away."""
    slow = copy.deepcopy(FIGURES)
    slow["first_token"][0]["added"]["p50"] = 20.1

    good, bad = report.table(FIGURES), report.table(slow)

    assert good.count("ABOVE") == 0
    assert bad.count("ABOVE") == 1
    assert "semantic: none of 100 questions hit" in good
    assert "a bare gRPC stream: server 60 + client 65 us a message" in good
    assert "1.2 x that a token, 1.5 x all-in" in good


async def test_the_floor_is_measured_by_two_processes_of_their_own() -> None:
    """Each says what it spent itself; there is no message without a cost."""
    figures = await floor(messages=20)

    assert figures.keys() == {"server_us", "client_us"}
    assert all(1 < spent_us < 100_000 for spent_us in figures.values())


@pytest.mark.parametrize("source", [corpus.SCIFACT, Path("nothing here")])
def test_there_is_always_enough_to_ingest_and_to_ask(monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    """With the public abstracts or without them: as many documents as asked for, and plenty of different safe subjects."""
    monkeypatch.setattr(corpus, "SCIFACT", source)

    loaded = corpus.load(1000)
    topics = loaded.topics(10_000)

    assert len(loaded.documents) == len({title for title, _ in loaded.documents}) == 1000
    assert len(set(topics)) == len(topics) >= 200
    assert not any(character.isdigit() for topic in topics for character in topic)
