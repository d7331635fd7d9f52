"""Eliminate inputs of weights, the ones that the others can best make up for first.

For a weight W that reads x, with H the second moment of x, the least loss of going without the rows B,

    min over W' with W'_B = 0 of tr((W - W')^T (H + delta I) (W - W')) = tr(W_B^T (P_BB)^-1 W_B),

where P = (H + delta I)^-1, is that of W' = W - P_:B P_BB^-1 W_B: the other rows are fitted again. P loses B
by the same step, so that what goes next is weighed with B gone.

References
----------
B. Hassibi, D. Stork, "Second order derivatives for network pruning: optimal brain surgeon", 1993.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from onnxdp.records import Array

STEPS = 64
"""About the steps in which all channels could go; those of one step are checked together."""
TOGETHER = 1.5
"""Most by which channels of one step may lose more together than the sum of what each loses."""


@dataclass(slots=True)
class Patient:
    """A weight whose inputs may go.

    Attributes
    ----------
    w : ndarray of shape (inputs, outputs), float64
        As it is with what went so far gone.
    inverse : ndarray of shape (inputs, inputs), float64
        P; rows and columns of what went are 0.
    energy : float
        tr(W^T H W) at the start.
    rows : ndarray of int, shape (channels, n)
        What each channel feeds; -1 throughout for channels that it does not read.
    """

    w: Array
    inverse: Array
    energy: float
    rows: Array
    coarse: float
    """Relative loss of rounding W so that what is off has the variance of W, errors fed back."""
    lost: float = 0.0
    """Relative loss of what went so far."""

    @classmethod
    def of(cls, w: Array, moment: Array, damping: float, rows: Array) -> Patient:
        """Invert the damped second moment."""
        w = w.astype(np.float64)
        moment = moment.astype(np.float64)
        energy = float(np.einsum("io,io->", w, moment @ w))
        mean = float(np.trace(moment)) / len(moment)
        moment[np.diag_indices(len(moment))] += damping * (mean or 1.0)
        steps = np.square(np.diagonal(np.linalg.cholesky(moment)))  # what feedback leaves of each input
        coarse = float(steps.mean() * np.square(w).sum()) / (energy or 1.0)
        return cls(w, np.linalg.inv(moment), energy, rows, coarse)

    def losses(self) -> Array:
        """Return what each channel loses alone, over the energy, (channels,); 0 where it is not read."""
        read = self.rows[:, 0] >= 0
        rows = self.rows[read]
        own = self.w[rows]
        inner = self.inverse[rows[:, :, None], rows[:, None, :]]
        gone = inner[:, 0, 0] == 0
        inner[gone] = np.eye(rows.shape[1])
        found = np.zeros(len(self.rows))
        found[read] = np.einsum("cio,cio->c", own, np.linalg.solve(inner, own))
        return found / (self.energy or 1.0)

    def loss(self, channels: Array) -> float:
        """Return what some channels lose together."""
        b = self._rows(channels)
        if not len(b):
            return 0.0
        own = self.w[b]
        return float(np.sum(own * np.linalg.solve(self.inverse[np.ix_(b, b)], own))) / (self.energy or 1.0)

    def drop(self, channels: Array) -> None:
        """Let some channels go."""
        b = self._rows(channels)
        if not len(b):
            return
        self.lost += self.loss(channels)
        across = self.inverse[:, b]
        both = np.linalg.solve(self.inverse[np.ix_(b, b)], np.concatenate([self.w[b], across.T], axis=1))
        self.w -= across @ both[:, : self.w.shape[1]]
        self.inverse -= across @ both[:, self.w.shape[1] :]
        self.w[b] = 0
        self.inverse[b] = 0
        self.inverse[:, b] = 0

    def _rows(self, channels: Array) -> Array:
        rows = self.rows[channels].reshape(-1)
        return rows[rows >= 0]


def eliminate(
    patients: Sequence[Patient], prices: Array, owners: Array, limits: Sequence[int], levels: Sequence[float]
) -> Iterator[Array]:
    """Let channels go as long as their loss is worth it; give those gone at each of the rising levels.

    Parameters
    ----------
    patients : sequence of Patient
        All that read any of the channels; changed in place.
    prices : ndarray of shape (channels,)
        What going without a channel saves.
    owners : ndarray of int, shape (channels,)
        Which chain a channel belongs to ...
    limits : sequence of int
        ... and how many of each chain may go.
    levels : sequence of float
        Relative loss, of all patients together, that is given for each unit of the prices.

    Yields
    ------
    ndarray of bool, shape (channels,)
    """
    gone = np.zeros(len(prices), bool)
    left = np.asarray(limits).copy()
    most = max(1, len(prices) // STEPS)
    losses = np.sum([p.losses() for p in patients], axis=0)
    for level in levels:
        while True:
            worth = np.where(gone | (left[owners] <= 0), np.inf, losses / prices)
            batch = np.argsort(worth, kind="stable")[:most]
            batch = batch[worth[batch] <= level]
            batch = batch[_earlier(owners[batch]) < left[owners[batch]]]
            if not len(batch):
                break
            while len(batch) > 1 and _together(patients, batch) > TOGETHER * losses[batch].sum() + 1e-12:
                batch = batch[: len(batch) // 2]
            for patient in patients:
                patient.drop(batch)
            gone[batch] = True
            np.subtract.at(left, owners[batch], 1)
            losses = np.sum([p.losses() for p in patients], axis=0)
        yield gone.copy()


def _together(patients: Sequence[Patient], batch: Array) -> float:
    return sum(p.loss(batch) for p in patients)


def _earlier(owners: Array) -> Array:
    """Count, for each entry, the equal ones before it."""
    return np.array([np.sum(owners[:i] == o) for i, o in enumerate(owners)], int)
