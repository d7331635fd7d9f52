"""tools/frontier.py and what it is made of: plain baselines, evaluate.py's figures, duels and tables."""

import json
import subprocess
import sys
from pathlib import Path

import contenders
import frontier
import judge
import numpy as np
import onnx
import plain
import pytest
import standings
from common import Ran
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

TOOLS = Path(__file__).parents[1] / "tools"

ROWS = arrays(np.float32, (3, 20), elements=st.floats(-4, 4, width=16, allow_subnormal=False))


@given(ROWS, st.integers(2, 255), st.sampled_from(["max", "mse"]))
def test_rounding_keeps_to_its_levels_and_comes_near(rows, levels, scale):
    rounded, scales = plain.nearest(rows, levels, scale)
    assert scales == 3
    assert all(len(np.unique(row)) <= levels for row in rounded)
    largest = np.abs(rows).max(axis=1, keepdims=True)
    # Half a step, and what the scale loses as float16 (2^-11 of it, at most (L - 1) / 2 steps from 0).
    bound = largest / (levels - 1) + largest * 2.0**-10 + plain.TINY * levels
    assert scale == "mse" or (np.abs(rows - rounded) <= bound).all()


@given(ROWS, st.integers(2, 64))
def test_least_squares_is_never_further_than_the_largest_value(rows, levels):
    error = {
        s: np.square(rows - plain.nearest(rows, levels, s)[0], dtype=float).sum() for s in ("max", "mse")
    }
    assert error["mse"] <= error["max"] * (1 + 1e-6)  # what is compared is rounded to float32 only afterwards


@given(ROWS, st.sampled_from([4, 8, 16]))
def test_a_table_has_its_entries_and_gives_each_number_the_nearest(rows, entries):
    changed, numbers = plain.table(rows, entries)
    means = np.unique(changed)
    assert numbers == entries and len(means) <= entries
    nearest = np.abs(rows[..., None] - means).min(axis=-1)
    np.testing.assert_allclose(
        np.abs(rows - changed), nearest, atol=2 * np.finfo(np.float32).eps * 8
    )  # differences of at most 8


def network(path, width=64):
    rng = np.random.default_rng(0)
    values = {"w": rng.standard_normal((width, width, 3, 3)), "v": rng.standard_normal((10, width))}
    nodes = [
        onnx.helper.make_node("Conv", ["x", "w"], ["h"], pads=[1, 1, 1, 1]),
        onnx.helper.make_node("GlobalAveragePool", ["h"], ["p"]),
        onnx.helper.make_node("Flatten", ["p"], ["f"]),
        onnx.helper.make_node("Gemm", ["f", "v"], ["y"], transB=1),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "small",
        [onnx.helper.make_tensor_value_info("x", 1, [1, width, 8, 8])],
        [onnx.helper.make_tensor_value_info("y", 1, [1, 10])],
        [onnx.numpy_helper.from_array(v.astype(np.float32), k) for k, v in values.items()],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)]), path)
    return path


@pytest.mark.parametrize("method", [["rounding", "--levels", "4"], ["tables"], ["float16"]])
def test_a_baseline_changes_numbers_and_nothing_else(tmp_path, method):
    source, out = network(tmp_path / "in.onnx"), tmp_path / "out.onnx"
    command = [sys.executable, TOOLS / "plain.py", method[0], source, out, *method[1:]]
    subprocess.run(command, check=True, capture_output=True)
    before, after = onnx.load(source), onnx.load(out)
    onnx.checker.check_model(after, full_check=True)
    assert [n for n in after.graph.node if n.op_type != "Cast"] == list(before.graph.node)
    assert out.stat().st_size < (0.51 if method == ["float16"] else 1.001) * source.stat().st_size


