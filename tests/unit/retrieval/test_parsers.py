"""Files to text with structure."""

import math
import random
import struct

import pytest

from services.chassis.errors import DocumentRejected
from services.retrieval.domain import BlockKind, Extracted, Upload
from services.retrieval.parsers import read

MARKDOWN = """---
title: 'Named above'
---
# First

A paragraph
of two lines.

<!-- a note to authors -->

- one
- two

## Second `part`

| a | b |
|---|---|
| 1 | 2 |

```python
# not a heading
```
"""

HTML = """<!doctype html><html><head><title> A  page </title><style>p{}</style></head><body>
<nav>Home | About</nav><script>alert(1)</script>
<h1>Top</h1><p>Some <b>bold</b>\n words.</p>
<ul><li>one<ul><li>inner</li></ul></li><li>two</li></ul>
<h2>Below</h2><table><tr><th>k</th><th>v</th></tr><tr><td>a</td><td>1</td></tr></table>
<pre>  x = 1
  y = 2</pre><div>loose text<p>and a paragraph</div></body></html>"""


def kinds(extracted: Extracted) -> list[tuple[BlockKind, str]]:
    return [(block.kind, extracted.text[block.start : block.end]) for block in extracted.blocks]


def test_markdown_keeps_its_source_and_finds_its_blocks() -> None:
    """Offsets point into the file's own text; comments and front matter are no blocks; code is not searched for headings."""
    extracted = read(Upload(MARKDOWN.encode(), source_uri="a.md"))

    assert extracted.text == MARKDOWN
    assert extracted.title == "Named above"
    assert kinds(extracted) == [
        (BlockKind.HEADING, "# First"),
        (BlockKind.PARAGRAPH, "A paragraph\nof two lines."),
        (BlockKind.LIST, "- one\n- two"),
        (BlockKind.HEADING, "## Second `part`"),
        (BlockKind.TABLE, "| a | b |\n|---|---|\n| 1 | 2 |"),
        (BlockKind.CODE, "```python\n# not a heading\n```"),
    ]
    assert extracted.blocks[-1].heading_path == ("First", "Second part")


def test_html_gives_what_a_reader_sees() -> None:
    """Scripts, styles and navigation are gone; lists, tables and code keep their shape."""
    extracted = read(Upload(HTML.encode(), source_uri="a.html"))

    assert extracted.title == "A page"
    assert kinds(extracted) == [
        (BlockKind.HEADING, "Top"),
        (BlockKind.PARAGRAPH, "Some bold words."),
        (BlockKind.LIST, "- one\n  - inner\n- two"),
        (BlockKind.HEADING, "Below"),
        (BlockKind.TABLE, "k | v\na | 1"),
        (BlockKind.CODE, "  x = 1\n  y = 2"),
        (BlockKind.PARAGRAPH, "loose text"),
        (BlockKind.PARAGRAPH, "and a paragraph"),
    ]
    assert extracted.blocks[-1].heading_path == ("Top", "Below")


def test_plain_text_is_cut_at_empty_lines() -> None:
    """A short first line is the title."""
    extracted = read(Upload(b"A title\r\n\r\none\r\ntwo\r\n \r\nthree", source_uri="a.txt"))

    assert extracted.title == "A title"
    assert [text for _, text in kinds(extracted)] == ["A title", "one\ntwo", "three"]
    assert read(Upload(b'{\n  "name": "cut",\n', source_uri="a.txt")).title == "", "a line without a word names nothing"


@pytest.mark.parametrize(
    "content",
    [
        "Größe: 5 €\nund Öl".encode(),
        b"\xef\xbb\xbf" + "Größe: 5 €\nund Öl".encode(),
        b"\xff\xfe" + "Größe: 5 €\nund Öl".encode("utf-16-le"),
        b"\xfe\xff" + "Größe: 5 €\nund Öl".encode("utf-16-be"),
        "Größe: 5 €\nund Öl".encode("utf-16-be"),
        "Größe: 5 €\nund Öl".encode("cp1252"),
    ],
)
def test_text_is_read_in_the_encoding_it_is_in(content: bytes) -> None:
    """UTF-8, UTF-16 with and without a mark, and a legacy encoding give the same text."""
    assert read(Upload(content, source_uri="a.txt")).text == "Größe: 5 €\nund Öl"


UNMARKED = {
    "Russian": "Выдра спит на воде. Она держит детёныша на животе.\n",
    "Greek": "Η βίδρα κοιμάται πάνω στο νερό.\n",
    "Arabic": "ينام ثعلب الماء على السطح. ينتظر مالك الحزين السمك.\n",
    "Hebrew": "הלוטרה ישנה על המים. 123 דגים.\n",
    "Chinese": "水獭在水面上睡觉。一只苍鹭在等一条鱼。\n",
    "Japanese": "カワウソは水の上で眠っています。\n",
    "Korean": "수달은 물 위에서 잠을 잔다.\n",
}


