"""State files: the arrays of a layer's state in one ``.npz``, written atomically and read without trust.

The file is a zip archive of uncompressed ``.npy`` members (little-endian, format 1.0): ``format_version`` and
one per entry of the state, arrays of numbers and one text, so that ``numpy.load(path, allow_pickle=False)`` and any
zip tool read it too.

The reader is its own, and strict: it takes no pickle, no compression, no encryption, no bytes that are not
accounted for, and evaluates nothing. It knows beforehand how large each array is, so a file can ask for no
more memory than the state needs: every claim is compared with the bytes that are there, or with what is
expected.
"""

from __future__ import annotations

import contextlib
import errno
import io
import math
import os
import re
import stat
import struct
import zlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from batchnorm import _validate
from batchnorm._arrays import Array

if TYPE_CHECKING:
    from pathlib import Path


class Entry(NamedTuple):
    """What a state must hold under one name."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Bytes of the array itself."""
        return math.prod(self.shape) * self.dtype.itemsize


FORMAT_VERSION = 1

_VERSION_NAME = "format_version"
_VERSION_ENTRY = Entry((), np.dtype(np.int64))

# Room for everything in a file that is not an array: a hundred times what the headers of a state take.
_OVERHEAD_BYTES = 64 * 1024
_MEMBERS = 64

# The records of a zip file (APPNOTE 6.3, sections 4.3.7, 4.3.12 and 4.3.16).
_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_ZIP64 = 0xFFFFFFFF  # in a local header: the size is in an extra field of 20 bytes, as numpy.savez writes it
_ZIP64_EXTRA_BYTES = 20

# The header as NumPy writes it for a plain dtype, and no other text that Python would evaluate to the same.
_NPY_MAGIC = b"\x93NUMPY\x01\x00"
_NPY_HEADER = re.compile(
    rb"\{'descr': '([<>|=]?[A-Za-z]\d{0,6})', 'fortran_order': (False|True), "
    rb"'shape': \(([\d, ]{0,64})\), \} *\n"
)


class Text(NamedTuple):
    """A text that a file may hold beside its arrays.

    `require` is called with it before any array is looked at, with None where there is none, and raises ValueError where
    it is not the one that is needed. `nbytes` is what that one takes: four bytes a character.
    """

    name: str
    nbytes: int
    require: Callable[[str | None], None]


def write_state(path: str | os.PathLike[str], state: Mapping[str, Array]) -> None:
    """Write the arrays of `state` (plain numbers, or one text each) to `path`, all or nothing. Equal states give equal bytes.

    The path is used as it is (no ``.npz`` is added), and a symbolic link is followed to the file it means. A file that is
    there is replaced by one of the same permissions and, as far as this process may, owner and group; a new one has those
    of the umask. TypeError or ValueError for a path of another type, or of what is no file (a pipe, a socket, a device);
    OSError where the file cannot be written: no room, no permission for it and its directory, a loop of links.

    The bytes go to a new file in the same directory, are flushed to the disk, and only then take the name `path`. A call
    that raises leaves the old file as it was and no other file behind; a process that is killed leaves the old or the new
    file, and at worst a ``.batchnorm-*.tmp`` beside it. A file of several names (hard links) is written in place instead,
    since its other names would else keep the old state: a call that raises puts the old bytes back, and only a process
    that is killed, or a power cut, can leave a file that is neither, which `read_state` refuses. Memory: twice the state.
    Threads: any; of several writers of one path, one whole file wins.

    >>> import os, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_state(os.path.join(folder, "state.npz"), {"running_mean": np.zeros(3)})
    ...     read_state(os.path.join(folder, "state.npz"), {"running_mean": Entry((3,), np.dtype(np.float64))})
    {'running_mean': array([0., 0., 0.])}
    """
    target, old = _target(_fsdecoded(path))
    content = _encode({_VERSION_NAME: np.array(FORMAT_VERSION, np.int64), **state})
    if old is not None and old.st_nlink > 1:
        _overwrite(target, content)
    else:
        _replace(target, old, content)


