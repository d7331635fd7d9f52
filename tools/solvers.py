"""Compare the solvers on every layer of a model that has a matrix: error, and time by device.

At one rank a layer (half of the smaller side, or --atoms), in the plain norm and weighted by what the probes
show: the error of exact, dpl and randomized, computed from the factors in float64. On every layer exact
should not be above dpl, and dpl within 2 % of it after 20 rounds; exit 1 where that is not so.

    python tools/solvers.py --models resnet20 --layers
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import arguments, classifiers, machine, markdown, say, tell

from onnxdp import arrays, model, probes, runtime, stats, weights
from onnxdp.errors import SetupError
from onnxdp.methods import dictionary, solvers
from onnxdp.network import Network
from onnxdp.pieces import Stream
from onnxdp.records import Array, Weight

NAMES = ("exact", "dpl", "randomized")
OVERSAMPLING = 8


def moment_of(samples: Array, device: str) -> solvers.Moment:
    """Return the second moment of rows (groups, rows, inputs), with the ridge that dictionary pairs get."""
    mean = np.square(samples).sum(axis=1).mean(axis=-1)
    share = min(1.0, samples.shape[-1] / samples.shape[1])
    ridge = (dictionary.RIDGE[0] + dictionary.RIDGE[1] * share) * np.maximum(mean, 1e-12)
    return solvers.Moment(arrays.to_device(samples, device), arrays.to_device(ridge, device))


def error(w: Array, pair: tuple[Array, Array], moment: solvers.Moment | None) -> float:
    """Return the relative error of a pair in float64, (weighted) Frobenius norm over all groups."""
    w = np.asarray(w, np.float64)
    left = w - np.asarray(arrays.to_host(pair[0]), np.float64) @ np.asarray(
        arrays.to_host(pair[1]), np.float64
    )
    return float(np.sqrt(energy(left, moment) / energy(w, moment)))


def energy(w: Array, moment: solvers.Moment | None) -> float:
    """Return tr(W^T H W), the sum over all groups."""
    if moment is None:
        return float(np.square(w).sum())
    x = np.asarray(arrays.to_host(moment.samples), np.float64)
    ridge = np.asarray(arrays.to_host(moment.ridge), np.float64)[:, None, None]
    return float(np.square(x @ w).sum() + (ridge * np.square(w)).sum())


def solve(name: str, w: Array, rank: int, moment: solvers.Moment | None, rounds: int) -> tuple[Array, Array]:
    """Return atoms and codes of one solver, on the device that ``w`` is on."""
    if name == "exact":
        return solvers.exact(w, moment, rank=rank).pair(w, rank)
    if name == "dpl":
        start = arrays.normal((*w.shape[:-1], rank), 0, w)
        return solvers.dpl(w, rank, start=start, moment=moment, iterations=rounds)
    width = min(rank + OVERSAMPLING, w.shape[-1])
    start = arrays.normal((*w.shape[:-2], w.shape[-1], width), 0, w)
    return solvers.randomized(w, rank, start=start, moment=moment).pair(w, rank)


def timed(make: Callable[[], tuple[Array, Array]], repeat: int) -> tuple[tuple[Array, Array], float]:
    """Return what is made and the least seconds; the copy to the host waits for the device."""
    best = float("inf")
    for _ in range(repeat):
        start = time.perf_counter()
        made = make()
        arrays.to_host(made[1])
        best = min(best, time.perf_counter() - start)
    return made, best


def layers_of(path: Path, samples: int) -> Iterable[tuple[Weight, Array, Array | None]]:
    """Yield each weight with a matrix, its stack (groups, inputs, outputs) and its sampled rows."""
    read = model.read(path)
    found = weights.find(read.ir)
    form = dictionary.DictionaryPair()
    wanted = [w for w in found.weights if form.supports(w) is None]
    network = Network(read, found)
    made = probes.make(
        runtime.input_specs(network.specification), samples=samples, seed=0, answers=network.answers()
    )
    stream = Stream(network, made)
    for chunk in stats.chunks([[w] for w in wanted], made.samples):
        members = [w for item in chunk for w in item]
        seen = stats.gather(stream, found, members, network, seed=0)
        for w in members:
            stack = weights.blocks(w, weights.tensor_of(found, w.name)).astype(np.float32)
            yield w, stack, seen[w.name].samples if w.name in seen else None


def compare(path: Path, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Solve every layer of one model by every solver, norm and device."""
    rows = []
    for w, stack, samples in layers_of(path, asked.samples):
        rank = min(asked.atoms or max(1, min(w.inputs, w.outputs) // 2), w.inputs, w.outputs)
        say(f"{path.stem} {w.name} {w.inputs} x {w.outputs}, {rank} atoms")
        for device in asked.devices:
            on_device = arrays.to_device(stack, device)
            for norm in ("plain", "weighted") if samples is not None else ("plain",):
                moment = None if norm == "plain" or samples is None else moment_of(samples, device)
                row = {"model": path.stem, "layer": w.name, "inputs": w.inputs, "outputs": w.outputs}
                row |= {"groups": w.groups, "rank": rank, "norm": norm, "device": device}
                for name in NAMES:
                    call = partial(solve, name, on_device, rank, moment, asked.rounds)
                    pair, row[f"{name}_seconds"] = timed(call, asked.repeat)
                    row[f"{name}_error"] = error(stack, pair, moment)
                rows.append(row)
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Return one line per model, norm and device."""
    lines = []
    for model_, norm, device in dict.fromkeys((r["model"], r["norm"], r["device"]) for r in rows):
        mine = [r for r in rows if (r["model"], r["norm"], r["device"]) == (model_, norm, device)]
        worst = {n: max(mine, key=lambda r, n=n: ratio(r, n)) for n in NAMES[1:]}
        lines.append(
            [
                *(model_, norm, device, str(len(mine))),
                *(f"{ratio(worst[n], n):.4f} ({worst[n]['layer']})" for n in NAMES[1:]),
                str(sum(ratio(r, "dpl") < 1 - 1e-5 for r in mine)),
                *(f"{sum(r[f'{n}_seconds'] for r in mine):.2f}" for n in NAMES),
            ]
        )
    headers = ["model", "norm", "device", "layers", "worst dpl / exact", "worst randomized / exact"]
    return markdown([*headers, "layers where exact is above dpl", *(f"{n}, s" for n in NAMES)], lines)


def ratio(row: dict[str, Any], name: str) -> float:
    """Return a solver's error over the exact one; 1 where both are rounding alone."""
    return float(row[f"{name}_error"] / row["exact_error"]) if row["exact_error"] > 1e-6 else 1.0


def by_layer(rows: Sequence[dict[str, Any]]) -> str:
    """Return one line per layer, norm and device."""
    lines = [
        [
            *(r["model"], r["layer"], f"{r['inputs']} × {r['outputs']}", r["rank"], r["norm"], r["device"]),
            *(f"{r[f'{n}_error']:.4f}" for n in NAMES),
            *(f"{1e3 * r[f'{n}_seconds']:.1f}" for n in NAMES),
        ]
        for r in rows
    ]
    headers = ["model", "layer", "matrix", "atoms", "norm", "device", *NAMES, *(f"{n}, ms" for n in NAMES)]
    return markdown(headers, lines)


def main() -> int:
    """Compare, and exit 1 where a promise does not hold."""
    parser = arguments(__doc__)
    add = parser.add_argument
    names = ["resnet18", "efficientnet"]
    add("--models", nargs="+", default=names, metavar="NAME", help="parts of file names")
    add("--atoms", type=int, metavar="N", help="atoms of every layer; default: half of its smaller side")
    add("--rounds", type=int, default=20, metavar="N", help="of dpl; default: %(default)s")
    add("--samples", type=int, default=32, metavar="N", help="probe inputs; default: %(default)s")
    told = "timings of each, the least counts; default: %(default)s"
    add("--repeat", type=int, default=1, metavar="N", help=told)
    add("--devices", nargs="+", choices=("cpu", "cuda"), help="default: cpu, and cuda where there is one")
    add("--layers", action="store_true", help="print every layer, too")
    asked = parser.parse_args()
    asked.devices = asked.devices or devices()
    with arrays.one_blas_thread():
        rows = [r for path in classifiers(asked.models) for r in compare(path, asked)]
    note = f"One layer after the other, one BLAS thread, {asked.rounds} rounds of dpl; {machine()}."
    tell(asked, "solvers", rows, f"{summary(rows)}\n\n{note}", *([by_layer(rows)] if asked.layers else []))
    return 0 if all(1 - 1e-5 <= ratio(r, "dpl") <= 1.02 for r in rows) else 1


def devices() -> list[str]:
    """Return cpu, and cuda where it works."""
    try:
        return ["cpu", arrays.resolve_device("cuda")]
    except SetupError:
        return ["cpu"]


if __name__ == "__main__":
    sys.exit(main())
