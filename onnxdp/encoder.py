"""The arrays of a choice: all at once, or one weight after the other in the compressed network."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from onnxdp import model as model_file
from onnxdp.damage import Search
from onnxdp.encoding import MANY, Workshop
from onnxdp.looks import Kept, Original, last, spots
from onnxdp.network import Network
from onnxdp.planner import Choice
from onnxdp.probes import Probes
from onnxdp.records import Candidate, Encoded, Made
from onnxdp.refine import refine
from onnxdp.result import Rewriter
from onnxdp.settings import Progress, Settings

REFIT_FROM = 0.05
"""Relative output error from which refitting is tried: below, there is little for later layers to repair."""

_NEAR = 0.001
"""Share of the budget that may be left over ..."""
_LEAST = 64
"""... and bytes that always may."""

log = logging.getLogger(__name__)


def near(budget: int, share: float = _NEAR) -> float:
    """Return the bytes that may be left over of a file's budget."""
    return max(share * budget, _LEAST)


@dataclass(slots=True)
class Encoder:
    """Makes the arrays of choices of one model."""

    rewriter: Rewriter
    network: Network
    fit: Probes
    """What weights are fitted on."""
    progress: Progress
    budget: int | None
    """Bytes that the whole file may have."""
    often: bool = False
    """Whether several choices are to be encoded: for several targets, or on the way to an error."""
    _originals: dict[bool, Original] = field(default_factory=dict)
    """Whether quick -> what is kept of the network as it was."""

    @property
    def _workshop(self) -> Workshop:
        return self.rewriter.workshop

    @property
    def _settings(self) -> Settings:
        return self.rewriter.settings

    @property
    def sequential(self) -> bool:
        """Whether weights are encoded one after the other in the compressed network, whatever is chosen."""
        return self._workshop.sequential and self._settings.refit is not False

    def one_by_one(self, choice: Choice, *, quick: bool = False) -> Made:
        """Encode each weight on what the compressed network feeds it; quickly, if that is to be measured."""
        return self._refined(list(choice.candidates.values()), quick=quick)

    def quickly(self, choice: Choice) -> Made:
        """Encode as :meth:`one_by_one`, to be measured only."""
        return self.one_by_one(choice, quick=True)

    def encoded(self, candidates: Sequence[Candidate], *, refit: bool) -> Made:
        """Return the arrays of the candidates, and what the biases behind them gain."""
        if refit:
            return self._refined(candidates)
        encoded = self._workshop.encode(candidates)
        return encoded, self._workshop.shifts(encoded)

    def best(self, search: Search, choice: Choice, *, costly: bool) -> tuple[Made, bool]:
        """Encode a choice, refitted where asked for or where that helps; also return whether it was."""
        if self.sequential:
            return self.one_by_one(choice), True
        candidates = list(choice.candidates.values())
        plain = self.encoded(candidates, refit=False)
        refit = self._settings.refit
        untried = self._settings.unweighted or costly or search.meter is None
        if refit is False or (refit is None and untried):
            return plain, False
        before, error = search.measured(*plain)
        if refit is None and error < REFIT_FROM:
            return plain, False
        refitted = self.encoded(candidates, refit=True)
        after, _ = search.measured(*refitted)
        log.info("damage %.4g, refitted %.4g", before, after)
        return (refitted, True) if refit or after < before else (plain, False)

    def rest(self) -> None:
        """Let go of what is kept of the network as it was; what is asked next makes it again."""
        self._originals.clear()

    def keep(self) -> Mapping[str, Kept]:
        """Return what the original's weights put out, as far as there is room, and keep it for fitting."""
        if not self.sequential:
            return {}
        self._originals[False] = self._kept(self.fit, quick=False)
        return self._originals[False].kept

    def restore(self, known: Mapping[str, Kept]) -> None:
        """Take up what an earlier run kept."""
        once = not self.often
        self._originals[False] = Original(self._workshop, self.network, self.fit, known, once=once)

    def _refined(self, choices: Sequence[Candidate], *, quick: bool = False) -> Made:
        probes = self.fit.every(2) if quick and self.fit.samples >= MANY else self.fit
        if not quick:
            self._originals.pop(True, None)  # there is no way back
        if quick not in self._originals:
            alone = Original(self._workshop, self.network, probes)
            self._originals[quick] = self._kept(probes, quick=quick) if quick or self.often else alone
        return refine(
            self._workshop,
            self.network,
            probes,
            choices,
            self.progress,
            quick=quick,
            original=self._originals[quick],
            room=None if quick or self.budget is None else partial(self._room, choices, self.budget),
        )

    def _kept(self, probes: Probes, *, quick: bool) -> Original:
        """Run the original by itself, and keep what its weights put out."""
        order = spots(self._workshop, self.network, self._workshop.weights, quick=quick)
        original = Original(self._workshop, self.network, probes, once=not (quick or self.often))
        original.keep(last(order, probes.samples), self.progress)
        return original

    def _room(
        self, choices: Sequence[Candidate], budget: int, encoded: Sequence[Encoded]
    ) -> tuple[int, float]:
        """Return the bytes left once all choices are in the file, those encoded by now as they are."""
        done = {e.weight for e in encoded}
        rest = self._workshop.outline([c for c in choices if c.weight not in done])
        made = self.rewriter.rewritten([*encoded, *rest], self._workshop.no_shifts([*encoded, *rest]))
        return budget - model_file.output_size(made), near(budget)
