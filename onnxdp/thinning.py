"""Make the network narrower before its weights are stored: channels that it can do without go.

Which ones pays by the target: the numbers that go leave more bits to the others.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from onnxdp import arrays, weights
from onnxdp import model as model_file
from onnxdp.channels import chains, shapes_of
from onnxdp.errors import PlanError
from onnxdp.meter import Meter
from onnxdp.model import Model
from onnxdp.network import Network
from onnxdp.passes import DropChannels
from onnxdp.probes import Probes
from onnxdp.pruning import Dropped, Fit, Pruner
from onnxdp.records import Pruned
from onnxdp.settings import Progress, Settings
from onnxdp.weights import Found

MOST_BITS = 5.0
"""Bits that the target leaves each number from which no channel goes unasked."""
ROUNDING = (1.22, 1.75)
"""Share a 2^(-b bits) of the variance that rounding to few levels leaves of normal numbers: a, b."""
TRUST = (20.0, 3.0)
"""What the damage of lost channels counts, on made-up probes and beside real ones: pictures need channels
that dead leaves do not show (VGG, 4 to 22 % of the numbers gone: 17 to 23 times; ResNet-20, 13 %: 2.6)."""
ERROR_SHARE = 0.05
"""Share of the square of the allowed output error that lost channels may take."""
NOTHING = 1e-3
"""Relative error of the held-out outputs up to which channels that seemed dead were."""
WORTH = 0.005
"""Share of the numbers below which nothing goes."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Option:
    """Channels that could go together, and what that does, measured on held-out probes."""

    dropped: Dropped
    share: float
    damage: float
    error: float
    loss: float


@dataclass(frozen=True, slots=True)
class Effect:
    """Channels that are out, readers fitted one after the other, and what that does to the outputs."""

    fit: Fit
    damage: float
    error: float


@dataclass(frozen=True, slots=True)
class Thinned:
    """A network with fewer channels.

    Attributes
    ----------
    model : Model
        Path, bytes and digest are the original's.
    found : Found
    network : Network
    notice : str
        What went, as a sentence.
    """

    model: Model
    found: Found
    network: Network
    notice: str


