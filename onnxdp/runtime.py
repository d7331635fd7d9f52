"""ONNX Runtime: sessions and running samples through them; the only room that imports onnxruntime."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

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
            f"ONNX Runtime is needed and cannot be imported ({e}); install it with: pip install 'onnxdp[cpu]' "
            "(or 'onnxdp[gpu]')."
        ) from e
    return ort


def session(
    model: onnx.ModelProto | Path,
    *,
    threads: int | None = None,
    provider: str = "cpu",
    disabled: Sequence[str] = (),
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

    Raises
    ------
    SetupError
        No ONNX Runtime, or CUDA was asked for and the session fell back to the CPU.
    ModelError
        ONNX Runtime refuses the model.
    """
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if threads is not None:
        options.intra_op_num_threads = threads
    wanted = [_PROVIDERS[provider]] if provider == "cpu" else [_PROVIDERS[provider], _PROVIDERS["cpu"]]
    try:
        # The fallback on the CPU prints to stdout, and there is nothing to fall back to.
        made = _make(ort, model, options, wanted, list(disabled), enable_fallback=int(provider != "cpu"))
    except MemoryError:
        raise
    except Exception as e:  # ONNX Runtime raises a dozen classes of its own, all derived from Exception alone
        reason = " ".join(str(e).split())
        raise ModelError(f"ONNX Runtime cannot load the model ({reason[:300]}); check it with onnx.checker.") from e
    if wanted[0] not in made.get_providers():
        raise SetupError("ONNX Runtime could not use CUDA and fell back to the CPU; see 'onnxdp doctor'.")
    return made


def _make(
    ort: Any, model: onnx.ModelProto | Path, options: Any, providers: Sequence[str], disabled: Sequence[str], **more: Any
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


def run(made: Any, feed: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
    """Run one feed; returns name -> array for ``outputs`` (default: all).

    Raises
    ------
    ModelError
        ONNX Runtime fails while running.
    """
    names = list(outputs) if outputs is not None else [o.name for o in made.get_outputs()]
    try:
        return dict(zip(names, made.run(names, dict(feed)), strict=True))
    except MemoryError:
        raise
    except Exception as e:
        reason = " ".join(str(e).split())
        raise ModelError(
            f"ONNX Runtime cannot run the model on these inputs ({reason[:300]}); give real ones with --inputs."
        ) from e


def input_specs(model: onnx.ModelProto) -> list[InputSpec]:
    """Describe the inputs that a caller must feed (initializers that are also inputs are not among them)."""
    held = {t.name for t in model.graph.initializer}
    return [
        InputSpec(
            name=value.name,
            dtype=_dtype_name(value.type.tensor_type.elem_type),
            shape=tuple(_dim(d) for d in value.type.tensor_type.shape.dim),
            vocabulary=_vocabulary(model.graph, value.name),
        )
        for value in model.graph.input
        if value.name not in held
    ]


def _dim(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    if dim.HasField("dim_value"):
        return int(dim.dim_value) if dim.dim_value > 0 else None
    return dim.dim_param or None


def _dtype_name(elem_type: int) -> str:
    try:
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(elem_type)).name
    except KeyError as e:
        raise ModelError("An input of the model is no tensor; onnxdp feeds tensors only.") from e


def _vocabulary(graph: onnx.GraphProto, name: str) -> int | None:
    """Rows of the table that integer ids select from: a Gather read directly or through Cast and reshapes."""
    tables = {t.name: t.dims[0] for t in graph.initializer if len(t.dims) >= 1}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
            if node.attribute[0].t.dims:
                tables[node.output[0]] = node.attribute[0].t.dims[0]
    names = {name}
    for node in _in_order(graph.node):
        if node.op_type in ("Cast", "Reshape", "Squeeze", "Unsqueeze", "Identity") and node.input[0] in names:
            names.add(node.output[0])
        elif node.op_type == "Gather" and node.input[1] in names and node.input[0] in tables:
            return int(tables[node.input[0]])
    return None


def _in_order(nodes: Iterable[onnx.NodeProto]) -> Iterable[onnx.NodeProto]:
    return (n for n in nodes if n.input)
