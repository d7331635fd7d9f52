"""Answers laid out as lines, of which the last is the answer in short.

Tables are plain text whose width depends on what they hold and never on the terminal: what is piped is what
was seen. kB = 10^3 bytes. Names come from files that others made: what is not printable is escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnxdp.findings import BenchRow, Diagnosis, Frontier, Inspection
    from onnxdp.records import Candidate, Line, Macs, Params, Plan, Report, Verification

_USUAL = (("axis", "rows"), ("run", "fold"))
"""Parameters that are left out of a line."""


def report_lines(report: Report, target: str | None) -> list[str]:
    """Lay out a compression: a line per weight, notices, asked against reached, and the line to grep."""
    count = len(report.lines)
    table = _columns([(_index(i, count), *_line_cells(line)) for i, line in enumerate(report.lines, 1)])
    asked = f"asked {report.plan.target}, reached {report.ratio:.4g}x: {report.target.nbytes} bytes"
    if report.dry_run:
        words = ["DRY RUN"]
    elif report.verification is None:
        words = ["UNVERIFIED"]
    else:
        words = ["PASSED" if report.verification.passed else "FAILED"]
    words[0] += f" {_bytes(report.source.nbytes)} -> {_bytes(report.target.nbytes)} ({report.ratio:.2f}x)"
    if report.macs is not None:
        words.append(f"macs {_fewer(report.macs)}")
    if report.verification is not None:
        words.append(f"output error {_number(report.verification.error)}")
    if report.latency_ratio is not None:
        words.append(f"latency x{report.latency_ratio:.2f}")
    words.append(f"{report.seconds.get('total', sum(report.seconds.values())):.1f} s")
    if target is not None and not report.dry_run:
        words[-1] += f" -> {clean(target)}"
    return [*table, *_notices(report.notices), asked, "  ".join(words)]


def plan_lines(plan: Plan, target: str | None) -> list[str]:
    """Lay out a plan: what becomes of every weight."""
    count = len(plan.choices) + len(plan.kept)
    rows = [(_index(i, count), *_choice_cells(c)) for i, c in enumerate(plan.choices, 1)]
    rows += [
        (_index(i, count), k.weight, _bytes(k.nbytes), f"kept: {k.reason}")
        for i, k in enumerate(plan.kept, len(plan.choices) + 1)
    ]
    last = f"PLANNED {len(plan.choices)} of {count} weights  asked {plan.target}"
    if plan.budget is not None:
        last += f"  at most {plan.budget} bytes"
    return [*_columns(rows, right=(2,)), last + (f" -> {clean(target)}" if target else "")]


def frontier_lines(frontier: Frontier, plot: str | None) -> list[str]:
    """Lay out a frontier: a line per ratio, and how far it goes."""
    head = ("asked", "bytes", "reached", "foreseen damage", "output error", "")
    rows = [
        (f"{p.asked:g}x", "-", "-", "-", "-", p.reason or "")
        if p.nbytes is None or p.ratio is None or p.damage is None or p.error is None
        else (
            f"{p.asked:g}x",
            str(p.nbytes),
            f"{p.ratio:.4g}x",
            _number(p.damage),
            _number(p.error),
            "" if p.macs is None else f"macs {_fewer(p.macs)}",
        )
        for p in frontier.points
    ]
    got = [p for p in frontier.points if p.nbytes is not None]
    last = f"SWEPT {len(got)} of {len(rows)} ratios  {_bytes(frontier.source.nbytes)}"
    if smallest := min(got, key=lambda p: p.nbytes or 0, default=None):
        last += f" -> {_bytes(smallest.nbytes or 0)} ({smallest.ratio:.2f}x)"
    last += f"  {frontier.seconds['total']:.1f} s"
    table = _columns([head, *rows], right=(0, 1, 2, 3, 4))
    return [*table, *_notices(frontier.notices), last + (f" -> {clean(plot)}" if plot else "")]


def verification_lines(verification: Verification) -> list[str]:
    """Lay out a comparison: a line per output, ending in PASSED or FAILED."""
    head = ("output", "max difference", "mean difference", "relative error", "same argmax")
    rows = [
        (
            o.name,
            _number(o.max_abs),
            _number(o.mean_abs),
            _number(o.relative),
            "" if o.same_argmax is None else f"{100 * o.same_argmax:.1f} %",
        )
        for o in verification.outputs
    ]
    last = f"{'PASSED' if verification.passed else 'FAILED'} output error {_number(verification.error)}"
    if verification.tolerance is not None:
        last += f" {'<=' if verification.passed else '>'} {verification.tolerance:g}"
    seed = "" if verification.seed is None else f", seed {verification.seed}"
    return [*_columns([head, *rows], right=(1, 2, 3, 4)), f"{last}  {verification.samples} samples{seed}"]


def inspection_lines(inspection: Inspection) -> list[str]:
    """Lay out a file: every weight, how far it can shrink or why it is left alone, and the totals."""
    count, weights = len(inspection.rows), sum(r.nbytes for r in inspection.rows)
    rows = [
        (
            _index(i, count),
            r.name,
            _what(r.op, r.shape),
            r.dtype,
            _bytes(r.nbytes),
            f"{100 * r.share:.1f} %",
            _prospect(r.compressible, r.reason),
        )
        for i, r in enumerate(inspection.rows, 1)
    ]
    last = (
        f"TOTAL {_bytes(inspection.file.nbytes)}  {count} weights {_bytes(weights)}  other "
        f"{_bytes(inspection.other_bytes)}  opset {inspection.opset}  IR {inspection.ir_version}"
    )
    return [
        *_columns(rows, right=(4, 5)),
        last + (f"  by {clean(inspection.producer)}" if inspection.producer else ""),
    ]


def bench_lines(rows: Sequence[BenchRow]) -> list[str]:
    """Lay out measurements side by side, each with its ratio to the first model's."""
    head = ("model", "file", "", "load", "", "latency", "", "min", "max", "peak memory", "")
    cells = [
        (
            r.path,
            _bytes(r.nbytes),
            _times(r.nbytes_ratio),
            _seconds(r.load_seconds),
            _times(r.load_ratio),
            _seconds(r.latency[1]),
            _times(r.latency_ratio),
            _seconds(r.latency[0]),
            _seconds(r.latency[2]),
            "-" if r.peak_memory_bytes is None else _bytes(r.peak_memory_bytes),
            "" if r.peak_memory_ratio is None else _times(r.peak_memory_ratio),
        )
        for r in rows
    ]
    return _columns([head, *cells], right=range(1, len(head)))