class Thinner:
    """What is known of the channels of one network.

    Parameters
    ----------
    model : Model
        Not changed.
    found : Found
    network : Network
    fit, held_out : Probes
    settings : Settings
    progress : callable
    """

    def __init__(
        self,
        model: Model,
        found: Found,
        network: Network,
        fit: Probes,
        held_out: Probes,
        settings: Settings,
        progress: Progress,
    ) -> None:
        self._model = model
        self._found = found
        self.network = network
        self._held_out = held_out
        self._shapes = shapes_of(network.proto)
        mine = chains(found, self._shapes)
        self._pruner = Pruner(network, found, fit, mine, seed=settings.seed, progress=progress)
        self._options: list[Option] | None = None
        self._dead: Dropped | None = None
        self._fitted: Effect | None = None
        made_up = held_out.seed is not None and not held_out.parts
        self._trust = TRUST[0] if made_up else TRUST[1]

    def wanted(self, settings: Settings, bits: float) -> bool:
        """Whether channels may go: asked for, or the target is so small that it may pay."""
        if settings.prune is not None or settings.method not in ("auto", "quant") or not self._pruner.chains:
            return bool(settings.prune) and bool(self._pruner.chains)
        return settings.error_target is not None or bits < MOST_BITS

    def choose(self, settings: Settings, bits: float) -> Dropped:
        """Return the channels whose going is worth what it saves, under a target; unasked, dead ones only.

        Parameters
        ----------
        settings : Settings
        bits : float
            What the target leaves each number.
        """
        if not self.wanted(settings, bits):
            return {}
        if not settings.prune:
            return self._dead_ones()
        if self._options is None:
            with arrays.one_blas_thread():
                self._options = self._measured()
        limit = settings.error_target
        if limit is not None:
            allowed = [o for o in self._options if o.error**2 <= ERROR_SHARE * limit**2]
            best = max(allowed, key=lambda o: o.share)
        else:
            rounding = self._rate() * self._pruner.coarseness()
            log.info("%.2f bits a number, whose rounding does %.3g", bits, rounding * _left(bits))
            best = min(self._options, key=lambda o: self._trust * o.damage + rounding * _left(_bits(o, bits)))
        if best.share < self._pruner.share(self._dead_ones()):
            return self._dead_ones()
        return best.dropped if best.share >= WORTH else {}

    @property
    def dead(self) -> Dropped | None:
        """The channels without which nothing changes; None where nobody looked."""
        return self._dead

    def restore(self, dead: Dropped | None, effect: Effect | None) -> None:
        """Take up what an earlier run found."""
        self._dead, self._fitted = dead, effect

    def _dead_ones(self) -> Dropped:
        """Return the channels without which nothing changes, if they are worth it; measured once."""
        if self._dead is None:
            with arrays.one_blas_thread():
                dead = self._pruner.dead()
                worth = self._pruner.share(dead) >= WORTH
            self._dead = dead if worth and self.effect(dead).error <= NOTHING else {}
        return self._dead

    def effect(self, dropped: Dropped) -> Effect:
        """Take channels out and measure that; what was asked last is kept: it is mostly what goes."""
        if self._fitted is None or self._fitted.fit.dropped != dropped:
            with arrays.one_blas_thread():
                fit = self._pruner.fitted(dropped)
            damage, error = self._meter().together(fit.changes(self.network, self._found))
            self._fitted = Effect(fit, damage, error)
        return self._fitted

    def _rate(self) -> float:
        """Return the damage at the outputs for each unit of relative loss within, as lost channels do it."""
        measured = [o for o in self._options or () if o.loss > 0]
        last = max(measured, key=lambda o: (o.damage < 0.1, o.loss), default=None)
        return last.damage / last.loss if last is not None else 1.0

    def check(self, pruned: Sequence[Pruned]) -> Dropped:
        """Return the channels that a plan names.

        Raises
        ------
        PlanError
            They cannot go.
        """
        known = {c.weight: c for c in self._pruner.chains}
        dropped: dict[str, tuple[int, ...]] = {}
        for p in pruned:
            chain = known.get(p.weight)
            if chain is None:
                raise PlanError(
                    f"The plan takes channels from {p.weight!r}, whose outputs cannot go; "
                    "write it again with 'onnxdp plan'."
                )
            if p.weight in dropped or sorted(set(p.channels)) != list(p.channels):
                raise PlanError(f"The plan takes channels from {p.weight} twice, or in disorder; mend that.")
            if any(not 0 <= c < chain.channels for c in p.channels):
                raise PlanError(f"{p.weight} makes the channels 0 to {chain.channels - 1}; correct the plan.")
            if len(p.channels) > (most := self._pruner.most(chain)):
                raise PlanError(
                    f"The plan takes {len(p.channels)} channels from {p.weight}, of which at most {most} can "
                    "go; leave it more."
                )
            dropped[p.weight] = tuple(p.channels)
        return {n: c for n, c in dropped.items() if c}

    def thinned(self, effect: Effect, settings: Settings) -> Thinned:
        """Return the network without some channels, what reads them fitted again."""
        fit, dropped = effect.fit, effect.fit.dropped
        self._fitted = None  # large
        made = model_file.copy(self._model)
        twin = replace(weights.find(made.ir), weights=self._found.weights)
        DropChannels(twin, self._shapes, fit.dropped, fit.tensors, fit.shifts)(made.ir)
        found = weights.select(weights.find(made.ir), settings.include, settings.exclude)
        positions = {w.name: w.positions for w in self._found.weights}
        found = replace(found, weights=tuple(replace(w, positions=positions[w.name]) for w in found.weights))
        many, all_ = (_count(dropped), sum(c.channels for c in self._pruner.chains))
        share = self._pruner.share(dropped)
        log.info("%d of %d channels, %.4f of the numbers: damage %.3g", many, all_, share, effect.damage)
        notice = (
            f"Of {all_:,} inner channels {many:,} went, {share:.1%} of the weights' numbers, "
            f"which changes the outputs by {effect.error:.2g}; give --no-prune to keep them."
        )
        return Thinned(made, found, Network(made, found), notice)

    def _measured(self) -> list[Option]:
        """Measure what each level does."""
        meter = self._meter()
        options = [Option({}, 0.0, 0.0, 0.0, 0.0)]
        for fit in self._pruner.candidates():
            if fit.dropped != options[-1].dropped:
                damage, error = meter.together(fit.changes(self.network, self._found))
                share = self._pruner.share(fit.dropped)
                log.info(
                    "%d channels less, %.4f of the numbers: loss %.3g, damage %.3g",
                    _count(fit.dropped),
                    share,
                    fit.loss,
                    damage,
                )
                options.append(Option(fit.dropped, share, damage, error, fit.loss))
        return options

    def _meter(self) -> Meter:
        return Meter(self.network, self._held_out)


def _left(bits: float) -> float:
    """Return the share of the variance that rounding leaves."""
    return ROUNDING[0] * math.exp2(-ROUNDING[1] * bits)


def _bits(option: Option, bits: float) -> float:
    """Return what the target leaves each number that an option leaves."""
    return bits / max(1 - option.share, 0.01)


def _count(dropped: Dropped) -> int:
    return sum(map(len, dropped.values()))
