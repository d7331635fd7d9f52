"""Make the tables of short vectors that onnxdp/methods/tables.npz holds, 7 kB, the same for every network.

Vectors are drawn from a normal distribution whose scale varies from vector to vector, as the scales of
trained weights do along a row; k-means with several starts finds the entries, whose largest number becomes
127. Beside each table its relative error on such numbers is stored: how one compares with another.

    python tools/tables.py onnxdp/methods/tables.npz
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from onnxdp.methods.tables import TABLES

SPREAD = 0.3
"""Deviation of the logarithm of the scale: .2 suits ResNet-20, .4 SqueezeNet; 0 loses a tenth more."""
DRAWN, ROUNDS, STARTS = 100_000, 40, 3
PEAK = 127

Floats = Any


def drawn(dim: int, seed: int) -> Floats:
    """Return vectors (DRAWN, dim)."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((DRAWN, dim)) * np.exp(rng.normal(0.0, SPREAD, (DRAWN, 1)))
    return (x / x.std()).astype(np.float32)


def nearest(x: Floats, centres: Floats) -> Floats:
    """Find the nearest of the centres for every vector."""
    return np.concatenate(
        [
            np.argmin(np.square(centres).sum(axis=1) - 2 * (some @ centres.T), axis=1)
            for some in np.array_split(x, 20)
        ]
    )


def error(x: Floats, centres: Floats) -> float:
    """Return the relative squared error of the nearest centres."""
    return float(np.square(x - centres[nearest(x, centres)]).mean() / np.square(x).mean())


def means(x: Floats, centres: Floats) -> Floats:
    """Move centres to the means of what is nearest to them; those of nothing go to the farthest vectors."""
    for _ in range(ROUNDS):
        owner = nearest(x, centres)
        count = np.bincount(owner, minlength=len(centres))
        sums = np.stack([np.bincount(owner, column, len(centres)) for column in x.T], axis=1)
        centres = (sums / np.maximum(count, 1)[:, None]).astype(np.float32)
        idle = np.flatnonzero(count == 0)
        if len(idle):
            far = np.argsort(-np.square(x - centres[owner]).sum(axis=1), kind="stable")
            centres[idle] = x[far[: len(idle)]]
    return centres


def main() -> None:
    """Make all of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="FILE.npz")
    asked = parser.parse_args()
    made = {}
    for levels, dim in TABLES:
        x, unseen = drawn(dim, 1), drawn(dim, 2)
        starts = (np.random.default_rng(s).choice(DRAWN, levels, replace=False) for s in range(STARTS))
        centres = min((means(x, x[s]) for s in starts), key=lambda c: error(unseen, c))
        unit = np.abs(centres).max() / PEAK
        table = np.rint(centres / unit)
        table = table[np.lexsort(table.T)].astype(np.int8)
        lost = error(unseen, (table * unit).astype(np.float32))
        made[f"{levels}x{dim}"] = table
        made[f"{levels}x{dim} error"] = np.float64(lost)
        bits = np.log2(levels) / dim
        print(
            f"{levels:3} x {dim}  {bits:.2f} bits  squared error {lost:.4f}, x 4^bits {lost * 4**bits:.2f}",
            flush=True,
        )
    np.savez_compressed(asked.out, **made)


if __name__ == "__main__":
    main()
