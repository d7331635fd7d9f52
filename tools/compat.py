"""Show that packed models give the same numbers wherever ONNX files are run.

Models are packed by `onnxdp compress IN OUT --ratio R`. Packed and original run in ONNX Runtime (the newest
and 1.23), onnx.reference (small ones), OpenVINO (CPU, float32) and ONNX Runtime Web (wasm, one thread; Node
and headless Chromium), each in an environment of its own under --venvs. What is printed is the largest
difference to the newest ONNX Runtime, relative to the largest number of that output: for the packed file, and
for the original, which is what the consumer's own arithmetic differs by. A second table says what onnxslim
and onnxsim make of a packed file. Exit 1 where a packed file fails that runs as the original, or differs by
more than 1e-3 and ten times as much.

    python tools/compat.py --readme README.md
    python tools/compat.py --packed /tmp/packed --models resnet20
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from common import MODELS, arguments, machine, markdown, onnxdp, run, say, shared, tell
from consumers import CONSUMERS, SIMPLIFIERS, SIMPLIFY, STOCK, Answer, ask, write_feed
from rivals import python_with
from zoo import zoo_feeds

from onnxdp import probes, runtime

SAMPLES = 2
CASES = (
    (MODELS / "digits.onnx", 8),
    ("models/cifar10_resnet20", 4),
    ("models/cifar10_resnet20", 8),
    ("models/cifar10_resnet20", 16),
    ("models/cifar10_vgg16_half", 24),
    ("models/imagenet_squeezenet11", 8),
    ("models/imagenet_resnet18_large_ktb", 4),
    ("models/imagenet_resnet18_large_ktb", 12),
    ("zoo/silero_vad", 4),
    ("zoo/dtln_1", 4),
    ("zoo/slovorez_fp16", 4),
)
"""File and ratio; the VGG's zeros run on, ResNet-18's weights are large and have steps for blocks of rows, or
read tables, and the last three hold LSTM weights in branches, LSTM weights, and float16 throughout."""


@dataclass(frozen=True)
class Case:
    """One model, packed, with inputs for it."""

    original: Path
    packed: Path
    ratio: float
    feeds: tuple[Path, ...]

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"{self.original.stem} at {self.ratio:g}x"


def pack(original: Path, ratio: float, folder: Path) -> Path | None:
    """Return the packed file, made unless it lies in the folder; None where the answer was no."""
    out = folder / f"{original.stem}_{ratio:g}.onnx"
    if not out.exists():
        say(f"packing {original.name} at {ratio:g}x")
        ran = onnxdp("compress", original, out, "--ratio", str(ratio), "--quiet")
        if ran.code:
            say(f"  left out: {ran.sentence}")
            return None
    return out


def inputs(original: Path, folder: Path) -> tuple[Path, ...]:
    """Write plausible inputs where somebody thought of some, else probes."""
    feeds: Sequence[Any]
    try:
        known = zoo_feeds()
        feeds = [known.feed(original.name, k) for k in range(SAMPLES)]
    except KeyError:
        specs = runtime.input_specs(onnx.load(original, load_external_data=False))
        feeds = probes.make(specs, samples=SAMPLES, seed=0, batch=1).feeds
    return tuple(write_feed(folder / f"{original.stem}.{k}.json", feed) for k, feed in enumerate(feeds))


def cases(names: Sequence[str], packed: Path, room: Path) -> list[Case]:
    """Pack every model that is asked for."""
    packed.mkdir(parents=True, exist_ok=True)
    found = []
    for file, ratio in CASES:
        original = file if isinstance(file, Path) else shared() / "data" / f"{file}.onnx"
        if names and not any(name in original.stem for name in names):
            continue
        out = pack(original, ratio, packed)
        if out is not None:
            found.append(Case(original, out, ratio, inputs(original, room)))
    return found


def difference(answer: Answer, wanted: Answer) -> float:
    """Return the largest difference relative to an output's largest number; infinite where shapes differ."""
    worst = 0.0
    for outputs, others in zip(answer.outputs, wanted.outputs, strict=True):
        for x, y in zip(outputs, others, strict=True):
            if x.shape != y.shape or x.dtype != y.dtype or not np.isfinite(x.astype(np.float64)).all():
                return float("inf")
            if y.size:
                a, b = x.astype(np.float64), y.astype(np.float64)
                worst = max(worst, float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)))
    return worst


