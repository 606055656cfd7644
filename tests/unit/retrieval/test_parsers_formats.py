"""Each format to text with structure: what a reader sees, where it stands, and on which page."""

import pytest

from services.retrieval.domain import BlockKind, Extracted, Upload
from services.retrieval.parsers import read
from tests.fakes.documents import (
    WORD,
    book,
    half_scanned_pdf,
    opendocument,
    pdf,
    row,
    shape,
    slides,
    word,
    words,
    workbook,
    zipped,
)

H, P, L, T, C = BlockKind.HEADING, BlockKind.PARAGRAPH, BlockKind.LIST, BlockKind.TABLE, BlockKind.CODE


def told(content: bytes | str, name: str) -> Extracted:
    """What is read, after its offsets were held against its text."""
    extracted = read(Upload(content.encode() if isinstance(content, str) else content, source_uri=name))
    last = 0
    for block in extracted.blocks:
        assert last <= block.start < block.end <= len(extracted.text)
        last = block.end
    return extracted


def blocks(extracted: Extracted) -> list[tuple[BlockKind, str]]:
    return [(block.kind, extracted.text[block.start : block.end]) for block in extracted.blocks]


def paths(extracted: Extracted) -> dict[str, tuple[str, ...]]:
    return {extracted.text[block.start : block.end]: block.heading_path for block in extracted.blocks}


def test_word_has_headings_lists_tables_headers_and_notes() -> None:
    """Headings by style, by what a style is based on and by level; deleted text is gone, and what stands around comes last."""
    styles = (
        '<w:style w:styleId="H1"><w:name w:val="heading 1"/></w:style>'
        '<w:style w:styleId="Own"><w:name w:val="Our heading"/><w:basedOn w:val="H1"/></w:style>'
    )
    begins = '<w:vMerge w:val="restart"/>'
    cell = "<w:tc><w:tcPr>{}</w:tcPr>{}</w:tc>".format
    table = (
        f"<w:tbl><w:tr>{cell('', words('Name'))}{cell('', words('Place'))}</w:tr>"
        f"<w:tr>{cell(begins, words('Ann'))}{cell('', words('Bonn'))}</w:tr>"
        f"<w:tr>{cell('<w:vMerge/>', words('unseen'))}{cell('', words('Ulm'))}</w:tr><w:tr>{cell('', words('Bo'))}</w:tr></w:tbl>"
    )
    item = '<w:numPr><w:ilvl w:val="{}"/><w:numId w:val="1"/></w:numPr>'.format
    body = (
        words("Top", '<w:pStyle w:val="Own"/>')
        + words("Below", '<w:outlineLvl w:val="1"/>')
        + "<w:p><w:r><w:t>kept</w:t></w:r><w:del><w:r><w:t>deleted</w:t></w:r></w:del>"
        + "<w:ins><w:r><w:tab/><w:t>added</w:t></w:r></w:ins></w:p>"
        + words("one", item(0))
        + words("inner", item(1))
        + table
    )
    header = (
        "word/header1.xml",
        f'<w:hdr xmlns:w="{WORD}">{words("On top")}</w:hdr>',
    )
    extracted = told(word(body, header, styles=styles), "a.docx")

    assert blocks(extracted) == [
        (H, "Top"),
        (H, "Below"),
        (P, "kept added"),
        (L, "- one\n  - inner"),
        (T, "Name | Place\nAnn | Bonn\n | Ulm\nBo"),
        (P, "On top"),
    ]
    assert paths(extracted)["kept added"] == ("Top", "Below")
    assert paths(extracted)["On top"] == ()
    assert extracted.title == "Top"


def test_a_table_of_tables_is_read_cell_by_cell() -> None:
    """Its inner tables are tables, and nothing is said twice."""
    inner = f"<w:tbl><w:tr><w:tc>{words('a')}</w:tc><w:tc>{words('b')}</w:tc></w:tr></w:tbl>"
    extracted = told(word(f"<w:tbl><w:tr><w:tc>{words('before')}{inner}</w:tc><w:tc>{words('after')}</w:tc></w:tr></w:tbl>"), "a.docx")

    assert blocks(extracted) == [(P, "before"), (T, "a | b"), (P, "after")]


