"""Everything that frontier.py compares, as jobs: what decides the outcome, and how the file is made."""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accuracy
import judge
import numpy as np
import onnx
import plain
from common import ROOT, Ran, commit, onnxdp, run, sha256, shared
from rivals import PLAIN, PLAINS, ROUNDINGS, TOOLS, Rival, python_of

RATIOS = (2.0, 4.0, 8.0, 10.0, 12.0, 16.0, 20.0, 24.0)
RECIPE_RATIOS = (2.0, 4.0, 8.0)
PICTURES = 64
"""Unlabelled pictures for whoever calibrates."""

Make = Callable[[Path, Path], dict[str, Any]]


@dataclass(frozen=True)
class Job:
    """One cell to fill: what it is called, all that decides it, and how its file is made."""

    method: str
    label: str
    key: tuple[Any, ...]
    make: Make
    ours: bool = False


def figures(ran: Ran) -> dict[str, Any]:
    """Return what a process took, or why it failed."""
    if ran.code:
        return {"failed": short(ran.sentence) or f"exit {ran.code}"}
    return {"seconds": ran.seconds, "peak": ran.peak}


def short(sentence: str) -> str:
    """Cut an error message to a few words that a table can hold."""
    plain_words = re.sub(r"\S*/(\S+)", r"\1", sentence).replace("|", "/")
    return plain_words if len(plain_words) <= 140 else plain_words[:137] + "..."


def digest(*parts: Any) -> str:
    """Return a sum of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@functools.cache
def pictures(stem: str, folder: Path) -> Path:
    """Return the prepared calibration pictures of a model as .npy, and beside it as .npz by input name."""
    path = folder / f"{stem}.npy"
    folder.mkdir(parents=True, exist_ok=True)
    x = judge.calibration(stem, PICTURES)
    np.save(path, x)
    model = onnx.load(str(shared() / "data" / "models" / f"{stem}.onnx"))
    np.savez(path.with_suffix(".npz"), **{model.graph.input[0].name: x})
    return path


def tools(asked: argparse.Namespace) -> Iterator[Job]:
    """Yield what people can install."""

    def make(rival: Rival, source: Path, out: Path) -> dict[str, Any]:
        python = python_of(rival.environment, asked.venvs)
        calibrating = pictures(source.stem, asked.cache / "pictures") if rival.calibrates else None
        return figures(run(rival.command(python, source, out, calibrating)))

    for rival in TOOLS:
        key = (rival.program, rival.requirements, rival.options)
        yield Job(rival.name, rival.name, key, functools.partial(make, rival))


def plains(model: Path) -> Iterator[Job]:
    """Yield the baselines of plain.py; of rounding, for each ratio, the most levels that fit."""

    def make(options: Sequence[str], source: Path, out: Path) -> dict[str, Any]:
        method, *rest = options
        told = figures(run([sys.executable, PLAIN, method, source, out, *rest]))
        count = {"rounding": plain.rounding_bytes, "tables": plain.table_bytes}.get(method)
        if count:
            told |= {"bytes": count(onnx.load(str(source)), int(rest[1])), "counted": True}
        return told

    programs = [PLAIN, ROOT / "onnxdp" / "methods" / "packing.py"]
    levels = [*(plain.most_levels(model, int(model.stat().st_size / r)) for r in RATIOS), 16]
    wanted = {name: (re.sub(r" \d+$", "", name), options) for name, options in PLAINS.items()}
    for title, scale in ROUNDINGS.items():
        for n in sorted({n for n in levels if n}, reverse=True):
            wanted[f"{title}, {n} levels"] = (title, ("rounding", "--levels", str(n), "--scale", scale))
    for label, (method, options) in wanted.items():
        yield Job(method, label, (*map(sha256, programs), options), functools.partial(make, options))


def recipe(model: Path) -> Iterator[Job]:
    """Yield the published dictionary pairs with the most atoms that fit, and no more."""
    options = accuracy.METHODS["recipe"]
    programs = [ROOT / "onnxdp" / "methods" / f"{n}.py" for n in ("dictionary", "solvers", "linear")]

    def make(ratio: float, source: Path, out: Path) -> dict[str, Any]:
        words = shlex.split(options)
        atoms = accuracy.most_atoms(source, int(source.stat().st_size / ratio), words)
        if atoms is None:
            return {"failed": "out of reach: one atom is too many"}
        ran = onnxdp("compress", source, out, *words, "--atoms", str(atoms), "--overwrite", "--json")
        return figures(ran) | {"atoms": atoms}

    for ratio in RECIPE_RATIOS:
        key = ([sha256(p) for p in programs], options, ratio)
        yield Job("published recipe", f"published recipe {ratio:g}x", key, functools.partial(make, ratio))


@functools.cache
def package() -> str:
    """Return a sum of the package's sources as they lie there now."""
    found = [*ROOT.glob("onnxdp/*.py"), *ROOT.glob("onnxdp/methods/*.py"), *ROOT.glob("passes/*.py")]
    return digest([(p.relative_to(ROOT).as_posix(), sha256(p)) for p in sorted(found)])


@functools.cache
def understood() -> str:
    """Return what `onnxdp compress --help` says."""
    return onnxdp("compress", "--help").out


def ours(model: Path, asked: argparse.Namespace) -> Iterator[Job]:
    """Yield this checkout, data-free and with pictures, at every ratio."""
    before = package()

    def make(
        options: Sequence[str], ratio: float, calibrated: bool, source: Path, out: Path
    ) -> dict[str, Any]:
        words = [*options, "--ratio", f"{ratio:g}"]
        if calibrated:
            words += ["--calibrate", str(pictures(source.stem, asked.cache / "pictures").with_suffix(".npz"))]
        ran = onnxdp("compress", source, out, *words, "--overwrite", "--json")
        package.cache_clear()
        if package() != before:  # nobody knows what was measured
            return {"failed": "the package changed meanwhile", "forget": True}
        return figures(ran) | {"commit": commit()}

    variants = {"onnxdp": ""} | dict(v.split("=", 1) for v in asked.variant)
    for name, text in variants.items():
        for calibrated in (False, True):
            if calibrated and ("--calibrate" not in understood() or name != "onnxdp"):
                continue
            options = shlex.split(text)
            title = name if name == "onnxdp" else f"onnxdp {name}"
            title += f", {PICTURES} pictures" if calibrated else ""
            for ratio in asked.ratios:
                what = (options, ratio, calibrated)
                making = functools.partial(make, *what)
                yield Job(title, f"{title}, {ratio:g}x", (before, *what), making, ours=True)


def jobs(model: Path, asked: argparse.Namespace) -> list[Job]:
    """Return the cells of a model that were asked for."""
    found = [*tools(asked), *plains(model), *recipe(model), *ours(model, asked)]
    return [
        j
        for j in found
        if (not asked.only or any(o in j.label for o in asked.only))
        and not any(s in j.label for s in asked.skip)
    ]
