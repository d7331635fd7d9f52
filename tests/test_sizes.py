"""Free sizes that the network fixes after all are found by running it; what runs as it is stays."""

from __future__ import annotations

import json

import numpy as np
import pytest
from edges import decaying, onnxdp, parsed, save

from onnxdp import probes, sizes
from onnxdp.errors import ModelError
from onnxdp.inputs import InputSpec

RNG = np.random.default_rng(8)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def table(*shape):
    return RNG.normal(size=shape).astype(np.float32) / 4


def encoder():
    """Like the encoder of Whisper: a table of 75 positions behind a stride of 2 wants 150 frames."""
    return parsed(
        """<ir_version: 8, opset_import: ["" : 17]>
        encoder (float[batch, features, sequence_length] input_features) => (float[batch, l, 64] y) {
          a = Conv <pads = [1, 1], strides = [2]> (input_features, w1)
          b = Relu (a)
          c = Transpose <perm = [0, 2, 1]> (b)
          d = Add (c, positions)
          e = MatMul (d, w2)
          f = Relu (e)
          y = MatMul (f, w3)
        }""",
        w1=decaying(64, 120, 1).reshape(64, 40, 3),
        positions=table(75, 64),
        w2=decaying(64, 128, 2),
        w3=decaying(128, 64, 3),
    )


def looked_up():
    """A text network with room for 20 positions, fewer than are usual."""
    return parsed(
        """<ir_version: 8, opset_import: ["" : 17]>
        text (int64[batch, seq] input_ids, int64[batch, seq] other) => (float[batch, seq, 64] y) {
          a = Gather (words, input_ids)
          o = Gather (words, other)
          shape = Shape (input_ids)
          length = Gather (shape, one)
          places = Range (zero, length, one)
          p = Gather (positions, places)
          b = Add (a, p)
          b2 = Add (b, o)
          c = MatMul (b2, w1)
          d = Relu (c)
          y = MatMul (d, w2)
        }""",
        words=table(300, 64),
        positions=table(20, 64),
        zero=np.array(0),
        one=np.array(1),
        w1=decaying(64, 128, 2),
        w2=decaying(128, 64, 3),
    )


def graph():
    """Messages along edges, given as pairs of nodes."""
    return parsed(
        """<ir_version: 8, opset_import: ["" : 17]>
        graph (float[num_nodes, 24] x, int64[2, num_edges] edge_index) => (float[num_nodes, 8] y) {
          a = MatMul (x, w1)
          from = Gather (edge_index, zero)
          to = Gather (edge_index, one)
          sent = Gather (a, from)
          got = Gather (a, to)
          b = Add (sent, got)
          c = Relu (b)
          y = MatMul (c, w2)
        }""",
        zero=np.array(0),
        one=np.array(1),
        w1=decaying(24, 96, 2),
        w2=decaying(96, 8, 3),
    )


