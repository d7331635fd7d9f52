"""Small models with the edges that real exporters give them, and the command line run in this process."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import numpy as np
import onnx
from click.testing import CliRunner, Result
from onnx import ModelProto, numpy_helper, parser

from onnxdp.cli import main


def decaying(rows: int, columns: int, seed: int) -> np.ndarray:
    """Return a matrix whose singular values fall like trained weights': float32 (rows, columns)."""
    draw = np.random.default_rng(seed)
    u, _, v = np.linalg.svd(draw.normal(size=(rows, columns)), full_matrices=False)
    values = np.arange(1, len(v) + 1) ** -1.0
    return ((u * values) @ v * (columns / np.square(values).sum()) ** 0.5).astype(np.float32)


def parsed(text: str, **initializers: np.ndarray) -> ModelProto:
    """Return a model of ONNX's text form with these initializers, without the empty domains it writes."""
    model = parser.parse_model(text)
    for part in (*model.opset_import, *model.graph.node):
        if not part.domain:
            part.ClearField("domain")
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in initializers.items())
    return model


@cache
def _mlp() -> bytes:
    return parsed(
        """<ir_version: 8, opset_import: ["" : 17], producer_name: "maker", doc_string: "about it">
        mlp (float[N, 48] x) => (float[N, 10] y) {
          [first] h = Gemm <transB = 1> (x, w1, b1)
          [act] r = Relu (h)
          [second] y = Gemm <transB = 1> (r, w2, b2)
        }""",
        w1=decaying(96, 48, 1),
        b1=np.linspace(-0.5, 0.5, 96, dtype=np.float32),
        w2=decaying(10, 96, 2),
        b2=np.zeros(10, np.float32),
    ).SerializeToString()


def mlp() -> ModelProto:
    """Return two Gemm of 18.4 and 3.8 kB."""
    return ModelProto.FromString(_mlp())


@cache
def _conv() -> bytes:
    return parsed(
        """<ir_version: 8, opset_import: ["" : 17]>
        conv (float[N, 3, 16, 16] x) => (float[N, 10] y) {
          [c1] a = Conv <pads = [1, 1, 1, 1]> (x, w1)
          [r1] r = Relu (a)
          [c2] b = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (r, w2, b2)
          [r2] s = Relu (b)
          [pool] p = GlobalAveragePool (s)
          [flat] f = Flatten (p)
          [fc] y = Gemm <transB = 1> (f, w3)
        }""",
        w1=decaying(32, 27, 3).reshape(32, 3, 3, 3),
        w2=decaying(48, 288, 4).reshape(48, 32, 3, 3),
        b2=np.zeros(48, np.float32),
        w3=decaying(10, 48, 5),
    ).SerializeToString()


def conv() -> ModelProto:
    """Return two Conv and a Gemm, 60 kB together."""
    return ModelProto.FromString(_conv())


def save(model: ModelProto, path: Path | str = "in.onnx") -> Path:
    """Write a model as it is."""
    path = Path(path)
    path.write_bytes(model.SerializeToString())
    return path


def save_external(model: ModelProto, path: Path | str = "in.onnx", data: str = "in.data") -> Path:
    """Write a model whose large tensors lie in a file beside it."""
    onnx.save(model, path, save_as_external_data=True, location=data, size_threshold=512)
    return Path(path)


def listing(folder: Path | str = ".") -> dict[str, str]:
    """Return sha256 by name of everything below a folder, hidden files included."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
        for p in sorted(Path(folder).rglob("*"))
    }


def onnxdp(*words: object) -> Result:
    """Run one command line in this process."""
    return CliRunner(catch_exceptions=False).invoke(main, [str(w) for w in words])


def refused(code: int, message: str, *words: object) -> None:
    """Demand this exit code, this one sentence and that no file was touched."""
    before = listing()
    done = onnxdp(*words)
    assert (done.exit_code, done.stdout, done.stderr) == (code, "", f"error: {message}\n")
    assert listing() == before