def test_slides_are_pages_in_the_order_in_which_they_are_shown() -> None:
    """A slide's title is its heading, wherever it stands among the shapes; footers are left out."""
    second = shape("one", "two") + shape("12", kind="sldNum") + shape("Second", kind="title")
    extracted = told(slides(second, shape("First", kind="ctrTitle") + shape("alone")), "a.pptx")

    assert blocks(extracted) == [(H, "First"), (P, "alone"), (H, "Second"), (L, "- one\n- two")]
    assert [extracted.text[start:].split("\n")[0] for start in extracted.page_starts] == ["First", "Second"]
    assert paths(extracted)["- one\n- two"] == ("Second",)


def test_a_workbook_is_its_sheets_and_a_long_table_says_its_header_again() -> None:
    """Every block of a long table can be read alone."""
    rows = row(1, "City", "People") + "".join(row(number, f"city number {number} of the list", str(number)) for number in range(2, 60))
    extracted = told(workbook(("Cities", rows), ("Empty", ""), ("More", row(1, "a", "2.5"))), "a.xlsx")
    tables = [text for kind, text in blocks(extracted) if kind is T]

    assert [text for kind, text in blocks(extracted) if kind is H] == ["Cities", "More"]
    assert len(tables) > 2
    assert all(text.startswith("City | People\n") for text in tables[:-1])
    assert "city number 59 of the list | 59" in tables[-2]
    assert tables[-1] == "a | 2.5"


def test_opendocument_texts_and_presentations() -> None:
    """Headings have levels, lists nest, repeated cells and spaces are bounded, slides are pages."""
    body = (
        '<text:h text:outline-level="1">Top</text:h><text:p>two<text:s text:c="999999999"/>words</text:p>'
        "<text:list><text:list-item><text:p>one</text:p><text:list><text:list-item><text:p>inner</text:p></text:list-item></text:list>"
        "</text:list-item></text:list><table:table><table:table-row><table:table-cell><text:p>a</text:p></table:table-cell>"
        '<table:table-cell table:number-columns-repeated="2"><text:p>b</text:p></table:table-cell></table:table-row></table:table>'
    )

    assert blocks(told(opendocument(body), "a.odt")) == [(H, "Top"), (P, "two words"), (L, "- one\n  - inner"), (T, "a | b | b")]
    shown = told(
        opendocument("<draw:page><text:p>1st</text:p></draw:page><draw:page><text:p>2nd</text:p></draw:page>", "presentation"), "a"
    )
    assert [shown.text[start:][:3] for start in shown.page_starts] == ["1st", "2nd"]


def test_a_book_is_read_in_its_own_order() -> None:
    """Chapters as the spine has them, each by the rules of HTML."""
    extracted = told(book("<h1>Two</h1><p>later</p>", "<h1>One</h1><p>at first</p>"), "a.epub")

    assert blocks(extracted) == [(H, "One"), (P, "at first"), (H, "Two"), (P, "later")]
    assert paths(extracted)["later"] == ("Two",)
    assert extracted.title == "The book"


@pytest.mark.parametrize(("pages", "unread"), [("tt", ()), ("tpetpp", (2, 5, 6)), ("pt", (1,)), ("tee", ())])
def test_a_pdf_says_which_of_its_pages_are_pictures(pages: str, unread: tuple[int, ...]) -> None:
    """Nothing on them will be found; an empty page hides nothing."""
    extracted = told(half_scanned_pdf(pages), "a.pdf")

    assert (unread, len(pages)) == (extracted.unread_pages, len(extracted.page_starts))


