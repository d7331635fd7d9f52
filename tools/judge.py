"""Print what evaluate.py says of a classifier on several sets, and which pictures it got right, as JSON.

The functions and figures are ../shared/tools/evaluate.py's own. The original's logits are kept in a folder:
thirty files are compared with it for the price of thirty-one. Which pictures were right goes along (one bit
each, in hexadecimal), so that any two files can be compared picture by picture afterwards.

    python tools/judge.py small.onnx --against original.onnx --sets cifar10_test1017 --keep /tmp/logits
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from common import sha256, shared
from numpy.typing import NDArray


def evaluator() -> ModuleType:
    """Import evaluate.py, which ends by calling main(), without that call."""
    path = shared() / "tools" / "evaluate.py"
    tree = ast.parse(path.read_text())
    tree.body = [n for n in tree.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Call))]
    module = ModuleType("evaluate")
    module.__file__ = str(path)
    exec(compile(tree, str(path), "exec"), module.__dict__)
    return module


def entry(stem: str) -> dict[str, Any]:
    """Return how models.json wants a model's pictures."""
    found: dict[str, Any] = json.loads((shared() / "data" / "models" / "models.json").read_text())[stem]
    return found


def calibration(stem: str, number: int) -> NDArray[np.float32]:
    """Return the first unlabelled pictures, prepared as the model wants them."""
    family = "imagenet_calibration64" if stem.startswith("imagenet") else "cifar10_calibration1024"
    evaluate = evaluator()
    pictures, _ = evaluate.pictures(shared() / "data" / "eval" / f"{family}.npz", number)
    prepared: NDArray[np.float32] = evaluate.prepare(pictures, entry(stem))
    return prepared


def pack(right: NDArray[np.bool_]) -> str:
    """Write booleans as hexadecimal digits."""
    return np.packbits(right).tobytes().hex()


def unpack(digits: str, number: int) -> NDArray[np.bool_]:
    """Read what pack wrote."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8), count=number).astype(bool)


def judge(
    model: Path, original: Path, name: str, limit: int | None, keep: Path, threads: int
) -> dict[str, Any]:
    """Compare a model with the original on one set."""
    evaluate = evaluator()
    how = entry(original.stem)
    pictures, labels = evaluate.pictures(shared() / "data" / "eval" / f"{name}.npz", limit)
    x, y = evaluate.prepare(pictures, how), labels + how.get("label_offset", 0)
    kept = keep / f"{original.stem}-{sha256(original)[:12]}-{name}-{limit}.npy"
    if not kept.exists():
        keep.mkdir(parents=True, exist_ok=True)
        np.save(kept, evaluate.outputs(original, x, how, threads))
    wanted, got = np.load(kept), evaluate.outputs(model, x, how, threads)
    before, after = wanted.argmax(1) == y[: len(wanted)], got.argmax(1) == y[: len(got)]
    apart = before.astype(float) - after
    return {
        "n": len(got),
        "top1": 100 * after.mean(),
        "top1_original": 100 * before.mean(),
        "lost": 100 * apart.mean(),
        "lost_se": 100 * apart.std() / len(apart) ** 0.5,
        "agreement": 100 * (wanted.argmax(1) == got.argmax(1)).mean(),
        "logit_error": float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted)),
        "right": pack(after),
    }


def main() -> int:
    """Judge one file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", type=Path)
    add("--against", type=Path, required=True, metavar="ORIGINAL")
    add("--sets", nargs="+", required=True, metavar="NAME", help="file names in ../shared/data/eval")
    add("--keep", type=Path, required=True, metavar="FOLDER", help="where the original's logits lie")
    add("--limit", type=int, metavar="N", help="the first N pictures only")
    add("--threads", type=int, default=1, help="of ONNX Runtime; default: %(default)s")
    asked = parser.parse_args()
    rows = {
        name: judge(asked.model, asked.against, name, asked.limit, asked.keep, asked.threads)
        for name in asked.sets
    }
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
