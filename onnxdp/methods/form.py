"""What a method is, and where methods are found.

A form says how a weight is stored and how ordinary operators undo it. Two laws hold for every form, and the
tests check them for each that is registered: ONNX Runtime on what ``emit`` drew equals ``decode``, and
``cost`` equals the bytes of the initializers that ``emit`` made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Protocol, TypeVar, runtime_checkable

import onnx_ir as ir

from onnxdp.build import Builder
from onnxdp.errors import MethodError, UsageError
from onnxdp.records import Array, Candidate, Encoded, Params, Weight
from onnxdp.settings import Settings
from onnxdp.weights import Reader

GROUP = "onnxdp.methods"
FALLBACK = "float16"
"""Always a candidate beside the method asked for: where a method does not pay, the storage type still may."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Task:
    """One weight to solve.

    Attributes
    ----------
    weight : Weight
    tensor : ndarray of shape ``weight.shape``, float32 or float64
    samples : ndarray of shape (groups, samples, inputs) or None
        What the readers see, float32, divided by the square root of the number of samples; centred where the
        bias can take up the mean. None without probes, or where they cannot reach the weight.
    splittable : bool
        Whether one direct reader in the graph could run as two operators instead of one.
    """

    weight: Weight
    tensor: Array
    samples: Array | None
    splittable: bool
    bits: float = 16.0
    """What the target leaves each number, on average; 16 where it does not say."""
    lack: Array | None = None
    """(groups, samples, outputs): what the outputs should be beyond ``samples @ W``, scaled as the samples;
    given to sequential forms, which make W move towards it (method.md 1.3)."""
    quick: bool = False
    """Whether the result is only to be measured: little effort will do."""
    even: bool = False
    """Whether the reader is a Conv with as many output as input positions along every axis."""
    also: tuple[float, ...] = ()
    """What further targets leave, that the same solution is to serve (:class:`Aimed`)."""
    opset: int = 17
    """Of the model: what may decode the weight's new form."""
    spare: float = 0.0
    """Bits of each number beyond those that the params say, to fill a file."""
    total: int = 1 << 20
    """Numbers of all the model's weights: what decodes them is shared."""
    memo: dict[str, Any] | None = None
    """What a form worked out of all else, for tries with other ``spare`` bits; None: there is one try."""

    def once(self, key: str, make: Callable[[], T]) -> T:
        """Return what ``make`` gives, or gave in an earlier try."""
        if self.memo is None:
            return make()
        if key not in self.memo:
            self.memo[key] = make()
        made: T = self.memo[key]
        return made


class Solved(Protocol):
    """Candidates of one weight, or of several that share arrays, solved once for all of them."""

    def candidates(self) -> Sequence[tuple[Candidate, ...]]:
        """Return the ways to store the task's weights; each holds one candidate per task."""

    def points(self) -> Sequence[tuple[Candidate, ...]]:
        """Return some of the candidates, spread over those the target may need: they are measured first."""

    def ready(self, params: Sequence[Params]) -> bool:
        """Whether the arrays of a candidate need no samples any more."""

    def encode(self, tasks: Sequence[Task], params: Sequence[Params]) -> tuple[Encoded, ...]:
        """Return the arrays of one of the candidates, named by its params."""


@runtime_checkable
class Aimed(Protocol):
    """A solution whose candidates depend on what the target leaves each number."""

    def aim(self, bits: float) -> None:
        """Turn to another target: ``bits`` is the task's own or among its ``also``."""


@runtime_checkable
class Keeping(Protocol):
    """A solution that can be kept for another run."""

    def kept(self) -> Sequence[Encoded]:
        """Return what :meth:`Restorable.restored` needs."""


@runtime_checkable
class Foreseeing(Protocol):
    """A solution that knows more of the arrays to come than their shapes."""

    def foreseen(self, outline: Encoded) -> Encoded:
        """Return the form's outline with the types that the weight's own numbers call for."""


@runtime_checkable
class Holding(Protocol):
    """A solution that may hold what it was solved on, and tries more ways on that."""

    @property
    def holds(self) -> bool:
        """Whether it does; one that was restored is to be given the very same again."""


