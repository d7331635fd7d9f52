"""Generated weights that look trained, and the net that carries them into an ONNX graph.

A weight is a matrix with singular values i^-alpha (alpha is drawn per weight from 0.5 to 0.8), exactly
orthogonal factors made of random signs and Hartley transforms (no matrix product, no SVD), and a scale per
output channel. In a group (branches that read one tensor, q/k/v) every other input direction is common.

A few generated pictures travel along while a net is built. Each layer is scaled to the variance that it
should have on them, and its bias takes the mean out of every channel, as a folded batch normalisation does:
the outputs of deep nets stay finite and follow the input.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs

Array = np.ndarray
ALPHA = (0.5, 0.8)  # range of the exponents of the spectra
CHANNEL_SPREAD = 0.25  # standard deviation of the logarithm of the scale of an output channel
CHUNK = 1 << 20  # numbers transformed at a time
SAMPLES = 6  # pictures that travel along


def mix(matrix: Array, axis: int, rng: np.random.Generator) -> None:
    """Multiply in place by a random orthogonal matrix along an axis: signs, Hartley transform, twice.

    Parameters
    ----------
    matrix : Array
        float32 [rows, columns].
    axis : int
        0 mixes the rows, 1 the columns.
    rng : np.random.Generator
        Draws the signs.
    """
    length = matrix.shape[axis]
    lines = matrix if axis == 1 else matrix.T  # mixed along the last axis
    signs = rng.choice(np.array([-1, 1], np.float32), (2, length))
    step = max(1, CHUNK // length)
    for start in range(0, len(lines), step):
        block = lines[start : start + step]
        for sign in signs:
            wave = np.fft.rfft(block * sign, axis=1)
            real, imaginary = wave.real, wave.imag
            half = real.shape[1]
            hartley = np.empty(block.shape, np.float32)
            hartley[:, :half] = real - imaginary
            tail = length - half
            hartley[:, half:] = (real + imaginary)[:, tail:0:-1]
            block = hartley / np.float32(math.sqrt(length))
        lines[start : start + step] = block


def decaying(
    outputs: int,
    inputs: int,
    alpha: float,
    left: np.random.Generator,
    right: np.random.Generator,
    own: np.random.Generator | None = None,
) -> Array:
    """Return a matrix with singular values i^-alpha and random orthogonal factors.

    Parameters
    ----------
    outputs, inputs : int
        Its shape.
    alpha : float
        Exponent of the spectrum.
    left, right : np.random.Generator
        Draw the factor on the side of the outputs, and of the inputs.
    own : np.random.Generator, optional
        Mixes every other direction of the inputs before `right` does: matrices with equal `right` and
        different `own` have half of their input directions in common, in the same order.

    Returns
    -------
    Array
        float32 [outputs, inputs].
    """
    rank = min(outputs, inputs)
    matrix = np.zeros((outputs, inputs), np.float32)
    matrix[np.arange(rank), np.arange(rank)] = np.arange(1, rank + 1, dtype=np.float64) ** -alpha
    if own is not None:
        mix(matrix[:rank, 1::2], 1, own)
    if outputs <= inputs and own is None:  # first the side on which all but `rank` lines are still zero
        mix(matrix[:, :rank], 0, left)
        mix(matrix, 1, right)
    else:
        mix(matrix[:rank], 1, right)
        mix(matrix, 0, left)
    return matrix


def generator(seed: int, *names: str) -> np.random.Generator:
    """Return the generator of one purpose: it depends on the seed and the names, not on the calls' order."""
    return np.random.default_rng([seed, zlib.crc32("/".join(names).encode())])


def trained_like(seed: int, name: str, outputs: int, inputs: int, group: str = "") -> Array:
    """Return a weight whose outputs have variance one on white inputs: float32 [outputs, inputs]."""
    left, right = generator(seed, name, "left"), generator(seed, name, "right")
    draw = generator(seed, name, "scales")
    alpha = float(draw.uniform(*ALPHA))
    common = generator(seed, group, "common")
    matrix = decaying(outputs, inputs, alpha, left, *((common, right) if group else (right,)))
    scale = np.exp(CHANNEL_SPREAD * draw.standard_normal(outputs))
    length = np.sqrt(np.einsum("ij,ij->i", matrix, matrix, optimize=False).astype(np.float64))
    scale /= math.sqrt(float(np.mean((scale * length) ** 2)))
    matrix *= scale.astype(np.float32)[:, None]
    return matrix


