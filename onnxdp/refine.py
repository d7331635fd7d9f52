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

from collections.abc import Sequence

import numpy as np

from onnxdp import arrays, stats, weights
from onnxdp.encoding import Workshop
from onnxdp.network import Network
from onnxdp.pieces import Stream
from onnxdp.planner import KEEP
from onnxdp.probes import Probes
from onnxdp.records import Array, Candidate, Encoded, Weight
from onnxdp.settings import Progress

ALPHA = 1.0
"""Share of the way to the refitted weight; made-up probes deserve less than full trust."""
RIDGE = (0.03, 0.3)
"""delta over the mean diagonal of H': a + b * inputs / samples."""


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
        tap = taps[choice.weight]
        assert tap is not None
        original.advance(network.place(tap.output), {})
        compressed.advance(network.place(tap.output), changes)
        with arrays.one_blas_thread():
            new, shift = _refit(workshop, choice, tap, original, compressed, quick=quick)
        encoded[choice.weight] = new
        if weights.can_centre(workshop.found, workshop.weights[choice.weight]):
            shifts[choice.weight] = shift
        changes.update(workshop.fed(network, [new], shifts))
    return [encoded[c.weight] for c in choices if c.weight in encoded], shifts


def _refit(
    workshop: Workshop,
    choice: Candidate,
    tap: stats.Tap,
    original: Stream,
    compressed: Stream,
    *,
    quick: bool,
) -> tuple[Encoded, Array]:
    """Return the weight encoded for what the compressed network feeds it, and what its bias gains."""
    weight = workshop.weights[choice.weight]
    x, seen, beside = _rows(original, compressed, weight, tap, workshop.seed)
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
    lack = x @ w  # what the compressed inputs no longer give
    del x, rows
    mean_beside = np.zeros((len(w), 1, w.shape[2]), np.float32)
    if beside is not None:  # nor does what is added to the output
        if centre:
            mean_beside = beside.mean(axis=1, keepdims=True)
        lack += (beside - mean_beside) / root
    if workshop.forms[choice.method].sequential:
        new = workshop.encode_one(choice, tensor, seen, lack, quick=quick)
    else:
        moved = w + ALPHA * _ridge_solve(seen, lack)
        new = workshop.encode_one(choice, weights.unblocks(weight, moved), seen)
    decoded = weights.blocks(weight, workshop.decode(new))
    shift = np.einsum("gm,gmn->gn", mean, w.astype(np.float64)) - np.einsum(
        "gm,gmn->gn", mean_seen, decoded.astype(np.float64)
    )
    return new, (shift + mean_beside[:, 0]).reshape(-1).astype(np.float32)


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


def _rows(
    original: Stream, compressed: Stream, weight: Weight, tap: stats.Tap, seed: int
) -> tuple[Array, Array, Array | None]:
    """Return sampled rows of the weight's input in both networks, and what compression took beside them.

    (groups, rows, inputs) twice, and (groups, rows, outputs) of the tensor that is added to the weight's
    output, at the same places; None where nothing that is known by now is added. The last layer before a
    residual join so repairs the other branch's error as well (method.md 1.3).
    """
    count = -(-stats.rows_wanted(weight) // original.feeds)
    other = tap.added if tap.added is not None and original.has(tap.added) else None
    streams = original, compressed
    rows: tuple[list[Array], list[Array]] = ([], [])
    lost: list[Array | None] = []
    for number in range(original.feeds):
        for stream, into in zip(streams, rows, strict=True):
            x = stream.tensor(number, tap.source)
            into.append(tap.sample(weight, x, count, np.random.default_rng((seed, number))))
        if other is not None:
            a, b = (stream.tensor(number, other) for stream in streams)
            lost.append(tap.output_rows(weight, x.shape, a - b, count, np.random.default_rng((seed, number))))
    known = [part for part in lost if part is not None]
    beside = np.concatenate(known, axis=1) if known and len(known) == len(lost) else None
    return _joined(rows[0]), _joined(rows[1]), beside


def _joined(pieces: list[Array]) -> Array:
    """Return (groups, rows, inputs) of all feeds; the pieces are used up."""
    joined = np.concatenate(pieces, axis=1)
    pieces.clear()
    return joined
