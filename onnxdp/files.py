"""The small files that the command line writes: reports, plans, pictures, whole or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from onnxdp.errors import SetupError, UsageError

MACHINE = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
"""Errors that are the machine's, not the request's."""
REQUEST = (
    *(errno.ENOENT, errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.EACCES, errno.EPERM, errno.EROFS),
)
"""Errors that another path would not meet."""


def require_free(path: Path | None, overwrite: bool) -> None:
    """Refuse, before any work, a path that could not be written afterwards."""
    if path is None:
        return
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is not a regular file and cannot be written; give another name.")
    if os.path.lexists(path) and not overwrite:
        raise UsageError(f"{path} exists; give another name, or --overwrite to replace it.")
    try:
        with tempfile.TemporaryFile(dir=path.resolve().parent):
            pass
    except OSError as e:
        if e.errno in MACHINE:
            raise SetupError(
                f"Nothing can be written to {path.parent} ({e.strerror}); make room there."
            ) from e
        raise UsageError(f"{path} cannot be written ({e.strerror}); give a folder that can.") from e


def distinct(*paths: Path | None) -> None:
    """Refuse two roles for one file."""
    named = [p.resolve() for p in paths if p is not None]
    for i, path in enumerate(named):
        if path in named[:i]:
            raise UsageError(f"{path} is named twice on this command line; give two different files.")


def write(path: Path | None, content: str | bytes) -> None:
    """Write a text file (or any other) whole or not at all."""
    if path is None:
        return
    with writing(path) as file:
        file.write(content if isinstance(content, bytes) else f"{content}\n".encode())


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Give a file to write to, which appears at ``path`` once all is well."""
    path = path.resolve()
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        umask = os.umask(0)
        os.umask(umask)
        Path(name).chmod(0o666 & ~umask)  # mkstemp makes it private
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
