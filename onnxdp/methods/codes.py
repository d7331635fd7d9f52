"""Codes: how integers are told by digits of few levels, what bits that takes, and which code is for how many.

Integers up to 126 are ranked 0 -1 1 -2 2 ...: frequent ones first. A digit of a stream names one of the
first ranks that the streams before it left over, or escapes: then the next stream says what stands there.
The last stream has no escape. Where few would escape, a digit tells of two to eight integers at once, and
escapes where any of them is of none of these ranks: eight zeros in a row, three signs after another.
Trained weights crowd at zero and reach far, so that it takes up to a third fewer bits than digits of one
size, for the same error.

Where steps are small, the lowest bits are as good as even: an integer is 2^k h + l, with h coded like this
and l, -2^(k-1) .. 2^(k-1) - 1, in k raw bits.

References
----------
Shannon 1948: no code takes less than the entropy. method.md 4.4.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache, reduce
from itertools import accumulate
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
_MIXED = 0.35
"""Deviation of the logarithm of the sizes that normal numbers are mixed of, to be like weights."""
_DRAWN = 120
"""Bytes of the operators that decode one stream, about."""


class Stage(NamedTuple):
    """One stream: a digit tells of so many ``integers``, each of the next ``ranks`` ranks, or escapes."""

    integers: int
    ranks: int
    last: bool = False
    """Whether nothing escapes; a digit tells of one integer then."""

    @property
    def levels(self) -> int:
        """Of a digit."""
        return int(self.ranks**self.integers) + (not self.last)


class Code(NamedTuple):
    """The streams, of which the last one ends the code, and how many raw bits lie below."""

    stages: tuple[Stage, ...]
    raw: int = 0

    @property
    def levels(self) -> tuple[int, ...]:
        """Of the digits of each stream."""
        return tuple(stage.levels for stage in self.stages)

    @property
    def starts(self) -> tuple[int, ...]:
        """First rank that each stream names: after a digit of several integers, any rank may be left over."""
        single = (0 if stage.integers > 1 else stage.ranks for stage in self.stages[:-1])
        return tuple(accumulate(single, initial=0))

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
        return len(self.stages) + (self.raw > 0)

    @property
    def unit(self) -> float:
        """What integers are multiplied by: their coded part has steps of 1."""
        return 2.0**-self.raw


_LAST = (2, 3, 4, 5, 6, 7, 9, 11, 16, 23, 40, 84, 127, 255)
"""Levels that a last stream may have: the most for each number of digits that a word holds."""


def _code(*stages: tuple[int, int] | int, raw: int = 0) -> Code:
    """Return a code of stages (integers, ranks), or ranks of one integer; the last of all others."""
    told = (Stage(1, s) if isinstance(s, int) else Stage(*s) for s in stages)
    return Code((*told, Stage(1, _LAST[-1], last=True)), raw)


_CODED = (
    (2.25, (1, 2, 2, 6)),
    (2.75, (3, 2, 2, 8)),
    (3.25, (3, 3, 3, 8)),
    (3.5, (5, 3, 3, 10)),
    (4.0, (8, 8, 8, 15)),
    (5.0, (15, 15, 15, 39)),
    (5.5, (22, 22, 22, 39)),
)
CODES = (
    (0.875, _code((8, 1), (3, 1), 1, (3, 2))),
    (1.375, _code((3, 1), 1, (3, 2), (3, 4))),
    (1.625, _code(1, (3, 2), 2, (3, 2))),
    (1.875, _code(1, 1, (2, 1), (2, 3))),
    *((most, _code(*stages)) for most, stages in _CODED),
    (6.0, _code(8, 8, 8, 15, raw=2)),
    *((most + 4, _code(*stages, raw=4)) for most, stages in _CODED),
    *((most + 8, _code(*stages, raw=8)) for most, stages in _CODED[:5]),
)
"""Codes, each with the most bits of an integer that it is for.

Each is within .02 bits of the best code of up to five streams, found by going through all whose levels fill
words well, for weights of ResNet-20 and MobileNet and for numbers like them: .05 to .1 bits more than the
entropy up to 2.75 bits and as many raw ones, twice that and more around.
"""
EARLY = (
    (3.9375, _code(3, 2, 2, 8, raw=1)),
    (4.1875, _code(1, 2, 2, 6, raw=2)),
    (4.8125, _code(3, 2, 2, 8, raw=2)),
    (5.4375, _code(3, 3, 3, 8, raw=2)),
)
"""Codes with raw bits where others have none yet: .1 bits less, for twice the memory of a weight at load.

