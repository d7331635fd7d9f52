"""One model through all stages: read, prepare, find, probe, solve, choose, encode, rewrite, verify, write."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from onnxdp import analysis as analyses
from onnxdp import arrays, guard, preparation, reasons, runtime, stats, terms, weights
from onnxdp import budget as budgets
from onnxdp import model as model_file
from onnxdp.analysis import Analysis
from onnxdp.budget import Budget
from onnxdp.damage import Search
from onnxdp.encoder import Encoder
from onnxdp.encoding import Workshop
from onnxdp.errors import PlanError, TargetError
from onnxdp.meter import Meter
from onnxdp.methods.form import forms_for
from onnxdp.model import Model
from onnxdp.network import Network
from onnxdp.passes import ShortenNames
from onnxdp.planner import Choice, Operations
from onnxdp.probes import LOUD, Probes
from onnxdp.pruning import Dropped
from onnxdp.records import (
    Candidate,
    Encoded,
    File,
    Macs,
    Made,
    Named,
    Plan,
    Pruned,
    Report,
    Verification,
)
from onnxdp.result import Rewriter, file_of, lines_of, verified, versions
from onnxdp.settings import Progress, Settings
from onnxdp.thinning import Effect, Thinner
from onnxdp.tolerance import file_error, within_error, within_error_encoded
from onnxdp.weights import Found

FIT_SHARE = 0.75
"""Share of the probes that weights are fitted on; damage is measured on the others."""

ALIKE = 0.01
"""How far outputs have to be apart, over their size, for errors measured on them to tell what weights do."""

MILD = 0.1
"""Local error that no weight goes beyond where they do not and an output error is asked for: some 4 bits."""

HUNTED = 100_000_000
"""Multiply-accumulates of one sample from which fewer measurements do where an error is asked for.

