"""Sizes that a file leaves free and its network does not: where the usual ones fail, others are tried.

Exporters declare a length free where a table of positions fixes or bounds it (the encoder of Whisper takes
3,000 frames and nothing else, for a table of 1,500 behind a stride of 2), the sides of pictures where they
are those of training, and ids that point into another input (the edges of a graph) come with no table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from onnxdp import probes
from onnxdp.errors import ModelError
from onnxdp.inputs import POSITION, VOCABULARY, Dim, InputSpec, Layout
from onnxdp.records import Array

SIDES = (224, 256, 384, 288, 320, 336, 448, 512, 518, 640, 768, 800, 1024, 192, 160, 128, 112, 96, 64, 48, 32)
"""Sides of square pictures, the usual ones first."""
_LONGEST = {"ids": 4096, "mask": 4096, "other": 500_000}
"""Places of the longest sequence that is tried, by what an input is: half a minute of sound."""
_MOST = 96
"""Runs at most."""
_TIMES = (2, 4, 8, 16, 32)
"""What is tried where nothing that is said helps: sound too short for all strides, so much longer ..."""
_CONTEXTS = (96, 128, 336, 512, 1024)
"""... and what forecasts takes so many steps."""

Runs = Callable[[Mapping[str, Array]], object]


def fitted(specs: Sequence[InputSpec], runs: Runs) -> list[InputSpec]:
    """Return the inputs as they are, or with a free size settled, or two, so that the network runs.

    The numbers in what ONNX Runtime says of the usual sizes ("80 by 1500") are what is tried.

    Parameters
    ----------
    specs : sequence of InputSpec
    runs : callable
        Runs the network on a feed of one sample; raises ModelError where it cannot.

    Raises
    ------
    ModelError
        The network runs on nothing that was tried; what it says of the usual sizes.
    """
    if not free(specs):
        return list(specs)

    def failure(some: Sequence[InputSpec]) -> ModelError | None:
        try:
            runs(_extreme(some, probes.make(some, samples=1, seed=0, batch=1).feeds[0]))
        except ModelError as e:
            return e
        return None

    first = failure(specs)
    if first is None:
        return list(specs)
    tried, left = {tuple(specs)}, [(list(specs), first)]
    met = {_place(first)}
    for start, told in left:
        for other in _others(start, _numbers(told)):
            if tuple(other) in tried:
                continue
            tried.add(tuple(other))
            again = failure(other)
            if again is None:
                return other
            if _place(again) not in met:  # this one was right, or led astray; there is another to settle
                met.add(_place(again))
                left.append((other, again))
            if len(tried) > _MOST:
                raise first
    raise first


def _extreme(specs: Sequence[InputSpec], feed: Mapping[str, Array]) -> Mapping[str, Array]:
    """Return a feed whose texts hold the largest id that any may."""
    made = dict(feed)
    for spec in specs:
        if spec.kind == "ids" and feed[spec.name].any() and not POSITION.search(spec.name.lower()):
            made[spec.name] = feed[spec.name].copy()
            made[spec.name].flat[0] = (spec.vocabulary or VOCABULARY) - 1
    return made


def _place(told: ModelError) -> str:
    """Return the node at which a run failed."""
    return told.message.partition("Status Message:")[0]


def _numbers(told: ModelError) -> list[int]:
    """Return the numbers of what ONNX Runtime says, the largest first."""
    said = told.message.rpartition("Status Message:")[2]
    return sorted({int(n) for n in re.findall(r"\d+", said)} - {0, 1}, reverse=True)


def free(specs: Sequence[InputSpec]) -> bool:
    """Whether there is anything to try: a size that nothing fixes, or ids that no table bounds."""
    return next(_others(specs, (2,)), None) is not None


def _others(specs: Sequence[InputSpec], numbers: Sequence[int]) -> Iterator[list[InputSpec]]:
    """Give the inputs with another size each time: sides of pictures, lengths, how many ids there are."""
    layout = Layout.of(specs, 1)
    pictures = [s for s in specs if s.kind == "image"]
    if any(_free(s, layout) for s in pictures):
        for side in SIDES:
            yield [_sided(s, layout, side) if s in pictures else s for s in specs]
    for spec in specs:
        for axis in _free(spec, layout) if spec.kind in _LONGEST else ():
            usual = layout.shapes[spec.name][axis]
            scaled = [usual * a // b for a in numbers for b in numbers if a != b and usual * a % b == 0]
            more = (*(usual * t for t in _TIMES), *_CONTEXTS) if spec.kind == "other" else ()
            for size in (*sorted(scaled, reverse=True), *numbers, *more):
                if size <= _LONGEST[spec.kind]:
                    yield [_settled(s, spec, axis, size) for s in specs]
    for spec in specs:
        for size in numbers if spec.kind == "ids" else ():
            if size < (spec.vocabulary or VOCABULARY):
                yield [replace(s, vocabulary=size) if s is spec else s for s in specs]


def _free(spec: InputSpec, layout: Layout) -> list[int]:
    """Return the axes whose size nothing fixes, the one that counts samples apart."""
    return [i for i, d in enumerate(spec.shape) if not isinstance(d, int) and i != layout.axes[spec.name]]


def _sided(spec: InputSpec, layout: Layout, side: int) -> InputSpec:
    axes = _free(spec, layout)
    return replace(spec, shape=tuple(side if i in axes else d for i, d in enumerate(spec.shape)))


def _settled(spec: InputSpec, source: InputSpec, axis: int, size: int) -> InputSpec:
    """Return an input once a free axis of ``source`` has a size, and so every size of its name, in sums."""
    name = source.shape[axis]

    def told(i: int, d: Dim) -> Dim:
        if (spec is source and i == axis) or (d == name and d is not None):
            return size
        if not isinstance(d, str) or not isinstance(name, str):
            return d
        return " + ".join(str(size) if t.strip() == name else t.strip() for t in d.split("+"))

    return replace(spec, shape=tuple(told(i, d) for i, d in enumerate(spec.shape)))
