"""Laws of the parts that a made-up picture is drawn of; those of whole pictures stand in test_probes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxdp import pictures
from onnxdp.answers import diversity

SEEDS = st.integers(0, 2**32 - 1)
SIDES = st.integers(8, 72)
EPS32 = float(np.finfo(np.float32).eps)


@settings(max_examples=40, deadline=None)
@given(SEEDS, SIDES, SIDES, st.sampled_from([1, 3]))
def test_every_picture_shows_something(seed: int, height: int, width: int, channels: int) -> None:
    x = pictures.draw(range(2), channels, height, width, seed)
    assert x.shape == (2, channels, height, width)
    assert (x.std((1, 2, 3)) > 5).all()


@settings(max_examples=60, deadline=None)
@given(SEEDS, SIDES, SIDES, st.integers(1, 12))
def test_a_pixel_shows_the_last_leaf_that_covers_it(seed: int, height: int, width: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    centres = rng.uniform(-0.2, 1.2, (count, 2)) * (height, width)
    sizes, angles = rng.uniform(0.5, 40, count), rng.uniform(0, 7, count)
    corners, stretch = rng.choice([0, 3, 4, 5, 6], count), np.exp(rng.normal(0, 0.5, count))
    label = pictures._painted(centres, sizes, corners, angles, stretch, (height, width))
    y, x = np.mgrid[:height, :width]
    expected, near = np.zeros((height, width), int), np.zeros((height, width), bool)
    for i in range(1, count):
        dy, dx, n = y - centres[i, 0], x - centres[i, 1], int(corners[i])
        if n == 0:
            beyond = np.hypot(dy, dx) - sizes[i]
        else:
            sides = (stretch[i], 1 / max(stretch[i], 1)) if n == 4 else (1.0, 1.0)
            normals = angles[i] + np.arange(n) * 2 * np.pi / n
            beyond = np.max(
                [np.sin(a) * dy + np.cos(a) * dx - sizes[i] * sides[k % 2] for k, a in enumerate(normals)], 0
            )
        expected[beyond < 0] = i
        near |= abs(beyond) < 1e-6  # pixels on an outline, up to rounding, may go to either side
    assert label.dtype == np.int32
    assert np.array_equal(label[~near], expected[~near])


@settings(max_examples=60, deadline=None)
@given(SEEDS, SIDES, SIDES)
def test_bending_moves_pixels_and_changes_none(seed: int, height: int, width: int) -> None:
    x = np.arange(height * width, dtype=np.float32).reshape(1, height, width)
    x = np.concatenate([x, -x])
    bent = pictures._bent(np.random.default_rng(seed), x)
    assert bent.shape == x.shape and np.isin(bent[0], x[0]).all()
    assert np.array_equal(bent[1], -bent[0])  # all channels alike


@settings(max_examples=60, deadline=None)
@given(SEEDS, SIDES, st.integers(1, 20))
def test_waves_are_as_rough_as_their_cells(seed: int, side: int, cells: int) -> None:
    made = pictures._waves(np.random.default_rng(seed), 2, side, side, cells)
    assert made.shape == (2, side, side) and made.dtype == np.float32
    # A cubic B-spline is a mean of its 16 nodes, and its slope one of their differences (a cell apart);
    # in float32, two numbers of which are known to twice as many EPS.
    nodes = np.random.default_rng(seed).standard_normal((2, cells + 3, cells + 3), dtype=np.float32)
    assert np.abs(made).max() <= 1.6 * np.abs(nodes).max() * (1 + 32 * EPS32)
    steepest = 1.6 * np.abs(np.diff(nodes, axis=2)).max() * cells / side
    assert np.abs(np.diff(made, axis=2)).max() <= steepest + 32 * EPS32 * np.abs(nodes).max()


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_an_outline_closes_and_never_vanishes(seed: int) -> None:
    turn = np.linspace(-np.pi, np.pi, 721).astype(np.float32)
    reach = pictures._outline(np.random.default_rng(seed), turn)
    assert (reach >= np.float32(0.05)).all()
    assert abs(reach[0] - reach[-1]) <= EPS32 * reach.max()  # sines of angles 2 pi apart, in float64


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(32, 72), st.integers(32, 72))
def test_a_thing_hides_a_part_of_what_is_behind(seed: int, height: int, width: int) -> None:
    behind = np.full((3, height, width), 1000.0, np.float32)
    x = behind.copy()
    pictures._put_thing(np.random.default_rng(seed), x, lambda: np.zeros_like(behind))
    touched = (x != behind).any(0)
    assert np.isfinite(x).all()
    assert np.array_equal(touched, (x != behind).all(0))  # all channels alike: it has one outline
    if touched.any():  # it may lie outside
        assert (x[:, touched].min(1) < 1000).all()


def test_a_network_tells_more_classes_apart_than_by_leaves_alone(shared: Path) -> None:
    """MobileNet tells 2.4 to 2.5 classes apart by 64 dead leaves (four seeds), by these 4.1 to 4.9."""
    session = onnxruntime.InferenceSession(shared / "models" / "imagenet_mobilenet_v1_025.onnx")
    x = pictures.draw(range(64), 3, 224, 224, 0).astype(np.float32)
    x = (x - x.mean((0, 2, 3), keepdims=True)) / x.std((0, 2, 3), keepdims=True)
    scores = session.run(None, {session.get_inputs()[0].name: x})[0]
    assert diversity(scores.reshape(64, -1)) > 3.3
