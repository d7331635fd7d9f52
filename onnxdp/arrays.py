"""The array boundary: NumPy or CuPy, to the device and back, seeded numbers, the few gaps of the standard.

This is the only room that imports CuPy, and it does so late. Everything numeric is written once against the
array API standard (https://data-apis.org/array-api), with the namespace taken from the arguments.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import mmap
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import array_api_compat
import numpy as np
import threadpoolctl

from onnxdp.errors import SetupError

Array: TypeAlias = Any
"""An array of any namespace of the standard; no static type spans NumPy, CuPy and array_api_strict."""

T = TypeVar("T")
R = TypeVar("R")

_MALLOC_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None

_ROOMY = 500_000_000
"""Bytes of memory from which it is worth while to hand any back."""

_APART = 128
"""Half of a matrix's columns from which its second moment is formed in pieces."""
_PIECE = 1 << 23
"""Numbers of a matrix, about, that are worked on at once."""
_HELD = Path("/proc/self/statm")

DEVICES = ("auto", "cpu", "cuda")


def namespace(*arrays: Array) -> Any:
    """Return the array API namespace that the arrays share."""
    return array_api_compat.array_namespace(*arrays)


def resolve_device(name: str) -> str:
    """Turn ``auto``, ``cpu`` or ``cuda`` into the device to use, ``cpu`` or ``cuda``.

    Raises
    ------
    SetupError
        If ``cuda`` is asked for and CuPy or a CUDA device is missing, or the name is unknown.
    """
    if name not in DEVICES:
        raise SetupError(f"device {name!r} is unknown; use one of {', '.join(DEVICES)}.")
    if name == "cpu":
        return "cpu"
    missing = _missing_cuda()
    if missing is None:
        return "cuda"
    if name == "auto":
        return "cpu"
    raise SetupError(
        f"--device cuda cannot be used because {missing}; install the gpu extra "
        "(pip install 'onnxdp[gpu]') on a machine with a CUDA device, or use --device cpu."
    )


def to_device(host: np.ndarray[Any, Any], device: str) -> Array:
    """Move a host array to ``cpu`` (no copy) or ``cuda``."""
    return host if device == "cpu" else _cupy().asarray(host)


def to_host(array: Array) -> np.ndarray[Any, Any]:
    """Bring an array of any namespace to the host (no copy if it is there already)."""
    if isinstance(array, np.ndarray):
        return array
    if array_api_compat.is_cupy_array(array):
        return np.asarray(array.get())
    # array_api_strict refuses NumPy on its pretended devices, so move to the CPU first.
    return np.asarray(array_api_compat.to_device(array, namespace(array).Device("CPU_DEVICE")))


def normal(shape: tuple[int, ...], seed: int, like: Array) -> Array:
    """Draw standard normal numbers, the same for a seed on every device.

    Returns
    -------
    array of the given shape, with the namespace, device and dtype of `like`.
    """
    xp = namespace(like)
    host = np.random.default_rng(seed).standard_normal(shape).astype(str(like.dtype).rpartition(".")[2])
    return xp.asarray(host, device=array_api_compat.device(like))


def eye(size: int, like: Array) -> Array:
    """Return the identity (size, size), float64, on the device of `like`."""
    xp = namespace(like)
    return xp.eye(size, dtype=xp.float64, device=array_api_compat.device(like))


def zeros(shape: tuple[int, ...], like: Array) -> Array:
    """Return float64 zeros of a shape on the device of `like`."""
    xp = namespace(like)
    return xp.zeros(shape, dtype=xp.float64, device=array_api_compat.device(like))


def double(array: Array) -> Array:
    """Return the array in float64 (itself if it is)."""
    xp = namespace(array)
    return xp.astype(array, xp.float64, copy=False)


def try_cholesky(matrix: Array) -> Array | None:
    """Return the lower Cholesky factor of (..., k, k), or None where one does not exist.

    The standard leaves failure open: NumPy raises, CuPy returns NaN.
    """
    xp = namespace(matrix)
    try:
        factor = xp.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        return None
    return factor if bool(xp.all(xp.isfinite(factor))) else None


def gram(x: Array) -> Array:
    """Return X^T X, (stack, m, m), of X (stack, s, m); large ones in three pieces, two of them symmetric."""
    xp = namespace(x)
    half = x.shape[-1] // 2
    if half < _APART or not isinstance(x, np.ndarray):
        return xp.matrix_transpose(x) @ x
    whole = np.empty((len(x), x.shape[-1], x.shape[-1]), x.dtype)

    def fill(aside: bool) -> None:
        for one, into in zip(x, whole, strict=True):
            a, b = one[:, :half], one[:, half:]
            if aside:
                into[:half, half:] = a.T @ b
                into[half:, :half] = into[:half, half:].T
            else:
                into[:half, :half] = a.T @ a
                into[half:, half:] = b.T @ b

    list(side_by_side(fill, (False, True)))
    return whole


def side_by_side(work: Callable[[T], R], parts: Sequence[T]) -> Iterator[R]:
    """Do the parts of some work in threads, as many as there are processors; results in order."""
    if len(parts) == 1:
        yield work(parts[0])
        return
    with ThreadPoolExecutor(min(len(parts), os.cpu_count() or 1)) as pool:
        yield from pool.map(work, parts)


def pieces(columns: int, many: int, *, rows: int = 1) -> list[slice]:
    """Cut columns in two where they are ``many``, in more where a matrix of so many rows is large.

    Whatever the threads are: these change no bit.
    """
    count = 1 if columns < many else max(2, min(-(-rows * columns // _PIECE), columns // (many // 2)))
    bounds = [columns * k // count for k in range(count + 1)]
    return [slice(*ends) for ends in pairwise(bounds)]


def ahead(work: Callable[[T], R], parts: Iterable[T]) -> Iterator[R]:
    """Do parts of some work in a thread of its own, one ahead of who takes the results; in order."""
    with ThreadPoolExecutor(1) as pool:
        waiting: Future[R] | None = None
        for part in parts:
            following = pool.submit(work, part)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()


def trim(*, cycles: bool = False) -> None:
    """Hand freed memory back to the system, where there is much: glibc keeps what lies between blocks in use.

    What is handed back is cleared when it is asked for again: a fifth of the time of a small network. With
    ``cycles`` graphs that nobody holds any more go first, whose nodes hold each other: a tenth of a second.
    """
    if _MALLOC_TRIM is not None and _resident() > _ROOMY:
        if cycles:
            gc.collect()
        _MALLOC_TRIM(0)


def _resident() -> int:
    """Return the bytes of memory that the process holds."""
    return int(_HELD.read_text().split()[1]) * mmap.PAGESIZE


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Hold BLAS to one thread: its results differ in the last bits between one thread and two.

    The limit is the whole process's; layers are solved side by side in a thread pool inside it instead.
    """
    with _controller().limit(limits=1, user_api="blas"):
        yield


@cache
def _controller() -> threadpoolctl.ThreadpoolController:
    """Look for the libraries once: that takes milliseconds, and NumPy's are there from the start."""
    return threadpoolctl.ThreadpoolController()


def _cupy() -> Any:
    return importlib.import_module("cupy")


def _missing_cuda() -> str | None:
    """Say what keeps CUDA from being used, or None."""
    try:
        cupy = _cupy()
    except ImportError:
        return "CuPy is not installed"
    try:
        count = int(cupy.cuda.runtime.getDeviceCount())
    except Exception as error:  # CuPy raises its own classes, which must not be imported here
        return f"CUDA does not answer ({error})"
    return None if count else "no CUDA device was found"
