"""Show what shared dictionaries cost and save: --shared, --no-shared and automatic, at the same ratio.

Bytes, damage (relative error of the outputs on the held-out probes), and how many initializers serve several
nodes of the result: named by them directly, or through the Cast or Reshape that decodes them once for all.
Exit 1 where automatic is worse than either. With --atoms every pair has as many atoms whatever the bytes, so
that --shared shares wherever it can; then bytes and damage both differ, and there is no worse.

    python tools/sharing.py --models cifar10_googlenet_narrow transformer --ratio 3
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import onnx
from common import arguments, cached, files, json_of, machine, markdown, onnxdp, say, sha256, tell

DEFAULT = ("imagenet_resnet18_large_ktb", "cifar10_googlenet_narrow", "transformer")
WAYS = {"shared": ("--shared",), "no-shared": ("--no-shared",), "auto": ()}
SLACK = 1.0005
"""Errors are measured in float32: no difference within this factor is one."""


def nodes_of(graph: onnx.GraphProto) -> Iterable[onnx.NodeProto]:
    """Yield all nodes, those of bodies included."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for body in [attribute.g, *attribute.graphs]:
                yield from nodes_of(body)


def several_readers(path: Path) -> dict[str, int]:
    """Return the float initializers that serve more than one node, each with how many it serves.

    A node that computes with constants alone (a Cast, a product of factors) passes on what it reads; whoever
    reads that in turn is served.
    """
    graph = onnx.load(str(path), load_external_data=False).graph
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    origins = {t.name: {t.name} if t.data_type in floats else set() for t in graph.initializer}
    served: Counter[str] = Counter()
    for node in nodes_of(graph):
        given = [name for name in node.input if name]
        read = set().union(*(origins.get(name, set()) for name in given)) if given else set()
        if all(name in origins for name in given) and node.op_type != "Constant":
            origins.update({name: read for name in node.output})
        elif node.op_type == "Constant":
            origins.update({name: set() for name in node.output})
        else:
            served.update(read)
    return {name: count for name, count in served.items() if count > 1}


def measure(path: Path, way: str, goal: Sequence[str]) -> dict[str, Any]:
    """Compress in one way."""
    with tempfile.TemporaryDirectory(prefix="sharing-") as folder:
        out = Path(folder) / "out.onnx"
        ran = onnxdp("compress", path, out, "--method", "dp", *goal, "--json", *WAYS[way])
        row: dict[str, Any] = {"model": path.stem, "way": way, "code": ran.code}
        if ran.code:
            return {**row, "sentence": ran.sentence}
        report = json_of(ran)
        own = several_readers(path)
        shared = {n: c for n, c in several_readers(out).items() if n not in own}
        sharing = [c for c in report["plan"]["choices"] if "dictionary" in c["params"]]
        return {
            **row,
            "bytes": report["target"]["nbytes"],
            "error": max((o["relative"] for o in report["verification"]["outputs"]), default=0.0),
            "sharing_weights": len(sharing),
            "shared_initializers": shared,
            "latency": report["latency_ratio"],
            "seconds": round(ran.seconds, 1),
        }


def line(row: dict[str, Any]) -> list[str]:
    """Format one row."""
    if row["code"]:
        return [row["model"], row["way"], f"exit {row['code']}: {row['sentence']}", *[""] * 5]
    return [
        *(row["model"], row["way"], f"{row['bytes']:,}", f"{row['error']:.4f}", str(row["sharing_weights"])),
        *(str(len(row["shared_initializers"])), f"{row['latency']:.2f}", f"{row['seconds']:.0f}"),
    ]


def worse(rows: list[dict[str, Any]]) -> list[str]:
    """Return the models on which automatic is worse than one of the others."""
    found = []
    for model in dict.fromkeys(r["model"] for r in rows):
        mine = {r["way"]: r for r in rows if r["model"] == model and r["code"] == 0}
        others = [mine[w]["error"] for w in ("shared", "no-shared") if w in mine]
        if "auto" not in mine or any(mine["auto"]["error"] > SLACK * e for e in others):
            found.append(model)
    return found


def main() -> int:
    """Measure, and say where automatic was worse."""
    parser = arguments(__doc__, kept="rows")
    add = parser.add_argument
    told = "files, parts of classifiers' names, or builders"
    add("--models", nargs="+", default=DEFAULT, metavar="NAME", help=told)
    add("--ratio", type=float, default=3.0, help="default: %(default)s")
    add("--atoms", type=int, metavar="N", help="of every dictionary, instead of a ratio")
    add("--small", action="store_true", help="build small models")
    asked = parser.parse_args()
    goal = ["--atoms", str(asked.atoms)] if asked.atoms else ["--ratio", f"{asked.ratio:g}"]
    rows = []
    with tempfile.TemporaryDirectory(prefix="built-") as folder:
        for path in files(asked.models, Path(folder), small=asked.small):
            for way in WAYS:
                say(f"{path.stem} {way}")
                key = ["sharing", sha256(path), way, goal]
                rows.append(cached(asked.cache, key, lambda p=path, w=way: measure(p, w, goal)))
    headers = [
        "model",
        "way",
        "bytes",
        "output error",
        "weights that share",
        "initializers that serve several",
    ]
    table = markdown([*headers, "latency ×", "s"], [line(r) for r in rows])
    note = f"`--method dp {shlex.join(goal)}`; {machine()}."
    tell(asked, "sharing", rows, f"{table}\n\n{note}")
    beaten = [] if asked.atoms else worse(rows)
    for model in beaten:
        say(f"automatic is worse than another way on {model}")
    return 1 if beaten else 0


if __name__ == "__main__":
    sys.exit(main())
