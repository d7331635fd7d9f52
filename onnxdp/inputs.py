"""What a model's inputs are, judged by name, type and shape, and concrete sizes for all of them together."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

Dim = int | str | None

_STATE = re.compile(
    r"(^|[^a-z])([hc]_?[0nx]|(?<!hidden_)states?|caches?|past(?!_values|_time|_observed)|memory)($|[^a-z])"
)
MASK = re.compile(r"mask|valid|padding")
CACHE = re.compile(r"(^|[^a-z])past([^a-z]|$)")
"""Names of cached keys and values; what came before in a series (``past_values``) is no state at all."""
USE_CACHE = re.compile(r"use_?cache")
RATE = re.compile(r"^(sr|fs|sample_?rate|sampling_?rate)$")
LENGTH = re.compile(r"len(gth)?s?$")
TOKEN_TYPE = re.compile(r"token_?type|segment")
POSITION = re.compile(r"position")
_NOT_BATCH = re.compile(r"seq|time|frame|len|sample|height|width|token")
_SMALLEST_PICTURE = 8
_SIDE, _LINE = 224, (48, 320)  # pixels of a picture, and of a line of text, of free size
_TOKENS, _WAVE, _FRAMES = 32, 512, 160  # free lengths of ids, raw sound (rank 2) and features (rank 3)
VOCABULARY = 1000
RATE_HZ = 16000


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One input of a model.

    Attributes
    ----------
    name : str
    dtype : str
        NumPy name.
    shape : tuple of int, str or None
        Symbolic dimensions by name, unknown ones as None.
    vocabulary : int or None
        Rows of the table that the ids look up, where known.
    marks : tuple of int
        Ids that the network looks for: what ends a text, what fills it up.
    kind : str
        ``image``, ``ids``, ``mask``, ``state``, ``scalar`` or ``other``; found by :func:`classify`.
    """

    name: str
    dtype: str
    shape: tuple[Dim, ...]
    vocabulary: int | None = None
    marks: tuple[int, ...] = ()
    kind: str = ""

    def __post_init__(self) -> None:
        if not self.kind:
            object.__setattr__(self, "kind", classify(self.name, self.dtype, self.shape))


def classify(name: str, dtype: str, shape: Sequence[Dim]) -> str:
    """Decide what an input is from its name, type and shape; see :attr:`InputSpec.kind`."""
    low, number = name.lower(), number_kind(dtype)
    if number == "b" or (MASK.search(low) and len(shape) > 0):
        return "mask"
    if RATE.match(low) or len(shape) == 0 or (number in "iu" and len(shape) == 1 and LENGTH.search(low)):
        return "scalar"
    if number == "f" and _is_state(low, shape):
        return "state"
    if (number == "f" or dtype == "uint8") and channel_axis(shape) is not None:
        return "image"
    return "ids" if number in "iu" else "other"


@dataclass(frozen=True, slots=True)
class Layout:
    """Concrete sizes of all inputs together."""

    primary: str
    batch: int
    dynamic: bool
    axes: Mapping[str, int | None]
    shapes: Mapping[str, tuple[int, ...]]  # of one sample: 1 at the batch axis
    length: int  # of the primary's sequence

    @classmethod
    def of(cls, specs: Sequence[InputSpec], batch: int) -> Layout:
        """Choose the batch axes, then every free size; the same symbol is the same size everywhere."""
        ranked = sorted(
            specs, key=lambda s: ("image", "ids", "other", "mask", "state", "scalar").index(s.kind)
        )
        if not ranked:
            return cls("", 1, False, MappingProxyType({}), MappingProxyType({}), 1)
        main = ranked[0]
        lead = _main_batch_axis(main.shape)
        free = main.shape[lead] if lead is not None else None
        axes = {s.name: lead if s is main else _batch_axis(s, free, lead) for s in specs}
        fixed = [d for s in specs if (a := axes[s.name]) is not None and isinstance(d := s.shape[a], int)]
        sizes: dict[str, int] = {}
        shapes = {main.name: _sizes(main, lead, sizes)}
        rest = [i for i in range(len(main.shape)) if i != lead]
        along = next((i for i in rest if not isinstance(main.shape[i], int)), rest[0] if rest else None)
        length = 1 if along is None else shapes[main.name][along]
        past = _TOKENS - 1 if main.kind == "ids" and length == 1 else 0  # one alone has nothing to attend to
        shapes |= {s.name: _sizes(s, axes[s.name], sizes, past) for s in ranked[1:]}
        dynamic = lead is not None and not fixed
        size = batch if dynamic else max(fixed, default=1)
        return cls(main.name, size, dynamic, MappingProxyType(axes), MappingProxyType(shapes), length)


