"""Would showing an answer's Markdown send data away, or run something? Pure; it reads what a browser would make of it, and changes nothing.

An address is safe if the passages or the question have its host and it carries nothing they did not have. An image is fetched without
a click, so it is held to more than a link.
"""

import html
import re
from collections.abc import Iterable
from urllib.parse import urlsplit

PATH_CHARACTERS_MAX = 100
"""A path of a known host may be so long before it counts as carrying data; documentation has such paths."""
QUERY_CHARACTERS_MAX = 40
"""A query or fragment of a known host may be so long."""
ADDRESSES_MAX = 1_000
"""An answer with more of them is no answer."""
SAFE_SCHEMES = frozenset({"http", "https", "mailto"})
_FENCE = re.compile(r"^[ ]{0,3}(`{3,}|~{3,})[^\n]*\n.*?(?:^[ ]{0,3}\1[`~]*[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"(?<!`)(`{1,8})(?!`)(?:(?!\1)[\s\S]){1,2000}?(?<!`)\1(?!`)")
_TARGET = r"\(\s{0,8}(?:<([^<>\n]{0,4000})>|((?:[^\s()\\]|\\.|\([^\s()]{0,2000}\)){0,4000}))"
_INLINE = re.compile(r"(!?)\[[^\[\]]{0,2000}\]" + _TARGET)
_AROUND_IMAGE = re.compile(r"\]" + _TARGET)
_DEFINITION = re.compile(r"^[ ]{0,3}\[([^\[\]]{1,1000})\]:[ \t]*\n?[ \t]*<?([^\s<>]{1,4000})", re.MULTILINE)
_IMAGE_REFERENCE = re.compile(r"!\[([^\[\]]{0,1000})\](?:\[([^\[\]]{0,1000})\])?")
_AUTOLINK = re.compile(r"<([A-Za-z][A-Za-z0-9+.-]{1,31}:[^\s<>]{0,4000})>")
_BARE = re.compile(r"(?<![\w/@(<\"'=])((?:https?://|www\.)[^\s<>\"'`\])]{1,4000})", re.IGNORECASE)
_TAG = re.compile(r"<[\s/]{0,8}([A-Za-z][\w:-]{0,32})")
TAG_CHARACTERS_MAX = 2_000
"""How far a tag's attributes are looked for. Quotes may hide its end, so text behind it is read as if it were part of it."""
_HANDLER = re.compile(
    r"on(?:error|load|unload|click|dblclick|mouse\w+|pointer\w+|touch\w+|key\w+|focus\w*|blur|toggle|animation\w+|transition\w+|begin|end"
    r"|wheel|scroll\w*|input|change|submit|reset|drag\w*|drop|copy|cut|paste|resize|play\w*|message|hashchange|popstate|show|start|finish)"
)
_ATTRIBUTE = re.compile(r"([\w:-]{1,64})\s{0,8}=\s{0,8}(?:\"([^\"]{0,4000})\"|'([^']{0,4000})'|([^\s\"'<>]{1,4000}))")
_ACTIVE_TAGS = frozenset(
    ("script", "iframe", "object", "embed", "form", "meta", "link", "style", "base", "svg", "math", "video", "audio", "source", "input")
)
_URL_ATTRIBUTES = frozenset({"href", "src", "srcset", "action", "formaction", "poster", "data", "background", "xlink:href", "ping", "cite"})
_ADDRESS = re.compile(r"(?:https?://|www\.)[^\s<>\"'`\])}]{1,2000}", re.IGNORECASE)
_HOST = re.compile(r"\b(?:[a-z0-9-]{1,63}\.){1,8}[a-z]{2,24}\b", re.IGNORECASE)
_UNSEEN = re.compile("[\x00-\x20\x7f-\xa0\u200b-\u200f\u2028-\u202f\u2060-\u206f\ufeff]")


