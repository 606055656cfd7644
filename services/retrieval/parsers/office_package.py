"""The packages that Word, PowerPoint and Excel files are: parts, and which part refers to which. Not what the parts mean."""

import posixpath

from services.retrieval.parsers.container import Container
from services.retrieval.parsers.rejection import rejected
from services.retrieval.parsers.xml_tree import Element, name_of, parse_tree


def main_part(package: Container, expected: str) -> str:
    """Name of the part that the package is about; `expected` if the package does not say."""
    for kind, target in relations(package, "").values():
        if kind == "officeDocument" and package.has(target):
            return target
    if not package.has(expected):
        raise rejected("the file's main part is missing", cause="malformed")
    return expected


def part(package: Container, name: str) -> Element | None:
    """The root of a part, or None if there is no such part."""
    return parse_tree(package.read(name)) if name and package.has(name) else None


def relations(package: Container, name: str) -> dict[str, tuple[str, str]]:
    """What a part refers to, by relation id: the kind of the relation, and the name of the other part. What lies outside is left out."""
    folder, file = posixpath.split(name)
    root = part(package, posixpath.join(folder, "_rels", f"{file}.rels"))
    found: dict[str, tuple[str, str]] = {}
    if root is None:
        return found
    for relation in root:
        if name_of(relation) != "Relationship" or relation.get("TargetMode") == "External":
            continue
        target = relation.get("Target") or ""
        path = target.lstrip("/") if target.startswith("/") else posixpath.normpath(posixpath.join(folder, target))
        found[relation.get("Id") or ""] = ((relation.get("Type") or "").rpartition("/")[2], path)
    return found


def core_title(package: Container) -> str:
    """The title its author gave the document, if any."""
    root = part(package, "docProps/core.xml")
    return next((element.text or "" for element in root if name_of(element) == "title"), "") if root is not None else ""
