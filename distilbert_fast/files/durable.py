"""Files and directories that are whole or not there, and files that say so when they are not.

What is written goes to a hidden name beside its place, is flushed to disk and renamed: whoever reads sees what was
there before or all that is new, also after a crash or on a full disk. Every attempt uses the same hidden name, so the
next one removes what a killed one left. ``replacing`` does that for a file, ``building`` for a directory, ``filling``
for files of a directory that is there; ``lock`` keeps two processes from writing one thing. What is read must be a
regular file (opening a FIFO would wait for ever) and is compared with a checksum where one is at hand. ``schema`` reads
JSON.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import mmap
import os
import re
import shutil
import stat
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import xxhash

if TYPE_CHECKING:
    from filelock import FileLock

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a directory",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_WEIGHTS = "model.safetensors"
_DISK = {
    getattr(errno, name)
    for name in "ENOSPC EDQUOT EFBIG EIO EROFS EACCES EPERM ENOENT ENOTDIR EISDIR EINVAL ENAMETOOLONG".split()
}


class FileError(ValueError):
    """A file that is damaged or not what it should be; the message begins with its path.

    Attributes:
        reason: the message without the path.
    """

    def __init__(self, message: str, reason: str | None = None) -> None:
        super().__init__(message)
        self.reason = message if reason is None else reason


def refuse_file(path: str | os.PathLike[str], reason: str) -> NoReturn:
    """Raise FileError: path, then reason."""
    raise FileError(f"{os.fspath(path)!r}: {reason}", reason)


def few(names: Sequence[str]) -> str:
    """The first three of the names that a message is about, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# Reading --------------------------------------------------------------------------------------------------------------


def regular_size(path: str | os.PathLike[str]) -> int:
    """Bytes of a regular file, or of the one that a link leads to.

    Raises:
        FileError: it is something else, such as a FIFO, a device or a directory.
        OSError: there is none, or it may not be seen.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        refuse_file(path, f"expected a regular file, got {_KINDS.get(stat.S_IFMT(found.st_mode), 'another kind')}")
    return found.st_size


def sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a regular file's bytes. Raises what ``regular_size`` raises."""
    regular_size(path)
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# Writing --------------------------------------------------------------------------------------------------------------


