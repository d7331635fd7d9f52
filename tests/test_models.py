from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import builders
import digits_eval
import generated
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

MODELS = Path(__file__).parents[1] / "models"

# torchvision's own counts, batch normalisation included, auxiliary heads not
PARAMETERS = {
    "alexnet": 61_100_840,
    "vgg16": 138_357_544,
    "resnet18": 11_689_512,
    "resnet50": 25_557_032,
    "googlenet": 6_624_904,
}
NORMALISED = {"resnet18", "resnet50", "googlenet"}


def run(model: onnx.ModelProto, inputs: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {session.get_inputs()[0].name: inputs})
    return np.asarray(result)


def small_inputs(name: str, count: int) -> np.ndarray:
    sizes = builders.SMALL[name]
    if name == "transformer":
        rng = np.random.default_rng(1)
        return rng.integers(0, sizes["vocabulary"], (count, sizes["tokens"]), dtype=np.int64)
    return generated.clouds(1, count, int(sizes["size"]))


def weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


# ---- digits


def test_digits_reaches_the_accuracy_it_states() -> None:
    model = onnx.load(MODELS / "digits.onnx")
    stated = {entry.key: entry.value for entry in model.metadata_props}
    accuracy = 100 * digits_eval.correct(MODELS / "digits.onnx").mean()
    assert accuracy >= 97.5
    # one picture of 540 may sit on the border between two digits on another machine
    assert abs(accuracy - float(stated["accuracy_percent"])) <= 100 / 540 + 0.005
    assert stated["training_seed"] == "0"


