"""Which questions lean on the conversation or on the clock."""

import pytest

from services.orchestrator.standalone import depends_on_history, depends_on_time, language


@pytest.mark.parametrize(
    "question",
    [
        "What does it do?",
        "How does it handle retries?",
        "And how long?",
        "Why?",
        "What about the second one?",
        "Can you explain that again?",
        "Tell me more.",
        "What did you say about ports?",
        "Is that also true for streaming?",
        "How do I install this package?",
        "What is my favourite colour?",
        "Translate that into German",
        "Und wie lange?",
        "Warum ist das so?",
        "Go on",
        "What does this error mean?",
        "Are there any?",
        "How do I get there?",
        "Is the timeout configured there?",
        "Is there a second limit on it?",
        "Are there upload limits for those?",
        "",
    ],
)
def test_question_that_leans_on_the_conversation_is_seen(question: str) -> None:
    """Pointers without a name, openers, talk about the talk, and questions that name nothing lean."""
    assert depends_on_history(question)


@pytest.mark.parametrize(
    "question",
    [
        "Which port does the gateway listen on?",
        "How does Docker keep its layers?",
        "What is the default timeout and how do I change it?",
        "How do I use basic authentication?",
        "How can I configure a proxy?",
        "What is the header that carries the trace id?",
        "Can I use a netrc file?",
        "What is Tailrace?",
        "Wie lange lebt ein Hold?",
        "Which header says that the answer was served from the cache?",
        "What does the NETRC environment variable do?",
        "What differences are there between httpx and requests for redirects?",
        "Is there a limit on uploads?",
    ],
)
def test_question_that_stands_alone_is_seen(question: str) -> None:
    """A pointer whose name is in the same question leans on nothing, nor does asking for help."""
    assert not depends_on_history(question)


@pytest.mark.parametrize(
    "question", ["What happened today?", "What is the latest version?", "Who is the current CEO?", "Was ist heute?", "news of this week"]
)
def test_question_about_now_is_seen(question: str) -> None:
    """Words of the clock make the answer depend on it."""
    assert depends_on_time(question)


@pytest.mark.parametrize("question", ["Which port does the gateway listen on?", "What is a nowcast?", "How are knowledge bases built?"])
def test_words_that_only_contain_the_clock_do_not_count(question: str) -> None:
    """Whole words, not parts of words."""
    assert not depends_on_time(question)


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What is the port of the gateway?", "en"),
        ("Was ist der Port und wie lange?", "de"),
        ("Quel est le port de la passerelle ?", "fr"),
        ("¿Cuál es el puerto de la pasarela?", "es"),
        ("Какой порт?", "cyrillic"),
        ("ポートは何ですか", "hiragana"),
        ("8080?", "none"),
        ("xyzzy", "latin"),
    ],
)
def test_language_is_told_by_little_words_or_script(question: str, expected: str) -> None:
    """Questions in two languages are never in one cache scope."""
    assert language(question) in (expected, "katakana" if expected == "hiragana" else expected)
