"""How a command line ends: every exception becomes an exit code and one sentence.

0 done; 1 the answer is no; 2 the request or the input is unusable; 3 the machine could not; 70 a bug;
128 + the signal's number when stopped by one (130, 143).
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import click

from onnxdp import files, show
from onnxdp.errors import OnnxdpError


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


def _place(e: OSError) -> str:
    return "" if e.filename is None else f": {e.filename}"


class Commands(click.Group):
    """The group of commands, listed as defined, whose every ending becomes a sentence and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Name the commands in the order of their importance."""
        return list(self.commands)

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> NoReturn:
        """Run one command line and exit."""
        words = list(sys.argv[1:] if args is None else args)
        # Read here, because these must hold for errors that parsing itself finds.
        flags = words[: words.index("--")] if "--" in words else words
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
