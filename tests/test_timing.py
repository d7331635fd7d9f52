import sys

import numpy as np
import onnx
import pytest
from edges import parsed, save

from onnxdp import runtime, timing
from onnxdp.errors import ModelError


def network(path, layers, width=256, name="x"):
    """Save a chain of ``layers`` square MatMuls."""
    rng = np.random.default_rng(0)
    values = [rng.standard_normal((width, width)).astype(np.float32) / 16 for _ in range(layers)]
    names = [name, *(f"h{i}" for i in range(1, layers)), "y"]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]]) for i in range(layers)],
        "chain",
        [onnx.helper.make_tensor_value_info(name, 1, ["batch", width])],
        [onnx.helper.make_tensor_value_info("y", 1, ["batch", width])],
        [onnx.numpy_helper.from_array(v, f"w{i}") for i, v in enumerate(values)],
    )
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return path


def test_bench_measures_against_the_first(tmp_path):
    small, large = network(tmp_path / "small.onnx", 1), network(tmp_path / "large.onnx", 60)
    seen = []
    rows = timing.bench([large, small, large], repeat=5, threads=1, progress=lambda *step: seen.append(step))
    assert [r.path for r in rows] == [str(large), str(small), str(large)]
    assert [r.nbytes for r in rows] == [p.stat().st_size for p in (large, small, large)]
    first, other, again = rows
    assert (first.nbytes_ratio, first.load_ratio, first.latency_ratio) == (1, 1, 1)
    assert other.nbytes_ratio == small.stat().st_size / large.stat().st_size and again.nbytes_ratio == 1
    assert all(0 < r.latency[0] <= r.latency[1] <= r.latency[2] and r.load_seconds > 0 for r in rows)
    assert other.latency_ratio < 0.5 < again.latency_ratio  # a sixtieth of the work; equal work
    assert seen[0] == ("loading", 1, 9, "large.onnx") and seen[-1] == ("running", 7, 7, "")


@pytest.mark.skipif(sys.platform == "win32", reason="no peak memory there")
def test_peak_memory_is_the_childs_own(tmp_path):
    """On Linux a child's ru_maxrss starts at its parent's, which would make all models look alike."""
    small = network(tmp_path / "small.onnx", 1)
    ballast = np.ones(50_000_000)  # 400 MB here
    (row,) = timing.bench([small], repeat=1)
    assert timing.peak_memory() > ballast.nbytes
    assert row.peak_memory_bytes < ballast.nbytes / 2


@pytest.mark.skipif(sys.platform == "win32", reason="no peak memory there")
def test_a_larger_model_has_a_larger_peak(tmp_path):
    small, large = network(tmp_path / "small.onnx", 1), network(tmp_path / "large.onnx", 400)  # 105 MB
    a, b = timing.bench([small, large], repeat=1, threads=1)
    assert b.peak_memory_bytes - a.peak_memory_bytes > 0.9 * large.stat().st_size


def test_turns_alternate_and_warm_ones_are_left_out():
    class Session:
        def __init__(self, name, log):
            self.name, self.log = name, log

        def get_inputs(self):
            return []

        def get_outputs(self):
            return []

        def run(self, names, feed):
            self.log.append(self.name)
            return []

    log = []
    times = timing.take_turns([Session(n, log) for n in "ABC"], {}, 2)
    assert "".join(log) == "ABCCBAABCCBA" and times.shape == (2, 3) and (times > 0).all()


def test_latency_ratio_sees_more_work(tmp_path):
    small, large = (runtime.session(network(tmp_path / f"{n}.onnx", n), threads=1) for n in (1, 60))
    feed = {"x": np.ones((1, 256), np.float32)}
    assert timing.latency_ratio(small, large, feed, 5) > 2
    assert timing.latency_ratio(large, small, feed, 5) < 0.5


def test_models_with_other_inputs_are_refused(tmp_path):
    a, b = network(tmp_path / "a.onnx", 1), network(tmp_path / "b.onnx", 1, name="z")
    with pytest.raises(
        ModelError, match=r"b\.onnx takes the input 'z', which the first model does not; bench comp"
    ):
        timing.bench([a, b])


@pytest.mark.parametrize("declared", ["float[N, 128] x", "double[N, 256] x", "float[N, 1, 256] x"])
def test_models_that_take_other_samples_are_refused(tmp_path, declared):
    given = declared.replace(" x", "")
    other = parsed(f"""<ir_version: 8, opset_import: ["" : 17]>
        other ({declared}) => ({given} y) {{ y = Identity (x) }}""")
    a, b = network(tmp_path / "a.onnx", 1), save(other, tmp_path / "b.onnx")
    with pytest.raises(
        ModelError, match=r"b\.onnx takes 'x' as .* and the first model as float32 \[1, 256\]"
    ):
        timing.bench([a, b])


def test_an_input_may_be_called_file(tmp_path):
    (row,) = timing.bench([network(tmp_path / "a.onnx", 1, name="file")], repeat=1)
    assert row.latency_ratio == 1


def test_given_inputs_are_used(tmp_path):
    a = network(tmp_path / "a.onnx", 1)
    np.savez(tmp_path / "in.npz", x=np.ones((4, 256), np.float32))
    (row,) = timing.bench([a], repeat=1, inputs=tmp_path / "in.npz")
    assert row.path == str(a)
