"""Build well-known network topologies with seeded weights, for tests and measurements of scale and structure.

AlexNet, VGG-16, ResNet-18, ResNet-50, GoogLeNet (torchvision's layouts, names and parameter counts, batch
normalisation folded, no auxiliary heads) and a transformer encoder. Nothing is trained: generated.py says
what the weights are.

    python models/builders.py resnet18 resnet18.onnx
    python models/builders.py transformer small.onnx --small
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from generated import Net, Signal, generator, trained_like
from threadpoolctl import threadpool_limits


def scaled(channels: int, width: float) -> int:
    """Return a number of channels times width, at least 8."""
    return max(8, round(channels * width))


def alexnet(
    seed: int, size: int = 224, width: float = 1.0, classes: int = 1000, batch: int | str = "N"
) -> onnx.ModelProto:
    """Build torchvision's AlexNet; pictures of 224 need no adaptive pool before the classifier."""
    net = Net("alexnet", seed)
    source = x = net.picture(size, batch)
    plan = ((0, 64, 11, 4, 2, True), (3, 192, 5, 1, 2, True), (6, 384, 3, 1, 1, False))
    plan += ((8, 256, 3, 1, 1, False), (10, 256, 3, 1, 1, True))
    for index, channels, kernel, stride, pad, pooled in plan:
        x = net.conv(f"features.{index}", x, scaled(channels, width), kernel, stride, pad)
        x = net.relu(f"features.{index + 1}", x)
        x = net.max_pool(f"features.{index + 2}", x, 3, 2) if pooled else x
    return classifier(net, source, x, (1, 4, 6), scaled(4096, width), classes, batch)


def vgg16(
    seed: int, size: int = 224, width: float = 1.0, classes: int = 1000, batch: int | str = "N"
) -> onnx.ModelProto:
    """Build torchvision's VGG-16; pictures of 224 need no adaptive pool before the classifier."""
    net = Net("vgg16", seed)
    source = x = net.picture(size, batch)
    index = 0
    for channels, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            x = net.relu(
                f"features.{index + 1}", net.conv(f"features.{index}", x, scaled(channels, width), 3)
            )
            index += 2
        x = net.max_pool(f"features.{index}", x, 2, 2)
        index += 1
    return classifier(net, source, x, (0, 3, 6), scaled(4096, width), classes, batch)


def classifier(
    net: Net,
    source: Signal,
    x: Signal,
    indices: tuple[int, int, int],
    hidden: int,
    classes: int,
    batch: int | str,
) -> onnx.ModelProto:
    """Append the three fully connected layers of AlexNet and VGG-16, and finish."""
    x = net.flatten(x)
    for index in indices[:2]:
        x = net.relu(f"classifier.{index + 1}", net.linear(f"classifier.{index}", x, hidden))
    x = net.linear(f"classifier.{indices[2]}", x, classes, gain=4.0)
    return net.finish(source.tensor, x, batch)


def resnet(
    name: str,
    seed: int,
    depths: tuple[int, ...],
    bottleneck: bool,
    size: int,
    width: float,
    classes: int,
    batch: int | str,
) -> onnx.ModelProto:
    """Build a residual network."""
    net = Net(name, seed)
    source = net.picture(size, batch)
    x = net.relu("relu", net.conv("conv1", source, scaled(64, width), 7, 2))
    x = net.max_pool("maxpool", x, 3, 2, 1)
    for stage, depth in enumerate(depths):
        channels = scaled(64 * 2**stage, width)
        for index in range(depth):
            stride = 2 if stage and not index else 1
            x = block(net, f"layer{stage + 1}.{index}", x, channels, stride, bottleneck)
    return net.finish(source.tensor, net.linear("fc", net.average(x), classes, gain=4.0), batch)


def block(net: Net, name: str, x: Signal, channels: int, stride: int, bottleneck: bool) -> Signal:
    """Add one residual block; its branch adds half of the variance of the way past it."""
    outputs = 4 * channels if bottleneck else channels
    plan = [(channels, 3, stride), (outputs, 3, 1)]
    if bottleneck:
        plan = [(channels, 1, 1), (channels, 3, stride), (outputs, 1, 1)]
    y = x
    for index, (width, kernel, step) in enumerate(plan, 1):
        last, group = index == len(plan), name if bottleneck and index == 1 else ""
        y = net.conv(f"{name}.conv{index}", y, width, kernel, step, gain=0.5 if last else 1.0, group=group)
        y = y if last else net.relu(f"{name}.relu{index}", y)
    if stride != 1 or x.channels != outputs:
        x = net.conv(f"{name}.downsample.0", x, outputs, 1, stride, group=name if bottleneck else "")
    return net.relu(name, net.join(name, y, x))


