"""What the tools share: the data beside the checkout, processes with their peak memory, tables, a cache."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "models"


def shared() -> Path:
    """Return the folder with data/ and tools/: ONNXDP_SHARED, or ../shared beside the checkout."""
    folder = Path(os.environ.get("ONNXDP_SHARED") or ROOT.parent / "shared")
    if not (folder / "data").is_dir():
        sys.exit(
            f"There is no data at {folder}; set ONNXDP_SHARED to the folder that holds data/ and tools/."
        )
    return folder


def arguments(doc: str | None, kept: str = "") -> argparse.ArgumentParser:
    """Return a parser of what every measuring tool takes; ``kept`` names what its --cache keeps."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    if kept:
        told = f"keep {kept} here; one made by the same sources is not made again"
        add("--cache", type=Path, metavar="FOLDER", help=told)
    add("--json", action="store_true", help="print what was measured as JSON instead of tables")
    add("--readme", type=Path, metavar="FILE", help="also put the first table into this file's gap")
    return parser


def choosing(parser: argparse.ArgumentParser) -> None:
    """Add what :func:`classifiers` are chosen by."""
    told = "parts of file names; default: all classifiers"
    parser.add_argument("--models", nargs="+", default=(), metavar="NAME", help=told)


def tell(asked: argparse.Namespace, gap: str, rows: Sequence[Any], text: str, *more: str) -> None:
    """Print rows as JSON, or the text, which also goes into the gap of --readme, and what more there is."""
    if asked.json:
        print(json.dumps(rows, indent=1))
    else:
        print("\n\n".join([text, *more]))
        into(asked.readme, gap, text)


def classifiers(names: Sequence[str] = ()) -> list[Path]:
    """Return the classifiers whose file name contains one of the names; all without names."""
    found = sorted((shared() / "data" / "models").glob("*.onnx"))
    chosen = [p for p in found if not names or any(n in p.stem for n in names)]
    if not chosen:
        sys.exit(f"No model is named like {', '.join(names)}; there are {', '.join(p.stem for p in found)}.")
    return chosen


def files(names: Iterable[str], folder: Path, *, small: bool = False) -> Iterable[Path]:
    """Yield model files: as named, built into the folder where the name is a builder's, else classifiers."""
    sys.path.insert(0, str(MODELS))
    from builders import BUILDERS

    for name in names:
        if name.endswith(".onnx"):
            yield Path(name)
        elif name in BUILDERS:
            say(f"building {name}")
            out = folder / f"{name}.onnx"
            made = run([sys.executable, MODELS / "builders.py", name, out, *(["--small"] if small else [])])
            if made.code:
                sys.exit(f"{name} was not built: {made.sentence}")
            yield out
        else:
            yield from classifiers([name])


@dataclass(frozen=True)
class Ran:
    """How one process went.

    ``peak`` is its largest resident memory in bytes (VmHWM), 0 where unknown; ``cpu`` the seconds it kept
    processors busy, which other work on the machine changes less than ``seconds``.
    """

    code: int
    out: str
    err: str
    seconds: float
    peak: int
    cpu: float = 0.0

    @property
    def sentence(self) -> str:
        """The last line that it wrote to stderr, else to stdout."""
        return ((self.err.strip() or self.out.strip()).splitlines() or [""])[-1]


