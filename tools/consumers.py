"""Who runs a model in compat.py: programs, each in an environment of its own, that answer in one JSON format.

A task is a file with ``[{"model": path, "feeds": [path, ...]}, ...]``; the answer is one line,
``{"version": text, "results": [{"outputs": [[tensor, ...], ...]} or {"error": text}, ...]}``, with one list
of tensors a feed, in the order of the graph's outputs. A tensor is ``{"type", "dims", "data"}``, the data
base64 of its bytes.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import Ran, json_of, run, say
from rivals import python_with

WEB = Path(__file__).with_name("web.cjs")

FRAME = """
import base64, json, sys
import numpy as np
def tensor(array):
    array = np.ascontiguousarray(array)
    return {"type": str(array.dtype), "dims": array.shape, "data": base64.b64encode(array.tobytes()).decode()}
def feed(path):
    with open(path) as file:
        told = json.load(file)
    array = lambda t: np.frombuffer(base64.b64decode(t["data"]), t["type"]).reshape(t["dims"])
    return {name: array(t) for name, t in told.items()}
def work(version, opened):
    results = []
    with open(sys.argv[1]) as file:
        tasks = json.load(file)
    for task in tasks:
        try:
            run = opened(task["model"])
            results.append({"outputs": [[tensor(x) for x in run(feed(f))] for f in task["feeds"]]})
        except Exception as error:
            results.append({"error": " ".join(str(error).split())[-300:]})
    print(json.dumps({"version": version, "results": results}))
"""

RUNTIME = """
import onnxruntime
def opened(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda feed: session.run(None, feed)
work(onnxruntime.__version__, opened)
"""

REFERENCE = """
import onnx, onnx.reference
def opened(path):
    session = onnx.reference.ReferenceEvaluator(onnx.load(path))
    return lambda feed: session.run(None, feed)
work(onnx.__version__, opened)
"""

OPENVINO = """
import openvino
import openvino.properties.hint as hint
core = openvino.Core()
def opened(path):
    asked = {hint.inference_precision: openvino.Type.f32, hint.dynamic_quantization_group_size: 0}
    compiled = core.compile_model(path, "CPU", asked)
    def run(feed):
        answer = compiled({p.any_name: feed[next(n for n in p.names if n in feed)] for p in compiled.inputs})
        return [answer[p] for p in compiled.outputs]
    return run
work(openvino.__version__.split("-")[0], opened)
"""

SIMPLIFIERS = ("onnxslim==0.1.98", "onnxsim==0.8.1", "onnx==1.23.2", "onnxruntime==1.31.1", "numpy==2.4.6")
SIMPLIFY = {
    "onnxslim": "import sys, onnxslim; onnxslim.slim(sys.argv[1], sys.argv[2])",
    "onnxsim": """
import sys, onnx, onnxsim
model, fine = onnxsim.simplify(onnx.load(sys.argv[1]))
assert fine
onnx.save(model, sys.argv[2])
""",
}
"""Tools that fold constants: programs that are called with IN and OUT."""

PACKAGES = ("onnxruntime-web@latest", "@sparticuz/chromium@147.0.0", "puppeteer-core@24.43.1")
"""What npm installs: what is measured, a Chromium that is a package of npm's own registry, its driver."""


@dataclass(frozen=True)
class Consumer:
    """Something that runs ONNX files: a name, its command before the task's file, and a limit in bytes."""

    name: str
    command: Callable[[Path], list[str | Path]]
    largest: int | None = None
    """Bytes of an original beyond which it takes too long."""


def here(name: str, program: str, *requirements: str, largest: int | None = None) -> Consumer:
    """Return a consumer that is a Python program with its requirements."""
    room = name.lower().replace(" ", "-")
    return Consumer(
        name, lambda venvs: [python_with(requirements, venvs / room), "-c", FRAME + program], largest
    )


def web(name: str, how: str) -> Consumer:
    """Return ONNX Runtime Web, run by web.cjs in Node itself or in the Chromium that Node starts."""
    return Consumer(name, lambda venvs: [*_node(venvs / "web"), how])


def _node(room: Path) -> list[str | Path]:
    """Return Node with web.cjs in a folder that holds the packages; made once."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        raise OSError("there is no Node on this machine")
    stamp, wanted = room / "requirements", "\n".join(PACKAGES)
    if not stamp.exists() or stamp.read_text() != wanted:
        say(f"installing {', '.join(PACKAGES)} into {room}")
        shutil.rmtree(room, ignore_errors=True)
        room.mkdir(parents=True)
        (room / "package.json").write_text('{"private": true}')
        quiet = ["--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
        subprocess.run([npm, "install", *quiet, *PACKAGES], cwd=room, check=True, stdin=subprocess.DEVNULL)
        stamp.write_text(wanted)
    return [node, WEB, room]


STOCK = here("ONNX Runtime", RUNTIME, "onnxruntime", "numpy")
"""The newest that pip finds when its environment is made; what the others are compared with."""
CONSUMERS = (
    STOCK,
    here("ONNX Runtime 1.23", RUNTIME, "onnxruntime==1.23.2", "numpy"),
    here("onnx.reference", REFERENCE, "onnx==1.23.2", "numpy", largest=3_000_000),
    here("OpenVINO", OPENVINO, "openvino"),
    web("ONNX Runtime Web in Node", "node"),
    web("ONNX Runtime Web in Chromium", "chromium"),
)


def write_feed(path: Path, feed: Mapping[str, np.ndarray]) -> Path:
    """Write the tensors of one feed."""
    path.write_text(json.dumps({name: _told(array) for name, array in feed.items()}))
    return path


def _told(array: np.ndarray) -> dict[str, Any]:
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {"type": str(array.dtype), "dims": array.shape, "data": data}


def _array(tensor: Mapping[str, Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(tensor["data"]), tensor["type"]).reshape(tensor["dims"])


@dataclass(frozen=True)
class Answer:
    """What a consumer made of one model: arrays by feed and output, or the sentence it refused with."""

    outputs: tuple[tuple[np.ndarray, ...], ...] = ()
    error: str = ""


def ask(
    consumer: Consumer, tasks: Sequence[tuple[Path, Sequence[Path]]], venvs: Path, room: Path
) -> tuple[str, list[Answer]]:
    """Run (model, feeds) after one another in one process; return the consumer's version and its answers."""
    task = room / "task.json"
    task.write_text(json.dumps([{"model": str(m), "feeds": [str(f) for f in fs]} for m, fs in tasks]))
    try:
        ran = run([*consumer.command(venvs.resolve()), task])
    except (OSError, subprocess.CalledProcessError) as error:
        ran = Ran(1, "", str(error), 0.0, 0)
    if ran.code:
        return "not run", [Answer(error=ran.sentence)] * len(tasks)
    told = json_of(ran)
    return told["version"], [
        Answer(error=r["error"])
        if "error" in r
        else Answer(tuple(tuple(_array(t) for t in feed) for feed in r["outputs"]))
        for r in told["results"]
    ]
