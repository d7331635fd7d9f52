"""A kept analysis: the bytes of a run without it, and nothing that it knows is asked again."""

import json

import numpy as np
import pytest
from edges import decaying, parsed, save
from test_sweep import DIGITS

import onnxdp
from onnxdp import looks, preparation, refine, stats
from onnxdp.analysis import Analysis
from onnxdp.errors import PlanError, UsageError

FEW = {"samples": 96}


@pytest.fixture(scope="module", params=[{}, {"method": "dp"}], ids=["quant", "dp"])
def options(request):
    return FEW | request.param


@pytest.fixture(scope="module")
def kept(options, tmp_path_factory):
    """Keep the analysis of a run at 8x."""
    folder = tmp_path_factory.mktemp("analysis")
    ratio = 8 if "method" not in options else 3
    made = onnxdp.compress(
        DIGITS, folder / "out.onnx", ratio=ratio, save_analysis=folder / "known.npz", **options
    )
    return folder / "known.npz", made.report


def refuse_to(monkeypatch, *places):
    for owner, name in places:
        monkeypatch.setattr(owner, name, lambda *a, _name=name, **k: pytest.fail(f"{_name} was asked again"))


def test_keeping_an_analysis_changes_no_byte(kept, options, tmp_path):
    _, report = kept
    plain = onnxdp.compress(DIGITS, tmp_path / "out.onnx", size=str(report.plan.budget), **options).report
    assert plain.target.sha256 == report.target.sha256


@pytest.mark.parametrize(
    ("options", "ratio"),
    [({}, 2.5), ({}, 12), ({"method": "dp"}, 4)],
    indirect=["options"],
    ids=["quant-2.5", "quant-12", "dp-4"],
)
def test_a_target_met_from_an_analysis_gives_the_bytes_that_it_gives_alone(kept, options, ratio, tmp_path):
    alone = onnxdp.compress(DIGITS, tmp_path / "a.onnx", ratio=ratio, **options).report
    again = onnxdp.compress(DIGITS, tmp_path / "b.onnx", ratio=ratio, analysis=kept[0], **options).report
    assert again.target.sha256 == alone.target.sha256
    assert [c.damage for c in again.plan.choices] == [c.damage for c in alone.plan.choices]
    assert again.verification == alone.verification


def test_what_is_known_is_not_asked_again(kept, options, tmp_path, monkeypatch):
    refuse_to(monkeypatch, (preparation, "probed"))
    if "method" not in options:
        refuse_to(monkeypatch, (stats, "gather"))
    onnxdp.plan(DIGITS, ratio=4, analysis=kept[0], **options)


@pytest.mark.parametrize("options", [{}], indirect=True, ids=["quant"])
def test_fitting_again_runs_only_the_compressed_network(kept, options, monkeypatch):
    looked = []
    look = looks.look

    def counted(stream, *rest):
        looked.append(stream)
        return look(stream, *rest)

    for owner in (looks, refine):
        monkeypatch.setattr(owner, "look", counted)
    for known, networks in ((None, 2), (kept[0], 1)):
        looked.clear()
        onnxdp.plan(DIGITS, ratio=4, analysis=known, **options)
        assert len({id(stream) for stream in looked}) == networks


def test_a_sweep_starts_from_an_analysis(kept, options):
    ratios = (2.5, 4.0)
    again, alone = (onnxdp.sweep(DIGITS, ratios, **options, **more) for more in ({"analysis": kept[0]}, {}))
    assert [p.sha256 for p in again.points] == [p.sha256 for p in alone.points]


def test_an_analysis_of_another_model_is_refused(kept, options, tmp_path):
    other = parsed(
        """<ir_version: 8, opset_import: ["" : 17]>
        other (float[N, 64] x) => (float[N, 64] y) { y = MatMul (x, W) }""",
        W=decaying(64, 64, 1),
    )
    with pytest.raises(UsageError, match="analysis of another model"):
        onnxdp.plan(save(other, tmp_path / "other.onnx"), ratio=4, analysis=kept[0], **options)


def several(seed=0):
    """Weights without any order: choices fall so far from what was tried that some are asked about again."""
    rng = np.random.default_rng(seed)
    shapes = {"a": (32, 3, 3, 3), "b": (64, 8, 3, 3), "c": (64, 1, 3, 3), "d": (64, 64, 1, 1), "e": (64, 128)}
    return parsed(
        """<ir_version: 8, opset_import: ["" : 17]>
        several (float[N, 3, 15, 15] x) => (float[N, 128] y) {
          p = Conv (x, a) q = Relu (p) r = Conv <group = 4> (q, b) s = Relu (r)
          t = Conv <group = 64> (s, c) u = Conv (t, d) v = GlobalAveragePool (u) w = Flatten (v)
          y = MatMul (w, e)
        }""",
        **{n: (rng.standard_normal(s) / np.prod(s[1:]) ** 0.5).astype(np.float32) for n, s in shapes.items()},
    )


