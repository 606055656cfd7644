"""How hard a question looks."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.orchestrator.difficulty import WEIGHTS, difficulty_of, features_of
from services.orchestrator.models_file import read_table
from services.orchestrator.router import Router, Wish

THRESHOLD = 0.3


@given(st.text(max_size=500))
def test_score_is_a_share_and_the_sum_of_its_named_parts(question: str) -> None:
    """It can be explained part by part, for any text."""
    features = features_of(question)

    assert features.keys() == WEIGHTS.keys()
    assert all(0 <= value <= 1 for value in features.values())
    assert difficulty_of(question) == round(min(1.0, sum(WEIGHTS[name] * value for name, value in features.items())), 2)


@pytest.mark.parametrize(
    ("easier", "harder"),
    [
        ("Which port does the gateway listen on?", "Why does the gateway listen on two ports, and what would break if it did not?"),
        ("Wann endet der Vertrag?", "Vergleiche die beiden Verträge und begründe, welcher günstiger ist."),
        ("¿Cuándo termina el contrato?", "Compara los dos contratos y explica por qué el segundo cuesta más."),
        ("How long do holds live?", "Write a function in Python that removes expired holds; explain its complexity."),
    ],
)
def test_what_asks_for_thought_scores_higher(easier: str, harder: str) -> None:
    """In each language whose little words are known."""
    assert difficulty_of(easier) < THRESHOLD <= difficulty_of(harder)


def test_longest_question_is_scored_at_once() -> None:
    """No pattern goes wild on hostile text."""
    for text in (",;: " * 8_000, "`" * 32_000, "why " * 8_000, "1." * 16_000, "?" * 32_000):
        assert 0 <= difficulty_of(text) <= 1


def test_look_ups_and_tasks_are_told_apart(data_dir: Path) -> None:
    """Real questions: look-ups in documents (XQuAD) and of a bank's customers against open tasks (Vicuna's, but the generic ones)."""

    def texts(name: str, key: str) -> list[str]:
        with gzip.open(data_dir / name, "rt", encoding="utf-8") as rows:
            return [json.loads(row)[key] for row in rows][:1500]

    tasks = [json.loads(row) for row in (data_dir / "prompts" / "vicuna_bench.jsonl").read_text().splitlines()]
    hard = [difficulty_of(row["turns"][0]) for row in tasks if row["category"] != "generic"]
    documents, bank = texts("retrieval/xquad/questions.jsonl.gz", "text"), texts("cache/banking77.jsonl.gz", "text")

    assert sum(score >= THRESHOLD for score in hard) / len(hard) >= 0.8
    assert sum(difficulty_of(text) >= THRESHOLD for text in documents) / len(documents) <= 0.05
    assert sum(difficulty_of(text) >= THRESHOLD for text in bank) / len(bank) <= 0.25
    shipped = Router(read_table(), {"anthropic"}, "fast", lambda: 0.5)
    assert shipped.route(Wish(tier="auto", text=documents[0])).tier == "fast"
