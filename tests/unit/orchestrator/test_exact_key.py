"""What is folded in a question before it is looked up, and what never is."""

from datetime import UTC, datetime

import pytest

from services.chassis.principal import Principal
from services.orchestrator.domain import Candidate, Question
from services.orchestrator.redis_cache import cache_key
from services.orchestrator.standalone import normalise


def question(text: str = "Which port?", tenant: str = "acme", collection: str = "default") -> Question:
    return Question(
        "a",
        text,
        Principal(tenant, "alice"),
        "s",
        True,
        "fast",
        (Candidate("p", "m", 1, 1),),
        10,
        collection,
        "use",
        datetime(2026, 1, 1, tzinfo=UTC),
    )


@pytest.mark.parametrize("same", ["which port?", " Which  port ", "Which\tport?", "Which port", "Ｗhich port？"])
def test_spelling_that_changes_nothing_is_folded(same: str) -> None:
    """Space, compatibility forms, the first letter's case and a final mark."""
    assert normalise(same) == normalise("Which port?")


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("What is US law", "What is us law"),
        ("Is it 1.5", "Is it 15"),
        ("not allowed", "allowed"),
        ("Really", "Really?!"),
        ("It works...", "It works"),
        ("C is what", "C# is what"),
        ("naïve", "naive"),
        ("US exports", "us exports"),
    ],
)
def test_what_may_mean_something_else_stays_apart(left: str, right: str) -> None:
    """In doubt two questions are two."""
    assert normalise(left) != normalise(right)


def test_everything_an_answer_depends_on_is_in_the_key() -> None:
    """Tenant, scope, collection and words; and no two lists of parts look alike. The epoch is in the value."""
    keys = {
        cache_key(question(), "s"),
        cache_key(question(tenant="acme2"), "s"),
        cache_key(question(collection="other"), "s"),
        cache_key(question(), "s2"),
        cache_key(question("Which host?"), "s"),
        cache_key(question(tenant="acmes"), ""),
    }

    assert len(keys) == 6
