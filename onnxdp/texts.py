"""Made-up texts: ids as sequences have them, few of the vocabulary at a time, in words that come again.

Uniform ids are what no text is: a network that reads them gives all of them one answer (magika, which tells
types of files, calls them all unknown), and an error measured on one answer says nothing of the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from onnxdp.records import Array

UNIFORM = 0.25
"""Share of the texts whose ids are uniform in the vocabulary."""
FALLING = 1.5
"""Steepest power by which the frequency of letters and words falls with their rank (Zipf: 1)."""
LETTERS = 8
"""Fewest ids that a text is made of; up to the vocabulary, their number is uniform in logarithm ..."""
LONGEST = 12
"""... and those of the longest word."""
_SHORT = 4
"""Ids for each of those that end a text from which it is one."""
LEXICON = 300
"""Most words of one text; their number is uniform in logarithm, too."""


def draw(shape: tuple[int, ...], vocabulary: int, rng: np.random.Generator) -> Array:
    """Draw one text.

    Parameters
    ----------
    shape : tuple of int
        Words run on along the last axis and over its end.
    vocabulary : int
        Ids are from 0 to this, exclusive.
    rng : numpy.random.Generator

    Returns
    -------
    ndarray of int64
    """
    if vocabulary < 2 or rng.random() < UNIFORM:
        return rng.integers(0, vocabulary, shape)
    length = math.prod(shape)
    letters = _letters(vocabulary, rng)
    sizes = rng.integers(1, LONGEST + 1, int(math.exp(rng.uniform(0, math.log(LEXICON)))))
    spelled = rng.choice(letters, int(sizes.sum()), p=_falling(len(letters), rng))
    words = np.split(spelled, np.cumsum(sizes)[:-1])
    said = rng.choice(len(words), length, p=_falling(len(words), rng))  # a word has a letter at least
    return np.concatenate([spelled[:0], *(words[w] for w in said)])[:length].reshape(shape)


def ended(text: Array, marks: Sequence[int], vocabulary: int) -> Array:
    """Return a text, (..., length), at whose end, and only there, stand the ids that a network looks for."""
    marks = [m for m in marks if m < vocabulary]
    if not marks or text.shape[-1] < _SHORT * len(marks) or len(marks) == vocabulary:
        return text
    other = next(i for i in range(vocabulary) if i not in marks)
    made = np.where(np.isin(text, marks), other, text)
    made[..., -len(marks) :] = marks
    return made


def _letters(vocabulary: int, rng: np.random.Generator) -> Array:
    """Choose the ids that a text uses, in order of rank: neighbours, as scripts are, or any."""
    size = int(math.exp(rng.uniform(math.log(min(LETTERS, vocabulary)), math.log(vocabulary))))
    if rng.random() < 0.5:
        return int(rng.integers(0, vocabulary - size + 1)) + rng.permutation(size)
    return rng.permutation(vocabulary)[:size]


def _falling(count: int, rng: np.random.Generator) -> Array:
    """Return probabilities that fall by a power of the rank."""
    weight = np.arange(1, count + 1, dtype=np.float64) ** -rng.uniform(0, FALLING)
    found: Array = weight / weight.sum()
    return found