@pytest.mark.parametrize("model", [encoder, looked_up, graph])
def test_a_network_that_takes_other_sizes_than_usual_is_compressed_compared_and_timed(model):
    save(model())
    done = onnxdp("compress", "in.onnx", "out.onnx", "--max-error", "0.02", "--samples", "16", "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert not report["plan"]["kept"], "positions that are added are stored as well"
    (output,) = report["verification"]["outputs"]
    assert 1e-4 < output["relative"] <= 0.02
    assert onnxdp("verify", "in.onnx", "out.onnx", "--tolerance", "0.05", "--samples", "4").exit_code == 0
    assert onnxdp("bench", "in.onnx", "out.onnx", "--repeat", "1").exit_code == 0


def refusing(wanted, said):
    """Return what runs, or does not, and the sizes that it was asked for."""
    asked = []

    def runs(feed):
        asked.append({n: x.shape for n, x in feed.items()})
        if not wanted(feed):
            raise ModelError(f"ONNX Runtime cannot run it (Name:'/layer.7/Add_3' Status Message: {said})")

    return runs, asked


def test_what_runs_is_run_once_and_stays():
    specs = [InputSpec("x", "float32", ("batch", "time", 8))]
    runs, asked = refusing(lambda feed: True, "")
    assert sizes.fitted(specs, runs) == specs and len(asked) == 1


def test_a_length_scales_as_the_sizes_that_do_not_agree():
    specs = [
        InputSpec("x", "float32", ("batch", 8, "frames")),
        InputSpec("mask", "int64", ("batch", "frames")),
    ]
    runs, _ = refusing(lambda feed: feed["x"].shape[2] == 3000, "80 by 1500")
    found = sizes.fitted(specs, runs)
    assert [s.shape for s in found] == [("batch", 8, 3000), ("batch", 3000)]


def test_sums_of_lengths_follow():
    names = {"input_ids": ("b", "seq"), "attention_mask": ("b", "past_seq + seq")}
    specs = [InputSpec(n, "int64", s, 50) for n, s in names.items()]
    runs, _ = refusing(lambda feed: feed["input_ids"].shape[1] <= 20, "idx=31 must be in [-20,19]")
    found = sizes.fitted(specs, runs)
    feed = probes.make(found, samples=2, seed=0).feeds[0]
    assert {n: x.shape for n, x in feed.items()} == {"input_ids": (2, 20), "attention_mask": (2, 20)}


def test_pictures_get_sides_that_fit():
    specs = [InputSpec("x", "float32", ("batch", 3, "height", "width"))]
    runs, _ = refusing(lambda feed: feed["x"].shape[2:] == (384, 384), "197 by 577")
    assert sizes.fitted(specs, runs)[0].shape == ("batch", 3, 384, 384)


def test_two_sizes_are_settled_one_after_the_other():
    """OWL-ViT has room for 16 ids and takes pictures of one size, and its file says neither."""
    specs = [
        InputSpec("input_ids", "int64", ("batch", "length"), 50),
        InputSpec("pixel_values", "float32", ("pictures", 3, "height", "width")),
    ]

    def runs(feed):
        shapes = {n: x.shape for n, x in feed.items()}
        for node, wrong, said in (
            ("a", shapes["pixel_values"][2] != 256, "50 by 65"),
            ("b", shapes["input_ids"][1] > 16, f"16 by {shapes['input_ids'][1]}"),
        ):
            if wrong:
                raise ModelError(f"while running Add node. Name:'{node}' Status Message: {said}")

    found = sizes.fitted(specs, runs)
    assert [s.shape for s in found] == [("batch", 16), ("pictures", 3, 256, 256)]


def test_ids_that_no_table_bounds_are_bounded_by_what_is_refused():
    specs = [InputSpec("codes", "int64", ("batch", 8, "length"))]
    runs, _ = refusing(lambda feed: feed["codes"].max() < 256, "idx=999 must be within [-256,255]")
    (found,) = sizes.fitted(specs, runs)
    assert found.vocabulary == 256 and found.shape == specs[0].shape


def test_sound_that_is_too_short_gets_longer_and_series_their_context():
    specs = [InputSpec("sound", "float32", ("batch", "samples"))]
    runs, _ = refusing(lambda feed: feed["sound"].shape[1] >= 1000, "Invalid input shape: {1}")
    assert sizes.fitted(specs, runs)[0].shape == ("batch", 1024)
    specs = [InputSpec("past_values", "float32", ("batch", "steps", 5))]
    assert specs[0].kind == "other"
    runs, _ = refusing(lambda feed: feed["past_values"].shape[1] == 128, "MatMul dimension mismatch")
    assert sizes.fitted(specs, runs)[0].shape == ("batch", 128, 5)


def test_where_nothing_helps_it_is_said_why_and_soon():
    specs = [InputSpec("x", "float32", ("batch", "time", 8)), InputSpec("ids", "int64", ("batch", "length"))]
    runs, asked = refusing(lambda feed: False, " ".join(map(str, range(2, 90))))
    with pytest.raises(ModelError, match="Status Message: 2 3 4 "):
        sizes.fitted(specs, runs)
    assert 10 < len(asked) <= 97
    assert max(max(s) for shapes in asked for s in shapes.values()) <= 500_000
