"""Made-up signals: noise of any colour, loud and soft, for inputs that are neither pictures nor ids.

White noise of one loudness is what no microphone, spectrogram or sensor gives. Half of the samples are just
that, as a network may be fed anything; the others have spectra that fall by a power of the frequency along
every axis, and swell and fade along the longest.
"""

from __future__ import annotations

import math

import numpy as np

from onnxdp.records import Array

WHITE = 0.5
"""Share of the samples that are white noise of deviation 1."""
STEEPEST = 2.0
"""Power of the frequency by which amplitudes fall at most (white 0, pink 1/2, brown 1)."""
LOUDNESS = (0.1, 1.0)
"""Deviation of a coloured sample, uniform in logarithm; louder ones would be all that weights fit."""
SWELLS = 8
"""Most swells along the longest axis."""


def draw(shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Draw one sample.

    Parameters
    ----------
    shape : tuple of int
        Axes of one place only have no colour.
    rng : numpy.random.Generator

    Returns
    -------
    ndarray of float64
    """
    made = np.asarray(rng.standard_normal(shape))
    if made.size < 2 or rng.random() < WHITE:
        return made
    for axis, length in enumerate(shape):
        if length > 1:
            made = _coloured(made, axis, rng.uniform(0, STEEPEST))
    longest = int(np.argmax(shape))
    made *= _swelling(shape[longest], rng).reshape(_along(longest, made.ndim))
    deviation = float(made.std()) or 1.0
    return made * (math.exp(rng.uniform(*np.log(LOUDNESS))) / deviation)


def _coloured(noise: Array, axis: int, power: float) -> Array:
    """Let amplitudes fall by a power of the frequency along one axis."""
    spectrum = np.fft.rfft(noise, axis=axis)
    count = spectrum.shape[axis]
    gains = np.maximum(np.arange(count), 1.0) ** -power
    found: Array = np.fft.irfft(spectrum * gains.reshape(_along(axis, noise.ndim)), noise.shape[axis], axis)
    return found


def _swelling(length: int, rng: np.random.Generator) -> Array:
    """Return an envelope between 0 and 1 that rises and falls some times."""
    knots = rng.random(int(rng.integers(2, SWELLS + 2)))
    found: Array = np.interp(np.linspace(0, 1, length), np.linspace(0, 1, len(knots)), knots)
    return found


def _along(axis: int, axes: int) -> tuple[int, ...]:
    """Return the shape of a vector that lies along one of some axes."""
    return tuple(-1 if a == axis else 1 for a in range(axes))
