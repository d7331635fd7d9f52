"""One model through all stages: read, prepare, find, probe, solve, choose, encode, rewrite, verify, write."""

from __future__ import annotations

import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from onnxdp import arrays, guard, planner, preparation, runtime, stats, timing, verifier, walk, weights
from onnxdp import model as model_file
from onnxdp.damage import Named, Search
from onnxdp.encoding import Workshop
from onnxdp.errors import PlanError, TargetError, VerifyError
from onnxdp.meter import Meter
from onnxdp.methods.form import forms_for
from onnxdp.model import Model
from onnxdp.network import Network
from onnxdp.passes import GatherConstants, ReplaceWeights, ShortenNames
from onnxdp.planner import Choice, Operations
from onnxdp.probes import Probes
from onnxdp.pruning import Dropped
from onnxdp.records import (
    Array,
    Candidate,
    Encoded,
    File,
    Kept,
    Line,
    Macs,
    Plan,
    Pruned,
    Report,
    Verification,
    to_plain,
)
from onnxdp.refine import refine
from onnxdp.settings import Progress, Settings
from onnxdp.thinning import Thinner
from onnxdp.tolerance import within_error, within_error_encoded
from onnxdp.weights import Found

MIN_GAIN = 0.01
"""Share of the bytes that must be saved for a result to be worth writing."""
FIT_SHARE = 0.75
"""Share of the probes that weights are fitted on; damage is measured on the others."""

LARGE = 256_000_000
"""Bytes of a model from which the two sessions are not held at once, so that latencies are not compared."""

NARROW_SHARE = 0.1
"""Share of the allowed output error that small vectors in float16 may take: they save a percent or two."""

NEAR = 0.001
"""Share of the budget that may be left over."""

KEPT = 0.3
"""About the share of a file beside its weights that is left once names are short and biases are float16."""

SHORTEN_FROM = 0.01
"""Share of the result's bytes from which names and defaults are shortened unasked."""

REWEIGHED = 400_000_000
"""Multiply-accumulates of one sample up to which a choice is encoded twice, to weigh changes within it."""

_ROUNDS = {False: 1, True: 4}
"""Times that changes are weighed within the whole; where operations are bounded, pairs make up for much."""

REFIT_FROM = 0.05
"""Relative output error from which refitting is tried: below, there is little for later layers to repair."""

log = logging.getLogger(__name__)

ENCODING_SETTINGS = (
    "method",
    "macs",
    "solver",
    "iterations",
    "unweighted",
    "refit",
    "freeze_initializers",
    "short_names",
    "include",
    "exclude",
    "samples",
    "seed",
)
"""Settings that decide what the arrays of a choice become: a plan carries them."""


