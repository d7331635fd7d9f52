"""Export torchvision's pretrained classifiers to ONNX, for those who have torch and torchvision.

    python -m pip install torch torchvision onnx onnxscript
    python models/export_torchvision.py resnet18 vgg16 --folder exported
Torchvision downloads the weights into its own cache. Input 'input' [N, 3, 224, 224]: values 0..1, less mean
(0.485, 0.456, 0.406), over std (0.229, 0.224, 0.225). Output 'logits' [N, 1000]. Opset 17.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

NAMES = ("alexnet", "vgg16", "vgg16_bn", "resnet18", "resnet50", "googlenet", "mobilenet_v2", "squeezenet1_1")


def export(name: str, target: Path) -> None:
    """Write one pretrained classifier."""
    import torch
    import torchvision

    model = torchvision.models.get_model(name, weights="DEFAULT").eval()
    torch.onnx.export(
        model,
        (torch.zeros(1, 3, 224, 224),),
        str(target),
        input_names=["input"],
        output_names=["logits"],
        dynamic_axes={"input": {0: "N"}, "logits": {0: "N"}},
        opset_version=17,
        dynamo=False,  # the older exporter folds batch normalisation and writes one file
    )


def main() -> int:
    """Export what is named; 3 where torch is missing or the weights cannot be had."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--folder", type=Path, default=Path(), help="where to write (default: here)")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in options.names:
        target = options.folder / f"{name}.onnx"
        try:
            export(name, target)
        except ImportError as error:
            print(
                f"{name} was not exported, as {error.name} is missing: install torch and torchvision.",
                file=sys.stderr,
            )
            return 3
        except OSError as error:
            print(f"{name} was not exported: {error}; check the network and the disk.", file=sys.stderr)
            return 3
        print(f"{target}: {target.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
