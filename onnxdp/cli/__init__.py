"""The command line: what it takes, what it calls, how it ends."""

from onnxdp.cli.commands import main

__all__ = ["main"]