def test_pdf_has_pages_headings_and_whole_words() -> None:
    """Lines run on into paragraphs, words cut at the end of a line are whole again, large letters are headings."""
    body = [(50, 700, 10, "The first line of this paragraph is about retrie-"), (50, 688, 10, "val of documents and goes on for a while.")]
    extracted = told(pdf([(50, 740, 18, "A heading"), *body], [(50, 700, 10, "On the second page there is more to read.")]), "a.pdf")

    assert blocks(extracted) == [
        (H, "A heading"),
        (P, "The first line of this paragraph is about retrieval of documents and goes on for a while."),
        (P, "On the second page there is more to read."),
    ]
    assert [extracted.text[start:].split()[0] for start in extracted.page_starts] == ["A", "On"]
    assert extracted.blocks[-1].heading_path == ("A heading",)


def test_columns_written_line_by_line_are_read_one_after_the_other() -> None:
    """The file holds the lines of two columns alternately; a reader reads the left one first."""
    lines = []
    for number in range(20):
        lines.append((320.0, 700 - 14.0 * number, 10, f"right column has line {number:02d}, as above"))
        lines.append((50.0, 693 - 14.0 * number, 10, f"left column has line {number:02d}, as below"))
    text = " ".join(told(pdf(lines), "a.pdf").text.split())

    assert text.index("left column has line 19") < text.index("right column has line 00")
    assert text.index("left column has line 03") < text.index("left column has line 04")


def test_raised_words_stay_in_their_lines() -> None:
    """However high they are: they stand where the line goes on, and are no second column."""
    lines = []
    for number in range(12):
        lines.append((50.0, 700 - 30.0 * number, 10, f"the beginning of line {number:02d} is long,"))
        lines.append((205.0, 706 - 30.0 * number, 10, f"raised words of {number:02d} end it"))
    text = " ".join(told(pdf(lines), "a.pdf").text.split())

    assert all(f"line {number:02d} is long, raised words of {number:02d} end it" in text for number in range(12))


def test_running_heads_are_said_once() -> None:
    """The same line at the same place of every page but for its number; what differs stays."""
    pages = [
        [(50.0, 780.0, 9, f"Annual report {n}"), (50.0, 700.0, 10, f"Section {'abcdef'[n]} speaks of its own matter.")] for n in range(6)
    ]
    text = told(pdf(*pages), "a.pdf").text

    assert text.count("Annual report") == 1
    assert all(f"Section {letter} speaks" in text for letter in "abcdef")


def test_tables_as_text_by_whatever_separates_them() -> None:
    """Quotes, separators within quotes, and a byte order mark."""
    assert blocks(told('\ufeffname;say\nAnn;"a;b"\nBo;c\n', "a.csv")) == [(T, "name | say\nAnn | a;b\nBo | c")]
    assert blocks(told("a\tb\n1\t2\n", "a.tsv")) == [(T, "a | b\n1 | 2")]
    assert told("a,b,c\n1,2,3\n4,5,6\n", "unnamed").media_type == "text/csv"


@pytest.mark.parametrize(
    ("content", "first"),
    [
        ("mass;price\n1,5;2,5\n1,7;2,9\n3,5;4,5\n8,1;9,2\n", "1,5 | 2,5"),
        ("mass\tprice\n1,5\t2,5\n1,7\t2,9\n3,5\t4,5\n8,1\t9,2\n", "1,5 | 2,5"),
        ("sep=;\nmass;price\n1,5;2,5\n", "1,5 | 2,5"),
        ("sep=|\r\nmass|price\r\n1;5|2;5\r\n", "1;5 | 2;5"),
    ],
)
def test_a_decimal_comma_separates_no_cells(content: str, first: str) -> None:
    """The sign that cuts every row the same does, header included, or the one that the file itself names; the naming is no row."""
    assert ["mass | price", first] == told(content, "a.csv").text.split("\n")[:2]


def test_json_keeps_its_names_and_its_numbers() -> None:
    """One line a value; nothing is rounded; what is long is a section of its own."""
    text = (
        '{"title": "Deed", "sum": 1234567890123456789.10, "tags": ["a", "b"], "seller": {"name": "Ann", "id": null}, "body": {"t": "%s"}}'
    )
    extracted = told(text % ("word " * 400), "a.json")

    assert extracted.title == "Deed"
    assert blocks(extracted)[0] == (L, "title: Deed\nsum: 1234567890123456789.10\ntags: a, b\nseller:\n  name: Ann\n  id: null")
    assert extracted.blocks[-1].heading_path == ("body",)
    assert blocks(told('{"a": 1}\n{"a": 2}\n', "a.jsonl")) == [(L, "a: 1"), (L, "a: 2")]