def clouds(seed: int, count: int, size: int) -> Array:
    """Return pictures with a photograph's 1/f amplitudes: float32 [count, 3, size, size], variance one."""
    white = generator(seed, "clouds").standard_normal((count, 3, size, size))
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    pictures = np.fft.irfft2(np.fft.rfft2(white) / np.maximum(frequency, 1 / size), s=(size, size))
    return (pictures / pictures.std(axis=(1, 2, 3), keepdims=True)).astype(np.float32)


def windows(x: Array, kernel: int, stride: int, pad: int, fill: float, size: int) -> Array:
    """Return a picture's windows [..., size, size, kernel, kernel], padded as far as the last one needs."""
    beyond = max(0, (size - 1) * stride + kernel - pad - x.shape[-1])
    edges = [(0, 0)] * (x.ndim - 2) + [(pad, beyond)] * 2
    padded = np.pad(x, edges, constant_values=fill)
    views = np.lib.stride_tricks.sliding_window_view(padded, (kernel, kernel), axis=(-2, -1))
    return views[..., ::stride, ::stride, :, :][..., :size, :size, :, :]


@dataclass(frozen=True)
class Signal:
    """A tensor under way: its variable, channels, height (= width), and values on the travelling pictures."""

    tensor: gs.Variable
    channels: int
    size: int
    sample: Array | None = None  # [pictures, channels, size, size] or [pictures, channels]