def sync(path: str | os.PathLike[str]) -> None:
    """Bring a file, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush(directory: Path) -> dict[str, dict[str, Any]]:
    """Bring all that a directory holds to the disk.

    Returns:
        {"size": bytes, "sha256": in hexadecimal digits} of each file, by its path in the directory.
    """
    entries = {}
    for path in (directory, *sorted(directory.rglob("*"))):
        if path.is_file():
            entries[path.relative_to(directory).as_posix()] = {"size": path.stat().st_size, "sha256": sha256(path)}
        if path.is_file() or path.is_dir():
            sync(path)
    return entries


def hidden(path: Path, mark: str = "partial") -> Path:
    """The name beside ``path`` under which it is written."""
    return path.with_name(f".{path.name}.{mark}")


def numbered(path: Path) -> Path:
    """The first of <path>-1, <path>-2, … that is free."""
    names = (path.with_name(f"{path.name}-{number}") for number in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))


def lock(path: Path) -> FileLock:
    """A lock to hold while ``path`` is written. It is a file beside it, which stays."""
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(hidden(path, "lock"))


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], unique: bool = False) -> Iterator[Path]:
    """A name beside ``path`` to write to, which takes its place, flushed, when the block ends without an error.

    Args:
        path: of a file that may be there; where it is a link, what that leads to is replaced.
        unique: no other process or thread uses the same name; without it the next writer cleans up after one that was
            killed.

    Raises:
        OSError: that names ``path``; the old file is as it was.
    """
    place = Path(os.path.realpath(path))
    if place.exists() and not place.is_file():
        raise OSError(errno.EINVAL, "cannot write to what is no regular file", os.fspath(path))
    partial = hidden(place, f"{os.getpid()}-{threading.get_ident()}.partial" if unique else "partial")
    try:
        yield partial
        sync(partial)
        os.replace(partial, place)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        _name_disk_error(error, path)
        raise
    sync(place.parent)


def write_file(path: Path, content: bytes) -> None:
    """Write a file at once. Raises OSError that names it; the old file then stays as it was."""
    with replacing(path) as partial:
        partial.write_bytes(content)


@contextlib.contextmanager
def building(path: Path, resume: bool = False) -> Iterator[Path]:
    """A hidden directory beside ``path`` to fill, which takes its place when the block ends without an error. The block
    flushes what it writes there, by ``flush`` at its end or file by file.

    Args:
        path: where nothing is.
        resume: the block goes on with what an earlier attempt left, and where it fails leaves that to the next one.
            Without it each begins with nothing and leaves nothing.
    """
    partial = hidden(path)
    if partial.exists() and not resume:  # of a process that was killed
        shutil.rmtree(partial)
    partial.mkdir(exist_ok=resume)
    try:
        yield partial
        partial.rename(path)
    except BaseException:
        if not resume:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    sync(path.parent)


@contextlib.contextmanager
def filling(directory: Path) -> Iterator[Path]:
    """A hidden directory in ``directory``, whose files move there one by one, flushed, when the block ends without an
    error. Weights that are there in other files than the new ones' (a model was split in another way) are removed.

    Raises:
        OSError: that names the file that could not be written; those of ``directory`` are as they were.
    """
    staging = directory / ".saving"
    shutil.rmtree(staging, ignore_errors=True)  # of a process that was killed
    try:
        staging.mkdir(parents=True)
        yield staging
        new = [file.relative_to(staging) for file in staging.rglob("*") if file.is_file()]
        for name in new:
            sync(staging / name)
        for name in new:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / name, directory / name)
        for old in _superseded(directory, {str(name) for name in new}):
            (directory / old).unlink()
        sync(directory)
    except Exception as error:
        _name_disk_error(error, directory / _being_written(staging))
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _being_written(staging: Path) -> Path:
    """Find the file that could not be written, which neither Python nor Rust names: the newest one, or, if that is
    complete JSON, the weights, which are written after it. (Rust removes what it could not finish.)"""
    begun = [file for file in staging.rglob("*") if file.is_file()]
    newest = max(begun, key=lambda file: file.stat().st_mtime_ns, default=staging / _WEIGHTS)
    with contextlib.suppress(ValueError):
        json.loads(newest.read_bytes() if begun else b"0")
        return Path(_WEIGHTS)
    return newest.relative_to(staging)


def _superseded(directory: Path, new: set[str]) -> list[str]:
    """Files of a model's weights that those just written replace though they have other names."""
    index = f"{_WEIGHTS}.index.json"
    if not new & {_WEIGHTS, index}:
        return []
    old = [name for name in os.listdir(directory) if re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", name)]
    return [name for name in (*old, _WEIGHTS, index) if name not in new and (directory / name).is_file()]


def raise_disk_error(error: Exception, what: str, kept: str) -> None:
    """Raise an OSError that says what is left, if ``error`` came from the disk."""
    if (code := _disk_code(error)) is not None:
        raise OSError(code, f"{what}: {os.strerror(code)}; {kept}") from error


def _name_disk_error(error: BaseException, path: str | os.PathLike[str]) -> None:
    """Raise an OSError that names the file, if ``error`` came from the disk."""
    if (code := _disk_code(error)) is not None:
        raise OSError(code, os.strerror(code), os.fspath(path)) from error


def _disk_code(error: BaseException) -> int | None:
    """The errno of an error that came from the disk; Rust gives it in text."""
    code = error.errno if isinstance(error, OSError) else None
    if code is None and isinstance(error, Exception) and (named := re.search(r"os error (\d+)", str(error))):
        code = int(named[1])
    return code if code in _DISK else None


# Checksums of safetensors files ---------------------------------------------------------------------------------------

XXH3_KEY = "xxh3"  # the name in a file's metadata under which its checksum stands
UNSEALED = "0" * 32  # what stands there until ``seal``
_FIELD = re.compile(rb'"xxh3":"([0-9a-f]{32})"')


def seal(path: str | os.PathLike[str]) -> None:
    """Write the checksum into a safetensors file that was saved with ``{CHECKSUM: UNSEALED}`` in its metadata: XXH3-64
    of the header, in which the checksum counts as zeros, then that of the tensors' bytes, in hexadecimal digits.

    The metadata are sorted, which safetensors leaves in any order: the same tensors make the same file.
    """
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        begin = 8 + int.from_bytes(mapped[:8], "little")
        header = json.loads(mapped[8:begin])
        header = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(begin - 8)
        if len(text) != begin - 8 or _FIELD.search(text) is None:
            refuse_file(path, "expected a header of safetensors with room for a checksum")
        mapped[8:begin] = text
        digest = _digest(memoryview(mapped), begin)
        mapped[8:begin] = text.replace(UNSEALED.encode(), digest.encode())


def check_seal(path: str | os.PathLike[str], given: str | None, tensors: bool = True) -> None:
    """Compare a safetensors file with its checksum.

    Args:
        path: a regular file.
        given: the checksum in its metadata; None and UNSEALED: it has none, which is taken.
        tensors: also the tensors' bytes, not the header alone. XXH3 takes 5 to 15 GB a second of what is in memory.

    Raises:
        FileError: it is another file than was written.
    """
    if given is None or given == UNSEALED:
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        begin = 8 + int.from_bytes(mapped[:8], "little")
        found = _digest(memoryview(mapped), begin, tensors)
    if found[:16] != given[:16]:
        refuse_file(path, f"its header does not fit its checksum: expected {given[:16]}, got {found[:16]}")
    if tensors and found != given:
        refuse_file(path, f"its tensors do not fit their checksum: expected {given[16:]}, got {found[16:]}")


def _digest(file: memoryview, begin: int, tensors: bool = True) -> str:
    with file, file[begin:] as data:
        header = _FIELD.sub(b'"xxh3":"' + UNSEALED.encode() + b'"', bytes(file[:begin]))
        return xxhash.xxh3_64_hexdigest(header) + (xxhash.xxh3_64_hexdigest(data) if tensors else "")
