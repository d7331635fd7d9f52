"""Dictionary pairs: W ~ D C, block by block.

    W (inputs x outputs) is cut into B blocks along its rows (the paper's partitions), along its columns, or
    not at all; every block is rebuilt from r atoms, W_b ~ D_b C_b. Stored are the atoms D and the codes C.

    fold    W' = Reshape(MatMul(C^T, D^T)), ordinary operators on constants, gone when the session is made
    split   y = codes(atoms(x)): two small operators in place of one large, where that is no slower

References
----------
Gao et al., "Dictionary Pair-based Data-Free Fast Deep Neural Network Compression", ICDM 2021: partitions,
pairs, dictionaries shared between layers. runtime.md section 4: when two operators are no slower than one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np
import onnx_ir as ir

from onnxdp import arrays, weights
from onnxdp.build import Builder, unlike_others
from onnxdp.errors import PlanError
from onnxdp.methods import emission, solvers
from onnxdp.methods.form import Solved, Task
from onnxdp.methods.sharing import Projected, project
from onnxdp.methods.solvers import Factored, Moment
from onnxdp.records import Array, Candidate, Encoded, Param, Params, Weight
from onnxdp.settings import Settings
from onnxdp.weights import Reader

BLOCK_ROWS = 288
"""Rows of a block that the paper found best on ResNet-18."""

RIDGE = (1.0, 0.3)
"""Ridge of the second moment over its mean diagonal: a + b * inputs / samples (prototype.md section 4)."""

_MAX_FLOPS = 6e10
"""Layouts that take longer to factor (about two seconds) are not tried."""
_MIN_BLOCK = 8
"""Rows of the smallest block tried: one channel of a 3 x 3 kernel has 9, which pictures hardly fill."""
_POINTS = (0.75, 0.5, 0.3)
"""Shares of the float16 bytes whose candidates' damage is measured first: every curve needs a foot ..."""
_AROUND = (1.1, 0.6)
"""... and these of the share that a target leaves, where it leaves less than all."""
LANES = 16
"""Channels that ONNX Runtime's kernels take at a time: ranks off this grid run at the next step's cost."""
MAX_MACS = 0.8
"""Multiply-accumulates of the two operators over those of the one, up to which they were never slower."""


