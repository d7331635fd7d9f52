"""ONNX Runtime: sessions and running samples through them; the only room that imports onnxruntime."""

from __future__ import annotations

import contextlib
import math
import re
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxdp import decisions, noise, walk
from onnxdp.errors import ModelError, SetupError
from onnxdp.probes import InputSpec
from onnxdp.records import Array

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_PROTOBUF_LIMIT = 2**31 - 2**20


def onnxruntime() -> Any:
    """Import onnxruntime.

    Raises
    ------
    SetupError
        It is not installed, or cannot be loaded.
    """
    try:
        import onnxruntime as ort
    except ImportError as e:
        raise SetupError(
            f"ONNX Runtime is needed and cannot be imported ({e}); "
            "install it with: pip install 'onnxdp[cpu]' (or 'onnxdp[gpu]')."
        ) from e
    return ort


def session(
    model: onnx.ModelProto | Path,
    *,
    threads: int | None = None,
    provider: str = "cpu",
    disabled: Sequence[str] = (),
    also: Collection[str] = (),
    held: Collection[str] = (),
    noisy: bool = False,
) -> Any:
    """Make an ``onnxruntime.InferenceSession``.

    Parameters
    ----------
    model : ModelProto or Path
        A path keeps external data where it is.
    threads : int, optional
        Threads inside an operator; default: ONNX Runtime's own choice.
    provider : {"cpu", "cuda"}
    disabled : sequence of str
        Optimizers of ONNX Runtime to leave out.
    also : collection of str
        Tensors to give beside the outputs, those of them that the model makes.
    held : collection of str
        Selections to be told by inputs (:func:`onnxdp.decisions.hold`), those of them that the model makes.
    noisy : bool
        Whether the model draws random numbers, which are to be the same in every run.

    Raises
    ------
    SetupError
        No ONNX Runtime, or CUDA was asked for and the session fell back to the CPU.
    ModelError
        ONNX Runtime refuses the model.
    """
    ort = onnxruntime()
    if also or held or noisy:
        model = _giving(model, also, held)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.enable_cpu_mem_arena = False  # an arena keeps the peak of every run
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if threads is not None:
        options.intra_op_num_threads = threads
    wanted = [_PROVIDERS[provider]] if provider == "cpu" else [_PROVIDERS[provider], _PROVIDERS["cpu"]]
    try:
        # The fallback on the CPU prints to stdout, and there is nothing to fall back to.
        made = _make(ort, model, options, wanted, list(disabled), enable_fallback=int(provider != "cpu"))
    except MemoryError:
        raise
    except Exception as e:  # ONNX Runtime raises a dozen classes of its own, all derived from Exception alone
        raise ModelError(
            f"ONNX Runtime cannot load the model ({_reason(e)}); check it with onnx.checker."
        ) from e
    if wanted[0] not in made.get_providers():
        raise SetupError("ONNX Runtime could not use CUDA and fell back to the CPU; see 'onnxdp doctor'.")
    return made


def _make(
    ort: Any,
    model: onnx.ModelProto | Path,
    options: Any,
    providers: Sequence[str],
    disabled: Sequence[str],
    **more: Any,
) -> Any:
    more |= {"providers": providers, "disabled_optimizers": disabled}
    if isinstance(model, Path):
        return ort.InferenceSession(str(model), options, **more)
    if model.ByteSize() < _PROTOBUF_LIMIT:
        return ort.InferenceSession(model.SerializeToString(), options, **more)
    with tempfile.TemporaryDirectory(prefix="onnxdp-") as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, path, save_as_external_data=True, location="model.data")
        return ort.InferenceSession(str(path), options, **more)


def _giving(model: onnx.ModelProto | Path, names: Collection[str], held: Collection[str]) -> onnx.ModelProto:
    made = onnx.load(model) if isinstance(model, Path) else onnx.ModelProto()
    if not isinstance(model, Path):
        made.CopyFrom(model)
    noise.settle(made)
    decisions.hold(made, held)
    known = {n for node in made.graph.node for n in node.output} - {o.name for o in made.graph.output}
    made.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n in known)
    return made


def _reason(error: Exception) -> str:
    """Return what ONNX Runtime says, without its error codes and C++ signatures."""
    text = " ".join(str(error).split())
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"/\S+\.(cc|h):\d+ [^()]*\(([^()]|\([^()]*\))*\) ", "", text)
    return text[:300].rstrip(" .")


