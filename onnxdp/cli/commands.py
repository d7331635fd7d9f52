"""The commands: arguments -> one call of :mod:`onnxdp.api` -> an exit code (:mod:`onnxdp.cli.endings`).

``api`` is imported inside the commands, so that ``--help`` starts at once.
"""

from __future__ import annotations

import ctypes
import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxdp import files, show, tables
from onnxdp.cli.endings import Commands
from onnxdp.cli.options import FILE, Out, Talk, answering, options_of, overwriting, writing
from onnxdp.errors import PlanError
from onnxdp.settings import DEFAULT_MAX_ERROR, TARGETS, Settings, parse_numbers

if TYPE_CHECKING:
    from onnxdp.records import Plan, Report

_ARENA_MAX = -8
"""What glibc's ``mallopt`` calls the number of its heaps (M_ARENA_MAX)."""


def _ready(source: Path, answer: Path | None, settings: Mapping[str, Any], *, overwrite: bool) -> None:
    """Refuse, before any work, an answer and an analysis that could not be written afterwards."""
    files.distinct(source, answer)
    files.require_free(answer, overwrite)
    _ready_to_keep(settings, source, answer, overwrite=overwrite)


def _ready_to_keep(settings: Mapping[str, Any], *others: Path | None, overwrite: bool) -> None:
    """Refuse to keep an analysis where that cannot be; it may take the place of the one it starts from."""
    kept = settings["save_analysis"]
    for other in others:
        files.distinct(other, kept)
    files.require_free(kept, overwrite)


def _mention_default(settings: Settings, talk: Talk) -> None:
    if settings.error_target is not None and settings.max_error is None and not talk.quiet:
        show.note(f"no target given: keeping the output error within {DEFAULT_MAX_ERROR:g} (--max-error)")


def _conclude(result: Report, out: Out, talk: Talk) -> int:
    """Write and print the report of a compression."""
    files.write(out.report, show.as_json(result))
    talk.answer(result, tables.report_lines(result, None if out.path is None else str(out.path)))
    return 0 if result.verification is None or result.verification.passed else 1


