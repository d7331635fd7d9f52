"""Every choice a user can make: its default, its check and the sentence that explains it.

The command line reads its help from here, so that a default stands in one place.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnxdp.errors import UsageError

DEFAULT_MAX_ERROR = 0.03
SOLVERS = ("exact", "randomized", "dpl")
DEVICES = ("auto", "cpu", "cuda")
FACTOR_DTYPES = ("float16", "float32")
CHANNEL_ORDERS = ("rgb", "bgr")
REAL_INPUTS = ("inputs", "calibrate")
"""Settings that give real inputs, of which one may be given."""
CALIBRATION = ("mean", "std", "resize", "channel_order", "input_range")
"""Settings that say how the pictures of ``calibrate`` are prepared."""
TARGETS = ("ratio", "size", "max_error")
"""Settings of which one may be given."""
PAIRS = ("solver", "partition", "atoms", "factor_dtype", "shared", "unweighted")
"""Settings of dictionary pairs: off its default, any of them makes the method ``auto`` mean ``dp``."""


def _setting(default: Any, help_: str) -> Any:
    return field(default=default, metadata={"help": help_})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the user asked for; ``None`` means the default.

    Raises
    ------
    UsageError
        A value has no meaning, or more than one target is given.
    """

    ratio: float | None = _setting(
        None, "Make the whole file this many times smaller (original / compressed bytes)."
    )
    size: str | None = _setting(None, "Make the file at most this large: 3MB, 800kB, 120000 (bytes) or 30%.")
    max_error: float | None = _setting(
        None,
        "Largest relative error of the outputs on probe inputs; "
        f"{DEFAULT_MAX_ERROR} when no target is given.",
    )
    macs: float | None = _setting(
        None,
        "Run with this many times fewer multiply-accumulates (original / compressed), beside a target; "
        "alone, the file may have half its bytes.",
    )
    method: str = _setting(
        "auto",
        "How weights are stored: auto (quant; with --macs pair, too; dp where an option of dictionary pairs "
        "is set), quant, pair (rounded), dp, float16, or a plug-in's name.",
    )
    solver: str = _setting(
        "exact", "How dictionary pairs are found: exact, randomized or dpl (the published iteration)."
    )
    partition: str = _setting(
        "auto", "Cut weights into blocks: auto, none, or the rows of a block (the paper: 288)."
    )
    atoms: int | None = _setting(
        None, "Fixed number of atoms of every dictionary, instead of one planned per weight."
    )
    iterations: int = _setting(20, "Rounds of the dpl solver; power iterations of the randomized one are 2.")
    factor_dtype: str = _setting("float16", "Type the factors are stored in: float16 or float32.")
    shared: bool | None = _setting(
        None, "Let weights with equal input rows share one dictionary; default: where it pays."
    )
    unweighted: bool = _setting(
        False, "Fit weights in the papers' plain norm instead of on what the probes show them."
    )
    refit: bool | None = _setting(
        None,
        "Fit each weight again to the compressed network's own activations; "
        "default: where it measurably helps.",
    )
    include: tuple[str, ...] = _setting(
        (), "Only these weights: weight or node names, globs, re:PATTERN, operator types."
    )
    exclude: tuple[str, ...] = _setting((), "Not these weights; patterns as for --include.")
    inputs: Path | None = _setting(
        None, "Sample inputs (.npz, keys = input names) instead of made-up probe inputs."
    )
    calibrate: Path | None = _setting(
        None,
        "Real unlabelled inputs to learn from: a folder of pictures, a .npy or a .npz (keys = input names).",
    )
    mean: str | None = _setting(
        None,
        "What to subtract from pictures per channel, in units of --input-range: 0.485,0.456,0.406.",
    )
    std: str | None = _setting(None, "What to divide pictures by, per channel, after --mean.")
    resize: int | None = _setting(
        None, "Pixels of the shorter side before the centre is cut out; default: the model's own size."
    )
    channel_order: str | None = _setting(
        None, "Order in which the model takes the channels: rgb or bgr; default: what its answers tell."
    )
    input_range: str | None = _setting(
        None,
        "What bytes of pictures become: 0..1 (the default with --mean or --std), 0..255, -1..1; "
        "default: what the model's statistics and answers tell.",
    )
    samples: int | None = _setting(
        None, "Number of probe inputs; default: by the cost of one run of the network."
    )
    short_names: bool | None = _setting(
        None,
        "Rename internal values, drop node names, notes and attributes at their defaults, store equal "
        "constants once; default: where that saves more than 1 % of the file.",
    )
    prune: bool | None = _setting(
        None,
        "Take out inner channels that the network can do without, as far as the bytes they leave are worth "
        "more; default: with rounded weights those that are dead.",
    )
    analysis: Path | None = _setting(
        None,
        "Start from what --save-analysis kept of the same model and options: another target is soon met.",
    )
    save_analysis: Path | None = _setting(
        None, "Keep the analysis in this file (.npz): probe inputs, solutions, measurements."
    )
    freeze_initializers: bool = _setting(False, "Treat initializers that are also graph inputs as constants.")
    device: str = _setting("auto", "Where weights are solved: auto, cpu or cuda.")
    seed: int = _setting(0, "Seed of every random choice.")

    def __post_init__(self) -> None:
        for setting in dataclasses.fields(self):
            object.__setattr__(self, setting.name, _typed(setting, getattr(self, setting.name)))
        fields = {f.name: f for f in dataclasses.fields(self)}
        if self.method == "auto" and any(getattr(self, n) != fields[n].default for n in PAIRS):
            object.__setattr__(self, "method", "dp")
        targets = [n for n in TARGETS if getattr(self, n) is not None]
        if len(targets) > 1:
            raise UsageError(
                " and ".join(f"--{t.replace('_', '-')}" for t in targets[:2]) + " are two targets; give one."
            )
        if self.ratio is not None and not (math.isfinite(self.ratio) and self.ratio > 1):
            raise UsageError(
                f"--ratio is original / compressed size and must be above 1, not {self.ratio:g}; "
                "ask for 4 to make a file a quarter."
            )
        if self.max_error is not None and not (math.isfinite(self.max_error) and 0 < self.max_error < 1):
            raise UsageError(
                f"--max-error is a relative error between 0 and 1, not {self.max_error:g}; try 0.03."
            )
        if self.macs is not None and not (math.isfinite(self.macs) and self.macs > 1):
            raise UsageError(
                f"--macs is original / compressed operations and must be above 1, not {self.macs:g}; "
                "ask for 2 to halve them."
            )
        if self.size is not None:
            parse_size(self.size, 1)
        _one_of("--solver", self.solver, SOLVERS)
        _one_of("--device", self.device, DEVICES)
        _one_of("--factor-dtype", self.factor_dtype, FACTOR_DTYPES)
        if self.prune and self.method not in ("auto", "quant"):
            raise UsageError(
                f"--prune goes with rounded weights, not with --method {self.method}; leave one out."
            )
        self._check_calibration()
        self.partition_rows()
        for name, least in (("atoms", 1), ("iterations", 1), ("samples", 2), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"--{name} must be at least {least}, not {value}.")

    def _check_calibration(self) -> None:
        """Refuse options of real inputs that mean nothing, or mean nothing without them."""
        given = [n for n in CALIBRATION if getattr(self, n) is not None]
        if self.calibrate is None and given:
            raise UsageError(
                f"--{given[0].replace('_', '-')} prepares the pictures of --calibrate, which is missing; "
                "give --calibrate PATH, too."
            )
        if self.calibrate is not None and self.inputs is not None:
            raise UsageError(
                "--calibrate and --inputs both say what to feed; give --inputs for inputs that are ready, "
                "--calibrate for pictures."
            )
        if self.channel_order is not None:
            _one_of("--channel-order", self.channel_order, CHANNEL_ORDERS)
        if self.resize is not None and self.resize < 1:
            raise UsageError(f"--resize is a number of pixels, not {self.resize}.")
        if self.input_range is not None:
            parse_range(self.input_range)
        for name in ("mean", "std"):
            if (text := getattr(self, name)) is not None:
                parse_numbers(f"--{name}", text, above=0.0 if name == "std" else -math.inf)

    def partition_rows(self) -> int | None:
        """Rows of a block; 0 for no partition, None for automatic."""
        if self.partition == "auto":
            return None
        if self.partition == "none":
            return 0
        if self.partition.isascii() and self.partition.isdigit() and int(self.partition) > 0:
            return int(self.partition)
        raise UsageError(
            f"--partition is auto, none or a number of rows, not {self.partition!r}; the paper uses 288."
        )

    def budget(self, nbytes: int) -> int | None:
        """Bytes that a file of ``nbytes`` bytes may have afterwards; None where an error is the target.

        Here ratio and size end; below, only bytes travel.
        """
        if self.ratio is not None:
            return math.floor(nbytes / self.ratio)
        if self.size is not None:
            return parse_size(self.size, nbytes)
        return nbytes // 2 if self._macs_alone else None

    @property
    def error_target(self) -> float | None:
        """Relative output error asked for (amplitude); None where bytes or fixed atoms are the target."""
        if self._macs_alone:
            return None
        if self.ratio is None and self.size is None and (self.atoms is None or self.max_error is not None):
            return DEFAULT_MAX_ERROR if self.max_error is None else self.max_error
        return None

    @property
    def real_inputs(self) -> str | None:
        """The setting that gives real inputs; None where probes are made up."""
        return next((n for n in REAL_INPUTS if getattr(self, n) is not None), None)

    @property
    def _macs_alone(self) -> bool:
        """Whether operations are all that was asked for; then bytes only need not be wasted."""
        return self.macs is not None and self.atoms is None and all(getattr(self, n) is None for n in TARGETS)

    @property
    def target(self) -> str:
        """The target as one phrase, for the record."""
        asked = [] if self._macs_alone else [self._bytes_or_error]
        asked += [] if self.macs is None else [f"macs {self.macs:g}"]
        return ", ".join(asked)

    @property
    def _bytes_or_error(self) -> str:
        if self.ratio is not None:
            return f"ratio {self.ratio:g}"
        if self.size is not None:
            return f"size {self.size}"
        if self.error_target is not None:
            return f"max-error {self.error_target:g}"
        return f"atoms {self.atoms}"


