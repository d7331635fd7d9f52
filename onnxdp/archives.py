"""The user's arrays, read from .npz and .npy without pickle; what does not fit is refused in a sentence."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from onnxdp.errors import UsageError
from onnxdp.inputs import Dim, InputSpec, Layout, number_kind
from onnxdp.records import Array

__all__ = ["check", "read", "read_one", "shown", "some"]

_DAMAGED = (OSError, zipfile.BadZipFile, zlib.error, EOFError)


_SAVED = "write it with numpy.savez(FILE, **{input name: array})"


def read(path: Path, again: str = _SAVED) -> dict[str, Array]:
    """Read all arrays of an ``.npz``; pickled content is never opened.

    Raises
    ------
    UsageError
        It is absent, no archive, damaged, or holds pickled objects; it says what to do ``again``.
    """
    try:
        if not zipfile.is_zipfile(path):
            raise UsageError(f"{path} is {'no .npz archive' if path.exists() else 'not there'}; {again}.")
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except ValueError as e:
        raise UsageError(
            f"{path} holds pickled objects or a damaged array, which is not read; {again}."
        ) from e
    except _DAMAGED as e:
        raise UsageError(f"{path} cannot be read ({e}); {again}.") from e


def read_one(path: Path) -> Array:
    """Map the array of a ``.npy`` into memory; pickled content is never opened.

    Raises
    ------
    UsageError
        It is no such file, damaged, or holds pickled objects.
    """
    again = "write it with numpy.save(FILE, array)"
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as e:
        raise UsageError(
            f"{path} holds pickled objects or no whole array, which is not read; {again}."
        ) from e
    except _DAMAGED as e:
        raise UsageError(f"{path} cannot be read ({e}); {again}.") from e
    if not isinstance(found, np.ndarray):
        found.close()
        raise UsageError(f"{path} is an archive of several arrays; name it .npz.")
    return found


def check(path: Path, spec: InputSpec, x: Array, plan: Layout) -> None:
    """Refuse an array that does not fit its input.

    Raises
    ------
    UsageError
        Type, number of axes, a size or a value is not what the model takes.
    """
    if x.dtype.name != spec.dtype and not (x.dtype.kind in "US" and number_kind(spec.dtype) == "?"):
        raise UsageError(
            f"{spec.name!r} in {path} is {x.dtype.name} and the model takes {spec.dtype}; "
            f"save it with .astype({spec.dtype!r})."
        )
    if x.ndim != len(spec.shape):
        raise UsageError(
            f"{spec.name!r} in {path} has {x.ndim} axes and the model takes "
            f"{len(spec.shape)} ({shown(spec.shape)}); reshape it."
        )
    if not x.size:
        raise UsageError(f"{spec.name!r} in {path} holds no sample; give at least two.")
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        raise UsageError(
            f"{spec.name!r} in {path} holds NaN or infinity; give inputs that the model can use."
        )
    samples = plan.axes[spec.name] == 0
    wrong = [
        i
        for i, d in enumerate(spec.shape)
        if isinstance(d, int) and d != x.shape[i] and not (i == 0 and samples)
    ]
    if wrong:
        raise UsageError(
            f"{spec.name!r} in {path} has the shape {shown(x.shape)} and the model takes "
            f"{shown(spec.shape)}; make axis {wrong[0]} {spec.shape[wrong[0]]} long."
        )


def shown(shape: Sequence[Dim]) -> str:
    """Write a shape as ``[?, 3, 224, 224]``."""
    return "[" + ", ".join("?" if d is None else str(d) for d in shape) + "]"


def some(names: Iterable[str]) -> str:
    """Give up to five names."""
    names = list(names)
    return ", ".join(map(repr, names[:5])) + (" and more" if len(names) > 5 else "") if names else "nothing"