@pytest.mark.parametrize("ratio", [7, 8, 9, 11])
def test_what_is_asked_about_again_answers_the_same(ratio, tmp_path):
    source, known = save(several(), tmp_path / "several.onnx"), tmp_path / "known.npz"
    made = onnxdp.compress(source, tmp_path / "a.onnx", ratio=ratio, save_analysis=known, samples=128)
    again = onnxdp.compress(source, tmp_path / "b.onnx", ratio=ratio, analysis=known, samples=128)
    assert again.report.target.sha256 == made.report.target.sha256


@pytest.mark.parametrize("other", [{"seed": 1}, {"include": ("Conv",)}, {"refit": False}])
def test_an_analysis_made_with_other_options_is_refused_by_the_option(kept, options, other):
    (name,) = other
    with pytest.raises(UsageError, match=f"--{name}"):
        onnxdp.plan(DIGITS, ratio=4, analysis=kept[0], **options, **other)


def rewritten(path, target, change):
    """Write an analysis with another header or other arrays."""
    with np.load(path, allow_pickle=False) as archive:
        held = dict(archive)
    header = json.loads(bytes(held["header"]))
    change(header, held)
    held["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    np.savez(target, **held)
    return target


def older(header, held):
    header["onnxdp"] = "0.0.1"


def lacking(header, held):
    del header["damages"]


def astray(header, held):
    header["fit"]["feeds"][0] = {n: 10**6 for n in header["fit"]["feeds"][0]}


def text(header, held):
    header["positions"] = "many"


def feedless(header, held):
    header["fit"]["feeds"] = []


def inputless(header, held):
    header["held_out"]["feeds"] = [{} for _ in header["held_out"]["feeds"]]


@pytest.mark.parametrize("change", [older, lacking, astray, text, feedless, inputless])
def test_a_header_edited_by_hand_is_refused(kept, options, change, tmp_path):
    edited = rewritten(kept[0], tmp_path / "edited.npz", change)
    with pytest.raises(UsageError, match="--save-analysis"):
        onnxdp.plan(DIGITS, ratio=4, analysis=edited, **options)


@pytest.mark.parametrize("options", [{}], indirect=True, ids=["quant"])
def test_arrays_that_fit_no_weight_are_refused(kept, options, tmp_path):
    def shortened(header, held):
        arrays = header["made"][0][4]
        number = arrays.get("words", arrays.get("words0"))
        held[f"array{number}"] = held[f"array{number}"][:-1]

    def spelled(header, held):
        number = header["made"][0][4]["scale"]
        held[f"array{number}"] = np.full(held[f"array{number}"].shape, "step")

    def unheard(header, held):
        header["made"][0][2] = {"levels": 1000}

    def few(header, held):
        for _, number, *_ in header["kept"].values():
            held[f"array{number}"] = held[f"array{number}"][:, :-1]

    def whole(header, held):
        for _, number, *_ in header["kept"].values():
            held[f"array{number}"] = held[f"array{number}"].astype(np.int32)

    changes = [(change, UsageError) for change in (shortened, spelled, few, whole)]
    for change, kind in [*changes, (unheard, PlanError)]:
        with pytest.raises(kind):
            edited = rewritten(kept[0], tmp_path / "edited.npz", change)
            onnxdp.plan(DIGITS, ratio=4, analysis=edited, **options)


@pytest.mark.parametrize("content", [b"", b"no archive", "cut"])
def test_what_is_no_analysis_is_refused(kept, options, content, tmp_path):
    path = tmp_path / "bad.npz"
    path.write_bytes(kept[0].read_bytes()[:-100] if content == "cut" else content)
    for bad in (path, tmp_path / "absent.npz"):
        with pytest.raises(UsageError, match=f"{bad}.*--save-analysis"):
            Analysis.read(bad)


def test_channels_that_go_are_remembered(tmp_path):
    options = {"samples": 128, "prune": True}
    path, out = tmp_path / "known.npz", tmp_path / "out.onnx"
    first = onnxdp.compress(DIGITS, out, ratio=12, save_analysis=path, **options).report
    assert first.plan.pruned and Analysis.read(path).effect is not None
    again = onnxdp.compress(DIGITS, out, ratio=12, analysis=path, overwrite=True, **options).report
    assert again.target.sha256 == first.target.sha256
    kept = onnxdp.compress(
        DIGITS, out, ratio=12, analysis=path, overwrite=True, **options | {"prune": False}
    ).report
    alone = onnxdp.compress(DIGITS, tmp_path / "alone.onnx", ratio=12, **options | {"prune": False}).report
    assert kept.target.sha256 == alone.target.sha256
