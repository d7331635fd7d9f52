"""Measure what making a session of a packed model costs: time, peak memory, what of its graph is left.

Every session is made in a fresh process of one thread, packed and original taking turns; ratios of medians
over --repeat processes; processor seconds are what a busy machine leaves comparable. The peak is the largest
resident memory (VmHWM) once the session stands, whole and beyond what the process held before. The graph that
ONNX Runtime keeps is written out, and its node types and the shapes of its constants are counted: they should
be the original's.

    python tools/load.py resnet18.onnx resnet18_8.onnx resnet20.onnx resnet20_8.onnx --repeat 7
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from common import arguments, machine, markdown, run, say, tell

LOAD = """
import json, sys, time
import onnxruntime
from onnxdp.timing import peak_memory
path, *kept = sys.argv[1:]
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.log_severity_level = 1, 3
if kept:
    options.optimized_model_filepath = kept[0]
before, start = peak_memory(), time.perf_counter()
cpu = time.process_time()
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
seconds, processor, peak = time.perf_counter() - start, time.process_time() - cpu, peak_memory()
print(json.dumps([seconds, processor, peak, peak - before]))
"""


def load(path: Path, *kept: Path) -> list[float]:
    """Return wall and processor seconds, peak bytes, and peak bytes beyond what the process held before."""
    ran = run([sys.executable, "-c", LOAD, path, *kept])
    if ran.code:
        raise RuntimeError(f"{path} was not loaded: {ran.sentence}")
    costs: list[float] = json.loads(ran.out)
    return costs


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield a graph and those of its branches."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from graphs(attribute.g)


def left(path: Path, room: Path) -> tuple[Counter[str], Counter[str]]:
    """Count node types and shapes of constants (but single numbers) in the graph that ONNX Runtime keeps."""
    kept = room / "kept.onnx"
    load(path, kept)
    found = list(graphs(onnx.load(kept).graph))
    shapes = (
        f"{t.data_type}:{list(t.dims)}" for g in found for t in g.initializer if list(t.dims) not in ([], [1])
    )
    return Counter(n.op_type for g in found for n in g.node), Counter(shapes)


def differs(a: Counter[str], b: Counter[str]) -> str:
    """Say what b has more and less of than a."""
    more = [f"+{n} {k}" for k, n in sorted((b - a).items())] + [
        f"-{n} {k}" for k, n in sorted((a - b).items())
    ]
    return ", ".join(more) or "same"


def measure(original: Path, packed: Path, repeat: int) -> dict[str, Any]:
    """Load both in turns."""
    times: dict[Path, list[list[float]]] = {original: [], packed: []}
    for turn in range(repeat):
        order = [original, packed]
        for path in order if turn % 2 == 0 else reversed(order):
            times[path].append(load(path))
    with tempfile.TemporaryDirectory(prefix="onnxdp-load-") as name:
        (nodes, shapes), (others, more) = (left(path, Path(name)) for path in (original, packed))
    medians = {path: [statistics.median(t) for t in zip(*rows, strict=True)] for path, rows in times.items()}
    keys = ("seconds", "processor seconds", "peak", "peak beyond")
    return {
        "model": packed.stem,
        "bytes": [original.stat().st_size, packed.stat().st_size],
        **{k: [a, b] for k, a, b in zip(keys, medians[original], medians[packed], strict=True)},
        "nodes": f"{sum(others.values())} {differs(nodes, others)}",
        "constants": differs(shapes, more),
    }


def line(row: dict[str, Any]) -> tuple[str, ...]:
    """Format one model."""

    def ratio(key: str, unit: float, digits: int) -> str:
        a, b = row[key]
        return f"{b / a:.2f} ({a / unit:.{digits}f} → {b / unit:.{digits}f})"

    seconds = [ratio(k, 1, 3) for k in ("seconds", "processor seconds")]
    peaks = [ratio(k, 1e6, 0) for k in ("peak", "peak beyond")]
    return row["model"], *seconds, *peaks, row["nodes"], row["constants"]


def main() -> None:
    """Measure pairs of files."""
    parser = arguments(__doc__)
    parser.add_argument("pairs", nargs="+", type=Path, metavar="ORIGINAL PACKED", help="files, two by two")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="processes for each file")
    asked = parser.parse_args()
    if len(asked.pairs) % 2:
        parser.error("files come in pairs: ORIGINAL PACKED")
    rows = []
    for original, packed in zip(asked.pairs[::2], asked.pairs[1::2], strict=True):
        say(f"loading {packed.name}")
        rows.append(measure(original, packed, asked.repeat))
        say("  " + "; ".join(line(rows[-1])))
    headers = [
        "model",
        "load ×, s",
        "processor ×, s",
        "peak ×, MB",
        "peak beyond Python's ×, MB",
        "nodes left",
        "constants",
    ]
    tell(asked, "load", rows, markdown(headers, map(line, rows)) + f"\n\n{machine()}.")


if __name__ == "__main__":
    main()
