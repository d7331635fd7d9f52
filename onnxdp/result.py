"""The file that encoded weights give: rewritten, sized, verified, and told of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from onnx import ModelProto

from onnxdp import model as model_file
from onnxdp import runtime, timing, verifier, walk, weights
from onnxdp.decisions import Decisions
from onnxdp.encoding import Workshop
from onnxdp.errors import VerifyError
from onnxdp.model import Model
from onnxdp.passes import GatherConstants, ReplaceWeights, ShortenNames
from onnxdp.planner import Choice
from onnxdp.probes import Probes
from onnxdp.records import Array, Encoded, File, Line, Named, Plan, Verification
from onnxdp.settings import Settings
from onnxdp.weights import Found

LARGE = 256_000_000
"""Bytes of a model from which the two sessions are not held at once, so that latencies are not compared."""

SHORTEN_FROM = 0.01
"""Share of the result's bytes from which names and defaults are shortened unasked."""


@dataclass(slots=True)
class Rewriter:
    """Draws what encoded weights decode to into copies of a model."""

    model: Model
    found: Found
    workshop: Workshop
    settings: Settings
    decisions: Decisions
    """What decides outputs that say little; these tensors keep their names."""
    noisy: bool
    """Whether the model draws random numbers."""
    narrowed: bool = True
    """Whether small vectors become float16, too."""

    _sizes: dict[tuple[bool, frozenset[Named]], int] = field(default_factory=dict, init=False)

    def size(self, choice: Choice) -> int:
        """Bytes of the file that a choice gives."""
        key = self.narrowed, frozenset(c.named for c in choice.candidates.values())
        if key not in self._sizes:  # a search for bytes comes back to where it was
            outline = self.workshop.outline(choice.candidates.values())
            made = self.rewritten(outline, self.workshop.no_shifts(outline))
            self._sizes[key] = model_file.output_size(made)
        return self._sizes[key]

    def opened(self, model: ModelProto | Path) -> Any:
        """Make a session whose answers can be compared with those of another form of the model."""
        return verifier.opened(model, self.decisions, noisy=self.noisy)

    def followed(self, model: ModelProto | Path) -> Any:
        """Make a session of a compressed form, which takes what the original selects."""
        return verifier.followed(model, self.decisions, noisy=self.noisy)

    def rewritten(self, encoded: Sequence[Encoded], shifts: Mapping[str, Array]) -> Model:
        """Return a copy that draws the encoded weights, with biases shifted."""
        copied = model_file.copy(self.model)
        twin = replace(weights.find(copied.ir), weights=self.found.weights)
        provenance = f"{metadata.version('onnxdp')} {self.settings.method}"
        ReplaceWeights(twin, encoded, self.workshop.forms, shifts, provenance, narrowed=self.narrowed)(
            copied.ir
        )
        return self._shortened(copied)

    def _shortened(self, result: Model) -> Model:
        """Return the result under short names, where that is asked for or worth it."""
        if self.settings.short_names is False:
            return result
        brief = model_file.copy(result)
        gather = GatherConstants()
        shorten = ShortenNames(result.original_value_info, kept=self.decisions.names)
        gather(brief.ir)
        shorten(brief.ir)
        brief.original_value_info = shorten.value_info
        brief.ir.meta[ShortenNames.KEY] = saved = gather.saved + shorten.saved
        left = sum(t.nbytes for t in walk.tensors(brief.ir))
        return brief if self.settings.short_names or saved > SHORTEN_FROM * left else result


def verified(
    original: Model, given: Path | None, at: Path, held_out: Probes, rewriter: Rewriter
) -> tuple[Verification, float | None]:
    """Check the written file against the original, before it takes its name."""
    verifier.check_file(at)
    source = given if given is not None else model_file.serialize(original)
    session = rewriter.opened(source)
    reference = verifier.Reference.of(session, held_out, rewriter.decisions)
    if original.nbytes > LARGE:
        session = None
    compressed = rewriter.followed(at)
    found = verifier.compare(reference, compressed, held_out)
    if not found.passed:
        raise VerifyError(
            "The compressed model's outputs are not finite on the probe inputs and it was not written; "
            "ask for less with --ratio, or give real inputs with --inputs."
        )
    if session is None:
        return found, None
    if rewriter.decisions.held:
        compressed = rewriter.opened(at)  # as it selects by itself
    feed = held_out.rebatch(1).feeds[0]
    return found, timing.latency_ratio(session, compressed, feed, repeat=7)


def lines_of(made: Plan, encoded: Sequence[Encoded], whole: Found, found: Found) -> tuple[Line, ...]:
    """Say what became of every weight; sizes before are those of the whole."""
    arrays_of = {e.weight: e for e in encoded}
    choices = {c.weight: c for c in made.choices}
    reasons = {k.weight: k.reason for k in made.kept}
    before = {w.name: w.nbytes for w in whole.weights}
    lines = []
    for w in found.weights:
        c = choices.get(w.name)
        if c is None:
            reason = reasons.get(w.name, "is not in the plan")
            lines.append(Line(w.name, w.op, w.shape, "", {}, before[w.name], w.nbytes, 0.0, None, reason))
            continue
        stored = arrays_of[w.name]
        after = sum(
            a.nbytes for role, a in stored.arrays.items() if stored.shared.get(role, w.name) == w.name
        )
        sizes = before[w.name], after
        lines.append(
            Line(w.name, w.op, w.shape, c.method, c.params, *sizes, stored.error, c.damage, c.reason)
        )
    lines += [Line(k.weight, "", (), "", {}, k.nbytes, k.nbytes, 0.0, None, k.reason) for k in found.kept]
    return tuple(lines)


def file_of(model: Model) -> File:
    """Say where a model came from, its digest and its size."""
    return File(None if model.path is None else str(model.path), model.sha256, model.nbytes)


def versions() -> dict[str, str]:
    """Say which releases did the work."""
    names = ("onnxdp", "onnx", "onnx-ir", "numpy")
    return {n: metadata.version(n) for n in names} | {"onnxruntime": runtime.onnxruntime().__version__}