@dataclass(slots=True)
class Job:
    """One model on its way through the stages."""

    original: Model
    """As it was read."""
    model: Model
    """What is compressed: it may have fewer channels."""
    found: Found
    settings: Settings
    network: Network
    fit: Probes
    held_out: Probes
    workshop: Workshop
    device: str
    progress: Progress
    notices: list[str]
    thinner: Thinner
    dropped: Dropped
    whole: Found
    """The original's weights."""
    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)
    _encoded: tuple[list[Encoded], dict[str, Array]] | None = None
    _meter: Meter | None = None
    _narrowed: bool = True
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
    ) -> Job:
        """Read, prepare, find, probe and solve; once for the targets of further settings, too.

        What channels go a plan says, where there is one.
        """
        started = time.perf_counter()
        seconds: dict[str, float] = {}
        runtime.onnxruntime()
        device = arrays.resolve_device(settings.device)
        forms = forms_for(settings.method, lighter=settings.macs is not None)
        progress("reading", 0, 1, "")
        with _clock(seconds, "reading"):
            model = model_file.read(source)
            if plan is not None and plan.model_sha256 != model.sha256:
                raise PlanError(
                    "The plan was made for another model (its sha256 differs); make one with 'onnxdp plan'."
                )
            notices = preparation.prepare(model, settings)
            found = weights.select(weights.find(model.ir), settings.include, settings.exclude)
            if not found.weights:
                raise TargetError(f"Nothing to gain: {_why_nothing(found)}.")
            guard.finite(
                model.ir, {id(weights.constant(found.values[w.name])): w.name for w in found.weights}
            )
        with _clock(seconds, "probes"):
            network = Network(model, found)
            progress("making probe inputs", 0, 1, "")
            sequential = any(f.sequential for f in forms)
            found, made = preparation.probed(network, found, settings, many=sequential)
            fit, held_out = made.split(FIT_SHARE)
            del made  # large
        original, whole = model, found
        with _clock(seconds, "pruning"):
            thinner = Thinner(model, found, network, fit, held_out, settings, progress)
            bits = _bits_left(model, whole, found, settings)
            dropped = thinner.check(plan.pruned) if plan is not None else thinner.choose(settings, bits)
            if dropped:
                thinned = thinner.thinned(dropped, settings)
                model, found, network = thinned.model, thinned.found, thinned.network
                notices.append(thinned.notice)
        bits, *more = (_bits_left(original, whole, found, s) for s in (settings, *also))
        workshop = Workshop(found, forms, settings, device=device, bits=bits, also=tuple(more))
        with _clock(seconds, "solving"):
            workshop.solve(network, fit, progress)
        return cls(
            original,
            model,
            found,
            settings,
            network,
            fit,
            held_out,
            workshop,
            device,
            progress,
            notices,
            thinner,
            dropped,
            whole,
            seconds,
            started,
        )

    def suits(self, settings: Settings) -> bool:
        """Whether the same channels go under another target."""
        bits = _bits_left(self.original, self.whole, self.whole, settings)
        return self.thinner.choose(settings, bits) == self.dropped

    def aimed(self, settings: Settings) -> Job:
        """Return the job turned to another target, one of those it was started for.

        What was read, probed, solved and measured is shared; the job itself is not to be asked any more.
        """
        self.workshop.aim(_bits_left(self.original, self.whole, self.found, settings))
        return replace(
            self,
            settings=settings,
            notices=list(self.notices),
            seconds={},
            started=time.perf_counter(),
            _encoded=None,
            _meter=self._measuring(),
            _narrowed=True,
        )

    @property
    def costly(self) -> bool:
        """Whether one run of the network takes so long that fewer measurements have to do."""
        return stats.macs(self.found.weights) > preparation.COSTLY

    @property
    def _sequential(self) -> bool:
        """Whether weights are encoded one after the other in the compressed network, whatever is chosen."""
        return self.workshop.sequential and self.settings.refit is not False

    def _one_by_one(self, choice: Choice, *, quick: bool = False) -> tuple[list[Encoded], dict[str, Array]]:
        choices = list(choice.candidates.values())
        return refine(self.workshop, self.network, self.fit, choices, self.progress, quick=quick)

    def plan(self) -> Plan:
        """Choose."""
        limit = self.settings.error_target
        with _clock(self.seconds, "choosing"):
            search = Search.of(self.workshop, self._measuring(), self._overhead(), self.progress)
            search.measured_alone = self._measured
            search.budget = budget = self.settings.budget(self.model.nbytes)
            search.costly = self.costly
            search.operations = self._operations(search)
            reached = self._gain_possible(search)
            if budget is not None:
                choice = self._within_bytes(search, budget, reached)
            elif limit is not None and self._sequential:
                choice, self._encoded = within_error_encoded(
                    search, limit, self._one_by_one, self._file_error(search, limit)
                )
            elif limit is not None:
                choice = within_error(search, limit)
            else:
                choice = search.smallest()  # atoms are fixed: a pair wherever it pays
            self._worthwhile(choice, search)
            if search.meter is not None:
                search.meter.rest()
            arrays.trim()
        with _clock(self.seconds, "refitting"):
            refit = self._refitted(search, choice)
        candidates = [c for c in search.damaged(choice) if c.method != planner.KEEP]
        named = {c.weight for c in candidates}
        kept = [
            Kept(w.name, self._why_kept(search, w.name), w.nbytes)
            for w in self.found.weights
            if w.name not in named
        ]
        settings = {k: v for k, v in to_plain(self.settings).items() if k in ENCODING_SETTINGS} | {
            "refit": refit
        }
        return Plan(
            self.model.sha256,
            self.settings.target,
            budget,
            settings,
            tuple(candidates),
            (*kept, *self.found.kept),
            pruned=tuple(Pruned(n, tuple(c)) for n, c in self.dropped.items()),
        )

    def _operations(self, search: Search) -> Operations | None:
        """Return what a run may cost, where that is asked for.

        Raises
        ------
        TargetError
            Nothing makes runs that light.
        """
        asked = self.settings.macs
        if asked is None:
            return None
        found = self._counted(asked)
        least = found.after(planner.lightest(search.items, search.overhead, found).candidates.values())
        if least > found.budget:
            reached = math.floor(100 * found.whole / max(least, 1)) / 100
            remedy = f"ask for --macs {reached:g} or less" if reached > 1 else "leave --macs out"
            raise TargetError(
                f"The target (macs {asked:g}) is out of reach: the fewest multiply-accumulates that method "
                f"{self.settings.method} reaches are {least:,} of {found.whole:,}; {remedy}."
            )
        return found

    def _counted(self, asked: float) -> Operations:
        """Count the operations of the network, and say how many the result may have."""
        one = self.held_out.rebatch(1)
        whole = stats.operations(self.network, one.feeds[0], one.batch)
        dense = {w.name: stats.macs([w]) for w in self.found.weights}
        return Operations(whole, math.floor(whole / asked), dense, self.workshop.macs)

    def macs(self, choices: Sequence[Candidate]) -> Macs | None:
        """Return the operations before and after, where they were asked about."""
        if self.settings.macs is None:
            return None
        counted = self._counted(self.settings.macs)
        return Macs(counted.whole, counted.after(choices))

    def _file_error(self, search: Search, limit: float) -> Callable[[list[Encoded], dict[str, Array]], float]:
        """Return what measures the output error of arrays in the file they give, small vectors included.

        These stay exact from the first measurement on in which float16 takes too much of the limit.
        """
        if self.model.nbytes > LARGE:
            return lambda encoded, shifts: search.measured(encoded, shifts)[1]
        reference = verifier.Reference.of(runtime.session(model_file.serialize(self.original)), self.held_out)

        def measure(encoded: list[Encoded], shifts: dict[str, Array]) -> float:
            made = model_file.serialize(self._rewritten(encoded, shifts))
            outputs = verifier.compare(reference, runtime.session(made), self.held_out).outputs
            error = max((o.relative for o in outputs), default=0.0)
            if self._narrowed and error - search.measured(encoded, shifts)[1] > NARROW_SHARE * limit:
                self._narrowed = False
                return measure(encoded, shifts)
            return error if math.isfinite(error) else math.inf

        return measure

    def _measuring(self) -> Meter:
        """Return what measures damage: kept from an earlier target, or new."""
        if self._meter is not None:
            return self._meter
        few = self.costly and self.held_out.samples >= 8
        return Meter(self.network, self.held_out.split(0.5)[0] if few else self.held_out)

    def check(self, made: Plan) -> None:
        """Refuse a plan of another model, or one that names what does not exist."""
        if not made.choices:
            raise TargetError(
                "Nothing to gain: the plan changes no weight; write it again with 'onnxdp plan'."
            )
        known = {w.name: w for w in self.found.weights}
        for c in made.choices:
            if c.weight not in known:
                raise PlanError(
                    f"The plan names {c.weight!r}, which is no weight of the model; see 'onnxdp inspect'."
                )
            form = self.workshop.forms.get(c.method)
            if form is None:
                known_forms = ", ".join(self.workshop.forms)
                raise PlanError(
                    f"The plan stores {c.weight} by {c.method!r}; its settings know {known_forms}."
                )
            refusal = form.supports(known[c.weight])
            if refusal:
                raise PlanError(f"The plan stores {c.weight} by {c.method}, but it {refusal}.")
            form.check(known[c.weight], c.params)

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
        result, encoded = self.built(made)
        if saved := result.ir.meta.get(ShortenNames.KEY):
            self.notices.append(
                "Internal names were shortened, default attributes left out, equal constants put together, "
                f"which saved about {saved:,} bytes; give --keep-names to keep them."
            )
        path = None if target is None else Path(target)
        given = Path(source) if isinstance(source, str | os.PathLike) else None
        checked: list[tuple[Verification, float | None]] = []

        def check(at: Path) -> None:
            self._refuse_growth(sum(p.stat().st_size for p in at.parent.iterdir()))
            self.progress("verifying", 0, 1, "")
            with _clock(self.seconds, "verifying"):
                checked.append(self._verified(given, at))

        if dry_run:
            nbytes = model_file.output_size(result, target=path)
            self._refuse_growth(nbytes)
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
            source=file_of(self.model),
            target=file,
            plan=made,
            lines=self._lines(made, encoded),
            verification=verification,
            latency_ratio=latency,
            seconds=dict(self.seconds),
            versions=versions(),
            device=self.device,
            notices=tuple(self.notices),
            dry_run=dry_run,
            macs=self.macs(made.choices),
        )
        return out, report

    def built(self, made: Plan) -> tuple[Model, list[Encoded]]:
        """Encode and rewrite; returns the result and its weights."""
        with _clock(self.seconds, "encoding"):
            encoded, shifts = self._encoded or self._encode(
                made.choices, refit=bool(made.settings.get("refit"))
            )
            return self._rewritten(encoded, shifts), encoded

    def _refitted(self, search: Search, choice: Choice) -> bool:
        """Encode the choice, refitted where asked for or where that helps; return whether it was."""
        candidates = list(choice.candidates.values())
        if self._sequential:
            self._encoded = self._encoded or self._one_by_one(choice)
            return True
        self._encoded = self._encode(candidates, refit=False)
        if self.settings.refit is False or (self.settings.refit is None and self.settings.unweighted):
            return False
        before, error = search.measured(*self._encoded)
        if self.settings.refit is None and (error < REFIT_FROM or self.costly or search.meter is None):
            return False
        refitted = self._encode(candidates, refit=True)
        after, _ = search.measured(*refitted)
        log.info("damage %.4g, refitted %.4g", before, after)
        if self.settings.refit is None and after >= before:
            return False
        self._encoded = refitted
        return True

    def _encode(
        self, candidates: Sequence[Candidate], *, refit: bool
    ) -> tuple[list[Encoded], dict[str, Array]]:
        """Return the arrays of the candidates, and what the biases behind them gain."""
        if refit:
            return refine(self.workshop, self.network, self.fit, candidates, self.progress)
        encoded = self.workshop.encode(candidates)
        return encoded, self.workshop.shifts(encoded)

    def _within_bytes(self, search: Search, budget: int, reached: int) -> Choice:
        """Choose within the whole file's budget: what decodes is weighed by building the result."""
        if reached > budget:
            raise TargetError(
                f"The target ({self.settings.target}) is out of reach: "
                f"the best reachable is {reached:,} bytes ({self.model.nbytes / reached:.2f}x); "
                f"ask for that (--size {reached}) or less."
            )
        # What is no candidate's, and what the estimates of decoding are off by, shows in the smallest result.
        room = budget - reached + search.smallest().nbytes
        fitting = self._fitting(search, budget, room)
        if fitting is None:
            return search.smallest()
        return self._checked(search, *fitting, budget)

    def _fitting(self, search: Search, budget: int, room: int) -> tuple[Choice, int] | None:
        """Return a choice whose file fits the budget, closely, and the room for weights that gave it."""
        best: Choice | None = None
        low, high = -math.inf, math.inf  # rooms that are known to fit, and not to
        least = search.smallest().nbytes
        for _ in range(8):
            room = max(room, least)  # of the estimates; the exact count says that the target can be reached
            choice = search.within(room)
            over = self._size(choice) - budget
            if over > 0:
                high = room
            elif best is not None and choice.candidates == best.candidates:
                break
            else:
                best, low = choice, room
                if -over <= max(budget * NEAR, 64) or not self.workshop.sequential:
                    break
            room -= max(over, 64) if over > 0 else over
            if not low < room < high:
                room = int(low + high) // 2
            if high - low < 128 or room < least == high:
                break
        return None if best is None else (best, int(low))

    def _checked(self, search: Search, choice: Choice, room: int, budget: int) -> Choice:
        """Return the choice, or it without sharing, or repaired, where that is better as a whole and fits."""
        if self.workshop.sequential:
            return self._reweighed(search, choice, room, budget) if self._sequential else choice
        for better in (search.unless_alone_is_better, search.repaired):
            other = better(choice, room)
            if other is choice or self._size(other) <= budget:
                choice = other
        return choice

    def _reweighed(self, search: Search, choice: Choice, room: int, budget: int) -> Choice:
        """Return the choice, or the one made with every change weighed within the whole, if it is better."""
        if stats.macs(self.found.weights) > REWEIGHED:
            return choice
        encoded = self._one_by_one(choice, quick=True)
        best, damage = choice, search.measured(*encoded)[0]
        for _ in range(_ROUNDS[search.operations is not None]):
            search.reweighed(choice, *encoded)
            fitting = self._fitting(search, budget, room)
            if fitting is None or fitting[0].candidates in (choice.candidates, best.candidates):
                break
            choice = fitting[0]
            encoded = self._one_by_one(choice, quick=True)
            again, _ = search.measured(*encoded)
            log.info("damage %.4g, weighed within the whole %.4g", damage, again)
            best, damage = (choice, again) if again < damage else (best, damage)
        return best

    def _size(self, choice: Choice) -> int:
        """Bytes of the file that a choice gives."""
        outline = self.workshop.outline(choice.candidates.values())
        return model_file.output_size(self._rewritten(outline, self.workshop.no_shifts(outline)))

    def _overhead(self) -> dict[str, int]:
        """Estimate the bytes of what decodes one weight; the exact count follows by building."""
        mean_name = sum(len(w.name) for w in self.found.weights) / len(self.found.weights)
        return {
            m: int(90 + 4 * mean_name) if m == "float16" else int(250 + 12 * mean_name)
            for m in self.workshop.forms
        }

    def _rewritten(self, encoded: Sequence[Encoded], shifts: Mapping[str, Array]) -> Model:
        copied = model_file.copy(self.model)
        twin = weights.find(copied.ir)
        twin = replace(twin, weights=self.found.weights)
        provenance = f"{metadata.version('onnxdp')} {self.settings.method}"
        ReplaceWeights(twin, encoded, self.workshop.forms, shifts, provenance, narrowed=self._narrowed)(
            copied.ir
        )
        return self._shortened(copied)

    def _shortened(self, result: Model) -> Model:
        """Return the result under short names, where that is asked for or worth it."""
        if self.settings.short_names is False:
            return result
        brief = model_file.copy(result)
        gather, shorten = GatherConstants(), ShortenNames(result.original_value_info)
        gather(brief.ir)
        shorten(brief.ir)
        brief.original_value_info = shorten.value_info
        brief.ir.meta[ShortenNames.KEY] = saved = gather.saved + shorten.saved
        left = sum(t.nbytes for t in walk.tensors(brief.ir))
        return brief if self.settings.short_names or saved > SHORTEN_FROM * left else result

    def _verified(self, given: Path | None, at: Path) -> tuple[Verification, float | None]:
        """Check the written file against the original, before it takes its name."""
        verifier.check_file(at)
        original = runtime.session(given if given is not None else model_file.serialize(self.original))
        reference = verifier.Reference.of(original, self.held_out)
        if self.model.nbytes > LARGE:
            original = None
        compressed = runtime.session(at)
        found = verifier.compare(reference, compressed, self.held_out)
        if not found.passed:
            raise VerifyError(
                "The compressed model's outputs are not finite on the probe inputs and it was not written; "
                "ask for less with --ratio, or give real inputs with --inputs."
            )
        if original is None:
            return found, None
        feed = self.held_out.rebatch(1).feeds[0]
        return found, timing.latency_ratio(original, compressed, feed, repeat=7)

    def _gain_possible(self, search: Search) -> int:
        """Return the bytes of the smallest result there is."""
        reached = self._size(search.smallest())
        if self.model.nbytes - reached < MIN_GAIN * self.model.nbytes:
            raise TargetError(f"Nothing to gain: {_why_nothing(self.found)}.")
        return reached

    def _refuse_growth(self, nbytes: int) -> None:
        """Refuse a result (of a plan edited by hand) that is larger than the original."""
        if nbytes >= self.model.nbytes:
            raise TargetError(
                f"Nothing to gain: the result would have {nbytes:,} bytes "
                f"and the model has {self.model.nbytes:,}; change the plan."
            )

    def _worthwhile(self, choice: Choice, search: Search) -> None:
        """Refuse to write what is the original once more."""
        if self.model.nbytes - self._size(choice) >= MIN_GAIN * self.model.nbytes:
            return
        limit = self.settings.error_target
        if limit is None:
            raise TargetError(
                f"Nothing to gain: the target ({self.settings.target}) lets the file stay as it is, "
                f"{self.model.nbytes:,} bytes; ask for a smaller one."
            )
        raise TargetError(
            f"Nothing to gain within an output error of {limit:g}: changing every weight as little as can be "
            f"gives {search.mildest():.2g}; allow more with --max-error, or give --ratio."
        )

    def _why_kept(self, search: Search, name: str) -> str:
        """Say why a weight stays: what every form says, that none is smaller, or that none was worth it."""
        weight = self.workshop.weights[name]
        refusals = [f.supports(weight) for f in self.workshop.forms.values()]
        if all(refusals):
            return "; ".join(r for r in refusals if r)
        (item,) = (i for i in search.items if name in i.names)
        if len(item.alone[name]) == 1 and not item.together:  # the first is to keep it
            return "no form of it is smaller"
        return "nothing smaller was worth its damage"

    def _lines(self, made: Plan, encoded: Sequence[Encoded]) -> tuple[Line, ...]:
        arrays_of = {e.weight: e for e in encoded}
        choices = {c.weight: c for c in made.choices}
        reasons = {k.weight: k.reason for k in made.kept}
        before = {w.name: w.nbytes for w in self.whole.weights}
        lines = []
        for w in self.found.weights:
            c = choices.get(w.name)
            if c is None:
                reason = reasons.get(w.name, "is not in the plan")
                lines.append(Line(w.name, w.op, w.shape, "", {}, before[w.name], w.nbytes, 0.0, None, reason))
                continue
            stored = arrays_of[w.name]
            after = sum(
                a.nbytes for role, a in stored.arrays.items() if stored.shared.get(role, w.name) == w.name
            )
            error = stored.error
            lines.append(
                Line(
                    w.name,
                    w.op,
                    w.shape,
                    c.method,
                    c.params,
                    before[w.name],
                    after,
                    error,
                    c.damage,
                    c.reason,
                )
            )
        lines += [
            Line(k.weight, "", (), "", {}, k.nbytes, k.nbytes, 0.0, None, k.reason) for k in self.found.kept
        ]
        return tuple(lines)


