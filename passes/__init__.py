"""Passes: whatever changes a graph."""

from onnxdp.passes.channels import DropChannels
from onnxdp.passes.constants import GatherConstants
from onnxdp.passes.fold import FoldNormalisation
from onnxdp.passes.freeze import FreezeInitializers
from onnxdp.passes.lift import LiftWeights
from onnxdp.passes.replace import ReplaceWeights
from onnxdp.passes.shorten import ShortenNames

__all__ = [
    "DropChannels",
    "FoldNormalisation",
    "FreezeInitializers",
    "GatherConstants",
    "LiftWeights",
    "ReplaceWeights",
    "ShortenNames",
]