def test_digits_has_the_promised_interface_and_size() -> None:
    model = onnx.load(MODELS / "digits.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert (model.ir_version, model.opset_import[0].version) == (8, 17)
    (entry,), (result,) = model.graph.input, model.graph.output
    assert (entry.name, result.name) == ("image", "logits")
    assert [d.dim_param or d.dim_value for d in entry.type.tensor_type.shape.dim] == ["N", 1, 8, 8]
    assert 1.2e6 <= (MODELS / "digits.onnx").stat().st_size <= 1.9e6
    assert (MODELS / "digits_test.npz").stat().st_size < 100_000


def test_digits_is_over_parameterised() -> None:
    for name, weight in weights(onnx.load(MODELS / "digits.onnx")).items():
        if weight.ndim == 4 and weight.shape[1] > 1:
            energy = np.cumsum(np.linalg.svd(weight.reshape(len(weight), -1), compute_uv=False) ** 2)
            assert energy[len(energy) // 2] > 0.9 * energy[-1], name


def test_the_difference_counts_only_pictures_on_which_models_disagree() -> None:
    first, other = np.ones(100, bool), np.ones(100, bool)
    assert digits_eval.difference(first, other) == (0.0, 0.0)
    other[:4] = False
    points, error = digits_eval.difference(first, other)
    assert points == pytest.approx(-4)
    assert error == pytest.approx(100 * math.sqrt(0.04 * 0.96 / 99))


def test_digits_eval_prints_a_line_for_each_model() -> None:
    path = str(MODELS / "digits.onnx")
    command = [sys.executable, str(MODELS / "digits_eval.py"), path, path]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 2
    assert "%" in lines[0] and "+0.00 points +- 0.00" in lines[1]


# ---- builders


@pytest.mark.parametrize("name", builders.BUILDERS)
def test_small_variants_are_valid_and_their_outputs_follow_the_input(name: str) -> None:
    model = builders.build(name, small=True)
    onnx.checker.check_model(model, full_check=True)
    assert (model.ir_version, model.opset_import[0].version) == (8, 17)
    logits = run(model, small_inputs(name, 16))
    assert logits.shape == (16, 10)
    assert np.isfinite(logits).all()
    assert 0.3 < logits.std(axis=0).mean() < 30  # built to be near 2
    assert len(set(logits.argmax(axis=1))) > 1
    assert np.array_equal(run(model, small_inputs(name, 16)[:1]).argmax(), logits[0].argmax())


@pytest.mark.parametrize("name", builders.BUILDERS)
def test_same_seed_same_bytes(name: str) -> None:
    def digest(seed: int) -> str:
        return hashlib.sha256(builders.build(name, seed, small=True).SerializeToString()).hexdigest()

    assert digest(3) == digest(3)
    assert digest(3) != digest(4)


def test_the_number_of_threads_does_not_change_the_bytes(tmp_path: Path) -> None:
    for threads in ("1", "2"):
        limits = {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        command = [
            sys.executable,
            str(MODELS / "builders.py"),
            "resnet18",
            f"{tmp_path}/{threads}",
            "--small",
        ]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, **limits})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


@pytest.mark.parametrize("name", ["resnet18", "googlenet", "resnet50"])
def test_parameter_counts_are_the_real_ones(name: str) -> None:
    check_parameters(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["alexnet", "vgg16"])
def test_parameter_counts_of_the_big_ones(name: str) -> None:
    start = time.perf_counter()
    check_parameters(name)
    assert time.perf_counter() - start < 60


def check_parameters(name: str) -> None:
    model = builders.build(name)
    counted = sum(math.prod(tensor.dims) for tensor in model.graph.initializer)
    convolutions = {node.input[1] for node in model.graph.node if node.op_type == "Conv"}
    channels = sum(t.dims[0] for t in model.graph.initializer if t.name in convolutions)
    # a batch normalisation has a scale and a shift per channel, folded only the shift is left as a bias
    assert counted == PARAMETERS[name] - (channels if name in NORMALISED else 0)


@pytest.mark.parametrize("shape", [(64, 576), (576, 64), (100, 100), (33, 7), (1, 9), (5, 1)])
def test_singular_values_are_the_asked_power(shape: tuple[int, int]) -> None:
    left, right = np.random.default_rng(1), np.random.default_rng(2)
    matrix = generated.decaying(*shape, 0.6, left, right)
    found = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    expected = np.arange(1, min(shape) + 1) ** -0.6
    assert np.abs(found - expected).max() < np.finfo(np.float32).eps * 8 * math.log2(max(shape) + 2)


@pytest.mark.parametrize("name", builders.BUILDERS)
def test_spectra_decay(name: str) -> None:
    for key, weight in weights(builders.build(name, small=True)).items():
        if not key.endswith("weight") or weight.ndim < 2 or "position" in key:
            continue
        matrix = weight.reshape(len(weight), -1) if weight.ndim == 4 else weight
        values = np.linalg.svd(matrix, compute_uv=False)
        rank = np.arange(1, len(values) + 1)
        slope = np.polyfit(np.log(rank), np.log(values), 1)[0]
        assert -1.1 < slope < -0.3, (key, slope)


def test_q_k_v_share_input_directions_and_read_one_tensor() -> None:
    model = builders.build("transformer", small=True)
    values = weights(model)
    readers = [n for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in values]
    trio = [n for n in readers if n.input[1].startswith("layers.0.attention.") and ".out" not in n.input[1]]
    assert len(trio) == 3 and len({node.input[0] for node in trio}) == 1

    def lost(matrices: list[np.ndarray], rank: int) -> float:
        joined = np.concatenate([m / np.linalg.norm(m) for m in matrices], axis=1)
        energy = np.linalg.svd(joined, compute_uv=False) ** 2
        return float(energy[rank:].sum() / energy.sum())

    together = lost([values[node.input[1]] for node in trio], 16)
    strangers = lost(
        [values[f"layers.{i}.attention.q.weight"] for i in range(2)]
        + [values["layers.1.attention.out.weight"]],
        16,
    )
    assert together < strangers


def test_wrong_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="resnet18"):
        builders.build("resnet19")
    with pytest.raises(ValueError, match="multiple"):
        builders.build("transformer", width=10, heads=3)


# ---- scripts


def test_the_exporter_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('none here', name='torch')\n")
    command = [sys.executable, str(MODELS / "export_torchvision.py"), "resnet18", "--folder", str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)}
    )
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1 and "torch" in done.stderr
    assert not list(tmp_path.glob("*.onnx"))


@pytest.mark.parametrize("script", ["builders.py", "digits_eval.py", "export_torchvision.py"])
def test_scripts_explain_themselves(script: str) -> None:
    done = subprocess.run([sys.executable, str(MODELS / script), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage")
