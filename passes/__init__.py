"""Passes: whatever changes a graph."""

from onnxdp.passes.freeze import FreezeInitializers
from onnxdp.passes.lift import LiftWeights
from onnxdp.passes.replace import ReplaceWeights

__all__ = ["FreezeInitializers", "LiftWeights", "ReplaceWeights"]