def parse_size(text: str, nbytes: int) -> int:
    """Bytes meant by ``3MB``, ``1.5 kB``, ``120000`` or ``30%`` of ``nbytes``; MB = 10^6, MiB = 2^20 bytes.

    Raises
    ------
    UsageError
        The text is no size, or not above 0.
    """
    units = {
        "": 1,
        "b": 1,
        "kb": 1e3,
        "mb": 1e6,
        "gb": 1e9,
        "kib": 2**10,
        "mib": 2**20,
        "gib": 2**30,
        "%": nbytes / 100,
    }
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%|[a-zA-Z]*)\s*", text, re.ASCII)
    if not found or found[2].lower() not in units or not 0 < float(found[1]) < 1e18:
        raise UsageError(
            f"--size {text!r} is no size; give bytes (120000, 800kB, 3MB) or a share of the file (30%)."
        )
    return math.floor(float(found[1]) * units[found[2].lower()])


def parse_numbers(
    option: str, text: str, above: float = -math.inf, *, remedy: str = "give one per channel"
) -> tuple[float, ...]:
    """Return the numbers of a comma list such as ``0.485,0.456,0.406``.

    Raises
    ------
    UsageError
        One of them is no finite number, or not above ``above``.
    """
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(math.isfinite(n) and n > above for n in numbers):
        kind = "numbers" if above == -math.inf else f"numbers above {above:g}"
        raise UsageError(f"{option} is {kind} with commas between, not {text!r}; {remedy}.")
    return numbers


