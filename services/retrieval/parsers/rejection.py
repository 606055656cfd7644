"""The one way to say that a file cannot be read. It never quotes the file."""

from services.chassis.errors import DocumentRejected

SUPPORTED = "Markdown, HTML, plain text"


def rejected(why: str, *, cause: str, **facts: str | int) -> DocumentRejected:
    """`cause` is a word for programs: `empty`, `binary`, `charset`, `unsupported_type`, `malformed`."""
    return DocumentRejected(why, cause=cause, **facts)
