"""Files put in place whole or not at all; knows of ONNX only that a model may have a data file beside it.

Everything is made in a temporary folder (the *room*) beside the target, then moved: the data file first,
under a name that holds the hash of its content, so that an older model's data is never touched; then the
model. A run that is killed leaves the old file whole and its room behind, which the next run for the same
target removes: the lock on the room tells whether its owner still lives, whatever became of its process id.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from onnxdp.errors import ModelError, SetupError, UsageError

if sys.platform != "win32":
    import fcntl

PREFIX = ".onnxdp-"
"""How the names of temporary folders begin."""
_NOTE = "note"
_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}

Reader = Callable[[Path], set[str]]
"""Gives the data files that the model at a path refers to; none where there is no such model."""


def data_name(target: str, sha256: str) -> str:
    """Name the data file of ``target`` after its content."""
    return f"{target}.{sha256[:8]}.data"


def _is_data_name(name: str, target: str) -> bool:
    return re.fullmatch(re.escape(target) + r"\.[0-9a-f]{8}\.data", name) is not None


def refuse(target: Path, overwrite: bool) -> None:
    """Refuse a target that cannot or may not be written.

    Raises
    ------
    ModelError
        A folder, a device, or in a folder that does not exist.
    UsageError
        A file that exists, without ``overwrite``.
    """
    if target.is_dir():
        raise ModelError(f"{target} is a folder; name the file to write in it.")
    if not target.parent.is_dir():
        raise ModelError(f"{target.parent} is not an existing folder; make it first.")
    if target.exists() and not target.is_file():
        raise ModelError(f"{target} is not a regular file; name another one to write.")
    if os.path.lexists(target) and not overwrite:
        raise UsageError(f"{target} exists; pass --overwrite to replace it.")


@contextlib.contextmanager
def disk(target: Path) -> Iterator[None]:
    """Turn what the operating system says into one sentence.

    Raises
    ------
    SetupError
        For every OSError.
    """
    try:
        yield
    except OSError as e:
        if e.errno in _FULL:
            raise SetupError(
                f"The disk is full or at its quota, so {target} was not written; free space."
            ) from e
        raise SetupError(
            f"{target} cannot be written ({e.strerror or e}); check its folder's permissions."
        ) from e


def sweep(target: Path, reader: Reader) -> None:
    """Clear the rooms that killed runs for the same target left."""
    for left in target.parent.glob(f"{_prefix(target)}*"):
        with lock(left) as free:
            if free:
                settle(left, target, reader)


def room(target: Path) -> Path:
    """Name a temporary folder beside ``target``; whoever asks makes, locks and removes it."""
    return target.parent / f"{_prefix(target)}{secrets.token_hex(8)}"


def _prefix(target: Path) -> str:
    return f"{PREFIX}{hashlib.sha256(target.name.encode()).hexdigest()[:8]}-"


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[bool]:
    """Hold a folder's lock; False where another process holds it, or where there are no such locks."""
    if sys.platform == "win32":
        yield False
        return
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = True
    except OSError:
        free = False
    try:
        yield free
    finally:
        os.close(handle)


def put(model: Path, data: Path | None, target: Path, reader: Reader) -> None:
    """Move a finished model, and its data file before it, out of their room.

    Before anything moves, a note in the room says which data files may end up without a model:
    the new one, or those of the older model that are ours. :func:`settle` removes them.
    """
    ours = {p.name for p in target.parent.iterdir() if _is_data_name(p.name, target.name)}
    doubtful = ours & reader(target) if ours else ours
    if data is not None and data.name not in ours:
        doubtful.add(data.name)
    write(model.parent / _NOTE, "\n".join(sorted(doubtful)).encode())
    if data is not None:
        data.replace(target.parent / data.name)
    model.replace(target)
    _sync_folder(target.parent)


def settle(folder: Path, target: Path, reader: Reader) -> None:
    """Remove a room, and the data files of its note that the model at ``target`` does not need."""
    with contextlib.suppress(OSError):
        noted = (folder / _NOTE).read_text(encoding="utf-8").split("\n")
        for name in set(noted) - reader(target):
            if _is_data_name(name, target.name):
                (target.parent / name).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def write(path: Path, content: bytes) -> None:
    """Write a file and see it to the disk."""
    with path.open("wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())


def _sync_folder(folder: Path) -> None:
    """See the new names to the disk; not every file system can."""
    if sys.platform == "win32":
        return
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
