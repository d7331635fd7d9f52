"""Pictures of answers, drawn without a display."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxdp.errors import SetupError, UsageError

if TYPE_CHECKING:
    from onnxdp.findings import Frontier

FORMATS = (".png", ".svg", ".pdf")


def require(path: Path | None) -> None:
    """Refuse, before any work, a picture that could not be drawn afterwards.

    Raises
    ------
    UsageError
        The file's name has another ending.
    SetupError
        Matplotlib is missing.
    """
    if path is None:
        return
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"--plot draws {', '.join(FORMATS)}, not {path.name}; give such a name.")
    _figure()


def frontier(found: Frontier, path: Path) -> bytes:
    """Draw output error over bytes; returns the picture in the format of the path's ending."""
    reached = sorted((p.nbytes, p.ratio, p.error) for p in found.points if p.nbytes and p.ratio and p.error)
    figure = _figure()(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.loglog([n for n, _, _ in reached], [e for _, _, e in reached], "o-")
    for nbytes, ratio, error in reached:
        axes.annotate(f"{ratio:.3g}x", (nbytes, error), textcoords="offset points", xytext=(6, 6))
    if reached:
        axes.set_xticks([n for n, _, _ in reached], [_kilobytes(n) for n, _, _ in reached], rotation=45)
        axes.set_yticks([e for _, _, e in reached], [f"{e:.2g}" for _, _, e in reached])
    axes.margins(0.12)
    axes.minorticks_off()
    axes.set_xlabel("bytes of the file")
    axes.set_ylabel("output error on held-out probes")
    if found.source.path:
        axes.set_title(Path(found.source.path).name.replace("$", "\\$"))
    axes.grid(alpha=0.3)
    kept = io.BytesIO()
    figure.savefig(kept, format=path.suffix.lower()[1:], dpi=150)
    return kept.getvalue()


def _kilobytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:.3g} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:.3g} kB"


def _figure() -> Any:
    """Import Matplotlib's figure, which needs no window."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise SetupError(
            "Matplotlib is needed for --plot and is not installed; "
            "install it with: pip install 'onnxdp[plots]'."
        ) from e
    return Figure
