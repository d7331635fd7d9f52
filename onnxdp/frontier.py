"""One analysis, many targets: what a model's size costs its outputs.

Reading, probing, solving and every measurement serve all ratios; each then gets a plan of its own, weights
encoded layer by layer, and a file that is compared with the original. A ratio gives the bytes that it gives
alone: what a search learns beyond measurements (scales, points of curves) is not handed on.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from onnxdp import model as model_file
from onnxdp import terms, verifier
from onnxdp.errors import TargetError, UsageError, VerifyError
from onnxdp.findings import Frontier, FrontierPoint
from onnxdp.job import Job
from onnxdp.records import File, Plan
from onnxdp.result import file_of, versions
from onnxdp.settings import TARGETS, Progress, Settings
from onnxdp.verifier import Reference


def settings_of(ratios: Sequence[float], given: Settings) -> list[Settings]:
    """Return the settings of each ratio.

    Raises
    ------
    UsageError
        There is no ratio, one has no meaning or is there twice, or the settings name a target of their own.
    """
    if not ratios:
        raise UsageError("--ratios names no ratio; give some, such as 2,4,8.")
    for name in TARGETS:
        if getattr(given, name) is not None:
            raise UsageError(f"A sweep takes its targets from the ratios alone; leave {name} out.")
    made = [replace(given, ratio=r) for r in ratios]
    ratio, count = Counter(s.ratio for s in made).most_common(1)[0]
    if count > 1:
        raise UsageError(f"--ratios names {ratio:g} twice; name every ratio once.")
    return made


def frontier(source: Any, each: Sequence[Settings], progress: Progress) -> Frontier:
    """Analyse a model once, then plan, encode and measure it under each of the settings.

    Parameters
    ----------
    source : path, onnx.ModelProto, onnx_ir.Model or onnx_graphsurgeon.Graph
    each : sequence of Settings
        Alike but for the ratio.
    progress : callable
    """
    job = Job.start(source, each[0], progress, also=each[1:])
    seconds = dict(job.seconds)
    path = job.original.path
    session = job.rewriter.opened(path if path is not None else model_file.serialize(job.original))
    reference = Reference.of(session, job.held_out, job.rewriter.decisions)
    del session
    started, notices = job.started, tuple(job.notices)
    points = []
    for number, settings in enumerate(each):
        if not job.suits(settings):  # it takes other channels out: a network of its own
            own = replace(settings, save_analysis=None)
            job = Job.start(source, own, progress, also=each[number + 1 :])
        job = job.aimed(settings, _for_ratio(progress, settings))
        points.append(_point(job, reference))
        notices = tuple(dict.fromkeys((*notices, *job.notices)))
        for stage, took in job.seconds.items():
            seconds[stage] = seconds.get(stage, 0.0) + took
    seconds["total"] = time.perf_counter() - started
    return Frontier(
        file_of(job.original),
        tuple(points),
        terms.said_of(each[0]),
        seconds,
        versions(),
        job.device,
        notices,
    )


def _for_ratio(progress: Progress, settings: Settings) -> Progress:
    """Return what names the ratio at hand before every stage."""
    return lambda stage, done, total, name: progress(f"{settings.ratio:g}x: {stage}", done, total, name)


def _point(job: Job, reference: Reference) -> FrontierPoint:
    """Return what one target gives, or why it gives nothing."""
    asked, budget = job.settings.ratio, job.settings.budget(job.original.nbytes)
    assert asked is not None and budget is not None
    try:
        made = job.plan()
        file, error = _measured(job, made, reference)
    except (TargetError, VerifyError) as e:
        took = time.perf_counter() - job.started
        return FrontierPoint(asked, budget, None, None, None, None, None, e.message, took)
    damage = sum(c.damage or 0.0 for c in made.choices)
    took = time.perf_counter() - job.started
    ratio = job.original.nbytes / file.nbytes
    macs = job.macs(made.choices)
    return FrontierPoint(asked, budget, file.nbytes, file.sha256, ratio, damage, error, None, took, macs)


def _measured(job: Job, made: Plan, reference: Reference) -> tuple[File, float]:
    """Write the file that a plan gives, for a moment; return what it is and its output error."""
    result, _ = job.built(made)
    errors: list[float] = []

    def check(at: Path) -> None:
        job.encoder.progress("verifying", 0, 1, "")
        found = verifier.compare(reference, job.rewriter.followed(at), job.held_out)
        if not found.passed:
            raise VerifyError(
                "The compressed model's outputs are not finite on the probe inputs; ask for less."
            )
        errors.append(found.error)

    name = (job.original.path or Path("model.onnx")).name
    with tempfile.TemporaryDirectory(prefix="onnxdp-") as folder:
        file = model_file.write(result, Path(folder) / name, check=check)
    return replace(file, path=None), errors[0]
