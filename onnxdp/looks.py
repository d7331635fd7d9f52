"""What a weight is fed and puts out, in the original and in the network that is compressed so far.

Rows are sampled at the same places in both, so that what outputs lack is told row by row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import numpy as np

from onnxdp import arrays, stats, weights
from onnxdp.encoding import Workshop
from onnxdp.errors import misfit
from onnxdp.network import Changes, Network
from onnxdp.pieces import Stream
from onnxdp.probes import Probes
from onnxdp.records import Array, Weight
from onnxdp.settings import Progress

KEPT = 128_000_000
"""Bytes of what the original's weights put out that may be kept for another round."""

_QUICK = 2048
"""Rows that a weight is fitted on where the result is only to be measured."""

_MANY = 64
"""Columns from which halves of a product are worked out side by side."""


@dataclass(frozen=True, slots=True)
class Spot:
    """A weight, the one place where it meets activations, and how they are looked at there.

    Attributes
    ----------
    weight : Weight
    tap : Tap
    place : int
        In graph order.
    rows : int
        To sample.
    centred : bool
        Whether the bias takes up their mean.
    """

    weight: Weight
    tap: stats.Tap
    place: int
    rows: int
    centred: bool


@dataclass(frozen=True, slots=True)
class Seen:
    """What a weight sees in one of the two networks, over the root of the number of rows; centred or not.

    Attributes
    ----------
    rows : ndarray of shape (groups, rows, inputs), float32
    mean : ndarray of shape (groups, inputs), float64
        What was taken off.
    beside : ndarray of shape (groups, rows, outputs), float32, or None
        What is added to the weight's output at the same places; None where nothing that is known by now is.
    mean_beside : ndarray of shape (groups, 1, outputs), float32
    """

    rows: Array
    mean: Array
    beside: Array | None
    mean_beside: Array

    def gives(self, w: Array) -> Array:
        """Return what the weight puts out, with what is added to it, (groups, rows, outputs)."""
        out = np.empty((*self.rows.shape[:2], w.shape[-1]), np.float32)

        def some(columns: slice) -> None:
            np.matmul(self.rows, w[..., columns], out=out[..., columns])

        list(arrays.side_by_side(some, arrays.pieces(w.shape[-1], _MANY)))
        if self.beside is not None:
            out += self.beside
        return out

    def aims(self, w: Array) -> Aims:
        """Return what the weight puts out as what another is to put out."""
        return Aims(self.gives(w), self.mean, self.mean_beside)

    def check(self, weight: Weight) -> None:
        """Refuse what was read and is not what a weight sees.

        Raises
        ------
        UsageError
            It is not.
        """
        _check(self, weight, (weight.groups, self.rows.shape[1], weight.inputs))


@dataclass(frozen=True, slots=True)
class Aims:
    """What a weight puts out in the original, centred as what it sees is: means as of Seen.

    Attributes
    ----------
    rows : ndarray of shape (groups, rows, outputs), float32
    mean : ndarray of shape (groups, inputs), float64
    mean_beside : ndarray of shape (groups, 1, outputs), float32
    """

    rows: Array
    mean: Array
    mean_beside: Array

    def check(self, weight: Weight, rows: int) -> None:
        """Refuse what was read and is not what a weight puts out, so many rows.

        Raises
        ------
        UsageError
            It is not.
        """
        _check(self, weight, (weight.groups, rows, weight.outputs))


Kept: TypeAlias = Seen | Aims
"""What is kept of the original for a weight: what it puts out, or what it sees where that is less."""


def _check(kept: Kept, weight: Weight, shape: tuple[int, ...]) -> None:
    means = (weight.groups, weight.inputs), (weight.groups, 1, weight.outputs)
    held = kept.rows, kept.mean, kept.mean_beside
    if tuple(a.shape for a in held) != (shape, *means) or {a.dtype.kind for a in held} != {"f"}:
        raise misfit(weight.name)


