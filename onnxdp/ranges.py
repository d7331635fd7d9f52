"""The range of numbers that a network wants its pictures in: given, remembered by its statistics, or tried.

An ONNX file does not say how its pictures are to be prepared. Three things tell: the mean and variance that
the first BatchNormalization nodes remember of training; the answers to real pictures, which are most varied
and most sure where the preparation is right; and, where neither is there, answers that hardly move.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxdp.answers import diversity
from onnxdp.records import Array

__all__ = ["CENTRED", "RANGES", "STANDARDISED", "TRIED", "Misfit", "Range", "by_answers", "by_statistics"]

Misfit = Callable[[Sequence[Mapping[str, Array]]], float]
"""How far the statistics that a network remembers are from those of some feeds: 0 where they agree."""

TRIED = 32
"""Pictures on which ranges are compared."""
_CLEARLY = 0.5
"""A range is clearly better where its misfit is this share of the standardised pictures' or less."""
_SURER = 1.05
"""Real pictures in another preparation are clearly better where their answers tell this much more apart."""
_BYTES = (118.0, 55.0)
"""Mean and standard deviation of pictures as bytes, about."""


@dataclass(frozen=True, slots=True)
class Range:
    """How pictures of bytes become numbers: ``(x - shift) / scale`` per channel.

    Attributes
    ----------
    name : str
    shift, scale : tuple of float or None
        One number a channel, or one for all; None is the set's own mean, or standard deviation.
    """

    name: str
    shift: tuple[float, ...] | None
    scale: tuple[float, ...] | None

    @classmethod
    def like(cls, mean: Array, deviation: Array) -> Range:
        """Give the range in which ordinary pictures have this mean and deviation, (channels,) each."""
        scale = _BYTES[1] / np.maximum(deviation, 1e-6)
        return cls("of the given", tuple((_BYTES[0] - mean * scale).tolist()), tuple(scale.tolist()))

    def __call__(self, x: Array, mean: Array, deviation: Array) -> Array:
        """Change bytes, (n, channels, height, width), of a set with the given mean and deviation; float64."""
        shift = mean if self.shift is None else np.asarray(self.shift)
        scale = deviation if self.scale is None else np.asarray(self.scale)
        return np.asarray((x - shift.reshape(-1, 1, 1)) / scale.reshape(-1, 1, 1))


STANDARDISED = Range("standardised", None, None)
CENTRED = Range("0..255 about the mean", None, (1.0,))
RANGES = (
    STANDARDISED,
    CENTRED,
    Range("0..1", (0.0,), (255.0,)),
    Range("0..255", (0.0,), (1.0,)),
    Range("-1..1", (127.5,), (127.5,)),
)
"""What is tried. Mean and deviation of ImageNet differ from a set's own by less than could be told."""


def by_statistics(misfit: Callable[[Range], float]) -> Range:
    """Choose the range whose activations agree best with what the network remembers of its training.

    Parameters
    ----------
    misfit : callable
        Gives the misfit of pictures in a range.

    Returns
    -------
    Range
        Standardised, unless another is clearly better.
    """
    found = np.nan_to_num([misfit(r) for r in RANGES], nan=np.inf)  # float16 overflows
    best = int(np.argmin(found))
    return RANGES[best] if found[best] <= _CLEARLY * found[0] else RANGES[0]


def by_answers(
    answers: Callable[[Range, bool], Array],
    ranges: tuple[Range, ...] = RANGES,
    orders: tuple[bool, ...] = (False, True),
) -> tuple[Range, bool]:
    """Choose the preparation of real pictures in which the network's answers tell most apart.

    Parameters
    ----------
    answers : callable
        Gives the scores, (samples, classes), of pictures in a range, their channels reversed or not.
    ranges : tuple of Range
        The first is kept unless another is clearly better.
    orders : tuple of bool
        Whether channels are reversed; tried in the range that was found.

    Returns
    -------
    tuple of (Range, bool)
    """

    def told(r: Range, reverse: bool) -> float:
        scores = answers(r, reverse)
        # One score a class: many positions of each (boxes, pixels) are surer wherever numbers are larger.
        classes = max(scores.shape[1:], default=1) == scores[:1].size > 1
        return diversity(scores.reshape(len(scores), -1)) if classes else 1.0

    first = [told(r, orders[0]) for r in ranges]
    best = int(np.argmax(first))
    best = best if first[best] > _SURER * first[0] else 0
    other = [o for o in orders[1:] if told(ranges[best], o) > _SURER * first[best]]
    return ranges[best], (other or [orders[0]])[0]
