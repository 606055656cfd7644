"""XML to a tree, without any of its dangers: no document types, no entities but the five, no network, bounded depth. No vocabulary."""

import re
from typing import TypeAlias

from lxml import etree

from services.retrieval.parsers.charset import decoded
from services.retrieval.parsers.rejection import rejected

Element: TypeAlias = etree._Element

_DECLARATION = re.compile(r"\s*<\?xml\b[^>]{0,200}?\?>")
_DECLARED_ENCODING = re.compile(rb"\A\s*<\?xml\b[^>]{0,200}?\bencoding\s*=\s*[\"']([A-Za-z0-9_.:-]{2,40})[\"']")
_BEFORE_ROOT = re.compile(r"\s+|<!--.*?-->|<\?.*?\?>", re.DOTALL)
_WELL_KNOWN = re.compile(
    r"<!DOCTYPE\s+[^\s\[>]{1,100}(?:\s+PUBLIC\s+(?:\"[^\"<>]{0,300}\"|'[^'<>]{0,300}')\s+(?:\"[^\"<>]{0,300}\"|'[^'<>]{0,300}'))?\s*>"
)


def parse_tree(content: bytes) -> Element:
    """The root element. Raises DocumentRejected: `dtd`, `malformed`, `too_large`, `charset`."""
    return tree_of(xml_text(content))


def xml_text(content: bytes) -> str:
    """The text of an XML file in the encoding that it declares."""
    declared = _DECLARED_ENCODING.match(content[:400])
    if declared and declared[1].lower().replace(b"_", b"-") not in (b"utf-8", b"utf8", b"utf-16", b"us-ascii", b"ascii"):
        try:
            return content.decode(declared[1].decode("ascii")).replace("\r\n", "\n").replace("\r", "\n")
        except (LookupError, UnicodeError):
            pass  # as with pages: go on as if nothing had been said
    return decoded(content, html=False)


def tree_of(text: str) -> Element:
    """The root element of XML that has been decoded. Its declaration means nothing any more."""
    text = text[match.end() :] if (match := _DECLARATION.match(text)) else text
    text = _without_doctype(text)
    # entities and document types were refused above; the options are the second lock on the same door.
    parser = etree.XMLParser(
        encoding="utf-8", resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False, remove_comments=True, remove_pis=True
    )
    try:
        root = etree.fromstring(text.encode("utf-8", "replace"), parser)
    except etree.XMLSyntaxError as error:
        raise _rejection(error, whole=text.rstrip().endswith(">")) from None
    if root is None:
        raise rejected("the XML has no root element", cause="malformed")
    return root


def name_of(element: Element) -> str:
    """The tag without its namespace; empty for what is no element."""
    tag = element.tag
    return tag.rpartition("}")[2] if isinstance(tag, str) else ""


def attribute(element: Element | None, name: str) -> str:
    """The attribute of that local name, whatever its namespace; empty if there is none, or no element."""
    if element is None:
        return ""
    for key, value in element.attrib.items():
        if str(key).rpartition("}")[2] == name:
            return str(value)
    return ""


def _without_doctype(text: str) -> str:
    """`text` without a document type that only names a well-known one; any other is refused."""
    place = 0
    while match := _BEFORE_ROOT.match(text, place):
        place = match.end()
    if not text.startswith("<!", place):
        return text
    known = _WELL_KNOWN.match(text, place)
    if known is None:
        raise rejected("the XML declares entities or a document type of its own; neither is followed", cause="dtd")
    return text[known.end() :]


def _rejection(error: etree.XMLSyntaxError, *, whole: bool) -> Exception:
    # The parser's message quotes the file, so only its number is looked at.
    kind = error.code
    codes = etree.ErrorTypes
    if kind == codes.ERR_NO_MEMORY:
        return MemoryError()
    if not whole or kind in (codes.ERR_DOCUMENT_END, codes.ERR_TAG_NOT_FINISHED, codes.ERR_LTSLASH_REQUIRED):
        return rejected("the XML ends before it is complete", cause="truncated")
    return rejected("the XML is broken or nested too deeply", cause="malformed")