@runtime_checkable
class Restorable(Protocol):
    """A form whose solutions can be restored without samples."""

    def restored(
        self, task: Task, kept: Sequence[Encoded], settings: Settings, *, device: str
    ) -> Solved | None:
        """Return the solution of an earlier run, None where what it kept is not enough for the task."""

    def fits(self, weight: Weight, encoded: Encoded) -> bool:
        """Whether arrays are such as encoding the weight would give."""


@runtime_checkable
class Lighter(Protocol):
    """A form that can change how many operations a run takes."""

    def macs(self, weight: Weight, params: Params) -> float:
        """Return the multiply-accumulates over those of the weight as it was."""


@runtime_checkable
class Form(Protocol):
    """A method: how weights are stored."""

    name: str
    sequential: bool
    """Whether weights are always encoded again in the compressed network, one after the other."""

    near: float
    """A damage measured at one squared error speaks for candidates whose own is within this factor."""

    def supports(self, weight: Weight) -> str | None:
        """Return None, or why this weight cannot be stored so."""

    def cost(self, weight: Weight, params: Params) -> int:
        """Bytes of the initializers that ``emit`` makes, shared ones included, the shapes of Reshape not."""

    def check(self, weight: Weight, params: Params) -> None:
        """Refuse params (of a plan edited by hand) that mean nothing, with a PlanError."""

    def outline(self, weight: Weight, params: Params) -> Encoded:
        """Return arrays of the right types and shapes, whatever their values: enough to count bytes."""

    def groups(
        self, weights: Sequence[Weight], sources: Mapping[str, str], *, everywhere: bool
    ) -> Sequence[tuple[str, ...]]:
        """Name the weights that may share arrays.

        ``sources`` tells which tensor each weight reads; ``everywhere`` asks for all that could, not only for
        those that are likely to gain.
        """

    def solve(self, tasks: Sequence[Task], settings: Settings, *, device: str) -> Solved:
        """Solve one task, or several that share arrays."""

    def encode(self, task: Task, params: Params, settings: Settings, *, device: str) -> Encoded:
        """Solve one task for one choice of params."""

    def decode(self, weight: Weight, encoded: Encoded) -> Array:
        """Return the stored tensor's replacement, of shape ``weight.shape``, float32."""

    def emit(
        self, build: Builder, weight: Weight, encoded: Encoded, reader: Reader | None
    ) -> ir.Value | None:
        """Draw the operators that undo the form.

        Returns the value that replaces the weight. A form may instead rewrite ``reader`` (given where the
        weight has one direct reader) and return None.
        """


def registered() -> dict[str, str]:
    """Names of all installed methods, each with the object it is loaded from; nothing is imported."""
    return {e.name: e.value for e in entry_points(group=GROUP)}


def load(name: str) -> Form:
    """Load one method by its entry-point name.

    Raises
    ------
    UsageError
        No method of that name is installed.
    MethodError
        The plug-in cannot be loaded, or is no form.
    """
    found = [e for e in entry_points(group=GROUP) if e.name == name]
    if not found:
        raise UsageError(
            f"There is no method {name!r}; installed are {', '.join(sorted(registered()))}, auto."
        )
    try:
        form = found[0].load()()
    except Exception as e:  # a plug-in may raise anything
        raise MethodError(
            f"The method {name!r} ({found[0].value}) cannot be loaded: {e}; reinstall it."
        ) from e
    if not isinstance(form, Form):
        raise MethodError(f"The method {name!r} ({found[0].value}) lacks parts of a form; update it.")
    return form


def forms_for(method: str, *, lighter: bool = False) -> tuple[Form, ...]:
    """Return the forms a method name stands for.

    ``auto`` is the best of what is built, today ``quant``, and ``pair`` where runs are to become ``lighter``.
    """
    names = [method] if method != "auto" else ["quant", "pair"] if lighter else ["quant"]
    return tuple(load(n) for n in dict.fromkeys((*names, FALLBACK)))
