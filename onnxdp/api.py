"""The public functions: one for every command."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from onnx import ModelProto

from onnxdp import (
    arrays,
    decisions,
    environment,
    frontier,
    noise,
    runtime,
    sizes,
    terms,
    timing,
    verifier,
    weights,
)
from onnxdp import model as model_file
from onnxdp.errors import ModelError
from onnxdp.findings import BenchRow, Diagnosis, Frontier, InspectedWeight, Inspection
from onnxdp.job import Job
from onnxdp.passes import FreezeInitializers
from onnxdp.preparation import probes_for
from onnxdp.probes import Probes
from onnxdp.records import (
    Plan,
    Report,
    Verification,
    Weight,
)
from onnxdp.result import file_of
from onnxdp.settings import Progress, Settings, silent
from onnxdp.weights import Found


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
        job = Job.start(source, chosen, progress, target=target)
        made = job.plan()
        return Result(*job.finish(made, source, target, overwrite=overwrite, dry_run=dry_run))


def plan(source: Any, *, progress: Progress = silent, **settings: Any) -> Plan:
    """Decide what becomes of every weight, without changing anything; parameters as for :func:`compress`."""
    chosen = Settings(**settings)
    with arrays.one_blas_thread():
        return Job.start(source, chosen, progress).plan()


def apply(
    source: Any,
    plan: Plan,
    target: str | os.PathLike[str] | None = None,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    inputs: Path | None = None,
    calibrate: Path | None = None,
    device: str = "auto",
    progress: Progress = silent,
) -> Result:
    """Carry out a plan; one that was made on real inputs needs them again.

    Raises
    ------
    PlanError
        The plan was made for another model, on real inputs that are missing, or names what does not exist.
    """
    settings = terms.settings_of(plan, inputs=inputs, calibrate=calibrate, device=device)
    with arrays.one_blas_thread():
        job = Job.start(source, settings, progress, plan=plan, target=target)
        job.check(plan)
        return Result(*job.finish(plan, source, target, overwrite=overwrite, dry_run=dry_run))


def sweep(source: Any, ratios: Sequence[float], *, progress: Progress = silent, **settings: Any) -> Frontier:
    """Draw the frontier of size against damage from one analysis; parameters as for :func:`compress`.

    Parameters
    ----------
    source : path, onnx.ModelProto, onnx_ir.Model or onnx_graphsurgeon.Graph
        Never changed.
    ratios : sequence of float
        Bytes before over bytes after; each gives the file that :func:`compress` would write.

    Returns
    -------
    Frontier
        One point per ratio, in this order; what is out of reach says so.

    Raises
    ------
    OnnxdpError
        One of its subclasses; see ``onnxdp.errors``.
    """
    each = frontier.settings_of(ratios, Settings(**settings))
    with arrays.one_blas_thread():
        return frontier.frontier(source, each, progress)


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
            w.name,
            w.op,
            w.nodes,
            w.shape,
            w.dtype,
            w.nbytes,
            w.nbytes / model.nbytes,
            _compressible(found, w),
            _unsound(found, w),
        )
        for w in found.weights
    ]
    rows += [
        InspectedWeight(k.weight, "", (), (), "", k.nbytes, k.nbytes / model.nbytes, None, k.reason)
        for k in found.kept
    ]
    rows.sort(key=lambda r: -r.nbytes)
    held = sum(r.nbytes for r in rows)
    return Inspection(
        file_of(model), tuple(rows), max(0, model.nbytes - held), model.ir.producer_name or "",
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
    first = model_file.serialize(model_file.read(a))
    second = model_file.serialize(model_file.read(b))
    found, noisy = decisions.decisions(first), noise.draws(first)
    if more := sorted({o.name for o in second.graph.output}.intersection(found.names)):
        raise ModelError(
            f"The two models have different outputs ({more[0]} is one of the second only); compare a model "
            "with its own compressed form."
        )
    left, right = (
        Path(m) if isinstance(m, str | os.PathLike) else proto for m, proto in ((a, first), (b, second))
    )
    made = _probes(left, first, Settings(inputs=inputs, samples=samples or 16, seed=seed))
    reference = verifier.Reference.of(verifier.opened(left, found, noisy=noisy), made, found)
    other = verifier.followed(right, found, noisy=noisy)
    return verifier.compare(reference, other, made, tolerance=tolerance)


def _probes(model: ModelProto | Path, proto: ModelProto, settings: Settings) -> Probes:
    """Make probes for a model that ONNX Runtime reads from ``model``, or load those that were given."""
    specs = runtime.input_specs(proto)
    if settings.inputs is None and sizes.free(specs):
        specs = sizes.fitted(specs, partial(runtime.run, runtime.session(model)))
    return probes_for(specs, settings)


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


def _unsound(found: Found, weight: Weight) -> str | None:
    """Return what compressing would refuse a weight for, None where nothing."""
    values = weights.tensor_of(found, weight.name)
    if np.isfinite([float(values.min()), float(values.max())]).all():  # either is NaN where a value is
        return None
    return "holds NaN or infinity, with which no model computes"


def _compressible(found: Found, weight: Weight) -> float | None:
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
