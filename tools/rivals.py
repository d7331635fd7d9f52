"""What frontier.py compares with: tools in environments of their own, plain baselines, the published recipe.

Each rival is a Python program that is called with IN, OUT and, where it calibrates, an .npy of prepared
pictures; it runs in a virtual environment that holds the requirements listed here and nothing of ours.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common import say

PLAIN = Path(__file__).with_name("plain.py")

ENVIRONMENTS = {
    "shrink-ray": ("onnx-shrink-ray==0.0.11", "onnx==1.23.2", "onnxruntime==1.31.1", "numpy==2.4.6"),
    "onnxruntime": ("onnxruntime==1.31.1", "onnx==1.23.2", "onnx-ir==1.1.0", "numpy==2.4.6", "sympy==1.14.0"),
    "quantize-rs": ("quantization-rs==0.10.0", "onnx==1.23.2", "numpy==2.4.6"),
}
"""What is installed where; onnx-ir and sympy are what onnxruntime.quantization needs and does not declare."""

SHRINK_RAY = """
import pathlib, runpy, shutil, sys
source, out, *options = sys.argv[1:]
out = pathlib.Path(out)
copy = out.parent / "in.onnx"
shutil.copy(source, copy)
sys.argv = ["shrink", "--output_dir", str(out.parent), "--output_suffix", "_small.onnx", *options, str(copy)]
runpy.run_module("onnx_shrink_ray.shrink", run_name="__main__")
(out.parent / "in_small.onnx").replace(out)
"""

DYNAMIC = """
import sys
from onnxruntime.quantization import QuantType, quantize_dynamic
source, out, *types = sys.argv[1:]
options = {}
if types:
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process
    prepared = out + ".prepared"
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
    model = onnx.load(prepared)
    del model.graph.value_info[:]  # shapes of weights that it then turns make it fail
    onnx.save(model, prepared)
    source, options = prepared, {"per_channel": True, "weight_type": QuantType[types[0]]}
quantize_dynamic(source, out, **options)
"""

STATIC = """
import sys
import numpy, onnx, onnx.version_converter
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
source, out, pictures = sys.argv[1:4]
prepared = out + ".prepared"
quant_pre_process(source, prepared, skip_symbolic_shape=True)
model = onnx.load(prepared)
if next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx")) < 13:
    model = onnx.version_converter.convert_version(model, 13)  # per-channel QDQ asks for it
name = model.graph.input[0].name
class Reader(CalibrationDataReader):
    def __init__(self):
        self.feeds = iter([{name: x[None]} for x in numpy.load(pictures)])
    def get_next(self):
        return next(self.feeds, None)
quantize_static(model, out, Reader(), quant_format=QuantFormat.QDQ, per_channel=True)
"""

NBITS = """
import sys
import onnx
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
quantizer = MatMulNBitsQuantizer(onnx.load(sys.argv[1]), bits=4, block_size=32)
quantizer.process()
quantizer.model.save_model_to_file(sys.argv[2], False)
"""

HALF = """
import sys
import onnx
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel
model = OnnxModel(convert_float_to_float16(onnx.load(sys.argv[1]), keep_io_types=True))
model.topological_sort()  # it leaves its casts at the end, which ONNX's checker refuses
onnx.save(model.model, sys.argv[2])
"""

QUANTIZE_RS = """
import sys
import quantize_rs
source, out, bits, *raised = sys.argv[1:]
if raised:  # its INT4 needs opset 21, and it stamps that number without converting anything
    import onnx, onnx.version_converter
    model = onnx.load(source)
    if next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx")) < 21:
        model = onnx.version_converter.convert_version(model, 21)
    model.ir_version = max(10, model.ir_version)
    source = out + ".raised"
    onnx.save(model, source)
quantize_rs.quantize(source, out, bits=int(bits), per_channel=True, native_int4=bits == "4")
"""


@dataclass(frozen=True)
class Rival:
    """One way to make a model smaller: a program, where it runs, with what after IN and OUT."""

    name: str
    program: str
    environment: str
    options: tuple[str, ...] = ()
    calibrates: bool = False

    @property
    def requirements(self) -> tuple[str, ...]:
        """What its environment holds."""
        return ENVIRONMENTS[self.environment]

    def command(self, python: Path, source: Path, out: Path, pictures: Path | None) -> list[str | Path]:
        """Return the command that makes OUT of IN."""
        assert pictures is not None or not self.calibrates
        return [python, "-c", self.program, source, out, *([pictures] if self.calibrates else self.options)]


TOOLS = (
    Rival("shrink-ray", SHRINK_RAY, "shrink-ray"),
    Rival("shrink-ray per channel", SHRINK_RAY, "shrink-ray", ("--per-channel",)),
    Rival("quantize_dynamic", DYNAMIC, "onnxruntime"),
    Rival("quantize_dynamic uint8 per channel, prepared", DYNAMIC, "onnxruntime", ("QUInt8",)),
    Rival("quantize_static, 64 pictures", STATIC, "onnxruntime", calibrates=True),
    Rival("MatMulNBits 4 bit", NBITS, "onnxruntime"),
    Rival("float16 (onnxruntime)", HALF, "onnxruntime"),
    Rival("quantize-rs int8", QUANTIZE_RS, "quantize-rs", ("8",)),
    Rival("quantize-rs int4", QUANTIZE_RS, "quantize-rs", ("4",)),
    Rival("quantize-rs int4, opset 21 first", QUANTIZE_RS, "quantize-rs", ("4", "raised")),
)
"""Everything that people can install, each of one size."""

PLAINS = {
    "float16 weights": ("float16",),
    **{f"k-means {n}": ("tables", "--entries", str(n)) for n in (16, 8, 4)},
}
"""Baselines of plain.py of one size each; rounding is asked for the most levels that fit."""

ROUNDINGS = {"nearest, largest value": "max", "nearest, least squares": "mse"}
"""Rounding per channel by plain.py, by how scales are found."""


def python_of(environment: str, folder: Path) -> Path:
    """Return the interpreter of a rival's environment."""
    return python_with(ENVIRONMENTS[environment], folder / environment)


def python_with(requirements: Sequence[str], room: Path) -> Path:
    """Return the interpreter of an environment; made once, and again where the requirements changed."""
    stamp, wanted = room / "requirements", "\n".join(requirements)
    if not stamp.exists() or stamp.read_text() != wanted:
        say(f"installing {', '.join(requirements)} into {room}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", room], check=True)
        pip = [str(room / "bin" / "python"), "-m", "pip", "install", "-qq"]
        subprocess.run([*pip, *requirements], check=True, stdin=subprocess.DEVNULL)
        stamp.write_text(wanted)
    return room / "bin" / "python"
