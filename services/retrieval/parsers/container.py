"""ZIP containers, looked at before anything in them is unpacked, and read member by member within bounds. Nothing is written to disk."""

import io
import struct
import zipfile
import zlib
from pathlib import PurePosixPath

from services.retrieval.parsers.rejection import rejected

ENTRIES_MAX = 10_000
DIRECTORY_BYTES_MAX = 4 * 1024 * 1024
"""The list of 10,000 entries with long names. Reading it makes an object for each, so its size is looked at first."""
MEMBER_BYTES_MAX = 48 * 1024 * 1024
"""One member unpacked; as a tree of XML it takes several times that."""
TOTAL_BYTES_MAX = 512 * 1024 * 1024
"""All members unpacked. Pictures count, though they are never read: they hardly shrink, so honest files stay far below."""
RATIO_MAX = 100
RATIO_APPLIES_FROM_BYTES = 1024 * 1024
"""A small member may shrink by any ratio: an empty sheet does, and costs nothing."""

PROLOGUE_BYTES = 16 * 1024
"""Document types stand before the root element."""

_END = struct.Struct("<4s4H2LH")
_END_SIGNATURE = b"PK\x05\x06"
_COMMENT_BYTES_MAX = 65_535
_MANY = 0xFFFF


class Container:
    """A ZIP file whose members are named by path. Raises DocumentRejected: `zip_bomb`, `truncated`, `malformed`, `encrypted`."""

    def __init__(self, content: bytes) -> None:
        _refuse_a_long_directory(content)
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(content))
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error, UnicodeDecodeError):
            raise rejected("the file's directory of parts is broken", cause="malformed") from None
        self._members = {info.filename: info for info in self._zip.infolist()}
        self._refuse_bombs()

    @property
    def names(self) -> list[str]:
        return list(self._members)

    def has(self, name: str) -> bool:
        return name in self._members

    def read(self, name: str) -> bytes:
        """The member's bytes; none if there is no such member."""
        info = self._members.get(name)
        if info is None:
            return b""
        if info.flag_bits & 1:
            raise rejected("the file is encrypted; it opens with a password only", cause="encrypted")
        if info.file_size > MEMBER_BYTES_MAX:
            raise rejected("a part of the file is too large", cause="too_large", bytes_max=MEMBER_BYTES_MAX)
        try:
            with self._zip.open(info) as member:
                # A member holds what its entry says, or fails its checksum: zipfile reads no further.
                return member.read()
        except (zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError, ValueError, OSError):
            raise rejected("a part of the file is broken", cause="malformed") from None

    def refuse_document_types(self) -> None:
        """For libraries that read the parts themselves: no part may declare entities or a document type."""
        for name, info in self._members.items():
            if name.endswith((".xml", ".rels")) and not info.flag_bits & 1:
                try:
                    with self._zip.open(info) as member:
                        head = member.read(PROLOGUE_BYTES)
                except (zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError, ValueError, OSError):
                    raise rejected("a part of the file is broken", cause="malformed") from None
                # Without its zeros, UTF-16 reads as ASCII.
                if b"<!DOCTYPE" in head.replace(b"\0", b""):
                    raise rejected("the XML declares entities or a document type of its own; neither is followed", cause="dtd")

    def _refuse_bombs(self) -> None:
        total = 0
        for info in self._members.values():
            path = PurePosixPath(info.filename.replace("\\", "/"))
            if path.is_absolute() or ".." in path.parts:
                raise rejected("a part of the file has a path that leads out of it", cause="malformed")
            total += info.file_size
            if info.file_size > RATIO_APPLIES_FROM_BYTES and info.file_size > RATIO_MAX * max(info.compress_size, 1):
                raise rejected(f"a part of the file unpacks to more than {RATIO_MAX} times its size", cause="zip_bomb", ratio_max=RATIO_MAX)
        if total > TOTAL_BYTES_MAX:
            raise rejected("the file unpacks into too much", cause="zip_bomb", bytes_max=TOTAL_BYTES_MAX)


def _refuse_a_long_directory(content: bytes) -> None:
    """Look at the end record alone, before an object is made for each entry."""
    place = content.rfind(_END_SIGNATURE, max(0, len(content) - _COMMENT_BYTES_MAX - _END.size))
    if place < 0 or place + _END.size > len(content):
        raise rejected("the end of the file is missing", cause="truncated")
    _, _, _, _, entries, directory_bytes, _, _ = _END.unpack_from(content, place)
    # What is too many for the old record stands in the one for large archives, which no document needs.
    if entries == _MANY or entries > ENTRIES_MAX or directory_bytes > DIRECTORY_BYTES_MAX:
        raise rejected("the file holds too many parts", cause="zip_bomb", entries_max=ENTRIES_MAX)