def resnet18(
    seed: int, size: int = 224, width: float = 1.0, classes: int = 1000, batch: int | str = "N"
) -> onnx.ModelProto:
    """Build torchvision's ResNet-18."""
    return resnet("resnet18", seed, (2, 2, 2, 2), False, size, width, classes, batch)


def resnet50(
    seed: int, size: int = 224, width: float = 1.0, classes: int = 1000, batch: int | str = "N"
) -> onnx.ModelProto:
    """Build torchvision's ResNet-50 (the stride sits in the 3x3 convolution)."""
    return resnet("resnet50", seed, (3, 4, 6, 3), True, size, width, classes, batch)


INCEPTIONS = {  # 1x1; 3x3 reduced, 3x3; "5x5" reduced, "5x5" (3x3 in torchvision); pool projection
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}


def googlenet(
    seed: int, size: int = 224, width: float = 1.0, classes: int = 1000, batch: int | str = "N"
) -> onnx.ModelProto:
    """Build torchvision's GoogLeNet without its auxiliary heads."""
    net = Net("googlenet", seed)
    source = net.picture(size, batch)

    def unit(name: str, x: Signal, channels: int, kernel: int, stride: int = 1, group: str = "") -> Signal:
        return net.relu(
            name, net.conv(f"{name}.conv", x, scaled(channels, width), kernel, stride, group=group)
        )

    x = net.max_pool("maxpool1", unit("conv1", source, 64, 7, 2), 3, 2, ceil=True)
    x = unit("conv3", unit("conv2", x, 64, 1), 192, 3)
    x = net.max_pool("maxpool2", x, 3, 2, ceil=True)
    for key, (single, reduce3, triple, reduce5, five, pooled) in INCEPTIONS.items():
        name = f"inception{key}"
        branches = [
            unit(f"{name}.branch1", x, single, 1, group=name),
            unit(f"{name}.branch2.1", unit(f"{name}.branch2.0", x, reduce3, 1, group=name), triple, 3),
            unit(f"{name}.branch3.1", unit(f"{name}.branch3.0", x, reduce5, 1, group=name), five, 3),
            unit(f"{name}.branch4.1", net.max_pool(f"{name}.branch4.0", x, 3, 1, 1, ceil=True), pooled, 1),
        ]
        x = net.concat(name, branches)
        if key == "3b":
            x = net.max_pool("maxpool3", x, 3, 2, ceil=True)
        elif key == "4e":
            x = net.max_pool("maxpool4", x, 2, 2, ceil=True)
    return net.finish(source.tensor, net.linear("fc", net.average(x), classes, gain=4.0), batch)


