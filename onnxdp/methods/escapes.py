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
from onnxdp.methods.codes import MOST, SINCE, Code, apart, cut, half, halves, tally
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
        Number of integers; the first stream may tell of some more, zeros.
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
        told, ranks = apart(high, code.run)
        streams = [] if told is None else [told.astype(np.uint8)]
        if not ranks.size:
            return cls(code._replace(levels=code.levels[:1]), tuple(streams), integers.size, low)
        _, code = cut(code, tally(ranks))
        levels = code.levels[len(streams) :]
        for left, count in zip(range(len(levels) - 1, -1, -1), levels, strict=True):
            streams.append(np.minimum(ranks, count - 1).astype(np.uint8))
            if left:
                ranks = ranks[ranks >= count - 1] - np.uint8(count - 1)
        return cls(code, tuple(streams), integers.size, low)

    @classmethod
    def unpacked(cls, code: Code, words: Sequence[Array], size: int) -> Coded:
        """Take the digits out of :meth:`words`.

        Raises
        ------
        ValueError
            They are not words of that code, or of another number of integers.
        """
        streams: list[Array] = []
        low, count = np.empty(0, np.uint8), -(-size // code.run)
        if code.raw:
            *words, held = words
            low = _raw_of(held, code.raw, size)
        for k, (levels, held) in enumerate(zip(code.levels, words, strict=True)):
            digits = _unpacked(held, levels, count)
            streams.append(digits)
            count = int(np.count_nonzero(digits == levels - 1)) * (1 if k else code.run)
        return cls(code, tuple(streams), size, low)

    def words(self) -> tuple[Array, ...]:
        """Pack each stream into words; raw bits are the last."""
        words = [_packed(n, s) for n, s in zip(self.code.levels, self.streams, strict=True)]
        return (*words, _raw_words(self.low, self.code.raw)) if self.code.raw else tuple(words)

    def integers(self) -> Array:
        """Give the integers back, (size,) int8 or int16."""
        value: Array | None = None
        for k in range(len(self.streams) - 1, -1, -1):
            digits = _grid(self.code, k).values[self.streams[k]]
            if k == 0:
                digits = np.repeat(digits, self.code.run)
            if value is not None:
                digits[digits == _ESCAPE] = value
            value = digits
        assert value is not None
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


def draw(
    build: Builder, coded: Coded, name: str, shape: Sequence[int], *, wide: bool
) -> tuple[ir.Value, int]:
    """Draw the integers, and by how many zeros too many.

    They are int8 or (``wide``) int16 in a row; with raw bits float32 of a shape, times :attr:`Code.unit`, and
    none too many.
    """
    build = build.outer  # there the length of what Compress gives can be told
    run, levels, raw = coded.code
    value: ir.Value | None = None
    over = 0
    for k in range(len(levels) - 1, -1, -1):
        digits = coded.streams[k]
        grid = _grid(coded.code, k)._replace(wide=wide)
        drawn, more = packing.stream(build, digits, grid, f"{name}.{k}")
        if k == 0:
            count = digits.size + more
            if run > 1:
                told = build.reshape(drawn, [count, 1], "told")
                drawn = build.node("Expand", [told, build.ints([1, run])], "runs")
                drawn = build.reshape(drawn, [count * run], "flat")
            count *= run
            over = count - coded.size
        else:
            count = digits.size
            drawn = packing.head(build, drawn, 0, count) if more else drawn
        if value is not None:
            kind = np.int16 if wide else np.int8
            escape = build.constant("escape16" if wide else "escape", np.array(_ESCAPE, kind), TERSE)
            escapes = build.node("Equal", [drawn, escape], "escapes")
            places = build.node("Compress", [build.counted(count), escapes], "places")
            build.tell(places, ir.DataType.INT32, (coded.streams[k + 1].size,))
            drawn = build.node("ScatterElements", [drawn, places, value], "integers")
        value = drawn
    assert value is not None
    if not raw:
        return value, over
    value = packing.head(build, value, 0, coded.size) if over else value
    value = build.reshape(value, shape, "shaped")
    value = build.node("Cast", [value], "high", to=int(ir.DataType.FLOAT))
    low = _draw_raw(build.named(f"{name}.{len(levels)}"), coded, shape)
    return build.node("Add", [value, low], "numbers"), 0


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


def _grid(code: Code, stream: int) -> Grid:
    """Return what the digits of a stream stand for; of one that tells of runs: zeros, or escapes."""
    levels = code.levels[stream]
    if stream == 0 and code.run > 1:
        return Grid(f"E{code.run}", (0, _ESCAPE))
    start = sum(n - 1 for n in code.levels[1 if code.run > 1 else 0 : stream])
    ranks = [min(r, 2 * MOST) for r in range(start, start + levels)]
    numbers = [-(r + 1) // 2 if r % 2 else r // 2 for r in ranks]
    if stream == len(code.levels) - 1:
        return Grid(f"E{start}.{levels}.", tuple(numbers))
    return Grid(f"E{start}.{levels}", (*numbers[:-1], _ESCAPE))
