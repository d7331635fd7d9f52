"""Fit the chosen forms again, layer by layer, to what the compressed network really feeds them.

Both networks advance side by side, from one weight to the next. With x what the original feeds a weight and
x' what the compressed network does, the weight moves towards the one that makes the original's output of x',

    W* = W + alpha (H' + delta I)^-1 E[x' (x^T W - x'^T W)],    b' = b + E[x]^T W - E[x']^T W'

and encoded again with H'. So every layer repairs what those before it lost.

References
----------
method.md 1.3 (reduced-rank regression with the predecessor's error); prototype.md section 2 (alpha, ridge).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from onnxdp import arrays, stats, weights
from onnxdp.encoding import Workshop
from onnxdp.network import Changes, Network
from onnxdp.pieces import Stream
from onnxdp.planner import KEEP
from onnxdp.probes import Probes
from onnxdp.records import Array, Candidate, Encoded, Made, Weight
from onnxdp.settings import Progress

ALPHA = 1.0
"""Share of the way to the refitted weight; made-up probes deserve less than full trust."""
RIDGE = (0.03, 0.3)
"""delta over the mean diagonal of H': a + b * inputs / samples."""

_QUICK = 2048
"""Rows that a weight is fitted on where the result is only to be measured."""

_MANY = 64
"""Columns from which halves of a product are worked out side by side."""

_CLOSED = 6
"""Times that a weight is encoded to fill a file ..."""
_LARGE = 0.5
"""... that holds at least so many times the numbers of the largest ..."""
_SPARE = 0.5
"""... and whose own may take so many bits more or less, ..."""
_SAME = 1e-3
"""... down to this difference."""

Room: TypeAlias = Callable[[Sequence[Encoded]], tuple[int, float]]
"""Gives the bytes left over, and how many may be."""

KEPT = 64_000_000
"""Bytes of what the original's weights put out that may be kept for another round."""


def refine(
    workshop: Workshop,
    network: Network,
    probes: Probes,
    choices: Sequence[Candidate],
    progress: Progress,
    *,
    quick: bool = False,
    original: Original | None = None,
    room: Room | None = None,
) -> Made:
    """Encode the choices one after the other, each on the compressed network's own activations.

    Parameters
    ----------
    workshop : Workshop
    network : Network
    probes : Probes
        Those that weights are fitted on.
    choices : sequence of Candidate
    progress : callable
    quick : bool
        Whether the result is only to be measured.
    original : Original, optional
        Of the same network and probes, from an earlier call that was as quick.
    room : callable, optional
        Tells how many bytes a file has left for what is encoded by then and the choices of the others: one of
        the last weights takes them up.

    Returns
    -------
    list of Encoded, dict of str to ndarray
        The new forms, and what the bias behind each weight gains.
    """
    taps = {c.weight: stats.single_tap(workshop.found, workshop.weights[c.weight]) for c in choices}
    order = sorted(
        (
            c
            for c in choices
            if c.method != KEEP
            and c.weight in network.fed
            and taps[c.weight]
            and "dictionary" not in c.params
        ),
        key=lambda c: stats.first_place(network, workshop.found, workshop.weights[c.weight]),
    )
    later = {c.weight for c in order}
    closing = _closing(workshop, order) if room is not None else ()
    encoded = {e.weight: e for e in workshop.encode([c for c in choices if c.weight not in later])}
    shifts = workshop.shifts(list(encoded.values()))
    changes = workshop.fed(network, list(encoded.values()), shifts)
    original, compressed = original or Original(network, probes), Stream(network, probes)

    def aimed(choice: Candidate) -> tuple[Candidate, Spot, Array, Aims]:
        weight, tap = workshop.weights[choice.weight], taps[choice.weight]
        assert tap is not None
        rows = min(stats.rows_wanted(weight), _QUICK) if quick else stats.rows_wanted(weight)
        spot = Spot(weight, tap, network.place(tap.output), rows, weights.can_centre(workshop.found, weight))
        w = weights.blocks(weight, weights.tensor_of(workshop.found, weight.name)).astype(np.float32)
        return choice, spot, w, original.aims(spot, w, workshop.seed)

    with arrays.one_blas_thread():  # the original runs on while a weight is encoded
        for done, (choice, spot, w, aims) in enumerate(arrays.ahead(aimed, order)):
            progress("refitting weights", done, len(order), choice.weight)
            seen = _look(compressed, spot, changes, workshop.seed)
            arrays.trim()
            lack = seen.gives(w)
            np.subtract(aims.rows, lack, out=lack)  # large
            fit = partial(_refit, workshop, choice, w, aims, seen, lack, quick=quick)
            if room is None or choice.weight not in closing:
                new, shift = fit()
            else:
                left = partial(_beside, room, list(encoded.values()))
                new, shift = _filled(partial(fit, memo={}), left, spot.weight)
            encoded[choice.weight] = new
            if spot.centred:
                shifts[choice.weight] = shift
            changes.update(workshop.fed(network, [new], shifts))
    original.rest()
    return [encoded[c.weight] for c in choices if c.weight in encoded], shifts


