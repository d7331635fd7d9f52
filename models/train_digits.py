"""Train the digits classifier: a wide convolutional network, kept over-parameterised on purpose.

Needs torch (the CPU build does) and scikit-learn; neither is needed to use the model:
    python -m pip install torch==2.13.0 scikit-learn onnx onnx-graphsurgeon
The network is written with onnx-graphsurgeon from the trained arrays, so no exporter has a say in the graph.
One seed gives one file on one machine and torch version (one thread, deterministic algorithms).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

HERE = Path(__file__).parent
SPLIT_SEED = 0  # fixed: every training seed is judged on the same held-out pictures
WIDTHS = ((1, 64), (64, 128), (128, 128), (128, 128))  # channels in and out of each 3x3 convolution
POOL_AFTER = 1  # 8x8 pictures become 4x4 after the second convolution


def load() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Split scikit-learn's digits: 1257 pictures to train on, 540 held out, each digit in proportion."""
    digits = load_digits()
    pictures = digits.images.astype(np.uint8)[:, None]  # [1797, 1, 8, 8], values 0 to 16
    labels = digits.target.astype(np.uint8)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=540, stratify=labels, random_state=SPLIT_SEED
    )
    return pictures[train], labels[train], pictures[test], labels[test]


def network() -> nn.Sequential:
    """Return the untrained network."""
    layers: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(WIDTHS):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        if index == POOL_AFTER:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1][1], 10))


def shifted(pictures: torch.Tensor) -> torch.Tensor:
    """Move each picture by -1, 0 or 1 pixel each way; what comes in at the edge repeats the edge."""
    padded = nn.functional.pad(pictures, (1, 1, 1, 1), mode="replicate")
    corners = torch.randint(0, 3, (len(pictures), 2)).tolist()
    return torch.stack([one[:, y : y + 8, x : x + 8] for one, (y, x) in zip(padded, corners, strict=True)])


def train(
    pictures: torch.Tensor, labels: torch.Tensor, seed: int, epochs: int, decay: float
) -> nn.Sequential:
    """Train by SGD under a cosine schedule.

    Filters decay so strongly that what they started from is forgotten (a factor exp(-sum of lr x decay));
    only the few directions that the gradients feed stay, and the wide layers end near low rank.
    """
    torch.manual_seed(seed)
    model = network()
    batch = 32
    steps = epochs * (len(labels) // batch)
    filters = [layer.weight for layer in model if isinstance(layer, nn.Conv2d)]
    others = [p for p in model.parameters() if all(p is not weight for weight in filters)]
    groups = [{"params": filters, "weight_decay": decay}, {"params": others, "weight_decay": 5e-4}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(epochs):
        order = torch.randperm(len(labels))
        total = 0.0
        for start in range(0, len(labels) - batch + 1, batch):
            chosen = order[start : start + batch]
            loss = nn.functional.cross_entropy(
                model(shifted(pictures[chosen])), labels[chosen], label_smoothing=0.05
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1:3} of {epochs}  loss {total * batch / len(labels):.4f}", flush=True)
    return model.eval()


def to_onnx(model: nn.Sequential, doc: str, metadata: dict[str, str]) -> onnx.ModelProto:
    """Write the trained network as opset 17, IR 8: Conv, BatchNormalization, Relu, pools and a Gemm."""
    picture = gs.Variable("image", np.float32, ["N", 1, 8, 8])
    logits = gs.Variable("logits", np.float32, ["N", 10])
    nodes: list[gs.Node] = []

    def add(op: str, name: str, inputs: list[gs.Tensor], **attributes: object) -> gs.Variable:
        out = gs.Variable(f"{name}_out")
        nodes.append(gs.Node(op, name, attributes, inputs, [out]))
        return out

    def constants(module: nn.Module, prefix: str, *names: str) -> list[gs.Tensor]:
        state = module.state_dict()
        return [gs.Constant(f"{prefix}.{name}", state[name].numpy().copy()) for name in names]

    value, count = picture, 0
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            count += 1
            weights = constants(layer, f"conv{count}", "weight")
            value = add(
                "Conv", f"conv{count}", [value, *weights], kernel_shape=[3, 3], pads=[1] * 4, strides=[1, 1]
            )
        elif isinstance(layer, nn.BatchNorm2d):
            statistics = constants(layer, f"bn{count}", "weight", "bias", "running_mean", "running_var")
            value = add("BatchNormalization", f"bn{count}", [value, *statistics], epsilon=layer.eps)
        elif isinstance(layer, nn.ReLU):
            value = add("Relu", f"relu{count}", [value])
        elif isinstance(layer, nn.MaxPool2d):
            value = add("MaxPool", f"pool{count}", [value], kernel_shape=[2, 2], strides=[2, 2])
        elif isinstance(layer, nn.AdaptiveAvgPool2d):
            value = add("GlobalAveragePool", "average", [value])
        elif isinstance(layer, nn.Flatten):
            value = add("Flatten", "flatten", [value], axis=1)
        else:
            nodes.append(
                gs.Node(
                    "Gemm", "fc", {"transB": 1}, [value, *constants(layer, "fc", "weight", "bias")], [logits]
                )
            )
    graph = gs.Graph(nodes, [picture], [logits], name="digits", opset=17)
    proto = gs.export_onnx(graph, ir_version=8)
    proto.producer_name, proto.producer_version, proto.doc_string = "onnxdp models/train_digits.py", "1", doc
    for key, text in metadata.items():
        proto.metadata_props.add(key=key, value=text)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def main() -> None:
    """Train, judge on the held-out pictures, and write the model and those pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="training seed (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=60, help="default: %(default)s")
    parser.add_argument(
        "--decay", type=float, default=3e-2, help="weight decay of the filters (default: %(default)s)"
    )
    parser.add_argument("--model", type=Path, default=HERE / "digits.onnx", help="default: %(default)s")
    parser.add_argument(
        "--pictures", type=Path, default=HERE / "digits_test.npz", help="default: %(default)s"
    )
    options = parser.parse_args()

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    pictures, labels, test_pictures, test_labels = load()
    mean = np.float32((pictures / 16).mean())
    std = np.float32((pictures / 16).std())

    def standardised(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy((values.astype(np.float32) / 16 - mean) / std)

    model = train(
        standardised(pictures), torch.from_numpy(labels).long(), options.seed, options.epochs, options.decay
    )
    with torch.no_grad():
        right = int((model(standardised(test_pictures)).argmax(1).numpy() == test_labels).sum())
    accuracy = f"{100 * right / len(test_labels):.2f}"
    doc = (
        "Digits 0 to 9 from 8x8 grey pictures (scikit-learn's load_digits, values 0 to 16). "
        f"Input: (pixel / 16 - {mean:.8g}) / {std:.8g}. Output: logits. Over-parameterised on purpose."
    )
    metadata = {
        "training_seed": str(options.seed),
        "training_epochs": str(options.epochs),
        "weight_decay": str(options.decay),
        "torch": torch.__version__,
        "split": f"train_test_split(test_size=540, stratify=labels, random_state={SPLIT_SEED})",
        "accuracy_percent": accuracy,
        "license": "Apache-2.0",
    }
    onnx.save(to_onnx(model, doc, metadata), options.model)
    np.savez_compressed(options.pictures, pictures=test_pictures, labels=test_labels, mean=mean, std=std)
    print(f"{options.model}: {options.model.stat().st_size / 1e6:.2f} MB, {accuracy} % of {len(test_labels)}")


if __name__ == "__main__":
    main()
