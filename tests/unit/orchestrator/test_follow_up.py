"""The self-contained form of a follow-up, on dialogues by hand and on questions about one paragraph, the second made elliptic by rule."""

import collections
import gzip
import itertools
import json
import math
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from services.orchestrator.domain import Passage, Turn
from services.orchestrator.extractive_model import choose, content_words
from services.orchestrator.follow_up import FORM_CHARACTERS_MAX, self_contained
from services.orchestrator.standalone import depends_on_history


def turn(question: str, text: str = "") -> Turn:
    return Turn("a", question, text, (), datetime(2026, 1, 1, tzinfo=UTC), True)


PORT = turn("Which port does the gateway listen on?", "It listens on 8080 [1].")


@pytest.mark.parametrize(
    ("turns", "question", "form"),
    [
        ([PORT], "And the ledger?", "Which port does the ledger listen on?"),
        ([PORT], "What about the ledger?", "Which port does the ledger listen on?"),
        ([PORT], "Why does it?", "Which port does the gateway listen on?\nWhy does it?"),
        ([PORT], "Why?", "Which port does the gateway listen on?\nWhy?"),
        ([PORT], "Tell me more.", "Which port does the gateway listen on?\nTell me more."),
        ([PORT], "And how does it handle retries?", "How does the gateway handle retries?"),
        ([PORT], "What is its default timeout?", "What is the gateway's default timeout?"),
        ([turn("Who rebuilt the heron gate?", "It was rebuilt by Elsa Brandt [1].")], "When was she born?", "When was Elsa Brandt born?"),
        ([turn("What is the eel ladder made for in spring?")], "And who cleans it?", "Who cleans the eel ladder?"),
        ([turn("Who won the cup in 2014?")], "And in 2018?", "Who won the cup in 2018?"),
        ([turn("Who won the cup?")], "And in 2018?", "Who won the cup in 2018?"),
        ([turn("What does Kubernetes do?")], "What about Docker?", "What does Docker do?"),
        ([turn("What are the limits of the free plan?")], "And of the pro plan?", "What are the limits of the pro plan?"),
        ([turn("Wie lange lebt ein Hold?")], "Und eine Lease?", "Wie lange lebt eine Lease?"),
        ([turn("Who painted the Night Watch?"), turn("Where is it?")], "How large is it?", "How large is the Night Watch?"),
        ([turn("How many points did the Broncos score?")], "Who led them in sacks?", "Who led the Broncos in sacks?"),
        ([turn("What work of Luther's became popular?")], "When was he born?", "When was Luther born?"),
        ([PORT, turn("What is a hold of the ledger?")], "How long does it live?", "How long does a hold live?"),
    ],
)
def test_a_follow_up_says_what_it_leaves_to_the_conversation(turns: list[Turn], question: str, form: str) -> None:
    """Pointers are named, another thing is asked the same of, and where the rule knows no better, what was asked before stands in front."""
    assert self_contained(question, turns) == form


@pytest.mark.parametrize("question", ["Which port does the ledger listen on?", "How does Docker keep its layers?"])
def test_a_question_that_stands_alone_stays_as_it_is(question: str) -> None:
    """Whatever was said before."""
    assert self_contained(question, [PORT]) == question


def test_a_follow_up_without_a_conversation_stays_as_it_is_and_no_form_grows_without_end() -> None:
    """Nothing is invented, and a bound holds whatever is said."""
    assert self_contained("Why?", []) == "Why?"
    assert len(self_contained("Why?", [turn("what about " + "it " * 5_000)])) <= FORM_CHARACTERS_MAX


NAME = re.compile(r"(?:the )?(?:[A-Z][\w’-]*|\d+)(?: (?:[A-Z][\w’-]*|\d+))*")


def _followed(first: dict[str, Any], second: dict[str, Any]) -> str | None:
    """The second question with a pointer instead of the longest name that both have."""
    names = [match[0] for match in NAME.finditer(first["text"]) if match.start() > 0]
    for name in sorted(names, key=len, reverse=True):
        if len(name) < 4 or name.isdigit():
            continue
        match = re.search(r"(?<![\w’'-])" + re.escape(name) + r"(?P<of>['’]s?)?(?=\s(?![A-Z])|[?,.])", second["text"])
        if match and match.start() > 0:
            pointer = {(True, True): "their", (True, False): "they", (False, True): "its", (False, False): "it"}
            return f"{second['text'][: match.start()]}{pointer[name.endswith('s'), bool(match['of'])]}{second['text'][match.end() :]}"
    return None


def test_the_form_finds_the_paragraph_and_the_sentence_that_the_bare_follow_up_and_its_concatenation_do_not(data_dir: Path) -> None:
    """Measured on all English pairs of neighbouring questions that can be made elliptic and are seen to lean; figures are printed."""
    folder = data_dir / "retrieval" / "xquad"
    if not folder.is_dir():
        pytest.skip("no XQuAD in ../shared/data")
    contexts = {row["_id"]: row["text"] for row in _rows(folder / "contexts.jsonl.gz") if row["lang"] == "en"}
    about = collections.defaultdict(list)
    for row in _rows(folder / "questions.jsonl.gz"):
        if row["lang"] == "en":
            about[row["context_id"]].append(row)
    pairs = [
        (first, second, bare)
        for rows in about.values()
        for first, second in itertools.pairwise(rows)
        if (bare := _followed(first, second)) is not None and depends_on_history(bare)
    ]
    rank = _ranking(contexts)

    def measured(query: Callable[[dict[str, Any], str], str]) -> tuple[float, float]:
        found, answered = 0, 0
        for first, second, bare in pairs:
            asked = query(first, bare)
            best = rank(asked)[:3]
            found += best[0][0] == second["context_id"]
            passages = [Passage(n, key, key, "", key, contexts[key], 0, 1, score) for n, (key, score) in enumerate(best, 1)]
            answered += any(second["answers"][0]["text"] in sentence.text for sentence in choose(asked, passages))
        return found / len(pairs), answered / len(pairs)

    alone = measured(lambda _, bare: bare)
    joined = measured(lambda first, bare: f"{first['text']}\n{bare}")
    form = measured(lambda first, bare: self_contained(bare, [turn(first["text"], first["answers"][0]["text"])]))
    for name, (found, answered) in (("bare", alone), ("joined with the question before", joined), ("self-contained form", form)):
        print(f"XQuAD follow-ups, n = {len(pairs)}: {name}: paragraph first {found:.3f}, answer among the sentences {answered:.3f}")

    assert len(pairs) >= 40
    assert form[0] >= alone[0] + 0.1
    assert form[1] >= max(alone[1], joined[1]) + 0.05


def _rows(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _ranking(texts: dict[str, str]) -> Callable[[str], list[tuple[str, float]]]:
    """BM25 over `texts`; the same for all that is compared."""
    counts = {key: collections.Counter(content_words(text)) for key, text in texts.items()}
    seen_in = collections.Counter(word for words in counts.values() for word in words)
    mean = sum(sum(words.values()) for words in counts.values()) / len(counts)

    def rank(query: str) -> list[tuple[str, float]]:
        asked = content_words(query)
        scores = {}
        for key, words in counts.items():
            length = 1.2 * (0.25 + 0.75 * sum(words.values()) / mean)
            scores[key] = sum(
                math.log(1 + (len(counts) - seen_in[word] + 0.5) / (seen_in[word] + 0.5)) * words[word] * 2.2 / (words[word] + length)
                for word in asked
                if words[word]
            )
        return sorted(scores.items(), key=lambda pair: -pair[1])

    return rank
