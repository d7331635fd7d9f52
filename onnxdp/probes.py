"""Inputs that nobody has to bring, made up from names, shapes and a seed; or read from the user's file.

Pictures are textured dead leaves (:mod:`onnxdp.pictures`), ids are uniform in their vocabulary, masks are
ones, recurrent states zeros, everything else standard normal.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from onnxdp import pictures
from onnxdp.answers import Answers, diversity, pick
from onnxdp.errors import UsageError
from onnxdp.inputs import (
    LENGTH,
    POSITION,
    RATE,
    RATE_HZ,
    TOKEN_TYPE,
    VOCABULARY,
    Dim,
    InputSpec,
    Layout,
    channel_axis,
    number_kind,
)
from onnxdp.records import Array

__all__ = ["BATCH", "POOL", "InputSpec", "Probes", "load", "make"]

BATCH = 32
POOL = 2
"""Probes drawn for each that is kept, where the network's own answers choose."""
_UNMOVED = 1.3
"""Diversity of the answers below which a network is taken to be hardly moved by standardised pictures."""
_BYTES = 64
"""Standard deviation of pictures whose values go from 0 to 255, about."""


@dataclass(frozen=True, slots=True)
class Probes:
    """Inputs to run a network on.

    Attributes
    ----------
    feeds : tuple of mapping of str to ndarray
        One run each; equal shapes in all of them.
    samples : int
        Samples in all feeds together.
    seed : int or None
        None where the user brought them.
    source : str
        What they are: ``dead leaves``, ``random ids``, ..., or the file's name.
    axes : mapping of str to (int or None)
        The batch axis of each input; None where all samples share one array.
    dynamic : bool
        Whether the number of samples in a feed is free.
    """

    feeds: tuple[Mapping[str, Array], ...]
    samples: int
    seed: int | None
    source: str
    axes: Mapping[str, int | None] = field(default_factory=lambda: MappingProxyType({}))
    dynamic: bool = False

    @property
    def batch(self) -> int:
        """Samples in one feed."""
        return self.samples // len(self.feeds)

    def split(self, share: float) -> tuple[Probes, Probes]:
        """Part into ``share`` of the samples and the held-out rest: random, always the same, never empty.

        Raises
        ------
        UsageError
            There is one sample (or one feed whose batch is fixed) only.
        """
        units = self.samples if self.dynamic else len(self.feeds)
        if units < 2:
            raise UsageError(
                f"{self.source} holds a single {'sample' if self.batch == 1 else 'batch'} and a part must be "
                "held out to measure damage on; give at least two."
            )
        near = [n for n in range(1, units) if abs(n - share * units) <= max(0.5, units / 16)]
        near = near or [min(max(1, round(share * units)), units - 1)]
        fits = {
            n: _divisor(n, self.batch) + _divisor(units - n, self.batch) if self.dynamic else 0 for n in near
        }
        cut = max(near, key=lambda n: (fits[n], -abs(n - share * units)))
        order = np.random.Generator(np.random.PCG64(self.seed or 0)).permutation(units)
        return self._take(np.sort(order[:cut])), self._take(np.sort(order[cut:]))

    def rebatch(self, batch: int) -> Probes:
        """Give feeds of the largest size up to ``batch`` that divides the samples (self, if fixed)."""
        if not self.dynamic or batch == self.batch:
            return self
        return self._take(np.arange(self.samples), batch)

    def _take(self, units: Array, batch: int | None = None) -> Probes:
        """Keep some samples (feeds, where the batch is fixed)."""
        if not self.dynamic:
            feeds = tuple(self.feeds[int(i)] for i in units)
            samples = len(feeds) * self.batch
        else:
            whole = {
                name: array
                if self.axes[name] is None
                else np.concatenate([f[name] for f in self.feeds], self.axes[name])
                for name, array in self.feeds[0].items()
            }
            samples = len(units)
            size = _divisor(samples, batch or self.batch)
            feeds = tuple(_select(whole, self.axes, units[k : k + size]) for k in range(0, samples, size))
        return Probes(feeds, samples, self.seed, self.source, self.axes, self.dynamic)


