"""What format a file is in, by its content first, then its declared type, then its name. Nothing is parsed here but what telling needs."""

import re
from pathlib import PurePosixPath

from services.retrieval.domain import Upload
from services.retrieval.parsers import source_code
from services.retrieval.parsers.container import Container
from services.retrieval.parsers.data_text import JSON, JSON_LINES, XML, is_json, is_json_lines
from services.retrieval.parsers.rejection import SUPPORTED, rejected
from services.retrieval.parsers.separated_text import CSV, TSV, is_table

MARKDOWN = "text/markdown"
HTML = "text/html"
PLAIN = "text/plain"
STRUCTURED = "text/x-rst"
MAIL = "message/rfc822"
RICH = "application/rtf"
PDF = "application/pdf"
WORD = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"
SLIDES = "application/vnd.openxmlformats-officedocument.presentationml.presentation"
SHEETS = "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet"
SHEETS_OLD = "application/vnd.ms-excel"
BOOK = "application/epub+zip"
OPEN_TEXT = "application/vnd.oasis.opendocument.text"
OPEN_SLIDES = "application/vnd.oasis.opendocument.presentation"
OPEN_SHEETS = "application/vnd.oasis.opendocument.spreadsheet"

BY_EXTENSION = {
    ".md": MARKDOWN,
    ".markdown": MARKDOWN,
    ".mdown": MARKDOWN,
    ".mdx": MARKDOWN,
    ".html": HTML,
    ".htm": HTML,
    ".xhtml": HTML,
    ".txt": PLAIN,
    ".text": PLAIN,
    ".log": PLAIN,
    ".rst": STRUCTURED,
    ".rest": STRUCTURED,
    ".csv": CSV,
    ".tsv": TSV,
    ".tab": TSV,
    ".json": JSON,
    ".geojson": JSON,
    ".jsonl": JSON_LINES,
    ".ndjson": JSON_LINES,
    ".xml": XML,
    ".rss": XML,
    ".atom": XML,
    ".eml": MAIL,
    ".rtf": RICH,
    ".pdf": PDF,
    ".docx": WORD,
    ".docm": WORD,
    ".pptx": SLIDES,
    ".pptm": SLIDES,
    ".xlsx": SHEETS,
    ".xlsm": SHEETS,
    ".xls": SHEETS_OLD,
    ".odt": OPEN_TEXT,
    ".odp": OPEN_SLIDES,
    ".ods": OPEN_SHEETS,
    ".epub": BOOK,
}
BY_MEDIA_TYPE = {
    **{media_type: media_type for media_type in BY_EXTENSION.values()},
    "text/x-markdown": MARKDOWN,
    "application/xhtml+xml": HTML,
    "text/prs.fallenstein.rst": STRUCTURED,
    "text/xml": XML,
    "application/jsonl": JSON_LINES,
    "text/rtf": RICH,
}
TEXTS = frozenset({MARKDOWN, HTML, PLAIN, STRUCTURED, CSV, TSV, JSON, JSON_LINES, XML, MAIL})
"""Formats that have no signature: where the content leaves it open, the name and the declared type tell them apart."""

