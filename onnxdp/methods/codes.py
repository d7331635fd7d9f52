"""Codes: how integers are told by digits of few levels, what bits that takes, and which code is for how many.

Integers up to 126 are ranked 0 -1 1 -2 2 ...: frequent ones first. A digit of a stream of L levels names one
of the first L - 1 ranks that the streams before it left over, or escapes: then the next stream says what
stands there. The last stream has no escape. Where most integers are zero, the first stream tells of a run of
them at once whether there is anything else. Trained weights crowd at zero and reach far, so that it takes up
to a third fewer bits than digits of one size, for the same error.

Where steps are small, the lowest bits are as good as even: an integer is 2^k h + l, with h coded like this
and l, -2^(k-1) .. 2^(k-1) - 1, in k raw bits.

References
----------
Shannon 1948: no code takes less than the entropy. method.md 4.4.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np

from onnxdp.methods import packing
from onnxdp.records import Array

MOST = 126
"""Largest magnitude of what is coded; 127 stands for an escape."""
SINCE = 11
"""Operator set from which there is ScatterElements."""
_ABOVE = 1.1
"""Bits that a code is to have over those of zeros alone."""
_ENOUGH = 1 << 16
"""Integers that stand for more."""
_UNDER = 1 - 2.0**-11
"""Share of their bits that these take, so that no part of them takes more."""
_WHOLE = 24
"""Integers that are whole runs of every code."""
_MIXED = 0.35
"""Deviation of the logarithm of the sizes that normal numbers are mixed of, to be like weights."""
_DRAWN = 120
"""Bytes of the operators that decode one stream, about."""


class Code(NamedTuple):
    """``run`` integers that a digit of the first stream tells of; levels of the streams; raw bits below."""

    run: int
    levels: tuple[int, ...]
    raw: int = 0

    @property
    def most(self) -> int:
        """Largest magnitude of an integer."""
        return MOST << self.raw

    @property
    def kind(self) -> type[np.signedinteger]:
        """Type that integers are held in: int8 or int16."""
        return np.int16 if self.raw else np.int8

    @property
    def arrays(self) -> int:
        """How many arrays of words there are: one of each stream, and one of raw bits."""
        return len(self.levels) + (self.raw > 0)

    @property
    def unit(self) -> float:
        """What integers are multiplied by: their coded part has steps of 1."""
        return 2.0**-self.raw


_LAST = (2, 3, 4, 5, 6, 7, 9, 11, 16, 23, 40, 84, 127, 255)
"""Levels that a last stream may have: the most for each number of digits that a word holds."""
_CODED = (
    (2.25, (2, 3, 3, 7, 255)),
    (2.75, (4, 3, 3, 9, 255)),
    (3.25, (4, 4, 4, 9, 255)),
    (3.5, (6, 4, 4, 11, 255)),
    (4.0, (9, 9, 9, 16, 255)),
    (5.0, (16, 16, 16, 40, 255)),
    (5.5, (23, 23, 23, 40, 255)),
)
CODES = (
    (0.5, Code(8, (2, 2, 2, 2, 3, 255))),
    (0.875, Code(4, (2, 2, 2, 2, 3, 255))),
    (1.375, Code(3, (2, 2, 3, 3, 6, 255))),
    *((most, Code(1, levels)) for most, levels in _CODED),
    (6.0, Code(1, (9, 9, 9, 16, 255), 2)),
    *((most + 4, Code(1, levels, 4)) for most, levels in _CODED),
    *((most + 8, Code(1, levels, 8)) for most, levels in _CODED[:5]),
)
"""Codes, each with the most bits of an integer that it is for.

On weights of four networks each is within .05 bits of the best code of up to five streams, and of raw bits
from 5.5 bits on: .1 bits more than the entropy at 1.75 to 2.75 bits and as many raw ones, twice that around.
From 4.25 to 5.5 bits raw ones would save .1, for twice the memory of a weight while a session is made.
"""
PLAIN = _CODED[-1][0]
"""Bits up to which integers have no raw ones."""


def code_for(bits: float) -> Code:
    """Return the code for integers that take so many bits each."""
    return next(code for most, code in CODES if bits <= most)


def least_bits(code: Code) -> float:
    """Return the bits of an integer below which hardly any could be other than zero."""
    return code.raw + _ABOVE * _bits(code.levels[0]) / code.run


def bits_of(integers: Array, code: Code) -> float:
    """Return the bits of a code's digits, packed without a rest: those of several weights add up."""
    told, ranks = apart(halves(integers, code.raw)[0], code.run)
    levels = code.levels if told is None else code.levels[1:]
    left = _left(tally(ranks))
    starts = np.cumsum([0, *(n - 1 for n in levels[:-1])])
    bits = sum(float(left[s]) * _bits(n) for s, n in zip(starts, levels, strict=True))
    bits += integers.size * code.raw
    return bits if told is None else bits + told.size * _bits(2)