def make(
    specs: Sequence[InputSpec],
    *,
    samples: int,
    seed: int,
    batch: int = BATCH,
    pool: int | None = None,
    answers: Answers | None = None,
) -> Probes:
    """Make up inputs.

    Parameters
    ----------
    specs : sequence of InputSpec
        Every input that must be fed.
    samples : int
        How many; rounded up to whole feeds.
    seed : int
        Sample ``i`` depends on ``(seed, i)`` alone.
    batch : int
        Largest number of samples in a feed, where the model leaves it free.
    pool : int, optional
        Samples drawn to choose from when ``answers`` is given; default ``POOL * samples``.
    answers : callable, optional
        Runs the network: a feed in, its class scores out, ndarray of shape (samples of the feed, classes).
        The probes are then picked by :func:`onnxdp.answers.pick`.

    Returns
    -------
    Probes

    Raises
    ------
    UsageError
        An input's type cannot be made up (text, complex numbers).
    """
    plan = Layout.of(specs, batch)
    size = plan.batch
    if plan.dynamic:  # exactly ``samples`` where a good size divides them, else a few more
        exact = _divisor(samples, size)
        size = exact if 2 * exact >= size else math.ceil(samples / math.ceil(samples / size))
    feeds = max(1 if plan.dynamic else 2, math.ceil(samples / size))
    total = feeds * size
    main = next(s.kind for s in specs if s.name == plan.primary) if specs else "other"
    drawn = [_draw(spec, plan, seed, k, total) for k, spec in enumerate(specs)]

    def feed(indices: Array, gain: int = 1) -> Mapping[str, Array]:
        made = {s.name: d(indices) for s, d in zip(specs, drawn, strict=True)}
        loud = [s.name for s in specs if s.kind == "image" and made[s.name].dtype.kind == "f" and gain != 1]
        return MappingProxyType(made | {n: made[n] * made[n].dtype.type(gain) for n in loud})

    order, gain = np.arange(total), 1
    if answers is not None and plan.axes[plan.primary] is not None:
        many = math.ceil(max(total, POOL * samples if pool is None else pool) / size) * size
        asked = answers

        def ask(gain: int) -> Array:
            feeds = (feed(np.arange(k, k + size), gain) for k in range(0, many, size))
            return np.concatenate([np.asarray(asked(f)).reshape(size, -1) for f in feeds])

        scores = ask(1)
        if main == "image" and diversity(scores) < _UNMOVED:  # it may have been taught on 0..255
            louder = ask(_BYTES)
            if diversity(louder) > 2 * diversity(scores):
                scores, gain = louder, _BYTES
        order = pick(scores, total)
    made = tuple(feed(order[k : k + size], gain) for k in range(0, total, size))
    kinds = {"image": "dead leaves", "ids": "random ids"}
    return Probes(made, total, seed, kinds.get(main, "random numbers"), plan.axes, plan.dynamic)


def load(path: Path, specs: Sequence[InputSpec]) -> Probes:
    """Read the user's inputs from an ``.npz``: one array per input, first axis = samples.

    An input without a sample axis (a sampling rate, a state whose first axis counts layers) is given once,
    for all samples.

    Parameters
    ----------
    path : Path
    specs : sequence of InputSpec

    Returns
    -------
    Probes

    Raises
    ------
    UsageError
        The file or an array in it does not fit; the sentence says which, why, and what would.
    """
    arrays = _read(path)
    wanted = [s.name for s in specs]
    for missing in (n for n in wanted if n not in arrays):
        raise UsageError(
            f"{path} lacks the input {missing!r} (it has {_some(arrays)}); save one array per input."
        )
    for extra in (n for n in arrays if n not in wanted):
        raise UsageError(
            f"{path} holds {extra!r}, which is no input of the model; its inputs are {_some(wanted)}."
        )
    plan = Layout.of(specs, BATCH)
    counts: dict[str, int] = {}
    for spec in specs:
        _check(path, spec, arrays[spec.name], plan)
        if plan.axes[spec.name] == 0:
            counts[spec.name] = len(arrays[spec.name])
    if len(set(counts.values())) > 1:
        (a, m), (b, n) = min(counts.items(), key=lambda c: c[1]), max(counts.items(), key=lambda c: c[1])
        raise UsageError(f"{path} has {m} samples of {a!r} and {n} of {b!r}; give equally many of each.")
    samples = next(iter(counts.values()), 1)
    dynamic = plan.dynamic and all(a in (0, None) for a in plan.axes.values())
    size = plan.batch if counts and not plan.dynamic else (_divisor(samples, BATCH) if dynamic else 1)
    if samples % size:
        raise UsageError(
            f"{path} has {samples} samples and the model takes {size} at a time; give a multiple of {size}."
        )
    axes = {n: a if a == 0 else None for n, a in plan.axes.items()}
    feeds = tuple(_select(arrays, axes, np.arange(k, k + size)) for k in range(0, samples, size))
    return Probes(feeds, samples, None, path.name, MappingProxyType(axes), dynamic)


def _draw(spec: InputSpec, plan: Layout, seed: int, k: int, standard: int) -> Callable[[Array], Array]:
    """Return the function that makes input ``k`` of the samples with given indices.

    Pictures are standardised by the first ``standard`` of them.
    """
    if number_kind(spec.dtype) == "?":
        raise UsageError(
            f"The input {spec.name!r} is of type {spec.dtype} and cannot be made up; give --inputs FILE.npz."
        )
    dtype, shape, axis = np.dtype(spec.dtype), plan.shapes[spec.name], plan.axes[spec.name]
    if spec.kind == "image":
        one = _gallery(shape, dtype, seed + 1_000_003 * k, standard)
    else:
        one = _numbers(spec, shape, dtype, seed, k, plan.length)

    def draw(indices: Array) -> Array:
        if axis is None:
            return one(0 if plan.dynamic else int(indices[0]))
        return np.concatenate([one(int(i)) for i in indices], axis)

    return draw


