"""The file of a bundle: a plain zip that is written in one way only, and read with suspicion.

Writing is deterministic: the same members give the same bytes, with one zlib. Reading takes a file
from a stranger: nothing is unpacked under a name that the archive chose, sizes are bounded before
anything is decompressed, and whatever a zip may hold beside plain members is refused (links,
folders, encryption, comments, bytes between members, two members under one name).

The first member, ``bundle.json``, lists the size and the SHA-256 of every other one. The SHA-256 of
``bundle.json`` itself is the *fingerprint* of the whole.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abacist.errors import RunError
from abacist.records.rundir import write_aside

INDEX_NAME = "bundle.json"
FORMAT, FORMAT_VERSION = "abacist-bundle", 1

MOST_MEMBERS = 5_000
MOST_BYTES_OF_A_MEMBER = 256 * 2**20
MOST_BYTES = 2**30
_MOST_BYTES_OF_LIST = 2**20  # of the zip's own list of members
_END = struct.Struct("<4s4H2LH")  # the end record of a zip without comment
_LOCAL_HEADER_BYTES = 30
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*(?:/[A-Za-z0-9][A-Za-z0-9._+-]*){0,4}")
_HINT = "It is not a bundle as `abacist bundle` writes it. Fetch it again."


@dataclass(frozen=True)
class Contents:
    """What a bundle holds: the index, and the bytes of every member by name.

    ``altered`` says of each member that is not as the index lists it (name, listed, found) what is
    wrong; such members are in ``members`` as they were found.
    """

    index: Mapping[str, Any]
    members: Mapping[str, bytes]
    fingerprint: str
    altered: list[tuple[str, str, str]] = field(default_factory=list)


def sha256_of(data: bytes) -> str:
    """The SHA-256 of ``data`` in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def pack(index: Mapping[str, Any], members: Mapping[str, bytes]) -> tuple[bytes, str]:
    """The bytes of a bundle, and its fingerprint. ``files`` is added to ``index``.

    Raises RunError if it would be larger than :func:`read` accepts.
    """
    files = {
        name: {"bytes": len(data), "sha256": sha256_of(data)}
        for name, data in sorted(members.items())
    }
    whole = {"format": FORMAT, "format_version": FORMAT_VERSION, **index, "files": files}
    text = json.dumps(whole, ensure_ascii=False, indent=1, sort_keys=True, allow_nan=False)
    first = text.encode("utf-8", "backslashreplace")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in [(INDEX_NAME, first), *sorted(members.items())]:
            if not _NAME.fullmatch(name) or len(data) > MOST_BYTES_OF_A_MEMBER:
                raise RunError(f"{name} ({len(data):,} bytes) cannot be a part of a bundle.")
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.create_system, entry.external_attr = 3, 0o100644 << 16
            archive.writestr(entry, data, compresslevel=9)
    packed = buffer.getvalue()
    if len(packed) > MOST_BYTES or sum(map(len, members.values())) > MOST_BYTES:
        raise RunError(f"The bundle would have {len(packed):,} bytes, more than can be read again.")
    return packed, sha256_of(first)


def write(path: Path, packed: bytes) -> None:
    """Write a packed bundle, whole or not at all. Raises RunError if it cannot be written."""
    try:
        write_aside(path, packed)
    except OSError as error:
        raise RunError(
            f"{path}: the bundle was not written ({error.strerror or error}).",
            "Nothing is left of it there. Free some space, or choose another place with -o.",
        ) from error


def is_bundle(path: Path) -> bool:
    """Whether a file is what :func:`write` wrote, going by its list of members."""
    try:
        with zipfile.ZipFile(path) as found:
            return INDEX_NAME in found.namelist()
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return False


def read(path: Path) -> Contents:
    """The contents of the bundle in ``path``.

    Raises RunError if it is no bundle, of a newer format, or holds what no bundle may hold. What
    merely differs from the index is in ``altered``.
    """
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise RunError(f"{path}: {size:,} bytes are more than a bundle may have.", _HINT)
        data = path.read_bytes()
    except OSError as error:
        hint = "Give the file that `abacist bundle RUN` wrote."
        raise RunError(f"{path}: cannot be read ({error.strerror}).", hint) from error
    members = _members_of(path, data)
    if INDEX_NAME not in members:
        raise RunError(f"{path}: not a bundle, it holds no {INDEX_NAME}.", _HINT)
    first = members.pop(INDEX_NAME)
    index = _index_of(path, first)
    return Contents(index, members, sha256_of(first), _altered(index["files"], members))


