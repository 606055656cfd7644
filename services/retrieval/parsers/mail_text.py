"""E-mail (eml): who, when and about what, then the text, then what is attached. Attached texts are read, others only named."""

import base64
import email
import email.policy
from email.message import EmailMessage
from pathlib import PurePosixPath

from services.retrieval.domain import BlockKind, Extracted
from services.retrieval.parsers.charset import decoded
from services.retrieval.parsers.html_text import parse_html
from services.retrieval.parsers.outline import Outline, words_of
from services.retrieval.parsers.plain_text import parse_plain
from services.retrieval.parsers.rejection import rejected

MEDIA_TYPE = "message/rfc822"

PARTS_MAX = 1_000
NESTING_MAX = 3
"""Mails attached to mails that are opened; those below are named."""
_SHOWN = ("From", "To", "Cc", "Date", "Subject")


def parse_mail(content: bytes) -> Extracted:
    """The title is the subject."""
    # Mailbox exports put a line of their own in front; a signature of bytes does not matter to the parser.
    message = email.message_from_bytes(content.removeprefix(b"\xef\xbb\xbf"), policy=email.policy.default)
    outline = Outline()
    assert isinstance(message, EmailMessage)
    _write(outline, message, 1)
    return outline.extracted(MEDIA_TYPE, _header(message, "Subject"))


def _write(outline: Outline, message: EmailMessage, depth: int) -> None:
    outline.heading(depth, _header(message, "Subject"))
    lines = [f"{name}: {value}" for name in _SHOWN if (value := _header(message, name))]
    outline.block(BlockKind.PARAGRAPH, "\n".join(lines))
    body = _body(message)
    if body is not None:
        _write_text(outline, body, depth + 1)
    for number, attached in enumerate(_attached(message, body)):
        if number >= PARTS_MAX:
            raise rejected("the mail has too many parts", cause="malformed", parts_max=PARTS_MAX)
        name = words_of(_filename(attached)) or attached.get_content_type()
        outline.leave(depth + 1)
        outline.paragraph(f"Attachment: {name}")
        if attached.get_content_maintype() == "text":
            outline.heading(depth + 1, name)
            _write_text(outline, attached, depth + 2)
        elif attached.get_content_type() == MEDIA_TYPE and depth < NESTING_MAX:
            inner = _inner(attached)
            if inner is not None:
                _write(outline, inner, depth + 1)
    outline.leave(depth)


def _write_text(outline: Outline, part: EmailMessage, level: int) -> None:
    payload = part.get_payload(decode=True)
    content = payload if isinstance(payload, bytes) else b""
    html = part.get_content_type() == "text/html"
    charset = part.get_content_charset() or ""
    try:
        text = content.decode(charset).replace("\r\n", "\n") if charset else decoded(content, html=html)
    except (LookupError, UnicodeError):
        # Mails lie about their charset more often than any other kind of file.
        text = decoded(content, html=html)
    outline.append(parse_html(text) if html else parse_plain(text), level)


def _body(message: EmailMessage) -> EmailMessage | None:
    """The plain text if there is one with words in it, else the page."""
    for kind in ("plain", "html"):
        try:
            found = message.get_body((kind,))
        except (AttributeError, KeyError, ValueError, LookupError):
            continue  # a broken structure; its parts are attachments then
        if isinstance(found, EmailMessage) and found.get_payload(decode=True):
            return found
    return None


def _attached(message: EmailMessage, body: EmailMessage | None) -> list[EmailMessage]:
    """Parts that are neither the body nor another form of it."""
    found: list[EmailMessage] = []
    waiting: list[EmailMessage] = [message]
    while waiting:
        part = waiting.pop(0)
        inner = part.get_payload()
        if part.get_content_maintype() == "multipart" and isinstance(inner, list):
            forms = part.get_content_subtype() == "alternative"
            waiting[:0] = [
                child for child in inner if isinstance(child, EmailMessage) and not (forms and child.get_content_maintype() == "text")
            ]
        elif part is not body and (part is not message or part.get_content_maintype() != "text"):
            found.append(part)
        if len(found) + len(waiting) > PARTS_MAX:
            raise rejected("the mail has too many parts", cause="malformed", parts_max=PARTS_MAX)
    return found


def _inner(attached: EmailMessage) -> EmailMessage | None:
    """The mail in a mail; None if it cannot be read."""
    payload = attached.get_payload()
    inner = payload[0] if isinstance(payload, list) and payload else None
    if isinstance(inner, EmailMessage) and _header(attached, "Content-Transfer-Encoding").lower() == "base64":
        # No mail may be encoded as a whole (RFC 2046, 5.2.1), so that the library does not look; some programs do it all the same.
        try:
            encoded = email.message_from_bytes(base64.b64decode(str(inner.get_payload())), policy=email.policy.default)
        except ValueError:
            return None
        return encoded if isinstance(encoded, EmailMessage) and encoded.keys() else None
    return inner if isinstance(inner, EmailMessage) else None


def _header(message: EmailMessage, name: str) -> str:
    try:
        return words_of(str(message.get(name, "")))
    except (ValueError, LookupError, AttributeError, IndexError):
        return ""  # a header that breaks the library's own parser is as good as none


def _filename(part: EmailMessage) -> str:
    try:
        return PurePosixPath((part.get_filename() or "").replace("\\", "/")).name
    except (ValueError, LookupError, AttributeError, IndexError, TypeError):
        return ""
