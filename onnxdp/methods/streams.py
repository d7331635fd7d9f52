"""Rounded weights of one model drawn together: each stream of digits, each product with steps only once.

A chain of its own costs a weight some 250 bytes of file, as much as 1000 numbers of 2 bits. Here the
digits of all small weights of the same levels L, or of the same code, are streams of words, which two
divisions take apart; the integers follow one another, and pieces that are rows of the same shape are
multiplied by their steps at once:

    words of L -> Div -> Mod -> Gather -> Reshape   (per L; per stream of a code, see escapes)
    Concat of all -> Cast -> Split                  (once: a piece for each L and shape of a row)
    Concat of pieces -> Reshape -> Mul -> Split     (per shape of a row: the weights)

A further weight of a known L or code and shape costs 7 bytes. A large weight keeps a chain of its own, since
every step here holds a copy of all numbers while ONNX Runtime folds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np
import onnx_ir as ir

from onnxdp.build import DTYPES, TERSE, Builder, nbytes
from onnxdp.methods import escapes, packing
from onnxdp.methods.codes import Code, common
from onnxdp.methods.escapes import Coded
from onnxdp.methods.packing import Grid, Packing
from onnxdp.records import Array, Weight

SMALL = 1 << 16
"""Numbers of a weight below which it shares a stream."""
_SURELY = 1.5
"""Weights of a kind, on average, from which that is smaller for sure: 20 of ResNet-20 save 7 to 20 kB ..."""
_LOOKED = 1 << 12
"""... with more numbers than these, which are soon drawn both ways."""
_MOST = 1 << 22
"""Numbers of all streams together: folding holds some 30 bytes for each."""
_CONSTANT = ("LSTM", "GRU", "RNN")
"""Operators whose weights OpenVINO refuses unless it can fold what decodes them."""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One rounded weight, waiting to be drawn.

    Attributes
    ----------
    weight : Weight
    code : Packing or Code
        Of the integers: how digits go into words, or what several weights may have in common.
    words : ndarray of shape (words,), or Coded
        The integers.
    stored : tuple of int
        Shape in which the steps lie along axes.
    steps : ndarray, float32
        Broadcast against ``stored``.
    half : bool
        Whether float16 holds the steps exactly.
    """

    weight: Weight
    code: Packing | Code
    words: Array | Coded
    stored: tuple[int, ...]
    steps: Array
    half: bool
    value: ir.Value = field(default_factory=lambda: ir.Value(name=None))

    @property
    def kind(self) -> tuple[int, ...]:
        """What parts have in common whose integers are drawn together: a number of levels, or a code."""
        if isinstance(self.code, Packing):
            return (self.code.levels,)
        return (self.code.raw, *chain.from_iterable(self.code.stages))

    @property
    def row(self) -> tuple[str, tuple[int, ...]] | None:
        """What parts multiplied together have in common; None where steps lie along other axes."""
        lead = (len(self.steps), *[1] * (self.steps.ndim - 1))
        if self.stored != self.weight.shape or self.steps.shape != lead or len(lead) < 2 or not self.half:
            return None
        return self.weight.dtype, self.stored[1:]


def draw(build: Builder, part: Part) -> ir.Value:
    """Return the weight's value, drawn when all others of the model are known."""
    part.value.name = build.terse()
    part.value.type = ir.TensorType(DTYPES[part.weight.dtype])
    part.value.shape = ir.Shape(part.weight.shape)
    build.promise(part.value)
    build.later("rounded weights", (build, part), _all)
    return part.value


Place = tuple[Builder, Part]


def _all(outer: Builder, places: Sequence[Place]) -> None:
    """Draw small weights together where that is smaller, and the others each on its own."""
    small: list[Place] = []
    for build, part in sorted(places, key=lambda p: p[1].weight.size):
        if part.weight.size < SMALL and sum(p.weight.size for _, p in small) + part.weight.size <= _MOST:
            small.append((build, part))
    together = {id(part) for _, part in small}
    joined = [part for _, part in places if id(part) in together]
    many = sum(part.weight.size for part in joined) > _LOOKED
    surely = many and len(joined) >= _SURELY * len({part.kind for part in joined})
    if not surely and not _pays(outer.opset, joined):
        together = set()
    for build, part in places:
        if id(part) not in together:
            _alone(build, part)
    if together:
        _join(outer, joined)


def _pays(opset: int, parts: Sequence[Part]) -> bool:
    """Whether parts are smaller drawn together."""
    return len(parts) > 1 and _bytes(opset, parts, join=True) < _bytes(opset, parts, join=False)


def _bytes(opset: int, parts: Sequence[Part], *, join: bool) -> int:
    """Count what parts add to a file, without their numbers being looked at."""

    def sketch(build: Builder) -> None:
        likes = [replace(p, value=ir.Value(name=None)) for p in parts]
        for like in likes:
            like.value.name = build.terse()
        if join:
            _join(build, likes)
        else:
            for like in likes:
                _alone(build.named(like.weight.name), like)

    return nbytes(opset, sketch)