def test_counted_bytes_are_those_of_digits_and_little_more(tmp_path):
    source = network(tmp_path / "in.onnx")
    model = onnx.load(source)
    digits = sum(int(np.prod(t.dims)) for t, _ in plain.weights(model.graph))
    rest = model.ByteSize() - 4 * digits
    assert digits == 64 * 64 * 9 + 640
    for levels, bits in ((2, 1), (4, 2), (16, 4), (255, 8)):
        counted = plain.rounding_bytes(model, levels)
        assert (
            0 < counted - rest - digits * bits / 8 - 2 * 74 < 2500
        )  # the larger table has 16 x 2 or 256 x 8
        assert plain.most_levels(source, counted) == levels
        assert (plain.most_levels(source, counted - 1) or 0) < levels
    assert plain.most_levels(source, 100) is None


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_which_pictures_were_right_survives_the_writing(right):
    assert judge.unpack(judge.pack(np.array(right)), len(right)).tolist() == right


def test_judge_says_what_evaluate_says(shared, tmp_path):
    original, out = shared / "models" / "cifar10_resnet20.onnx", tmp_path / "out.onnx"
    command = [sys.executable, TOOLS / "plain.py", "rounding", original, out, "--levels", "7"]
    subprocess.run(command, check=True)
    tool = shared.parent / "tools" / "evaluate.py"
    command = [sys.executable, tool, out, "--against", original, "--limit", "100", "--threads", "1"]
    said = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    for _ in range(2):  # the second time the original's logits are those that were kept
        ours = judge.judge(out, original, "cifar10_test1017", 100, tmp_path, 1)
        figures = ("n", "top1", "top1_original", "lost", "lost_se", "agreement", "logit_error")
        # the tool prints three digits
        assert {k: ours[k] for k in figures} == pytest.approx({k: said[k] for k in figures}, abs=6e-4)
    assert 100 * judge.unpack(ours["right"], 100).mean() == pytest.approx(ours["top1"])


PICTURES = 400


def cell(label, nbytes, wrong, *, ours=False, start=0):
    """Return a cell of a network that gets ``wrong`` pictures wrong, from the ``start``-th on."""
    right = np.ones(PICTURES, bool)
    right[start : start + wrong] = False
    lost = 100 * wrong / PICTURES
    judged = {
        "n": PICTURES,
        "lost": lost,
        "lost_se": (lost * (100 - lost) / PICTURES) ** 0.5,
        "agreement": 100 - lost,
        "logit_error": 0.1,
        "right": judge.pack(right),
    }
    return {
        **{"model": "net", "method": "onnxdp" if ours else label, "label": label, "ours": ours},
        **{"original": 1000, "bytes": nbytes, "ratio": 1000 / nbytes, "seconds": 1.0, "peak": 1e8},
        **{"judged": {"seen": judged}, "bench": None},
    }


FAILED = {
    "model": "net",
    "method": "broken",
    "label": "broken",
    "ours": False,
    "original": 1000,
    "failed": "no",
}


def verdict(ours, rival):
    return [d.verdict for d in standings.duels([ours, rival, FAILED])]


def test_ours_loses_to_a_rival_that_is_better_at_no_more_bytes():
    assert verdict(cell("o", 300, 40, ours=True), cell("r", 300, 10)) == ["below"]
    assert verdict(cell("o", 300, 40, ours=True), cell("r", 200, 10)) == ["below"]
    assert verdict(cell("o", 300, 10, ours=True), cell("r", 300, 40)) == [""]


def test_a_rival_with_more_bytes_counts_only_where_these_are_nearly_equal():
    assert verdict(cell("o", 300, 40, ours=True), cell("r", 310, 10)) == ["below"]
    assert verdict(cell("o", 300, 40, ours=True), cell("r", 400, 10)) == []


def test_one_standard_error_is_allowed_and_paired():
    # Behind by one picture of 400: the error of the paired difference is 0.25 points where it alone differs
    # and several times as much where forty do, though each file alone lost as much in both cases.
    alone = standings.compared(cell("o", 300, 21, ours=True), cell("r", 300, 20), "seen")
    mixed = standings.compared(cell("o", 300, 21, ours=True), cell("r", 300, 20, start=100), "seen")
    assert alone.behind == mixed.behind == pytest.approx(0.25)
    assert alone.error == pytest.approx(0.25, rel=0.01) and mixed.error > 1.5
    assert not mixed.below


