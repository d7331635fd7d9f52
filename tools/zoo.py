"""Compress every file of ../shared/data/zoo and of ../shared/data/models, and say what came of each.

Exit codes, bytes, the output error on the probes, the one on plausible inputs (zoo_feeds.py; pictures for the
classifiers are accuracy.py's business), latency, and the sentence that the command ended with. Exit 1 where a
command ended with anything but 0 (done) or 1 (the answer is no).

    python tools/zoo.py --files magika mnist
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime as ort
from common import arguments, cached, machine, markdown, megabytes, onnxdp, say, sha256, shared, tell

SAMPLES = 3


def zoo_feeds() -> ModuleType:
    """Import ../shared/tools/zoo_feeds.py by its path."""
    spec = importlib.util.spec_from_file_location("zoo_feeds", shared() / "tools" / "zoo_feeds.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def session(path: Path) -> ort.InferenceSession:
    """Open a model quietly."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def feed_error(original: Path, small: Path) -> float | None:
    """Return the largest relative L2 error of an output over plausible inputs; None where there are none."""
    feeds = zoo_feeds()
    try:
        samples = [feeds.feed(original.name, k) for k in range(SAMPLES)]
    except KeyError:
        return None
    a, b = session(original), session(small)
    difference, norm = np.zeros(len(a.get_outputs())), np.zeros(len(a.get_outputs()))
    for sample in samples:
        for i, (x, y) in enumerate(zip(a.run(None, sample), b.run(None, sample), strict=True)):
            if x.dtype.kind == "f":
                difference[i] += np.square(x.astype(np.float64) - y).sum()
                norm[i] += np.square(x.astype(np.float64)).sum()
    return float(np.sqrt(difference / np.maximum(norm, 1e-30)).max())


def interface(path: Path) -> list[tuple[str, str, list[Any]]]:
    """Return names, types and shapes of inputs and outputs."""
    made = session(path)
    return [(v.name, v.type, list(v.shape)) for v in [*made.get_inputs(), *made.get_outputs()]]


def outcome(path: Path, options: Sequence[str]) -> dict[str, Any]:
    """Compress one file and look at the result."""
    with tempfile.TemporaryDirectory(prefix="zoo-") as folder:
        out = Path(folder) / "out.onnx"
        report = Path(folder) / "report.json"
        ran = onnxdp("compress", path, out, "--report", report, *options)
        row = {
            "file": path.name,
            "code": ran.code,
            "seconds": round(ran.seconds, 1),
            "sentence": ran.sentence,
        }
        if ran.code == 0:
            row["sentence"] = ran.out.strip().splitlines()[-1].replace(str(out), "OUT")
        if not out.exists():
            return {**row, "left": [p.name for p in Path(folder).iterdir()]}
        told = json.loads(report.read_text())
        verification = told["verification"] or {"outputs": []}
        return {
            **row,
            "before": told["source"]["nbytes"],
            "bytes": told["target"]["nbytes"],
            "ratio": told["ratio"],
            "probe_error": max((o["relative"] for o in verification["outputs"]), default=None),
            "feed_error": feed_error(path, out),
            "latency": told["latency_ratio"],
            "same_interface": interface(path) == interface(out),
        }


def shown(value: float | None, digits: int) -> str:
    """Format a number that may be missing."""
    return "" if value is None else f"{value:.{digits}f}"


def line(row: dict[str, Any]) -> list[str]:
    """Format one row."""
    if "bytes" not in row:
        return [row["file"], str(row["code"]), "", "", "", "", "", f"{row['seconds']:.0f}", row["sentence"]]
    sizes = f"{megabytes(row['before'])} → {megabytes(row['bytes'])}"
    return [
        *(row["file"], str(row["code"]), sizes, f"{row['ratio']:.2f}", shown(row["probe_error"], 4)),
        *(shown(row["feed_error"], 4), shown(row["latency"], 2), f"{row['seconds']:.0f}"),
        "" if row["same_interface"] else "THE INTERFACE DIFFERS",
    ]


def main() -> int:
    """Go through the files."""
    parser = arguments(__doc__, kept="rows")
    add = parser.add_argument
    add("--files", nargs="+", default=(), metavar="NAME", help="parts of file names; default: all")
    add("--options", default="", help="of onnxdp compress; default: none, so an output error of at most 0.03")
    asked = parser.parse_args()
    data = shared() / "data"
    rows = []
    for path in [*sorted((data / "models").glob("*.onnx")), *sorted((data / "zoo").glob("*.onnx"))]:
        if asked.files and not any(n in path.stem for n in asked.files):
            continue
        say(path.name)
        options = shlex.split(asked.options)
        rows.append(
            cached(asked.cache, ["zoo", sha256(path), options], lambda p=path, o=options: outcome(p, o))
        )
    headers = ["file", "exit", "MB", "ratio", "error, probes", "error, feeds", "latency ×", "s", "said"]
    note = f"`{f'onnxdp compress IN OUT {asked.options}'.strip()}`; {machine()}."
    tell(asked, "zoo", rows, f"{markdown(headers, [line(r) for r in rows])}\n\n{note}")
    return 0 if all(r["code"] in (0, 1) and not r.get("left") for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