def read_state(
    path: str | os.PathLike[str], entries: Mapping[str, Entry], text: Text | None = None
) -> dict[str, Array]:
    """Read from `path` exactly the arrays that `entries` names, each with the shape and dtype given there.

    Gives fresh arrays in native byte order, without the `text` that the file may hold beside them. What the numbers mean
    is not checked here. Memory: three times the state at most, whatever the file claims. Threads: any.

    ValueError for a file that is not such a state file or is of another format version, and nothing else for any content
    of a file; TypeError for a path of another type, OSError where the file cannot be read.
    """
    source = _fsdecoded(path)
    try:
        room = sum(entry.nbytes for entry in entries.values()) + (0 if text is None else text.nbytes)
        members = _unpack(_read_bounded(source, room, text))
        version = _member_name(_VERSION_NAME)
        if version not in members:
            raise _malformed("file", f"have a member {version!r}", ", ".join(map(repr, members)) or "no members")
        came = int(_decode(version, members[version], _VERSION_ENTRY))
        if came != FORMAT_VERSION:
            needed = f"be {FORMAT_VERSION}, the one that this release of batchnorm reads"
            raise _malformed("format_version", needed, came)
        if text is not None:
            name = _member_name(text.name)
            text.require(_decode_text(name, members.pop(name)) if name in members else None)
        expected = {_member_name(name): entry for name, entry in entries.items()}
        if set(members) != {version, *expected}:
            needed = ", ".join([version, *expected])
            raise _malformed("file", f"have the members {needed}", ", ".join(map(repr, members)) or "none")
        return {name: _decode(_member_name(name), members[_member_name(name)], e) for name, e in entries.items()}
    except ValueError as error:
        error.add_note(f"while reading the state file {source!r}")
        raise


# ---- writing ---------------------------------------------------------------------------------------------


def _target(path: str) -> tuple[Path, os.stat_result | None]:
    """Return the file that `path` means, links followed, and what is known of it; None where there is none yet."""
    from pathlib import Path  # here and not above: most processes save nothing, and it takes long to import

    target = Path(os.path.realpath(path))
    try:
        old = Path(path).stat()  # an OSError for a loop of links, which realpath lets through
    except FileNotFoundError:
        return target, None
    if stat.S_ISDIR(old.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(old.st_mode):
        raise _malformed("path", "be that of a regular file or of none", stat.filemode(old.st_mode))
    # A rename would not ask whether the file may be written.
    os.close(_open_without_waiting(os.fspath(target), os.O_WRONLY))
    return target, old


def _replace(target: Path, old: os.stat_result | None, content: bytes) -> None:
    """Let a new file take the name `target`, with what `old` had of owner and permissions."""
    temporary = target.with_name(f".batchnorm-{os.urandom(8).hex()}.tmp")
    # The umask's permissions, or the owner's alone until it gets those of the old one.
    permissions = 0o666 if old is None else 0o600
    try:
        with open(temporary, "xb", opener=lambda path, flags: os.open(path, flags, permissions)) as file:
            file.write(content)
            file.flush()
            if old is not None:
                _take_after(temporary, old)
            os.fsync(file.fileno())
        temporary.replace(target)
    except FileExistsError:  # another's
        raise
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync_directory(target.parent)


def _take_after(path: Path, old: os.stat_result) -> None:
    """Give a file the owner, group and permissions of another, as far as this process may."""
    mode = stat.S_IMODE(old.st_mode)
    if hasattr(os, "chown"):
        try:
            os.chown(path, old.st_uid, old.st_gid)
        except OSError:
            mode &= 0o777
            try:
                os.chown(path, -1, old.st_gid)
            except OSError:  # the permissions of the old group are not meant for ours
                mode = (mode & 0o707) | (mode & 0o007) << 3
    path.chmod(mode)


def _overwrite(target: Path, content: bytes) -> None:
    """Write a file in place; put its old bytes back where that fails."""
    with target.open("r+b", buffering=0) as file:
        old = file.read()
        try:
            _write_from_start(file, content)
        except BaseException:
            with contextlib.suppress(OSError):
                _write_from_start(file, old)
            raise


def _write_from_start(file: io.FileIO, content: bytes) -> None:
    file.seek(0)
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]
    file.truncate()
    os.fsync(file.fileno())


def _encode(state: Mapping[str, Array]) -> bytes:
    import zipfile  # here and not above, as pathlib is

    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
        for name, array in state.items():
            member = io.BytesIO()
            little_endian = array.astype(array.dtype.newbyteorder("<"), order="C")
            np.lib.format.write_array(member, little_endian, version=(1, 0), allow_pickle=False)
            # Fixed date, system and permissions: the bytes depend on the state alone.
            info = zipfile.ZipInfo(_member_name(name), date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system, info.external_attr = 3, 0o644 << 16
            archive.writestr(info, member.getvalue())
    return content.getvalue()


def _sync_directory(directory: Path) -> None:
    """Make a rename survive a power cut, where the system can. The file itself is whole either way."""
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):  # some network file systems refuse fsync of a directory
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ---- reading ---------------------------------------------------------------------------------------------


