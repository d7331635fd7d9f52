"""Tables, duels and the picture of frontier.py: functions of measured cells, which nothing here measures.

A cell is a dictionary: model, method, label, ours, and either ``failed`` (why, in a few words) or bytes,
ratio, seconds, peak and judged (by set of pictures: n, lost, lost_se, agreement, logit_error, right); bench
holds latency and load where the file was run, counted says that its bytes were counted instead of written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import markdown
from judge import unpack

Cell = dict[str, Any]
LOSSES = (-1, -0.5, 0, 0.5, 1, 2, 5, 10, 20, 50, 100)
ABOVE = 8
"""Ratio from which ours has to be above every rival, and not only not below."""


@dataclass(frozen=True)
class Duel:
    """Ours against a rival on the same pictures; ``behind`` and its standard error in points of top-1."""

    model: str
    pictures: str
    ours: str
    rival: str
    ratio: float
    behind: float
    error: float

    @property
    def below(self) -> bool:
        """Whether ours is below by more than the standard error of the paired difference."""
        return self.behind > self.error + 1e-9

    @property
    def verdict(self) -> str:
        """Say how it ended; from ABOVE on a draw is not enough."""
        if self.below:
            return "below"
        return "not above" if self.ratio >= ABOVE and self.behind >= 0 else ""


def measured(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells that have figures."""
    return [c for c in cells if "failed" not in c]


def compared(ours: Cell, rival: Cell, pictures: str) -> Duel:
    """Compare two files picture by picture."""
    a, b = ours["judged"][pictures], rival["judged"][pictures]
    apart = unpack(b["right"], b["n"]).astype(float) - unpack(a["right"], a["n"])
    error = 100 * apart.std() / math.sqrt(len(apart))
    labels = (ours["label"], rival["label"])
    return Duel(ours["model"], pictures, *labels, ours["ratio"], 100 * float(apart.mean()), float(error))


def duels(cells: Sequence[Cell]) -> Iterator[Duel]:
    """Yield the comparisons that ours must not lose.

    Every file of ours against each rival of equal or fewer bytes; and against each rival the largest file of
    ours that has fewer bytes, where the two are within 5 % of each other: equal bytes, seen from below.
    """
    good = measured(cells)
    for method in dict.fromkeys((c["model"], c["method"]) for c in good if c["ours"]):
        ours = [c for c in good if (c["model"], c["method"]) == method]
        for rival in (c for c in good if c["model"] == method[0] and not c["ours"]):
            near = [o for o in ours if 0.95 * rival["bytes"] <= o["bytes"] < rival["bytes"]]
            facing = [o for o in ours if o["bytes"] >= rival["bytes"]]
            for o in [*facing, *sorted(near, key=lambda c: c["bytes"])[-1:]]:
                for pictures in o["judged"]:
                    if pictures in rival["judged"]:
                        yield compared(o, rival, pictures)


def loss(cell: Cell, pictures: str) -> str:
    """Format what a file lost."""
    found = cell["judged"].get(pictures)
    return f"{found['lost']:.2f} ± {found['lost_se']:.2f}" if found else ""


def pictures_of(cells: Sequence[Cell]) -> list[str]:
    """Return the sets that any cell was judged on."""
    return list(dict.fromkeys(p for c in measured(cells) for p in c["judged"]))


def every(cells: Sequence[Cell]) -> str:
    """Return the table of one model that has everything, by falling bytes."""
    sets = pictures_of(cells)
    rows = []
    for c in sorted(measured(cells), key=lambda c: -c["bytes"]):
        judged = [c["judged"].get(p, {}) for p in sets]
        bench = c.get("bench") or {}
        rows.append(
            [
                f"**{c['label']}**" if c["ours"] else c["label"],
                f"{c['bytes']:,}" + (" †" if c.get("counted") else ""),
                f"{c['ratio']:.2f}",
                *(loss(c, p) for p in sets),
                " / ".join(f"{j['agreement']:.1f}" for j in judged if j),
                " / ".join(f"{j['logit_error']:.3f}" for j in judged if j),
                *(f"{bench[k]:.2f}" if k in bench else "" for k in ("latency_ratio", "load_ratio")),
                f"{c['seconds']:.1f}",
                f"{c['peak'] / 1e6:.0f}",
            ]
        )
    rows += [[c["label"], c["failed"], *[""] * (len(sets) + 7)] for c in cells if "failed" in c]
    headers = ["method", "bytes", "ratio", *(f"lost, {p.split('_')[-1]}" for p in sets)]
    return markdown([*headers, "agree, %", "logit error", "latency ×", "load ×", "s", "peak, MB"], rows)


