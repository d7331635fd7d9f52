"""What has to be known before a weight is solved: what is constant, how often it is used, on which inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from onnxdp import probes, runtime, stats
from onnxdp.model import Model
from onnxdp.network import Network
from onnxdp.passes import FreezeInitializers, ReplaceWeights
from onnxdp.probes import Probes
from onnxdp.settings import Settings
from onnxdp.weights import Found

COSTLY = 3_000_000_000
"""Multiply-accumulates of one sample from which fewer probes, and fewer points of a curve, have to do."""


def prepare(model: Model, settings: Settings) -> list[str]:
    """Freeze initializers that are graph inputs, where rule or option says so.

    Returns what a person should know about the model.
    """
    notices = []
    if model.ir.ir_version < 4:
        notices.append(
            f"IR version {model.ir.ir_version} is raised to 4, where initializers need not be graph inputs; "
            "they are constants by rule below 4."
        )
    if ReplaceWeights.KEY in model.ir.metadata_props:
        notices.append(
            "The model was compressed by onnxdp before; losses add up, so start from the original."
        )
    FreezeInitializers(fed_too=settings.freeze_initializers)(model.ir)
    return notices


def probed(network: Network, found: Found, settings: Settings) -> tuple[Found, Probes]:
    """Make the probes, and count what one sample costs each weight.

    Returns the weights with their positions, and the probes.
    """
    specs = runtime.input_specs(network.specification)
    if settings.inputs is None:
        first = probes.make(specs, samples=1, seed=settings.seed, batch=1)
    else:
        first = probes.load(settings.inputs, specs)
    positions = stats.positions(network, found, first.feeds[0], first.batch)
    found = replace(
        found, weights=tuple(replace(w, positions=positions.get(w.name, 0)) for w in found.weights)
    )
    macs = stats.macs(found.weights)
    samples = settings.samples or int(np.clip(3e10 / max(macs, 1), 24, 768)) // 8 * 8
    asked = None if macs > COSTLY else network
    return found, probes_for(network.specification, replace(settings, samples=samples), asked)


def probes_for(proto: Any, settings: Settings, network: Network | None = None) -> Probes:
    """Make probes for a model, or load those that were given; a network picks those that it tells apart."""
    specs = runtime.input_specs(proto)
    if settings.inputs is not None:
        return probes.load(settings.inputs, specs)
    samples = settings.samples or 16
    answers = network.answers() if network is not None else None
    return probes.make(specs, samples=samples, seed=settings.seed, answers=answers)
