"""Would showing an answer's Markdown send data away, or run something? Pure; it reads what a browser would make of it, and changes nothing.

A link is safe if the passages or the question have its host and it carries little. An image is fetched without a click, and a passage can
bring a host of its own: so an image is safe only at an address that was shown, to the letter.
"""

import bisect
import html
import itertools
import re
from collections.abc import Iterable, Sequence
from urllib.parse import urlsplit

from services.orchestrator.markdown_reading import Reading, readings

PATH_CHARACTERS_MAX = 100
"""The path of a link to a known host may be so long before it counts as carrying data; documentation has such paths."""
QUERY_CHARACTERS_MAX = 40
"""And its query and fragment."""
ADDRESSES_MAX = 1_000
"""An answer with more of them is no answer."""
SAFE_SCHEMES = frozenset({"http", "https", "mailto"})
_TARGET = r"\(\s{0,8}(?:<([^<>\n]{0,4000})>|((?:[^\s()\\]|\\.|\([^\s()]{0,2000}\)){0,4000}))"
_INLINE = re.compile(r"(!?)\[[^\[\]]{0,2000}\]" + _TARGET)
_AROUND_IMAGE = re.compile(r"\]" + _TARGET)
_DEFINITION = re.compile(r"^[ ]{0,3}\[([^\[\]]{1,1000})\]:[ \t]*\n?[ \t]*<?([^\s<>]{1,4000})", re.MULTILINE)
_IMAGE_REFERENCE = re.compile(r"!\[([^\[\]]{0,1000})\](?:\[([^\[\]]{0,1000})\])?")
_AUTOLINK = re.compile(r"<([A-Za-z][A-Za-z0-9+.-]{1,31}:[^\s<>]{0,4000})>")
_BARE = re.compile(r"(?<![\w/@(<\"'=])((?:https?://|www\.)[^\s<>\"'`\])]{1,4000})", re.IGNORECASE)
_TAG = re.compile(r"<[\s/]{0,8}([A-Za-z][\w:-]{0,32})")
_HANDLER = re.compile(
    r"on(?:error|load|unload|click|dblclick|mouse\w+|pointer\w+|touch\w+|key\w+|focus\w*|blur|toggle|animation\w+|transition\w+|begin|end"
    r"|wheel|scroll\w*|input|change|submit|reset|drag\w*|drop|copy|cut|paste|resize|play\w*|message|hashchange|popstate|show|start|finish)"
)
_ATTRIBUTE = re.compile(r"([\w:-]{1,64}) ?= ?(?=\"([^\"]{0,4000})|'([^']{0,4000})|([^\s\"'<>]{1,500}))")
"""What looks like one inside of another's value is found too: where a value ends is told by quotes, which text may have as well."""
TAG_CHARACTERS_MAX = 2_000
"""How far behind what may be a tag, and is none by the grammar, attributes are looked for."""
_ACTIVE_TAGS = frozenset(
    ("script", "iframe", "object", "embed", "form", "meta", "link", "style", "base", "svg", "math", "video", "audio", "source", "input")
)
_URL_ATTRIBUTES = frozenset({"href", "src", "srcset", "action", "formaction", "poster", "data", "background", "xlink:href", "ping", "cite"})
_FETCHED_ATTRIBUTES = frozenset({"src", "srcset", "background", "poster", "xlink:href"})
"""Those that load without a click."""
_LEADING_TAGS = frozenset(
    (
        "a",
        "area",
        "img",
        "image",
        "body",
        "table",
        "thead",
        "tbody",
        "tfoot",
        "tr",
        "td",
        "th",
        "button",
        "track",
        "frame",
        "blockquote",
        "q",
    )
)
"""Harmless tags with attributes that may lead elsewhere."""
_ADDRESS = re.compile(r"(?:https?://|www\.)[^\s<>\"'`\])}]{1,2000}", re.IGNORECASE)
_HOST = re.compile(r"\b(?:[a-z0-9-]{1,63}\.){1,8}[a-z]{2,24}\b", re.IGNORECASE)
_PUNCTUATION = ".,;:!?)*_"
_EDGES = "".join(map(chr, range(0x21)))
_DROPPED = re.compile("[\t\n\r]")
"""What a browser takes out of an address."""
_UNSEEN = re.compile(
    "[\x00-\x20\x7f-\xa0\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202f\u205f-\u206f\u3000\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U000e0000-\U000e0fff]"
)
"""What a browser sends along and nobody sees, which is a place for data."""


class _Shown:
    """The addresses and hosts of what the model was shown."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.addresses: set[str] = set()
        """As they stand, also without the punctuation that may be the sentence's."""
        self.places: set[str] = set()
        """The same, whatever their case and end."""
        self.hosts: set[str] = set()
        for text in texts:
            for found in _ADDRESS.finditer(text):
                self.addresses |= {found[0], found[0].rstrip(_PUNCTUATION)}
                self.places.add(_trimmed(found[0]))
            self.hosts |= {found[0].casefold() for found in _HOST.finditer(text)}


