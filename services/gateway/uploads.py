"""Request bodies that carry documents (multipart, JSON, NDJSON) as the parts retrieval takes, piece by piece: no upload is ever held whole.

Only one JSON text is, because JSON cannot be read in part. What is in a document is not looked at.
"""

from collections.abc import AsyncIterator, Iterator
from email.utils import collapse_rfc2231_value, decode_rfc2231
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from services.chassis.errors import PayloadTooLarge, RequestInvalid
from services.gateway import bodies
from services.gateway.bodies import DOCUMENT_BYTES_MAX, DocumentBody
from services.gateway.exchange import Exchange
from services.gateway.problems import MediaTypeUnsupported
from tailrace.retrieval.v1 import retrieval_service_pb2 as retrieval

Part = retrieval.IngestDocumentsRequest

FILES_MAX = 1000
LINES_MAX = 10_000
UPLOAD_BYTES_MAX = 2 * 1024**3
JSON_DOCUMENT_BYTES_MAX = 32 * 1024 * 1024
"""Text of 20 MiB with room for JSON's escapes."""
CONTENT_BYTES_MAX = 256 * 1024
"""Content a message: well below the contract's bound of 1 MiB, and small enough to keep other streams moving."""
FIELD_BYTES_MAX = {"collection": 256, "facts": 64 * 1024}
"""Bytes of a form field that is no file."""


def parts_of(exchange: Exchange) -> AsyncIterator[Part]:
    """The documents in the body of POST /v1/documents. Raises MediaTypeUnsupported."""
    match exchange.media_type():
        case "multipart/form-data":
            return _of_multipart(exchange)
        case "application/json" | "":
            return _of_json(exchange)
    raise MediaTypeUnsupported("send multipart/form-data or application/json", accepts="multipart/form-data, application/json")


async def parts_of_lines(exchange: Exchange) -> AsyncIterator[Part]:
    """The documents in the body of POST /v1/documents:bulk, one JSON object a line."""
    if exchange.media_type() not in ("application/x-ndjson", "application/ndjson", "application/jsonl", "application/json", ""):
        raise MediaTypeUnsupported("send application/x-ndjson", accepts="application/x-ndjson")
    number, count, rest = 0, 0, bytearray()
    async for chunk in exchange.chunks(UPLOAD_BYTES_MAX):
        searched = len(rest)
        rest += chunk
        while (end := rest.find(b"\n", searched)) >= 0:
            line, searched = bytes(rest[:end]), 0
            del rest[: end + 1]
            number += 1
            for part in _of_line(line, number):
                yield part
            count += bool(line.strip())
            _bound_lines(count)
        if len(rest) > JSON_DOCUMENT_BYTES_MAX:
            raise PayloadTooLarge("a line is too long", field=f"line {number + 1}", bound_bytes=JSON_DOCUMENT_BYTES_MAX)
    for part in _of_line(bytes(rest), number + 1):
        yield part
    if count + bool(rest.strip()) == 0:
        raise RequestInvalid("there are no documents", field="body", bound=f"1-{LINES_MAX} lines of JSON")


async def _of_json(exchange: Exchange) -> AsyncIterator[Part]:
    body = bodies.parse(await exchange.body(JSON_DOCUMENT_BYTES_MAX, "text"), DocumentBody)
    for part in _document(body):
        yield part


def _bound_lines(count: int) -> None:
    if count > LINES_MAX:
        raise PayloadTooLarge(f"at most {LINES_MAX} documents a request", field="body", bound=LINES_MAX)


def _of_line(line: bytes, number: int) -> Iterator[Part]:
    if not line.strip():
        return
    place = f"line {number}"
    body = bodies.parse(line, DocumentBody, within=place)
    try:
        yield from _document(body)
    except RequestInvalid as error:
        raise RequestInvalid(error.detail, field=f"{place}.{error.field}", bound=error.metadata.get("bound", "")) from None


def _document(body: DocumentBody) -> Iterator[Part]:
    header, content = body.header(), body.content()
    yield Part(header=header)
    yield from _content(content)


def _content(data: bytes) -> Iterator[Part]:
    view = memoryview(data)
    for start in range(0, len(data), CONTENT_BYTES_MAX):
        yield Part(content=bytes(view[start : start + CONTENT_BYTES_MAX]))


