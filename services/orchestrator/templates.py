"""The prompt templates: files with a version in their name, which of them an answer uses, and what may vary in them. It renders no prompt.

A template that was used is never changed: a new text is a new file with the next version.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from services.orchestrator.compose import Template, read_template

FOLDER = Path(__file__).parent / "prompts"
TEMPLATE_BYTES_MAX = 32_768
PLACEHOLDERS = frozenset({"collection", "language", "tier"})
"""What may stand in a template, as `{{language}}`. All are part of the answer cache's key, and none changes from one question to the
next of the same kind: what does would break the provider's prompt cache."""
_NAME = re.compile(r"[a-z][a-z0-9_]*(?:\.[a-z][a-z0-9_]*)*\.v[1-9][0-9]{0,3}")
_PLACEHOLDER = re.compile(r"\{\{\s*(.*?)\s*\}\}")


@dataclass(frozen=True, slots=True)
class Templates:
    """The templates of this process."""

    default: Template
    by_tier: Mapping[str, Template]
    rewrite: Template
    summary: Template
    title: Template

    def answer(self, tier: str) -> Template:
        """The instructions for an answer of a tier, as written."""
        return self.by_tier.get(tier, self.default)


def read_templates(choice: str, folder: Path = FOLDER) -> Templates:
    """Read what is used from `folder`; what it does not have comes from ours.

    `choice` names the template of answers, and others for single tiers: `answer.v1, smart=answer.long.v2`. Raises ValueError for a name
    that is none, a file that is not there, empty or too large, and a placeholder that nothing is known for.
    """
    default, by_tier = "", dict[str, str]()
    for part in filter(None, (part.strip() for part in choice.split(","))):
        tier, equals, name = (side.strip() for side in part.rpartition("="))
        if not equals and default:
            raise ValueError(f"two prompt templates for the same answers: {default}, {name}")
        if equals:
            by_tier[tier] = name
        else:
            default = name
    if not default:
        raise ValueError("no prompt template is named for the tiers that have none of their own")
    return Templates(
        default=_read(default, folder),
        by_tier={tier: _read(name, folder) for tier, name in by_tier.items()},
        rewrite=_read("rewrite.v1", FOLDER),
        summary=_read("summary.v1", FOLDER),
        title=_read("title.v1", FOLDER),
    )


def _read(name: str, folder: Path) -> Template:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of a prompt template: answer.v1, answer.long.v2")
    path = next((path for path in (folder / f"{name}.md", FOLDER / f"{name}.md") if path.is_file()), None)
    if path is None:
        raise ValueError(f"there is no prompt template {name}.md in {folder}")
    if path.stat().st_size > TEMPLATE_BYTES_MAX:
        raise ValueError(f"the prompt template {name}.md has more than {TEMPLATE_BYTES_MAX} bytes")
    template = read_template(path)
    if not template.system:
        raise ValueError(f"the prompt template {name}.md is empty")
    if unknown := sorted(set(_PLACEHOLDER.findall(template.system)) - PLACEHOLDERS):
        raise ValueError(f"the prompt template {name}.md has placeholders that nothing is known for: {', '.join(unknown)}")
    return template


def filled(template: Template, values: Mapping[str, str]) -> Template:
    """The template with its placeholders said. Its name stays: it is known by its text as written."""
    if "{{" not in template.system:
        return template
    return Template(template.name, _PLACEHOLDER.sub(lambda match: values[match[1]], template.system))