def run(command: Sequence[str | Path], cwd: Path | None = None) -> Ran:
    """Run a fresh process and watch its memory."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        start, before = time.perf_counter(), _cpu()
        process = subprocess.Popen(
            [str(c) for c in command], stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=cwd
        )
        peak = 0
        try:
            while process.poll() is None:
                peak = max(peak, _peak(process.pid))
                time.sleep(0.01)
        except BaseException:
            process.kill()
            process.wait()
            raise
        seconds = time.perf_counter() - start
        out.seek(0)
        err.seek(0)
        return Ran(process.returncode, out.read(), err.read(), seconds, peak, _cpu() - before)


def _cpu() -> float:
    """Return the processor seconds of all processes that ended under us."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def _peak(pid: int) -> int:
    """Read VmHWM of the program that the process became; it never falls, so the last reading counts."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return 0


def onnxdp(*arguments: str | Path) -> Ran:
    """Run the command line of this checkout."""
    return run([sys.executable, "-m", "onnxdp", *arguments], cwd=None)


def json_of(ran: Ran) -> dict[str, Any]:
    """Read the last line of stdout that is a JSON object, or all of it."""
    try:
        value: dict[str, Any] = json.loads(ran.out)
    except ValueError:
        value = json.loads(ran.out.strip().splitlines()[-1])
    return value


def evaluate(model: Path, original: Path, limit: int | None = None) -> dict[str, Any]:
    """Return what evaluate.py says of a classifier against the original."""
    command = [sys.executable, shared() / "tools" / "evaluate.py", model, "--against", original]
    ran = run([*command, *(["--limit", str(limit)] if limit else [])])
    if ran.code:
        raise RuntimeError(f"evaluate.py failed: {ran.sentence}")
    return json_of(ran)


def sha256(path: Path) -> str:
    """Return the sum of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sources() -> str:
    """Return a sum of the package and of the tool at work as they lie there, committed or not."""
    total = hashlib.sha256(Path(sys.argv[0]).read_bytes())
    for path in sorted(
        [*ROOT.glob("onnxdp/*.py"), *ROOT.glob("onnxdp/methods/*.py"), *ROOT.glob("passes/*.py")]
    ):
        total.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return total.hexdigest()


def commit() -> str:
    """Return the commit of the checkout, with a + where the package differs from it."""
    git = ["git", "-C", str(ROOT)]
    name = subprocess.run(
        [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    dirty = subprocess.run(
        [*git, "status", "--porcelain", "onnxdp", "passes"], capture_output=True, text=True
    ).stdout.strip()
    return f"{name}{'+' if dirty else ''}" if name else "unknown"


def machine() -> str:
    """Return what a measurement ran on: processor, cores, ONNX Runtime, the commit."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    name = next(names, platform.machine())
    onnxruntime = metadata.version("onnxruntime")
    return f"{os.cpu_count()} cores ({name}), ONNX Runtime {onnxruntime}; commit {commit()}"


def cached(folder: Path | None, key: Sequence[Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what was made for the key by these very sources before, or make it."""
    if folder is None:
        return make()
    before = sources()
    name = hashlib.sha256(json.dumps([*key, before]).encode()).hexdigest()[:24]
    path = folder / f"{name}.json"
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    made = make()
    if sources() != before:  # somebody edited the package meanwhile: nobody knows what was measured
        say("  the package changed while this was measured; the cell is not kept")
        return made
    folder.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(made, indent=1))
    draft.replace(path)
    return made


def markdown(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table; numbers are for the caller to format."""
    lines = ["| " + " | ".join(headers) + " |", "|" + "---|" * len(headers)]
    return "\n".join([*lines, *("| " + " | ".join(str(c) for c in row) + " |" for row in rows)])


def into(path: Path | None, name: str, text: str) -> None:
    """Put a table between ``<!-- table: NAME -->`` and ``<!-- end -->`` of a file such as README.md."""
    if path is None:
        return
    old = path.read_text(encoding="utf-8")
    begin, end = f"<!-- table: {name} -->", "<!-- end -->"
    if begin not in old or end not in old.split(begin, 1)[1]:
        sys.exit(f"{path} has no gap '{begin}' ... '{end}'; add one.")
    head, rest = old.split(begin, 1)
    path.write_text(f"{head}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}", encoding="utf-8")


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Format min / median / max, or the one value that there is."""
    shown = (min(values), statistics.median(values), max(values)) if len(values) > 1 else values
    return " / ".join(f"{v:.{digits}f}" for v in shown)


def megabytes(nbytes: float) -> str:
    """Format bytes; MB = 10^6."""
    return f"{nbytes / 1e6:.2f}"


def say(text: str) -> None:
    """Tell on stderr how far we are."""
    print(text, file=sys.stderr, flush=True)
