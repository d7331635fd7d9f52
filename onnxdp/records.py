"""The values that travel between the rooms: frozen, plain, comparable, and versioned when written as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from onnxdp.errors import PlanError
from onnxdp.plain import read_object, read_record, to_plain

Array: TypeAlias = npt.NDArray[Any]
Param: TypeAlias = int | float | str
Params: TypeAlias = Mapping[str, Param]
Named: TypeAlias = tuple[str, str, tuple[tuple[str, Param], ...]]
"""A candidate by weight, method and parameters: see :func:`named`."""

SCHEMA = 1
"""Version of the JSON of :class:`Plan` and :class:`Report`; a newer one is refused by name."""


@dataclass(frozen=True, slots=True)
class Weight:
    """One stored weight and the matrix that its readers multiply by.

    The stored tensor, reshaped, is a matrix per group: ``(groups, outputs, inputs)`` where ``transposed``
    (Conv, Gemm with transB, the left operand of a MatMul), ``(inputs, outputs)`` otherwise.

    Attributes
    ----------
    name : str
        Name of the initializer (of the output, for a Constant node); made unique across subgraphs.
    op : str
        Operator type of the readers: ``Conv``, ``Gemm``, ``MatMul``, ``LSTM``, ``Gather``, ...
    nodes : tuple of str
        Names of all readers (``OpType#index`` where a node has no name).
    shape : tuple of int
        As stored.
    dtype : str
        NumPy name of the stored type: ``float32``, ``float16``, ``float64``, ``bfloat16``.
    nbytes : int
        Stored bytes.
    inputs, outputs : int
        Rows (inputs, per group) and columns (outputs, per group) of the matrix W of ``y = x W``.
    groups : int
        Convolution groups; 1 elsewhere.
    tap : int
        Consecutive rows that belong to one input channel (``kh * kw`` of a Conv, else 1).
    transposed : bool
        Whether the stored orientation is (outputs, inputs).
    positions : int
        Output positions of one sample that this weight multiplies, over all readers; 0 when not known.
    """

    name: str
    op: str
    nodes: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    inputs: int
    outputs: int
    groups: int = 1
    tap: int = 1
    transposed: bool = False
    positions: int = 0

    @property
    def size(self) -> int:
        """Numbers stored."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def channels(self) -> int:
        """Input channels per group."""
        return self.inputs // self.tap


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to store one weight, and what it costs.

    Attributes
    ----------
    weight, method : str
        Names of the weight and of the method.
    params : mapping of str to int, float or str
        The method's own parameters, enough to encode again.
    nbytes : int
        Bytes of the initializers that it stores.
    error : float
        ``||X (W - W')||_F / ||X W||_F`` with X the weight's probe inputs, ``||W - W'|| / ||W||`` without.
    damage : float or None
        Relative squared error it causes at the network's outputs; None until measured.
    reason : str
        Why it was chosen; empty until it is.
    """

    weight: str
    method: str
    params: Params
    nbytes: int
    error: float
    damage: float | None = None
    reason: str = ""

    @property
    def named(self) -> Named:
        """What it is, whatever is known of it."""
        return named(self.weight, self.method, self.params)


@dataclass(frozen=True, slots=True)
class Kept:
    """A weight that stays as it was, and why."""

    weight: str
    reason: str
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class Pruned:
    """Channels that go: outputs of one weight, counted from 0, rising."""

    weight: str
    channels: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """What becomes of every weight of one model.

    Attributes
    ----------
    model_sha256 : str
        Of the model file and the external data it names.
    target : str
        As asked: ``ratio 3``, ``size 3000000``, ``max-error 0.03``.
    budget : int or None
        Bytes that the whole file may have; None where an error was asked for.
    settings : mapping
        The settings that encoding depends on (seed, solver, ...), and whether inputs were real.
    choices : tuple of Candidate
    kept : tuple of Kept
    schema : int
    pruned : tuple of Pruned
        Channels that go before any weight is changed.
    """

    model_sha256: str
    target: str
    budget: int | None
    settings: Mapping[str, Any]
    choices: tuple[Candidate, ...]
    kept: tuple[Kept, ...]
    schema: int = SCHEMA
    pruned: tuple[Pruned, ...] = ()

    def to_json(self) -> str:
        """Give the plan as JSON text."""
        return json.dumps(to_plain(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan; anything that does not mean exactly one plan is refused.

        Raises
        ------
        PlanError
            Not JSON, another schema, a missing or unknown field, or a value of the wrong type.
        """
        raw = read_object(text)
        if raw.get("schema") != SCHEMA:
            raise PlanError(
                f"The plan has schema {raw.get('schema')!r} and this onnxdp reads schema {SCHEMA}; "
                "write it again with 'onnxdp plan'."
            )
        plan: Plan = read_record(cls, raw, "plan", parts=(Candidate, Kept, Pruned))
        names = [c.weight for c in plan.choices]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise PlanError(f"The plan names {twice[0]!r} twice; leave one of the two choices.")
        both = sorted(set(names) & {k.weight for k in plan.kept})
        if both:
            raise PlanError(
                f"The plan both changes and keeps {both[0]!r}; remove it from choices or from kept."
            )
        return plan


@dataclass(frozen=True, slots=True)
class Encoded:
    """One weight in its new form, as host arrays.

    ``arrays`` maps a role (``atoms``, ``codes``, ``values``) to an array; ``shared`` maps a role to the name
    under which several weights store that array once.
    """

    weight: str
    method: str
    params: Params
    arrays: Mapping[str, Array]
    error: float
    shared: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(a.nbytes for a in self.arrays.values())


Made: TypeAlias = tuple[list[Encoded], dict[str, Array]]
"""The arrays of a choice, and what the bias behind each weight gains, (outputs,)."""


@dataclass(frozen=True, slots=True)
class OutputDifference:
    """How one output of B differs from A's.

    ``relative`` is ``||a - b|| / ||a||`` over all samples; ``same_argmax`` the share of rows (last axis)
    whose largest entry stands at the same place, None where the last axis has one entry.
    """

    name: str
    max_abs: float
    mean_abs: float
    relative: float
    same_argmax: float | None


@dataclass(frozen=True, slots=True)
class Verification:
    """Outputs of two models compared on the same samples."""

    samples: int
    seed: int | None
    outputs: tuple[OutputDifference, ...]
    tolerance: float | None
    passed: bool

    @property
    def error(self) -> float:
        """Largest relative error over the outputs (0 without a floating-point output)."""
        return max((o.relative for o in self.outputs), default=0.0)


@dataclass(frozen=True, slots=True)
class File:
    """A model on disk (or in memory: path None); ``nbytes`` counts external data."""

    path: str | None
    sha256: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Line:
    """One weight's line of the report."""

    weight: str
    op: str
    shape: tuple[int, ...]
    method: str
    params: Params
    before: int
    after: int
    error: float
    damage: float | None
    reason: str


@dataclass(frozen=True, slots=True)
class Macs:
    """Multiply-accumulates of one sample through all Conv, Gemm and MatMul of the main graph."""

    before: int
    after: int

    @property
    def ratio(self) -> float:
        """Before over after."""
        return self.before / max(self.after, 1)


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that one run did."""

    source: File
    target: File
    plan: Plan
    lines: tuple[Line, ...]
    verification: Verification | None
    latency_ratio: float | None
    seconds: Mapping[str, float]
    versions: Mapping[str, str]
    device: str
    notices: tuple[str, ...] = ()
    dry_run: bool = False
    macs: Macs | None = None
    schema: int = SCHEMA

    @property
    def ratio(self) -> float:
        """Bytes before over bytes after, whole files."""
        return self.source.nbytes / self.target.nbytes

    def to_json(self) -> str:
        """Give the report as JSON text."""
        plain = {**to_plain(self), "ratio": self.ratio}
        if self.macs is not None:
            plain["macs"]["ratio"] = self.macs.ratio
        return json.dumps(plain, indent=1)


def named(weight: str, method: str, params: Params) -> Named:
    """Name a candidate, whatever the order of its parameters."""
    return weight, method, tuple(sorted(params.items()))