def best(cells: Sequence[Cell], budget: float, pictures: str) -> Cell | None:
    """Return what lost least within the bytes."""
    fitting = [c for c in measured(cells) if c["bytes"] <= budget and pictures in c["judged"]]
    return min(fitting, key=lambda c: (c["judged"][pictures]["lost"], c["bytes"]), default=None)


def equal(cells: Sequence[Cell], ratios: Sequence[float], pictures: str) -> str:
    """Return the table of one model on one set at equal bytes: each method's best that fits, by ratio."""
    whole = cells[0]["original"]
    rows = []
    for method in sorted(dict.fromkeys(c["method"] for c in cells), key=lambda m: m.startswith("onnxdp")):
        mine = [c for c in cells if c["method"] == method]
        found = [best(mine, whole / r, pictures) for r in ratios]
        if not any(found):
            continue
        # A file that fits at 8x fits at 4x, too; it is shown again only where nothing larger was made.
        shown = [
            f"{loss(c, pictures)}" + (f" ({c['ratio']:.1f}x)" if c["ratio"] > 1.1 * r else "") if c else ""
            for c, r in zip(found, ratios, strict=True)
        ]
        rows.append([f"**{method}**" if mine[0]["ours"] else method, *shown])
    return markdown([f"lost on {pictures}, at most", *(f"1/{r:g}" for r in ratios)], rows)


def verdicts(cells: Sequence[Cell]) -> str:
    """Return the table of the comparisons that ours lost, after a sentence that counts them."""
    fought = list(duels(cells))
    lost = [d for d in fought if d.verdict]
    head = (
        f"{len(fought)} comparisons of ours with a rival of at most its bytes (or at most 5 % more): below "
        f"by more than the standard error in {sum(d.below for d in lost)}, not above from {ABOVE}x on "
        f"in {sum(not d.below for d in lost)} more."
    )
    rows = [
        [d.model, d.pictures, d.ours, d.rival, f"{d.behind:.2f} ± {d.error:.2f}", d.verdict]
        for d in sorted(lost, key=lambda d: d.behind, reverse=True)
    ]
    table = markdown(["model", "pictures", "ours", "rival", "points behind", "verdict"], rows)
    return f"{head}\n\n{table}" if rows else head


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Draw what is lost over the ratio, one panel for each model and set."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    good = measured(cells)
    panels = list(dict.fromkeys((c["model"], p) for c in good for p in c["judged"]))
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(6.4 * columns, 4.6 * lines), squeeze=False)
    styles = _styles(good)
    for (model, pictures), ax in zip(panels, axes.flat, strict=False):
        mine = [c for c in good if c["model"] == model and pictures in c["judged"]]
        for method, style in styles.items():
            points = sorted((c for c in mine if c["method"] == method), key=lambda c: c["ratio"])
            if not points:
                continue
            lost = [c["judged"][pictures] for c in points]
            ax.errorbar(
                [c["ratio"] for c in points],
                [j["lost"] for j in lost],
                [j["lost_se"] for j in lost],
                label=method,
                **style,
            )
        ax.set(
            xscale="log", title=f"{model} on {pictures}", xlabel="times smaller", ylabel="top-1 lost, points"
        )
        ax.set_yscale("symlog", linthresh=1)
        ticks = [
            t for t in (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32) if t <= 1.1 * max(c["ratio"] for c in mine)
        ]
        ax.set_xticks(ticks, [str(t) for t in ticks])
        ax.set_yticks(LOSSES, [str(t) for t in LOSSES])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    for ax in list(axes.flat)[len(panels) :]:
        ax.remove()
    handles = dict(zip(*reversed(axes.flat[0].get_legend_handles_labels()), strict=True)) if panels else {}
    for ax in list(axes.flat)[: len(panels)]:
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    figure.legend(list(handles.values()), list(handles), loc="lower center", ncols=4, frameon=False)
    rows = math.ceil(len(handles) / 4)
    figure.tight_layout(rect=(0, 0.24 * rows / (4.6 * lines) + 0.01, 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _styles(cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
    """Give each method its look, the same in every panel: ours in thick lines, rivals in thin ones."""
    ours = list(dict.fromkeys(c["method"] for c in cells if c["ours"]))
    rivals = list(dict.fromkeys(c["method"] for c in cells if not c["ours"]))
    marks = "osv^<>DPX*hpdH"
    looks = {
        method: {"color": f"C{i % 10}", "marker": marks[i % len(marks)], "lw": 1, "ms": 5, "alpha": 0.7}
        for i, method in enumerate(rivals)
    }
    colours = ("black", "crimson", "navy", "darkgreen")
    return looks | {
        method: {"color": colours[i % 4], "marker": "o", "lw": 2.5, "ms": 6, "zorder": 5}
        for i, method in enumerate(ours)
    }
