"""What has to be known before a weight is solved: what is constant, how often it is used, on which inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import numpy as np

from onnxdp import calibration, normalisation, probes, runtime, sizes, stats, weights
from onnxdp import model as model_file
from onnxdp.model import Model
from onnxdp.network import Network
from onnxdp.passes import FoldNormalisation, FreezeInitializers, ReplaceWeights
from onnxdp.probes import InputSpec, Probes
from onnxdp.records import Array, Weight
from onnxdp.settings import Settings
from onnxdp.weights import Found

COSTLY = 3_000_000_000
"""Multiply-accumulates of one sample from which fewer probes, and fewer points of a curve, have to do."""

STEADY = 400_000_000
"""... and up to which signals are chosen by how steadily the network answers them ..."""

CHOSEN = 1_000_000_000
"""... or pictures by what it answers: ResNet-18 (1.8e9) loses as much without, and saves 8 of 100 s."""

FED = 32_000_000
"""Bytes of the largest output of a weight, of all samples of a feed: runs need several times that."""

_FEW = (3e10, 24, 768)
"""Multiply-accumulates to spend on one pass over the probes, least and most of them ..."""
_MANY = (2.4e11, 128, 384)
"""... and where every weight is rounded on what they show it ..."""
_PASSED = 10
"""What a number that a node puts out counts: where many nodes do little with much, products are not all."""
_DENSE, _TIMES = 96, 4
"""... but no more than this, or so many times what gives all weights their rows: sound has many places."""


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


def probed(network: Network, found: Found, settings: Settings, *, many: bool = False) -> tuple[Found, Probes]:
    """Make the probes (``many`` where weights are encoded on them), and count what a sample costs a weight.

    Returns the weights with their positions, and the probes.
    """
    specs, positions = runtime.input_specs(network.specification), stats.counting(network, found)
    if settings.inputs is None and settings.calibrate is None:
        specs = sizes.fitted(specs, lambda feed: positions(feed, 1))
    first = _one(specs, settings)
    found = counted(found, positions(first.feeds[0], first.batch))
    macs = stats.macs(found.weights)
    work, least, most = _MANY if many and macs <= COSTLY else _FEW
    most = min(most, max(_DENSE, _TIMES * max(_needed(w) for w in found.weights)))
    usual = int(np.clip(work / max(macs + _passed(network, found), 1), min(least, most), most)) // 8 * 8
    widest = max((4 * w.positions * w.groups * w.outputs for w in found.weights), default=0)
    batch = min(probes.BATCH, max(1, FED // max(widest, 1)))
    made = probes_for(
        specs,
        settings,
        network,
        usual=usual,
        asked=macs <= COSTLY,
        chosen=macs <= CHOSEN,
        steady=macs <= STEADY,
        batch=batch,
    )
    made = made.rebatch(batch) if batch < made.batch else made
    return found, made if settings.inputs is not None else _carried(made, network)


def _passed(network: Network, found: Found) -> float:
    """Return what it counts that all nodes pass on one sample, if each did as the weights' readers do."""
    numbers = sum(w.positions * w.groups * w.outputs for w in found.weights)
    return _PASSED * numbers * len(network.proto.graph.node) / max(len(found.weights), 1)


def _needed(weight: Weight) -> int:
    """Return the samples that give the rows a weight is fitted on."""
    if weight.op in weights.TABLES:
        return 1  # it is seen whole in each
    return -(-stats.rows_wanted(weight) // max(weight.positions, 1))


def folded(model: Model, found: Found) -> tuple[Model, Found, int]:
    """Fold normalisation into the weights that were selected, and into those too small to be found.

    Returns a copy with its weights, and how many nodes went; the very model where none did. To be called
    when probes are made: what the nodes remember tells the range of pictures.
    """
    made = model_file.copy(model)
    twin, chosen = weights.find(made.ir), {w.name for w in found.weights}
    names = {w.name for w in twin.weights}
    fold = FoldNormalisation({twin.values[n] for n in names - chosen})
    fold(made.ir)
    after = weights.find(made.ir)
    if not fold.folded or {w.name for w in after.weights} != names:
        return model, found, 0
    left_out = (k for k in found.kept if k.weight in names)
    return made, replace(after, weights=found.weights, kept=(*after.kept, *left_out)), fold.folded


def counted(found: Found, positions: Mapping[str, int]) -> Found:
    """Return the weights with the output positions of one sample that each multiplies."""
    return replace(
        found, weights=tuple(replace(w, positions=positions.get(w.name, 0)) for w in found.weights)
    )


def _carried(made: Probes, network: Network) -> Probes:
    """Let recurrent states be what the run before gave: at zero no recurrent weight is ever used.

    The first feed starts at zero, and a state that no output of its shape carries on stays there.
    """
    states = [s.name for s in runtime.input_specs(network.specification) if s.kind == "state"]
    if not states:
        return made
    session = network.session(network.outputs)
    carried: dict[str, Array] = {}
    feeds = []
    for feed in made.feeds:
        feeds.append(MappingProxyType({**feed, **carried}))
        outputs = network.run(session, feeds[-1], network.outputs, {})
        arrays = (x for x in outputs.values() if isinstance(x, np.ndarray) and x.dtype.kind in "fiub")
        free = [x for x in arrays if np.isfinite(x).all()]
        carried = {}
        for name in states:
            like = (
                k for k, x in enumerate(free) if (x.shape, x.dtype) == (feed[name].shape, feed[name].dtype)
            )
            place = next(like, None)
            if place is not None:
                carried[name] = free.pop(place)
    return replace(made, feeds=tuple(feeds))


def probes_for(
    specs: Sequence[InputSpec],
    settings: Settings,
    network: Network | None = None,
    *,
    usual: int = 16,
    asked: bool = True,
    chosen: bool = True,
    steady: bool = False,
    batch: int = probes.BATCH,
) -> Probes:
    """Make probes, or load those that were given; a network tells their range and picks them.

    Beside few real inputs, made-up ones in the same range fill up to :data:`calibration.ENOUGH`. Weights of
    thousands of inputs need their number (ResNet-18, 32 real: a tenth less error with 32 more), small ones
    lose little by them (ResNet-20, 64 real: 3 % with 64 more; 11 % with 704, beside which they hardly count).
    """
    if settings.inputs is not None:
        return probes.load(settings.inputs, specs)
    samples = settings.samples or usual
    answers = network.answers() if network is not None and asked else None
    misfit = normalisation.misfit(network) if network is not None else None
    if settings.calibrate is None:
        responses = network.responses() if network is not None and steady else None
        return probes.make(
            specs,
            samples=samples,
            seed=settings.seed,
            batch=batch,
            pool=None if chosen else samples,
            answers=answers,
            misfit=misfit,
            responses=responses,
        )
    enough = settings.samples or (calibration.ENOUGH if asked else usual)
    most = max(enough, settings.samples or usual)
    real, found = calibration.load(specs, settings, most=most, answers=answers, misfit=misfit)
    if found is None or real.samples >= enough:
        return real
    missing, alike = enough - real.samples, calibration.sized(specs, real)
    made = probes.make(alike, samples=missing, seed=settings.seed, batch=batch, answers=answers, wanted=found)
    return real.join(made) if real.fits(made) else real


def _one(specs: Sequence[InputSpec], settings: Settings) -> Probes:
    """Return one sample, of the sizes that all will have."""
    if settings.inputs is not None:
        return probes.load(settings.inputs, specs)
    if settings.calibrate is not None:
        return calibration.load(specs, settings, most=1)[0]
    return probes.make(specs, samples=1, seed=settings.seed, batch=1)