class DictionaryPair:
    """W ~ D C with few atoms."""

    name = "dp"
    sequential = False
    near = 1.3

    def supports(self, weight: Weight) -> str | None:
        """Refuse what has no matrix, or one so thin that a pair never pays."""
        if weight.op not in ("Conv", "Gemm", "MatMul"):
            return f"dictionary pairs rebuild Conv, Gemm and MatMul weights, not those of {weight.op}"
        if _break_even(weight.inputs, weight.outputs, weight.inputs * weight.outputs) < 1:
            return f"a matrix of {weight.inputs} x {weight.outputs} is too thin for a pair to be smaller"
        return None

    def cost(self, weight: Weight, params: Params) -> int:
        """Bytes of atoms and codes."""
        m, n = _block_shape(weight, str(params["axis"]), int(params["parts"]))
        count = weight.groups * int(params["parts"])
        return count * int(params["atoms"]) * (m + n) * np.dtype(str(params["dtype"])).itemsize

    def check(self, weight: Weight, params: Params) -> None:
        """Refuse params that are no pair of this weight."""
        kinds = {"axis": str, "parts": int, "atoms": int, "dtype": str, "run": str, "dictionary": str}
        for name in sorted(set(params) ^ set(kinds)):
            if name not in kinds:
                raise PlanError(f"{weight.name}: dp has no parameter {name!r}; remove it.")
            if name != "dictionary":
                raise PlanError(f"{weight.name}: dp needs the parameter {name!r}; write the plan again.")
        for name, value in params.items():
            if not isinstance(value, kinds[name]):
                raise PlanError(
                    f"{weight.name}: {name} is {value!r}, not of type {kinds[name].__name__}; correct it."
                )
        axis, parts = params["axis"], int(params["parts"])
        if axis not in ("rows", "columns"):
            raise PlanError(f"{weight.name}: axis is {axis!r}, not rows or columns; correct it.")
        whole = weight.channels if axis == "rows" else weight.outputs
        if parts < 1 or whole % parts:
            raise PlanError(
                f"{weight.name}: {parts} blocks along the {axis} do not divide {whole}; correct parts."
            )
        m, n = _block_shape(weight, str(axis), parts)
        if not 1 <= int(params["atoms"]) <= min(m, n):
            raise PlanError(
                f"{weight.name}: atoms is {params['atoms']} and must lie between 1 and {min(m, n)}."
            )
        if params["dtype"] not in ("float16", "float32") or params["run"] not in ("fold", "split"):
            raise PlanError(
                f"{weight.name}: dtype is float16 or float32, run is fold or split; correct them."
            )

    def outline(self, weight: Weight, params: Params) -> Encoded:
        """Return arrays of their shapes."""
        m, n = _block_shape(weight, str(params["axis"]), int(params["parts"]))
        count, atoms = weight.groups * int(params["parts"]), int(params["atoms"])
        shared = {"atoms": str(params["dictionary"])} if "dictionary" in params else {}
        dtype = str(params["dtype"])
        shapes = {"atoms": (count, m, atoms), "codes": (count, atoms, n)}
        owners = {"codes": weight.name} | {"atoms": f"{shared.get('atoms', weight.name)} atoms"}
        factors = {role: unlike_others(np.zeros(s, dtype), owners[role]) for role, s in shapes.items()}
        return Encoded(weight.name, self.name, dict(params), factors, 0.0, shared)

    def groups(
        self, weights: Sequence[Weight], sources: Mapping[str, str], *, everywhere: bool
    ) -> Sequence[tuple[str, ...]]:
        """Name the weights that may share a dictionary: readers of one tensor; everywhere: pairs of peers."""
        usable = [w for w in weights if self.supports(w) is None and w.groups == 1]
        by_source: dict[tuple[object, ...], list[str]] = {}
        for w in usable:
            if w.name in sources:
                by_source.setdefault((sources[w.name], w.op, w.inputs, w.tap, w.transposed), []).append(
                    w.name
                )
        shared = [tuple(names) for names in by_source.values() if len(names) > 1]
        if not everywhere:
            return shared
        taken = {n for names in shared for n in names}
        alone = [w for w in usable if w.name not in taken]
        for _, run in groupby(alone, key=lambda w: (w.op, w.inputs, w.outputs, w.tap, w.transposed)):
            names = [w.name for w in run]
            shared += [(a, b) for a, b in zip(names[::2], names[1::2], strict=False)]
        return shared

    def solve(self, tasks: Sequence[Task], settings: Settings, *, device: str) -> Solved:
        """Factor every layout of the blocks once."""
        return _Pairs(tasks, settings, device)

    def encode(self, task: Task, params: Params, settings: Settings, *, device: str) -> Encoded:
        """Factor the one layout that the params name."""
        return _Pairs([task], settings, device, ((str(params["axis"]), int(params["parts"])),)).encode(
            [task], [params]
        )[0]

    def macs(self, weight: Weight, params: Params) -> float:
        """Return the multiply-accumulates over those of the weight as it was."""
        return _macs(weight, params) if params["run"] == "split" else 1.0

    def decode(self, weight: Weight, encoded: Encoded) -> Array:
        """Multiply the factors, in float32."""
        stack = encoded.arrays["atoms"].astype(np.float32) @ encoded.arrays["codes"].astype(np.float32)
        return weights.unblocks(weight, stack, str(encoded.params["axis"]), int(encoded.params["parts"]))

    def emit(
        self, build: Builder, weight: Weight, encoded: Encoded, reader: Reader | None
    ) -> ir.Value | None:
        """Draw the product of the factors, or two operators in place of the reader."""
        if (
            encoded.params["run"] == "split"
            and reader is not None
            and emission.can_split(weight, encoded.params)
        ):
            emission.split(build, weight, encoded, reader)
            return None
        return emission.fold(build, weight, encoded)