def test_from_eight_times_on_a_draw_is_not_enough():
    assert verdict(cell("o", 300, 5, ours=True), cell("r", 300, 5)) == [""]
    assert verdict(cell("o", 125, 5, ours=True), cell("r", 125, 5)) == ["not above"]
    assert verdict(cell("o", 125, 4, ours=True), cell("r", 125, 5)) == [""]


@given(st.lists(st.tuples(st.integers(50, 900), st.integers(0, 100)), min_size=1, max_size=6))
def test_the_best_within_bytes_is_within_them_and_best(points):
    cells = [cell(str(i), b, w) for i, (b, w) in enumerate(points)]
    found = standings.best([*cells, FAILED], 400, "seen")
    fitting = [w for b, w in points if b <= 400]
    assert (found is None) == (not fitting)
    if found:
        assert found["bytes"] <= 400
        assert found["judged"]["seen"]["lost"] == pytest.approx(min(fitting) / PICTURES * 100)


CELLS = [
    cell("onnxdp, 4x", 250, 2, ours=True),
    cell("onnxdp, 8x", 125, 9, ours=True),
    cell("rival", 260, 4) | {"counted": True},
    FAILED,
]


def test_tables_have_equal_rows_and_say_why_a_cell_is_empty():
    for table in (standings.every(CELLS), standings.equal(CELLS, (2, 4, 8), "seen")):
        widths = {line.count("|") for line in table.splitlines()}
        assert len(widths) == 1
    whole = standings.every(CELLS)
    assert "| broken | no |" in whole and "260 †" in whole
    assert whole.index("rival") < whole.index("onnxdp, 4x") < whole.index("onnxdp, 8x")
    at_equal = standings.equal(CELLS, (2, 4, 8), "seen").splitlines()
    assert at_equal[-1].startswith("| **onnxdp** |") and "| 2.25 ± " in at_equal[-1]
    assert at_equal[2].endswith("|  |  |")  # the rival is too large for a quarter
    assert "3 comparisons" not in standings.verdicts(CELLS[2:])


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    standings.draw(CELLS, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_a_message_is_cut_to_what_a_table_holds():
    assert contenders.short("Error: /tmp/xyz/out.onnx | is bad") == "Error: out.onnx / is bad"
    assert len(contenders.short("x" * 500)) == 140


def test_a_cell_is_made_once_and_the_same_file_judged_once(tmp_path, monkeypatch):
    model = network(tmp_path / "net.onnx")
    asked = frontier.options().parse_args(
        ["--cache", str(tmp_path / "cache"), "--sets", "seen", "--repeat", "0"]
    )
    made, judged = [], []

    def make(source, out):
        made.append(out)
        out.write_bytes(source.read_bytes()[:1000])
        return {"seconds": 1.0, "peak": 1e6}

    def ran(command):
        judged.append(command)
        said = {"seen": cell("x", 1000, 3)["judged"]["seen"]}
        return Ran(0, json.dumps(said), "", 1.0, 0)

    monkeypatch.setattr(frontier, "run", ran)
    jobs = [contenders.Job("m", f"m {i}", (key,), make) for i, key in enumerate(("a", "a", "b"))]
    cells = [frontier.fill(job, model, asked) for job in (*jobs, jobs[0])]
    assert (
        len(made) == 3 and len(judged) == 1
    )  # a label names the file; the file's own sum names what it does
    assert cells[0] == cells[3] and cells[0]["judged"]["seen"]["lost"] == pytest.approx(0.75)
    bad = contenders.Job("bad", "bad", (), lambda source, out: {"failed": "no"})
    assert [frontier.fill(bad, model, asked)["failed"] for _ in range(2)] == ["no", "no"]
    unchanged = contenders.Job(
        "same", "same", (), lambda source, out: out.write_bytes(source.read_bytes()) and {"seconds": 1}
    )
    assert frontier.fill(unchanged, model, asked)["failed"] == "nothing done: 1.00x"