def test_xml_keeps_the_names_of_its_values() -> None:
    """Elements with text only are values; attributes too; mixed ones are prose."""
    extracted = told(
        '<?xml version="1.0"?><shop><title>Tea</title><item id="7">Green</item><note>Buy <b>now</b> or later</note></shop>', "a.xml"
    )

    assert blocks(extracted) == [(L, "title: Tea\nitem:\n  id: 7\n  text: Green\nnote: Buy now or later")]
    assert extracted.title == "Tea"


def test_mail_is_its_headers_its_text_and_its_attachments() -> None:
    """The plain form of the text is read, not the page as well; attached texts are read, others named."""
    mail = (
        "From: Ann <ann@example.org>\nTo: Bo\nSubject: =?utf-8?q?Gr=C3=BC=C3=9Fe?=\nMIME-Version: 1.0\n"
        'Content-Type: multipart/mixed; boundary="m"\n\n--m\nContent-Type: multipart/alternative; boundary="a"\n\n'
        "--a\nContent-Type: text/plain; charset=utf-8\n\nThe plain words.\n--a\nContent-Type: text/html\n\n<p>The page words.</p>\n--a--\n"
        '--m\nContent-Type: text/plain\nContent-Disposition: attachment; filename="notes.txt"\n\nAttached words.\n'
        '--m\nContent-Type: image/png\nContent-Disposition: attachment; filename="../../cat.png"\n\nxxxx\n--m--\n'
    )
    extracted = told(mail, "a.eml")

    assert extracted.title == "Grüße"
    assert blocks(extracted)[1:] == [
        (P, "From: Ann <ann@example.org>\nTo: Bo\nSubject: Grüße"),
        (P, "The plain words."),
        (P, "Attachment: notes.txt"),
        (H, "notes.txt"),
        (P, "Attached words."),
        (P, "Attachment: cat.png"),
    ]


@pytest.mark.parametrize(
    "inner", ["From: Bo\nSubject: Inner\n\nWords within.\n", "RnJvbTogQm8KU3ViamVjdDogSW5uZXIKCldvcmRzIHdpdGhpbi4K", "****"]
)
def test_a_mail_within_a_mail_is_read_also_where_its_sender_encoded_it(inner: str) -> None:
    """No mail may be encoded as a whole, and some programs do it; what is broken is only named."""
    encoding = "" if inner.startswith("From") else "Content-Transfer-Encoding: base64\n"
    mail = (
        'From: Ann\nSubject: Outer\nMIME-Version: 1.0\nContent-Type: multipart/mixed; boundary="m"\n\n--m\nContent-Type: text/plain\n\n'
        f"Words without.\n--m\nContent-Type: message/rfc822\n{encoding}\n{inner}\n--m--\n"
    )
    text = told(mail, "a.eml").text

    assert "Words without." in text
    assert inner.startswith("*") or "Subject: Inner\n\nWords within." in text
    assert inner.startswith("From") or inner not in text


@pytest.mark.parametrize(
    ("kind", "content", "expected"),
    [
        ("message/rfc822", "From: Bo\nSubject: Inner\n\nWords within.", "Subject: Inner\n\nWords within."),
        ('image/png; name="cat.png"', "xxxx", "Attachment: cat.png"),
        ("text/plain", "", "Subject: Outer"),
    ],
)
def test_a_mail_that_is_nothing_but_what_it_brings_is_read_too(kind: str, content: str, expected: str) -> None:
    """A mail or a file as the whole of a mail, without parts around it."""
    mail = f"From: Ann\nSubject: Outer\nMIME-Version: 1.0\nContent-Type: {kind}\n\n{content}\n"

    assert told(mail, "a.eml").text.endswith(expected)


