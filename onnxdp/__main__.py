"""``python -m onnxdp`` is ``onnxdp``."""

from onnxdp.cli import main

main()
