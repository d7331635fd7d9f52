"""Print the frontier of accuracy against bytes: onnxdp, other tools, plain baselines, the published recipe.

Every cell makes one file of a classifier in ../shared/data/models, in a fresh process whose time and peak
memory are taken, judges it on the pictures of ../shared/tools/evaluate.py (judge.py) and times it against the
original in turns (onnxdp bench). Rivals run in environments of their own (rivals.py). A cell is kept in the
cache under what decides it: model, method, program, options and pins, and for ours the package's sources.

    python tools/frontier.py --cache /tmp/frontier --plot frontier.png > frontier.md
    python tools/frontier.py --models resnet20 --only shrink-ray nearest --limit 200
    python tools/frontier.py --models resnet20 --only onnxdp --variant 'rounded=--method quant'
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import judge
from common import (
    arguments,
    choosing,
    classifiers,
    commit,
    json_of,
    megabytes,
    onnxdp,
    run,
    say,
    sha256,
    tell,
)
from contenders import RATIOS, Job, digest, jobs, short
from rivals import ENVIRONMENTS
from standings import Cell, draw, equal, every, pictures_of, verdicts

BOTH = ("cifar10_test1017", "cifar10_jpeg5000")
SETS = {"cifar10_resnet20": BOTH, "cifar10_resnet56": BOTH}
"""Pictures of the models that are judged on more than the set models.json names."""
NOTHING = 1.05
"""A file that is not this many times smaller is called unchanged and judged no further."""


def fill(job: Job, model: Path, asked: argparse.Namespace) -> Cell:
    """Return a cell, of which only what is not in the cache is made, judged and timed.

    What was made is kept under what decided it, what a file was found to do under the file's own sum: one
    that other sources made just so is not judged again.
    """
    name = re.sub(r"\W+", "-", f"{model.stem}-{job.label}")
    path = asked.cache / "cells" / f"{name}-{digest(sha256(model), job.method, job.key)[:16]}.json"
    cell: Cell = stored(path)
    if "failed" in cell and "failed" in asked.again:
        cell = {}
    found = {} if "sum" not in cell else results(cell["sum"], asked)
    if cell and ("failed" in cell or not missing(cell, found, model, asked)):
        return shown(cell, found, job, model, asked)
    say(f"{time.strftime('%H:%M:%S')} {model.stem}: {job.label}")
    with tempfile.TemporaryDirectory(prefix="frontier-") as room:
        out = asked.cache / "files" / f"{cell.get('sum')}.onnx"
        if not out.exists():
            out = Path(room) / "out.onnx"
            cell = made(job, model, out)
            if not cell.pop("forget", False):
                store(path, cell)
        if "failed" not in cell:
            found = results(cell["sum"], asked)
            measure(cell, found, model, out, asked)
            store(asked.cache / "results" / f"{cell['sum']}.json", found)
            kept = asked.cache / "files" / f"{cell['sum']}.onnx"
            if not cell.get("counted") and not kept.exists():
                kept.parent.mkdir(exist_ok=True)
                kept.write_bytes(out.read_bytes())
    return shown(cell, found, job, model, asked)


def stored(path: Path) -> dict[str, Any]:
    """Return what store wrote, or nothing."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def store(path: Path, value: dict[str, Any]) -> None:
    """Write a file of the cache, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(value, indent=1))
    draft.replace(path)


def results(total: str, asked: argparse.Namespace) -> dict[str, Any]:
    """Return what is known of a file with this sum: judged by limit and set, and bench."""
    found = stored(asked.cache / "results" / f"{total}.json")
    if "latency" in asked.again:
        found.pop("bench", None)
    return found


def missing(cell: Cell, found: dict[str, Any], model: Path, asked: argparse.Namespace) -> list[str]:
    """Name the sets that a file has not been judged on, and ``bench`` where it has not been timed."""
    judged = found.get("judged", {}).get(str(asked.limit), {})
    timed = asked.repeat and not cell.get("counted") and "bench" not in found
    silent = "silent" in found  # it does not run at all
    return (
        [] if silent else [*(s for s in sets_of(model, asked) if s not in judged), *["bench"] * bool(timed)]
    )


def made(job: Job, model: Path, out: Path) -> Cell:
    """Make the file of a cell."""
    told = job.make(model, out)
    if "failed" in told:
        return told
    if not out.exists():
        return {"failed": "exit 0, but no file was written"}
    told.setdefault("bytes", out.stat().st_size)
    ratio = model.stat().st_size / told["bytes"]
    return {"failed": f"nothing done: {ratio:.2f}x"} if ratio < NOTHING else {**told, "sum": sha256(out)}


def measure(cell: Cell, found: dict[str, Any], model: Path, out: Path, asked: argparse.Namespace) -> None:
    """Judge the file on what sets are missing, and time it unless only its bytes stand for a packed one."""
    threads = str(asked.threads)
    wanted = missing(cell, found, model, asked)
    sets = [w for w in wanted if w != "bench"]
    if sets:
        limit = ["--limit", str(asked.limit)] if asked.limit else []
        options = ["--against", model, "--keep", asked.cache / "logits", "--threads", threads, *limit]
        ran = run([sys.executable, Path(judge.__file__), out, *options, "--sets", *sets])
        if ran.code:
            found["silent"] = f"written, but does not run: {short(ran.sentence)}"
            return
        found.setdefault("judged", {}).setdefault(str(asked.limit), {}).update(json_of(ran))
    if "bench" in wanted:
        ran = onnxdp("bench", model, out, "--repeat", str(asked.repeat), "--threads", threads, "--json")
        names = ("latency_ratio", "load_ratio", "peak_memory_ratio", "load_seconds")
        found["bench"] = {"failed": short(ran.sentence)}
        if not ran.code:
            before, after = json_of(ran)["rows"]
            found["bench"] = {k: after[k] for k in names} | {"original_load_seconds": before["load_seconds"]}


def shown(cell: Cell, found: dict[str, Any], job: Job, model: Path, asked: argparse.Namespace) -> Cell:
    """Return a cell as standings.py wants it."""
    whole = model.stat().st_size
    names = {
        "model": model.stem,
        "method": job.method,
        "label": job.label,
        "ours": job.ours,
        "original": whole,
    }
    if why := cell.get("failed") or found.get("silent"):
        return {**names, "failed": why}
    judged = {s: found["judged"][str(asked.limit)][s] for s in sets_of(model, asked)}
    return {**cell, **names, "ratio": whole / cell["bytes"], "judged": judged, "bench": found.get("bench")}


def sets_of(model: Path, asked: argparse.Namespace) -> Sequence[str]:
    """Return the pictures that a model is judged on."""
    return asked.sets or SETS.get(model.stem) or (judge.entry(model.stem)["set"],)


def head(asked: argparse.Namespace) -> str:
    """Say on what machine and with which versions this was measured."""
    cpu = platform.processor() or "unknown processor"
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = re.search(r"model name\s*: (.*)", info.read_text()).group(1)  # type: ignore[union-attr]
    packages = [f"{p} {importlib.metadata.version(p)}" for p in ("onnxruntime", "onnx", "numpy")]
    installed = dict.fromkeys(r.replace("==", " ") for pins in ENVIRONMENTS.values() for r in pins)
    lent = [r for r in installed if r not in packages]
    return (
        f"{cpu}, {os.cpu_count()} cores; Python {platform.python_version()}, {', '.join(packages)}; "
        f"rivals with {', '.join(lent)} and the same others; onnxdp at {commit()}. Points of top-1 lost "
        "± one standard error of the paired difference; ratios of whole files; latency and load against the "
        f"original's, in turns, {asked.repeat} runs, {asked.threads} thread{'s' * (asked.threads > 1)}; "
        "seconds and peak resident memory of the process that made the file. † bytes counted, not written: "
        "digits in words, float16 scales, decoding nodes; decoded once, it runs like the original."
    )


def report(cells: Sequence[Cell], asked: argparse.Namespace) -> list[str]:
    """Return the paragraphs: verdicts, then of each model a table at equal bytes and one of everything."""
    parts = [verdicts(cells)] if any(c["ours"] for c in cells) else []
    for model in dict.fromkeys(c["model"] for c in cells):
        mine = [c for c in cells if c["model"] == model]
        parts.append(f"### {model}, {megabytes(mine[0]['original'])} MB")
        parts += [equal(mine, asked.ratios, p) for p in pictures_of(mine)]
        parts.append(every(mine))
    return parts


def options() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = arguments(__doc__)
    add = parser.add_argument
    folder = Path(tempfile.gettempdir())
    choosing(parser)
    add("--ratios", nargs="+", type=float, default=RATIOS, metavar="R", help="of ours; default: 2 to 24")
    add("--only", nargs="+", default=(), metavar="WORD", help="cells whose label contains one of the words")
    add(
        "--skip", nargs="+", default=(), metavar="WORD", help="no cells whose label contains one of the words"
    )
    told = "another method of ours: options of onnxdp compress, such as 'rounded=--method quant'"
    add("--variant", action="append", default=[], metavar="NAME=OPTIONS", help=told)
    add(
        "--sets",
        nargs="+",
        metavar="NAME",
        help="file names in ../shared/data/eval; default: each model's own",
    )
    add("--limit", type=int, metavar="N", help="judge on the first N pictures only")
    add("--repeat", type=int, default=20, metavar="N", help="runs when timing, 0: none; default: %(default)s")
    add("--threads", type=int, default=1, help="of ONNX Runtime; default: %(default)s")
    told = "where cells are kept; default: %(default)s"
    add("--cache", type=Path, default=folder / "onnxdp-frontier", metavar="FOLDER", help=told)
    told = "where rivals are installed; default: %(default)s"
    add("--venvs", type=Path, default=folder / "onnxdp-rivals", metavar="FOLDER", help=told)
    again = ("failed", "latency")
    add("--again", nargs="+", choices=again, default=(), help="make failures, or latencies, once more")
    add("--plot", type=Path, metavar="FILE", help="also draw the picture (extra `plots`)")
    return parser


def main() -> int:
    """Fill the cells that were asked for."""
    asked = options().parse_args()
    cells = [fill(job, model, asked) for model in classifiers(asked.models) for job in jobs(model, asked)]
    if not cells:
        sys.exit("No cell has such a label; see --only and --skip.")
    if asked.plot:
        draw(cells, asked.plot)
    tell(asked, "frontier", cells, "\n\n".join([head(asked), *report(cells, asked)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