def _read_bounded(path: str, array_bytes: int, text: Text | None) -> bytes:
    from pathlib import Path

    limit = array_bytes + _OVERHEAD_BYTES
    _refuse_devices(Path(path).stat())  # before it is opened, which could empty a pipe or wind a tape
    with open(path, "rb", opener=_open_without_waiting) as file:
        status = os.fstat(file.fileno())
        _refuse_devices(status)
        if status.st_size > limit:
            if text is not None:  # which tells more than a size
                _require_first(file.read(_OVERHEAD_BYTES), text)
            raise _malformed("file", f"have at most {limit} bytes for this state", status.st_size)
        return file.read(limit)


def _require_first(raw: bytes, text: Text) -> None:
    """Let `text` be required where it is at the beginning of a file, of which no more is there."""
    name, at = _member_name(text.name), 0
    spelled = name.encode()
    while at + _LOCAL.size <= len(raw) and raw.startswith(b"PK\x03\x04", at):
        *_, size, name_bytes, extra = _LOCAL.unpack_from(raw, at)
        begin = at + _LOCAL.size + name_bytes + extra
        if name_bytes == len(spelled) and raw.startswith(spelled, at + _LOCAL.size) and begin + size <= len(raw):
            text.require(_decode_text(name, raw[begin : begin + size]))
            return
        at = begin + size


def _refuse_devices(status: os.stat_result) -> None:
    """Refuse what is no file. A directory is left to open(), whose error names it."""
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise _malformed("file", "be a regular file", stat.filemode(status.st_mode))


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a pipe without a writer would hang the open


def _unpack(raw: bytes) -> dict[str, bytes]:
    """Split a zip file that has nothing but stored members, one after the other, and their directory."""
    end = len(raw) - _END.size
    if end < 0 or not raw.startswith(b"PK") or raw[end : end + 4] != b"PK\x05\x06":
        raise _malformed("file", "be a whole .npz file without a comment", f"{len(raw)} bytes that are not")
    _, disk, first_disk, here, count, size, start, comment_bytes = _END.unpack_from(raw, end)
    if (disk, first_disk, comment_bytes) != (0, 0, 0) or here != count:
        raise _malformed("zip end record", "describe one whole file", _END.unpack_from(raw, end)[1:])
    if count > _MEMBERS:
        raise _malformed("file", f"have at most {_MEMBERS} members", count)
    if start + size != end:
        raise _malformed("zip directory", f"end at byte {end}", start + size)

    members: dict[str, bytes] = {}
    at, data_end = start, 0
    for _ in range(count):
        name, at, data_begin, data_end = _locate(raw, at, end, data_end, start)
        if name in members:
            raise _malformed(f"member {name!r}", "be there once", "a second one")
        members[name] = raw[data_begin:data_end]
    if at != end:
        raise _malformed("zip directory", f"have {count} records", f"{end - at} bytes more")
    if data_end != start:
        raise _malformed("file", "have nothing between its members and their directory", f"{start - data_end} bytes")
    return members


