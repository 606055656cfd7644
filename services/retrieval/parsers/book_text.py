"""EPUB books: the chapters in the order in which they are read, each as the page it is."""

import posixpath
from urllib.parse import unquote

from services.retrieval.domain import Extracted
from services.retrieval.parsers.charset import decoded
from services.retrieval.parsers.container import Container
from services.retrieval.parsers.html_text import parse_html
from services.retrieval.parsers.outline import Outline
from services.retrieval.parsers.rejection import rejected
from services.retrieval.parsers.xml_tree import Element, attribute, name_of, parse_tree

MEDIA_TYPE = "application/epub+zip"

_PAGES = frozenset({"application/xhtml+xml", "text/html", "text/x-oeb1-document"})


def parse_book(content: bytes) -> Extracted:
    """A book has no pages of its own: they depend on the reader's screen."""
    package = Container(content)
    if b"EncryptedData" in package.read("META-INF/encryption.xml") and not _only_fonts(package):
        raise rejected("the book is encrypted", cause="encrypted")
    root_file = next((attribute(file, "full-path") for file in _read(package, "META-INF/container.xml").iter("{*}rootfile")), "")
    book = _read(package, root_file)
    folder = posixpath.dirname(root_file)
    pages = {
        item.get("id") or "": posixpath.normpath(posixpath.join(folder, unquote(item.get("href") or "")))
        for item in book.iter("{*}item")
        if item.get("media-type") in _PAGES
    }
    title = next((element.text or "" for element in book.iter("{*}title")), "")
    outline = Outline()
    for reference in book.iter("{*}itemref"):
        page = pages.pop(reference.get("idref") or "", "")
        if page and package.has(page):
            outline.append(parse_html(decoded(package.read(page), html=True)), 1)
    return outline.extracted(MEDIA_TYPE, title)


def _read(package: Container, name: str) -> Element:
    if not package.has(name):
        raise rejected("the book's table of parts is missing", cause="malformed")
    return parse_tree(package.read(name))


def _only_fonts(package: Container) -> bool:
    """Fonts are often scrambled in books that anybody may read."""
    encrypted = parse_tree(package.read("META-INF/encryption.xml"))
    targets = [attribute(element, "URI").lower() for element in encrypted.iter() if name_of(element) == "CipherReference"]
    return all(target.endswith((".ttf", ".otf", ".woff", ".woff2")) for target in targets)