OTHER_SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", "PNG image"),
    (b"\xff\xd8\xff", "JPEG image"),
    (b"GIF8", "GIF image"),
    (b"II*\x00", "TIFF image"),
    (b"MM\x00*", "TIFF image"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000 image"),
    (b"ID3", "audio"),
    (b"OggS", "audio"),
    (b"fLaC", "audio"),
    (b"\x1aE\xdf\xa3", "video"),
    (b"\x7fELF", "program"),
    (b"MZ\x90", "program"),
    (b"SQLite format 3\x00", "SQLite database"),
)
ARCHIVE_SIGNATURES = (
    (b"\x1f\x8b", "gzip archive"),
    (b"BZh", "bzip2 archive"),
    (b"\xfd7zXZ\x00", "xz archive"),
    (b"\x28\xb5\x2f\xfd", "Zstandard archive"),
    (b"7z\xbc\xaf\x27\x1c", "7z archive"),
    (b"Rar!\x1a\x07", "RAR archive"),
)
TAR_MARK_PLACE = 257
OLE_SIGNATURE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
ZIP_SIGNATURES = (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")
PDF_MARK_WITHIN = 1024
"""Readers of PDF accept some bytes before its mark, and so do we."""

_ZIP_MIMETYPES = {
    b"application/epub+zip": BOOK,
    b"application/vnd.oasis.opendocument.text": OPEN_TEXT,
    b"application/vnd.oasis.opendocument.presentation": OPEN_SLIDES,
    b"application/vnd.oasis.opendocument.spreadsheet": OPEN_SHEETS,
}
_ZIP_PARTS = (("word/document.xml", WORD), ("ppt/presentation.xml", SLIDES), ("xl/workbook.xml", SHEETS), ("xl/workbook.bin", SHEETS))
_MAIN_TYPES = ((b"wordprocessingml.", WORD), (b"presentationml.", SLIDES), (b"spreadsheetml.", SHEETS))

_HTML_START = re.compile(r"\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)*<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE | re.DOTALL)
_TAG = re.compile(r"</?[A-Za-z][^<>]*>")
_HTML_FRAGMENT_START = re.compile(r"\s*<(?:p|div|h[1-6]|table|ul|ol|dl|article|section|main|span|pre|blockquote)\b[^<>]*>", re.IGNORECASE)
_HTML_FRAGMENT_END = re.compile(r"</[a-z][a-z0-9]*>\s*\Z", re.IGNORECASE)
_XML_START = re.compile(r"\s*<\?xml\b")
_MARKUP_START = re.compile(r"\s*<[A-Za-z!?]")
_JSON_START = re.compile(r"\s*[\[{]")
_MARKDOWN_SIGNS = re.compile(r"^(?:#{1,6} \S|```|~~~|[-*+] \S|\|.+\||\d{1,3}\. \S)|\]\(\S+\)", re.MULTILINE)
_HEADER = re.compile(r"^([A-Za-z][A-Za-z0-9-]{0,60}):[ \t]", re.MULTILINE)
_MAIL_HEADERS = frozenset({"received", "return-path", "message-id", "mime-version", "delivered-to", "x-mailer", "dkim-signature"})
_MAIL_NAMES = frozenset({"from", "to", "subject", "date", "cc", "sender", "reply-to"})


def binary_format_of(content: bytes) -> str:
    """The media type of a format with a signature of its own; empty = it may be a text.

    Raises DocumentRejected, naming the format, for one that is not read: `unsupported_type`, `archive`, `encrypted`.
    """
    if not content:
        raise rejected("the document is empty", cause="empty")
    for signature, found in ARCHIVE_SIGNATURES:
        if content.startswith(signature):
            raise _archive(found)
    if content[TAR_MARK_PLACE : TAR_MARK_PLACE + 5] == b"ustar":
        raise _archive("tar archive")
    for signature, found in OTHER_SIGNATURES:
        if content.startswith(signature):
            raise _unsupported(found)
    if content[4:8] == b"ftyp":
        raise _unsupported("video")
    if content.startswith(OLE_SIGNATURE):
        return _ole_format(content)
    if content.startswith(ZIP_SIGNATURES):
        return _zip_format(content)
    if content.startswith(b"{\\rtf"):
        return RICH
    # A text may speak of the mark, but does not end like a PDF as well.
    if content.startswith(b"%PDF-") or (b"%PDF-" in content[:PDF_MARK_WITHIN] and b"startxref" in content[-2048:]):
        return PDF
    return ""


def text_format_of(upload: Upload, text: str) -> str:
    """Which kind of text it is. Content that is sure of itself counts before the name and the declared type, and they before a guess."""
    extension = extension_of(upload)
    known = BY_EXTENSION.get(extension, "")
    declared = BY_MEDIA_TYPE.get(_bare(upload.media_type), "")
    named = known if known in TEXTS else declared if declared in TEXTS and declared != PLAIN else known and PLAIN
    head = text[:4096]
    if sure := _sure_format(text, head, named, code=extension in source_code.BY_EXTENSION):
        return sure
    if named == HTML and not _TAG.search(text):
        return _guessed(text)
    if named in (PLAIN, MARKDOWN) and not _MARKDOWN_SIGNS.search(text[:20_000]) and is_table(text):
        return CSV
    if named in (MARKDOWN, HTML, STRUCTURED, CSV, TSV):
        return named
    if named == XML and _MARKUP_START.match(head):
        return XML
    if language := source_code.language_of(_name(upload), extension, text):
        return source_code.MEDIA_TYPE_PREFIX + language
    if _HTML_FRAGMENT_START.match(head) and _HTML_FRAGMENT_END.search(text[-100:]):
        return HTML
    if known == PLAIN:
        return PLAIN
    return _guessed(text)


def _sure_format(text: str, head: str, named: str, *, code: bool) -> str:
    """What nothing but its format looks like; empty = the content leaves it open."""
    if _HTML_START.match(head):
        return HTML
    # What is called HTML is read leniently, also if it says to be XML: it often is not quite.
    if _XML_START.match(head) and named != HTML:
        return XML
    if _JSON_START.match(head) and not code:
        # A log that is not called JSON may go on with lines of another kind.
        lines = is_json_lines(text) and (named in (JSON, JSON_LINES) or all(map(_is_like_a_record, text.split("\n"))))
        if is_json(text) or (named in (JSON, JSON_LINES) and not lines):
            return JSON
        if lines:
            return JSON_LINES
    return MAIL if _is_mail(head, named == MAIL) else ""


def _is_like_a_record(line: str) -> bool:
    line = line.strip()
    return not line or (line[0] in "{[" and line[-1] in "}]")


def _guessed(text: str) -> str:
    """What a text is that neither name nor declared type tell about."""
    if _MARKDOWN_SIGNS.search(text[:20_000]):
        return MARKDOWN
    return CSV if is_table(text) else PLAIN


def _is_mail(head: str, named: bool) -> bool:
    """Whether the file begins with the headers of a mail: such as only mails have, or any if it is called a mail."""
    names = {match[1].lower() for match in _HEADER.finditer(head.partition("\n\n")[0])}
    if named:
        return bool(names & (_MAIL_HEADERS | _MAIL_NAMES))
    first = _HEADER.match(head)
    return first is not None and len(names & _MAIL_HEADERS) >= 1 and len(names & _MAIL_NAMES) >= 2


def _zip_format(content: bytes) -> str:
    container = Container(content)
    if container.has("mimetype"):
        mimetype = container.read("mimetype").strip()
        found = _ZIP_MIMETYPES.get(mimetype) or _ZIP_MIMETYPES.get(mimetype.removesuffix(b"-template"))
        if found:
            return found
    for part, media_type in _ZIP_PARTS:
        if container.has(part):
            return media_type
    # Some programs give the main part another name; the list of types still says what it is.
    types = container.read("[Content_Types].xml")
    for mark, media_type in _MAIN_TYPES:
        if mark in types:
            return media_type
    if container.has("META-INF/container.xml"):
        return BOOK
    if container.has("[Content_Types].xml"):
        raise rejected("the file's main part is missing", cause="malformed")
    raise _archive("ZIP archive")


def _ole_format(content: bytes) -> str:
    """Old Office files and encrypted new ones share a container; the names of their streams tell them apart."""
    if _stream("EncryptedPackage") in content:
        raise rejected("the file is encrypted; it opens with a password only", cause="encrypted")
    if _stream("Workbook") in content or _stream("Book") in content:
        return SHEETS_OLD
    for name, found in (
        ("WordDocument", "Word (doc)"),
        ("PowerPoint Document", "PowerPoint (ppt)"),
        ("__properties_version1.0", "e-mail (msg)"),
    ):
        if _stream(name) in content:
            raise _unsupported(found)
    raise _unsupported("Microsoft Office (before 2007)")


def _stream(name: str) -> bytes:
    return name.encode("utf-16-le") + b"\x00\x00"


def _unsupported(found: str) -> Exception:
    return rejected(f"{found} is not supported; supported are {SUPPORTED}", cause="unsupported_type", type=found, supported=SUPPORTED)


def _archive(found: str) -> Exception:
    return rejected(f"{found} is not opened; send the files in it one by one", cause="archive", type=found)


def is_known_by_name(name: str) -> bool:
    """Whether a file is called like one of a format that is read. What it is, its content says."""
    path = PurePosixPath(name.lower())
    return path.suffix in BY_EXTENSION or path.suffix in source_code.BY_EXTENSION or path.name in source_code.BY_NAME


def extension_of(upload: Upload) -> str:
    """The end of the name, in small letters, with its dot; empty if it has none."""
    return PurePosixPath(_name(upload)).suffix.lower()


def _name(upload: Upload) -> str:
    path = upload.source_uri.split("?", 1)[0].split("#", 1)[0]
    return PurePosixPath(path).name


def _bare(media_type: str) -> str:
    return media_type.split(";", 1)[0].strip().lower()
