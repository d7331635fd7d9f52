"""Print what classifiers lose: float16 alone, plain SVD, the published recipe and onnxdp's default.

Every cell compresses ../shared/data/models/NAME.onnx with this checkout's command line and asks
../shared/tools/evaluate.py what was lost. Columns of one row have at most the same bytes; float16 has a size
of its own. The recipe's atoms are the most that fit: chosen by bytes, never by the pictures.

    python tools/accuracy.py --models resnet20 --targets 3 --cache /tmp/cells
    python tools/accuracy.py --variant 'blocks=--partition 288'
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import (
    arguments,
    cached,
    choosing,
    classifiers,
    commit,
    evaluate,
    json_of,
    machine,
    markdown,
    megabytes,
    onnxdp,
    say,
    sha256,
    tell,
)

from onnxdp import weights
from onnxdp.model import read
from onnxdp.records import Weight

TARGETS = {
    "cifar10_resnet20": ("44.28%", "2", "3", "4"),
    "cifar10_resnet56": ("44.60%", "2", "3"),
    "cifar10_vgg16_half": ("4", "6", "8"),
    "cifar10_googlenet_narrow": ("2", "3"),
    "imagenet_resnet18_large_ktb": ("2", "14.9MB", "11.7MB"),
    "imagenet_efficientnet_lite0": ("2", "3"),
    "imagenet_mobilenet_v1_025": ("2", "3"),
    "imagenet_squeezenet11": ("2", "3"),
}
"""Whole-file targets of each classifier: a ratio, a size, or (with %) how many per cent fewer bytes."""

METHODS = {
    "float16": "--method float16 --max-error 0.9",
    "svd": "--method dp --unweighted --partition none --no-shared --solver exact",
    "recipe": "--method dp --unweighted --partition 288 --no-shared --solver dpl --factor-dtype float16",
    "ours": "--method dp",
}
TITLES = {"float16": "float16 alone", "svd": "plain SVD", "recipe": "published recipe", "ours": "**onnxdp**"}
BYTES_ALONE = ("--dry-run", "--samples", "16")
"""Options under which the bytes of fixed atoms are counted quickly."""


def bytes_of(target: str, nbytes: int) -> int:
    """Return the bytes that a target allows a file of ``nbytes``."""
    if target.endswith("%"):
        return int(nbytes * (1 - float(target[:-1]) / 100))
    if target.endswith("MB"):
        return int(float(target[:-2]) * 1e6)
    return int(nbytes / float(target))


def compress(model: Path, out: Path, options: Sequence[str]) -> dict[str, Any] | None:
    """Compress and measure one file; None where the target is out of reach."""
    ran = onnxdp("compress", model, out, "--overwrite", "--json", *options)
    if ran.code == 1:
        return None
    if ran.code:
        raise RuntimeError(f"onnxdp compress {model.name} {shlex.join(options)}: {ran.sentence}")
    return {"seconds": round(ran.seconds, 2), "report": json_of(ran)}


def most_atoms(model: Path, budget: int, options: Sequence[str]) -> int | None:
    """Search the largest number of atoms, one for all layers, whose file is within the budget.

    Bytes follow from shapes and not from the probes, so that few of them do; from one dry run those of any
    other number of atoms are foreseen, and those that matter are then counted.
    """
    shapes = {w.name: w for w in weights.find(read(model).ir).weights}
    parts: dict[str, int] = {}
    least, beyond, trial = 0, 2, 1
    while beyond - least > 1:
        made = compress(model, Path("unused.onnx"), [*options, "--atoms", str(trial), *BYTES_ALONE])
        nbytes = made["report"]["target"]["nbytes"] if made else 0
        say(f"  {model.stem}: {trial} atoms, {nbytes:,} of {budget:,} bytes")
        if made is None or (nbytes > budget and trial == 1):
            return None
        if trial == 1:
            parts = {c["weight"]: c["params"]["parts"] for c in pairs(made["report"])}
            beyond = 1 + max(min(shapes[n].inputs // p, shapes[n].outputs) for n, p in parts.items())
        least, beyond = (trial, beyond) if nbytes <= budget else (least, trial)
        rest = nbytes - sum(stored(shapes[n], p, trial) for n, p in parts.items())
        fitting = [
            n
            for n in range(least + 1, beyond)
            if rest + sum(stored(shapes[w], p, n) for w, p in parts.items()) <= budget
        ]
        trial = max(fitting, default=least + 1)
    return least


def pairs(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the choices of a report that are dictionary pairs."""
    return [c for c in report["plan"]["choices"] if c["method"] == "dp"]


def stored(weight: Weight, parts: int, atoms: int) -> int:
    """Return the bytes of a weight with so many float16 atoms a block, or of float16 where that is less."""
    rows = weight.inputs // parts
    pair = 2 * weight.groups * parts * min(atoms, rows, weight.outputs) * (rows + weight.outputs)
    return pair if pair < weight.nbytes else min(2 * weight.size, weight.nbytes)


