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
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from onnxdp import arrays, stats, weights
from onnxdp.encoding import Workshop
from onnxdp.looks import Aims, Original, Seen, look, original_blocks, spots
from onnxdp.network import Network
from onnxdp.pieces import Stream
from onnxdp.planner import KEEP
from onnxdp.probes import Probes
from onnxdp.records import Array, Candidate, Encoded, Made, Weight
from onnxdp.settings import Progress

ALPHA = 1.0
"""Share of the way to the refitted weight; made-up probes deserve less than full trust."""
RIDGE = (0.03, 0.3)
"""delta over the mean diagonal of H': a + b * inputs / samples."""

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
    fitted = {c.weight: c for c in choices if c.method != KEEP and "dictionary" not in c.params}
    order = spots(workshop, network, fitted, quick=quick)
    later = {spot.weight.name for spot in order}
    coded = [spot.weight for spot in order if "bits" in fitted[spot.weight.name].params]
    closing = _closing(coded) if room is not None else ()
    encoded = {e.weight: e for e in workshop.encode([c for c in choices if c.weight not in later])}
    shifts = workshop.shifts(list(encoded.values()))
    changes = workshop.fed(network, list(encoded.values()), shifts)
    original = original or Original(workshop, network, probes)
    compressed = Stream(network, probes)

    with arrays.one_blas_thread():  # the original runs on while a weight is encoded
        for done, (spot, aims) in enumerate(zip(order, arrays.ahead(original.aims, order), strict=True)):
            name = spot.weight.name
            progress("refitting weights", done, len(order), name)
            seen = look(compressed, spot, changes, workshop.seed)
            arrays.trim()
            aims.check(spot.weight, seen.rows.shape[1])
            w = original_blocks(workshop, spot.weight)
            lack = seen.gives(w)
            np.subtract(aims.rows, lack, out=lack)  # large
            fit = partial(_refit, workshop, fitted[name], w, aims, seen, lack, quick=quick)
            if room is None or name not in closing:
                new, shift = fit()
            else:
                left = partial(_beside, room, list(encoded.values()))
                new, shift = _filled(partial(fit, memo={}), left, spot.weight)
            encoded[name] = new
            if spot.centred:
                shifts[name] = shift
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


def _closing(order: Sequence[Weight]) -> Sequence[str]:
    """Name the last large weight, where some bytes more or less hardly matter, and those after it."""
    large = [i for i, w in enumerate(order) if w.size >= _LARGE * max(w.size for w in order)]
    return [w.name for w in order[large[-1] :]] if large else ()


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