class _Shown:
    """The addresses and hosts of what the model was shown."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.addresses: set[str] = set()
        self.hosts: set[str] = set()
        for text in texts:
            self.addresses |= {_trimmed(found[0]) for found in _ADDRESS.finditer(text)}
            self.hosts |= {found[0].casefold() for found in _HOST.finditer(text)}


def carries_out(text: str, material: Iterable[str]) -> bool:
    """Whether a reader of `text` who sees it rendered may send data away, or run what it brings. `material`: what the model was shown."""
    if "](" not in text and "://" not in text and "<" not in text and "]:" not in text and "www." not in text.casefold():
        return False  # nearly every answer
    shown = _Shown(material)
    seen = _CODE.sub(" ", _FENCE.sub("\n", text))
    images = {_label(match[2] or match[1]) for match in _IMAGE_REFERENCE.finditer(seen)}
    for count, (address, is_image) in enumerate(_addresses(seen, images)):
        if count == ADDRESSES_MAX or _unsafe(address, shown, is_image=is_image):
            return True
    return _has_active_html(seen, shown)


def _addresses(seen: str, images: set[str]) -> Iterable[tuple[str, bool]]:
    """Every address of the Markdown, and whether it is fetched without a click."""
    for match in _INLINE.finditer(seen):
        yield match[2] or match[3] or "", bool(match[1])
    for match in _AROUND_IMAGE.finditer(seen):
        yield match[1] or match[2] or "", False
    for match in _DEFINITION.finditer(seen):
        yield match[2], _label(match[1]) in images
    for match in _AUTOLINK.finditer(seen):
        yield match[1], False
    for match in _BARE.finditer(seen):
        if not _carries_nothing(match[1]):
            yield match[1], False


def _has_active_html(seen: str, shown: _Shown) -> bool:
    for count, tag in enumerate(_TAG.finditer(seen)):
        name = tag[1].casefold()
        if count == ADDRESSES_MAX or name in _ACTIVE_TAGS:
            return True
        for attribute in _ATTRIBUTE.finditer(seen, tag.end(), tag.end() + TAG_CHARACTERS_MAX):
            key = attribute[1].casefold()
            value = next((part for part in attribute.groups()[1:] if part is not None), "")
            if _HANDLER.fullmatch(key) or (key == "style" and "url" in value.casefold()):
                return True
            if key in _URL_ATTRIBUTES and _unsafe(value, shown, is_image=name == "img"):
                return True
    return False


def _unsafe(address: str, shown: _Shown, *, is_image: bool) -> bool:
    plain = _readable(address)
    if not plain or plain.startswith("#"):
        return False
    if _trimmed(plain) in shown.addresses:
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
        return is_image or len(parts.query) > QUERY_CHARACTERS_MAX  # a place of ours, which a document cannot have meant
    if parts.username is not None or parts.password is not None or host not in shown.hosts:
        return True
    carried = len(parts.query) + len(parts.fragment)
    return carried > (0 if is_image else QUERY_CHARACTERS_MAX) or len(parts.path) > PATH_CHARACTERS_MAX


def _carries_nothing(bare: str) -> bool:
    """Whether a bare address, which shows where it leads, is short enough to be no more than a place."""
    try:
        parts = urlsplit(bare if "://" in bare else f"https://{bare}")
    except ValueError:
        return False
    return not parts.query and not parts.fragment and len(parts.path) <= QUERY_CHARACTERS_MAX and "@" not in parts.netloc


def _readable(address: str) -> str:
    """An address as a browser takes it: entities and escapes resolved, unseen characters gone, slashes put right."""
    plain = _UNSEEN.sub("", re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", html.unescape(address))).replace("\\", "/")
    return re.sub(r"\A(https?):/*", r"\1://", plain, count=1, flags=re.IGNORECASE)


def _trimmed(address: str) -> str:
    return address.rstrip(".,;:!?)*_/").casefold()


def _label(text: str) -> str:
    return " ".join(text.casefold().split())
