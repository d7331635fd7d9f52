"""Integers as streams of digits (:mod:`onnxdp.methods.codes`), and the operators that undo it.

Decoding is a chain of ordinary operators, all of which ONNX Runtime folds:

    digits -> Equal(escape) -> Compress(0 1 2 ...) -> ScatterElements(digits, places, next stream)

Compress gives as many places as the next stream has digits, which its value_info says: without, ONNX
Runtime 1.27 and later would not fold it (runtime.md section 2). Rows of 32-bit numbers serve all streams;
NonZero and ScatterND, in 64 bits, take twice the time and twice the memory of the weights. OpenVINO (2026.4)
folds ScatterElements of 16 bits and not of 8; ONNX Runtime holds all that it folds until it is done, so that
16 are for weights that are not large, and for those that OpenVINO wants as constants.

Raw bits are a stream of their own, of what stands for parts of a step: h + l / 2^k, exact in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxdp.build import TERSE, Builder
from onnxdp.methods import packing
from onnxdp.methods.codes import MOST, SINCE, Code, Stage, Tally, cut, half, halves, ranks_of, streams_of
from onnxdp.methods.packing import Grid, Packing
from onnxdp.records import Array

_ESCAPE = 127
_BYTE = 8
"""Raw bits that are stored as they are."""


@dataclass(frozen=True, slots=True)
class Coded:
    """Integers as digits.

    Attributes
    ----------
    code : Code
    streams : tuple of ndarray, uint8
        Digits of each.
    size : int
        Number of integers; a digit of several may tell of some more, zeros.
    low : ndarray of shape (size,), uint8
        Raw bits; none, (0,), of a code without.
    """

    code: Code
    streams: tuple[Array, ...]
    size: int
    low: Array

    @classmethod
    def of(cls, integers: Array, code: Code) -> Coded:
        """Write integers (size,), int8 or int16, in a code, cut off where the rest is a few bytes."""
        high, low = halves(integers, code.raw)
        ranks = ranks_of(high)
        _, code = cut(code, Tally.of(ranks, code))
        return cls(code, tuple(streams_of(ranks, code)), integers.size, low)

    @property
    def lefts(self) -> list[int]:
        """Integers that each stream is for."""
        streams = zip(self.code.stages[:-1], self.streams, strict=False)
        return [self.size, *(_escaped(stage, digits) for stage, digits in streams)]

    @classmethod
    def unpacked(cls, code: Code, words: Sequence[Array], size: int) -> Coded:
        """Take the digits out of :meth:`words`.

        Raises
        ------
        ValueError
            They are not words of that code, or of another number of integers.
        """
        streams: list[Array] = []
        low, left = np.empty(0, np.uint8), size
        if code.raw:
            *words, held = words
            low = _raw_of(held, code.raw, size)
        for stage, held in zip(code.stages, words, strict=True):
            digits = _unpacked(held, stage.levels, -(-left // stage.integers))
            streams.append(digits)
            left = _escaped(stage, digits)
        if left:
            raise ValueError(f"{left} integers are left over.")
        return cls(code, tuple(streams), size, low)

    def words(self) -> tuple[Array, ...]:
        """Pack each stream into words; raw bits are the last."""
        words = [_packed(n, s) for n, s in zip(self.code.levels, self.streams, strict=True)]
        return (*words, _raw_words(self.low, self.code.raw)) if self.code.raw else tuple(words)

    def integers(self) -> Array:
        """Give the integers back, (size,) int8 or int16."""
        value = np.empty(0, np.int8)
        for k in range(len(self.streams) - 1, -1, -1):
            numbers = _grid(self.code, k).values[self.streams[k]].reshape(-1)
            if k + 1 < len(self.streams):
                escapes = numbers == _ESCAPE
                numbers[escapes] = value[: np.count_nonzero(escapes)]
            value = numbers
        value = value[: self.size]
        if not self.code.raw:
            return value
        whole: Array = (value.astype(np.int16) << self.code.raw) + self.low - half(self.code.raw)
        return whole

    def numbers(self) -> Array:
        """Give what :func:`draw` does: the integers times :attr:`Code.unit`, (size,) float32."""
        value = self.integers().astype(np.float32)
        value *= np.float32(self.code.unit)
        return value


def draw(build: Builder, coded: Coded, name: str, shape: Sequence[int], *, wide: bool) -> ir.Value:
    """Draw the integers times :attr:`Code.unit`, float32 of ``shape``; ``wide`` as in :func:`draw_row`."""
    value, over = draw_row(build, coded, name, wide=wide)
    value = packing.head(build, value, 0, coded.size) if over else value
    value = build.reshape(value, shape, "shaped")
    value = build.node("Cast", [value], "integers", to=int(ir.DataType.FLOAT))
    if not coded.code.raw:
        return value
    low = _draw_raw(build.named(f"{name}.{len(coded.code.stages)}"), coded, shape)
    return build.node("Add", [value, low], "numbers")


def draw_row(build: Builder, coded: Coded, name: str, *, wide: bool) -> tuple[ir.Value, int]:
    """Draw what is coded in a row, int8 or (``wide``) int16, raw bits not; and how many are too many."""
    build = build.outer  # there the length of what Compress gives can be told
    stages, left = coded.code.stages, coded.lefts
    value: ir.Value | None = None
    over = 0
    for k in range(len(stages) - 1, -1, -1):
        grid = _grid(coded.code, k)._replace(wide=wide)
        drawn, more = packing.stream(build, coded.streams[k], grid, f"{name}.{k}")
        count = coded.streams[k].size * stages[k].integers + more
        if value is not None:
            kind = np.int16 if wide else np.int8
            escape = build.constant("escape16" if wide else "escape", np.array(_ESCAPE, kind), TERSE)
            escapes = build.node("Equal", [drawn, escape], "escapes")
            places = build.node("Compress", [build.counted(count), escapes], "places")
            build.tell(places, ir.DataType.INT32, (left[k + 1],))
            drawn = build.node("ScatterElements", [drawn, places, value], "integers")
        over = count - left[k]
        value = packing.head(build, drawn, 0, left[k]) if over and k else drawn
    assert value is not None
    return value, over


def _draw_raw(build: Builder, coded: Coded, shape: Sequence[int]) -> ir.Value:
    """Draw what raw bits stand for, parts of a step of what is coded, in float32."""
    raw = coded.code.raw
    if raw == _BYTE or Packing.best(1 << raw, coded.size, build.opset, streamed=True).digits == 1:
        held = build.constant("words", _centred(coded.low, raw).reshape(shape))
        held = build.node("Cast", [held], "low", to=int(ir.DataType.FLOAT))
        unit = build.constant(f"unit{raw}", np.array(coded.code.unit, np.float32), TERSE)
        return build.node("Mul", [held, unit], "low")
    grid = Grid(f"R{raw}", tuple((low - half(raw)) / (1 << raw) for low in range(1 << raw)))
    value, more = packing.stream(build, coded.low, grid, build.weight, shape)
    return build.reshape(packing.head(build, value, 0, coded.size), shape, "shaped") if more else value


def _raw_words(low: Array, raw: int) -> Array:
    """Pack raw bits; a byte of them is stored as the int8 that it stands for."""
    return _centred(low, raw) if raw == _BYTE else _packed(1 << raw, low)


def _centred(low: Array, raw: int) -> Array:
    """Return the numbers that raw bits stand for, int8."""
    return (low.astype(np.int16) - half(raw)).astype(np.int8)


def _raw_of(words: Array, raw: int, size: int) -> Array:
    """Undo :func:`_raw_words`; raises ValueError where that is not what these are."""
    if raw != _BYTE:
        return _unpacked(words, 1 << raw, size)
    if words.dtype != np.int8 or words.shape != (size,):
        raise ValueError(f"{words.shape} {words.dtype} are not {size} bytes.")
    return (words.astype(np.int16) + half(raw)).astype(np.uint8)


def _packed(levels: int, digits: Array) -> Array:
    """Pack digits into words."""
    return Packing.best(levels, digits.size, SINCE, streamed=True).pack(digits)


def _unpacked(words: Array, levels: int, count: int) -> Array:
    """Take digits out of words; raises ValueError where these are not words of so many digits."""
    packed = Packing.best(levels, count, SINCE, streamed=True)
    if words.dtype != packed.word or words.shape != (-(-count // packed.digits),):
        raise ValueError(f"{words.shape} {words.dtype} are not {count} digits of {levels} levels.")
    return packed.unpack(words, count)


def _escaped(stage: Stage, digits: Array) -> int:
    """Count the integers that the digits of a stream leave over."""
    return 0 if stage.last else int(np.count_nonzero(digits == stage.levels - 1)) * stage.integers


def _grid(code: Code, stream: int) -> Grid:
    """Return what the digits of a stream stand for: integers, or escapes."""
    stage, start = code.stages[stream], code.starts[stream]
    ranks = (min(r, 2 * MOST) for r in range(start, start + stage.ranks))
    numbers = [-(r + 1) // 2 if r % 2 else r // 2 for r in ranks]
    if stage.last:
        return Grid(f"E{start}.{stage.ranks}.", tuple(numbers))
    places = range(stage.integers)
    told = (numbers[d // stage.ranks**i % stage.ranks] for d in range(stage.levels - 1) for i in places)
    return Grid(
        f"E{start}.{stage.integers}.{stage.ranks}", (*told, *[_ESCAPE] * stage.integers), width=stage.integers
    )
