"""Rounded weights of one model drawn together: each stream of digits, each product with steps only once.

A chain of its own costs a weight some 250 bytes of file, as much as 1000 numbers of 2 bits. Here the
digits of all small weights of the same levels L are one stream of words, which two divisions take apart; the
streams follow one another, and pieces that are rows of the same shape are multiplied by their steps at once:

    words of L -> Div -> Mod -> Gather -> Reshape   (per L)
    Concat of all -> Cast -> Split                  (once: a piece for each L and shape of a row)
    Concat of pieces -> Reshape -> Mul -> Split     (per shape of a row: the weights)

A further weight of a known L and shape costs 7 bytes. A large weight keeps a chain of its own, because every
step here holds a copy of all numbers while ONNX Runtime folds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from onnxdp.build import DTYPES, TERSE, Builder, nbytes
from onnxdp.methods import packing
from onnxdp.methods.packing import Packing
from onnxdp.methods.tables import Alphabet, table
from onnxdp.records import Array, Weight

SMALL = 1 << 16
"""Numbers of a weight below which it shares a stream."""
_MOST = 1 << 22
"""Numbers of all streams together: folding holds some 30 bytes for each."""
_SPREAD = 1 << 20
"""Numbers of a stream up to which it is taken apart by division, 13 bytes for each, and not by a table."""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One rounded weight, waiting to be drawn.

    Attributes
    ----------
    weight : Weight
    packing : Packing
        Of ``words``.
    dim : int
        Numbers that a digit stands for: an entry of a table where it is more than one.
    words : ndarray of shape (words,)
    stored : tuple of int
        Shape in which the steps lie along axes.
    steps : ndarray, float32
        Broadcast against ``stored``.
    half : bool
        Whether float16 holds the steps exactly.
    """

    weight: Weight
    packing: Packing
    dim: int
    words: Array
    stored: tuple[int, ...]
    steps: Array
    half: bool
    value: ir.Value = field(default_factory=lambda: ir.Value(name=None))

    @property
    def alphabet(self) -> Alphabet:
        """What a digit stands for."""
        return Alphabet(self.packing.levels, self.dim)

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
    if len(joined) < 2 or _bytes(outer.opset, joined, join=True) >= _bytes(outer.opset, joined, join=False):
        together = set()
    for build, part in places:
        if id(part) not in together:
            _alone(build, part)
    if together:
        _join(outer, joined)


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
    if part.dim == 1:
        _finished(build, part, packing.draw(build, part.packing, part.words, part.stored))
        return
    name = f"{build.weight}.words"
    value, over = _entries(build, part.alphabet, part.packing, part.words, part.weight.size, name)
    if over:
        value = build.split(value, [part.weight.size, over])[0]
    value = build.reshape(value, part.stored, "shaped")
    _finished(build, part, build.node("Cast", [value], "integers", to=int(ir.DataType.FLOAT)))


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
    rows: dict[object, list[Part]] = {}
    for part in parts:
        rows.setdefault(part.row or id(part), []).append(part)
    streams, sizes, owners = [], [], []
    alphabets = sorted({p.alphabet for p in parts})
    wide = any(packing.is_wide(a.levels) for a in alphabets)
    for alphabet in alphabets:
        pieces = {k: [p for p in own if p.alphabet == alphabet] for k, own in rows.items()}
        pieces = {k: own for k, own in pieces.items() if own}
        digits = np.concatenate([_digits(p) for own in pieces.values() for p in own])
        stream, left_over = _stream(build, alphabet, digits)
        if wide and not packing.is_wide(alphabet.levels):  # one type goes into one Concat
            stream = build.node("Cast", [stream], "wide", to=int(ir.DataType.INT16))
        streams.append(stream)
        owners += [*pieces, *([None] if left_over else [])]
        sizes += [sum(p.weight.size for p in own) for own in pieces.values()]
        sizes += [left_over] if left_over else []
    flat = streams[0] if len(streams) == 1 else build.node("Concat", streams, "streams", axis=0)
    flat = build.node("Cast", [flat], "integers", to=int(ir.DataType.FLOAT))
    cut = build.split(flat, sizes) if len(sizes) > 1 else [flat]
    for key, own in rows.items():
        mine = [piece for piece, owner in zip(cut, owners, strict=True) if owner == key]
        _rows(build, sorted(own, key=lambda p: p.alphabet), mine)


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


def _digits(part: Part) -> Array:
    return part.packing.unpack(part.words, part.weight.size // part.dim)


def _stream(build: Builder, alphabet: Alphabet, digits: Array) -> tuple[ir.Value, int]:
    """Store digits and draw them as integers, int8 or int16; also returns how many follow the last."""
    levels, dim = alphabet
    name = f"{TERSE}.{levels}" if dim == 1 else f"{TERSE}.{levels}x{dim}"
    best = Packing.best(levels, digits.size, build.opset)
    if dim > 1:
        return _entries(build, alphabet, best, best.pack(digits), digits.size * dim, name)
    if best.digits == 1:
        return build.constant("words", packing.centred(levels)[digits], name), 0
    words = best.pack(digits)
    if build.opset < 10 or digits.size > _SPREAD:
        value = packing.rows(build.named(name), best, words)
    else:
        value = build.node(
            "Gather", [packing.grid(build, levels), _spread(build, best, words, name)], "centred"
        )
    return build.reshape(value, [len(words) * best.digits], "flat"), len(words) * best.digits - digits.size


def _entries(
    build: Builder, alphabet: Alphabet, packed: Packing, words: Array, size: int, name: str
) -> tuple[ir.Value, int]:
    """Draw the entries of a table that words name, int8, in a row; and by how many numbers too many."""
    levels, dim = alphabet
    if packed.digits > 1 and build.opset < 10:  # without Mod
        words, packed = packed.unpack(words, size // dim), Packing(levels, "uint8", 1)
    held = build.outer.constant("entries", table(alphabet), f"{TERSE}.T{levels}x{dim}")
    value = build.node("Gather", [held, _spread(build, packed, words, name)], "entries")
    count = len(words) * packed.digits * dim
    return build.reshape(value, [count], "flat"), count - size


def _spread(build: Builder, packed: Packing, words: Array, name: str) -> ir.Value:
    """Take words apart: (word // L^i) mod L, in uint32 or int32, which runtimes divide alike; int32."""
    long, int32 = packed.word == "uint32", int(ir.DataType.INT32)
    value = build.constant("words", words.reshape(-1, 1), name)
    if not long:
        value = build.node("Cast", [value], "rows", to=int32)
    if packed.digits == 1:
        return value
    kind = np.dtype("uint32" if long else "int32")
    places = np.array([[packed.levels**i for i in range(packed.digits)]], kind)
    value = build.node("Div", [value, build.integers(places)], "shifted")
    value = build.node("Mod", [value, build.integers(np.array(packed.levels, kind))], "digits")
    return build.node("Cast", [value], "rows", to=int32) if long else value
