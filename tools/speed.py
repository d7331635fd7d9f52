"""Measure wall time and peak memory of onnxdp, onnx-shrink-ray and onnxruntime's quantize_dynamic.

One run, the same files, every measurement in a fresh process, the tools taking turns. What they make differs:
onnxdp makes dictionary pairs of a size that is asked for, the others 8-bit integers; compare what it takes,
not what comes out. The peak is VmHWM of the process. Works on classifiers in ../shared/data/models and on
what models/builders.py makes.

    python tools/speed.py --models resnet18 --repeat 3
    python tools/speed.py --models resnet18_large resnet50 vgg16 --readme README.md
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
from common import Ran, arguments, files, machine, markdown, megabytes, run, say, spread, tell

SHRINK_RAY = "onnx-shrink-ray==0.0.11"
DYNAMIC = """
import sys
from onnxruntime.quantization import quantize_dynamic
quantize_dynamic(sys.argv[1], sys.argv[2], use_external_data_format=sys.argv[3] == "external")
"""
BIG = 1_800_000_000
"""Bytes beyond which quantize_dynamic is told to write external data."""
TOOLS = ("onnxdp", "onnx-shrink-ray", "quantize_dynamic")


def python_with(package: str, folder: Path) -> Path:
    """Return the interpreter of a virtual environment that holds one package; made once."""
    python = folder / "bin" / "python"
    if not (folder / "made").exists():
        say(f"installing {package} into {folder}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-qq", package], check=True, stdin=subprocess.DEVNULL)
        (folder / "made").touch()
    return python


def compress(tool: str, source: Path, room: Path, asked: argparse.Namespace) -> tuple[Ran, Path]:
    """Run one tool on one file, in a folder of its own."""
    out = room / "out.onnx"
    if tool == "onnxdp":
        options = ["--ratio", str(asked.ratio), "--report", room / "report.json", *asked.options.split()]
        return run([sys.executable, "-m", "onnxdp", "compress", source, out, *options]), out
    if tool == "quantize_dynamic":
        how = "external" if source.stat().st_size > BIG else "inside"
        return run([sys.executable, "-c", DYNAMIC, source, out, how]), out
    # shrink-ray takes a folder and a suffix, and names the output itself.
    python = python_with(SHRINK_RAY, asked.venv)
    link = room / "in.onnx"
    shutil.copy(source, link)
    command = [
        python,
        "-m",
        "onnx_shrink_ray.shrink",
        "--output_dir",
        room,
        "--output_suffix",
        "_small.onnx",
        link,
    ]
    return run(command), room / "in_small.onnx"


def size(path: Path) -> int:
    """Return the bytes of a model and of the data files it names."""
    tensors = onnx.load(str(path), load_external_data=False).graph.initializer
    names = {e.value for t in tensors for e in t.external_data if e.key == "location"}
    return path.stat().st_size + sum((path.parent / n).stat().st_size for n in names)


def measure(source: Path, tool: str, asked: argparse.Namespace) -> dict[str, Any]:
    """Take one measurement."""
    with tempfile.TemporaryDirectory(prefix="speed-", dir=asked.room) as folder:
        ran, out = compress(tool, source, Path(folder), asked)
        row: dict[str, Any] = {"model": source.stem, "tool": tool, "code": ran.code, "before": size(source)}
        if ran.code or not out.exists():
            return {**row, "sentence": ran.sentence or f"exit {ran.code}"}
        report = Path(folder) / "report.json"
        stages = json.loads(report.read_text())["seconds"] if report.exists() else {}
        return {
            **row,
            "seconds": ran.seconds,
            "cpu": ran.cpu,
            "peak": ran.peak,
            "bytes": size(out),
            "stages": stages,
        }


def line(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Summarise the measurements of one tool on one file."""
    first, good = rows[0], [r for r in rows if "seconds" in r]
    name = f"{first['model']} ({megabytes(first['before'])} MB)"
    if not good:
        return [name, first["tool"], f"failed: {first['sentence']}", *[""] * 5]
    peak = max(r["peak"] for r in good)
    nbytes = good[0]["bytes"]
    return [
        *(name, first["tool"], spread([r["seconds"] for r in good])),
        *(f"{statistics.median(r['cpu'] for r in good):.1f}", f"{peak / 1e6:.0f}"),
        *(f"{peak / first['before']:.1f}", megabytes(nbytes), f"{first['before'] / nbytes:.2f}"),
    ]


def stages(rows: Sequence[dict[str, Any]]) -> str:
    """Return the seconds of onnxdp's stages, medians; what is left of the wall time is starting Python."""
    ours = [r for r in rows if r.get("stages")]
    names = list(dict.fromkeys(n for r in ours for n in r["stages"]))
    lines = []
    for model in dict.fromkeys(r["model"] for r in ours):
        mine = [r for r in ours if r["model"] == model]
        medians = [statistics.median(r["stages"].get(n, 0.0) for r in mine) for n in names]
        lines.append([model, *(f"{m:.2f}" for m in medians)])
    return markdown(["model", *(f"{n}, s" for n in names)], lines)


def main() -> int:
    """Measure in turns."""
    parser = arguments(__doc__)
    add = parser.add_argument
    default = ["imagenet_resnet18_large_ktb", "resnet50", "vgg16"]
    told = "files, parts of classifiers' names, or builders"
    add("--models", nargs="+", default=default, metavar="NAME", help=told)
    add("--tools", nargs="+", choices=TOOLS, default=list(TOOLS), help="default: all")
    add("--ratio", type=float, default=3.0, help="asked of onnxdp; default: %(default)s")
    add("--options", default="", help="more options of onnxdp compress")
    add("--repeat", type=int, default=3, metavar="N", help="measurements of each; default: %(default)s")
    venv = Path(tempfile.gettempdir()) / "onnxdp-shrink-ray"
    told = "where onnx-shrink-ray is installed; default: %(default)s"
    add("--venv", type=Path, default=venv, metavar="FOLDER", help=told)
    add("--room", type=Path, metavar="FOLDER", help="for files in between; default: the system's")
    asked = parser.parse_args()
    if "onnx-shrink-ray" in asked.tools:
        python_with(SHRINK_RAY, asked.venv)
    rows = []
    with tempfile.TemporaryDirectory(prefix="built-", dir=asked.room) as folder:
        for source in files(asked.models, Path(folder)):
            for turn in range(asked.repeat):
                for tool in asked.tools if turn % 2 == 0 else asked.tools[::-1]:
                    say(f"{source.stem} {tool} {turn + 1}/{asked.repeat}")
                    rows.append(measure(source, tool, asked))
    cells = dict.fromkeys((r["model"], r["tool"]) for r in rows)
    lines = [line([r for r in rows if (r["model"], r["tool"]) == cell]) for cell in cells]
    headers = [
        "model",
        "tool",
        "seconds, min / median / max",
        "CPU seconds",
        "peak, MB",
        "peak / file",
        "MB after",
        "ratio",
    ]
    note = f"onnxdp --ratio {asked.ratio:g}; {machine()}. Stages of onnxdp:"
    tell(asked, "speed", rows, f"{markdown(headers, lines)}\n\n{note}\n\n{stages(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
