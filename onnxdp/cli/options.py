"""What commands take: an option for every setting, how to answer, where to write."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import click

from onnxdp import files, show
from onnxdp.errors import UsageError
from onnxdp.settings import (
    CHANNEL_ORDERS,
    DEVICES,
    FACTOR_DTYPES,
    SOLVERS,
    Progress,
    Settings,
    help_of,
)

Command: TypeAlias = Callable[..., Any]

FILE = click.Path(path_type=Path)
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


@dataclass(frozen=True)
class Talk:
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


def answering(command: Command) -> Command:
    """Add the options that say how to answer; the command gets them as one ``talk``."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
    @click.option("-q", "--quiet", is_flag=True, help="Print the last line only.")
    @click.option("-v", "--verbose", count=True, help="Log what happens to stderr; -vv logs more.")
    @click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
    @functools.wraps(command)
    def talking(*args: Any, as_json: bool, quiet: bool, verbose: int, **values: Any) -> Any:
        return command(*args, talk=Talk(as_json, quiet, verbose), **values)

    return talking


@dataclass(frozen=True)
class Out:
    """Where one command writes a model, and how."""

    path: Path | None
    overwrite: bool
    dry_run: bool
    report: Path | None

    def ready(self, source: Path) -> None:
        """Refuse, before any work, what could not be written afterwards."""
        if self.path is None and not self.dry_run:
            raise UsageError("OUT is missing; name the file to write, or give --dry-run to write none.")
        files.distinct(source, self.report)
        files.distinct(self.path, self.report)
        files.require_free(self.report, self.overwrite)
        if not self.dry_run:
            files.require_free(self.path, self.overwrite)


overwriting = click.option("--overwrite", is_flag=True, help="Replace files that exist; OUT may then be IN.")


def writing(command: Command) -> Command:
    """Add OUT and the options of commands that write a model; the command gets them as one ``out``."""

    @click.argument("path", metavar="[OUT]", type=FILE, required=False)
    @overwriting
    @click.option("--dry-run", is_flag=True, help="Do everything but write; the byte count is exact.")
    @click.option("--report", type=FILE, metavar="FILE.json", help="Write the whole report as JSON, too.")
    @functools.wraps(command)
    def with_out(
        *args: Any, path: Path | None, overwrite: bool, dry_run: bool, report: Path | None, **values: Any
    ) -> Any:
        return command(*args, out=Out(path, overwrite, dry_run, report), **values)

    return with_out


_OPPOSITES = {"--short-names": "--keep-names"}


def options_of(*names: str) -> Callable[[Command], Command]:
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
    types: dict[str, Any] = {"float": float, "int": int, "str": str, "tuple[str, ...]": str, "Path": FILE}
    shown = setting.default not in (None, ())
    metavar = _METAVARS.get(setting.name, "N")
    return click.option(flag, type=types[kind.split(" |")[0]], metavar=metavar, show_default=shown, **about)