Numbers of bits that are odd multiples of a sixteenth ask for them.
"""
PLAIN = _CODED[-1][0]
"""Bits up to which integers need no raw ones ..."""
SURE = _CODED[2][0]
"""... and up to which they never have any."""


def code_for(bits: float) -> Code:
    """Return the code for integers that take so many bits each."""
    return next(code for most, code in (EARLY if is_early(bits) else CODES) if bits <= most)


def is_early(bits: float) -> bool:
    """Whether so many bits ask for raw ones among them where others have none yet."""
    return bits * 16 % 2 == 1


def least_bits(code: Code) -> float:
    """Return the bits of an integer below which hardly any could be other than zero."""
    return code.raw + _ABOVE * _bits(code.levels[0]) / code.stages[0].integers


def bits_of(integers: Array, code: Code) -> float:
    """Return the bits of a code's digits, packed without a rest: those of several weights nearly add up."""
    digits = Tally.of(ranks_of(halves(integers, code.raw)[0]), code).digits
    bits = sum(float(count) * _bits(levels) for count, levels in zip(digits, code.levels, strict=True))
    return bits + integers.size * code.raw


def like(name: str, size: int, bits: float) -> Array:
    """Return integers (size,) that take at most so many bits each, the same for a name every time."""
    times = -(-size // _ENOUGH)
    few, seams = _some(-(-size // times), bits)
    start, period = seams[zlib.crc32(name.encode()) % len(seams)], seams[-1]
    turned = np.roll(few[:period], -start)
    made: Array = np.resize(turned, size) if times > 1 else np.append(turned, few[period:])
    return made


@lru_cache(maxsize=256)
def _some(size: int, bits: float) -> tuple[Array, Array]:
    """Return integers whose sizes fall off as those of weights do, and their seams."""
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
        low, high = (middle, high) if _fits(rounded(2.0**middle), code, bits) else (low, middle)
    made = rounded(2.0**low)
    seams = _seams(made, code)
    if size > _ENOUGH // 2:  # what repeats must take no more, either
        fits = (k for k in range(len(seams), 1, -1) if _fits(made[: seams[k - 1]], code, bits))
        seams = seams[: next(fits, len(seams))]
    return made, seams


def _fits(integers: Array, code: Code, bits: float) -> bool:
    return bits_of(integers, code) <= bits * integers.size * _UNDER


def _seams(integers: Array, code: Code) -> Array:
    """Return the places where digits of all streams begin: what lies between takes the same anywhere."""
    ranks = ranks_of(halves(integers, code.raw)[0])
    places = inner = np.arange(ranks.size + 1)
    for stage, _, escaping in walk(ranks, code):
        whole = inner % stage.integers == 0
        places, begun = places[whole], inner[whole] // stage.integers
        inner = np.append(0, np.cumsum(escaping))[begun] * stage.integers
    return places


def common(parts: Sequence[tuple[Array, Code]]) -> dict[Code, Code]:
    """Say for each code of several arrays of integers in which of these codes they take the fewest bytes.

    A code has operators of its own: a few integers are smaller in the code of others.
    """
    raws = {code.raw for _, code in parts}
    if len(raws) > 1:
        alike = [[part for part in parts if part[1].raw == raw] for raw in raws]
        return {own: code for some in alike for own, code in common(some).items()}
    codes = sorted({code for _, code in parts})
    seen: dict[tuple[Code, Code], Tally] = {}
    for own in codes:
        ranks = [ranks_of(halves(integers, own.raw)[0]) for integers, of in parts if of == own]
        for code in codes:
            seen[own, code] = Tally.sum([Tally.of(some, code) for some in ranks])

    def taken(members: Sequence[Code], code: Code) -> float:
        return cut(code, Tally.sum([seen[m, code] for m in members]))[0]

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


class Tally(NamedTuple):
    """For each stream of a code: ``digits`` it takes, integers ``left`` for it, their ``largest`` rank."""

    digits: Array
    left: Array
    largest: Array

    @classmethod
    def of(cls, ranks: Array, code: Code) -> Tally:
        """Look at ranks (size,), uint8."""
        found = np.zeros((3, len(code.stages)), np.int64)
        single = max((k + 1 for k, stage in enumerate(code.stages) if stage.integers > 1), default=0)
        left = ranks.size
        for k, (stage, rows, escaping) in enumerate(walk(ranks, code)):
            if k == single:  # from here on, how many there are of each rank tells all
                counts = np.bincount(rows[:, 0])
                beyond = np.append(np.cumsum(counts[::-1])[::-1], 0)
                starts = np.array(code.starts[k:]) - code.starts[k]
                counted = beyond[np.minimum(starts, counts.size)]
                found[:, k:] = counted, counted, np.maximum(counts.size - 1 - starts, 0)
                break
            found[:, k] = len(rows), left, rows.max()
            left = int(np.count_nonzero(escaping)) * stage.integers
        return cls(*found)

    @classmethod
    def sum(cls, tallies: Sequence[Tally]) -> Tally:
        """Take several arrays for one."""
        digits, left, largest = (np.stack(of) for of in zip(*tallies, strict=True))
        return cls(digits.sum(axis=0), left.sum(axis=0), largest.max(axis=0))


def cut(code: Code, found: Tally) -> tuple[float, Code]:
    """Return the code, ended where that takes the fewest bytes: by a last stream, or where nothing is left.

    Also returns the bits of its digits and of all operators.
    """
    ends: list[tuple[float, int, Stage]] = []
    before = 0.0
    for k, stage in enumerate(code.stages):
        last = Stage(1, next(m for m in _LAST if m > found.largest[k]), last=True)
        operators = 8 * _DRAWN * (k + 1)
        ends.append((before + float(found.left[k]) * _bits(last.levels) + operators, k, last))
        before += float(found.digits[k]) * _bits(stage.levels)
        if k + 1 < len(code.stages) and not found.left[k + 1]:
            ends.append((before + operators, k, stage))
            break
    bits, k, end = min(ends)
    return bits, code._replace(stages=(*code.stages[:k], end))


def halves(integers: Array, raw: int) -> tuple[Array, Array]:
    """Return what is coded, int8, and what is not, uint8 (none without raw bits)."""
    if not raw:
        return integers, np.empty(0, np.uint8)
    moved = integers + np.int16(half(raw))
    return (moved >> raw).astype(np.int8), (moved & ((1 << raw) - 1)).astype(np.uint8)


def half(raw: int) -> int:
    """Return what raw bits hold more than their number is, so that h = 0 is about zero."""
    return 1 << raw >> 1


def ranks_of(integers: Array) -> Array:
    """Return the place of each integer in 0 -1 1 -2 2 ..., uint8."""
    ranks: Array = ((integers << 1) ^ (integers >> 7)).view(np.uint8)  # in eight bits, which may overflow
    return ranks


def walk(ranks: Array, code: Code) -> Iterator[tuple[Stage, Array, Array]]:
    """Give each stream's rows, what its digits tell of, and which of them escape, until nothing is left.

    Rows are (digits, integers) ranks from the first that the stream names, filled up with that one.
    """
    for stage in code.stages:
        if not ranks.size:
            return
        over = -ranks.size % stage.integers
        rows = (np.pad(ranks, (0, over)) if over else ranks).reshape(-1, stage.integers)
        escaping = reduce(np.maximum, rows.T) >= stage.ranks  # max(axis=1) is slow along a few numbers
        yield stage, rows, escaping
        ranks = rows[escaping].reshape(-1)
        if stage.integers == 1:
            ranks -= np.uint8(stage.ranks)


def streams_of(ranks: Array, code: Code) -> Iterator[Array]:
    """Give the digits of each stream, uint8, until nothing is left."""
    for stage, rows, escaping in walk(ranks, code):
        digits = rows[:, -1]
        for place in range(stage.integers - 2, -1, -1):
            digits = digits * np.uint8(stage.ranks) + rows[:, place]
        yield np.where(escaping, np.uint8(stage.levels - 1), digits)


@cache
def _bits(levels: int) -> float:
    """Bits of one digit, packed."""
    many = 9600  # whole words of every number of digits, nearly
    return 8 * min(p.nbytes(many) for p in packing.offered(levels, SINCE)) / many