def transformer(
    seed: int,
    layers: int = 4,
    width: int = 256,
    heads: int = 4,
    tokens: int = 64,
    vocabulary: int = 8192,
    classes: int = 16,
    batch: int | str = "N",
) -> onnx.ModelProto:
    """Build a pre-norm encoder over ids [batch, tokens]; q, k and v are three MatMul of the same tensor."""
    if width % heads:
        raise ValueError(f"width {width} is no multiple of heads {heads}: choose one that is")
    net = Net("transformer", seed)
    ids = gs.Variable("ids", np.int64, [batch, tokens])
    table = math.sqrt(width) * trained_like(seed, "embeddings.token", vocabulary, width)
    words = net.constant("embeddings.token.weight", table)
    place = 0.3 * generator(seed, "embeddings.position").standard_normal((tokens, width))
    position = net.constant("embeddings.position.weight", place.astype(np.float32))
    token = net.add("Gather", "embeddings.token", [words, ids], axis=0)
    x = Signal(net.add("Add", "embeddings", [token, position]), width, tokens)
    net.constant("attention.split", np.array([0, tokens, heads, width // heads], np.int64))
    net.constant("attention.merge", np.array([0, tokens, width], np.int64))
    net.constant("attention.scale", np.array((heads / width) ** 0.5, np.float32))
    for index in range(layers):
        name = f"layers.{index}"
        x = net.join(
            f"{name}.attention", x, attention(net, f"{name}.attention", norm(net, f"{name}.norm1", x))
        )
        y = net.project(f"{name}.mlp.fc1", norm(net, f"{name}.norm2", x), 4 * width)
        y = net.project(f"{name}.mlp.fc2", gelu(net, f"{name}.mlp.gelu", y), width, gain=0.5)
        x = net.join(f"{name}.mlp", x, y)
    x = norm(net, "norm", x)
    mean = net.add("ReduceMean", "pool", [x.tensor], axes=[1], keepdims=0)
    x = net.linear("head", Signal(mean, width, 1), classes, gain=4.0 * tokens**0.5)  # averages vary less
    return net.finish(ids, x, batch)


def norm(net: Net, name: str, x: Signal) -> Signal:
    """Add a LayerNormalization over the last axis."""
    draw = generator(net.seed, name)
    scale = net.constant(f"{name}.weight", np.exp(0.1 * draw.standard_normal(x.channels)).astype(np.float32))
    bias = net.constant(f"{name}.bias", (0.05 * draw.standard_normal(x.channels)).astype(np.float32))
    out = net.add("LayerNormalization", name, [x.tensor, scale, bias], axis=-1, epsilon=1e-5)
    return Signal(out, x.channels, x.size)


def gelu(net: Net, name: str, x: Signal) -> Signal:
    """Add a GELU, spelt with Erf as opset 17 has no operator for it."""
    constants = {"root": 0.5**0.5, "one": 1.0, "half": 0.5}
    root, one, half = (
        net.constant(f"gelu.{key}", np.array(value, np.float32)) for key, value in constants.items()
    )
    error = net.add("Erf", name, [net.add("Mul", f"{name}.0", [x.tensor, root])])
    gate = net.add("Mul", f"{name}.1", [net.add("Add", name, [error, one]), half])
    return replace(x, tensor=net.add("Mul", name, [x.tensor, gate]))


def attention(net: Net, name: str, x: Signal) -> Signal:
    """Add multi-head self-attention."""
    split, merge, scale = (net.variables[f"attention.{key}"] for key in ("split", "merge", "scale"))

    def head(key: str, order: list[int]) -> gs.Variable:
        vector = net.project(f"{name}.{key}", x, x.channels, gain=2.0, group=name).tensor
        return net.add(
            "Transpose", f"{name}.{key}", [net.add("Reshape", f"{name}.{key}", [vector, split])], perm=order
        )

    query, key, value = head("q", [0, 2, 1, 3]), head("k", [0, 2, 3, 1]), head("v", [0, 2, 1, 3])
    scores = net.add("Mul", f"{name}.scores", [net.add("MatMul", f"{name}.scores", [query, key]), scale])
    context = net.add("MatMul", f"{name}.context", [net.add("Softmax", name, [scores], axis=-1), value])
    context = net.add("Transpose", f"{name}.context", [context], perm=[0, 2, 1, 3])
    context = net.add("Reshape", f"{name}.context", [context, merge])
    return net.project(f"{name}.out", Signal(context, x.channels, x.size), x.channels, gain=0.5)


BUILDERS: dict[str, Callable[..., onnx.ModelProto]] = {
    "alexnet": alexnet,
    "vgg16": vgg16,
    "resnet18": resnet18,
    "resnet50": resnet50,
    "googlenet": googlenet,
    "transformer": transformer,
}
TINY = {"size": 32, "width": 0.125, "classes": 10}
SMALL: dict[str, dict[str, float]] = {name: TINY for name in BUILDERS} | {
    "alexnet": TINY | {"size": 64},  # three pools and a stride of 4 leave nothing of 32
    "transformer": {"layers": 2, "width": 64, "tokens": 16, "vocabulary": 256, "classes": 10},
}


def build(name: str, seed: int = 0, **options: object) -> onnx.ModelProto:
    """Return a model of opset 17, IR 8, with generated weights.

    Parameters
    ----------
    name : str
        One of BUILDERS.
    seed : int
        The same seed and options give the same bytes.
    **options : object
        Image networks: size (pixels), width (factor on the channels), classes, batch (a number, or a name for
        a dynamic dimension). transformer: layers, width, heads, tokens, vocabulary, classes, batch.
        small=True stands for the options SMALL[name].
    """
    if name not in BUILDERS:
        raise ValueError(f"there is no builder {name!r}: choose one of {', '.join(BUILDERS)}")
    small = SMALL[name] if options.pop("small", False) else {}
    with threadpool_limits(1):  # sums over pictures: the same bytes on any number of threads
        return BUILDERS[name](seed, **{**small, **options})


def main() -> None:
    """Write one model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=list(BUILDERS))
    parser.add_argument("out", type=Path, help="the file to write")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--small", action="store_true", help="few channels and small pictures, for tests")
    options = parser.parse_args()
    onnx.save(build(options.name, options.seed, small=options.small), options.out)
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