def diagnosis_lines(diagnosis: Diagnosis) -> list[str]:
    """Lay out what is installed and, with a model, what of it would be skipped and why."""
    rows = [(name, version or "not installed") for name, version in diagnosis.versions.items()]
    rows += [
        ("ONNX Runtime is from", ", ".join(diagnosis.onnxruntime_packages) or "nothing installed"),
        ("providers", ", ".join(diagnosis.providers) or "none"),
        ("CUDA device", diagnosis.cupy_device or f"none: {diagnosis.cupy_reason}"),
        ("cores", str(diagnosis.cores)),
        ("memory", "unknown" if diagnosis.memory_bytes is None else _bytes(diagnosis.memory_bytes)),
    ]
    lines = [*_columns(rows), *_notices(diagnosis.notices)]
    last = "READY" if diagnosis.providers else "NOT READY: ONNX Runtime is missing"
    last += f"  {len(diagnosis.notices)} notices"
    if diagnosis.inspection is not None:
        left = [r for r in diagnosis.inspection.rows if r.reason is not None]
        lines += _columns([("skip", r.name, _what(r.op, r.shape), r.reason or "") for r in left])
        last += f"  {len(left)} of {len(diagnosis.inspection.rows)} weights would be skipped"
    return [*lines, last]


def _line_cells(line: Line) -> tuple[str, ...]:
    before, after = _bytes(line.before), _bytes(line.after)
    cells = (line.weight, _what(line.op, line.shape), f"{before} -> {after}")
    if line.method in ("", "kept"):
        return (*cells, f"kept: {line.reason}")
    return (*cells, _form(line.method, line.params), f"err {_number(line.error)}", line.reason)


def _choice_cells(choice: Candidate) -> tuple[str, ...]:
    damage = "" if choice.damage is None else f"damage {_number(choice.damage)}"
    form = _form(choice.method, choice.params)
    return (choice.weight, _bytes(choice.nbytes), form, f"err {_number(choice.error)}", damage)


def _form(method: str, params: Params) -> str:
    """Give a form as ``dp r=24 x4 float16``: atoms, blocks, type; other parameters by name."""
    words = [method]
    for name, value in params.items():
        if name == "atoms":
            words.insert(1, f"r={value}")
        elif name == "parts":
            words += [f"x{value}"] if value != 1 else []
        elif name == "dtype":
            words.append(str(value))
        elif (name, value) not in _USUAL:
            words.append(f"{name}={value}")
    return " ".join(words)


def _prospect(compressible: float | None, reason: str | None) -> str:
    if reason is not None:
        return f"left alone: {reason}"
    return "" if compressible is None else f"compressible to {100 * compressible:.0f} %"


def _notices(notices: Sequence[str]) -> list[str]:
    return [f"notice: {clean(n)}" for n in notices]


def _columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Align cells, two spaces apart; the last cell of a row is never padded, so prose may run on."""
    rows = [[clean(cell) for cell in row] for row in rows]
    widths = [
        max((len(r[i]) for r in rows if i < len(r) - 1 or i in right), default=0)
        for i in range(_widest(rows))
    ]
    return ["  ".join(_pad(c, widths[i], i in right) for i, c in enumerate(r)).rstrip() for r in rows]


def _widest(rows: Sequence[Sequence[str]]) -> int:
    return max((len(r) for r in rows), default=0)


def _pad(cell: str, width: int, right: bool) -> str:
    return cell.rjust(width) if right else cell.ljust(width)


def _index(i: int, count: int) -> str:
    return f"[{i:{len(str(count))}}/{count}]"


def _what(op: str, shape: Sequence[int]) -> str:
    """Give the readers' operator and the shape; nothing for a weight that was not looked at."""
    return f"{op} {'x'.join(map(str, shape)) or 'scalar'}" if op else ""


def _bytes(nbytes: int) -> str:
    """Bytes in units of 10^3, one decimal."""
    if nbytes < 1000:
        return f"{nbytes} B"
    for unit, size in (("kB", 1e3), ("MB", 1e6)):
        if nbytes < 999.95 * size:  # what would print as 1000.0 takes the next unit
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes / 1e9:.1f} GB"


def _number(value: float) -> str:
    return f"{value:.2g}"


def _fewer(macs: Macs) -> str:
    return f"{macs.before} -> {macs.after} ({macs.ratio:.2f}x)"


def _times(ratio: float) -> str:
    return f"x{ratio:.2f}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.2f} ms"


def clean(text: str) -> str:
    """Escape what is not printable: a line break would break a table, an escape would drive the terminal."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )
