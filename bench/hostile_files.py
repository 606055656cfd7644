"""Files that were made to do harm, by name: small on the wire, endless or deceitful when opened. Pure; nothing is opened here."""

import io
import zipfile
from collections.abc import Iterable

ENTRIES = 100_000
DEPTH = 100_000
_WORD = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'


def bombs() -> dict[str, bytes]:
    """Every one of them must end in a typed error."""
    whole = _word("<w:p><w:r><w:t>A paragraph whose end is missing.</w:t></w:r></w:p>" * 50)
    return {
        "zip-1000-to-1.docx": _zip([("word/document.xml", b"a" * 200_000_000)]),
        "zip-100000-entries.docx": _zip([*((str(number), b"") for number in range(ENTRIES)), ("word/document.xml", b"x")]),
        "zip-in-zip.zip": _zip([("a.zip", _zip([("b.zip", _zip([("c.txt", b"at last")]))]))]),
        "billion-laughs.xml": _laughs(),
        "billion-laughs.docx": _zip([("word/document.xml", _laughs())]),
        "foreign-entity.xml": b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/hostname">]><a>&x;</a>',
        "deep.json": b"[" * DEPTH + b"]" * DEPTH,
        "deep.xml": b"<a>" * DEPTH + b"</a>" * DEPTH,
        "deep.docx": _word("<w:p>" * DEPTH),
        "cut-short.docx": whole[: len(whole) // 2],
    }


def _laughs() -> bytes:
    """Ten entities, each ten times the one before: 3 GB from 800 bytes."""
    entities = "".join(f'<!ENTITY e{number} "{f"&e{number - 1};" * 10}">' for number in range(1, 10))
    return f'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY e0 "lol">{entities}]><a>&e9;</a>'.encode()


def _word(body: str) -> bytes:
    return _zip([("word/document.xml", f"<w:document {_WORD}><w:body>{body}</w:body></w:document>".encode())])


def _zip(files: Iterable[tuple[str, bytes]]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return packed.getvalue()
