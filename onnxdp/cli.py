"""The command line: arguments -> one call of :mod:`onnxdp.api` -> an exit code.

``api`` is imported inside the commands, so that ``--help`` starts at once.

Exit codes: 0 done; 1 the answer is no; 2 the request or the input is unusable; 3 the machine could not;
70 a bug; 128 + the signal's number when stopped by one (130, 143).
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import json
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import click

from onnxdp import files, show
from onnxdp.errors import OnnxdpError, PlanError, UsageError
from onnxdp.settings import (
    CHANNEL_ORDERS,
    DEFAULT_MAX_ERROR,
    DEVICES,
    FACTOR_DTYPES,
    SOLVERS,
    TARGETS,
    Progress,
    Settings,
    help_of,
    parse_numbers,
)

if TYPE_CHECKING:
    from onnxdp.records import Plan, Report

Command: TypeAlias = Callable[..., Any]

_ARENA_MAX = -8
"""What glibc's ``mallopt`` calls the number of its heaps (M_ARENA_MAX)."""
_FILE = click.Path(path_type=Path)
_METAVARS = {
    "ratio": "R",
    "size": "3MB|30%",
    "max_error": "E",
    "method": "NAME",
    "solver": "|".join(SOLVERS),
    "partition": "auto|none|ROWS",
    "factor_dtype": "|".join(FACTOR_DTYPES),
    "include": "PATTERN",
    "exclude": "PATTERN",
    "inputs": "FILE.npz",
    "calibrate": "PATH",
    "analysis": "FILE.npz",
    "save_analysis": "FILE.npz",
    "mean": "R,G,B",
    "std": "R,G,B",
    "channel_order": "|".join(CHANNEL_ORDERS),
    "input_range": "0..1",
    "device": "|".join(DEVICES),
}


# --- exit codes -------------------------------------------------------------------------------------------


class _Stopped(BaseException):
    """A signal asked the process to end; raised so that whatever is half written gets cleaned up."""

    def __init__(self, number: int) -> None:
        self.exit_code = 128 + number


