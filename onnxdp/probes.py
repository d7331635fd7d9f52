"""Inputs that nobody has to bring, made up from names, shapes and a seed; or read from the user's file.

Pictures are things before textured dead leaves (:mod:`onnxdp.pictures`), ids are texts of made-up words
(:mod:`onnxdp.texts`), masks are ones, recurrent states zeros, cached keys and values white noise, everything
else signals (:mod:`onnxdp.signals`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from onnxdp import archives, pictures, signals, texts
from onnxdp.answers import Answers, diversity, pick
from onnxdp.arrays import ahead, side_by_side
from onnxdp.errors import UsageError
from onnxdp.inputs import (
    CACHE,
    LENGTH,
    POSITION,
    RATE,
    RATE_HZ,
    TOKEN_TYPE,
    USE_CACHE,
    VOCABULARY,
    InputSpec,
    Layout,
    channel_axis,
    number_kind,
)
from onnxdp.ranges import CENTRED, STANDARDISED, TRIED, Misfit, Range, by_statistics
from onnxdp.records import Array
from onnxdp.steadiness import Run, erratic

__all__ = ["BATCH", "POOL", "InputSpec", "Probes", "divisor", "gathered", "load", "make"]

BATCH = 32
POOL = 2
"""Probes drawn for each that is kept, where the network's own answers choose."""
_LARGE = 10_000
"""Pixels of a picture from which two threads draw faster than one: small ones keep the interpreter."""
_ASKED = 48
"""Probes that tell whether a network is steady about signals, or hardly moved by pictures."""
LOUD = "dead leaves of 0..255 about their mean"
"""What made-up pictures are where standardised ones hardly move the network and nobody said what it takes."""
_UNMOVED = 1.3
"""Diversity of the answers below which a network is taken to be hardly moved by standardised pictures."""


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
    parts : tuple of int
        Samples of each kind, one kind after the other; empty where all are of one.
    """

    feeds: tuple[Mapping[str, Array], ...]
    samples: int
    seed: int | None
    source: str
    axes: Mapping[str, int | None] = field(default_factory=lambda: MappingProxyType({}))
    dynamic: bool = False
    parts: tuple[int, ...] = ()

    @property
    def batch(self) -> int:
        """Samples in one feed."""
        return self.samples // len(self.feeds)

    def every(self, step: int) -> Probes:
        """Keep one feed of so many."""
        feeds = self.feeds[::step]
        return replace(self, feeds=feeds, samples=len(feeds) * self.batch, parts=())

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
            n: divisor(n, self.batch) + divisor(units - n, self.batch) if self.dynamic else 0 for n in near
        }
        cut = max(near, key=lambda n: (fits[n], -abs(n - share * units)))
        kept = self._chosen(cut)
        return self._take(np.flatnonzero(kept)), self._take(np.flatnonzero(~kept))

    def _chosen(self, cut: int) -> Array:
        """Choose ``cut`` of the units at random, of each kind its share and, where it can be, not all."""
        kinds = self._kinds()
        chosen = np.zeros(len(kinds), bool)
        rng = np.random.Generator(np.random.PCG64(self.seed or 0))
        left, ahead = cut, len(kinds)
        for kind in np.unique(kinds):
            mine = np.flatnonzero(kinds == kind)
            ahead -= len(mine)
            share = round(left * len(mine) / (ahead + len(mine)))
            share = int(np.clip(min(share, len(mine) - 1), max(0, left - ahead), left))
            chosen[mine[rng.permutation(len(mine))[:share]]] = True
            left -= share
        return chosen

    def _kinds(self) -> Array:
        """Return the kind of each sample (of each feed, where the batch is fixed)."""
        kinds = np.repeat(np.arange(max(1, len(self.parts))), self.parts or (self.samples,))
        return kinds if self.dynamic else kinds[:: self.batch]

    def fits(self, other: Probes) -> bool:
        """Whether the two can be joined: the same inputs, axes and sizes."""

        def sizes(p: Probes) -> dict[str, tuple[int, ...]]:
            axes = {n: p.axes.get(n) for n in p.feeds[0]}
            free = [(n, x, axes[n] if p.dynamic else None) for n, x in p.feeds[0].items()]
            return {n: tuple(d for i, d in enumerate(x.shape) if i != a) for n, x, a in free}

        same = (dict(self.axes), self.dynamic) == (dict(other.axes), other.dynamic)
        return same and sizes(self) == sizes(other)

    def join(self, other: Probes) -> Probes:
        """Put others that :meth:`fits` behind these; a split then holds out some of either."""
        both = replace(
            self,
            feeds=self.feeds + other.feeds,
            samples=self.samples + other.samples,
            seed=other.seed if self.seed is None else self.seed,
            source=f"{self.source} and {other.source}",
            parts=(self.parts or (self.samples,)) + (other.parts or (other.samples,)),
        )
        return both._take(np.arange(both.samples), BATCH) if self.dynamic else both

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
            size = divisor(samples, batch or self.batch)
            feeds = tuple(_select(whole, self.axes, units[k : k + size]) for k in range(0, samples, size))
        parts = np.bincount(self._kinds()[units], minlength=len(self.parts)) * (samples // len(units))
        kept = tuple(parts.tolist()) if self.parts else ()
        return replace(self, feeds=feeds, samples=samples, parts=kept)


def make(
    specs: Sequence[InputSpec],
    *,
    samples: int,
    seed: int,
    batch: int = BATCH,
    pool: int | None = None,
    answers: Answers | None = None,
    misfit: Misfit | None = None,
    wanted: Range | None = None,
    responses: Run | None = None,
) -> Probes:
    """Make up inputs.

    Parameters
    ----------
    specs : sequence of InputSpec
        Every input that must be fed.
    samples : int
        How many; rounded up to whole feeds.
    seed : int
        Sample ``i`` depends on ``(seed, i)`` alone, and one more to choose from on what it is turned from.
    batch : int
        Largest number of samples in a feed, where the model leaves it free.
    pool : int, optional
        Samples drawn to choose from when ``answers`` or ``responses`` choose; default ``POOL * samples``.
    answers : callable, optional
        Runs the network: a feed in, its class scores out, ndarray of shape (samples of the feed, classes).
        The probes are then picked by :func:`onnxdp.answers.pick`.
    misfit : callable, optional
        How far what the network remembers of its training is from a feed; chooses the range of pictures.
    wanted : Range, optional
        The range of pictures, where it is known. Otherwise they are standardised per channel, unless
        ``misfit`` says better, or, without it, ``answers`` hardly move.

    responses : callable, optional
        Runs the network. Where it is erratic about most signals, those are taken that it answers steadily
        (:func:`onnxdp.steadiness.erratic`), as far as there are enough, whatever their classes.

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
        exact = divisor(samples, size)
        size = exact if 2 * exact >= size else math.ceil(samples / math.ceil(samples / size))
    feeds = max(1 if plan.dynamic else 2, math.ceil(samples / size))
    total = feeds * size
    main = next(s.kind for s in specs if s.name == plan.primary) if specs else "other"
    drawn = [_draw(spec, plan, seed, k, total) for k, spec in enumerate(specs)]

    def feed(indices: Array, chosen: Range) -> Mapping[str, Array]:
        return MappingProxyType({s.name: d(indices, chosen) for s, d in zip(specs, drawn, strict=True)})

    order, chosen = np.arange(total), wanted or STANDARDISED
    if misfit is not None and wanted is None and main == "image":
        few, known = range(0, min(TRIED, total), size), misfit
        chosen = by_statistics(lambda r: known([feed(np.arange(k, k + size), r) for k in few]))
    many = math.ceil(max(total, POOL * samples if pool is None else pool) / size) * size
    units = np.arange(many).reshape(-1, 1 if plan.dynamic else size)
    unknown = wanted is None and misfit is None and main == "image"
    steady = None
    if responses is not None and main == "other":
        asked_of = responses
        steady = _steadiest(
            lambda some: erratic(asked_of, (feed(u, chosen) for u in some), seed), units, total
        )
    if steady is not None:
        order = steady
    elif answers is not None and plan.axes.get(plan.primary) is not None and (unknown or many > total):
        asked, number = answers, many if many > total else min(_ASKED, total)

        def ask(chosen: Range) -> Array:
            feeds = ahead(lambda k: feed(np.arange(k, k + size), chosen), range(0, number, size))
            given = [np.asarray(asked(f)) for f in feeds]
            if any(a.size % size for a in given) or len({a.size for a in given}) > 1:
                return np.zeros((number, 1))  # they are not of single samples, and tell none apart
            return np.concatenate([a.reshape(size, -1) for a in given])

        scores = ask(chosen)
        if unknown and diversity(scores) < _UNMOVED:  # it may have been taught on 0..255
            louder = ask(CENTRED)
            if diversity(louder) > 2 * diversity(scores):
                scores, chosen = louder, CENTRED
        order = pick(scores, total) if many > total else order
    made = tuple(feed(order[k : k + size], chosen) for k in range(0, total, size))
    source = {"image": "dead leaves", "ids": "random ids"}.get(main, "random numbers")
    source = LOUD if chosen is CENTRED and wanted is None else source
    return Probes(made, total, seed, source, plan.axes, plan.dynamic)


