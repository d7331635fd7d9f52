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

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeAlias

import numpy as np

from onnxdp import arrays, stats, weights
from onnxdp.encoding import Workshop
from onnxdp.network import Changes, Network
from onnxdp.pieces import Stream
from onnxdp.planner import KEEP
from onnxdp.probes import Probes
from onnxdp.records import Array, Candidate, Encoded, Weight
from onnxdp.settings import Progress

ALPHA = 1.0
"""Share of the way to the refitted weight; made-up probes deserve less than full trust."""
RIDGE = (0.03, 0.3)
"""delta over the mean diagonal of H': a + b * inputs / samples."""

_MANY = 64
"""Columns from which halves of a product are worked out side by side."""

Rows: TypeAlias = tuple[Array, Array | None]
"""What a weight sees, and what is added to what it puts out."""


def refine(
    workshop: Workshop,
    network: Network,
    probes: Probes,
    choices: Sequence[Candidate],
    progress: Progress,
    *,
    quick: bool = False,
) -> tuple[list[Encoded], dict[str, Array]]:
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
    encoded = {e.weight: e for e in workshop.encode([c for c in choices if c.weight not in later])}
    shifts = workshop.shifts(list(encoded.values()))
    changes = workshop.fed(network, list(encoded.values()), shifts)
    original, compressed = Stream(network, probes), Stream(network, probes)
    for done, choice in enumerate(order):
        progress("refitting weights", done, len(order), choice.weight)
        weight, tap = workshop.weights[choice.weight], taps[choice.weight]
        assert tap is not None
        place = network.place(tap.output)
        look = partial(_look, ((original, {}), (compressed, changes)), place, weight, tap, workshop.seed)
        with arrays.one_blas_thread():
            new, shift = _refit(workshop, choice, look, quick=quick)
        encoded[choice.weight] = new
        if weights.can_centre(workshop.found, weight):
            shifts[choice.weight] = shift
        changes.update(workshop.fed(network, [new], shifts))
    return [encoded[c.weight] for c in choices if c.weight in encoded], shifts


def _refit(
    workshop: Workshop, choice: Candidate, look: Callable[[], Iterator[Rows]], *, quick: bool
) -> tuple[Encoded, Array]:
    """Return the weight encoded for what the compressed network feeds it, and what its bias gains."""
    weight = workshop.weights[choice.weight]
    (x, beside), (seen, beside_seen) = look()
    arrays.trim()
    centre = weights.can_centre(workshop.found, weight)
    tensor = weights.tensor_of(workshop.found, weight.name)
    w = weights.blocks(weight, tensor).astype(np.float32)
    mean = x.mean(axis=1, dtype=np.float64) if centre else np.zeros((x.shape[0], x.shape[2]))
    mean_seen = seen.mean(axis=1, dtype=np.float64) if centre else mean
    root = np.float32(x.shape[1] ** 0.5)
    for rows, middle in ((x, mean), (seen, mean_seen)):  # large: in place
        rows -= middle[:, None, :].astype(np.float32)
        rows /= root
    x -= seen
    lack = np.concatenate(list(arrays.side_by_side(x.__matmul__, _halves(w))), axis=-1)
    del x, rows  # the rest is what the compressed inputs no longer give
    mean_beside = np.zeros((len(w), 1, w.shape[2]), np.float32)
    if beside is not None and beside_seen is not None:  # nor does what is added to the output
        beside -= beside_seen
        if centre:
            mean_beside = beside.mean(axis=1, keepdims=True)
        lack += (beside - mean_beside) / root
    if workshop.forms[choice.method].sequential:
        new = workshop.encode_one(choice, tensor, seen, lack, quick=quick)
    else:
        moved = w + ALPHA * _ridge_solve(seen, lack)
        new = workshop.encode_one(choice, weights.unblocks(weight, moved), seen)
    decoded = weights.blocks(weight, workshop.decode(new))
    shift = stats.mean_output(mean, w) - stats.mean_output(mean_seen, decoded)
    return new, (shift + mean_beside.reshape(-1)).astype(np.float32)


def _halves(w: Array) -> list[Array]:
    """Cut many columns in two: always, so that threads change no bit."""
    n = w.shape[-1]
    return [w] if n < _MANY else [w[..., : n // 2], w[..., n // 2 :]]


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


def _look(
    streams: Sequence[tuple[Stream, Changes]], place: int, weight: Weight, tap: stats.Tap, seed: int
) -> Iterator[Rows]:
    """Move both networks on to a weight, side by side, and return what it sees in each."""

    def one(job: tuple[Stream, Changes]) -> Rows:
        stream, changes = job
        stream.advance(place, changes)
        return _rows(stream, weight, tap, seed)

    return arrays.side_by_side(one, streams)


def _rows(stream: Stream, weight: Weight, tap: stats.Tap, seed: int) -> Rows:
    """Return sampled rows of the weight's input, and those of what is added to its output.

    (groups, rows, inputs), and (groups, rows, outputs) at the same places; None where nothing that is known
    by now is added. The last layer before a residual join repairs the other branch's error, too (method.md
    1.3).
    """
    count = -(-stats.rows_wanted(weight) // stream.feeds)
    other = tap.added if tap.added is not None and stream.has(tap.added) else None
    rows: list[Array] = []
    added: list[Array | None] = []
    for number in range(stream.feeds):
        x = stream.tensor(number, tap.source)
        rows.append(tap.sample(weight, x, count, np.random.default_rng((seed, number))))
        if other is not None:
            y = stream.tensor(number, other)
            added.append(tap.output_rows(weight, x.shape, y, count, np.random.default_rng((seed, number))))
    known = [a for a in added if a is not None]
    beside = np.concatenate(known, axis=1) if known and len(known) == len(added) else None
    known.clear()
    return np.concatenate(rows, axis=1), beside