class Original:
    """The original network: what its weights put out never changes, and some of it is kept.

    Parameters
    ----------
    workshop : Workshop
    network : Network
    probes : Probes
    known : mapping of str to Seen or Aims
        By weight, what was kept of the same network and probes before.
    once : bool
        Whether what was kept is given once: asked again, the network is run again.
    """

    def __init__(
        self,
        workshop: Workshop,
        network: Network,
        probes: Probes,
        known: Mapping[str, Kept] = MappingProxyType({}),
        *,
        once: bool = False,
    ) -> None:
        self._workshop = workshop
        self._run = network, probes
        self._halts = [spot.place for spot in spots(workshop, network, workshop.weights)]
        self._once = once
        self.kept: dict[str, Kept] = dict(known)
        self.rest()

    def rest(self) -> None:
        """Let go of tensors and sessions; what is asked next makes them again."""
        self._stream = Stream(*self._run)

    def aims(self, spot: Spot) -> Aims:
        """Return what a weight puts out."""
        name, w = spot.weight.name, original_blocks(self._workshop, spot.weight)
        known = self.kept.pop(name, None) if self._once else self.kept.get(name)
        if isinstance(known, Aims):
            return known
        if known is None:
            known = self._seen(spot)
        else:
            known.check(spot.weight)
        return known.aims(w)

    def keep(self, order: Sequence[Spot], progress: Progress) -> None:
        """Keep what weights put out, or see where that is less."""
        with arrays.one_blas_thread():
            for done, spot in enumerate(order):
                progress("running the original", done, len(order), spot.weight.name)
                seen = self._seen(spot)
                aims = seen.aims(original_blocks(self._workshop, spot.weight))
                less = seen.beside is None and seen.rows.nbytes < aims.rows.nbytes
                self.kept[spot.weight.name] = seen if less else aims
                arrays.trim()
        self.rest()

    def _seen(self, spot: Spot) -> Seen:
        if spot.place < self._stream.place:
            self.rest()
        for place in self._halts:  # where it is halted decides what is fused, and so the last bits
            if self._stream.place < place < spot.place:
                self._stream.advance(place, {})
        return look(self._stream, spot, {}, self._workshop.seed)


def spots(workshop: Workshop, network: Network, names: Iterable[str], *, quick: bool = False) -> list[Spot]:
    """Return where weights meet activations, in graph order; those that do so in one place of the network.

    Parameters
    ----------
    workshop : Workshop
    network : Network
    names : iterable of str
        Of weights.
    quick : bool
        Whether what is fitted there is only to be measured.
    """
    found, result = workshop.found, []
    for weight in (workshop.weights[n] for n in names if n in network.fed):
        tap = stats.single_tap(found, weight)
        if tap is None:
            continue
        rows = min(stats.rows_wanted(weight), _QUICK) if quick else stats.rows_wanted(weight)
        result.append(Spot(weight, tap, network.place(tap.output), rows, weights.can_centre(found, weight)))
    return sorted(result, key=lambda spot: spot.place)


def last(order: Sequence[Spot], samples: int, room: int = KEPT) -> Sequence[Spot]:
    """Return the last weights for which there is room: those before them take short runs to look at again."""
    for count, spot in enumerate(reversed(order)):
        weight = spot.weight
        rows = min(spot.rows, samples * max(1, weight.positions))
        wide = weight.outputs if spot.tap.added else min(weight.inputs, weight.outputs)
        room -= 4 * rows * weight.groups * wide
        if room < 0:
            return order[len(order) - count :]
    return order


def original_blocks(workshop: Workshop, weight: Weight) -> Array:
    """Return a weight as it was, (groups, inputs, outputs), float32."""
    return weights.blocks(weight, weights.tensor_of(workshop.found, weight.name)).astype(np.float32)


def look(stream: Stream, spot: Spot, changes: Changes, seed: int) -> Seen:
    """Move a network on to a weight, and return what it sees there."""
    stream.advance(spot.place, changes)
    x, beside = _rows(stream, spot, seed)
    groups, count, inputs = x.shape
    root = np.float32(count**0.5)
    mean = np.zeros((groups, inputs))
    mean_beside = np.zeros((groups, 1, spot.weight.outputs), np.float32)
    if spot.centred:  # large: in place
        mean = x.mean(axis=1, dtype=np.float64)
        x -= mean[:, None, :].astype(np.float32)
    x /= root
    if beside is not None:
        if spot.centred:
            mean_beside = beside.mean(axis=1, keepdims=True)
            beside -= mean_beside
        beside /= root
    return Seen(x, mean, beside, mean_beside)


def _rows(stream: Stream, spot: Spot, seed: int) -> tuple[Array, Array | None]:
    """Return sampled rows of the weight's input, and those of what is added to its output.

    (groups, rows, inputs), and (groups, rows, outputs) at the same places; None where nothing that is known
    by now is added. The last layer before a residual join repairs the other branch's error, too (method.md
    1.3).
    """
    other = spot.tap.added if spot.tap.added is not None and stream.has(spot.tap.added) else None
    return stats.sampled_beside(stream, spot.weight, spot.tap, other, spot.rows, seed)
