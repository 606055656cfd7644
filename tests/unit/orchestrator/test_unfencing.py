"""A block of code around JSON is taken away while it is written, and nothing else is."""

import pytest

from services.orchestrator.unfencing import Unfencing

JSON = '{"a": "x``` \\"`\\\\", "b": [1, 2]}'


def shown(text: str, size: int) -> str:
    reading = Unfencing()
    return "".join(reading.feed(text[at : at + size]) for at in range(0, len(text), size))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(
    ("text", "seen"),
    [
        (JSON, JSON),
        (f" \n{JSON}\n", f" \n{JSON}\n"),
        (f"```json\n{JSON}\n```", JSON),
        (f"\n```\n{JSON}\n```\n\n", JSON),
        (f"```JSON  \r\n{JSON}\r\n```\r\n", JSON),
        (f"```json\n{JSON}```", JSON),
        ('```json\n{\n  "a": 1\n}\n```', '{\n  "a": 1\n}'),
        ("Here it is:\n```json\n{}\n```", "Here it is:\n```json\n{}\n```"),
        ("`{}`", "`{}`"),
        ("````\n{}\n````", "````\n{}\n````"),
        ("```json {}", "```json {}"),
        ("", ""),
    ],
)
def test_a_fence_is_not_shown_however_the_text_is_cut(text: str, seen: str, size: int) -> None:
    """Accents inside of strings are the answer's; a text without a fence at its very beginning is left alone."""
    assert shown(text, size) == seen


@pytest.mark.parametrize("size", [1, 3, 100])
def test_what_follows_a_fence_is_shown(size: int) -> None:
    """So that the grammar refuses it: it is an answer and something more."""
    assert "Hope" in shown(f"```json\n{JSON}\n```\nHope it helps.", size)
    assert shown("```json\n{}\n````", 1).startswith("{}`")


def test_nothing_of_a_text_without_a_fence_is_kept_back() -> None:
    """Each token leaves as it comes."""
    reading = Unfencing()

    assert [reading.feed(token) for token in ('{"', "a", '": ', "1", "}")] == ['{"', "a", '": ', "1", "}"]
    assert [Unfencing().feed(token) for token in ("[", "{", "1", '"')] == ["[", "{", "1", '"']


def test_what_is_kept_back_is_bounded() -> None:
    """Space without end is no fence."""
    reading = Unfencing()

    assert sum(len(reading.feed(" ")) for _ in range(1_000)) > 900
