"""The model without a key: whole sentences of the passages, cited, or an honest no."""

from dataclasses import replace

import pytest

from services.orchestrator.domain import Candidate, Draft, Passage, Prompt
from services.orchestrator.extractive_model import ExtractiveModel, choose, written
from services.orchestrator.reading import clean, split_sentences
from services.orchestrator.standalone import language

GUIDE = """# Gateway

The **gateway** listens on port `8080`. It speaks [HTTP](https://example.org/a_(b)) and gRPC.

```python
gateway.listen(9999)  # which port does the gateway listen on
```

| name | default |
|------|---------|

- A stream that is cut can be resumed with `Last-Event-ID`, e.g. after a reload.
- See also
"""
LEDGER = "Holds live for ten minutes. The ledger books every token. Holds live for ten minutes and are then swept."


def passages(*texts: str) -> list[Passage]:
    return [Passage(n + 1, f"d{n}", f"c{n}", "Guide", "guide.md", text, 0, len(text), 1 / (n + 1)) for n, text in enumerate(texts)]


def answer(question: str, *texts: str) -> str:
    found = passages(*texts)
    return "".join(written(choose(question, found), found))


def test_sentences_are_whole_and_free_of_markup() -> None:
    """Headings, code, rules and menus are no sentences; abbreviations end none."""
    assert split_sentences(GUIDE) == [
        "The gateway listens on port `8080`.",
        "It speaks HTTP and gRPC.",
        "A stream that is cut can be resumed with `Last-Event-ID`, e.g. after a reload.",
    ]


def test_a_few_words_belong_to_the_sentence_before() -> None:
    """`Defaults to 500.` says something only with it. Where nothing is before, as in a new item, they are left out."""
    text = "Intro is here now.\n\n* `size` - Smaller answers are not packed. Defaults to `500`.\n* `level` - How hard it tries. Nine."

    assert split_sentences(text) == [
        "Intro is here now.",
        "`size` - Smaller answers are not packed. Defaults to `500`.",
        "`level` - How hard it tries. Nine.",
    ]
    assert split_sentences("Nine. Then come whole sentences.") == ["Then come whole sentences."]


def test_a_sentence_that_leads_to_code_is_one() -> None:
    """It says what the code does. One that leads to a list, or has few words, says nothing alone."""
    text = "You can change the address by setting the `client` attribute:\n\n```python\nx = 1\n```\n\nFor example:\n\n```\ny\n```\n"
    listed = "The following arguments can be given to the client:\n\n- `one` stands for the first."

    assert split_sentences(text) == ["You can change the address by setting the `client` attribute."]
    assert split_sentences(listed) == ["`one` stands for the first."]


def test_addresses_are_the_last_thing_to_be_quoted() -> None:
    """A reference has the words of the question in its title, and says nothing."""
    reference = (
        '"Holds live longer, say holds" (https://www.example.org/news/2016/how-long-do-holds-live-and-other-stories-1-6015191.html).'
    )

    assert "example.org" not in answer("How long do holds live?", f"{LEDGER}\n\n{reference}")
    assert "example.org" in answer("How long do holds live?", reference)


@pytest.mark.parametrize(
    ("markdown", "plain"),
    [
        ("![logo](a.png) **Bold** and *thin*", "logo Bold and thin"),
        ("snake_case_name stays", "snake_case_name stays"),
        ("> quoted [text][ref] here[^1]", "quoted text here"),
        ("<b>tag</b> 3 < 4 <!-- gone -->", "tag 3 < 4"),
        ('Such as `*.example.com`, or **all** by `hosts=["*"]`', 'Such as `*.example.com`, or all by `hosts=["*"]`'),
        ("Write `[text](address)` or `<b>` [here](a.md)", "Write `[text](address)` or `<b>` here"),
        ("[gone](a `b` c) but `this` stays \ue000", "gone but `this` stays"),
        ("``a ` [1](b)`` and `open [2](c)", "``a ` [1](b)`` and `open 2"),
    ],
)
def test_markup_goes_and_words_stay(markdown: str, plain: str) -> None:
    """What a reader would see."""
    assert clean(markdown) == plain


def test_best_sentence_answers_and_cites_its_passage() -> None:
    """The number is that of the passage the sentence is from."""
    assert answer("How long do holds live?", GUIDE, LEDGER).startswith("Holds live for ten minutes. [2]")


def test_nothing_is_said_twice() -> None:
    """Two sentences with the same words are one."""
    assert answer("How long do holds live?", LEDGER).count("ten minutes") == 1


@pytest.mark.parametrize("question", ["Who painted the Sistine Chapel?", "?", "What is the of?", "Wer gewann die Weltmeisterschaft?"])
def test_what_the_passages_do_not_say_is_not_answered(question: str) -> None:
    """No evidence, no answer."""
    assert answer(question, GUIDE, LEDGER) == ""


@pytest.mark.parametrize(
    ("question", "start"),
    [
        ("Who painted it?", "The documents"),
        ("Wer ist der Maler und warum?", "In den"),
        ("Qui est le peintre de la chapelle ?", "Les documents"),
    ],
)
async def test_no_answer_is_said_in_the_language_of_the_question(question: str, start: str) -> None:
    """The draft is complete, free, and claims nothing."""
    draft = Draft(lambda _: None)
    await ExtractiveModel(language).generate(Prompt("t", "", (), question, (), 10), Candidate("extractive", "extractive", 1, 1), 100, draft)

    assert draft.text.startswith(start)
    assert draft.finish_reason == "end_turn"
    assert "[" not in draft.text


async def test_answer_longer_than_allowed_is_cut_and_says_so() -> None:
    """At least one sentence, then the bound."""
    draft = Draft(lambda _: None)
    shown = tuple(passages("The gateway listens on port 8080. The gateway speaks gRPC too.", LEDGER))
    await ExtractiveModel(language).generate(
        Prompt("t", "", (), "What does the gateway listen on and speak?", shown, 10), Candidate("extractive", "extractive", 1, 1), 3, draft
    )

    assert draft.finish_reason == "max_tokens"
    assert len(draft.pieces) == 1


def similar(similarity: float | None, *texts: str) -> list[Passage]:
    return [replace(passage, similarity=similarity) for passage in passages(*texts)]


@pytest.mark.parametrize(
    ("question", "similarity", "is_answered"),
    [
        ("How long do holds live?", 0.5, True),
        ("How long do holds live?", 0.05, False),
        ("What happens to reservations after their lifetime when swept?", 0.7, True),
        ("What happens to reservations after their lifetime when swept?", 0.3, False),
        ("Who painted the Sistine Chapel?", 0.7, False),
    ],
)
def test_meaning_and_words_together_are_evidence(question: str, similarity: float, is_answered: bool) -> None:
    """Close in meaning makes up for other words, and the same words for little likeness; where no word is in common nothing is found."""
    assert bool(choose(question, similar(similarity, GUIDE, LEDGER))) is is_answered


def test_sentence_of_the_passage_nearer_in_meaning_is_preferred() -> None:
    """Of two that have the same words of the question."""
    far, near = similar(0.4, "The mill holds the corn of two farmers.")[0], similar(0.8, "", "The pond holds the water of one summer.")[1]
    (best, *_) = sorted(choose("What holds the summer?", [far, near]), key=lambda sentence: -sentence.passage)

    assert best.passage == 1
