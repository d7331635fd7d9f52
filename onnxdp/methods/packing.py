"""Integers of few levels packed as digits into words, and the operators that unpack them.

A word holds ``digits`` numbers ``0 .. levels - 1``: ``word = d0 + d1 L + d2 L^2 + ...``. Gather takes them
out of a table of all words, or of all parts of a word that Div and Mod cut out of a longer one. The rows of
the table hold centred integers (-1 0 1; -3 -1 1 3), so nothing has to be subtracted from as many numbers as
the weight has; they are bytes, which keeps the memory small that ONNX Runtime needs while it folds all this.

References
----------
runtime.md section 2: designs compared, and why none uses DequantizeLinear or arithmetic in float16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from onnxdp.build import TERSE, Builder, nbytes
from onnxdp.records import Array

BITS = {"uint8": 8, "uint16": 16, "uint32": 32}
_BYTE = 255
"""Most levels whose digits, and what they decode to, are bytes; 16 bits each beyond."""
_MOST = 2047
"""Most levels: float16, which takes 16 bits where they take 11, is as near from there on."""
_ROWS = 1 << 16
"""Of a table, at most."""
_SPREAD = 1 << 18
"""Digits of a stream up to which it is taken apart by division, 13 bytes for each, and not by a table."""
_BLOCK = 1 << 20
"""Words that are packed at a time, to hold no second copy of a large weight."""


@dataclass(frozen=True, slots=True)
class Packing:
    """How many digits go into which word.

    Attributes
    ----------
    levels : int
        L, 2 to 2047; even numbers up to 128 only, see :func:`unit`.
    word : str
        ``uint8``, ``uint16`` or ``uint32``.
    digits : int
        Numbers per word, the low digit first; the last word is filled up with digit 0.
    """

    levels: int
    word: str
    digits: int

    def __post_init__(self) -> None:
        unit(self.levels)
        if self.word not in BITS or self.digits < 1 or self.levels**self.digits > 1 << BITS[self.word]:
            raise ValueError(f"{self.digits} digits of {self.levels} levels do not fit into {self.word}.")

    @classmethod
    @cache
    def best(
        cls, levels: int, size: int, opset: int, *, first: bool = True, streamed: bool = False
    ) -> Packing:
        """Choose what adds the fewest bytes to the file for ``size`` numbers; of equals the shortest word.

        ``first`` tells whether the table is drawn for this weight, or for another one already; ``streamed``,
        whether :func:`stream` draws the numbers.
        """
        if size < 1:
            raise ValueError("There is nothing to pack.")
        least: tuple[int, int, int] | None = None
        chosen = None
        ways = sorted(offered(levels, opset), key=lambda p: p.nbytes(size))
        divided = streamed and size <= _SPREAD  # what decodes such words then grows with their digits
        short = {p.word: p for p in sorted(ways, key=lambda p: -p.digits)} if divided else {}
        for packing in ways:
            words = packing.nbytes(size)
            if least and words > least[0]:
                break  # the words alone are more
            if (
                least
                and divided
                and words + _decoding(short[packing.word], opset, False, first, True) > least[0]
            ):
                continue
            key = (
                packing.cost(size, opset, first=first, streamed=streamed),
                BITS[packing.word],
                -packing.digits,
            )
            if least is None or key < least:
                least, chosen = key, packing
        assert chosen is not None  # one digit a word is always offered
        return chosen

    def nbytes(self, size: int) -> int:
        """Bytes of the words of ``size`` numbers."""
        return -(-size // self.digits) * (BITS[self.word] // 8)

    def cost(self, size: int, opset: int, *, first: bool = True, streamed: bool = False) -> int:
        """Bytes of a file that words, what decodes them and (where ``first``) their table take.

        To some bytes: the weight has a name of one character and two dimensions.
        """
        kind = streamed and size <= _SPREAD
        return self.nbytes(size) + _decoding(self, opset, size % self.digits > 0, first, kind)

    def pack(self, digits: Array) -> Array:
        """Pack numbers ``0 .. levels - 1``, integers (size,), into words, (words,).

        Raises
        ------
        ValueError
            A number is no digit.
        """
        if digits.size and (digits.max() >= self.levels or digits.min() < 0):
            raise ValueError(f"{digits.min()} .. {digits.max()} are not all digits of {self.levels} levels.")
        word = np.dtype(self.word)
        words = np.empty(-(-digits.size // self.digits), word)
        for first in range(0, len(words), _BLOCK):
            block = words[first : first + _BLOCK]
            given = digits[first * self.digits : (first + len(block)) * self.digits]
            if given.size < len(block) * self.digits:
                given = np.pad(given, (0, len(block) * self.digits - given.size))
            rows = given.reshape(-1, self.digits)
            block[:] = rows[:, -1]
            for j in reversed(range(self.digits - 1)):
                block *= word.type(self.levels)
                block += rows[:, j].astype(word, copy=False)
        return words

    def unpack(self, words: Array, size: int) -> Array:
        """Give the numbers back, uint8 or uint16 (size,)."""
        rows = np.empty((len(words), self.digits), digit_type(self.levels))
        base = words.dtype.type(self.levels)
        for first in range(0, len(words), _BLOCK):
            left = words[first : first + _BLOCK]
            for j in range(self.digits):
                left, rows[first : first + _BLOCK, j] = np.divmod(left, base)
        return rows.reshape(-1)[:size]


def unit(levels: int) -> float:
    """Return the step of the grid in terms of the decoded integers' own: 1 where they are consecutive.

    They are ``k - (L - 1) / 2`` for an odd number of levels, and ``2 k - (L - 1)``, all odd, for an even one.

    Raises
    ------
    ValueError
        There are more than 2047 levels, or an even number above 128.
    """
    if not 2 <= levels <= _MOST or (levels % 2 == 0 and levels > 128):
        raise ValueError(f"{levels} levels are not offered: 2 to 128 are, and odd numbers up to {_MOST}.")
    return 1.0 if levels % 2 else 0.5


def digit_type(levels: int) -> np.dtype[np.unsignedinteger]:
    """Return the type that digits are held in: uint8 or uint16."""
    return np.dtype(np.uint8 if levels <= _BYTE else np.uint16)


def is_wide(levels: int) -> bool:
    """Whether digits decode to int16 instead of int8."""
    return levels > _BYTE


def offered(levels: int, opset: int) -> tuple[Packing, ...]:
    """Return every number of digits, each in the shortest word that holds it."""
    unit(levels)  # refuses what there is not
    bits = 32 if opset >= 10 else 16  # Mod is that old
    count = next(k for k in range(1, bits + 1) if levels ** (k + 1) > 1 << bits)
    words = {k: next(w for w, b in BITS.items() if levels**k <= 1 << b) for k in range(1, count + 1)}
    return tuple(Packing(levels, word, k) for k, word in words.items())


class Grid(NamedTuple):
    """What single digits stand for, and how the file calls it."""

    name: str
    numbers: tuple[float, ...]
    wide: bool = False
    """Whether they are drawn in 16 bits, though 8 would hold them."""
    width: int = 1
    """Numbers that one digit stands for."""

    @property
    def levels(self) -> int:
        """Of a digit."""
        return len(self.numbers) // self.width

    @classmethod
    @cache
    def even(cls, levels: int) -> Grid:
        """Return the centred integers of :func:`unit`."""
        step = 1 if levels % 2 else 2
        most = step * (levels - 1) // 2
        return cls(f"L{levels}", tuple(range(-most, most + 1, step)))

    @property
    def values(self) -> Array:
        """The numbers, (levels,) int8 or int16, float32 where they are no integers; (levels, width)."""
        whole = all(float(n).is_integer() for n in self.numbers)
        kind = np.float32 if not whole else np.int16 if is_wide(self.levels) else np.int8
        return np.array(self.numbers, kind).reshape((-1, self.width) if self.width > 1 else (-1,))


def draw(build: Builder, packing: Packing, words: Array, shape: Sequence[int]) -> ir.Value:
    """Draw what decodes the words: a float32 value of ``shape`` with the centred integers of :func:`unit`."""
    size, float32 = prod(shape), int(ir.DataType.FLOAT)
    grid = Grid.even(packing.levels)
    if packing.digits == 1:
        held = build.constant("words", grid.values[words].reshape(shape))
        return build.node("Cast", [held], "integers", to=float32)
    value = _rows(build, packing, words, grid)
    if size % packing.digits:
        value = head(build, build.reshape(value, [-1], "flat"), 0, size)
    if len(shape) != 1 or not size % packing.digits:
        value = build.reshape(value, shape, "shaped")
    return build.node("Cast", [value], "integers", to=float32)


def stream(
    build: Builder, digits: Array, grid: Grid, name: str, shape: Sequence[int] = ()
) -> tuple[ir.Value, int]:
    """Store digits and draw what they stand for, of the grid's type, and how many too many there are.

    They are in a row, or in a shape where that holds all, with none too many.
    """
    packed = Packing.best(grid.levels, digits.size, build.opset, streamed=True)
    over = -digits.size % packed.digits
    shape = [(digits.size + over) * grid.width] if over or not shape else shape
    value = _row(build, packed, packed.pack(digits), grid, name, shape, divided=digits.size <= _SPREAD)
    return value, over * grid.width


def _row(
    build: Builder,
    packed: Packing,
    words: Array,
    grid: Grid,
    name: str,
    shape: Sequence[int],
    *,
    divided: bool,
) -> ir.Value:
    """Draw what the digits of all words stand for, one after the other."""
    if packed.digits == grid.width == 1:
        held = build.named(name).constant("words", grid.values[words].reshape(shape))
        return _widened(build, held, grid)
    if build.opset < 10 or not divided:
        value = _rows(build.named(name), packed, words, grid)
    else:
        value = build.node("Gather", [_drawn(build, grid), spread(build, packed, words, name)], "centred")
    return build.reshape(value, shape, "flat")


def spread(build: Builder, packed: Packing, words: Array, name: str) -> ir.Value:
    """Take words apart: (word // L^i) mod L, in uint32 or int32, which runtimes divide alike; int32."""
    long, int32 = packed.word == "uint32", int(ir.DataType.INT32)
    value = build.named(name).constant("words", words.reshape(-1, 1))
    if not long:
        value = build.node("Cast", [value], "rows", to=int32)
    if packed.digits == 1:
        return value
    kind = np.dtype("uint32" if long else "int32")
    places = np.array([[packed.levels**i for i in range(packed.digits)]], kind)
    value = build.node("Div", [value, build.integers(places)], "shifted")
    value = build.node("Mod", [value, build.integers(np.array(packed.levels, kind))], "digits")
    return build.node("Cast", [value], "rows", to=int32) if long else value


def head(build: Builder, value: ir.Value, axis: int, count: int) -> ir.Value:
    """Keep the first ``count`` along an axis; axis 0 is the only one."""
    if build.opset < 10:
        return build.node("Slice", [value], "head", axes=[axis], starts=[0], ends=[count])
    axes = [build.ints([axis])] if axis else []
    return build.node("Slice", [value, build.ints([0]), build.ints([count]), *axes], "head")


def _rows(build: Builder, packing: Packing, words: Array, grid: Grid) -> ir.Value:
    """Draw what the digits of each word stand for as a row, int8 or int16."""
    levels, count = packing.levels, packing.digits
    length, parts = _parts(packing)
    int32 = int(ir.DataType.INT32)
    if parts == 1:
        held = build.node("Cast", [build.constant("words", words)], "rows", to=int32)
        return build.node("Gather", [_table(build, grid, count), held], "digits")
    places = np.array([[levels ** (length * i) for i in range(parts)]], np.uint32)
    value = build.constant("words", words.reshape(-1, 1))
    value = build.node("Div", [value, build.integers(places)], "shifted")
    value = build.node("Mod", [value, build.integers(np.array(levels**length, np.uint32))], "parts")
    value = build.node("Cast", [value], "rows", to=int32)
    value = build.node("Gather", [_table(build, grid, length), value], "digits")
    if parts * length == count:
        return value
    return head(build, build.reshape(value, [0, -1], "digits"), 1, count * grid.width)


def _drawn(build: Builder, grid: Grid) -> ir.Value:
    """Draw what single digits stand for, (levels,) int8 or int16, once for all weights."""
    if not is_wide(grid.levels) or build.opset < 11:
        return _widened(build.outer, build.outer.constant("x1", grid.values, f"{TERSE}.{grid.name}"), grid)
    return build.outer.once(f"grid {grid.name}", lambda: _counted(build.outer, grid.levels))


def _counted(build: Builder, levels: int) -> ir.Value:
    """Draw the integers about zero, int16, by counting."""
    half = (levels - 1) // 2
    ends = (build.integers(np.array(n, np.int32)) for n in (-half, half + 1, 1))
    return build.node("Cast", [build.node("Range", list(ends), "counted")], "x1", to=int(ir.DataType.INT16))


def _parts(packing: Packing) -> tuple[int, int]:
    """Return (digits, number) of the parts of a word whose values a table can list: few, then short ones."""
    longest = next(m for m in range(1, 17) if packing.levels ** (m + 1) > _ROWS)
    parts = -(-packing.digits // longest)
    return -(-packing.digits // parts), parts


def _table(build: Builder, grid: Grid, digits: int) -> ir.Value:
    """Draw the table of all words of so many digits, (L^digits, digits), once for all weights."""
    outer, levels = build.outer, grid.levels
    if is_wide(levels):  # more digits than one would be too many rows
        return outer.once(f"column {grid.name}", lambda: outer.reshape(_drawn(build, grid), [-1, 1], "x1"))
    form = _generated if _generates(levels, digits, build.opset) else _stored
    return outer.once(f"table {grid.name} {digits} {grid.wide}", lambda: form(outer, grid, digits))


@cache
def _generates(levels: int, digits: int, opset: int) -> bool:
    """Whether the table is fewer bytes of file as nodes (Range is as old as opset 11)."""
    if opset < 11:
        return False
    grid = Grid.even(levels)
    made = nbytes(opset, lambda build: _generated(build, grid, digits))
    return made < nbytes(opset, lambda build: _stored(build, grid, digits))


def _stored(build: Builder, grid: Grid, digits: int) -> ir.Value:
    levels = grid.levels
    numbers = np.arange(levels**digits)[:, None] // levels ** np.arange(digits) % levels
    rows = grid.values[numbers].reshape(len(numbers), -1)
    return _widened(build, build.constant(f"x{digits}", rows, f"{TERSE}.{grid.name}"), grid)


def _widened(build: Builder, value: ir.Value, grid: Grid) -> ir.Value:
    return build.cast(value, "int16", "wide") if grid.wide else value


def _generated(build: Builder, grid: Grid, digits: int) -> ir.Value:
    """Take the numbers 0, 1, ... apart, in int32, which runtimes divide alike."""
    levels = grid.levels
    scalars = (build.integers(np.array(n, np.int32)) for n in (0, levels**digits, 1))
    numbers = build.node("Range", list(scalars), "numbers")
    places = np.array([[levels**j] for j in range(digits)], np.int32)
    value = build.node("Div", [numbers, build.integers(places)], "shifted")
    value = build.node("Mod", [value, build.integers(np.array(levels, np.int32))], "digits")
    value = build.node("Gather", [_drawn(build, grid), value], "centred")
    if grid.width > 1:
        value = build.node("Transpose", [value], "rows", perm=[1, 0, 2])
        return build.reshape(value, [0, -1], "table")
    return build.node("Transpose", [value], "table")  # last to first: without perm it turns a matrix


@cache
def _decoding(packing: Packing, opset: int, padded: bool, first: bool, divided: bool) -> int:
    """Bytes of everything but the words; ``divided`` as of a stream, where nothing is cut off."""
    words = np.zeros(99, packing.word)
    size = 99 * packing.digits - padded

    def one(build: Builder) -> None:
        if divided:
            row = [len(words) * packing.digits]
            _row(build, packing, words, Grid.even(packing.levels), TERSE, row, divided=True)
        else:
            draw(build, packing, words, (size, 1))

    def two(build: Builder) -> None:
        one(build)
        draw(build, packing, words[1:], (1, size - packing.digits))

    alone = nbytes(opset, one)
    if first or divided:
        return alone - words.nbytes
    return nbytes(opset, two) - alone - words[1:].nbytes
