"""Bytes to text: which encoding, and whether it is text at all. Line ends become `\\n`, so that offsets mean one thing."""

import codecs
import re
from collections import Counter

from charset_normalizer import from_bytes

from services.retrieval.parsers.rejection import rejected

SAMPLE_BYTES = 64 * 1024
CONTROL_SHARE_MAX = 0.01
"""Control and replacement characters a text may hold, as a share of it; old terminal logs have a few, binaries many more."""

HIGH_BYTES_MIN = 24
# What browsers know; the exotic rest only makes wrong guesses likelier.
_LEGACY = [
    *(f"cp{page}" for page in range(1250, 1259)),
    *("iso8859_2", "iso8859_5", "iso8859_7", "koi8_r"),
    *("big5", "cp949", "euc_jp", "euc_kr", "gb18030", "iso2022_jp", "shift_jis"),
]

# Longer marks first: the UTF-32 mark begins with the UTF-16 one.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_META_CHARSET = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([A-Za-z0-9_:.-]{2,40})", re.IGNORECASE)
_EAST_ASIAN = re.compile("[\u3000-\u30ff\u3400-\u9fff\uac00-\ud7a3\uff00-\uffef\U00020000-\U0003ffff]")
_EAST_ASIA = -1
ONE_SCRIPT_SHARE = 0.9
"""Bytes that are no text fall into blocks as they like."""
_CONTROLS = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\ufffd\ufffe\uffff]")


def decoded(content: bytes, *, html: bool) -> str:
    """The text of `content`. Raises DocumentRejected if it is not text or its encoding cannot be found."""
    text = _decoded(content, html=html)
    controls = sum(1 for _ in _CONTROLS.finditer(text))
    if "\x00" in text or controls > CONTROL_SHARE_MAX * max(len(text), 1):
        raise rejected("the file is binary, not text", cause="binary")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _decoded(content: bytes, *, html: bool) -> str:
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            return _strictly(content[len(mark) :], encoding)
    if b"\x00" in content[:SAMPLE_BYTES]:
        return _strictly(content, _utf16_without_mark(content[:SAMPLE_BYTES]))
    try:
        return content.decode()
    except UnicodeDecodeError:
        pass
    if html and (declared := _META_CHARSET.search(content[:4096])):
        try:
            return content.decode(declared.group(1).decode("ascii"))
        except (LookupError, UnicodeDecodeError):
            pass  # pages lie about their encoding; go on as if nothing had been said
    return _guessed(content)


def _strictly(content: bytes, encoding: str) -> str:
    try:
        return content.decode(encoding)
    except UnicodeDecodeError:
        raise rejected(f"the file is not the {encoding.upper()} it begins as", cause="charset") from None


def _utf16_without_mark(sample: bytes) -> str:
    """The order in which the bytes are writing; of two, the one with more ASCII: spaces, line ends and digits are in every script."""
    orders: dict[int, str] = {}
    for encoding in ("utf-16-le", "utf-16-be"):
        try:
            # Not to its end: the sample may stop within a sign.
            text = codecs.getincrementaldecoder(encoding)().decode(sample)
        except UnicodeDecodeError:
            continue
        if (ascii_signs := sum(map(str.isascii, text))) and _is_writing(text):
            orders[ascii_signs] = encoding
    if not orders:
        raise rejected("the file is binary, not text", cause="binary")
    return orders[max(orders)]


def _is_writing(text: str) -> bool:
    """Signs that can be seen, nearly all from two blocks of 256, as an alphabet and ASCII are, or else from those of East Asia."""
    seen = sum(sign.isprintable() or sign in "\t\n\r\f" for sign in text)
    blocks = Counter(_EAST_ASIA if _EAST_ASIAN.match(sign) else ord(sign) >> 8 for sign in text)
    return seen >= (1 - CONTROL_SHARE_MAX) * len(text) and sum(count for _, count in blocks.most_common(2)) >= ONE_SCRIPT_SHARE * len(text)


def _guessed(content: bytes) -> str:
    # Legacy encodings differ in their high bytes; the lines that have some tell more than the first 64 KiB would.
    lines = [line for line in content[: 16 * SAMPLE_BYTES].splitlines(keepends=True) if not line.isascii()]
    sample = b"".join(lines)[:SAMPLE_BYTES] or content[:SAMPLE_BYTES]
    high = sum(byte > 127 for byte in sample)
    # A few accents in a text of ASCII letters are too little for statistics, and nearly always Windows-1252.
    best = "cp1252" if high < HIGH_BYTES_MIN and high < 0.3 * len(sample) else None
    if best is None and (match := from_bytes(sample, cp_isolation=_LEGACY).best()):
        best = match.encoding
    if best is None:
        raise rejected("the file's character encoding cannot be found", cause="charset")
    return content.decode(best, errors="replace")