def _steadiest(erratic_about: Callable[[Array], Array], units: Array, total: int) -> Array | None:
    """Choose ``total`` samples of the rows of ``units``; None where the first few say that all are steady."""
    if not erratic_about(units[:_ASKED]).any():
        return None
    worst = erratic_about(units)
    return units[np.sort(np.argsort(worst, stable=True)[: total // units.shape[1]])].reshape(-1)


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
    return gathered(path, specs, archives.read(path))


def gathered(path: Path, specs: Sequence[InputSpec], arrays: Mapping[str, Array]) -> Probes:
    """Make probes of the arrays read from ``path``; see :func:`load`."""
    wanted = [s.name for s in specs]
    for missing in (n for n in wanted if n not in arrays):
        raise UsageError(
            f"{path} lacks the input {missing!r} (it has {archives.some(arrays)}); save one array per input."
        )
    for extra in (n for n in arrays if n not in wanted):
        raise UsageError(
            f"{path} holds {extra!r}, which is no input of the model; its inputs are {archives.some(wanted)}."
        )
    plan = Layout.of(specs, BATCH)
    counts: dict[str, int] = {}
    for spec in specs:
        archives.check(path, spec, arrays[spec.name], plan)
        if plan.axes[spec.name] == 0:
            counts[spec.name] = len(arrays[spec.name])
    if len(set(counts.values())) > 1:
        (a, m), (b, n) = min(counts.items(), key=lambda c: c[1]), max(counts.items(), key=lambda c: c[1])
        raise UsageError(f"{path} has {m} samples of {a!r} and {n} of {b!r}; give equally many of each.")
    samples = next(iter(counts.values()), 1)
    dynamic = plan.dynamic and all(a in (0, None) for a in plan.axes.values())
    size = plan.batch if counts and not plan.dynamic else (divisor(samples, BATCH) if dynamic else 1)
    if samples % size:
        raise UsageError(
            f"{path} has {samples} samples and the model takes {size} at a time; give a multiple of {size}."
        )
    axes = {n: a if a == 0 else None for n, a in plan.axes.items()}
    feeds = tuple(_select(arrays, axes, np.arange(k, k + size)) for k in range(0, samples, size))
    return Probes(feeds, samples, None, path.name, MappingProxyType(axes), dynamic)


def _draw(spec: InputSpec, plan: Layout, seed: int, k: int, standard: int) -> Callable[[Array, Range], Array]:
    """Return the function that makes input ``k`` of the samples with given indices, pictures in a range.

    Mean and deviation of a set of pictures are those of its first ``standard``.
    """
    if number_kind(spec.dtype) == "?":
        kind = "text" if spec.dtype == "object" else spec.dtype
        raise UsageError(
            f"The input {spec.name!r} holds {kind}, which cannot be made up; give --inputs FILE.npz."
        )
    dtype, shape, axis = np.dtype(spec.dtype), plan.shapes[spec.name], plan.axes[spec.name]
    if spec.kind == "image":
        one = _gallery(shape, dtype, seed + 1_000_003 * k, standard)
    else:
        number = _numbers(spec, shape, dtype, seed, k, plan.length)

        def one(i: int, chosen: Range) -> Array:
            return number(i)

    def draw(indices: Array, chosen: Range) -> Array:
        if axis is None:
            return one(0 if plan.dynamic else int(indices[0]), chosen)
        return np.concatenate([one(int(i), chosen) for i in indices], axis)

    return draw


def _gallery(
    shape: tuple[int, ...], dtype: np.dtype[Any], seed: int, standard: int
) -> Callable[[int, Range], Array]:
    """Return the function from an index to a picture in the input's layout and type, in a range."""
    last = channel_axis(shape) == 3
    c, h, w = (shape[3], *shape[1:3]) if last else shape[1:]
    drawn: dict[int, Array] = {}

    def raw(i: int) -> Array:
        turned = i // standard % 2 > 0  # every second set is the one before: leaves have no upper side
        number = i - standard if turned else i
        if number not in drawn:
            drawn[number] = pictures.draw([number], c, h, w, seed)
        if not turned:
            return drawn[number]
        return np.ascontiguousarray(np.rot90(drawn[number], 1 if h == w else 2, (2, 3)))

    mean, deviation = np.zeros(c), np.ones(c)
    if dtype.kind == "f":
        numbers = range(standard)
        first = list(side_by_side(raw, numbers) if h * w >= _LARGE else map(raw, numbers))
        mean = np.mean([x.mean((0, 2, 3)) for x in first], 0)
        apart = [np.square(x - mean.reshape(c, 1, 1)).mean((0, 2, 3)) for x in first]
        deviation = np.sqrt(np.mean(apart, 0))

    def one(i: int, chosen: Range) -> Array:
        x = raw(i) if dtype.kind == "u" else chosen(raw(i), mean, deviation).astype(dtype)
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
    elif USE_CACHE.search(low):
        value = 0  # all weights are used where nothing is cached
    elif spec.kind == "state" and CACHE.search(low):
        value = None  # nothing is attended to among keys that are all zero
    if value is not None:
        return lambda i: np.full(shape, value, dtype)
    if spec.kind == "ids" and POSITION.search(low):
        ramp = np.broadcast_to(np.arange(shape[-1]) % (spec.vocabulary or shape[-1]), shape).astype(dtype)
        return lambda i: ramp
    most = min(spec.vocabulary or VOCABULARY, np.iinfo(dtype).max + 1) if spec.kind == "ids" else 0

    def one(i: int) -> Array:
        rng = np.random.Generator(np.random.PCG64([seed, k, i]))
        if spec.kind == "ids":
            return texts.ended(texts.draw(shape, most, rng), spec.marks, most).astype(dtype)
        made = rng.standard_normal(shape) if spec.kind == "state" else signals.draw(shape, rng)
        return made.astype(dtype)

    return one


def _select(
    arrays: Mapping[str, Array], axes: Mapping[str, int | None], indices: Array
) -> Mapping[str, Array]:
    """Cut the samples ``indices`` out of every array that has a batch axis."""
    return MappingProxyType(
        {n: x if (a := axes[n]) is None else x.take(indices, a) for n, x in arrays.items()}
    )


def divisor(n: int, most: int) -> int:
    """Return the largest divisor of ``n`` up to ``most``."""
    return next((d for d in range(min(n, most), 0, -1) if n % d == 0), 1)
