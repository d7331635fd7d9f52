"""Write those parts of README.md that follow from the sources: commands, options and the map of the house.

Run it after changing a help text, a room's first line or the import contract; a test runs it with --check.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

from common import ROOT

README = ROOT / "README.md"
FOLDERS = {
    "tests": "one file a room, laws, golden outputs; looks for data too large to commit in ../shared",
    "models": "the digits classifier and what trained it, builders of large networks; see models/README.md",
    ".ci": "what has to hold before a change lands, and with which versions",
}


def cell(text: str) -> str:
    """Escape what would end a cell."""
    return " ".join(text.split()).replace("|", "\\|")


def commands() -> str:
    """Return the table of commands."""
    from onnxdp.cli import main

    rows = []
    group = main.make_context("onnxdp", [], resilient_parsing=True)
    for name, command in main.commands.items():
        words = [
            p.make_metavar(command.make_context(name, [], parent=group, resilient_parsing=True))
            for p in command.params
            if p.param_type_name == "argument"
        ]
        rows.append(f"| `onnxdp {' '.join([name, *words])}` | {cell((command.help or '').splitlines()[0])} |")
    return "\n".join(["| command | what it does |", "|---|---|", *rows])


def options() -> str:
    """Return the table of settings, which are options on the command line and keywords in Python."""
    from onnxdp.settings import Settings

    rows = []
    for setting in dataclasses.fields(Settings):
        flag = "--" + setting.name.replace("_", "-")
        both = f"{flag}` / `--no-{flag[2:]}" if str(setting.type) == "bool | None" else flag
        default = "" if setting.default in (None, (), False) else f"`{setting.default}`"
        rows.append(f"| `{both}` | {cell(str(setting.metadata['help']))} | {default} |")
    return "\n".join(["| option | | default |", "|---|---|---|", *rows])


def first_line(path: Path) -> str:
    """Return the first line of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    line = text.splitlines()[0] if text else ""
    return re.sub(r":\w+:`", "`", line.replace("``", "`"))


def rooms(package: str, folder: Path, layers: Iterable[str]) -> Iterable[Path]:
    """Yield the modules of a package in the order of its import layers, then those that have no layer."""
    named = [name.strip() for layer in layers for name in layer.replace(":", "|").split("|")]
    paths = sorted(folder.glob("*.py"), key=lambda p: named.index(p.stem) if p.stem in named else -1)
    yield from paths


def house() -> str:
    """Return the map: every room with the first line of its docstring, in the order of the import layers."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = {c["containers"][0]: c["layers"] for c in contracts if c["type"] == "layers"}
    rows = []
    places = [(f"onnxdp.{n}", f"onnxdp/{n}") for n in ("cli", "methods")]
    places = [("onnxdp", "onnxdp"), *places, ("onnxdp.passes", "passes")]
    for package, folder in places:
        rows += list(rooms(package, ROOT / folder, layers[package]))
    rows += sorted((ROOT / "tools").glob("*.py"))
    lines = [f"| `{p.relative_to(ROOT).as_posix()}` | {cell(first_line(p))} |" for p in rows]
    lines += [f"| `{name}/` | {what} |" for name, what in FOLDERS.items()]
    return "\n".join(["| room | its one job |", "|---|---|", *lines])


PARTS = {"commands": commands, "options": options, "house": house}


def renewed(text: str) -> str:
    """Return the README with its generated parts made anew."""
    for name, make in PARTS.items():
        begin, end = f"<!-- generated: {name} -->", "<!-- end -->"
        head, rest = text.split(begin, 1)
        text = f"{head}{begin}\n{make()}\n{end}{rest.split(end, 1)[1]}"
    return text


def main() -> int:
    """Write the README, or say whether it is as it should be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where it would change")
    asked = parser.parse_args()
    old = README.read_text(encoding="utf-8")
    new = renewed(old)
    if asked.check:
        if new != old:
            print("README.md does not follow the sources; run: python tools/readme.py", file=sys.stderr)
        return int(new != old)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