def cell(model: Path, target: str, method: str, options: str, limit: int | None) -> dict[str, Any]:
    """Fill one cell."""
    budget = bytes_of(target, model.stat().st_size)
    words = shlex.split(options)
    fixed = method.startswith("recipe")
    if method != "float16" and not fixed:  # the one has one size, the other a number of atoms
        words += ["--size", str(budget)]
    row: dict[str, Any] = {"model": model.stem, "target": target, "budget": budget, "method": method}
    if fixed:
        atoms = most_atoms(model, budget, words)
        if atoms is None:
            return {**row, "reached": False}
        words += ["--atoms", str(atoms)]
        row["atoms"] = atoms
    with tempfile.TemporaryDirectory(prefix="accuracy-") as folder:
        out = Path(folder) / "out.onnx"
        made = compress(model, out, words)
        if made is None:
            return {**row, "reached": False}
        found = evaluate(out, model, limit)
    verification = made["report"]["verification"] or {"outputs": []}
    return {
        **row,
        "reached": True,
        "options": shlex.join(words),
        "seconds": made["seconds"],
        "output_error": max((o["relative"] for o in verification["outputs"]), default=None),
        "pairs": len(pairs(made["report"])),
        "commit": commit(),
        **{
            k: found[k]
            for k in ("n", "top1", "top1_original", "lost", "lost_se", "logit_error", "bytes", "ratio")
        },
    }


def wide(cells: Sequence[dict[str, Any]], methods: Sequence[str]) -> str:
    """Return the table that compares: points of top-1 lost, by method."""
    rows = []
    for model, target in dict.fromkeys((c["model"], c["target"]) for c in cells):
        mine = {c["method"]: c for c in cells if (c["model"], c["target"]) == (model, target)}
        any_ = next((c for c in mine.values() if c["reached"]), {"top1_original": float("nan")})
        shown = f"{target}x" if target[-1].isdigit() else target.replace("%", " % fewer bytes")
        budget = next(iter(mine.values()))["budget"]
        row = [model, f"{shown} ({megabytes(budget)} MB)", f"{any_['top1_original']:.2f}"]
        rows.append([*row, *(lost(mine.get(m), float16=m == "float16") for m in methods)])
    return markdown(["model", "target", "top-1", *(TITLES.get(m, m) for m in methods)], rows)


def lost(found: dict[str, Any] | None, *, float16: bool) -> str:
    """Format what one cell lost."""
    if found is None:
        return ""
    if not found["reached"]:
        return "out of reach"
    # A column of pairs that holds none has measured float16: say so, it is no reproduction of anything.
    mark = f" ({found['ratio']:.2f}x)" if float16 else "" if found["pairs"] else " †"
    return f"{found['lost']:.2f} ± {found['lost_se']:.2f}{mark}"


def long(cells: Sequence[dict[str, Any]]) -> str:
    """Return the table that has everything."""
    rows = [
        [
            *(c["model"], c["target"], c["method"] + (f" N={c['atoms']}" if "atoms" in c else "")),
            *(
                lost(c, float16=c["method"] == "float16"),
                c["pairs"],
                f"{c['bytes']:,}",
                f"{c['ratio']:.2f}",
                f"{c['logit_error']:.3f}",
            ),
            *(f"{c['output_error']:.3f}", f"{c['seconds']:.1f}"),
        ]
        for c in cells
        if c["reached"]
    ]
    headers = [
        "model",
        "target",
        "method",
        "lost",
        "pairs",
        "bytes",
        "ratio",
        "logit error",
        "probe error",
        "seconds",
    ]
    return markdown(headers, rows)


def main() -> int:
    """Fill the cells that were asked for."""
    parser = arguments(__doc__, kept="cells")
    add = parser.add_argument
    choosing(parser)
    told = "3 (ratio), 14.9MB, or 44.28%% (fewer bytes); default: each model's own"
    add("--targets", "--ratios", nargs="+", metavar="T", help=told)
    add("--methods", nargs="*", choices=list(METHODS), default=list(METHODS), help="default: all")
    told = (
        "another column: options of onnxdp compress, such as 'blocks=--method dp --partition 288'; "
        "one named recipe... gets the most atoms that fit"
    )
    add("--variant", action="append", default=[], metavar="NAME=OPTIONS", help=told)
    add("--limit", type=int, metavar="N", help="evaluate on the first N pictures only")
    asked = parser.parse_args()
    variants = dict(v.split("=", 1) for v in asked.variant)
    methods = {**{m: METHODS[m] for m in asked.methods}, **variants}
    cells = []
    for model in classifiers(asked.models):
        for target in asked.targets or TARGETS.get(model.stem, ("2", "3")):
            for method, options in methods.items():
                # float16 has one size, whatever the target is
                key_target = "" if method == "float16" else target
                say(f"{model.stem} {target} {method}")
                found = cached(
                    asked.cache,
                    [sha256(model), key_target, method, options, asked.limit],
                    lambda m=model, t=target, w=method, o=options: cell(m, t, w, o, asked.limit),
                )
                budget = bytes_of(target, model.stat().st_size)
                cells.append({**found, "target": target, "budget": budget})
    table = wide(cells, list(methods))
    note = f"Points of top-1 lost, ± one standard error of the paired difference; one run each; {machine()}."
    if any(c["reached"] and not c["pairs"] and c["method"] != "float16" for c in cells):
        note += " † holds no dictionary pair: the bytes are reached by float16 alone."
    tell(asked, "accuracy", cells, f"{table}\n\n{note}", long(cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