def test_rich_text_is_paragraphs_and_tables() -> None:
    """In the code page that it names."""
    extracted = told(rb"{\rtf1\ansi\ansicpg1251 {\b First}\par \'cf\'f0\par\trowd\cellx1\cellx2 a\cell b\cell\row}", "a.rtf")

    assert blocks(extracted) == [(P, "First"), (P, "Пр"), (T, "a | b")]


def test_structured_text_has_headings_by_their_order_and_opens_nothing() -> None:
    """The text is the source; what an include names is not looked for."""
    source = (
        ".. include:: /etc/passwd\n\n===\nTop\n===\n\nRun::\n\n    code here\n\n- one\n- two\n\nBelow\n-----\n\nText.\n\n"
        ".. a comment\n\n=== ===\nA   B\n=== ===\n"
    )
    extracted = told(source, "a.rst")

    assert extracted.text == source
    assert blocks(extracted) == [
        (P, ".. include:: /etc/passwd"),
        (H, "===\nTop\n==="),
        (P, "Run::"),
        (C, "    code here"),
        (L, "- one\n- two"),
        (H, "Below\n-----"),
        (P, "Text."),
        (T, "=== ===\nA   B\n=== ==="),
    ]
    assert extracted.blocks[6].heading_path == ("Top", "Below")
    assert extracted.title == "Top"


def test_code_is_kept_by_definition() -> None:
    """By name or by its first line; a comment above a definition belongs to it."""
    source = "#!/usr/bin/env python3\nimport os\n\n# why\ndef first():\n    a = 1\n\n    return a\n\nclass Second:\n    pass\n"
    extracted = told(source, "tool")

    assert extracted.media_type == "text/x-python"
    assert extracted.text == source
    assert [block.heading_path for block in extracted.blocks] == [(), ("first",), ("Second",)]
    assert blocks(extracted)[1] == (C, "# why\ndef first():\n    a = 1\n\n    return a")
    assert told("all:\n\techo\n", "Makefile").media_type == "text/x-make"


@pytest.mark.parametrize(
    ("content", "name", "media_type"),
    [
        (pdf([(50, 700, 12, "words")]), "a.txt", "application/pdf"),
        (b"junk before\n" + pdf([(50, 700, 12, "words")]), "a.bin", "application/pdf"),
        (word(words("x")), "a.pdf", "application/vnd.openxmlformats-officedocument.wordprocessingml.document"),
        (b"just words", "a.pdf", "text/plain"),
        (b"just words", "a.docx", "text/plain"),
        (b"just words", "a.json", "text/plain"),
        (b"just words", "a.xml", "text/plain"),
        (b"just words", "a.eml", "text/plain"),
        (b"{\\rtf1 words}", "a.doc", "application/rtf"),
        (b'{"a": 1}', "unnamed", "application/json"),
        (b'<?xml version="1.0"?><a>b</a>', "unnamed", "application/xml"),
        (b"<html><body>x</body></html>", "a.xml", "text/html"),
        (b"Received: x\nFrom: a\nTo: b\nSubject: c\n\nd", "unnamed", "message/rfc822"),
        (b"Subject: only a note\nDate: today\n\ntext", "a.txt", "text/plain"),
    ],
)
def test_content_tells_the_format_before_the_name_does(content: bytes, name: str, media_type: str) -> None:
    """A wrong name does no harm as long as the content can be read."""
    assert media_type == told(content, name).media_type


SURE = {
    "text/html": "<!DOCTYPE html>\n<html><head><title>T</title></head><body><h1>Head</h1><p>Some text.</p></body></html>",
    "application/xml": '<?xml version="1.0"?>\n<root><item>One</item><item>Two</item></root>',
    "application/json": '{"name": "Ada", "age": 36}',
    "application/x-ndjson": '{"name": "Ada"}\n{"name": "Bob"}\n',
    "message/rfc822": "Received: from a by b\nFrom: ada@a.org\nTo: bob@b.org\nSubject: Hello\nMessage-ID: <1@a>\n\nThe body.\n",
}


