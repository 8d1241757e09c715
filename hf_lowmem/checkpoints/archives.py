"""The zip archives of torch.save, read as strictly as torch writes them.

Two readers of zip files may find different members in the same bytes: the format has two directories, comments,
prefixes and names that occur twice. What is checked must be what torch's reader then loads. So an archive is taken only
if it has one directory, at its end, that agrees with the members; no compression; and no member that torch.save does
not write.
"""

import re
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

from hf_lowmem.checkpoints.opcodes import Refused

START = b"PK\x03\x04"
_MEMBER = re.compile(
    r"data\.pkl|byteorder|version|\.format_version|\.storage_alignment|\.data/serialization_id|data/[0-9]+"
)
_END, _FAR_END, _FAR_PLACE = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
_ENTRY, _HEADER = struct.Struct("<4s6H3L5H2L"), struct.Struct("<4s5H3L2H")
_FULL = 0xFFFFFFFF  # of a number that did not fit: it stands in an extra field
_FLAGS = 0x0808  # sizes after the data; names in UTF-8
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Window:
    """A part of an open file that is read as if it were a file."""

    file: BinaryIO
    start: int
    size: int

    def at(self, place: int, count: int) -> bytes:
        """The `count` bytes from `place` on. Raises Refused where the archive has fewer."""
        if not 0 <= place <= place + count <= self.size:
            raise Refused("it is cut off")
        self.file.seek(self.start + place)
        data = self.file.read(count)
        if len(data) != count:
            raise Refused("it is cut off")
        return data


class Record(NamedTuple):
    """A member of an archive."""

    start: int
    size: int
    checksum: int


def records(window: Window) -> dict[str, Record]:
    """The members of an archive, by their names without the folder that all are in.

    Raises:
        Refused: where it is no archive, or not one that torch.save writes.
    """
    if window.at(0, 4) != START:
        raise Refused("it is not in torch's zip format")
    count, size, place = _directory(window)
    data, at = window.at(place, size), 0
    found: dict[str, Record] = {}
    folders: set[str] = set()
    for _ in range(count):
        name, record, at = _entry(window, data, at, place)
        folder, _, inner = name.partition("/")
        folders.add(folder)
        if _MEMBER.fullmatch(inner) is None or inner in found or len(folders) > 1:
            raise Refused(f"it has a member {name!r}, which torch.save does not write, or has it twice")
        found[inner] = record
    if at != size or "data.pkl" not in found:
        raise Refused("its directory is damaged")
    return found


def check_sums(window: Window, found: Mapping[str, Record]) -> None:
    """Raise Refused where a member is not what was written."""
    for name, record in found.items():
        checksum = 0
        for place in range(record.start, record.start + record.size, _CHUNK):
            checksum = zlib.crc32(window.at(place, min(_CHUNK, record.start + record.size - place)), checksum)
        if checksum != record.checksum:
            raise Refused(f"{name} in it fails its checksum")


def _directory(window: Window) -> tuple[int, int, int]:
    """(entries, bytes, place) of the directory, which must end where the end record begins."""
    ends = window.size - _END.size
    mark, disk, first, here, count, size, place, comment = _END.unpack(window.at(ends, _END.size))
    if mark != b"PK\x05\x06" or disk or first or here != count or comment:
        raise Refused("it is cut off, or something follows its end")
    far = ends - _FAR_PLACE.size
    if far >= _FAR_END.size and window.at(far, 4) == b"PK\x06\x07":
        ends = far - _FAR_END.size
        _, disk, pointer, disks = _FAR_PLACE.unpack(window.at(far, _FAR_PLACE.size))
        mark, length, _, _, *rest = _FAR_END.unpack(window.at(ends, _FAR_END.size))
        wide = rest[3:]
        if (
            mark != b"PK\x06\x06"
            or length != _FAR_END.size - 12
            or pointer != ends
            or disk
            or disks != 1
            or any(rest[:2])
        ):
            raise Refused("its end is damaged")
        for short, long, most in zip((count, size, place), wide, (0xFFFF, _FULL, _FULL), strict=True):
            if short not in (long, most):
                raise Refused("it has two ends that differ")
        count, size, place = wide
    if place + size != ends:
        raise Refused("its directory is not where its end says")
    return count, size, place


def _entry(window: Window, data: bytes, at: int, limit: int) -> tuple[str, Record, int]:
    """One entry of the directory, checked against the header before the member; and where the next begins."""
    if at + _ENTRY.size > len(data):
        raise Refused("its directory is cut off")
    mark, _, _, flags, method, _, _, checksum, packed, size, *lengths, _, place = _ENTRY.unpack_from(data, at)
    name_length, extra_length, comment, disk, _ = lengths
    at += _ENTRY.size
    raw, extra = data[at : at + name_length], data[at + name_length : at + name_length + extra_length]
    at += name_length + extra_length
    if mark != b"PK\x01\x02" or at > len(data) or comment or disk:
        raise Refused("its directory is damaged")
    if method or flags & ~_FLAGS:
        raise Refused(f"its member {raw!r} is compressed or encrypted")
    size, packed, place = _widened(extra, [size, packed, place])
    header = _HEADER.unpack(window.at(place, _HEADER.size))
    start = place + _HEADER.size + header[-2] + header[-1]
    same = header[0] == START and header[3] == 0 and window.at(place + _HEADER.size, header[-2]) == raw
    if not same or packed != size or start + size > limit:
        raise Refused(f"its member {raw!r} is not where its directory says")
    return raw.decode("utf-8", "backslashreplace"), Record(start, size, checksum), at


def _widened(extra: bytes, values: list[int]) -> list[int]:
    """Numbers of an entry, with those that did not fit taken from its extra field."""
    wide: list[int] = []
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == 1:
            if wide or length % 8 or 4 + length > len(extra):
                raise Refused("its directory is damaged")
            wide = list(struct.unpack_from(f"<{length // 8}Q", extra, 4))
        extra = extra[4 + length :]
    if sum(value == _FULL for value in values) > len(wide):
        raise Refused("its directory is damaged")
    return [wide.pop(0) if value == _FULL else value for value in values]