class Net:
    """Collects nodes, and fills a model with weights as they are made: each value lies in memory once."""

    def __init__(self, name: str, seed: int) -> None:
        self.name, self.seed = name, seed
        self.nodes: list[gs.Node] = []
        self.variables: dict[
            str, gs.Variable
        ] = {}  # the initializers as graphsurgeon sees them: without values
        self.model = onnx.ModelProto()

    def add(self, op: str, name: str, inputs: list[gs.Tensor], **attributes: object) -> gs.Variable:
        """Append a node named after the module that it stands for."""
        path = f"/{name.replace('.', '/')}/{op}"
        out = gs.Variable(f"{path}_output_0")
        self.nodes.append(gs.Node(op, path, attributes, inputs, [out]))
        return out

    def constant(self, name: str, values: Array) -> gs.Variable:
        """Store an initializer once, in place: a list of tensors is copied twice on its way to a model."""
        if name not in self.variables:
            tensor = self.model.graph.initializer.add()
            tensor.name, tensor.data_type = name, onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
            tensor.dims.extend(values.shape)
            tensor.raw_data = values.tobytes()
            self.variables[name] = gs.Variable(name)
        return self.variables[name]

    def picture(self, size: int, batch: int | str) -> Signal:
        """Return the graph input of an image classifier."""
        tensor = gs.Variable("input", np.float32, [batch, 3, size, size])
        return Signal(tensor, 3, size, clouds(self.seed, SAMPLES, size))

    def settle(self, name: str, matrix: Array, result: Array, gain: float) -> tuple[Array, Array]:
        """Scale a weight in place until its result has variance gain; return its bias and that result."""
        axes = (0, *range(2, result.ndim))
        mean = result.mean(axis=axes, dtype=np.float64)
        shape = (1, -1) + (1,) * (result.ndim - 2)
        variance = np.square(result - mean.astype(np.float32).reshape(shape)).mean(dtype=np.float64)
        scale = math.sqrt(gain / float(variance))
        matrix *= np.float32(scale)
        beta = 0.1 * generator(self.seed, name, "bias").standard_normal(len(mean))
        bias = (beta - scale * mean).astype(np.float32)
        result *= np.float32(scale)
        result += bias.reshape(shape)
        return bias, result

    def conv(
        self,
        name: str,
        x: Signal,
        channels: int,
        kernel: int,
        stride: int = 1,
        pad: int | None = None,
        gain: float = 1.0,
        group: str = "",
    ) -> Signal:
        """Add a square convolution with bias; gain is the variance of its result."""
        pad = kernel // 2 if pad is None else pad
        size = (x.size + 2 * pad - kernel) // stride + 1
        matrix = trained_like(self.seed, name, channels, x.channels * kernel**2, group)
        result = np.empty((len(x.sample), channels, size, size), np.float32)
        for picture, out in zip(
            x.sample, result, strict=True
        ):  # one at a time: columns are kernel^2 pictures
            columns = windows(picture, kernel, stride, pad, 0.0, size).transpose(0, 3, 4, 1, 2)
            out[...] = (matrix @ columns.reshape(matrix.shape[1], -1)).reshape(out.shape)
        bias, sample = self.settle(name, matrix, result, gain)
        weights = [
            self.constant(f"{name}.weight", matrix.reshape(channels, x.channels, kernel, kernel)),
            self.constant(f"{name}.bias", bias),
        ]
        window = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [pad] * 4}
        out = self.add("Conv", name, [x.tensor, *weights], **window, dilations=[1, 1], group=1)
        return Signal(out, channels, size, sample)

    def linear(self, name: str, x: Signal, outputs: int, gain: float = 1.0) -> Signal:
        """Add a Gemm with torch's layout: weight [outputs, inputs], transB."""
        matrix = trained_like(self.seed, name, outputs, x.channels)
        bias, sample = np.zeros(outputs, np.float32), None
        if x.sample is None:
            matrix *= np.float32(math.sqrt(gain))
        else:
            bias, sample = self.settle(name, matrix, x.sample @ matrix.T, gain)
        weights = [self.constant(f"{name}.weight", matrix), self.constant(f"{name}.bias", bias)]
        out = self.add("Gemm", name, [x.tensor, *weights], transB=1, alpha=1.0, beta=1.0)
        return Signal(out, outputs, 1, sample)

    def project(self, name: str, x: Signal, outputs: int, gain: float = 1.0, group: str = "") -> Signal:
        """Add a MatMul with weight [inputs, outputs], its bias an Add; gain is for inputs of variance one."""
        matrix = math.sqrt(gain) * trained_like(self.seed, name, outputs, x.channels, group)
        beta = 0.1 * generator(self.seed, name, "bias").standard_normal(outputs)
        product = self.add("MatMul", name, [x.tensor, self.constant(f"{name}.weight", matrix.T)])
        bias = self.constant(f"{name}.bias", beta.astype(np.float32))
        return Signal(self.add("Add", name, [bias, product]), outputs, x.size)

    def relu(self, name: str, x: Signal) -> Signal:
        """Add a ReLU."""
        return replace(x, tensor=self.add("Relu", name, [x.tensor]), sample=np.maximum(x.sample, 0))

    def max_pool(
        self, name: str, x: Signal, kernel: int, stride: int, pad: int = 0, ceil: bool = False
    ) -> Signal:
        """Add a max pool."""
        window = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [pad] * 4}
        out = self.add("MaxPool", name, [x.tensor], **window, ceil_mode=int(ceil))
        rest = x.size + 2 * pad - kernel
        size = (-(-rest // stride) if ceil else rest // stride) + 1
        sample = windows(x.sample, kernel, stride, pad, -np.inf, size).max(axis=(-2, -1))
        return Signal(out, x.channels, size, sample)

    def join(self, name: str, x: Signal, y: Signal) -> Signal:
        """Add two branches."""
        sample = None if x.sample is None else x.sample + y.sample
        return replace(x, tensor=self.add("Add", name, [x.tensor, y.tensor]), sample=sample)

    def concat(self, name: str, parts: list[Signal]) -> Signal:
        """Concatenate branches along the channels."""
        out = self.add("Concat", name, [part.tensor for part in parts], axis=1)
        sample = np.concatenate([part.sample for part in parts], axis=1)
        return Signal(out, sample.shape[1], parts[0].size, sample)

    def average(self, x: Signal) -> Signal:
        """Average over the picture."""
        out = self.add("Flatten", "flatten", [self.add("GlobalAveragePool", "avgpool", [x.tensor])], axis=1)
        return Signal(out, x.channels, 1, x.sample.mean(axis=(2, 3)))

    def flatten(self, x: Signal) -> Signal:
        """Flatten channels and picture into one row."""
        out = self.add("Flatten", "flatten", [x.tensor], axis=1)
        return Signal(out, x.channels * x.size**2, 1, x.sample.reshape(len(x.sample), -1))

    def finish(self, source: gs.Variable, result: Signal, batch: int | str) -> onnx.ModelProto:
        """Put the nodes beside the weights and return the model."""
        output = result.tensor
        output.name, output.dtype, output.shape = "logits", np.float32, [batch, result.channels]
        graph = gs.Graph(self.nodes, [source], [output], name=self.name, opset=17)
        self.model.MergeFrom(gs.export_onnx(graph, ir_version=8))
        self.model.producer_name, self.model.producer_version = "onnxdp models/builders.py", "1"
        self.model.doc_string = f"{self.name} topology, weights generated from seed {self.seed}: not trained."
        return self.model