def _main_batch_axis(shape: Sequence[Dim]) -> int | None:
    """Find the axis that counts samples: one that says so, or the first unless it says otherwise."""
    for i, d in enumerate(shape):
        if isinstance(d, str) and ("batch" in d.lower() or d.lower() in ("n", "b", "bs")):
            return i
    if not shape or (isinstance(shape[0], str) and _NOT_BATCH.search(shape[0].lower())):
        return None
    return 0


def _batch_axis(spec: InputSpec, free: Dim, lead: int | None) -> int | None:
    """Find the batch axis of another input, given the main one's batch dimension."""
    if lead is None or not spec.shape:
        return None
    if isinstance(free, str) and free in spec.shape:
        return spec.shape.index(free)
    first = spec.shape[0]
    if not isinstance(first, int):
        return 0
    if spec.kind == "state" and len(spec.shape) > 1 and not isinstance(spec.shape[1], int):
        return 1  # (layers, batch, units)
    return 0 if first == free else None


def _sizes(spec: InputSpec, batch_axis: int | None, sizes: dict[str, int], past: int = 0) -> tuple[int, ...]:
    """Size of every axis of one sample, ``past`` where it counts what came before it; symbols are entered."""
    shape = list(spec.shape)
    if batch_axis is not None and not isinstance(shape[batch_axis], int):
        shape[batch_axis] = 1
    if spec.kind == "image":
        return _picture_sizes(shape, sizes)
    usual = {"ids": _TOKENS, "mask": _TOKENS, "other": _WAVE if len(shape) <= 2 else _FRAMES}.get(
        spec.kind, _TOKENS if CACHE.search(spec.name.lower()) else 1
    )
    found = []
    for d in shape:
        if isinstance(d, str):
            terms = [t.strip() for t in d.split("+")]
            for t in terms:
                sizes.setdefault(t, int(t) if t.isdigit() else past if "past" in t.lower() else usual)
            d = sum(sizes[t] for t in terms)
        found.append(usual if d is None else d)
    if batch_axis is not None:
        found[batch_axis] = 1
    return tuple(found)


def _picture_sizes(shape: Sequence[Dim], sizes: dict[str, int]) -> tuple[int, ...]:
    """Size of every axis of one picture; a free one fits the other: square, or a line of text."""
    down = 2 if channel_axis(shape) == 1 else 1
    h, w = (sizes.get(d, d) if isinstance(d, str) else d for d in shape[down : down + 2])
    if isinstance(h, int) and not isinstance(w, int):
        sides = (h, _LINE[1] if h <= 64 else h)
    elif isinstance(w, int) and not isinstance(h, int):
        sides = (w, w)
    elif _unnamed(h) and not _unnamed(w):
        sides = _LINE  # only the width is declared free: the height of a text recogniser, not written down
    else:
        sides = (_SIDE, _SIDE)
    sides = (h if isinstance(h, int) else sides[0], w if isinstance(w, int) else sides[1])
    sizes.update(
        (d, n) for d, n in zip(shape[down : down + 2], sides, strict=True) if isinstance(d, str) and d != "?"
    )
    c = 3 if not isinstance(d := shape[1 if down == 2 else 3], int) else d
    return (1, c, *sides) if down == 2 else (1, *sides, c)


def _unnamed(d: Dim) -> bool:
    return d is None or d == "?"


def channel_axis(shape: Sequence[Dim]) -> int | None:
    """1 (NCHW) or 3 (NHWC) where the shape is a picture's, else None."""
    if len(shape) != 4:
        return None
    for axis, sides in ((1, shape[2:]), (3, shape[1:3])):
        if shape[axis] in (1, 3) and all(not isinstance(s, int) or s >= _SMALLEST_PICTURE for s in sides):
            return axis
    return None


def _is_state(name: str, shape: Sequence[Dim]) -> bool:
    """Whether a floating-point input is a recurrent state, by name or as (1, layers, units, h and c)."""
    return bool(_STATE.search(name)) or (
        len(shape) == 4 and shape[0] == 1 and shape[1] in range(1, 9) and shape[3] == 2
    )


def number_kind(dtype: str) -> str:
    """Kind letter of a NumPy type (``f``, ``i``, ``u``, ``b``), ``?`` for what cannot be made up."""
    try:
        kind = np.dtype(dtype).kind
    except TypeError:
        return "?"
    return kind if kind in "fiub" else "?"