def _share_heap() -> None:
    """Let all threads have one heap: what one gave back another takes (a fifth off a ResNet-18's peak).

    Only here, where the process is ours: it is all of glibc's allocator that is told.
    """
    if sys.platform.startswith("linux") and (tell := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        tell(_ARENA_MAX, 1)


@click.group(
    cls=Commands,
    name="onnxdp",
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(package_name="onnxdp", prog_name="onnxdp", message="%(prog)s %(version)s")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Make trained ONNX models much smaller; stock ONNX Runtime runs the result.

    No training and no data are needed: onnxdp compress in.onnx out.onnx
    """
    _share_heap()
    if ctx.invoked_subcommand is None:
        show.note(ctx.get_help())
        ctx.exit(2)


@main.command()
@click.argument("source", metavar="IN", type=FILE)
@options_of()
@writing
@answering
def compress(source: Path, out: Out, talk: Talk, **settings: Any) -> int:
    """Write a smaller model OUT that does what IN does.

    Give one target: --ratio, --size or --max-error.
    """
    _mention_default(Settings(**settings), talk)
    out.ready(source)
    _ready_to_keep(settings, source, out.path, out.report, overwrite=out.overwrite)
    with talk.working() as progress:
        from onnxdp import api

        done = api.compress(
            source, out.path, overwrite=out.overwrite, dry_run=out.dry_run, progress=progress, **settings
        )
    return _conclude(done.report, out, talk)


@main.command()
@click.argument("source", metavar="IN", type=FILE)
@click.option("-o", "--output", type=FILE, metavar="P.json", help="Write the plan here.")
@options_of()
@overwriting
@answering
def plan(source: Path, output: Path | None, overwrite: bool, talk: Talk, **settings: Any) -> None:
    """Decide what becomes of every weight, and write no model."""
    _mention_default(Settings(**settings), talk)
    _ready(source, output, settings, overwrite=overwrite)
    with talk.working() as progress:
        from onnxdp import api

        made = api.plan(source, progress=progress, **settings)
    files.write(output, made.to_json())
    talk.answer(made, tables.plan_lines(made, None if output is None else str(output)))


@main.command()
@click.argument("source", metavar="IN", type=FILE)
@click.option(
    "--ratios",
    default="2,4,8,12,16",
    show_default=True,
    metavar="R,R,...",
    help="How many times smaller the whole file is to be made.",
)
@click.option("--plot", type=FILE, metavar="FILE", help="Draw it as .png, .svg or .pdf (extra 'plots').")
@options_of(*(f.name for f in dataclasses.fields(Settings) if f.name not in TARGETS))
@overwriting
@answering
def sweep(source: Path, ratios: str, plot: Path | None, overwrite: bool, talk: Talk, **settings: Any) -> int:
    """Show what each size costs the outputs, from one analysis of IN.

    Every ratio gives the file that compress --ratio writes; none is written here. Exit code 1: none is
    within reach.
    """
    wanted = parse_numbers("--ratios", ratios, above=1, remedy="try 2,4,8,12")
    Settings(**settings)
    _ready(source, plot, settings, overwrite=overwrite)
    with talk.working() as progress:
        from onnxdp import api, plots

        plots.require(plot)
        found = api.sweep(source, wanted, progress=progress, **settings)
        if plot is not None:
            files.write(plot, plots.frontier(found, plot))
    talk.answer(found, tables.frontier_lines(found, None if plot is None else str(plot)))
    return 0 if any(p.nbytes is not None for p in found.points) else 1


@main.command()
@click.argument("source", metavar="IN", type=FILE)
@click.argument("plan", metavar="P.json", type=FILE)
@options_of("inputs", "calibrate", "device")
@writing
@answering
def apply(source: Path, plan: Path, out: Out, talk: Talk, **settings: Any) -> int:
    """Write OUT by carrying out a plan that was made for IN.

    A plan that was made with --inputs or --calibrate needs the same again; how pictures are prepared it
    knows.
    """
    files.distinct(plan, out.path)
    files.distinct(plan, out.report)
    out.ready(source)
    with talk.working() as progress:
        from onnxdp import api

        done = api.apply(
            source,
            _read_plan(plan),
            out.path,
            overwrite=out.overwrite,
            dry_run=out.dry_run,
            progress=progress,
            **settings,
        )
    return _conclude(done.report, out, talk)


def _read_plan(path: Path) -> Plan:
    from onnxdp.records import Plan

    try:
        text = path.read_text(encoding="utf-8")
    except OSError as e:
        raise PlanError(f"{path} cannot be read ({e.strerror}); give a plan that 'onnxdp plan' wrote.") from e
    except UnicodeDecodeError as e:
        raise PlanError(f"{path} is not text; give a plan that 'onnxdp plan' wrote.") from e
    return Plan.from_json(text)


@main.command()
@click.argument("source", metavar="IN", type=FILE)
@options_of("include", "exclude", "freeze_initializers")
@answering
def inspect(source: Path, talk: Talk, **settings: Any) -> None:
    """List every weight: bytes, how far it shrinks or why it is kept."""
    with talk.working():
        from onnxdp import api

        found = api.inspect(source, **settings)
    talk.answer(found, tables.inspection_lines(found))


@main.command()
@click.argument("a", metavar="A", type=FILE)
@click.argument("b", metavar="B", type=FILE)
@options_of("inputs", "samples", "seed")
@click.option("--tolerance", type=float, metavar="E", help="Largest relative error of an output that passes.")
@answering
def verify(a: Path, b: Path, talk: Talk, **options: Any) -> int:
    """Compare the outputs of A and B; exit 1 past --tolerance."""
    with talk.working():
        from onnxdp import api

        found = api.verify(a, b, **options)
    talk.answer(found, tables.verification_lines(found))
    return 0 if found.passed else 1


@main.command()
@click.argument("models", metavar="A [B ...]", type=FILE, nargs=-1, required=True)
@click.option(
    "--repeat", type=click.IntRange(1), default=20, show_default=True, metavar="N", help="Runs of each model."
)
@click.option(
    "--threads", type=click.IntRange(1), metavar="N", help="Threads of ONNX Runtime; default: its own choice."
)
@options_of("inputs", "seed")
@answering
def bench(models: tuple[Path, ...], talk: Talk, **options: Any) -> None:
    """Measure models: bytes, load time, latency, memory; ratios to A."""
    with talk.working() as progress:
        from onnxdp import api

        rows = api.bench(models, progress=progress, **options)
    talk.answer(rows, tables.bench_lines(rows))


@main.command()
@click.argument("source", metavar="[IN]", type=FILE, required=False)
@answering
def doctor(source: Path | None, talk: Talk) -> None:
    """Say what is installed, and what of IN would be skipped and why."""
    with talk.working():
        from onnxdp import api

        found = api.doctor(source)
    talk.answer(found, tables.diagnosis_lines(found))
