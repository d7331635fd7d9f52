"""Accuracy of digits classifiers on the 540 held-out pictures, and how it differs from the first model's.

Needs numpy and onnxruntime only. The standard error is that of the paired difference: both models see
the same pictures, so only those on which they disagree count.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnxruntime as ort

PICTURES = Path(__file__).parent / "digits_test.npz"


def correct(model: Path, pictures: Path = PICTURES) -> np.ndarray:
    """Return, for each held-out picture, whether the model names the right digit: bool [540]."""
    with np.load(pictures, allow_pickle=False) as data:
        images = ((data["pictures"].astype(np.float32) / 16 - data["mean"]) / data["std"]).astype(np.float32)
        labels = data["labels"]
    session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images})
    return np.asarray(logits).argmax(axis=1) == labels


def difference(first: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Return how many points of accuracy `other` has more than `first`, and the paired standard error."""
    change = other.astype(np.float64) - first.astype(np.float64)
    return 100 * float(change.mean()), 100 * float(change.std(ddof=1)) / len(change) ** 0.5


def main() -> None:
    """Print one line for each model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="the model to compare with")
    parser.add_argument("others", type=Path, nargs="*", help="models compared with the first")
    options = parser.parse_args()
    first = correct(options.model)
    for path in (options.model, *options.others):
        right = first if path is options.model else correct(path)
        line = f"{path}  {path.stat().st_size / 1e6:.2f} MB  {100 * right.mean():.2f} %"
        if path is not options.model:
            points, error = difference(first, right)
            line += f"  {points:+.2f} points +- {error:.2f} against {options.model}"
        print(line)


if __name__ == "__main__":
    main()
