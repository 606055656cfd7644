"""The one way to say that a file cannot be read, with the words for why. It never quotes the file.

| cause | what is the matter |
|---|---|
| `empty` | no bytes, or no text in them |
| `unsupported_type` | a format that is not read here; `type` names it |
| `archive` | an archive: its files are to be sent one by one |
| `binary` | called a text, but none |
| `charset` | a text whose encoding is broken or cannot be found |
| `malformed` | broken: it does not hold to its format, or is nested too deeply |
| `truncated` | the end is missing |
| `encrypted` | it opens with a password only |
| `no_text` | pages are pictures; they would have to be read by OCR |
| `dtd` | XML that declares entities or a document type of its own |
| `zip_bomb` | a container that unpacks into too much: in bytes, by its ratio, or in entries |
| `too_large` | more text, or more memory for reading it, than one document may have |
| `timeout` | it takes longer to read than a document may |
| `crashed` | its parser died of it |
"""

from services.chassis.errors import DocumentRejected

SUPPORTED = (
    "Markdown, HTML, plain text, reStructuredText, PDF, Word (docx), PowerPoint (pptx), Excel (xlsx, xls), OpenDocument (odt, ods, odp), "
    "RTF, EPUB, e-mail (eml), CSV, TSV, JSON, JSON lines, XML, source code"
)


def rejected(why: str, *, cause: str, **facts: str | int) -> DocumentRejected:
    """`cause` is a word for programs, one of those above; `why` is for people."""
    return DocumentRejected(why, cause=cause, **facts)
