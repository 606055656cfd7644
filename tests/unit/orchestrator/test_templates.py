"""Prompt templates: which one an answer uses, what may vary in it, and that none is ever changed."""

from pathlib import Path

import pytest

from services.orchestrator.compose import Template, read_template
from services.orchestrator.templates import FOLDER, filled, read_templates

RELEASED = {
    "answer.v1": "fbfb032ed6d5",
    "continue.v1": "23112ec3165c",
    "repair.v1": "6f47c7acd661",
    "rewrite.v1": "2954263bb8dc",
    "schema.v1": "1158af69206c",
    "summary.v1": "9a35e238f438",
    "title.v1": "5cbd2135ef6a",
}
"""Digest of each template as it was first used. One that must change is a new file with the next version, and a new line here."""


def test_a_template_that_was_used_is_never_changed() -> None:
    """Operations and cached answers name it by version and digest."""
    templates = read_templates("answer.v1")
    used = {templates.default.name, templates.rewrite.name, templates.summary.name, templates.title.name}
    released = {f"{name}-{digest}" for name, digest in RELEASED.items()}

    assert {read_template(path).name for path in FOLDER.glob("*.md")} == released
    assert used < released


def test_a_tier_may_have_a_template_of_its_own(tmp_path: Path) -> None:
    """From a folder of one's own; what that does not have comes from ours."""
    (tmp_path / "answer.long.v2.md").write_text("Answer at length in {{ language }}, tier {{tier}}.")
    templates = read_templates("answer.v1, smart=answer.long.v2", tmp_path)

    assert templates.answer("fast") == templates.answer("") == read_templates("answer.v1").default
    assert templates.answer("smart").name.startswith("answer.long.v2-")
    told = filled(templates.answer("smart"), {"language": "de", "tier": "smart", "collection": "c"})
    assert told == Template(templates.answer("smart").name, "Answer at length in de, tier smart.")


@pytest.mark.parametrize(
    ("choice", "text", "cause"),
    [
        ("", "x", "no prompt template"),
        ("smart=own.v1", "x", "no prompt template"),
        ("own.v1, answer.v1", "x", "two prompt templates"),
        ("own.v2", "x", "there is no prompt template"),
        ("own", "x", "is no name"),
        ("../own.v1", "x", "is no name"),
        ("own.v1", "  ", "is empty"),
        ("own.v1", "x" * 40_000, "more than"),
        ("own.v1", "Today is {{date}}.", "placeholders that nothing is known for: date"),
        ("own.v1", "{{}}", "placeholders"),
    ],
)
def test_a_wrong_choice_is_refused_when_the_process_starts(tmp_path: Path, choice: str, text: str, cause: str) -> None:
    """With the reason; nobody finds out by an answer."""
    (tmp_path / "own.v1.md").write_text(text)
    with pytest.raises(ValueError, match=cause):
        read_templates(choice, tmp_path)