A choice is encoded and measured as a whole many times then, and that corrects what was foreseen.
"""

_FITTED = 5
"""Times that another choice is made where arrays take more than was foreseen; the last is the smallest."""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Job:
    """One model on its way through the stages."""

    original: Model
    """As it was read."""
    whole: Found
    """The original's weights."""
    thinner: Thinner
    dropped: Dropped
    """Channels that the model went on without, which ``encoder`` and its ``rewriter`` hold."""
    encoder: Encoder
    held_out: Probes
    device: str
    notices: list[str]
    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)
    _encoded: Made | None = None
    _rewritten: Model | None = None
    """What these give, where that was asked for already."""
    _meter: Meter | None = None
    _counted: Operations | None = None
    _measured: dict[Named, float] = field(default_factory=dict)

    @classmethod
    def start(
        cls,
        source: Any,
        settings: Settings,
        progress: Progress,
        *,
        also: Sequence[Settings] = (),
        plan: Plan | None = None,
        target: str | os.PathLike[str] | None = None,
    ) -> Job:
        """Read, prepare, find, probe and solve; once for the targets of further settings, too.

        What channels go a plan says, where there is one; the name of the ``target`` counts among its bytes.
        """
        started = time.perf_counter()
        seconds: dict[str, float] = {}
        runtime.onnxruntime()
        device = arrays.resolve_device(settings.device)
        known = None if settings.analysis is None else Analysis.read(settings.analysis)
        forms = forms_for(settings.method, lighter=settings.macs is not None)
        progress("reading", 0, 1, "")
        with _clock(seconds, "reading"):
            model = model_file.read(source)
            model.target = None if target is None else Path(target)
            if plan is not None and plan.model_sha256 != model.sha256:
                raise PlanError(
                    "The plan was made for another model (its sha256 differs); make one with 'onnxdp plan'."
                )
            notices = preparation.prepare(model, settings)
            if known is not None:
                known.check(model.sha256, settings)
            found = weights.select(weights.find(model.ir), settings.include, settings.exclude)
            if not found.weights:
                raise TargetError(f"Nothing to gain: {budgets.why_nothing(found)}.")
            guard.finite(
                model.ir, {id(weights.constant(found.values[w.name])): w.name for w in found.weights}
            )
        with _clock(seconds, "probes"):
            network = Network(model, found)
            sequential = any(f.sequential for f in forms)
            if known is not None:
                found, fit, held_out = preparation.counted(found, known.positions), known.fit, known.held_out
            else:
                progress("making probe inputs", 0, 1, "")
                found, made = preparation.probed(network, found, settings, many=sequential)
                fit, held_out = made.split(FIT_SHARE)
                del made  # large
        if fit.source == LOUD:
            notices.append(
                "Made-up pictures are numbers of 0 to 255 about their mean, because standardised ones get "
                "alike answers; if the network takes others, give some with --calibrate or --inputs."
            )
        original, whole = model, found
        with _clock(seconds, "pruning"):
            thinner = Thinner(model, found, network, fit, held_out, settings, progress)
            if known is not None:
                thinner.restore(known.dead, known.effect)
            bits = budgets.bits_left(model, whole, found, settings)
            dropped = thinner.check(plan.pruned) if plan is not None else thinner.choose(settings, bits)
            effect = thinner.effect(dropped) if dropped else None
            if effect is not None:
                thinned = thinner.thinned(effect, settings)
                model, found, network = thinned.model, thinned.found, thinned.network
                notices.append(thinned.notice)
            if settings.save_analysis is None:
                effect = None  # large
            if sequential:
                model, found, folded = preparation.folded(model, found)
                network = Network(model, found) if folded else network
        bits, *more = (budgets.bits_left(original, whole, found, s) for s in (settings, *also))
        more += analyses.BITS if settings.save_analysis is not None else ()
        opset = model.ir.opset_imports.get("", 1)
        workshop = Workshop(found, forms, settings, device=device, bits=bits, also=tuple(more), opset=opset)
        if known is not None and not known.is_of(dropped):
            known = None  # what it solved and measured is of other weights
        with _clock(seconds, "solving"):
            if known is not None:
                workshop.restore(known.solved)
            workshop.solve(network, fit, progress)
        rewriter = Rewriter(model, found, workshop, settings, network.decisions, network.noisy)
        budget = settings.budget(model.nbytes) if plan is None else plan.budget
        often = bool(also) or (settings.error_target is not None and plan is None)
        job = cls(
            original,
            whole,
            thinner,
            dropped,
            Encoder(rewriter, network, fit, progress, budget, often=often),
            held_out,
            device,
            notices,
            seconds,
            started,
            _measured={} if known is None else dict(known.damages),
        )
        if known is not None:
            job.encoder.restore(known.kept)
        if settings.save_analysis is not None:
            with _clock(seconds, "analysing"):
                job._analysed(effect, bits).write(settings.save_analysis)
        return job

    @property
    def rewriter(self) -> Rewriter:
        """What writes the file, and knows the model that is compressed, its weights and the settings."""
        return self.encoder.rewriter

    @property
    def workshop(self) -> Workshop:
        """What solves and encodes the weights."""
        return self.rewriter.workshop

    @property
    def settings(self) -> Settings:
        """What is asked for."""
        return self.rewriter.settings

    def _analysed(self, effect: Effect | None, bits: float) -> Analysis:
        """Measure what further targets would, and return all that is known by then."""
        for ahead in analyses.MEASURED:
            self.workshop.aim(ahead)
            search = self._search()
            search.scan()
        self.workshop.aim(bits)
        return Analysis(
            self.original.sha256,
            analyses.deciding(self.settings),
            self.encoder.fit,
            self.held_out,
            {w.name: w.positions for w in self.whole.weights},
            self.thinner.dead,
            effect,
            self.workshop.kept(),
            self._measured,
            self.encoder.keep(),
        )

    def _search(self) -> Search:
        """Return a search that starts from what was measured already."""
        overhead = budgets.overhead(self.workshop.items(), self.rewriter)
        search = Search.of(
            self.workshop,
            self._measuring(),
            overhead,
            self.encoder.progress,
            costly=self.costly or self._rough,
        )
        search.measured_alone = self._measured
        return search

    def suits(self, settings: Settings) -> bool:
        """Whether the same channels go under another target."""
        bits = budgets.bits_left(self.original, self.whole, self.whole, settings)
        return self.thinner.choose(settings, bits) == self.dropped

    def aimed(self, settings: Settings, progress: Progress) -> Job:
        """Return the job turned to another target, one of those it was started for.

        What was read, probed, solved and measured is shared; the job itself is not to be asked any more.
        """
        self.workshop.aim(budgets.bits_left(self.original, self.whole, self.rewriter.found, settings))
        rewriter = replace(self.rewriter, settings=settings, narrowed=True)
        budget = settings.budget(self.original.nbytes)
        return replace(
            self,
            encoder=replace(self.encoder, rewriter=rewriter, progress=progress, budget=budget),
            notices=list(self.notices),
            seconds={},
            started=time.perf_counter(),
            _encoded=None,
            _rewritten=None,
            _counted=None,
        )

    @property
    def costly(self) -> bool:
        """Whether runs of the network take so long that fewer measurements have to do."""
        hunted = self.settings.error_target is not None and self.encoder.sequential
        return stats.macs(self.rewriter.found.weights) > (HUNTED if hunted else preparation.COSTLY)

    @property
    def _rough(self) -> bool:
        """Whether damage need not be known well: rounding for a number of bytes.

        It goes as the squared error does, so that one point of a curve tells the others, and which of several
        weights gets a little more matters little: half the samples, and half the points, gave as good files.
        """
        return self.encoder.sequential and self.settings.error_target is None

    def plan(self) -> Plan:
        """Choose."""
        limit = self.settings.error_target
        with _clock(self.seconds, "choosing"):
            search = self._search()
            search.budget = budget = self.encoder.budget
            self._distrust(search)
            search.operations = operations = self._operations()
            if operations is not None:
                budgets.require_reach(operations, search, self.settings)
            reached = budgets.least_bytes(search, self.rewriter)
            if budget is not None:
                weighs = self.encoder.sequential and operations is not None and self.workshop.light
                quickly = self.encoder.quickly if weighs else None
                choice = Budget(budget, search, self.rewriter, quickly).choose(reached)
            elif limit is not None and self.encoder.sequential:
                choice, self._encoded = within_error_encoded(
                    search,
                    limit,
                    self.encoder.one_by_one,
                    file_error(search, limit, self.rewriter, self.original, self.held_out),
                )
            elif limit is not None:
                choice = within_error(search, limit)
            else:
                choice = search.smallest()  # atoms are fixed: a pair wherever it pays
            budgets.require_gain(choice, search, self.rewriter)
            if search.meter is not None:
                search.meter.rest()
            arrays.trim(cycles=True)
        with _clock(self.seconds, "refitting"):
            refit = True
            if self._encoded is None:
                self._encoded, refit = self.encoder.best(search, choice, costly=self.costly)
            if budget is not None:
                within = Budget(budget, search, self.rewriter, None)
                choice, refit = self._kept_within(within, choice, refit=refit, reached=reached)
        return Plan(
            self.original.sha256,
            self.settings.target,
            budget,
            terms.said_of(self.settings) | {"refit": refit},
            reasons.chosen(search, choice),
            (*reasons.kept(search, choice), *self.rewriter.found.kept),
            pruned=tuple(Pruned(n, tuple(c)) for n, c in self.dropped.items()),
        )

    def _distrust(self, search: Search) -> None:
        """Say where the network gives all inputs one answer; an error measured on it is no bound then."""
        if search.meter is None or search.meter.spread >= ALIKE:
            return
        bounded = self.settings.error_target is not None
        if bounded:
            search.soften(MILD)
        coarser = f"; so no weight's own output changes by more than {MILD:.0%}" if bounded else ""
        self.notices.append(
            f"The outputs hardly differ between the inputs ({self.held_out.source}; by "
            f"{search.meter.spread:.1g} of their size), so the error measured on them says little{coarser}; "
            "give real inputs with --inputs or --calibrate."
        )

    def _kept_within(
        self, within: Budget, choice: Choice, *, refit: bool, reached: int
    ) -> tuple[Choice, bool]:
        """Return a choice whose arrays, as they are, fit the budget: an outline may foresee too few bytes."""
        missed = 0
        for done in range(_FITTED + 1):
            assert self._encoded is not None
            self._rewritten = self.rewriter.rewritten(*self._encoded)
            nbytes = model_file.output_size(self._rewritten)
            over = nbytes - within.nbytes
            if over <= 0:
                break
            if done == _FITTED:
                raise TargetError(
                    f"The target ({self.settings.target}) is out of reach: the smallest result takes "
                    f"{nbytes:,} bytes; ask for that (--size {nbytes})."
                )
            missed += over * 2**done
            log.info("the file is %d bytes beyond the budget: choosing again", over)
            less = replace(within, nbytes=within.nbytes - missed)
            choice = less.closest(reached) if done < _FITTED - 1 else within.search.smallest()
            self._encoded, refit = self.encoder.best(within.search, choice, costly=self.costly)
        return choice, refit

    def _operations(self) -> Operations | None:
        """Return what a run may cost, where that is asked for."""
        asked = self.settings.macs
        if asked is not None and self._counted is None:
            networks = self.thinner.network, self.encoder.network
            self._counted = budgets.operations(*networks, self.workshop, self.held_out, asked)
        return self._counted

    def macs(self, choices: Sequence[Candidate]) -> Macs | None:
        """Return the operations before and after, where they were asked about."""
        counted = self._operations()
        return None if counted is None else Macs(counted.before, counted.after(choices))

    def _measuring(self) -> Meter:
        """Return what measures damage, made once for all targets."""
        if self._meter is None:
            parts = self.held_out.samples if self.held_out.dynamic else len(self.held_out.feeds)
            few = (self.costly or self._rough) and parts >= 8
            self._meter = Meter(self.encoder.network, self.held_out.split(0.5)[0] if few else self.held_out)
        return self._meter

    def check(self, made: Plan) -> None:
        """Refuse a plan of another model, or one that names what does not exist."""
        if not made.choices:
            raise TargetError(
                "Nothing to gain: the plan changes no weight; write it again with 'onnxdp plan'."
            )
        self.workshop.check(made.choices)

    def finish(
        self,
        made: Plan,
        source: Any,
        target: str | os.PathLike[str] | None,
        *,
        overwrite: bool,
        dry_run: bool,
    ) -> tuple[Any, Report]:
        """Encode, rewrite, verify and write; returns what :class:`onnxdp.Result` holds."""
        macs = self.macs(made.choices)
        result, encoded = self.built(made)
        self._rest()
        if saved := result.ir.meta.get(ShortenNames.KEY):
            self.notices.append(
                "Internal names were shortened, default attributes left out, equal constants put together, "
                f"which saved about {saved:,} bytes; give --keep-names to keep them."
            )
        path = None if target is None else Path(target)
        given = Path(source) if isinstance(source, str | os.PathLike) else None
        checked: list[tuple[Verification, float | None]] = []

        def check(at: Path) -> None:
            nbytes = sum(p.stat().st_size for p in at.parent.iterdir())
            budgets.refuse(made, self.original, nbytes)
            self.encoder.progress("verifying", 0, 1, "")
            with _clock(self.seconds, "verifying"):
                checked.append(verified(self.original, given, at, self.held_out, self.rewriter))

        if dry_run:
            nbytes = model_file.output_size(result, target=path)
            budgets.refuse(made, self.original, nbytes)
            file = File(None if path is None else str(path), "", nbytes)
            out: Any = None
        elif path is not None:
            file = model_file.write(result, path, overwrite=overwrite, check=check)
            out = path if given is not None else model_file.give_back(result, source)
        else:
            with tempfile.TemporaryDirectory(prefix="onnxdp-") as folder:
                file = model_file.write(result, Path(folder) / "model.onnx", check=check)
            file = replace(file, path=None)
            out = model_file.give_back(result, source)
        self.seconds["total"] = time.perf_counter() - self.started
        verification, latency = checked[0] if checked else (None, None)
        report = Report(
            source=file_of(self.original),
            target=file,
            plan=made,
            lines=lines_of(made, encoded, self.whole, self.rewriter.found),
            verification=verification,
            latency_ratio=latency,
            seconds=dict(self.seconds),
            versions=versions(),
            device=self.device,
            notices=tuple(self.notices),
            dry_run=dry_run,
            macs=macs,
        )
        return out, report

    def _rest(self) -> None:
        """Let go of what is large and was for choosing and encoding: verifying has its own sessions."""
        self.workshop.rest()
        self.encoder.rest()
        self._meter = None
        arrays.trim(cycles=True)

    def built(self, made: Plan) -> tuple[Model, list[Encoded]]:
        """Encode and rewrite; returns the result and its weights."""
        with _clock(self.seconds, "encoding"):
            encoded, shifts = self._encoded or self.encoder.encoded(
                made.choices, refit=bool(made.settings.get("refit"))
            )
            return self._rewritten or self.rewriter.rewritten(encoded, shifts), encoded


@contextmanager
def _clock(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
