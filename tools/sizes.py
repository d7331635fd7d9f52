"""Print the lines of every room, and who is asking for a second door (more than 400 lines).

python tools/sizes.py --tests
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from common import ROOT, markdown

FULL = 400


def lines(path: Path) -> tuple[int, int]:
    """Return all lines, and those that are neither empty nor a comment."""
    text = path.read_text(encoding="utf-8").splitlines()
    return len(text), sum(1 for line in text if line.strip() and not line.strip().startswith("#"))


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tests", action="store_true", help="count tests, tools and models, too")
    asked = parser.parse_args()
    folders = ["onnxdp", "onnxdp/methods", "passes", *(["tests", "tools", "models"] if asked.tests else [])]
    rows = []
    for folder in folders:
        for path in sorted((ROOT / folder).glob("*.py")):
            total, code = lines(path)
            rows.append((path.relative_to(ROOT).as_posix(), total, code))
    rows.sort(key=lambda r: -r[1])
    print(markdown(["room", "lines", "filled", ""], [(*r, "full" if r[1] > FULL else "") for r in rows]))
    print(
        f"\n{len(rows)} files, {sum(r[1] for r in rows):,} lines, {sum(r[2] for r in rows):,} of them filled"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
