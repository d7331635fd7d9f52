"""Sweeps: what each ratio gives is what it gives alone, from one analysis, in whatever order."""

import hashlib
import json
from pathlib import Path

import pytest

import onnxdp
from onnxdp import records, show, stats
from onnxdp.errors import TargetError, UsageError
from onnxdp.meter import Meter

DIGITS = Path(__file__).parents[1] / "models" / "digits.onnx"
RATIOS = (16.0, 3.0, 1000.0)  # of 2, 5 and what is left to each number: all three kinds of scan
FEW = {"samples": 32, "prune": False}
"""Where channels go, there is an analysis for each set of them; test_pruning.py sweeps so."""


@pytest.fixture(scope="module")
def counts():
    """Tell what the module's sweep gathered, which meters it made and what they measured."""
    return {"gathered": [], "meters": [], "measured": []}


@pytest.fixture(scope="module")
def swept(counts):
    gather, meter, alone = stats.gather, Meter.__init__, Meter.alone

    def gathered(stream, found, members, *rest, **options):
        counts["gathered"].append({w.name for w in members})
        return gather(stream, found, members, *rest, **options)

    def measured(self, weight, changes):
        counts["measured"].append((weight, changes[weight].tobytes()))
        return alone(self, weight, changes)

    heard = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stats, "gather", gathered)
        patch.setattr(Meter, "__init__", lambda *a: counts["meters"].append(a) or meter(*a))
        patch.setattr(Meter, "alone", measured)
        found = onnxdp.sweep(DIGITS, RATIOS, progress=lambda *a: heard.append(a), **FEW)
    assert {f"{r:g}x: refitting weights" for r in RATIOS if r < 100} < {stage for stage, *_ in heard}
    return found


def alone(tmp_path, ratio, **settings):
    out = tmp_path / "digits.onnx"
    report = onnxdp.compress(DIGITS, out, ratio=ratio, overwrite=True, **settings).report
    assert hashlib.sha256(out.read_bytes()).hexdigest() == report.target.sha256
    return report


@pytest.mark.parametrize("ratio", [r for r in RATIOS if r < 100])
def test_a_ratio_gives_the_file_that_compress_writes(ratio, swept, tmp_path):
    report = alone(tmp_path, ratio, **FEW)
    (point,) = (p for p in swept.points if p.asked == ratio)
    assert (point.nbytes, point.sha256) == (report.target.nbytes, report.target.sha256)
    assert point.ratio == report.ratio and point.error == report.verification.error
    assert point.damage == sum(c.damage or 0.0 for c in report.plan.choices)
    assert point.nbytes <= point.budget and point.reason is None


def test_what_is_out_of_reach_says_so_as_compress_does(swept):
    point = swept.points[RATIOS.index(1000.0)]
    with pytest.raises(TargetError) as refusal:
        onnxdp.plan(DIGITS, ratio=1000, **FEW)
    assert point.reason == refusal.value.message and "best reachable" in point.reason
    assert (point.nbytes, point.sha256, point.ratio, point.damage, point.error) == (None,) * 5


def test_the_order_of_ratios_changes_nothing(swept):
    turned = onnxdp.sweep(DIGITS, RATIOS[::-1], **FEW)
    what = [(p.asked, p.sha256, p.damage, p.error, p.reason) for p in swept.points]
    assert [(p.asked, p.sha256, p.damage, p.error, p.reason) for p in turned.points] == what[::-1]


def test_dictionary_pairs_sweep_as_they_compress(tmp_path):
    swept = onnxdp.sweep(DIGITS, (5.0, 3.0), method="dp", **FEW)
    for point in swept.points:
        assert point.sha256 == alone(tmp_path, point.asked, method="dp", **FEW).target.sha256


def test_the_model_is_gathered_and_measured_once(swept, counts):
    assert len([names for names in counts["gathered"] if len(names) > 1]) == 1
    assert len(counts["meters"]) == 1
    assert counts["measured"] and len(counts["measured"]) == len(set(counts["measured"]))


def test_the_answer_is_versioned_json_and_finite_errors_fall_with_bytes(swept):
    plain = json.loads(show.as_json(swept))
    assert plain["schema"] == records.SCHEMA and len(plain["points"]) == len(RATIOS)
    assert plain["settings"]["samples"] == 32 and plain["seconds"]["total"] > 0
    reached = sorted((p.nbytes, -p.error) for p in swept.points if p.nbytes)
    assert [e for _, e in reached] == sorted(e for _, e in reached)


@pytest.mark.parametrize(
    ("ratios", "settings", "sentence"),
    [
        ((), {}, "names no ratio"),
        ((2, 2.0), {}, "names 2 twice"),
        ((0.5,), {}, "must be above 1"),
        ((2,), {"size": "30%"}, "leave size out"),
        ((2,), {"max_error": 0.1}, "leave max_error out"),
        ((2,), {"ratio": 3}, "leave ratio out"),
    ],
)
def test_what_has_no_meaning_is_refused(ratios, settings, sentence):
    with pytest.raises(UsageError, match=sentence):
        onnxdp.sweep(DIGITS, ratios, **settings)
