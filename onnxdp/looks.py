"""What a weight is fed and puts out, in the original and in the network that is compressed so far.

Rows are sampled at the same places in both, so that what outputs lack is told row by row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from onnxdp import arrays, stats, weights
from onnxdp.encoding import Workshop
from onnxdp.errors import misfit
from onnxdp.network import Changes, Network
from onnxdp.pieces import Stream
from onnxdp.probes import Probes
from onnxdp.records import Array, Weight

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

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return int(self.rows.nbytes + self.mean.nbytes + self.mean_beside.nbytes)

    def check(self, weight: Weight, shape: tuple[int, ...]) -> None:
        """Refuse what was read and is not of this shape (groups, rows, outputs), as a weight's outputs are.

        Raises
        ------
        UsageError
            It is not.
        """
        shapes = self.rows.shape, self.mean.shape, self.mean_beside.shape
        groups, _, outputs = shape
        kinds = {a.dtype.kind for a in (self.rows, self.mean, self.mean_beside)}
        if shapes != (shape, (groups, weight.inputs), (groups, 1, outputs)) or kinds != {"f"}:
            raise misfit(weight.name)


class Original:
    """The original network: what its weights put out never changes, and some of it is kept.

    Parameters
    ----------
    workshop : Workshop
    network : Network
    probes : Probes
    room : int
        Bytes that may be kept.
    known : mapping of str to Aims
        By weight, what was kept of the same network and probes before.
    """

    def __init__(
        self,
        workshop: Workshop,
        network: Network,
        probes: Probes,
        room: int = 0,
        known: Mapping[str, Aims] = MappingProxyType({}),
    ) -> None:
        self._workshop = workshop
        self._run = network, probes
        self._room = room
        self.kept = dict(known)
        self.rest()

    def rest(self) -> None:
        """Let go of tensors and sessions; what is asked next makes them again."""
        self._stream = Stream(*self._run)

    def aims(self, spot: Spot) -> Aims:
        """Return what a weight puts out."""
        name = spot.weight.name
        if name in self.kept:
            return self.kept[name]
        seen = look(self._stream, spot, {}, self._workshop.seed)
        aims = Aims(seen.gives(original_blocks(self._workshop, spot.weight)), seen.mean, seen.mean_beside)
        if aims.nbytes <= self._room:
            self._room -= aims.nbytes
            self.kept[name] = aims
        return aims


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