def carries_out(text: str, material: Iterable[str]) -> bool:
    """Whether a reader of `text` who sees it rendered may send data away, or run what it brings. `material`: what the model was shown.

    A hostile text of the greatest length takes seconds.
    """
    if "](" not in text and "://" not in text and "<" not in text and "]:" not in text and "www." not in text.casefold():
        return False  # nearly every answer
    shown = _Shown(material)
    return any(_leads_out(reading, shown) for reading in readings(text))


def _leads_out(reading: Reading, shown: _Shown) -> bool:
    for count, (address, is_image) in enumerate(_addresses(reading)):
        if count == ADDRESSES_MAX or _unsafe(address, shown, is_image=is_image):
            return True
    return any(_is_active(part, shown, len(part)) for part in reading.html) or _is_active(
        "\n".join(reading.words), shown, TAG_CHARACTERS_MAX
    )


def _addresses(reading: Reading) -> Iterable[tuple[str, bool]]:
    """Every address of the Markdown, and whether it is fetched without a click."""
    for address in reading.links:
        yield address, False
    for address in reading.images:
        yield address, True
    # What the grammar does not take for a link, as a reader may who mends what is unfinished, or is less strict.
    words = "\n\n".join(reading.words)
    images = {_label(match[2] or match[1]) for match in _IMAGE_REFERENCE.finditer(words)}
    for match in _INLINE.finditer(words):
        yield match[2] or match[3] or "", bool(match[1])
    for match in _AROUND_IMAGE.finditer(words):
        yield match[1] or match[2] or "", "![" in words
    for match in _DEFINITION.finditer(words):
        yield match[2], _label(match[1]) in images
    for match in _AUTOLINK.finditer(words):
        yield match[1], False
    for match in _BARE.finditer(words):
        if not _carries_nothing(match[1]):
            yield match[1], False


def _is_active(markup: str, shown: _Shown, reach: int) -> bool:
    """Whether HTML runs something, or loads or leads where it must not, by attributes that are not further than `reach` behind a tag."""
    markup = " ".join(markup.split())
    tags = list(itertools.islice(_TAG.finditer(markup), ADDRESSES_MAX + 1))
    if len(tags) > ADDRESSES_MAX or any(tag[1].casefold() in _ACTIVE_TAGS for tag in tags):
        return True
    places = [tag.end() for tag in tags]
    leading = [tag.end() for tag in tags if tag[1].casefold() in _LEADING_TAGS]
    for attribute in _ATTRIBUTE.finditer(markup, places[0]) if places else ():
        key = attribute[1].casefold()
        value = next((part for part in attribute.groups()[1:] if part is not None), "")
        if _HANDLER.fullmatch(key) or (key == "style" and "url" in value.casefold()):
            unsafe = _follows(attribute.start(), places, reach)
        else:
            unsafe = (
                key in _URL_ATTRIBUTES
                and _follows(attribute.start(), leading, reach)
                and _unsafe(value, shown, is_image=key in _FETCHED_ATTRIBUTES)
            )
        if unsafe:
            return True
    return False


def _follows(place: int, tags: Sequence[int], reach: int) -> bool:
    nearest = bisect.bisect_right(tags, place)
    return nearest > 0 and place - tags[nearest - 1] <= reach


def _unsafe(address: str, shown: _Shown, *, is_image: bool) -> bool:
    plain = _readable(address)
    if not plain or plain.startswith("#") or address in shown.addresses or plain in shown.addresses:
        return False
    if is_image or _UNSEEN.search(plain):
        return True
    if _trimmed(plain) in shown.places:
        return False
    try:
        parts = urlsplit(plain if not plain.startswith(("//", "www.")) else f"https://{plain.lstrip('/')}")
        host, scheme = (parts.hostname or "").casefold(), parts.scheme.casefold()
    except ValueError:
        return True  # no browser agrees with another what this is
    if scheme and scheme not in SAFE_SCHEMES:
        return True
    if scheme == "mailto":
        return bool(parts.query)
    if not host:
        return len(parts.query) > QUERY_CHARACTERS_MAX  # a place of ours, which a document cannot have meant
    if parts.username is not None or parts.password is not None or host not in shown.hosts:
        return True
    return len(parts.query) + len(parts.fragment) > QUERY_CHARACTERS_MAX or len(parts.path) > PATH_CHARACTERS_MAX


def _carries_nothing(bare: str) -> bool:
    """Whether a bare address, which shows where it leads, is short enough to be no more than a place."""
    try:
        parts = urlsplit(bare if "://" in bare else f"https://{bare}")
    except ValueError:
        return False
    return not parts.query and not parts.fragment and len(parts.path) <= QUERY_CHARACTERS_MAX and "@" not in parts.netloc


def _readable(address: str) -> str:
    """An address as a browser takes it: entities and escapes resolved, what it drops gone, slashes put right."""
    plain = re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", html.unescape(address)).replace("\\", "/")
    plain = _DROPPED.sub("", plain).strip(_EDGES)
    return re.sub(r"\A(https?):/*", r"\1://", plain, count=1, flags=re.IGNORECASE)


def _trimmed(address: str) -> str:
    return address.rstrip(_PUNCTUATION + "/").casefold()


def _label(text: str) -> str:
    return " ".join(text.casefold().split())
