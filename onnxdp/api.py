"""The stages in order, and nothing else: read, prepare, find, probe, solve, choose, encode, rewrite, verify, write."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from onnxdp import arrays, environment, guard, model as model_file, planner, probes, runtime, stats, timing, verifier, weights
from onnxdp.damage import Search, within_error
from onnxdp.encoding import Workshop
from onnxdp.errors import PlanError, TargetError, UsageError, VerifyError
from onnxdp.methods.form import forms_for
from onnxdp.model import Model
from onnxdp.network import Meter, Network
from onnxdp.passes import FreezeInitializers, ReplaceWeights
from onnxdp.planner import Choice
from onnxdp.probes import Probes
from onnxdp.records import (
    Array,
    BenchRow,
    Candidate,
    Diagnosis,
    Encoded,
    File,
    InspectedWeight,
    Inspection,
    Kept,
    Line,
    Plan,
    Report,
    Verification,
    to_plain,
)
from onnxdp.refine import refine
from onnxdp.settings import Progress, Settings, silent
from onnxdp.weights import Found

MIN_GAIN = 0.01
"""Share of the bytes that must be saved for a result to be worth writing."""
FIT_SHARE = 0.75
"""Share of the probes that weights are fitted on; damage is measured on the others."""

REFIT_FROM = 0.05
"""Relative output error from which refitting is tried: below, there is little for later layers to repair."""

log = logging.getLogger(__name__)

_ENCODING_SETTINGS = (
    "method", "solver", "iterations", "unweighted", "refit", "freeze_initializers", "include", "exclude", "samples", "seed"
)  # fmt: skip


class Result(NamedTuple):
    """What a run gives back.

    ``model`` is of the type that came in; for a path it is the path that was written (None in a dry run, a
    ``ModelProto`` where no target was named).
    """

    model: Any
    report: Report


def compress(
    source: Any,
    target: str | os.PathLike[str] | None = None,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress = silent,
    **settings: Any,
) -> Result:
    """Compress a model.

    Parameters
    ----------
    source : path, onnx.ModelProto, onnx_ir.Model or onnx_graphsurgeon.Graph
        Never changed.
    target : path, optional
        Where to write; external data goes beside it.
    overwrite : bool
        Replace ``target`` (which may be ``source``).
    dry_run : bool
        Do everything but write.
    progress : callable
        ``progress(stage, done, total, name)``.
    **settings
        Fields of :class:`onnxdp.Settings`.

    Returns
    -------
    Result

    Raises
    ------
    OnnxdpError
        One of its subclasses; see ``onnxdp.errors``.
    """
    chosen = Settings(**settings)
    with arrays.one_blas_thread():
        job = _Job.start(source, chosen, progress)
        made = job.plan()
        return job.finish(made, source, target, overwrite=overwrite, dry_run=dry_run)


def plan(source: Any, *, progress: Progress = silent, **settings: Any) -> Plan:
    """Decide what becomes of every weight, without changing anything; parameters as for :func:`compress`."""
    chosen = Settings(**settings)
    with arrays.one_blas_thread():
        return _Job.start(source, chosen, progress).plan()


def apply(
    source: Any,
    plan: Plan,
    target: str | os.PathLike[str] | None = None,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    inputs: Path | None = None,
    device: str = "auto",
    progress: Progress = silent,
) -> Result:
    """Carry out a plan.

    Raises
    ------
    PlanError
        The plan was made for another model, or names what does not exist.
    """
    settings = _settings_of(plan, inputs=inputs, device=device)
    with arrays.one_blas_thread():
        job = _Job.start(source, settings, progress, keep_samples=True)
        job.check(plan)
        return job.finish(plan, source, target, overwrite=overwrite, dry_run=dry_run)


def inspect(
    source: Any,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    freeze_initializers: bool = False,
) -> Inspection:
    """List every weight of a model: operator, shape, bytes, how compressible, or why it is left alone."""
    model = model_file.read(source)
    FreezeInitializers(fed_too=freeze_initializers)(model.ir)
    found = weights.select(weights.find(model.ir), include, exclude)
    rows = [
        InspectedWeight(
            w.name, w.op, w.nodes, w.shape, w.dtype, w.nbytes, w.nbytes / model.nbytes, _compressible(found, w), None
        )
        for w in found.weights
    ]
    rows += [
        InspectedWeight(k.weight, "", (), (), "", k.nbytes, k.nbytes / model.nbytes, None, k.reason) for k in found.kept
    ]
    rows.sort(key=lambda r: -r.nbytes)
    held = sum(r.nbytes for r in rows)
    return Inspection(
        _file(model), tuple(rows), max(0, model.nbytes - held), model.ir.producer_name or "",
        model.ir.opset_imports.get("", 0), model.ir.ir_version,
    )  # fmt: skip


def verify(
    a: Any,
    b: Any,
    *,
    inputs: Path | None = None,
    samples: int | None = None,
    seed: int = 0,
    tolerance: float | None = None,
) -> Verification:
    """Compare the outputs of two models on probe inputs, or on given ones."""
    first, second = _opened(a), _opened(b)
    made = _probes_for(first[0], Settings(inputs=inputs, samples=samples or 16, seed=seed), None)
    return verifier.compare(first[1], second[1], made, tolerance=tolerance)


def bench(
    models: Sequence[Any],
    *,
    repeat: int = 20,
    threads: int | None = None,
    inputs: Path | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> tuple[BenchRow, ...]:
    """Measure bytes, load time, latency and peak memory of models, as ratios to the first."""
    return timing.bench(models, repeat=repeat, threads=threads, inputs=inputs, seed=seed, progress=progress)


def doctor(source: Any = None) -> Diagnosis:
    """Say what is installed, and what of a model would be skipped and why."""
    found = environment.diagnose()
    return found if source is None else replace(found, inspection=inspect(source))


@dataclass(slots=True)
class _Job:
    """One model on its way through the stages."""

    model: Model
    found: Found
    settings: Settings
    network: Network
    fit: Probes
    held_out: Probes
    workshop: Workshop
    device: str
    progress: Progress
    notices: list[str]
    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)
    _encoded: tuple[list[Encoded], dict[str, Array]] | None = None

    @classmethod
    def start(cls, source: Any, settings: Settings, progress: Progress, *, keep_samples: bool = False) -> _Job:
        """Read, prepare, find, probe and solve."""
        started = time.perf_counter()
        seconds: dict[str, float] = {}
        runtime.onnxruntime()
        device = arrays.resolve_device(settings.device)
        forms = forms_for(settings.method)
        progress("reading", 0, 1, "")
        with _clock(seconds, "reading"):
            model = model_file.read(source)
            notices = _prepare(model, settings)
            found = weights.select(weights.find(model.ir), settings.include, settings.exclude)
            if not found.weights:
                raise TargetError(f"Nothing to gain: {_why_nothing(found)}.")
            guard.finite(model.ir, {id(weights.constant(found.values[w.name])): w.name for w in found.weights})
        with _clock(seconds, "probes"):
            network = Network(model, found)
            progress("making probe inputs", 0, 1, "")
            found, made = _probed(network, found, settings)
            fit, held_out = made.split(FIT_SHARE)
        workshop = Workshop(found, forms, settings, device=device, keep_samples=keep_samples)
        with _clock(seconds, "solving"):
            workshop.solve(network, fit, progress)
        return cls(
            model, found, settings, network, fit, held_out, workshop, device, progress, notices, seconds, started
        )

    def plan(self) -> Plan:
        """Choose."""
        limit = self.settings.error_target
        with _clock(self.seconds, "choosing"):
            meter = Meter(self.network, self.held_out)
            meter.prepare([w.name for w in self.found.weights if w.name in self.network.fed])
            search = Search.of(self.workshop, meter, self._overhead(), self.progress)
            reached = self._gain_possible(search)
            budget = self.settings.budget(self.model.nbytes)
            if budget is not None:
                choice = self._within_bytes(search, budget, reached)
            elif limit is not None:
                choice = within_error(search, limit)
            else:
                choice = search.smallest()  # atoms are fixed: a pair wherever it pays
            self._worthwhile(choice, search)
        with _clock(self.seconds, "refitting"):
            refit = self._refitted(search, choice)
        candidates = [c for c in search.damaged(choice) if c.method != planner.KEEP]
        named = {c.weight for c in candidates}
        kept = [Kept(w.name, self._why_kept(w.name), w.nbytes) for w in self.found.weights if w.name not in named]
        settings = {k: v for k, v in to_plain(self.settings).items() if k in _ENCODING_SETTINGS} | {"refit": refit}
        return Plan(
            self.model.sha256, self.settings.target, budget, settings, tuple(candidates), (*kept, *self.found.kept)
        )

    def check(self, made: Plan) -> None:
        """Refuse a plan of another model, or one that names what does not exist."""
        if made.model_sha256 != self.model.sha256:
            raise PlanError("The plan was made for another model (its sha256 differs); make one with 'onnxdp plan'.")
        if not made.choices:
            raise TargetError("Nothing to gain: the plan changes no weight; write it again with 'onnxdp plan'.")
        known = {w.name: w for w in self.found.weights}
        for c in made.choices:
            if c.weight not in known:
                raise PlanError(f"The plan names {c.weight!r}, which is no weight of the model; see 'onnxdp inspect'.")
            form = self.workshop.forms.get(c.method)
            if form is None:
                known_forms = ", ".join(self.workshop.forms)
                raise PlanError(f"The plan stores {c.weight} by {c.method!r}; its settings know {known_forms}.")
            refusal = form.supports(known[c.weight])
            if refusal:
                raise PlanError(f"The plan stores {c.weight} by {c.method}, but it {refusal}.")
            form.check(known[c.weight], c.params)

    def finish(
        self, made: Plan, source: Any, target: str | os.PathLike[str] | None, *, overwrite: bool, dry_run: bool
    ) -> Result:
        """Encode, rewrite, verify and write."""
        with _clock(self.seconds, "encoding"):
            encoded, shifts = self._encoded or self._encode(made.choices, refit=bool(made.settings.get("refit")))
            result = self._rewritten(encoded, shifts)
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
            source=_file(self.model),
            target=file,
            plan=made,
            lines=self._lines(made, encoded),
            verification=verification,
            latency_ratio=latency,
            seconds=dict(self.seconds),
            versions=_versions(),
            device=self.device,
            notices=tuple(self.notices),
            dry_run=dry_run,
        )
        return Result(out, report)

    def _refitted(self, search: Search, choice: Choice) -> bool:
        """Encode the choice; refitted where asked for, or where that measurably helps. Returns whether it was."""
        candidates = list(choice.candidates.values())
        self._encoded = self._encode(candidates, refit=False)
        if self.settings.refit is False or (self.settings.refit is None and self.settings.unweighted):
            return False
        before, error = search.measured(*self._encoded)
        if self.settings.refit is None and (error < REFIT_FROM or search.meter is None):
            return False
        refitted = self._encode(candidates, refit=True)
        after, _ = search.measured(*refitted)
        log.info("damage %.4g, refitted %.4g", before, after)
        if self.settings.refit is None and after >= before:
            return False
        self._encoded = refitted
        return True

    def _encode(self, candidates: Sequence[Candidate], *, refit: bool) -> tuple[list[Encoded], dict[str, Array]]:
        """Return the arrays of the candidates, and what the biases behind them gain."""
        if refit:
            return refine(self.workshop, self.network, self.fit, candidates, self.progress)
        encoded = self.workshop.encode(candidates)
        return encoded, self.workshop.shifts(encoded)

    def _within_bytes(self, search: Search, budget: int, reached: int) -> Choice:
        """Choose within the whole file's budget: what decodes is weighed by building the result."""
        if reached > budget:
            raise TargetError(
                f"The target ({self.settings.target}) is out of reach: the best reachable is {reached:,} bytes "
                f"({self.model.nbytes / reached:.2f}x); ask for that (--size {reached}) or less."
            )
        room = budget - (self.model.nbytes - sum(w.nbytes for w in self.found.weights))
        for _ in range(6):
            try:
                choice = search.within(room)
            except TargetError:  # by the estimate of what decodes; the exact count above says it can be reached
                break
            over = self._size(choice) - budget
            if over <= 0:
                return self._checked(search, choice, room, budget)
            room -= max(over, 64)
        return search.smallest()

    def _checked(self, search: Search, choice: Choice, room: int, budget: int) -> Choice:
        """Return the choice as measured together: without sharing, or repaired, where that is better and fits."""
        for better in (search.unless_alone_is_better, search.repaired):
            other = better(choice, room)
            if other is choice or self._size(other) <= budget:
                choice = other
        return choice

    def _size(self, choice: Choice) -> int:
        """Bytes of the file that a choice gives."""
        encoded = self.workshop.encode(choice.candidates.values())
        return model_file.output_size(self._rewritten(encoded, self.workshop.shifts(encoded)))

    def _overhead(self) -> dict[str, int]:
        """Estimate the bytes of what decodes one weight; the exact count follows by building."""
        mean_name = sum(len(w.name) for w in self.found.weights) / len(self.found.weights)
        return {m: int(90 + 4 * mean_name) if m == "float16" else int(250 + 12 * mean_name) for m in self.workshop.forms}

    def _rewritten(self, encoded: Sequence[Encoded], shifts: Mapping[str, Array]) -> Model:
        copied = model_file.copy(self.model)
        twin = weights.find(copied.ir)
        twin = replace(twin, weights=self.found.weights)
        provenance = f"{metadata.version('onnxdp')} {self.settings.method}"
        ReplaceWeights(twin, encoded, self.workshop.forms, shifts, provenance)(copied.ir)
        return copied

    def _verified(self, given: Path | None, at: Path) -> tuple[Verification, float | None]:
        """Check the written file against the original, before it takes its name."""
        verifier.check_file(at)
        original = runtime.session(given if given is not None else model_file.serialize(self.model))
        compressed = runtime.session(at)
        found = verifier.compare(original, compressed, self.held_out)
        if not found.passed:
            raise VerifyError(
                "The compressed model's outputs are not finite on the probe inputs and it was not written; "
                "ask for less with --ratio, or give real inputs with --inputs."
            )
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
                f"Nothing to gain: the result would have {nbytes:,} bytes and the model has {self.model.nbytes:,}; "
                "change the plan."
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

    def _why_kept(self, name: str) -> str:
        weight = self.workshop.weights[name]
        reasons = [f.supports(weight) for f in self.workshop.forms.values()]
        return next((r for r in reasons if r), None) or "nothing smaller was worth its damage"

    def _lines(self, made: Plan, encoded: Sequence[Encoded]) -> tuple[Line, ...]:
        arrays_of = {e.weight: e for e in encoded}
        choices = {c.weight: c for c in made.choices}
        reasons = {k.weight: k.reason for k in made.kept}
        lines = []
        for w in self.found.weights:
            c = choices.get(w.name)
            if c is None:
                reason = reasons.get(w.name, "is not in the plan")
                lines.append(Line(w.name, w.op, w.shape, "", {}, w.nbytes, w.nbytes, 0.0, None, reason))
                continue
            stored = arrays_of[w.name]
            after = sum(a.nbytes for role, a in stored.arrays.items() if stored.shared.get(role, w.name) == w.name)
            error = stored.error
            lines.append(Line(w.name, w.op, w.shape, c.method, c.params, w.nbytes, after, error, c.damage, ""))
        lines += [Line(k.weight, "", (), "", {}, k.nbytes, k.nbytes, 0.0, None, k.reason) for k in self.found.kept]
        return tuple(lines)