def _locate(raw: bytes, at: int, end: int, expected_offset: int, data_limit: int) -> tuple[str, int, int, int]:
    """Return the member whose directory record begins at `at`: name, record's end, data's begin and end.

    All of the record is checked, and its local header must say the same: where the two differ, parsers
    disagree.
    """
    if at + _CENTRAL.size > end:
        raise _malformed("zip directory", "hold its records", f"{end - at} bytes for one")
    (magic, _, _, flags, method, _, _, crc, stored, size, name_bytes, extra, comment, disk, _, _, offset) = (
        _CENTRAL.unpack_from(raw, at)
    )
    record_end = at + _CENTRAL.size + name_bytes
    if magic != b"PK\x01\x02" or record_end > end or (extra, comment, disk) != (0, 0, 0):
        raise _malformed("zip directory", "have plain records", f"another at byte {at}")
    raw_name = raw[at + _CENTRAL.size : record_end]
    name = raw_name.decode("ascii", "backslashreplace")
    what = f"member {name!r}"
    if (flags, method) != (0, 0) or stored != size:
        raise _malformed(what, "be stored as it is", f"method {method}, flags {flags}, {stored} bytes for {size}")
    if offset != expected_offset:
        raise _malformed(what, f"begin at byte {expected_offset}", offset)

    name_begin = offset + _LOCAL.size
    if name_begin + name_bytes > data_limit:
        raise _malformed(what, f"end before byte {data_limit}", name_begin + name_bytes)
    magic, _, *local, local_name_bytes, extra = _LOCAL.unpack_from(raw, offset)
    local_flags, local_method, _, _, local_crc, local_stored, local_size = local
    # The last form is what numpy.savez leaves under Python 3.11.0 to 3.11.3: the extra field is there, but not used.
    forms = ((size, size, 0), (_ZIP64, _ZIP64, _ZIP64_EXTRA_BYTES), (size, size, _ZIP64_EXTRA_BYTES))
    sizes_agree = (local_stored, local_size, extra) in forms
    if (
        magic != b"PK\x03\x04"
        or (local_flags, local_method, local_crc, local_name_bytes) != (flags, method, crc, name_bytes)
        or raw[name_begin : name_begin + name_bytes] != raw_name
        or not sizes_agree
    ):
        raise _malformed(what, "have a local header that agrees with the directory", "another")
    data_begin = name_begin + name_bytes + extra
    data_end = data_begin + size
    if data_end > data_limit:
        raise _malformed(what, f"end before byte {data_limit}", data_end)
    actual = zlib.crc32(memoryview(raw)[data_begin:data_end])
    if actual != crc:
        raise _malformed(what, f"have the checksum {crc:#010x}", f"{actual:#010x}")
    return name, record_end, data_begin, data_end


def _decode_text(name: str, content: bytes) -> str:
    """Return the text of a .npy member of one string, of whatever length."""
    what = f"member {name!r}"
    begin, descr, fortran, shape = _header(what, content)
    characters, rest = divmod(len(content) - begin, 4)
    if (descr, fortran, shape, rest) != (f"<U{characters}", "False", "", 0):
        came = f"dtype {descr!r}, shape ({shape}), {len(content) - begin} bytes"
        raise _malformed(what, "be one text of 4 bytes a character", came)
    try:
        return content[begin:].decode("utf-32-le")
    except UnicodeDecodeError:
        raise _malformed(what, "hold characters of Unicode", "others") from None


def _decode(name: str, content: bytes, entry: Entry) -> Array:
    """Return the array of one .npy member, whose header is compared before its data is looked at."""
    what = f"member {name!r}"
    begin, descr, fortran, shape = _header(what, content)
    # A spelling of the expected dtype or nothing: no text of the file is ever made into a dtype.
    expected = entry.dtype.newbyteorder("<").str
    if descr != expected:
        raise _malformed(what, f"have dtype {expected!r}", repr(descr))
    if fortran != "False":
        raise _malformed(what, "be in C order", "Fortran order")
    if shape != str(entry.shape)[1:-1]:
        raise _malformed(what, f"have shape {entry.shape}", f"({shape})")
    if len(content) - begin != entry.nbytes:
        raise _malformed(what, f"have {entry.nbytes} bytes of data", len(content) - begin)
    stored = np.frombuffer(content, expected, offset=begin) if entry.nbytes else np.empty(0, expected)
    return stored.astype(entry.dtype).reshape(entry.shape)


def _header(what: str, content: bytes) -> tuple[int, str, str, str]:
    """Return where the data of a .npy member begins, and its dtype, whether in Fortran's order, and shape, as texts."""
    if content[:8] != _NPY_MAGIC:
        raise _malformed(what, "begin as .npy format 1.0", content[:8])
    begin = 10 + int.from_bytes(content[8:10], "little")
    header = _NPY_HEADER.fullmatch(content[10:begin])
    if header is None:
        raise _malformed(what, "have the .npy header of a plain array", content[10 : min(begin, 138)])
    descr, fortran, shape = (group.decode("ascii") for group in header.groups())
    return begin, descr, fortran, shape


def _member_name(name: str) -> str:
    return f"{name}.npy"


# ---- errors ----------------------------------------------------------------------------------------------


def _malformed(what: str, needed: str, came: object) -> ValueError:
    """Return the error for a file that is not a state file as this package writes it."""
    return ValueError(f"{what} must {needed}, got {came}")


def _fsdecoded(value: object) -> str:
    """Give a path as a str."""
    if not isinstance(value, (str, bytes, os.PathLike)):
        raise TypeError(f"path must be a str or os.PathLike, got {_validate.kind(value)}")
    return os.fsdecode(value)
