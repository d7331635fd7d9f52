"""What one run learned of a model, kept in a file: a further target then costs no more than its own encoding.

The file is an ``.npz`` without pickle: arrays by number, and a JSON text that says what they are. A target
gives the same bytes with it as without.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from onnxdp import archives, files
from onnxdp.encoding import Solutions
from onnxdp.errors import UsageError
from onnxdp.looks import Aims, Kept, Seen
from onnxdp.plain import to_plain
from onnxdp.probes import Probes
from onnxdp.pruning import Dropped, Fit
from onnxdp.records import Array, Encoded, Named, named
from onnxdp.result import versions
from onnxdp.settings import TARGETS, Settings
from onnxdp.thinning import Effect

BITS = (16.0, 4.5, 4.0, 3.5, 3.0, 2.5, 2.0, 1.5, 1.0)
"""Bits a number for which weights are solved ahead, so that a later target finds what it tries ..."""
MEASURED = (16.0, 4.0, 2.0)
"""... and for which damage is measured ahead: the numbers of levels that are tried at all."""

_FREE = (*TARGETS, "macs", "short_names", "prune", "device", "analysis", "save_analysis")
"""Settings that may differ from those of the analysis: they ask for something, or change what follows it."""
_SCHEMA = 4


@dataclass(frozen=True, slots=True)
class Analysis:
    """What is known of a model before any target is.

    Attributes
    ----------
    sha256 : str
        Of the model.
    settings : mapping of str to Any
        Those that decide the analysis, as plain values.
    fit, held_out : Probes
    positions : mapping of str to int
        Output positions of one sample that each weight multiplies.
    dead : mapping of str to sequence of int, or None
        Channels without which nothing changes; None where nobody looked.
    effect : Effect or None
        What taking channels out did, where some went: what follows is of the network without them.
    solved : Solutions
    damages : mapping
        Of single candidates, measured on ``held_out``.
    kept : mapping of str to Seen or Aims
        What weights put out on ``fit``, or see there.
    """

    sha256: str
    settings: Mapping[str, Any]
    fit: Probes
    held_out: Probes
    positions: Mapping[str, int]
    dead: Dropped | None
    effect: Effect | None
    solved: Solutions
    damages: Mapping[Named, float]
    kept: Mapping[str, Kept]

    def check(self, sha256: str, settings: Settings) -> None:
        """Refuse an analysis of another model, or one made with other options.

        Raises
        ------
        UsageError
            It is one of these.
        """
        path, again = settings.analysis, "make another with --save-analysis"
        if self.sha256 != sha256:
            raise UsageError(f"{path} is the analysis of another model (its sha256 differs); {again}.")
        for name, value in deciding(settings).items():
            if self.settings.get(name) != value:
                raise UsageError(
                    f"{path} was made with another --{name.replace('_', '-')} "
                    f"({self.settings.get(name)!r}, now {value!r}); give the same, or {again}."
                )

    def is_of(self, dropped: Dropped) -> bool:
        """Whether what was solved and measured is of the network without these channels."""
        return dropped == ({} if self.effect is None else self.effect.fit.dropped)

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        held: dict[str, Array] = {}

        def keep(array: Array) -> int:
            held[f"array{len(held)}"] = array
            return len(held) - 1

        effect = None
        if self.effect is not None:
            fit = self.effect.fit
            effect = {
                "dropped": to_plain(fit.dropped),
                "loss": fit.loss,
                "tensors": {n: keep(a) for n, a in fit.tensors.items()},
                "shifts": {n: keep(a) for n, a in fit.shifts.items()},
                "damage": self.effect.damage,
                "error": self.effect.error,
            }
        header = {
            "schema": _SCHEMA,
            "onnxdp": versions()["onnxdp"],
            "sha256": self.sha256,
            "settings": dict(self.settings),
            "fit": _plain_probes(self.fit, keep),
            "held_out": _plain_probes(self.held_out, keep),
            "positions": dict(self.positions),
            "dead": None if self.dead is None else to_plain(self.dead),
            "effect": effect,
            "means": {n: keep(a) for n, a in self.solved.means.items()},
            "made": [
                [form, e.weight, dict(e.params), e.error, {n: keep(a) for n, a in e.arrays.items()}]
                for (form, _), some in self.solved.made.items()
                for e in some
            ],
            "damages": [[w, m, dict(params), d] for (w, m, params), d in self.damages.items()],
            "kept": {
                n: [isinstance(k, Seen), keep(k.rows), keep(k.mean), keep(k.mean_beside)]
                for n, k in self.kept.items()
            },
        }
        held["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
        with files.writing(path) as file:
            np.savez(file, allow_pickle=False, **held)

    @classmethod
    def read(cls, path: Path) -> Analysis:
        """Read a file that :meth:`write` wrote.

        Raises
        ------
        UsageError
            It is no such file, or another version's.
        """
        held = archives.read(path, "make one with --save-analysis")
        try:
            header = json.loads(bytes(held["header"]))
            made_by = header["schema"], header["onnxdp"]
            if made_by != (_SCHEMA, versions()["onnxdp"]):
                raise UsageError(
                    f"{path} is an analysis of onnxdp {made_by[1]} (schema {made_by[0]}); "
                    "make it again with --save-analysis."
                )
            return cls._built(header, lambda number: held[f"array{int(number)}"])
        except (KeyError, ValueError, TypeError, AttributeError) as e:
            raise UsageError(
                f"{path} is no analysis that onnxdp wrote ({type(e).__name__}: {e}); "
                "make one with --save-analysis."
            ) from e

    @classmethod
    def _built(cls, header: Mapping[str, Any], get: Any) -> Analysis:
        effect = None
        if (told := header["effect"]) is not None:
            fit = Fit(
                {n: tuple(map(int, c)) for n, c in told["dropped"].items()},
                float(told["loss"]),
                {n: get(k) for n, k in told["tensors"].items()},
                {n: get(k) for n, k in told["shifts"].items()},
            )
            effect = Effect(fit, float(told["damage"]), float(told["error"]))
        made: dict[tuple[str, str], list[Encoded]] = {}
        for form, weight, params, error, arrays in header["made"]:
            encoded = Encoded(weight, form, params, {n: get(k) for n, k in arrays.items()}, float(error))
            made.setdefault((form, weight), []).append(encoded)
        dead = header["dead"]
        return cls(
            header["sha256"],
            header["settings"],
            _probes(header["fit"], get),
            _probes(header["held_out"], get),
            {n: int(k) for n, k in header["positions"].items()},
            None if dead is None else {n: tuple(map(int, c)) for n, c in dead.items()},
            effect,
            Solutions({n: get(k) for n, k in header["means"].items()}, made),
            {named(w, m, p): float(d) for w, m, p, d in header["damages"]},
            {n: _kept(seen, *map(get, told)) for n, (seen, *told) in header["kept"].items()},
        )


def deciding(settings: Settings) -> dict[str, Any]:
    """Return the settings that decide an analysis, as JSON gives them back."""
    plain = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in _FREE}
    return {n: str(v) if isinstance(v, Path) else to_plain(v) for n, v in plain.items()}


def _plain_probes(probes: Probes, keep: Any) -> dict[str, Any]:
    return {
        "feeds": [{n: keep(x) for n, x in feed.items()} for feed in probes.feeds],
        "samples": probes.samples,
        "seed": probes.seed,
        "source": probes.source,
        "axes": dict(probes.axes),
        "dynamic": probes.dynamic,
        "parts": list(probes.parts),
    }


def _probes(told: Mapping[str, Any], get: Any) -> Probes:
    feeds: Sequence[Mapping[str, Array]] = [
        MappingProxyType({n: get(k) for n, k in feed.items()}) for feed in told["feeds"]
    ]
    inputs = {tuple(sorted((n, x.shape) for n, x in feed.items())) for feed in feeds}
    if len(inputs) != 1 or {n for n, _ in inputs.pop()} != set(told["axes"]):
        raise ValueError("its probe inputs are not of one kind")
    return Probes(
        tuple(feeds),
        int(told["samples"]),
        told["seed"],
        str(told["source"]),
        MappingProxyType(dict(told["axes"])),
        bool(told["dynamic"]),
        tuple(told["parts"]),
    )


def _kept(seen: bool, rows: Array, mean: Array, mean_beside: Array) -> Kept:
    return Seen(rows, mean, None, mean_beside) if seen else Aims(rows, mean, mean_beside)