async def _of_multipart(exchange: Exchange) -> AsyncIterator[Part]:
    _, options = parse_options_header(exchange.header("content-type"))
    boundary = options.get(b"boundary", b"")
    if not boundary:
        raise RequestInvalid("the multipart body has no boundary", field="content-type", bound="boundary=…")
    form = _Form()
    try:
        parser = MultipartParser(boundary, form.callbacks(), max_header_count=16, max_header_size=8192)  # type: ignore[arg-type]
        async for chunk in exchange.chunks(UPLOAD_BYTES_MAX, "files"):
            parser.write(chunk)
            for part in form.take():
                yield part
        parser.finalize()
    except FormParserError as error:
        raise RequestInvalid("the multipart body is malformed", field="body", bound="RFC 7578 multipart/form-data") from error
    if not form.ended:
        raise RequestInvalid("the multipart body ends too early", field="body", bound="RFC 7578 multipart/form-data")
    for part in form.take():
        yield part
    if form.files == 0:
        raise RequestInvalid("there are no files", field="files", bound=f"1-{FILES_MAX} files")


class _Form:
    """Collects what the parser finds: files become parts.

    The field `collection` names where the files after it go, the field `facts` (JSON of `metadata` and `access`) what is said of them.
    """

    def __init__(self) -> None:
        self.files = 0
        self.ended = False
        self._ready: list[Part] = []
        self._headers: dict[bytes, bytes] = {}
        self._name, self._value = b"", b""
        self._field = ""
        """The form field being read; empty while it is a file."""
        self._text = b""
        self._bytes = 0
        self._collection = ""
        self._facts = bodies.FactsBody()

    def callbacks(self) -> dict[str, Any]:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_name,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._open,
            "on_part_data": self._data,
            "on_part_end": self._close,
            "on_end": self._end,
        }

    def take(self) -> list[Part]:
        """What is complete since the last call."""
        ready, self._ready = self._ready, []
        return ready

    def _begin(self) -> None:
        self._headers, self._name, self._value = {}, b"", b""

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        self._headers[self._name.lower()] = self._value
        self._name, self._value = b"", b""

    def _open(self) -> None:
        disposition, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        field = _text(options.get(b"name", b""))
        if disposition != b"form-data" or field not in ("files", *FIELD_BYTES_MAX):
            raise RequestInvalid("the form has an unknown field", field=field[:64] or "body", bound="files, collection, facts")
        self._bytes, self._text = 0, b""
        if field != "files":
            self._field = field
            return
        self._field = ""
        self.files += 1
        if self.files > FILES_MAX:
            raise PayloadTooLarge(f"at most {FILES_MAX} files a request", field="files", bound=FILES_MAX)
        name = _text(options.get(b"filename", b"")) or _extended(options.get(b"filename*", b""))
        if not 1 <= len(name) <= 1024 or not name.isprintable() or not name.strip():
            raise RequestInvalid("a file has no usable name", field="files.filename", bound="1-1024 printable characters")
        media_type, _ = parse_options_header(self._headers.get(b"content-type", b""))
        known = media_type.decode("latin-1")[:128] if media_type != b"application/octet-stream" else ""
        header = retrieval.DocumentHeader(source_uri=name, collection=self._collection, media_type=known)
        self._facts.tell(header)
        self._ready.append(Part(header=header))

    def _data(self, data: bytes, start: int, end: int) -> None:
        self._bytes += end - start
        if self._field:
            self._text += data[start:end]
            if len(self._text) > (bytes_max := FIELD_BYTES_MAX[self._field]):
                raise RequestInvalid(f"{self._field} is too long", field=self._field, bound=f"at most {bytes_max} bytes")
            return
        if self._bytes > DOCUMENT_BYTES_MAX:
            raise PayloadTooLarge(f"a document has at most {DOCUMENT_BYTES_MAX} bytes", field="files", bound_bytes=DOCUMENT_BYTES_MAX)
        self._ready += _content(data[start:end])

    def _close(self) -> None:
        if self._field == "collection":
            self._collection = bodies.collection(_text(self._text))
        elif self._field == "facts":
            self._facts = bodies.parse(self._text, bodies.FactsBody, within="facts")

    def _end(self) -> None:
        self.ended = True


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise RequestInvalid("a name in the form is not UTF-8", field="files.filename", bound="UTF-8") from None


def _extended(value: bytes) -> str:
    """A file name in the notation of RFC 8187."""
    try:
        return collapse_rfc2231_value(decode_rfc2231(value.decode("ascii")), errors="strict") if value else ""
    except (UnicodeError, ValueError, LookupError):
        return ""
