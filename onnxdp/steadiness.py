"""How steadily a network answers: made-up signals that it is erratic about are not what it was made for.

Training leaves a network steady on what it saw; a recurrent one fed noise may be chaotic, and there every
rounding is a catastrophe that no real input would show. Where all such signals get the same answer, little is
learnt, either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from onnxdp.records import Array

Run = Callable[[Mapping[str, Array]], Sequence[Array]]
"""Runs the network: a feed in, its floating-point outputs out."""

DISTURBANCE = 1e-3
"""Deviation of the noise that is added to an input, over the input's own size: about what float16 does."""
STEADY = 10 * DISTURBANCE
"""Share of an output, or of what tells it from others, up to which it may move: float16 is no loss then."""
_LOOKED_AT = 4096
"""Numbers of an output that are looked at."""
_FLOOR = 1e-3
"""Share of the usual deviation of an output below which changes, and deviations, are nothing."""


def erratic(run: Run, feeds: Iterable[Mapping[str, Array]], seed: int) -> Array:
    """Return how far a slight disturbance of each feed moves an output, over what tells it from others.

    Nothing is erratic where most feeds move no output by more than :data:`STEADY` of its size.

    Parameters
    ----------
    run : callable
    feeds : iterable of mapping of str to ndarray
        Of equal shapes.
    seed : int
        Of the disturbance.

    Returns
    -------
    ndarray of float64, shape (feeds,)
        Of the output where that is largest; large, too, where an output is the usual one. 0 up to ``STEADY``.
    """
    rng = np.random.Generator(np.random.PCG64([seed, 77]))
    before: list[list[Array]] = []
    moved: list[list[float]] = []
    for feed in feeds:
        pairs = list(zip(run(feed), run(_disturbed(feed, rng)), strict=True))
        before.append([_some(a) for a, _ in pairs])
        moved.append([_apart(_some(a), _some(b)) for a, b in pairs])
    worst = np.zeros(len(moved))
    shares = np.zeros(len(moved))
    for k, changes in enumerate(zip(*moved, strict=True)):
        answers = [some[k] for some in before]
        if len({a.shape for a in answers}) > 1 or not answers[0].size:
            continue
        usual = np.median(np.stack(answers), axis=0)
        own = np.array([_apart(a, usual) for a in answers])
        floor = _FLOOR * float(np.sqrt(np.mean(np.square(own)))) or 1.0
        worst = np.maximum(worst, (np.array(changes) + floor) / (own + floor))
        sizes = np.array([float(np.linalg.norm(a)) for a in answers])
        shares = np.maximum(shares, np.array(changes) / np.maximum(sizes, floor))
    return np.where((worst > STEADY) & (np.median(shares) > STEADY), worst, 0.0)


def _disturbed(feed: Mapping[str, Array], rng: np.random.Generator) -> dict[str, Array]:
    return {name: _noisy(x, rng) if x.dtype.kind == "f" else x for name, x in feed.items()}


def _noisy(x: Array, rng: np.random.Generator) -> Array:
    size = float(np.sqrt(np.mean(np.square(x, dtype=np.float64)))) if x.size else 0.0
    return (x + DISTURBANCE * size * rng.standard_normal(x.shape)).astype(x.dtype)


def _some(output: Array) -> Array:
    """Return some of an output's numbers, always the same places."""
    flat = np.nan_to_num(output.reshape(-1)[:: -(-output.size // _LOOKED_AT) or 1].astype(np.float64))
    return np.clip(flat, -1e30, 1e30)


def _apart(a: Array, b: Array) -> float:
    return float(np.linalg.norm(a - b)) if a.shape == b.shape else float("inf")