def like(name: str, size: int, bits: float) -> Array:
    """Return integers (size,) that take at most so many bits each, the same for a name every time."""
    times = -(-size // _ENOUGH)
    few = _some(-(-size // (times * _WHOLE)) * _WHOLE, bits) if times > 1 else _some(size, bits)
    whole = len(few) // _WHOLE * _WHOLE
    start = zlib.crc32(name.encode()) % max(whole, 1) // _WHOLE * _WHOLE  # runs stay as they are
    made: Array = np.resize(np.append(np.roll(few[:whole], start), few[whole:]), size)
    return made


@lru_cache(maxsize=256)
def _some(size: int, bits: float) -> Array:
    """Return integers whose sizes fall off as those of weights do."""
    code = code_for(bits)
    rng = np.random.default_rng(0)
    drawn = rng.standard_normal(size) * np.exp(_MIXED * rng.standard_normal(size))
    drawn = drawn.astype(np.float32)

    def rounded(factor: float) -> Array:
        made: Array = np.rint(np.clip(drawn * np.float32(factor), -code.most, code.most)).astype(code.kind)
        return made

    low, high = -6.0, 12.0
    for _ in range(24):
        middle = (low + high) / 2
        if bits_of(rounded(2.0**middle), code) > bits * size * _UNDER:
            high = middle
        else:
            low = middle
    return rounded(2.0**low)


def common(parts: Sequence[tuple[Array, Code]]) -> dict[Code, Code]:
    """Say for each code of several arrays of integers in which of these codes they take the fewest bytes.

    A code has operators of its own: a few integers are smaller in the code of others.
    """
    raws = {code.raw for _, code in parts}
    if len(raws) > 1:
        alike = [[part for part in parts if part[1].raw == raw] for raw in raws]
        return {own: code for some in alike for own, code in common(some).items()}
    codes = sorted({code for _, code in parts})
    seen: dict[tuple[Code, int], tuple[int, Array]] = {}
    for code in codes:
        own = [halves(integers, code.raw)[0] for integers, of in parts if of == code]
        for run in {code.run for code in codes}:
            ranked = [apart(integers, run) for integers in own]
            digits = sum(0 if told is None else told.size for told, _ in ranked)
            seen[code, run] = digits, sum((tally(ranks) for _, ranks in ranked), np.zeros(1, np.int64))

    def taken(members: Sequence[Code], code: Code) -> float:
        digits, counts = zip(*(seen[m, code.run] for m in members), strict=True)
        return float(sum(digits) * _bits(2) + cut(code, sum(counts))[0])

    groups = {code: [code] for code in codes}
    while len(groups) > 1:
        now = {code: taken(members, code) for code, members in groups.items()}
        gain, gone, kept = max(
            (now[a] + now[b] - taken([*groups[a], *groups[b]], b), a, b)
            for a in groups
            for b in groups
            if a != b
        )
        if gain <= 0:
            break
        groups[kept] += groups.pop(gone)
    return {member: code for code, members in groups.items() for member in members}


def cut(code: Code, counts: Array) -> tuple[float, Code]:
    """Return the code, its last stream where that takes the fewest bytes, of no more levels than needed.

    Also returns the bits of its digits, those of runs not, and of all operators.
    """
    first = code.run > 1
    most, left = int(np.flatnonzero(counts).max(initial=0)), _left(counts)
    found, before, start = [], 0.0, 0
    for k, n in enumerate(code.levels[first:]):
        last = next(m for m in _LAST if m > most - start)
        found.append((before + left[start] * _bits(last) + 8 * _DRAWN * (k + 1 + first), k, last))
        if most < start + n - 1:
            break
        before, start = before + left[start] * _bits(n), start + n - 1
    bits, k, last = min(found)
    return float(bits), code._replace(levels=(*code.levels[: k + first], last))


def halves(integers: Array, raw: int) -> tuple[Array, Array]:
    """Return what is coded, int8, and what is not, uint8 (none without raw bits)."""
    if not raw:
        return integers, np.empty(0, np.uint8)
    moved = integers + np.int16(half(raw))
    return (moved >> raw).astype(np.int8), (moved & ((1 << raw) - 1)).astype(np.uint8)


def half(raw: int) -> int:
    """Return what raw bits hold more than their number is, so that h = 0 is about zero."""
    return 1 << raw >> 1


def apart(integers: Array, run: int) -> tuple[Array | None, Array]:
    """Return which runs are told of, None where there are no runs, and the ranks of the integers in these."""
    ranks = _ranks(integers)
    if run == 1:
        return None, ranks
    rows = np.pad(ranks, (0, -len(ranks) % run)).reshape(-1, run)
    told = np.asarray(rows.any(axis=1))
    return told, rows[told].reshape(-1)


def _ranks(integers: Array) -> Array:
    """Return the place of each integer in 0 -1 1 -2 2 ..., uint8."""
    wide = integers.astype(np.int16)
    ranks: Array = np.where(wide < 0, -2 * wide - 1, 2 * wide).astype(np.uint8)
    return ranks


def tally(ranks: Array) -> Array:
    """Count each rank."""
    return np.bincount(ranks, minlength=2 * MOST + 1)


def _left(counts: Array) -> Array:
    """Return how many there are of each rank and above."""
    left: Array = np.append(np.cumsum(counts[::-1])[::-1], 0)
    return left


@cache
def _bits(levels: int) -> float:
    """Bits of one digit, packed."""
    many = 9600  # whole words of every number of digits, nearly
    return 8 * min(p.nbytes(many) for p in packing.offered(levels, SINCE)) / many