@dataclass(frozen=True, slots=True)
class _Layout:
    """One way to cut the weights of the tasks, factored."""

    axis: str
    parts: int
    factored: Factored
    projected: tuple[Projected, ...] = ()
    """Where several weights share the dictionary: each through it."""

    def error(self, index: int, rank: int) -> float:
        """Return the relative error of one weight that ``rank`` atoms leave."""
        if self.projected:
            return self.projected[index].error(rank)
        tail, total = (
            float(np.sum(arrays.to_host(a))) for a in (self.factored.tail(rank), self.factored.total)
        )
        return float((max(tail, 0.0) / (total or 1.0)) ** 0.5)


class _Pairs:
    """The pairs of one weight, or of several with one dictionary (their columns side by side)."""

    def __init__(
        self,
        tasks: Sequence[Task],
        settings: Settings,
        device: str,
        layouts: Sequence[tuple[str, int]] | None = None,
    ) -> None:
        self._settings = settings
        self._device = device
        self._weights = [t.weight for t in tasks]
        self._bits = tasks[0].bits
        self._tasks_split = [t.splittable for t in tasks]
        self._layouts = {
            (axis, parts): self._layout(tasks, axis, parts)
            for axis, parts in layouts or _layouts(self._weights, settings)
        }

    def candidates(self) -> Sequence[tuple[Candidate, ...]]:
        return self._candidates

    @cached_property
    def _candidates(self) -> list[tuple[Candidate, ...]]:
        return [c for layout in self._layouts.values() for c in self._of_layout(layout)]

    def aim(self, bits: float) -> None:
        self._bits = bits

    def points(self) -> Sequence[tuple[Candidate, ...]]:
        candidates = self.candidates()
        whole = sum(2 * w.size for w in self._weights)
        shares = _POINTS if self._bits >= 16 else [around * self._bits / 16 for around in _AROUND]
        nearest = [
            min(candidates, key=lambda own: abs(sum(c.nbytes for c in own) - share * whole))
            for share in shares
            if candidates
        ]
        return list({id(own): own for own in nearest}.values())

    def ready(self, params: Sequence[Params]) -> bool:
        layout = self._layouts.get((str(params[0]["axis"]), int(params[0]["parts"])))
        return layout is not None and int(params[0]["atoms"]) <= layout.factored.energies.shape[-1]

    def encode(self, tasks: Sequence[Task], params: Sequence[Params]) -> tuple[Encoded, ...]:
        first = params[0]
        axis, parts, rank = str(first["axis"]), int(first["parts"]), int(first["atoms"])
        layout = self._layouts.get((axis, parts))
        if layout is None or rank > layout.factored.energies.shape[-1]:
            # a plan edited by hand may cut otherwise, or name more atoms than pay
            layout = self._layout(tasks, axis, parts, rank)
        dtype = np.dtype(str(first["dtype"]))
        atoms, codes = self._factors(layout, tasks, rank)
        return tuple(
            Encoded(
                task.weight.name,
                "dp",
                dict(own),
                {"atoms": atoms.astype(dtype), "codes": np.ascontiguousarray(mine.astype(dtype))},
                layout.error(index, rank),
                {"atoms": str(own["dictionary"])} if "dictionary" in own else {},
            )
            for index, (task, own, mine) in enumerate(zip(tasks, params, codes, strict=True))
        )

    def _factors(self, layout: _Layout, tasks: Sequence[Task], rank: int) -> tuple[Array, list[Array]]:
        """Return atoms, and the codes of each task, on the host."""
        stack = arrays.to_device(_stack(tasks, layout.axis, layout.parts), self._device)
        if layout.projected:
            atoms, _ = layout.factored.pair(stack, rank)
            codes = [p.codes(rank) for p in layout.projected]
        elif self._settings.solver == "dpl":
            moment = moment_of(tasks, layout.axis, layout.parts, self._device)
            start = arrays.normal((*stack.shape[:-1], rank), self._settings.seed, stack)
            atoms, own = solvers.dpl(
                stack, rank, start=start, moment=moment, iterations=self._settings.iterations
            )
            codes = [own]
        else:
            atoms, own = layout.factored.pair(stack, rank)
            codes = [own]
        return arrays.to_host(atoms), [arrays.to_host(c) for c in codes]

    def _layout(self, tasks: Sequence[Task], axis: str, parts: int, least: int = 1) -> _Layout:
        factored = self._factor(tasks, axis, parts, least)
        if len(tasks) == 1:
            return _Layout(axis, parts, factored)
        stack = arrays.to_device(_stack(tasks, axis, parts), self._device)
        atoms, _ = factored.pair(stack, factored.energies.shape[-1])
        projected = tuple(
            project(
                arrays.to_device(_stack([t], axis, parts), self._device),
                atoms,
                moment_of([t], axis, parts, self._device),
            )
            for t in tasks
        )
        return _Layout(axis, parts, factored, projected)

    def _factor(self, tasks: Sequence[Task], axis: str, parts: int, least: int = 1) -> Factored:
        stack = arrays.to_device(_stack(tasks, axis, parts), self._device)
        moment = moment_of(tasks, axis, parts, self._device)
        rank = max(least, min(min(stack.shape[-2:]), self._most_atoms(axis, parts)))
        if self._settings.atoms:
            rank = max(rank, min(self._settings.atoms, *stack.shape[-2:]))
        if self._settings.solver == "randomized":
            width = min(rank + 8, stack.shape[-1])
            start = arrays.normal((*stack.shape[:-2], stack.shape[-1], width), self._settings.seed, stack)
            return solvers.randomized(stack, rank, start=start, moment=moment)
        return solvers.exact(stack, moment, rank=rank)

    def _most_atoms(self, axis: str, parts: int) -> int:
        """Return the rank at which the pairs of all weights take what the float16 weights would."""
        item = np.dtype(self._settings.factor_dtype).itemsize
        dense = sum(w.size * min(2, w.nbytes // w.size) for w in self._weights)
        return int((dense - 1) // max(1, self._unit(axis, parts) * item))

    def _unit(self, axis: str, parts: int) -> int:
        """Return the numbers stored per atom."""
        first = self._weights[0]
        outputs = sum(w.outputs for w in self._weights)
        count = first.groups * parts
        m, n = (first.inputs // parts, outputs) if axis == "rows" else (first.inputs, outputs // parts)
        return count * (m + n)

    def _of_layout(self, layout: _Layout) -> Iterator[tuple[Candidate, ...]]:
        settings = self._settings
        most = min(layout.factored.energies.shape[-1], self._most_atoms(layout.axis, layout.parts))
        ranks = [min(settings.atoms, layout.factored.energies.shape[-1])] if settings.atoms else _ranks(most)
        for rank in ranks:
            yield tuple(
                self._candidate(i, layout, rank, layout.error(i, rank)) for i in range(len(self._weights))
            )

    def _candidate(self, index: int, layout: _Layout, rank: int, error: float) -> Candidate:
        weight = self._weights[index]
        params: dict[str, Param] = {
            "axis": layout.axis,
            "parts": layout.parts,
            "atoms": rank,
            "dtype": self._settings.factor_dtype,
            "run": "fold",
        }
        nbytes = DictionaryPair().cost(weight, params)
        if len(self._weights) > 1:
            params["dictionary"] = self._weights[0].name
            if index:  # the first weight pays for the atoms
                nbytes -= weight.inputs * rank * np.dtype(self._settings.factor_dtype).itemsize
        if self._tasks_split[index] and _pays_split(weight, params):
            params["run"] = "split"
        return Candidate(weight.name, "dp", params, nbytes, error)


def _layouts(tasks: Sequence[Weight], settings: Settings) -> list[tuple[str, int]]:
    """Return the (axis, parts) to try: whole, the paper's rows, and columns, by the matrix's shape."""
    weight = tasks[0]
    rows = settings.partition_rows()
    if rows == 0:
        return [("rows", 1)]
    if rows is not None:
        return [("rows", _parts(weight.channels, weight.inputs / rows))]
    layouts = [("rows", 1)]
    if weight.groups == 1:
        layouts += [("rows", p) for p in _ladder(weight.channels, weight.inputs)]
        if len(tasks) == 1 and weight.outputs > weight.inputs:
            layouts += [("columns", p) for p in _ladder(weight.outputs, weight.outputs)[:2]]
    return [at for at in dict.fromkeys(layouts) if at[1] == 1 or _flops(weight, *at) <= _MAX_FLOPS]


def _flops(weight: Weight, axis: str, parts: int) -> float:
    """Estimate what factoring a layout takes: Gram products of the smaller sides, eigenvectors."""
    m, n = _block_shape(weight, axis, parts)
    side = min(m, n)
    return float(parts * (2 * side * m * n + 10 * side**3))


def _ladder(channels: int, rows: int) -> list[int]:
    """Return numbers of blocks, from as many as there can be down to 2, each about a quarter of the last."""
    parts, wanted = [], float(min(channels, rows // _MIN_BLOCK))
    while wanted >= 2:
        parts.append(_parts(channels, wanted))
        wanted /= 4
    return [p for p in dict.fromkeys(parts) if p > 1 and rows // p >= _MIN_BLOCK]


def _parts(channels: int, wanted: float) -> int:
    """Return the divisor of ``channels`` nearest to ``wanted`` in ratio."""
    divisors = [d for d in range(1, channels + 1) if channels % d == 0]
    return min(divisors, key=lambda d: (abs(np.log(d / max(wanted, 1.0))), d))


def _block_shape(weight: Weight, axis: str, parts: int) -> tuple[int, int]:
    if axis == "rows":
        return weight.inputs // parts, weight.outputs
    return weight.inputs, weight.outputs // parts


def _break_even(m: int, n: int, dense: int) -> int:
    """Return the largest rank at which the pair stores fewer numbers than the dense matrix."""
    return (dense - 1) // (m + n)


def _ranks(most: int) -> list[int]:
    """Every rank where layers are small; multiples of 16 beyond 128, where steps are fine enough without."""
    return [r for r in range(1, most + 1) if r <= 64 or (r <= 128 and r % 4 == 0) or r % LANES == 0]


def _stack(tasks: Sequence[Task], axis: str, parts: int) -> Array:
    """Return the blocks, (blocks, m, n) float32; of several tasks side by side, each scaled to unit norm."""
    stacks = [weights.blocks(t.weight, t.tensor, axis, parts).astype(np.float32, copy=False) for t in tasks]
    if len(stacks) == 1:
        return stacks[0]
    return np.concatenate([s / np.float32(np.linalg.norm(s) or 1.0) for s in stacks], axis=-1)


def moment_of(tasks: Sequence[Task], axis: str, parts: int, device: str) -> Moment | None:
    """Return the second moment of the blocks' inputs; of several tasks the mean, each of unit trace."""
    if any(t.samples is None for t in tasks):
        return None
    samples = []
    for task in {id(t.samples): t for t in tasks}.values():
        assert task.samples is not None
        norm = float(np.linalg.norm(task.samples)) or 1.0
        samples.append(task.samples if len(tasks) == 1 else task.samples / np.float32(norm))
    rows = samples[0] if len(samples) == 1 else np.concatenate(samples, axis=1)
    groups, count, inputs = rows.shape
    if axis == "rows":
        rows = rows.reshape(groups, count, parts, inputs // parts).swapaxes(1, 2)
        rows = rows.reshape(groups * parts, count, inputs // parts)
    # Blocks of columns see the same inputs: one (1, count, inputs) serves them all.
    # What the probes leave quiet need not be quiet on real inputs: the floor is the mean over all inputs.
    mean = float(np.square(rows).sum(axis=1).mean()) or 1.0
    ridge = (RIDGE[0] + RIDGE[1] * min(1.0, rows.shape[-1] / count)) * np.full(rows.shape[0], mean)
    return Moment(arrays.to_device(rows, device), arrays.to_device(ridge, device))


def _macs(weight: Weight, params: Params) -> float:
    """Return the multiply-accumulates of the two operators over those of the one."""
    m, n = _block_shape(weight, str(params["axis"]), int(params["parts"]))
    return int(params["atoms"]) * (m + n) / (m * n)


def _pays_split(weight: Weight, params: Params) -> bool:
    """Whether two operators are no slower than one (runtime.md section 4)."""
    atoms, parts = int(params["atoms"]), int(params["parts"])
    if not emission.can_split(weight, params) or _macs(weight, params) > MAX_MACS or atoms % LANES:
        return False
    return parts == 1 or (weight.channels // parts) % LANES == 0