def _bits_left(original: Model, whole: Found, found: Found, settings: Settings) -> float:
    """Return about the bits that the target leaves each number of the weights; 16 where it does not say."""
    budget = settings.budget(original.nbytes)
    if budget is None:
        return 16.0
    left = budget - KEPT * (original.nbytes - sum(w.nbytes for w in whole.weights))
    return float(np.clip(8 * left / max(sum(w.size for w in found.weights), 1), 0.5, 16.0))


@contextmanager
def _clock(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start


def _why_nothing(found: Found) -> str:
    if not found.kept:
        return "the model has no Conv, Gemm or MatMul weight of 1 kB or more"
    largest = max(found.kept, key=lambda k: k.nbytes)
    return (
        f"of what it holds, {largest.weight} ({largest.nbytes:,} bytes) {largest.reason}"
        if not found.weights
        else ("its weights are as small as onnxdp can make them")
    )


def file_of(model: Model) -> File:
    """Say where a model came from, its digest and its size."""
    return File(None if model.path is None else str(model.path), model.sha256, model.nbytes)


def versions() -> dict[str, str]:
    """Say which releases did the work."""
    names = ("onnxdp", "onnx", "onnx-ir", "numpy")
    return {n: metadata.version(n) for n in names} | {"onnxruntime": runtime.onnxruntime().__version__}