def _alone(build: Builder, part: Part) -> None:
    """Draw one weight's chain."""
    if isinstance(part.words, Coded):
        wide = part.weight.op in _CONSTANT
        _finished(build, part, escapes.draw(build, part.words, build.weight, part.stored, wide=wide))
        return
    assert isinstance(part.code, Packing)
    _finished(build, part, packing.draw(build, part.code, part.words, part.stored))


def _finished(build: Builder, part: Part, integers: ir.Value) -> None:
    """Multiply the integers of one weight by its steps, and give them its shape and type."""
    if part.half:
        step = build.vector("scale", part.steps, part.steps.shape, additive=None)
    else:
        step = build.constant("scale", part.steps)
    shaped, typed = part.stored != part.weight.shape, part.weight.dtype != "float32"
    value = build.node("Mul", [integers, step], "value", into=None if shaped or typed else part.value)
    if shaped:
        shape = build.ints(part.weight.shape)
        value = build.node("Reshape", [value, shape], "weight", into=None if typed else part.value)
    if typed:
        build.node("Cast", [value], "type", into=part.value, to=int(DTYPES[part.weight.dtype]))


def _join(build: Builder, parts: Sequence[Part]) -> None:
    """Draw all streams, cut them into pieces, and put the pieces of equal rows together."""
    coded = [(p.words.integers(), p.code) for p in parts if isinstance(p.words, Coded)]
    codes = common([(integers, code) for integers, code in coded if isinstance(code, Code)])
    parts = [replace(p, code=codes[p.code]) if isinstance(p.code, Code) else p for p in parts]
    rows: dict[object, list[Part]] = {}
    for part in parts:
        rows.setdefault(part.row or id(part), []).append(part)
    streams, sizes, owners = [], [], []
    kinds = sorted({p.kind for p in parts})
    floats, wide = (any(is_(p.code) for p in parts) for is_ in (_is_float, _is_wide))
    for kind in kinds:
        pieces = {k: [p for p in own if p.kind == kind] for k, own in rows.items()}
        pieces = {k: own for k, own in pieces.items() if own}
        together = [p for own in pieces.values() for p in own]
        stream, left_over = _stream(build, together)
        code = together[0].code
        if floats and not _is_float(code):  # one type goes into one Concat
            stream = _float(build, stream)
        elif wide and not floats and not _is_wide(code):
            stream = build.node("Cast", [stream], "wide", to=int(ir.DataType.INT16))
        streams.append(stream)
        owners += [*pieces, *([None] if left_over else [])]
        sizes += [sum(p.weight.size for p in own) for own in pieces.values()]
        sizes += [left_over] if left_over else []
    flat = streams[0] if len(streams) == 1 else build.node("Concat", streams, "streams", axis=0)
    flat = flat if floats else _float(build, flat)
    cut = build.split(flat, sizes) if len(sizes) > 1 else [flat]
    for key, own in rows.items():
        mine = [piece for piece, owner in zip(cut, owners, strict=True) if owner == key]
        _rows(build, sorted(own, key=lambda p: p.kind), mine)


def _rows(build: Builder, parts: Sequence[Part], pieces: Sequence[ir.Value]) -> None:
    """Multiply weights whose rows are alike by their steps, and cut the product into them."""
    value = pieces[0] if len(pieces) == 1 else build.node("Concat", pieces, "pieces", axis=0)
    if len(parts) == 1:
        (part,) = parts
        _finished(build.named(part.weight.name), part, build.reshape(value, part.stored, "shaped"))
        return
    steps = np.concatenate([p.steps for p in parts])
    value = build.reshape(value, (len(steps), *parts[0].stored[1:]), "shaped")
    value = build.node("Mul", [value, build.vector("scale", steps, steps.shape, additive=None)], "value")
    if parts[0].weight.dtype != "float32":
        value = build.cast(value, parts[0].weight.dtype, "type")
    build.split(value, [len(p.steps) for p in parts], [p.value for p in parts])


def _float(build: Builder, value: ir.Value) -> ir.Value:
    return build.node("Cast", [value], "integers", to=int(ir.DataType.FLOAT))


def _is_float(code: Packing | Code) -> bool:
    """Whether numbers are float32 as they are drawn: those of a code with raw bits."""
    return isinstance(code, Code) and code.raw > 0


def _is_wide(code: Packing | Code) -> bool:
    """Whether integers are int16 and not int8."""
    return isinstance(code, Code) or packing.is_wide(code.levels)


def _stream(build: Builder, parts: Sequence[Part]) -> tuple[ir.Value, int]:
    """Store the integers of parts of one kind and draw them in a row, with how many too many there are."""
    code = parts[0].code
    if isinstance(code, Code):
        integers = [p.words.integers() for p in parts if isinstance(p.words, Coded)]
        coded = Coded.of(np.concatenate(integers), code)
        name = f"{TERSE}.{'.'.join(str(int(n)) for n in parts[0].kind)}"
        if code.raw:
            return escapes.draw(build, coded, name, [coded.size], wide=True), 0
        return escapes.draw_row(build, coded, name, wide=True)
    digits = [
        p.code.unpack(p.words, p.weight.size)
        for p in parts
        if isinstance(p.code, Packing) and not isinstance(p.words, Coded)
    ]
    return packing.stream(build, np.concatenate(digits), Grid.even(code.levels), f"{TERSE}.{code.levels}")