@contextmanager
def _stoppable() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into an exception; one that is ignored (nohup) or handled already stays so."""
    names = [n for n in ("SIGTERM", "SIGHUP") if hasattr(signal, n)]
    numbers = (
        [getattr(signal, n) for n in names] if threading.current_thread() is threading.main_thread() else []
    )
    ours = [n for n in numbers if signal.getsignal(n) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, _stop)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _stop(number: int, _frame: object) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # a second one must not break off the cleaning up
    raise _Stopped(number)


def _verdict(e: BaseException) -> tuple[int, str]:
    """Give the exit code of an exception and the sentence that goes with it."""
    if isinstance(e, OnnxdpError):
        return e.exit_code, e.message
    if isinstance(e, click.ClickException):
        return 2, e.format_message()
    if isinstance(e, KeyboardInterrupt | click.Abort):
        return 130, "Interrupted."
    if isinstance(e, _Stopped):
        return e.exit_code, "Stopped by a signal."
    if isinstance(e, MemoryError):
        return (
            3,
            "The memory of this machine is too small for this; free some, or compress a part with --include.",
        )
    if isinstance(e, OSError) and e.errno in files.MACHINE:
        return 3, f"{e.strerror}{_place(e)}; make room and run again."
    if isinstance(e, OSError) and e.errno in files.REQUEST and e.filename is not None:
        return 2, f"{e.strerror}{_place(e)}; correct the path or its permissions."
    what = f"{type(e).__name__}: {e}" if str(e) else type(e).__name__
    return 70, f"This is a bug in onnxdp ({what}); please report it with what --debug -vv prints."


def _share_heap() -> None:
    """Let all threads have one heap: what one gave back another takes (a fifth off a ResNet-18's peak).

    Only here, where the process is ours: it is all of glibc's allocator that is told.
    """
    if sys.platform.startswith("linux") and (tell := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        tell(_ARENA_MAX, 1)


def _place(e: OSError) -> str:
    return "" if e.filename is None else f": {e.filename}"


class _Commands(click.Group):
    """The group of commands, listed as defined, whose every ending becomes a sentence and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name the commands in the order of their importance."""
        return list(self.commands)

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> NoReturn:
        """Run one command line and exit."""
        words = list(sys.argv[1:] if args is None else args)
        # Read here, because these must hold for errors that parsing itself finds.
        flags = words[: words.index("--")] if "--" in words else words
        _share_heap()
        try:
            with _stoppable():
                code = super().main(words, *rest, **{**extra, "standalone_mode": False}) or 0
        except SystemExit:
            raise
        except BaseException as e:
            code, message = _verdict(e)
            if "--debug" in flags:
                show.note("".join(traceback.format_exception(e)).rstrip())
            show.refuse(message)
            if "--json" in flags:
                show.say(json.dumps({"schema": 1, "error": message, "exit_code": code}))
        sys.exit(code)


# --- options ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Talk:
    """How one command answers."""

    as_json: bool
    quiet: bool
    verbose: int

    def working(self) -> AbstractContextManager[Progress]:
        """Show progress while the block runs."""
        return show.progress(quiet=self.quiet, verbose=self.verbose)

    def answer(self, record: Any, lines: list[str]) -> None:
        """Print the record as JSON, or its lines; the last one alone where quiet."""
        if self.as_json:
            show.say(show.as_json(record))
        else:
            show.say("\n".join(lines[-1:] if self.quiet else lines))


def _talking(command: Command) -> Command:
    """Add the options that say how to answer; the command gets them as one ``talk``."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
    @click.option("-q", "--quiet", is_flag=True, help="Print the last line only.")
    @click.option("-v", "--verbose", count=True, help="Log what happens to stderr; -vv logs more.")
    @click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
    @functools.wraps(command)
    def talking(*args: Any, as_json: bool, quiet: bool, verbose: int, **values: Any) -> Any:
        return command(*args, talk=_Talk(as_json, quiet, verbose), **values)

    return talking


def _writing(command: Command) -> Command:
    """Add the options of commands that write a model."""
    for option in (
        click.option(
            "--report", type=_FILE, metavar="FILE.json", help="Write the whole report as JSON, too."
        ),
        click.option("--dry-run", is_flag=True, help="Do everything but write; the byte count is exact."),
        _overwriting,
    ):
        command = option(command)
    return command


_OPPOSITES = {"--short-names": "--keep-names"}

_overwriting = click.option("--overwrite", is_flag=True, help="Replace files that exist; OUT may then be IN.")


def _settings(*names: str) -> Callable[[Command], Command]:
    """Add an option for each named setting, or for all of them; name, default and help come from Settings."""

    def decorate(command: Command) -> Command:
        for setting in reversed(dataclasses.fields(Settings)):
            if not names or setting.name in names:
                command = _option(setting)(command)
        return command

    return decorate


def _option(setting: dataclasses.Field[Any]) -> Callable[[Command], Command]:
    """Give the option of one setting, by its annotation."""
    flag, kind = "--" + setting.name.replace("_", "-"), str(setting.type)
    about: dict[str, Any] = {"help": help_of(setting.name), "default": setting.default}
    if kind == "bool":
        return click.option(flag, is_flag=True, **about)
    if kind == "bool | None":
        return click.option(f"{flag}/{_OPPOSITES.get(flag, '--no-' + flag[2:])}", is_flag=True, **about)
    if kind.startswith("tuple"):
        about["multiple"] = True
    types: dict[str, Any] = {"float": float, "int": int, "str": str, "tuple[str, ...]": str, "Path": _FILE}
    shown = setting.default not in (None, ())
    metavar = _METAVARS.get(setting.name, "N")
    return click.option(flag, type=types[kind.split(" |")[0]], metavar=metavar, show_default=shown, **about)


# --- what several commands do -------------------------------------------------------------------------------


def _ready(source: Path, target: Path | None, *, overwrite: bool, dry_run: bool, report: Path | None) -> None:
    """Refuse, before any work, what could not be written afterwards."""
    if target is None and not dry_run:
        raise UsageError("OUT is missing; name the file to write, or give --dry-run to write none.")
    files.distinct(source, report)
    files.distinct(target, report)
    files.require_free(report, overwrite)
    if not dry_run:
        files.require_free(target, overwrite)


def _ready_to_keep(settings: Mapping[str, Any], *others: Path | None, overwrite: bool) -> None:
    """Refuse to keep an analysis where that cannot be; it may take the place of the one it starts from."""
    kept = settings["save_analysis"]
    for other in others:
        files.distinct(other, kept)
    files.require_free(kept, overwrite)


def _mention_default(settings: Settings, talk: _Talk) -> None:
    if settings.error_target is not None and settings.max_error is None and not talk.quiet:
        show.note(f"no target given: keeping the output error within {DEFAULT_MAX_ERROR:g} (--max-error)")


def _conclude(result: Report, target: Path | None, report: Path | None, talk: _Talk) -> int:
    """Write and print the report of a compression."""
    files.write(report, show.as_json(result))
    talk.answer(result, show.report_lines(result, None if target is None else str(target)))
    return 0 if result.verification is None or result.verification.passed else 1


# --- commands ---------------------------------------------------------------------------------------------


@click.group(
    cls=_Commands,
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
    if ctx.invoked_subcommand is None:
        show.note(ctx.get_help())
        ctx.exit(2)


@main.command()
@click.argument("source", metavar="IN", type=_FILE)
@click.argument("target", metavar="[OUT]", type=_FILE, required=False)
@_settings()
@_writing
@_talking
def compress(
    source: Path,
    target: Path | None,
    overwrite: bool,
    dry_run: bool,
    report: Path | None,
    talk: _Talk,
    **settings: Any,
) -> int:
    """Write a smaller model OUT that does what IN does.

    Give one target: --ratio, --size or --max-error.
    """
    _mention_default(Settings(**settings), talk)
    _ready(source, target, overwrite=overwrite, dry_run=dry_run, report=report)
    _ready_to_keep(settings, source, target, report, overwrite=overwrite)
    with talk.working() as progress:
        from onnxdp import api

        result = api.compress(
            source, target, overwrite=overwrite, dry_run=dry_run, progress=progress, **settings
        ).report
    return _conclude(result, target, report, talk)


@main.command()
@click.argument("source", metavar="IN", type=_FILE)
@click.option("-o", "--output", type=_FILE, metavar="P.json", help="Write the plan here.")
@_settings()
@_overwriting
@_talking
def plan(source: Path, output: Path | None, overwrite: bool, talk: _Talk, **settings: Any) -> None:
    """Decide what becomes of every weight, and write no model."""
    _mention_default(Settings(**settings), talk)
    files.distinct(source, output)
    files.require_free(output, overwrite)
    _ready_to_keep(settings, source, output, overwrite=overwrite)
    with talk.working() as progress:
        from onnxdp import api

        made = api.plan(source, progress=progress, **settings)
    files.write(output, made.to_json())
    talk.answer(made, show.plan_lines(made, None if output is None else str(output)))


@main.command()
@click.argument("source", metavar="IN", type=_FILE)
@click.option(
    "--ratios",
    default="2,4,8,12,16",
    show_default=True,
    metavar="R,R,...",
    help="How many times smaller the whole file is to be made.",
)
@click.option("--plot", type=_FILE, metavar="FILE", help="Draw it as .png, .svg or .pdf (extra 'plots').")
@_settings(*(f.name for f in dataclasses.fields(Settings) if f.name not in TARGETS))
@_overwriting
@_talking
def sweep(source: Path, ratios: str, plot: Path | None, overwrite: bool, talk: _Talk, **settings: Any) -> int:
    """Show what each size costs the outputs, from one analysis of IN.

    Every ratio gives the file that compress --ratio writes; none is written here. Exit code 1: none is
    within reach.
    """
    wanted = parse_numbers("--ratios", ratios, above=1)
    Settings(**settings)
    files.distinct(source, plot)
    files.require_free(plot, overwrite)
    _ready_to_keep(settings, source, plot, overwrite=overwrite)
    with talk.working() as progress:
        from onnxdp import api, plots

        plots.require(plot)
        found = api.sweep(source, wanted, progress=progress, **settings)
        if plot is not None:
            files.write(plot, plots.frontier(found, plot))
    talk.answer(found, show.frontier_lines(found, None if plot is None else str(plot)))
    return 0 if any(p.nbytes is not None for p in found.points) else 1


@main.command()
@click.argument("source", metavar="IN", type=_FILE)
@click.argument("plan", metavar="P.json", type=_FILE)
@click.argument("target", metavar="[OUT]", type=_FILE, required=False)
@_settings("inputs", "calibrate", "device")
@_writing
@_talking
def apply(
    source: Path,
    plan: Path,
    target: Path | None,
    overwrite: bool,
    dry_run: bool,
    report: Path | None,
    talk: _Talk,
    **settings: Any,
) -> int:
    """Write OUT by carrying out a plan that was made for IN.

    A plan that was made with --inputs or --calibrate needs the same again; how pictures are prepared it
    knows.
    """
    files.distinct(plan, target)
    files.distinct(plan, report)
    _ready(source, target, overwrite=overwrite, dry_run=dry_run, report=report)
    with talk.working() as progress:
        from onnxdp import api

        result = api.apply(
            source,
            _read_plan(plan),
            target,
            overwrite=overwrite,
            dry_run=dry_run,
            progress=progress,
            **settings,
        ).report
    return _conclude(result, target, report, talk)


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
@click.argument("source", metavar="IN", type=_FILE)
@_settings("include", "exclude", "freeze_initializers")
@_talking
def inspect(source: Path, talk: _Talk, **settings: Any) -> None:
    """List every weight: bytes, how far it shrinks or why it is kept."""
    with talk.working():
        from onnxdp import api

        found = api.inspect(source, **settings)
    talk.answer(found, show.inspection_lines(found))


@main.command()
@click.argument("a", metavar="A", type=_FILE)
@click.argument("b", metavar="B", type=_FILE)
@_settings("inputs", "samples", "seed")
@click.option("--tolerance", type=float, metavar="E", help="Largest relative error of an output that passes.")
@_talking
def verify(a: Path, b: Path, talk: _Talk, **options: Any) -> int:
    """Compare the outputs of A and B; exit 1 past --tolerance."""
    with talk.working():
        from onnxdp import api

        found = api.verify(a, b, **options)
    talk.answer(found, show.verification_lines(found))
    return 0 if found.passed else 1


@main.command()
@click.argument("models", metavar="A [B ...]", type=_FILE, nargs=-1, required=True)
@click.option(
    "--repeat", type=click.IntRange(1), default=20, show_default=True, metavar="N", help="Runs of each model."
)
@click.option(
    "--threads", type=click.IntRange(1), metavar="N", help="Threads of ONNX Runtime; default: its own choice."
)
@_settings("inputs", "seed")
@_talking
def bench(models: tuple[Path, ...], talk: _Talk, **options: Any) -> None:
    """Measure models: bytes, load time, latency, memory; ratios to A."""
    with talk.working() as progress:
        from onnxdp import api

        rows = api.bench(models, progress=progress, **options)
    talk.answer(rows, show.bench_lines(rows))


@main.command()
@click.argument("source", metavar="[IN]", type=_FILE, required=False)
@_talking
def doctor(source: Path | None, talk: _Talk) -> None:
    """Say what is installed, and what of IN would be skipped and why."""
    with talk.working():
        from onnxdp import api

        found = api.doctor(source)
    talk.answer(found, show.diagnosis_lines(found))