def run(made: Any, feed: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
    """Run one feed; returns name -> array for ``outputs`` (default: all).

    Raises
    ------
    ModelError
        ONNX Runtime fails while running.
    """
    names = list(outputs) if outputs is not None else [o.name for o in made.get_outputs()]
    try:
        given = {n: np.asarray(a) for n, a in feed.items()}  # of rank 0, NumPy hands out no array
        return dict(zip(names, made.run(names, given), strict=True))
    except MemoryError:
        raise
    except Exception as e:
        raise ModelError(
            f"ONNX Runtime cannot run the model on these inputs ({_reason(e)}); give real ones with --inputs."
        ) from e


def input_specs(model: onnx.ModelProto) -> list[InputSpec]:
    """Describe the inputs that a caller must feed (initializers that are also inputs are not among them)."""
    held = {t.name for t in model.graph.initializer}
    return [
        InputSpec(
            name=value.name,
            dtype=_dtype_name(value.type.tensor_type.elem_type),
            shape=_shape(value, model.graph),
            vocabulary=_vocabulary(model.graph, value.name),
            marks=_marks(model.graph, value.name),
        )
        for value in model.graph.input
        if value.name not in held
    ]


_KEEPS_SHAPE = ("Identity", "Cast", "Add", "Sub", "Mul", "Div", "BatchNormalization")


def _shape(value: onnx.ValueInfoProto, graph: onnx.GraphProto) -> tuple[int | str | None, ...]:
    """Return an input's shape; a free size that the first weight it meets fixes is that size."""
    shape = [_dim(d) for d in value.type.tensor_type.shape.dim]
    held = {t.name: t.dims for t in graph.initializer}
    names = {value.name}
    for node in _in_order(graph.node):
        if node.input[0] not in names:
            continue
        if node.op_type in _KEEPS_SHAPE:
            names.add(node.output[0])
        elif len(node.input) > 1 and node.input[1] in held:
            for axis, size in _fixed(node, held[node.input[1]]):
                if -len(shape) <= axis < len(shape) and not isinstance(shape[axis], int):
                    shape[axis] = size
    return tuple(shape)


def _fixed(node: onnx.NodeProto, dims: Sequence[int]) -> list[tuple[int, int]]:
    """Return (axis, size) of what a node's weight demands of its first input."""
    numbers = {a.name: a.i for a in node.attribute}
    if node.op_type == "Conv" and len(dims) > 2:
        return [(1, dims[1] * numbers.get("group", 1))]
    if node.op_type == "Gemm" and len(dims) == 2:
        return [(0 if numbers.get("transA") else 1, dims[1 if numbers.get("transB") else 0])]
    return [(-1, dims[-2])] if node.op_type == "MatMul" and len(dims) > 1 else []


def _dim(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    if dim.HasField("dim_value"):
        return int(dim.dim_value) if dim.dim_value > 0 else None
    return dim.dim_param or None


def _dtype_name(elem_type: int) -> str:
    try:
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(elem_type)).name
    except KeyError as e:
        raise ModelError("An input of the model is no tensor; onnxdp feeds tensors only.") from e


_ID_KEEPING = frozenset(
    (
        "Cast",
        "Reshape",
        "Squeeze",
        "Unsqueeze",
        "Identity",
        "Transpose",
        "Where",
        "Add",
        "Sub",
        "Mul",
        "Mod",
        "Clip",
    )
)


def _vocabulary(graph: onnx.GraphProto, name: str) -> int | None:
    """Rows of the table that integer ids select from.

    A Gather may read them through operators that keep ids ids: casts, reshapes, wrapping of negative ones.
    """
    tables = {t.name: t.dims[0] for t in graph.initializer if len(t.dims) >= 1}
    for node in graph.node:
        value = walk.constant(node)
        if value is not None and value.dims:
            tables[node.output[0]] = value.dims[0]
    names = {name}
    for node in _in_order(graph.node):
        if node.op_type in _ID_KEEPING and names & set(node.input):
            names.add(node.output[0])
        elif node.op_type == "Gather" and node.input[1] in names and node.input[0] in tables:
            return int(tables[node.input[0]])
    return None


_PASSING = frozenset(("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"))


def _marks(graph: onnx.GraphProto, name: str) -> tuple[int, ...]:
    """Ids that an input is compared with: CLIP pools at the end of a text, and finds it by its id."""
    told = {t.name: t for t in graph.initializer if t.data_type in _WHOLE and math.prod(t.dims) == 1}
    names = {name}
    found: set[int] = set()
    for node in graph.node:
        value = walk.constant(node)
        if value is not None and value.data_type in _WHOLE and math.prod(value.dims) == 1:
            told[node.output[0]] = value
        elif node.op_type in _PASSING and node.input[0] in told:
            told[node.output[0]] = told[node.input[0]]
        elif node.op_type in _PASSING and node.input[0] in names:
            names.add(node.output[0])
        elif node.op_type == "Equal" and names & set(node.input):
            with contextlib.suppress(ValueError):  # constants that are left out here have no numbers
                found |= {int(onnx.numpy_helper.to_array(told[n]).item()) for n in node.input if n in told}
    return tuple(sorted(i for i in found if i >= 0))


_WHOLE = (onnx.TensorProto.INT64, onnx.TensorProto.INT32)


def _in_order(nodes: Iterable[onnx.NodeProto]) -> Iterable[onnx.NodeProto]:
    return (n for n in nodes if n.input)
