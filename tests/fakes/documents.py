"""Files of every format, made here by hand, as small as they can be and still say something."""

import io
import zipfile
import zlib
from collections.abc import Iterable

WORD = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
DRAWING = "http://schemas.openxmlformats.org/drawingml/2006/main"
SLIDES = "http://schemas.openxmlformats.org/presentationml/2006/main"
SHEETS = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
RELATION = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
RELATIONS = "http://schemas.openxmlformats.org/package/2006/relationships"


def zipped(members: Iterable[tuple[str, str | bytes]], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    """An archive of `members`, by name."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return packed.getvalue()


def relations(*targets: tuple[str, str, str]) -> str:
    """A part of relations: id, kind, target."""
    rows = "".join(f'<Relationship Id="{id_}" Type="{RELATION}/{kind}" Target="{target}"/>' for id_, kind, target in targets)
    return f'<Relationships xmlns="{RELATIONS}">{rows}</Relationships>'


def word(body: str, *more: tuple[str, str | bytes], styles: str = "") -> bytes:
    """A Word file with `body` in its main part."""
    return zipped(
        [
            ("_rels/.rels", relations(("r1", "officeDocument", "word/document.xml"))),
            ("word/document.xml", f'<w:document xmlns:w="{WORD}"><w:body>{body}</w:body></w:document>'),
            (
                "word/_rels/document.xml.rels",
                relations(("s", "styles", "styles.xml"), ("h", "header", "header1.xml"), ("f", "footnotes", "footnotes.xml")),
            ),
            ("word/styles.xml", f'<w:styles xmlns:w="{WORD}">{styles}</w:styles>'),
            *more,
        ]
    )


def words(text: str, properties: str = "") -> str:
    """A paragraph of Word."""
    return f"<w:p><w:pPr>{properties}</w:pPr><w:r><w:t>{text}</w:t></w:r></w:p>"


def slides(*bodies: str) -> bytes:
    """A presentation whose slides hold `bodies`; the last is shown first."""
    numbers = list(range(1, len(bodies) + 1))
    shown = "".join(f'<p:sldId id="{255 + number}" r:id="r{number}"/>' for number in reversed(numbers))
    return zipped(
        [
            ("_rels/.rels", relations(("r1", "officeDocument", "ppt/presentation.xml"))),
            (
                "ppt/presentation.xml",
                f'<p:presentation xmlns:p="{SLIDES}" xmlns:r="{RELATION}"><p:sldIdLst>{shown}</p:sldIdLst></p:presentation>',
            ),
            ("ppt/_rels/presentation.xml.rels", relations(*((f"r{number}", "slide", f"slides/slide{number}.xml") for number in numbers))),
            *(
                (
                    f"ppt/slides/slide{number}.xml",
                    f'<p:sld xmlns:p="{SLIDES}" xmlns:a="{DRAWING}"><p:cSld><p:spTree>{body}</p:spTree></p:cSld></p:sld>',
                )
                for number, body in zip(numbers, bodies, strict=True)
            ),
        ]
    )


def shape(*lines: str, kind: str = "body") -> str:
    """A shape of a slide, one paragraph a line."""
    paragraphs = "".join(f"<a:p><a:r><a:t>{line}</a:t></a:r></a:p>" for line in lines)
    return f'<p:sp><p:nvSpPr><p:nvPr><p:ph type="{kind}"/></p:nvPr></p:nvSpPr><p:txBody>{paragraphs}</p:txBody></p:sp>'


def workbook(*sheets: tuple[str, str]) -> bytes:
    """A workbook of sheets: name, and rows as XML."""
    named = "".join(f'<sheet name="{name}" sheetId="{number}" r:id="r{number}"/>' for number, (name, _) in enumerate(sheets, 1))
    return zipped(
        [
            ("_rels/.rels", relations(("r1", "officeDocument", "xl/workbook.xml"))),
            ("xl/workbook.xml", f'<workbook xmlns="{SHEETS}" xmlns:r="{RELATION}"><sheets>{named}</sheets></workbook>'),
            (
                "xl/_rels/workbook.xml.rels",
                relations(*((f"r{number}", "worksheet", f"worksheets/sheet{number}.xml") for number in range(1, len(sheets) + 1))),
            ),
            *(
                (f"xl/worksheets/sheet{number}.xml", f'<worksheet xmlns="{SHEETS}"><sheetData>{rows}</sheetData></worksheet>')
                for number, (_, rows) in enumerate(sheets, 1)
            ),
        ]
    )


def row(number: int, *cells: str) -> str:
    """A row of a sheet; texts stand in the cells themselves."""

    def cell(column: int, value: str) -> str:
        place = f'r="{chr(65 + column)}{number}"'
        if value.replace(".", "").isdigit():
            return f"<c {place}><v>{value}</v></c>"
        return f'<c {place} t="inlineStr"><is><t>{value}</t></is></c>'

    return f'<row r="{number}">{"".join(cell(column, value) for column, value in enumerate(cells))}</row>'


def pdf(*pages: Iterable[tuple[float, float, float, str]], encrypt: str = "") -> bytes:
    """A PDF; each page is lines of text: from the left, from the bottom, size, words."""
    kids = " ".join(f"{4 + 2 * number} 0 R" for number in range(len(pages)))
    objects = [
        "<</Type/Catalog/Pages 2 0 R>>",
        f"<</Type/Pages/Kids[{kids}]/Count {len(pages)}>>",
        "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    for number, lines in enumerate(pages):
        content = "".join(f"BT /F {size} Tf {left} {bottom} Td ({text}) Tj ET\n" for left, bottom, size, text in lines)
        page = f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 600 800]/Contents {5 + 2 * number} 0 R/Resources<</Font<</F 3 0 R>>>>>>"
        objects += [page, f"<</Length {len(content)}>>stream\n{content}endstream"]
    return pdf_of(objects, encrypt)


def pdf_of(objects: Iterable[str | bytes], trailer: str = "") -> bytes:
    """A PDF of numbered objects, the first of them its catalog."""
    written = b"%PDF-1.4\n"
    places = []
    for number, content in enumerate(objects, 1):
        places.append(len(written))
        body = content.encode("latin-1") if isinstance(content, str) else content
        written += b"%d 0 obj" % number + body + b"endobj\n"
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    size = len(places) + 1
    end = f"xref\n0 {size}\n0000000000 65535 f \n{table}trailer<</Size {size}/Root 1 0 R{trailer}>>\nstartxref\n{len(written)}\n%%EOF"
    return written + end.encode()


def scanned_pdf() -> bytes:
    """A page that is a picture."""
    picture = zlib.compress(b"\x00" * 100)
    return pdf_of(
        [
            "<</Type/Catalog/Pages 2 0 R>>",
            "<</Type/Pages/Kids[3 0 R]/Count 1>>",
            "<</Type/Page/Parent 2 0 R/MediaBox[0 0 600 800]/Contents 4 0 R/Resources<</XObject<</P 5 0 R>>>>>>",
            "<</Length 28>>stream\n600 0 0 800 0 0 cm /P Do    \nendstream",
            b"<</Type/XObject/Subtype/Image/Width 10/Height 10/BitsPerComponent 8/ColorSpace/DeviceGray/Filter/FlateDecode/Length %d>>"
            b"stream\n" % len(picture) + picture + b"\nendstream",
        ]
    )


def half_scanned_pdf(pages: str) -> bytes:
    """Pages of text (`t`), pictures (`p`) and empty ones (`e`), in this order. Each is a point wider than the one before it, from 601."""
    picture = zlib.compress(b"\x00" * 100)
    draws = {"t": "BT /F 12 Tf 50 700 Td (Words that stand on a page of text.) Tj ET", "p": "600 0 0 800 0 0 cm /P Do", "e": ""}
    kids = " ".join(f"{5 + 2 * number} 0 R" for number in range(len(pages)))
    objects: list[str | bytes] = [
        "<</Type/Catalog/Pages 2 0 R>>",
        f"<</Type/Pages/Kids[{kids}]/Count {len(pages)}>>",
        "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
        b"<</Type/XObject/Subtype/Image/Width 10/Height 10/BitsPerComponent 8/ColorSpace/DeviceGray/Filter/FlateDecode/Length %d>>"
        b"stream\n" % len(picture) + picture + b"\nendstream",
    ]
    for number, kind in enumerate(pages):
        resources = "<</Font<</F 3 0 R>>/XObject<</P 4 0 R>>>>"
        box = f"[0 0 {601 + number} 800]"
        objects.append(f"<</Type/Page/Parent 2 0 R/MediaBox{box}/Contents {6 + 2 * number} 0 R/Resources{resources}>>")
        objects.append(f"<</Length {len(draws[kind])}>>stream\n{draws[kind]}\nendstream")
    return pdf_of(objects)


def locked_pdf() -> bytes:
    """A PDF that no known password opens."""
    secret = "00" * 32
    lock = f"/Encrypt<</Filter/Standard/V 1/R 2/O<{secret}>/U<{secret}>/P -4>>/ID[<{secret[:32]}><{secret[:32]}>]"
    return pdf([(50, 700, 12, "secret")], encrypt=lock)


def office_locked() -> bytes:
    """What Office makes of a file with a password: an old container around the encrypted new one."""
    return b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 504 + "EncryptedPackage".encode("utf-16-le") + b"\0" * 96


def opendocument(body: str, kind: str = "text", *more: tuple[str, str | bytes]) -> bytes:
    """An OpenDocument file."""
    office = "urn:oasis:names:tc:opendocument:xmlns:"
    spaces = " ".join(f'xmlns:{name}="{office}{name}:1.0"' for name in ("office", "text", "table", "drawing")).replace(
        ":drawing=", ":draw="
    )
    return zipped(
        [
            ("mimetype", f"application/vnd.oasis.opendocument.{kind}"),
            (
                "content.xml",
                f"<office:document-content {spaces}><office:{kind}>{body}</office:{kind}></office:document-content>",
            ),
            *more,
        ]
    )


def book(*chapters: str) -> bytes:
    """An EPUB; the last chapter is read first."""
    numbers = list(range(len(chapters)))
    items = "".join(f'<item id="c{number}" href="c%20{number}.xhtml" media-type="application/xhtml+xml"/>' for number in numbers)
    spine = "".join(f'<itemref idref="c{number}"/>' for number in reversed(numbers))
    package = f"<package><metadata><title>The book</title></metadata><manifest>{items}</manifest><spine>{spine}</spine></package>"
    return zipped(
        [
            ("mimetype", "application/epub+zip"),
            ("META-INF/container.xml", '<container><rootfiles><rootfile full-path="OEBPS/book.opf"/></rootfiles></container>'),
            ("OEBPS/book.opf", package),
            *(
                (f"OEBPS/c {number}.xhtml", f'<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.1//EN" "x"><html><body>{chapter}</body></html>')
                for number, chapter in zip(numbers, chapters, strict=True)
            ),
        ]
    )
