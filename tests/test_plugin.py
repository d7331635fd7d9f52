"""A method comes from another package, installed for real, and gets weights like those that are built in."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import onnx
import pytest
from rewriting import draw, model

import onnxdp

SOURCE = '''
"""A toy method: one byte a number, a scale for each weight."""

import numpy as np

from onnxdp.records import Candidate, Encoded


class Toy:
    name = "toy"

    def supports(self, weight):
        return None if weight.dtype == "float32" else "toy stores float32 only"

    def cost(self, weight, params):
        return weight.size + 4

    def check(self, weight, params):
        pass

    def groups(self, weights, sources):
        return ()

    def solve(self, tasks, settings, *, device):
        return Rounded(tasks[0])

    def encode(self, task, params, settings, *, device):
        return Rounded(task).encode([task], [params])[0]

    def decode(self, weight, encoded):
        numbers = encoded.arrays["numbers"].astype(np.float32) * encoded.arrays["scale"]
        return numbers.reshape(weight.shape)

    def emit(self, build, weight, encoded, reader):
        numbers = build.constant("numbers", encoded.arrays["numbers"])
        scale = build.constant("scale", encoded.arrays["scale"])
        return build.node("Mul", [build.cast(numbers, "float32", "wide"), scale], "scaled")


class Rounded:
    def __init__(self, task):
        self.task = task
        self.scale = np.float32(np.abs(task.tensor).max() / 127)
        self.numbers = np.rint(task.tensor / self.scale).astype(np.int8)
        left = np.linalg.norm(task.tensor - self.numbers * self.scale)
        self.error = float(left / np.linalg.norm(task.tensor))

    def candidates(self):
        weight = self.task.weight
        return ((Candidate(weight.name, "toy", {}, weight.size + 4, self.error),),)

    def encode(self, tasks, params):
        arrays = {"numbers": self.numbers, "scale": self.scale.reshape(1)}
        return (Encoded(tasks[0].weight.name, "toy", {}, arrays, self.error),)
'''

PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "onnxdp-toy"
version = "1.0"
[project.entry-points."onnxdp.methods"]
toy = "onnxdp_toy:Toy"
[tool.setuptools]
py-modules = ["onnxdp_toy"]
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Install the toy package into a folder of its own, as pip does it, without the network."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    (source / "onnxdp_toy.py").write_text(textwrap.dedent(SOURCE), encoding="utf-8")
    (source / "pyproject.toml").write_text(PROJECT, encoding="utf-8")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--no-build-isolation", "--quiet"]
    done = subprocess.run([*command, "--target", str(target), str(source)], capture_output=True, text=True)
    if done.returncode:  # no pip or setuptools here: write what they would have
        pytest.importorskip("importlib.metadata")
        (target / "onnxdp_toy.py").write_text(textwrap.dedent(SOURCE), encoding="utf-8")
        info = target / "onnxdp_toy-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxdp-toy\nVersion: 1.0\n", encoding="utf-8")
        (info / "entry_points.txt").write_text("[onnxdp.methods]\ntoy = onnxdp_toy:Toy\n", encoding="utf-8")
    sys.path.insert(0, str(target))
    yield target
    sys.path.remove(str(target))
    sys.modules.pop("onnxdp_toy", None)


def test_a_method_installed_through_the_entry_point_compresses(installed):
    rng = np.random.default_rng(2)
    tensors = {n: draw(rng, 64, 64) for n in "WV"}
    proto = model("a = MatMul(x, W) r = Relu(a) y = MatMul(r, V)", "float[N,64] x", "float[N,64] y", tensors)
    result = onnxdp.compress(proto, ratio=3, method="toy")
    assert {c.method for c in result.report.plan.choices} == {"toy"}
    assert result.report.verification.passed and 0 < result.report.verification.error < 0.02
    assert result.model.ByteSize() <= proto.ByteSize() // 3
    stored = {t.name: t for t in result.model.graph.initializer}
    assert stored["W.numbers"].data_type == onnx.TensorProto.INT8 and "W" not in stored
    again = onnxdp.apply(proto, result.report.plan).model
    assert again.SerializeToString(deterministic=True) == result.model.SerializeToString(deterministic=True)


def test_without_it_the_method_is_refused_by_name():
    proto = model("y = MatMul(x, W)", "float[N,64] x", "float[N,64] y", {"W": np.ones((64, 64), np.float32)})
    with pytest.raises(onnxdp.UsageError, match="no method 'toy'"):
        onnxdp.compress(proto, ratio=3, method="toy")