@pytest.mark.parametrize("times", [1, 40])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("language", UNMARKED)
def test_utf_16_needs_no_mark_in_any_script(language: str, encoding: str, times: int) -> None:
    """Zeros are few where letters have none: what the bytes say in either order tells which it is."""
    text = UNMARKED[language] * times

    assert text == read(Upload(text.encode(encoding), source_uri="a.txt")).text


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<60i", *range(-30, 30)),
        struct.pack("<200h", *(round(3000 * math.sin(number / 9)) for number in range(200))),
        struct.pack("<30d", *(number / 7 for number in range(30))),
        bytes(range(4)),
        random.Random(4).randbytes(40) + b"\0\1",
        random.Random(5).randbytes(4000),
        b"\0asm\x01\0\0\0\x01\x07\x01\x60\x02\x7f\x7f\x01\x7f",
    ],
    ids=["integers", "sound", "floats", "four bytes", "few bytes", "many bytes", "program"],
)
def test_what_has_zeros_and_is_no_text_stays_binary(content: bytes) -> None:
    """In neither order."""
    with pytest.raises(DocumentRejected) as refused:
        read(Upload(content, source_uri="a.txt"))

    assert "binary" == refused.value.metadata["cause"]


def test_a_page_is_read_in_the_encoding_it_declares() -> None:
    """Two legacy encodings that only the declaration tells apart."""
    page = '<html><head><meta charset="iso-8859-2"></head><body><p>Łódź i żółć</p></body></html>'

    assert read(Upload(page.encode("iso-8859-2"), source_uri="a.html")).text == "Łódź i żółć"


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("a.txt", b"", "empty"),
        ("a.md", b" \n\t\n", "empty"),
        ("a.html", b"<html><body><script>x</script></body></html>", "empty"),
        ("a.txt", bytes(range(256)) * 20, "binary"),
        ("a.md", b"\x01\x02\x03\x04 text" * 10, "binary"),
        ("a.txt", b"\xff\xfeabc", "charset"),
        ("a.pdf", b"%PDF-1.7 ...", "truncated"),
        ("really-a-pdf.md", b"%PDF-1.7 ...", "truncated"),
        ("a.docx", b"PK\x03\x04....word/document.xml", "truncated"),
        ("a.png", b"\x89PNG\r\n\x1a\n....", "unsupported_type"),
        ("a.doc", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + "WordDocument".encode("utf-16-le") + b"\0\0", "unsupported_type"),
        ("a.gz", b"\x1f\x8b....", "archive"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_cause(name: str, content: bytes, cause: str) -> None:
    """Empty files, binaries called text and other formats are told apart."""
    with pytest.raises(DocumentRejected) as refused:
        read(Upload(content, source_uri=name))

    assert cause == refused.value.metadata["cause"]


def test_an_unsupported_format_is_named_with_those_that_are_supported() -> None:
    """The caller learns what to do instead."""
    with pytest.raises(DocumentRejected, match=r"PNG image is not supported; supported are Markdown, HTML, plain text"):
        read(Upload(b"\x89PNG\r\n\x1a\n", source_uri="report.docx"))


@pytest.mark.parametrize(
    ("upload", "media_type"),
    [
        (Upload(b"x", source_uri="a.md"), "text/markdown"),
        (Upload(b"<!DOCTYPE html><p>x", source_uri="saved.txt"), "text/html"),
        (Upload(b"<p>x", source_uri="https://example.org/a.html?x=1"), "text/html"),
        (Upload(b"# A\n\nx", title="No name"), "text/markdown"),
        (Upload(b"x", title="Release 1.2", media_type="text/markdown; charset=utf-8"), "text/markdown"),
        (Upload(b"Just words.", title="No name"), "text/plain"),
    ],
)
def test_the_format_is_told_by_content_and_name(upload: Upload, media_type: str) -> None:
    """Content wins where it is sure of itself, then the name, then what was declared."""
    assert media_type == read(upload).media_type


@pytest.mark.parametrize("content", ["<div>" * 100_000 + "<p>found</p>", "<b>" * 50_000 + "found", "<ul><li>" * 20_000 + "found"])
def test_a_page_that_is_nested_to_do_harm_is_refused_before_it_is_parsed(content: str) -> None:
    """The parser would stand still for minutes, and everything else with it."""
    with pytest.raises(DocumentRejected) as refused:
        read(Upload(content.encode(), source_uri="a.html"))

    assert refused.value.metadata["cause"] == "malformed"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.html", "<div>" * 3_000 + "<p>found"),
        ("a.html", "<ul><li>" * 2_000 + "found"),
        ("a.html", "<p>a paragraph that nobody closes" * 20_000 + " found"),
        ("a.md", ">" * 5_000 + " found"),
        ("a.md", "- " * 5_000 + "found"),
        ("a.md", "[a]: <b\n" * 5_000 + "found"),
        ("a.txt", " \n" * 50_000 + "found"),
    ],
)
def test_odd_shapes_are_read_whole(name: str, content: str) -> None:
    """Deep or endless structures are text like any other."""
    assert "found" in read(Upload(content.encode(), source_uri=name)).text