@pytest.mark.parametrize("suffix", [".txt", ".md", ".html", ".rst", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".eml", ".log", ""])
@pytest.mark.parametrize("media_type", SURE)
@pytest.mark.parametrize("declared", ["", "text/markdown", "text/csv"])
def test_no_name_and_no_declared_type_hides_what_a_text_plainly_is(media_type: str, suffix: str, declared: str) -> None:
    """But XML that is called HTML is read as leniently as HTML is."""
    lenient = (media_type, suffix) == ("application/xml", ".html")
    extracted = read(Upload(SURE[media_type].encode(), source_uri=f"a{suffix}", media_type=declared))

    assert ("text/html" if lenient else media_type) == extracted.media_type
    assert [] == [sign for sign in ("<p>", "<item>", '{"', "Received:") if sign in extracted.text]


@pytest.mark.parametrize(
    ("content", "name", "media_type"),
    [
        ("name,age,city\nAda,36,London\nBob,40,Paris\n", "a.txt", "text/csv"),
        ("name,age,city\nAda,36,London\nBob,40,Paris\n", "a.md", "text/csv"),
        ("name,age,city\nAda,36,London\nBob,40,Paris\n", "a.html", "text/csv"),
        ("# Head\n\nOne.\n\n- a\n- b\n", "a.html", "text/markdown"),
        ("One paragraph.\n\nAnother < this.\n", "a.html", "text/plain"),
        ("<h1>Head</h1>\n<p>Some text.</p>\n", "a.txt", "text/html"),
        ("<h1>Head</h1>\n<p>Some text.</p>\n", "a.json", "text/html"),
        # What content cannot tell is left to the name.
        ("# Head\n\nOne.\n\n- a\n- b\n", "a.txt", "text/plain"),
        ("Just words, no more.\n", "a.md", "text/markdown"),
        ("<h1>Head</h1>\n\nSome *text*.\n", "a.md", "text/markdown"),
        ("| a | b |\n|---|---|\n| 1 | 2 |\n", "a.md", "text/markdown"),
        ("- a, b, c\n- d, e, f\n- g, h, i\n", "a.txt", "text/plain"),
        ("name\nAda\nBob\n", "a.csv", "text/csv"),
        ('{"a": 1}\n{"b": 2}\n{"c": 3}\nand then it stopped\n', "a.log", "text/plain"),
        ('{"a": [1, 2', "a.txt", "text/plain"),
        ("[link](https://a.example) and more\n", "a.md", "text/markdown"),
        ('{"a": 1}', "a.yaml", "text/x-yaml"),
    ],
)
def test_a_name_counts_where_the_content_leaves_it_open(content: str, name: str, media_type: str) -> None:
    """Markdown against plain text, a table of one column, code."""
    assert media_type == told(content, name).media_type


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "iso-8859-1"])
def test_xml_is_read_in_the_encoding_that_it_declares(encoding: str) -> None:
    """The declaration counts, a mark more."""
    text = f'<?xml version="1.0" encoding="{encoding.removesuffix("-sig")}"?><a>Größe</a>'

    assert "Größe" in told(text.encode(encoding), "a.xml").text


def test_a_standard_document_type_is_no_danger() -> None:
    """It is passed over, not fetched."""
    svg = '<?xml version="1.0"?><!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "http://www.w3.org/svg11.dtd"><svg><text>words</text></svg>'

    assert "words" in told(svg, "a.xml").text


def test_a_package_whose_parts_are_elsewhere_is_still_found() -> None:
    """The relations of the package say which part is the main one."""
    package = zipped(
        [
            (
                "[Content_Types].xml",
                '<Types><Override ContentType="application/x.wordprocessingml.document.main+xml"/></Types>',
            ),
            ("_rels/.rels", '<Relationships><Relationship Id="r" Type="x/officeDocument" Target="/word/document2.xml"/></Relationships>'),
            (
                "word/document2.xml",
                f'<w:document xmlns:w="{WORD}">{words("found")}</w:document>',
            ),
        ]
    )

    assert told(package, "a").text == "found"