def parse_range(text: str) -> tuple[float, float]:
    """Return the ends of a range such as ``0..1`` or ``-1..1``.

    Raises
    ------
    UsageError
        It is no range, or empty.
    """
    try:
        low, high = map(float, text.split(".."))
    except ValueError:
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UsageError(f"--input-range is two numbers such as 0..1, 0..255 or -1..1, not {text!r}.")
    return low, high


def help_of(name: str) -> str:
    """Return the sentence that explains a setting."""
    return str(next(f for f in dataclasses.fields(Settings) if f.name == name).metadata["help"])


def _typed(setting: dataclasses.Field[Any], value: Any) -> Any:
    """Return the value in its setting's type: a plan or a caller may give a list, an int, a path's name."""
    kind = str(setting.type)
    if value is None and "None" in kind:
        return None
    if (
        kind == "tuple[str, ...]"
        and isinstance(value, list | tuple)
        and all(isinstance(v, str) for v in value)
    ):
        return tuple(value)
    if kind.startswith("Path") and isinstance(value, str | os.PathLike):
        return Path(value)
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    if kind.startswith("float") and numeric:
        return float(value)
    kinds = {"int": int, "str": str, "bool": bool}
    plain = kinds.get(kind.split(" |")[0])
    if plain is not None and isinstance(value, plain) and isinstance(value, bool) == (plain is bool):
        return value
    raise UsageError(f"{setting.name} is {value!r}, which is not of the kind {kind}; correct it.")


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{option} is one of {', '.join(allowed)}, not {value!r}.")


Progress = Callable[[str, int, int, str], None]
"""Called as ``progress(stage, done, total, name)``; ``name`` is the weight at hand."""


def silent(stage: str, done: int, total: int, name: str) -> None:
    """Report progress to nobody."""
