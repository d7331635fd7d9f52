"""Where text goes: answers to stdout, progress, remarks and errors to stderr, records as JSON."""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from onnxdp.settings import Progress, silent
from onnxdp.tables import clean

log = logging.getLogger(__name__)


def say(text: str) -> None:
    """Write one answer to stdout; a reader who has gone (``| head``) is no error."""
    _write(sys.stdout, text)


def note(text: str) -> None:
    """Write one remark to stderr."""
    with suppress(OSError):
        _write(sys.stderr, text)


def refuse(message: str) -> None:
    """Write why nothing came of it, as ``error: ...`` on one line of stderr."""
    note(f"error: {clean(message)}")


def _write(stream: TextIO, text: str) -> None:
    encoding = stream.encoding or "utf-8"
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        stream.flush()
    except OSError as e:
        discard(stream)
        if e.errno != errno.EPIPE:
            raise


def discard(stream: TextIO) -> None:
    """Send what the stream still holds nowhere, so that the interpreter does not fail on it at exit."""
    with suppress(OSError, ValueError):
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, stream.fileno())
        os.close(sink)


def as_json(record: Any) -> str:
    """Give a record (or a tuple of rows) as one JSON object with its schema; not-a-number becomes null."""
    from onnxdp.plain import to_plain
    from onnxdp.records import SCHEMA

    if hasattr(record, "to_json"):
        text = record.to_json()
    elif isinstance(record, tuple):
        text = json.dumps({"schema": SCHEMA, "rows": to_plain(record)})
    else:
        text = json.dumps({"schema": SCHEMA, **to_plain(record)})
    return json.dumps(json.loads(text, parse_constant=lambda _: None), indent=1)


@contextmanager
def progress(*, quiet: bool, verbose: int) -> Iterator[Progress]:
    """Show progress while the block runs: a bar on a terminal, log lines with ``-v``, otherwise nothing."""
    with _logging(
        logging.ERROR if quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    ):
        if verbose:
            yield _log_progress
        elif quiet or not sys.stderr.isatty():
            yield silent
        else:
            with _bar() as callback:
                yield callback


def _log_progress(stage: str, done: int, total: int, name: str) -> None:
    log.info("%s %d/%d %s", stage, done, total, clean(name))


@contextmanager
def _bar() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    # Names may hold brackets, which would be markup.
    left, right = (
        TextColumn("{task.description}", markup=False),
        TextColumn("{task.fields[item]}", markup=False),
    )
    columns = (left, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), right)
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        # The first bar stands before anything is imported or read, which takes a second by itself.
        task, current = bar.add_task("starting", total=None, item=""), "starting"

        def callback(stage: str, done: int, total: int, name: str) -> None:
            nonlocal task, current
            if stage != current:
                bar.remove_task(task)
                task, current = bar.add_task(stage, total=total or None, item=""), stage
            bar.update(task, completed=done, total=total or None, item=clean(name))

        yield callback


class _Notes(logging.Handler):
    """Sends log records where ``note`` sends, looked up each time: rich and tests replace ``sys.stderr``."""

    def emit(self, record: logging.LogRecord) -> None:
        note(self.format(record))


@contextmanager
def _logging(level: int) -> Iterator[None]:
    logger, handler = logging.getLogger("onnxdp"), _Notes()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