def _beside(room: Room, encoded: Sequence[Encoded], new: Encoded) -> tuple[int, float]:
    return room([*encoded, new])


def _filled(
    fit: Callable[..., tuple[Encoded, Array]],
    room: Callable[[Encoded], tuple[int, float]],
    weight: Weight,
) -> tuple[Encoded, Array]:
    """Encode a weight with so many bits more or less that the file is full; where that fails, with the most.

    What it takes hardly ever follows its bits to the byte: between too few and too many, halves are tried.
    """
    low, high, spare = -_SPARE, _SPARE, 0.0
    best: tuple[int, Encoded, Array] | None = None
    tried: set[float] = set()
    for _ in range(_CLOSED):
        new, shift = fit(spare=spare)
        tried.add(spare)
        left, near = room(new)
        if left < 0:
            high = min(high, spare)
        else:
            low = max(low, spare)
            if best is None or left < best[0]:
                best = left, new, shift
            if left <= near:
                break
        spare = min(max(spare + 8 * (left - near / 2) / weight.size, low), high)
        if spare in tried:
            spare = (low + high) / 2
        if spare in tried or high - low < _SAME:
            break
    return (new, shift) if best is None else best[1:]


def _closing(workshop: Workshop, order: Sequence[Candidate]) -> Sequence[str]:
    """Name the last large weight, where some bytes more or less hardly matter, and those after it."""
    names = [c.weight for c in order if "bits" in c.params]
    sizes = [workshop.weights[n].size for n in names]
    large = [i for i, size in enumerate(sizes) if size >= _LARGE * max(sizes)]
    return names[large[-1] :] if large else ()


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
    """What a weight puts out in the original, centred as what it sees is: rows and means as of Seen."""

    rows: Array
    mean: Array
    mean_beside: Array


class Original:
    """The original network: what its weights put out never changes, and some of it is kept.

    Parameters
    ----------
    network : Network
    probes : Probes
    room : int
        Bytes that may be kept.
    """

    def __init__(self, network: Network, probes: Probes, room: int = 0) -> None:
        self._run = network, probes
        self._kept: dict[str, Aims] = {}
        self._room = room
        self.rest()

    def rest(self) -> None:
        """Let go of tensors and sessions; what is asked next makes them again."""
        self._stream = Stream(*self._run)

    def aims(self, spot: Spot, w: Array, seed: int) -> Aims:
        """Return what a weight, its blocks (groups, inputs, outputs) being ``w``, puts out."""
        name = spot.weight.name
        if name in self._kept:
            return self._kept[name]
        seen = _look(self._stream, spot, {}, seed)
        aims = Aims(seen.gives(w), seen.mean, seen.mean_beside)
        if aims.rows.nbytes <= self._room:
            self._room -= aims.rows.nbytes
            self._kept[name] = aims
        return aims


def _refit(
    workshop: Workshop,
    choice: Candidate,
    w: Array,
    aims: Aims,
    seen: Seen,
    lack: Array,
    *,
    quick: bool,
    spare: float = 0.0,
    memo: dict[str, Any] | None = None,
) -> tuple[Encoded, Array]:
    """Return the weight encoded for what the compressed network feeds it, and what its bias gains.

    ``lack`` is what its outputs lack as it is; what does not depend on ``spare`` stays in the ``memo``.
    """
    weight = workshop.weights[choice.weight]
    if workshop.forms[choice.method].sequential:
        tensor = weights.tensor_of(workshop.found, weight.name)
        new = workshop.encode_one(choice, tensor, seen.rows, lack, quick=quick, spare=spare, memo=memo)
    else:
        moved = w + ALPHA * _ridge_solve(seen.rows, lack)
        new = workshop.encode_one(choice, weights.unblocks(weight, moved), seen.rows)
    decoded = weights.blocks(weight, workshop.decode(new))
    shift = stats.mean_output(aims.mean, w) - stats.mean_output(seen.mean, decoded)
    return new, (shift + (aims.mean_beside - seen.mean_beside).reshape(-1)).astype(np.float32)


def _ridge_solve(b: Array, target: Array) -> Array:
    """Return (b^T b + delta I)^-1 b^T target, (groups, inputs, outputs), through the smaller Gram."""
    groups, rows, inputs = b.shape
    diagonal = np.square(b).sum(axis=(1, 2), dtype=np.float64) / inputs
    delta = (RIDGE[0] + RIDGE[1] * min(1.0, inputs / rows)) * np.where(diagonal > 0, diagonal, 1.0)
    out = np.empty((groups, inputs, target.shape[2]), np.float32)
    for g in range(groups):
        x, y = b[g], target[g]
        if inputs <= rows:
            gram = (x.T @ x).astype(np.float64)
            gram[np.diag_indices(inputs)] += delta[g]
            out[g] = np.linalg.solve(gram, (x.T @ y).astype(np.float64))
        else:
            gram = (x @ x.T).astype(np.float64)
            gram[np.diag_indices(rows)] += delta[g]
            out[g] = x.T @ np.linalg.solve(gram, y.astype(np.float64)).astype(np.float32)
    return out


def _look(stream: Stream, spot: Spot, changes: Changes, seed: int) -> Seen:
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
