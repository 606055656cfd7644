"""PowerPoint files (pptx): one page a slide, its title as the heading, then text, tables and the speaker's notes."""

from services.retrieval.domain import Extracted
from services.retrieval.parsers.container import Container
from services.retrieval.parsers.office_package import core_title, main_part, part, relations
from services.retrieval.parsers.outline import Outline, words_of
from services.retrieval.parsers.xml_tree import Element, attribute, name_of

MEDIA_TYPE = "application/vnd.openxmlformats-officedocument.presentationml.presentation"

LIST_DEPTH_MAX = 20
_TITLES = frozenset({"title", "ctrTitle"})
# Numbers, dates and footers of every slide say nothing about this one.
_FURNITURE = frozenset({"sldNum", "dt", "ftr", "hdr"})


def parse_slides(content: bytes) -> Extracted:
    """Slides in the order in which they are shown."""
    package = Container(content)
    main = main_part(package, "ppt/presentation.xml")
    related = relations(package, main)
    outline = Outline()
    presentation = part(package, main)
    for relation_id in _relation_ids(presentation) if presentation is not None else ():
        _, target = related.get(relation_id, ("", ""))
        slide = part(package, target)
        outline.leave(1)
        outline.page()
        if slide is None:
            continue
        _slide(outline, slide)
        for kind, notes in relations(package, target).values():
            if kind == "notesSlide" and (root := part(package, notes)) is not None:
                _slide(outline, root, notes=True)
    return outline.extracted(MEDIA_TYPE, core_title(package))


def _relation_ids(presentation: Element) -> list[str]:
    """What names each slide's part: the namespaced one of two attributes called `id`."""
    return [
        next((str(value) for key, value in slide.attrib.items() if str(key).startswith("{") and str(key).endswith("}id")), "")
        for slide in presentation.iter("{*}sldId")
    ]


def _slide(outline: Outline, root: Element, *, notes: bool = False) -> None:
    shapes = [shape for shape in root.iter("{*}sp", "{*}graphicFrame") if not _is_fallback(shape)]
    # The title is not always the first shape, but what is read first.
    for shape in sorted(shapes, key=lambda shape: _placeholder(shape) not in _TITLES):
        kind = _placeholder(shape)
        if kind in _FURNITURE:
            continue
        if kind in _TITLES and not notes:
            outline.heading(1, _text(shape))
        elif (table := next(shape.iter("{*}tbl"), None)) is not None:
            outline.table([_text(cell) for cell in row.iter("{*}tc")] for row in table.iter("{*}tr"))
        else:
            _paragraphs(outline, shape)


def _paragraphs(outline: Outline, shape: Element) -> None:
    """A shape with several paragraphs is a list to a reader, with one it is a paragraph."""
    lines = [(_level(paragraph), words) for paragraph in shape.iter("{*}p") if (words := words_of(_text(paragraph)))]
    if len(lines) == 1:
        outline.paragraph(lines[0][1])
    else:
        outline.items([f"{'  ' * level}- {words}" for level, words in lines])


def _level(paragraph: Element) -> int:
    level = next((child.get("lvl") or "" for child in paragraph if name_of(child) == "pPr"), "")
    return min(int(level), LIST_DEPTH_MAX) if level.isdecimal() else 0


def _placeholder(shape: Element) -> str:
    found = next(shape.iter("{*}ph"), None)
    return attribute(found, "type")


def _is_fallback(shape: Element) -> bool:
    return any(name_of(above) == "Fallback" for above in shape.iterancestors())


def _text(element: Element) -> str:
    parts: list[str] = []
    for found in element.iter("{*}t", "{*}br", "{*}p"):
        parts.append(found.text or "" if name_of(found) == "t" else " ")
    return "".join(parts)