def compare(chosen: Sequence[Case], venvs: Path, room: Path) -> list[dict[str, Any]]:
    """Run every consumer on every packed and original file."""
    tasks = [(path, c.feeds) for c in chosen for path in (c.packed, c.original)]
    _, wanted = ask(STOCK, tasks, venvs, room)
    rows = []
    for consumer in CONSUMERS:
        mine = [i for i, c in enumerate(chosen) if c.original.stat().st_size <= (consumer.largest or 1 << 40)]
        say(f"running {consumer.name}")
        version, answers = ask(consumer, [tasks[2 * i + k] for i in mine for k in (0, 1)], venvs, room)
        for place, i in enumerate(mine):
            packed, original = (
                {"error": a.error or w.error} if a.error or w.error else {"difference": difference(a, w)}
                for a, w in zip(answers[2 * place :][:2], wanted[2 * i :][:2], strict=True)
            )
            row = {"consumer": consumer.name, "version": version, "model": chosen[i].name}
            rows.append({**row, "packed": packed, "original": original, "bytes": _bytes(chosen[i])})
            say(f"  {version}, {chosen[i].name}: {shown(packed)}; original {shown(original)}")
    return rows


def _bytes(case: Case) -> tuple[int, int]:
    return case.packed.stat().st_size, case.original.stat().st_size


def simplify(chosen: Sequence[Case], venvs: Path, room: Path) -> list[dict[str, Any]]:
    """Give packed files to the simplifiers, and run what they make of them."""
    python = python_with(SIMPLIFIERS, venvs / "simplifiers")
    rows, tasks = [], []
    for case in chosen:
        for tool, program in SIMPLIFY.items():
            out = room / f"{tool}_{case.packed.name}"
            ran = run([python, "-c", program, case.packed, out])
            row = {"model": case.name, "bytes": _bytes(case), "tool": tool}
            rows.append({**row, "error": ran.sentence} if ran.code else {**row, "after": out.stat().st_size})
            tasks += [] if ran.code else [(out, case.feeds), (case.packed, case.feeds)]
    answers = iter(ask(STOCK, tasks, venvs, room)[1])
    for row in rows:
        if "after" in row:
            after, before = next(answers), next(answers)
            row |= {"error": after.error} if after.error else {"difference": difference(after, before)}
    return rows


def shown(result: dict[str, Any]) -> str:
    """Format a difference, or say that there is none to be had."""
    return f"{result['difference']:.1e}" if "difference" in result else f"failed: {result['error'][-80:]}"


def consumer_table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a consumer and model."""
    headers = ["consumer", "version", "model", "packed differs by", "original differs by", "bytes"]
    return markdown(
        headers,
        (
            (r["consumer"], r["version"], r["model"], shown(r["packed"]), shown(r["original"]), _arrow(r))
            for r in rows
        ),
    )


def simplified_table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a model and tool."""
    return markdown(
        ["tool", "model", "bytes", "bytes after the tool", "outputs differ by"],
        (
            (r["tool"], r["model"], _arrow(r), f"{r['after']:,}" if "after" in r else "", shown(r))
            for r in rows
        ),
    )


def _arrow(row: dict[str, Any]) -> str:
    packed, original = row["bytes"]
    return f"{original:,} → {packed:,}"


def wrong(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Name what runs the original and not the packed file, or runs it to other numbers."""
    return [
        f"{r['consumer']}: {r['model']}"
        for r in rows
        if "difference" in r["original"]
        and r["packed"].get("difference", np.inf) > max(1e-3, 10 * r["original"]["difference"])
    ]


def main() -> None:
    """Pack, run everywhere, print."""
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="*", default=(), help="only models named like these")
    parser.add_argument("--venvs", type=Path, default=Path("/tmp/onnxdp-compat"), help="environments go here")
    told = "take files packed before from here, NAME_RATIO.onnx, and leave new ones"
    parser.add_argument("--packed", type=Path, metavar="FOLDER", help=told)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="onnxdp-compat-") as name:
        room = Path(name)
        chosen = cases(asked.models, asked.packed or room, room)
        rows = compare(chosen, asked.venvs, room)
        simplified = simplify(chosen, asked.venvs, room)
    text = "\n\n".join([consumer_table(rows), simplified_table(simplified), f"{machine()}."])
    tell(asked, "compat", [*rows, *simplified], text)
    if bad := wrong(rows):
        sys.exit("Wrong numbers: " + "; ".join(bad))


if __name__ == "__main__":
    main()
