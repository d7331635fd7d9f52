"""What a network's own answers say of made-up inputs: how many classes they tell apart, which serve best."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from onnxdp.records import Array

Answers = Callable[[Mapping[str, Array]], Array]
"""Runs the network: a feed in, its class scores out, (samples of the feed, classes)."""


def diversity(scores: Array) -> float:
    """Return how many classes the answers tell apart: exp of the mutual information of picture and class.

    1 where every picture gets the same answer, at most the number of classes.

    Parameters
    ----------
    scores : ndarray of shape (n, classes)
        Logits or probabilities.

    References
    ----------
    T. Salimans et al., "Improved techniques for training GANs", 2016, section 4.
    """
    p = _probabilities(scores)
    information = p * (np.log(p + 1e-12) - np.log(p.mean(0) + 1e-12))
    return float(np.exp(information.sum(1).mean()))


def pick(scores: Array, samples: int) -> Array:
    """Choose samples class-balanced and most confident by the network's own answers.

    Classes take turns in the order of their number, each giving its most confident sample that is left;
    ties go to the smaller index. Of one score there are two classes: above the middle of all, and not.

    Parameters
    ----------
    scores : ndarray of shape (n, classes)
        Logits or probabilities.
    samples : int
        How many; all n where n is not larger.

    Returns
    -------
    ndarray of int64, shape (min(n, samples),)
        In the order picked.
    """
    if scores.shape[1] == 1:
        apart = finite(scores)
        apart -= np.median(apart)
        z = np.concatenate([-apart, apart], axis=1)
    else:
        z = _probabilities(scores)
    label, confidence = z.argmax(1), z.max(1)
    by_class = np.lexsort((np.arange(len(z)), -confidence, label))
    ordered = label[by_class]
    turn = np.arange(len(z)) - np.searchsorted(ordered, ordered)
    return by_class[np.lexsort((ordered, turn))][:samples]


def _probabilities(scores: Array) -> Array:
    """Return rows that add up to 1, float64: a softmax, where the scores are no probabilities already."""
    z = finite(scores)
    if not ((z >= 0).all() and np.allclose(z.sum(1), 1, atol=1e-2)):
        z = np.exp(z - z.max(1, keepdims=True))
        z /= z.sum(1, keepdims=True)
    return z


def finite(scores: Array) -> Array:
    """Return the scores in float64, far off where they are beyond all bounds."""
    whole = np.array(scores, np.float64)
    return whole if np.isfinite(whole).all() else np.nan_to_num(whole, posinf=1e30, neginf=-1e30)