def _members_of(path: Path, data: bytes) -> dict[str, bytes]:
    """Every member's bytes; the layout must be exactly that which :func:`pack` writes."""

    def refused(why: str) -> RunError:
        return RunError(f"{path}: refused as a bundle: {why}.", _HINT)

    if data[:4] != b"PK\x03\x04" or len(data) < _END.size:
        raise RunError(f"{path}: not a bundle.", "Give the file that `abacist bundle RUN` wrote.")
    end = _END.unpack(data[-_END.size :])
    signature, disk, first_disk, here, count, list_bytes, list_at, comment = end
    if signature != b"PK\x05\x06" or comment or disk or first_disk or here != count:
        raise refused("it is cut short, or something follows its end")
    if count > MOST_MEMBERS or list_bytes > _MOST_BYTES_OF_LIST:
        raise refused(f"it lists {count:,} members")
    if list_at + list_bytes + _END.size != len(data):
        raise refused("its list of members is not where it should be")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            _refuse_odd(entries, list_at, refused)
            found = {}
            for entry in entries:
                with archive.open(entry) as member:
                    found[entry.filename] = member.read(entry.file_size + 1)
                if len(found[entry.filename]) != entry.file_size:
                    raise refused(f"{entry.filename} has another size than it says")
            return found
    except RunError:
        raise
    except Exception as error:  # zipfile and zlib raise whatever the bytes make them raise
        raise refused(f"damaged ({type(error).__name__}: {str(error)[:100]})") from error


def _refuse_odd(entries: list[zipfile.ZipInfo], list_at: int, refused: Any) -> None:
    names = [entry.filename for entry in entries]
    if len(set(map(str.lower, names))) != len(names):
        raise refused("two of its members have one name")
    at = total = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        name = entry.orig_filename[:100]
        if not _NAME.fullmatch(entry.orig_filename) or entry.orig_filename != entry.filename:
            raise refused(f"a member is called {name!r}")
        if entry.flag_bits or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise refused(f"{name} is encrypted, or packed in another way")
        if entry.extra or entry.comment or entry.external_attr >> 16 != 0o100644:
            raise refused(f"{name} is not a plain file")
        total += entry.file_size
        if entry.file_size > MOST_BYTES_OF_A_MEMBER or total > MOST_BYTES:
            raise refused(f"{name} would have {entry.file_size:,} bytes when unpacked")
        if entry.header_offset != at:
            raise refused(f"there are other bytes before {name}")
        at += _LOCAL_HEADER_BYTES + len(entry.filename) + entry.compress_size
    if at != list_at:
        raise refused("there are other bytes behind its last member")


def _index_of(path: Path, first: bytes) -> dict[str, Any]:
    try:
        index = json.loads(first.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path}: its {INDEX_NAME} is damaged ({error}).", _HINT) from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise RunError(f"{path}: its {INDEX_NAME} was not written by Abacist.", _HINT)
    if index.get("format_version") != FORMAT_VERSION:
        raise RunError(
            f"{path}: a bundle of format {str(index.get('format_version'))[:20]}, this Abacist "
            f"reads format {FORMAT_VERSION}.",
            "Use the Abacist that wrote it, or a newer one.",
        )
    files = index.get("files")
    listed = isinstance(files, dict) and all(
        isinstance(entry, dict) and isinstance(entry.get("sha256"), str) for entry in files.values()
    )
    if not listed:
        raise RunError(f"{path}: its {INDEX_NAME} lists no files.", _HINT)
    return index


def _altered(
    files: Mapping[str, Mapping[str, Any]], members: Mapping[str, bytes]
) -> list[tuple[str, str, str]]:
    found = []
    for name in sorted(files.keys() | members.keys()):
        if name not in members:
            found.append((name[:200], "listed", "missing"))
        elif name not in files:
            found.append((name, "not listed", f"a file of {len(members[name]):,} bytes"))
        elif (now := sha256_of(members[name])) != files[name]["sha256"]:
            was = str(files[name]["sha256"])[:16]
            found.append((name, f"SHA-256 {was}…", f"SHA-256 {now[:16]}…"))
    return found
