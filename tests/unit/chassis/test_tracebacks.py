"""A failure in the log says where and what, and nothing that anybody asked."""

import logging

from structlog.testing import capture_logs

from services.chassis.errors import ModelFailed
from services.chassis.library_logs import Wordless
from services.chassis.tracebacks import told, without_words

QUESTION = "why-does-my-knee-hurt"


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    try:
        raise error from cause
    except BaseException as caught:
        return caught


def test_words_of_others_are_left_out() -> None:
    """Of the error, of its cause, of its context and of those in a group; where it was raised is said."""
    cause = raised(KeyError(QUESTION))
    grouped = raised(ExceptionGroup(QUESTION, [raised(ValueError(f"could not convert {QUESTION!r}"), cause)]))
    said = told(grouped)

    assert QUESTION not in said
    assert [kind for kind in ("ExceptionGroup", "ValueError", "KeyError") if kind not in said] == []
    assert said.count("test_tracebacks.py") == 3
    assert "led to" in said


def test_our_own_words_and_the_systems_are_told() -> None:
    """They name providers, files and numbers."""
    assert told(raised(ModelFailed("the provider failed", provider="openai"))).endswith("ModelFailed: the provider failed")
    assert told(raised(FileNotFoundError(2, "No such file", "models.toml"))).endswith(
        "FileNotFoundError: [Errno 2] No such file: 'models.toml'"
    )


def test_a_chain_that_bites_its_tail_ends() -> None:
    """An error may be its own context's context."""
    first, second = ValueError("1"), ValueError("2")
    first.__context__, second.__context__ = second, first

    assert told(first) == "ValueError\n\nled to\n\nValueError"


def test_a_log_line_has_it_in_whatever_form_it_was_given() -> None:
    """True within a handler, an exception, what `sys.exc_info` gives, or nothing at all."""
    error = raised(ValueError(QUESTION))
    try:
        raise error
    except ValueError:
        inside = without_words(None, "error", {"event": "failed", "exc_info": True})
    given = [without_words(None, "error", {"event": "failed", "exc_info": value}) for value in (error, (ValueError, error, None))]

    for event in (inside, *given):
        assert event["exception"].endswith("ValueError")
        assert "exc_info" not in event
    assert without_words(None, "info", {"event": "well", "exc_info": None}) == {"event": "well"}
    assert without_words(None, "info", {"event": "well"}) == {"event": "well"}


def test_of_what_a_library_logs_the_place_is_told() -> None:
    """Warnings and errors, with what was raised; not a word of them."""
    library = logging.getLogger("some.library")
    library.handlers, library.propagate = [Wordless()], False
    with capture_logs() as lines:
        library.info("asked %s", QUESTION)
        library.warning(f"cannot read {QUESTION}")
        try:
            raise ValueError(QUESTION)
        except ValueError:
            library.exception("failed on %s", QUESTION)

    assert [(line["log_level"], line["event"], line["library"]) for line in lines] == [
        ("warning", "library_complained", "some.library"),
        ("error", "library_complained", "some.library"),
    ]
    assert all(line["place"].startswith("test_tracebacks.py:") for line in lines)
    assert QUESTION not in str([{key: value for key, value in line.items() if key != "exc_info"} for line in lines])
    assert QUESTION not in str([without_words(None, "error", dict(line)) for line in lines])
