"""Build the wheel and compare what is in it with the tree; finds what pyproject.toml forgot.

The wheel is built from a copy, so that no build/ of an earlier day gets into it. Exit 1 where they differ.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from common import ROOT


def expected() -> set[str]:
    """Return the files that the tree says belong into the wheel."""
    files = {
        p.relative_to(ROOT).as_posix() for kind in ("*.py", "*/*.py") for p in ROOT.glob(f"onnxdp/{kind}")
    }
    return files | {"onnxdp/py.typed"}


def build(folder: Path) -> Path:
    """Build the wheel from a clean copy of what it is made of."""
    copy = folder / "copy"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "onnxdp", copy / "onnxdp", symlinks=True, ignore=ignore)
    shutil.copytree(ROOT / "passes", copy / "passes", ignore=ignore)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(copy)],
        check=True,
        stdin=subprocess.DEVNULL,
    )
    return next(folder.glob("*.whl"))


def main() -> int:
    """Compare, and say what differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="wheel-") as folder:
        wheel = build(Path(folder))
        with zipfile.ZipFile(wheel) as archive:
            names = set(archive.namelist())
        size = wheel.stat().st_size
    found = {n for n in names if ".dist-info/" not in n}
    missing, extra = sorted(expected() - found), sorted(found - expected())
    if not any(n.endswith("/LICENSE") for n in names):
        missing.append("LICENSE")
    for name in missing:
        print(f"missing from the wheel: {name}", file=sys.stderr)
    for name in extra:
        print(f"in the wheel, not in the tree: {name}", file=sys.stderr)
    verdict = "NOT as the tree" if missing or extra else "as the tree"
    print(f"{wheel.name}: {len(found)} files, {size:,} bytes, {verdict}")
    return 1 if missing or extra else 0


if __name__ == "__main__":
    sys.exit(main())
