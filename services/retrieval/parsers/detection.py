"""What format a file is in, by its content first, then its declared type, then its name. Nothing is parsed here."""

import re
from pathlib import PurePosixPath

from services.retrieval.domain import Upload
from services.retrieval.parsers.rejection import SUPPORTED, rejected

MARKDOWN = "text/markdown"
HTML = "text/html"
PLAIN = "text/plain"

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
    ".rst": PLAIN,
}
BY_MEDIA_TYPE = {MARKDOWN: MARKDOWN, "text/x-markdown": MARKDOWN, HTML: HTML, "application/xhtml+xml": HTML, PLAIN: PLAIN}

OTHER_SIGNATURES = (
    (b"%PDF-", "PDF"),
    (b"{\\rtf", "RTF"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "Microsoft Office (before 2007)"),
    (b"\x89PNG\r\n\x1a\n", "PNG image"),
    (b"\xff\xd8\xff", "JPEG image"),
    (b"GIF8", "GIF image"),
    (b"\x1f\x8b", "gzip archive"),
    (b"7z\xbc\xaf\x27\x1c", "7z archive"),
    (b"\x7fELF", "program"),
    (b"SQLite format 3\x00", "SQLite database"),
)
ZIP_MEMBERS = (
    (b"word/", "Word (docx)"),
    (b"xl/", "Excel (xlsx)"),
    (b"ppt/", "PowerPoint (pptx)"),
    (b"opendocument.text", "OpenDocument text (odt)"),
    (b"epub+zip", "EPUB"),
)
OTHER_EXTENSIONS = {
    ".pdf": "PDF",
    ".doc": "Word (doc)",
    ".docx": "Word (docx)",
    ".xls": "Excel (xls)",
    ".xlsx": "Excel (xlsx)",
    ".ppt": "PowerPoint (ppt)",
    ".pptx": "PowerPoint (pptx)",
    ".odt": "OpenDocument text (odt)",
    ".rtf": "RTF",
    ".epub": "EPUB",
    ".eml": "e-mail (eml)",
    ".msg": "e-mail (msg)",
    ".csv": "CSV",
    ".tsv": "TSV",
    ".xml": "XML",
    ".json": "JSON",
    ".jsonl": "JSON lines",
    ".zip": "ZIP archive",
    ".gz": "gzip archive",
    ".tar": "tar archive",
}
OTHER_MEDIA_TYPES = (
    "application/pdf",
    "application/msword",
    "application/vnd.",
    "application/zip",
    "application/rtf",
    "image/",
    "audio/",
    "video/",
)

_HTML_START = re.compile(r"\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)*<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE | re.DOTALL)
_MARKDOWN_SIGNS = re.compile(r"^(?:#{1,6} \S|```|~~~|[-*+] \S|\|.+\||\d{1,3}\. \S)|\]\(\S+\)", re.MULTILINE)


def refuse_other_formats(upload: Upload) -> None:
    """Raise DocumentRejected, naming the format, if the file is of one that is not read here."""
    if not upload.content:
        raise rejected("the document is empty", cause="empty")
    found = _other_format(upload)
    if found:
        raise rejected(f"{found} is not supported; supported are {SUPPORTED}", cause="unsupported_type", type=found, supported=SUPPORTED)


def _other_format(upload: Upload) -> str:
    head = upload.content[:4096]
    for signature, found in OTHER_SIGNATURES:
        if head.startswith(signature):
            return found
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        # Names of members stand uncompressed in the archive, at its end in any case.
        names = head + upload.content[-65536:]
        return next((found for member, found in ZIP_MEMBERS if member in names), "ZIP archive")
    if any(_bare(upload.media_type).startswith(other) for other in OTHER_MEDIA_TYPES):
        return _bare(upload.media_type)
    return OTHER_EXTENSIONS.get(_extension(upload), "")


def media_type_of(upload: Upload, text: str) -> str:
    """Which of the supported types `text` is."""
    known = BY_EXTENSION.get(_extension(upload))
    if known and known != PLAIN:
        return known
    if _HTML_START.match(text[:4096]):
        return HTML
    if known:
        return known
    declared = BY_MEDIA_TYPE.get(_bare(upload.media_type))
    return declared or (MARKDOWN if _MARKDOWN_SIGNS.search(text[:20_000]) else PLAIN)


def _extension(upload: Upload) -> str:
    path = upload.source_uri.split("?", 1)[0].split("#", 1)[0]
    return PurePosixPath(path).suffix.lower()


def _bare(media_type: str) -> str:
    return media_type.split(";", 1)[0].strip().lower()