@contextmanager
def _clock(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start


def _prepare(model: Model, settings: Settings) -> list[str]:
    """Freeze initializers that are graph inputs, where rule or option says so; returns what there is to say."""
    notices = []
    if model.ir.ir_version < 4:
        notices.append(
            f"IR version {model.ir.ir_version} is raised to 4, where initializers need not be graph inputs; "
            "they are constants by rule below 4."
        )
    if ReplaceWeights.KEY in model.ir.metadata_props:
        notices.append("The model was compressed by onnxdp before; losses add up, so start from the original.")
    FreezeInitializers(fed_too=settings.freeze_initializers)(model.ir)
    return notices


def _probed(network: Network, found: Found, settings: Settings) -> tuple[Found, Probes]:
    """Make the probes, and count what one sample costs each weight."""
    specs = runtime.input_specs(network.specification)
    if settings.inputs is None:
        first = probes.make(specs, samples=1, seed=settings.seed, batch=1)
    else:
        first = probes.load(settings.inputs, specs)
    positions = stats.positions(network, found, first.feeds[0], first.batch)
    found = replace(found, weights=tuple(replace(w, positions=positions.get(w.name, 0)) for w in found.weights))
    samples = settings.samples or _samples_for(stats.macs(found.weights, positions))
    return found, _probes_for(network.specification, replace(settings, samples=samples), network)


def _samples_for(macs: int) -> int:
    """Return the number of probes that a network of so many multiply-accumulates per sample can afford."""
    return int(np.clip(3e10 / max(macs, 1), 32, 768)) // 4 * 4


def _probes_for(proto: Any, settings: Settings, network: Network | None) -> Probes:
    specs = runtime.input_specs(proto)
    if settings.inputs is not None:
        return probes.load(settings.inputs, specs)
    samples = settings.samples or 16
    answers = network.answers() if network is not None else None
    return probes.make(specs, samples=samples, seed=settings.seed, answers=answers)


def _opened(source: Any) -> tuple[Any, Any]:
    """Return (ModelProto without large data, session) of a model to verify."""
    model = model_file.read(source)
    proto = model_file.serialize(model)
    path = Path(source) if isinstance(source, str | os.PathLike) else None
    return proto, runtime.session(path if path is not None else proto)


def _settings_of(made: Plan, **extra: Any) -> Settings:
    """Rebuild the settings that encoding depends on from a plan."""
    unknown = sorted(set(made.settings) - set(_ENCODING_SETTINGS))
    if unknown:
        raise PlanError(f"The plan's settings have an unknown entry {unknown[0]!r}; remove it.")
    missing = [n for n in _ENCODING_SETTINGS if n not in made.settings]
    if missing:
        raise PlanError(f"The plan's settings lack {missing[0]!r}; write it again with 'onnxdp plan'.")
    try:
        return Settings(**made.settings, **extra)
    except UsageError as e:
        raise PlanError(f"The plan's settings are unusable: {e.message}") from e


def _why_nothing(found: Found) -> str:
    if not found.kept:
        return "the model has no Conv, Gemm or MatMul weight of 1 kB or more"
    largest = max(found.kept, key=lambda k: k.nbytes)
    return f"of what it holds, {largest.weight} ({largest.nbytes:,} bytes) {largest.reason}" if not found.weights else (
        "its weights are as small as onnxdp can make them"
    )


def _compressible(found: Found, weight: Any) -> float | None:
    """Return the share of the float32 bytes that factors holding 99 % of the plain energy would take."""
    if weight.op not in ("Conv", "Gemm", "MatMul"):
        return None
    stack = weights.blocks(weight, weights.tensor_of(found, weight.name).astype(np.float32))
    if min(stack.shape[-2:]) > 1024 or not np.isfinite(stack).all():
        return None
    values = np.linalg.svd(stack, compute_uv=False)
    energy = np.square(values.astype(np.float64)).sum(axis=0)
    rank = int(np.searchsorted(np.cumsum(energy), 0.99 * energy.sum()) + 1)
    return float(min(1.0, rank * (weight.inputs + weight.outputs) / (weight.inputs * weight.outputs)))


def _file(model: Model) -> File:
    return File(None if model.path is None else str(model.path), model.sha256, model.nbytes)


def _versions() -> dict[str, str]:
    names = ("onnxdp", "onnx", "onnx-ir", "numpy")
    return {n: metadata.version(n) for n in names} | {"onnxruntime": runtime.onnxruntime().__version__}