def _gallery(
    shape: tuple[int, ...], dtype: np.dtype[Any], seed: int, standard: int
) -> Callable[[int], Array]:
    """Return the function from an index to a picture in the input's layout and type."""
    last = channel_axis(shape) == 3
    c, h, w = (shape[3], *shape[1:3]) if last else shape[1:]
    drawn: dict[int, Array] = {}

    def raw(i: int) -> Array:
        if i not in drawn:
            drawn[i] = pictures.leaves([i], c, h, w, seed)
        return drawn[i]

    mean, scale = np.zeros((c, 1, 1)), np.ones((c, 1, 1))
    if dtype.kind == "f":
        first = [raw(i).astype(np.float64) for i in range(standard)]
        mean = np.mean([x.mean((0, 2, 3)) for x in first], 0).reshape(c, 1, 1)
        scale = np.sqrt(np.mean([((x - mean) ** 2).mean((0, 2, 3)) for x in first], 0)).reshape(c, 1, 1)

    def one(i: int) -> Array:
        x = raw(i) if dtype.kind == "u" else ((raw(i) - mean) / scale).astype(dtype)
        return np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if last else x

    return one


def _numbers(
    spec: InputSpec, shape: tuple[int, ...], dtype: np.dtype[Any], seed: int, k: int, length: int
) -> Callable[[int], Array]:
    """Return the function from an index to one sample of an input that is no picture."""
    low = spec.name.lower()
    value = {"mask": 1, "state": 0}.get(spec.kind)
    if spec.kind == "scalar":
        value = RATE_HZ if RATE.match(low) else length if LENGTH.search(low) else 1
    elif spec.kind == "ids" and TOKEN_TYPE.search(low):
        value = 0
    if value is not None:
        return lambda i: np.full(shape, value, dtype)
    if spec.kind == "ids" and POSITION.search(low):
        ramp = np.broadcast_to(np.arange(shape[-1]) % (spec.vocabulary or shape[-1]), shape).astype(dtype)
        return lambda i: ramp
    most = min(spec.vocabulary or VOCABULARY, np.iinfo(dtype).max + 1) if spec.kind == "ids" else 0

    def one(i: int) -> Array:
        rng = np.random.Generator(np.random.PCG64([seed, k, i]))
        made = rng.integers(0, most, shape) if spec.kind == "ids" else rng.standard_normal(shape)
        return made.astype(dtype)

    return one


def _select(
    arrays: Mapping[str, Array], axes: Mapping[str, int | None], indices: Array
) -> Mapping[str, Array]:
    """Cut the samples ``indices`` out of every array that has a batch axis."""
    return MappingProxyType(
        {n: x if (a := axes[n]) is None else x.take(indices, a) for n, x in arrays.items()}
    )


def _divisor(n: int, most: int) -> int:
    """Largest divisor of ``n`` up to ``most``."""
    return next((d for d in range(min(n, most), 0, -1) if n % d == 0), 1)


def _read(path: Path) -> dict[str, Array]:
    """Read all arrays of an ``.npz``; pickled content is never opened."""
    again = "write it with numpy.savez(FILE, **{input name: array})"
    try:
        if not zipfile.is_zipfile(path):
            raise UsageError(f"{path} is {'no .npz archive' if path.exists() else 'not there'}; {again}.")
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except ValueError as e:
        raise UsageError(
            f"{path} holds pickled objects or a damaged array, which is not read; {again}."
        ) from e
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError) as e:
        raise UsageError(f"{path} cannot be read ({e}); {again}.") from e


def _check(path: Path, spec: InputSpec, x: Array, plan: Layout) -> None:
    """Refuse an array that does not fit its input."""
    if x.dtype.name != spec.dtype and not (x.dtype.kind in "US" and number_kind(spec.dtype) == "?"):
        raise UsageError(
            f"{spec.name!r} in {path} is {x.dtype.name} and the model takes {spec.dtype}; "
            f"save it with .astype({spec.dtype!r})."
        )
    if x.ndim != len(spec.shape):
        raise UsageError(
            f"{spec.name!r} in {path} has {x.ndim} axes and the model takes "
            f"{len(spec.shape)} ({_shown(spec.shape)}); reshape it."
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
            f"{spec.name!r} in {path} has the shape {_shown(x.shape)} and the model takes "
            f"{_shown(spec.shape)}; make axis {wrong[0]} {spec.shape[wrong[0]]} long."
        )


def _shown(shape: Sequence[Dim]) -> str:
    return "[" + ", ".join("?" if d is None else str(d) for d in shape) + "]"


def _some(names: Iterable[str]) -> str:
    """Give up to five names."""
    names = list(names)
    return ", ".join(map(repr, names[:5])) + (" and more" if len(names) > 5 else "") if names else "nothing"
