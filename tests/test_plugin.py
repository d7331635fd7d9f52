"""A method comes from another package, installed for real, and gets weights like those that are built in."""

from __future__ import annotations

import subprocess
import sys
import zipfile

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
    sequential = False
    near = 1.3

    def supports(self, weight):
        return None if weight.dtype == "float32" else "toy stores float32 only"

    def cost(self, weight, params):
        return weight.size + 4

    def check(self, weight, params):
        pass

    def outline(self, weight, params):
        arrays = {"numbers": np.zeros(weight.shape, np.int8), "scale": np.zeros(1, np.float32)}
        return Encoded(weight.name, "toy", {}, arrays, 0.0)

    def groups(self, weights, sources, *, everywhere=False):
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

    def points(self):
        return self.candidates()

    def ready(self, params):
        return True

    def encode(self, tasks, params):
        arrays = {"numbers": self.numbers, "scale": self.scale.reshape(1)}
        return (Encoded(tasks[0].weight.name, "toy", {}, arrays, self.error),)
'''

INFO = "onnxdp_toy-1.0.dist-info"
WHEEL = {
    "onnxdp_toy.py": SOURCE,
    f"{INFO}/METADATA": "Metadata-Version: 2.1\nName: onnxdp-toy\nVersion: 1.0\n",
    f"{INFO}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    f"{INFO}/entry_points.txt": "[onnxdp.methods]\ntoy = onnxdp_toy:Toy\n",
}


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Install the toy package into a folder of its own with pip, from a wheel, without the network."""
    wheel, target = tmp_path / "onnxdp_toy-1.0-py3-none-any.whl", tmp_path / "site"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in WHEEL.items():
            archive.writestr(name, text)
        archive.writestr(f"{INFO}/RECORD", "".join(f"{name},,\n" for name in [*WHEEL, f"{INFO}/RECORD"]))
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*command, "--target", str(target), str(wheel)], check=True)
    monkeypatch.syspath_prepend(str(target))
    yield target
    sys.modules.pop("onnxdp_toy", None)


def test_a_method_installed_through_the_entry_point_compresses(installed):
    rng = np.random.default_rng(2)
    tensors = {n: draw(rng, 64, 64) for n in "WV"}
    proto = model("a = MatMul(x, W) r = Relu(a) y = MatMul(r, V)", "float[N,64] x", "float[N,64] y", tensors)
    result = onnxdp.compress(proto, ratio=3, method="toy", short_names=False)
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
