"""Laws of the made-up inputs, and every refusal of the user's own."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from edges import parsed
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from onnxdp.answers import diversity, pick
from onnxdp.errors import UsageError
from onnxdp.pictures import draw
from onnxdp.probes import InputSpec, Probes, load, make
from onnxdp.ranges import CENTRED, STANDARDISED, Range
from onnxdp.records import Array
from onnxdp.runtime import input_specs

SHARED = Path(os.environ.get("ONNXDP_SHARED", Path(__file__).parents[2] / "shared"))
PICTURE = InputSpec("x", "float32", ("batch", 3, 32, 32))
IDS = InputSpec("ids", "int64", ("batch", "seq"), vocabulary=50)

# (model, inputs as declared, kinds, shapes of one feed with two samples where the batch is free)
ZOO = [
    ("silero_vad", [("input", "float32", (None, None)), ("state", "float32", (2, None, 128)),
                    ("sr", "int64", ())],
     ["other", "state", "scalar"], [(2, 512), (2, 2, 128), ()]),
    ("ppocr_v4_det", [("x", "float32", ("D.0", 3, "D.1", "D.2"))], ["image"], [(2, 3, 224, 224)]),
    ("ppocr_v4_rec", [("x", "float32", ("D.0", 3, "?", "D.1"))], ["image"], [(2, 3, 48, 320)]),
    ("magika", [("bytes", "int32", ("unk__214", 2048))], ["ids"], [(2, 2048)]),
    ("basic_pitch", [("serving_default_input_2:0", "float32", ("unk__749", 43844, 1))], ["other"],
     [(2, 43844, 1)]),
    ("speech_embedding", [("input_1", "float32", ("unk__316", 76, 32, 1))], ["image"], [(2, 76, 32, 1)]),
    ("dtln_1", [("input_2", "float32", (1, 1, 257)), ("input_3", "float32", (1, 2, 128, 2))],
     ["other", "state"], [(1, 1, 257), (1, 2, 128, 2)]),
    ("gtcrn", [("mix", "float32", (1, 257, 1, 2)), ("conv_cache", "float32", (2, 1, 16, 16, 33)),
               ("tra_cache", "float32", (2, 3, 1, 1, 16)), ("inter_cache", "float32", (2, 1, 33, 16))],
     ["other", "state", "state", "state"],
     [(1, 257, 1, 2), (2, 1, 16, 16, 33), (2, 3, 1, 1, 16), (2, 1, 33, 16)]),
    ("face_rfb320", [("input", "float32", (1, 3, 240, 320))], ["image"], [(1, 3, 240, 320)]),
    ("squeezenet11_fp16", [("data_0", "float16", (1, 3, 224, 224))], ["image"], [(1, 3, 224, 224)]),
    ("smart_turn_int8", [("input_features", "float32", ("s6", 80, 800))], ["other"], [(2, 80, 800)]),
    ("speaker_encoder", [("mels", "float32", ("batch", "frames", 40))], ["other"], [(2, 160, 40)]),
    ("slovorez_fp16", [("input_layer", "int32", ("unk__190", "unk__191"))], ["ids"], [(2, 32)]),
    ("mnist_cntk", [("Input3", "float32", (1, 1, 28, 28))], ["image"], [(1, 1, 28, 28)]),
    ("transformer", [("input_ids", "int64", ("batch", "seq")),
                     ("attention_mask", "int64", ("batch", "past_seq + seq")),
                     ("token_type_ids", "int64", ("batch", "seq")),
                     ("position_ids", "int64", ("batch", "seq")),
                     ("past_key_values.0.key", "float32", ("batch", 4, "past_seq", 16))],
     ["ids", "mask", "ids", "ids", "state"], [(2, 32), (2, 32), (2, 32), (2, 32), (2, 4, 0, 16)]),
    ("speech", [("hidden_states", "float32", ("batch", "time", 80)), ("lengths", "int64", ("batch",)),
                ("keep", "bool", ("batch", "time"))], ["other", "scalar", "mask"],
     [(2, 160, 80), (2,), (2, 160)]),
    ("uint8", [("pixels", "uint8", ("n", "h", 64, 3))], ["image"], [(2, 64, 64, 3)]),
    ("time first", [("audio", "float32", ("time", "batch", 9))], ["other"], [(160, 2, 9)]),
    ("no batch", [("wave", "float32", ("samples",))], ["other"], [(512,)]),
    ("fixed batch", [("x", "float32", (4, 3, 16, 16)), ("z", "float32", (4, 7))], ["image", "other"],
     [(4, 3, 16, 16), (4, 7)]),
]  # fmt: skip


def whole(probes: Probes, name: str) -> Array:
    axis = probes.axes[name]
    return np.concatenate([f[name] for f in probes.feeds], 0 if axis is None else axis)


def five(x: Array) -> Array:
    """Five numbers of each sample, far apart."""
    flat = x.reshape(len(x), -1)
    return flat[:, :: flat.shape[1] // 5][:, :5].astype(np.float64)


def same(a: Probes, b: Probes) -> bool:
    return len(a.feeds) == len(b.feeds) and all(
        f.keys() == g.keys() and all(np.array_equal(f[n], g[n]) and f[n].dtype == g[n].dtype for n in f)
        for f, g in zip(a.feeds, b.feeds, strict=True)
    )


@pytest.mark.parametrize(("inputs", "kinds", "shapes"), [z[1:] for z in ZOO], ids=[z[0] for z in ZOO])
def test_every_kind_of_input_gets_its_shape_and_type(inputs: list, kinds: list, shapes: list) -> None:
    specs = [InputSpec(*i) for i in inputs]
    assert [s.kind for s in specs] == kinds
    probes = make(specs, samples=2, seed=3)
    for feed in probes.feeds:
        assert [feed[s.name].shape for s in specs] == shapes
        assert [feed[s.name].dtype.name for s in specs] == [s.dtype for s in specs]
        for s in specs:
            values = feed[s.name]
            assert np.isfinite(values.astype(np.float64)).all()
            if s.kind in ("image", "other"):
                assert np.ptp(values) > 0
            if s.kind == "state":
                assert not values.any()
            if s.kind == "mask":
                assert values.all()
    assert probes.samples == probes.batch * len(probes.feeds) >= 2
    assert same(probes, make(specs, samples=2, seed=3))


def test_values_by_name() -> None:
    names = ("token_type_ids", "position_ids", "attention_mask", "ids")
    specs = [InputSpec(n, "int64", ("batch", "seq"), 50 if n == "ids" else None) for n in names]
    specs += [InputSpec("sr", "int64", ()), InputSpec("lengths", "int64", ("batch",))]
    feed = make(specs, samples=40, seed=0).feeds[0]
    assert not feed["token_type_ids"].any()
    assert (feed["position_ids"] == np.arange(32)).all()
    assert (feed["attention_mask"] == 1).all()
    assert feed["sr"] == 16000 and (feed["lengths"] == 32).all()
    assert feed["ids"].min() == 0 and feed["ids"].max() == 49  # 640 draws miss an end with p < 1e-5


def test_cached_keys_are_there_to_be_attended_to() -> None:
    """A decoder of one token at a time has some before it; one of many tokens caches none."""

    def shapes(length: int | str) -> tuple[dict[str, tuple[int, ...]], Mapping[str, Array]]:
        past = f"past_sequence_length + {length}"
        inputs: dict[str, tuple[str, tuple[int | str, ...]]] = {
            "input_ids": ("int64", ("batch", length)),
            "attention_mask": ("int64", ("batch", past)),
            "past_key_values.0.decoder.key": ("float32", ("batch", 2, "past_sequence_length", 8)),
            "past_key_values.0.encoder.key": ("float32", ("batch", 2, "encoder_sequence_length", 8)),
            "use_cache_branch": ("bool", (1,)),
        }
        probes = make([InputSpec(n, *i) for n, i in inputs.items()], samples=4, seed=0)
        return {n: x.shape[1:] for n, x in probes.feeds[0].items()}, probes.feeds[0]

    one, feed = shapes(1)
    assert one["past_key_values.0.decoder.key"] == (2, 31, 8) and one["attention_mask"] == (32,)
    for key in ("past_key_values.0.decoder.key", "past_key_values.0.encoder.key"):
        assert 0.9 < feed[key].std() < 1.1
    assert not feed["use_cache_branch"].any() and feed["attention_mask"].all()
    many, _ = shapes("sequence_length")
    assert many["past_key_values.0.decoder.key"] == (2, 0, 8) and many["attention_mask"] == (32,)


def test_texts_end_with_what_the_network_looks_for() -> None:
    model = parsed(
        """<ir_version: 8, opset_import: ["" : 17]>
        text (int64[b, n] ids) => (float[b, 8] y) {
          a = Gather (words, ids)
          i = Cast <to = 6> (ids)
          e = Equal (i, end)
          f = Equal (none, ids)
          p = Equal (ids, padding)
          y = ReduceSum (a)
        }""",
        words=np.zeros((90, 8), np.float32),
        end=np.int32(89),
        none=np.array([-100]),
        padding=np.array([1]),
    )
    (spec,) = input_specs(model)
    assert (spec.vocabulary, spec.marks) == (90, (1, 89))
    texts = whole(make([spec], samples=64, seed=0), "ids")
    assert (texts[:, -2:] == [1, 89]).all() and not np.isin(texts[:, :-2], [1, 89]).any()
    assert len(np.unique(texts)) > 60


def test_another_seed_gives_other_inputs() -> None:
    for spec in (PICTURE, IDS, InputSpec("z", "float32", ("batch", 7))):
        a, b = (whole(make([spec], samples=4, seed=s), spec.name) for s in (0, 1))
        assert not np.array_equal(a, b)
        assert len(np.unique(a, axis=0)) == 4


@pytest.mark.parametrize("channels", [1, 3])
def test_picture_i_depends_on_seed_and_i_alone(channels: int) -> None:
    many = draw(range(6), channels, 20, 33, 5)
    assert many.shape == (6, channels, 20, 33) and many.dtype == np.uint8
    assert np.array_equal(many[[4, 1]], draw([4, 1], channels, 20, 33, 5))
    assert not np.array_equal(many[:1], draw([0], channels, 20, 33, 6))


@pytest.mark.parametrize("spec", [PICTURE, IDS])
def test_a_larger_set_and_a_larger_pool_extend_a_smaller(spec: InputSpec) -> None:
    seen: list[Array] = []

    def answers(feed: Mapping[str, Array]) -> Array:
        seen.append(feed[spec.name])
        return 10 * five(feed[spec.name])  # answers that differ well, or louder pictures would be tried

    make([spec], samples=4, seed=1, batch=4, pool=8, answers=answers)
    small, seen = np.concatenate(seen), []
    make([spec], samples=4, seed=1, batch=4, pool=16, answers=answers)
    assert np.array_equal(np.concatenate(seen)[:8], small)
    assert len(small) == 8 and len(np.concatenate(seen)) == 16


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2 * 2.0**-23), ("float16", 2 * 2.0**-10)])
@pytest.mark.parametrize("shape", [("n", 3, 24, 24), ("n", 24, 24, 3), ("n", 1, 24, 24)])
def test_pictures_are_standardised_per_channel(dtype: str, bound: float, shape: tuple) -> None:
    # Each number near 1 is rounded once, which moves mean and spread by less than 2 eps of the type.
    x = whole(make([InputSpec("x", dtype, shape)], samples=40, seed=0), "x").astype(np.float64)
    axes = (0, 1, 2) if shape[3] == 3 else (0, 2, 3)
    assert np.abs(x.mean(axes)).max() < bound
    assert np.abs(x.std(axes) - 1).max() < bound


def test_uint8_pictures_use_the_range() -> None:
    x = whole(make([InputSpec("x", "uint8", ("n", 3, 32, 32))], samples=16, seed=0), "x")
    assert 80 < x.mean() < 160 and 30 < x.std() < 80
    assert ((x == 0) | (x == 255)).mean() < 0.1


@pytest.mark.parametrize("side", [32, 224])
def test_power_falls_as_in_natural_pictures(side: int) -> None:
    """Natural pictures have power near f^-2 (-1.5 to -3.5 each); white noise has 0, a blurred blob < -4."""
    x = draw(range(200 if side == 32 else 24), 1, side, side, 0)[:, 0].astype(np.float64)
    window = np.hanning(side)[:, None] * np.hanning(side)
    power = (np.abs(np.fft.fft2((x - x.mean((1, 2), keepdims=True)) * window)) ** 2).mean(0)
    f = np.fft.fftfreq(side)
    radius = np.hypot(f[:, None], f)
    edges = np.geomspace(3 / side, 0.35, 8)
    mean = [power[(radius >= a) & (radius < b)].mean() for a, b in pairwise(edges)]
    slope = np.polyfit(np.log(np.sqrt(edges[:-1] * edges[1:])), np.log(mean), 1)[0]
    assert -3.5 < slope < -1.5


def test_most_pictures_are_mostly_grey() -> None:
    x = draw(range(60), 3, 32, 32, 0).astype(np.float64)
    grey = x.mean(1, keepdims=True)
    colour = ((x - grey) ** 2).mean((1, 2, 3)) / x.var((1, 2, 3))
    assert np.median(colour) < 0.2 and colour.max() > 0.02


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 30), st.integers(1, 6)).flatmap(
        lambda s: arrays(np.float64, s, elements=st.floats(-5, 5, allow_subnormal=False))
    ),
    st.integers(1, 30),
)
def test_picks_are_balanced_and_most_confident(scores: Array, samples: int) -> None:
    chosen = pick(scores, samples)
    assert len(chosen) == len(set(chosen.tolist())) == min(samples, len(scores))
    p = np.exp(scores - scores.max(1, keepdims=True))
    confidence, label = 1 / p.sum(1), p.argmax(1)  # scores that differ by 1e-200 are one probability
    if (scores >= 0).all() and np.allclose(scores.sum(1), 1, atol=1e-2):
        confidence, label = scores.max(1), scores.argmax(1)
    if scores.shape[1] == 1:  # two classes: above the middle of all, and not
        apart = scores[:, 0] - np.median(scores)
        confidence, label = np.abs(apart), (apart > 0).astype(np.int64)
    classes = max(2, scores.shape[1])
    taken = np.bincount(label[chosen], minlength=classes)
    there = np.bincount(label, minlength=classes)
    for c in range(classes):
        # A class gives one less than the fullest only where it came later in the turn, or has no more.
        assert taken[c] >= min(there[c], taken.max() - 1)
        mine, rest = chosen[label[chosen] == c], np.setdiff1d(np.flatnonzero(label == c), chosen)
        if len(mine) and len(rest):
            assert confidence[mine].min() >= confidence[rest].max() - 1e-12


@settings(max_examples=80, deadline=None)
@given(
    st.tuples(st.integers(1, 30), st.integers(1, 12)).flatmap(
        lambda s: arrays(np.float64, s, elements=st.floats(-50, 50, allow_subnormal=False))
    )
)
def test_diversity_lies_between_one_and_the_number_of_classes(scores: Array) -> None:
    # The 1e-12 inside the logarithms adds as much to their mean at most, rounding some 30 eps more.
    found, slack = diversity(scores), 1 + 2e-12
    assert 1 / slack <= found <= scores.shape[1] * slack
    assert diversity(np.repeat(scores[:1], 7, axis=0)) == pytest.approx(1, rel=2e-12)


@pytest.mark.parametrize("classes", [1, 2, 10])
def test_diversity_counts_the_classes_that_sure_answers_tell_apart(classes: int) -> None:
    answers = np.tile(np.eye(10)[:classes], (3, 1))
    assert diversity(answers) == pytest.approx(classes, rel=1e-10)  # 1e-12 beside probabilities of 1/10


@pytest.mark.parametrize(
    ("dtype", "wanted", "slope"),
    [
        ("float32", STANDARDISED, 3.0),  # taught on standardised pictures
        ("float16", STANDARDISED, 3.0),
        ("float32", CENTRED, 3.0 / 64),  # taught on 0..255: standardised ones are all alike to it
        ("float16", CENTRED, 3.0 / 64),
        ("float32", STANDARDISED, 0.0),  # moved by nothing
        ("uint8", STANDARDISED, 3.0 / 64 / 64),  # bytes are as loud as they can be
    ],
)
def test_pictures_are_as_loud_as_the_network_wants(dtype: str, wanted: Range, slope: float) -> None:
    spec = InputSpec("x", dtype, ("n", 3, 32, 32))
    plain = whole(make([spec], samples=24, seed=0, wanted=wanted), "x")
    probes = make([spec], samples=24, seed=0, pool=24, answers=lambda feed: slope * five(feed["x"]))
    found = whole(probes, "x")
    assert found.dtype == plain.dtype
    # All 24 are picked, in another order.
    assert np.array_equal(np.unique(found, axis=0), np.unique(plain, axis=0))


@pytest.mark.parametrize(("shape", "turns"), [((12, 12), 1), ((12, 20), 2)], ids=str)
def test_each_picture_is_offered_turned_as_well(shape: tuple[int, int], turns: int) -> None:
    asked: list[Array] = []

    def answers(feed: Mapping[str, Array]) -> Array:
        asked.append(feed["x"])
        return np.zeros((len(feed["x"]), 4))

    spec = InputSpec("x", "float32", ("n", 3, *shape))
    make([spec], samples=8, seed=0, answers=answers, wanted=STANDARDISED)
    pool = np.concatenate(asked)
    assert len(pool) == 2 * 8
    assert np.array_equal(pool[8:], np.rot90(pool[:8], turns, (2, 3)))


def test_a_network_too_large_to_choose_is_asked_about_a_few_pictures() -> None:
    """Of 96 that are all taken, 48 tell the range; where that is given, none is needed."""
    spec = InputSpec("x", "float32", ("n", 1, 8, 8))
    for wanted, few in ((None, 48), (STANDARDISED, 0)):
        asked: list[int] = []

        def answers(feed: Mapping[str, Array], asked: list[int] = asked) -> Array:
            asked.append(len(feed["x"]))
            return np.eye(4)[np.arange(len(feed["x"])) % 4] * 9  # moved enough: nothing louder is tried

        made = make([spec], samples=96, seed=0, batch=16, pool=96, answers=answers, wanted=wanted)
        assert sum(asked) == few
        assert np.array_equal(whole(made, "x"), whole(make([spec], samples=96, seed=0, wanted=wanted), "x"))


def test_the_networks_answers_choose_the_probes() -> None:
    def answers(feed: Mapping[str, Array]) -> Array:
        return np.eye(50)[feed["ids"][:, 0] // 17] * (1 + feed["ids"][:, 1:2])

    probes = make([IDS], samples=30, seed=0, pool=300, answers=answers)
    classes = np.bincount(whole(probes, "ids")[:, 0] // 17)
    assert classes.tolist() == [10, 10, 10]
    assert whole(probes, "ids")[:, 1].min() > whole(make([IDS], samples=30, seed=0), "ids")[:, 1].mean()


@pytest.mark.parametrize("shape", [(96, 7), (1, 10), ()], ids=str)
def test_answers_that_are_not_of_single_samples_choose_none(shape: tuple[int, ...]) -> None:
    """W x with a constant W, a closing mean: their size is no multiple of the feed's."""
    spec = InputSpec("x", "float32", (64, 7))
    made = make([spec], samples=128, seed=0, answers=lambda _: np.ones(shape))
    plain = make([spec], samples=128, seed=0)
    assert np.array_equal(whole(made, "x"), whole(plain, "x"))


def test_a_model_without_inputs_needs_none() -> None:
    made = make([], samples=8, seed=0, answers=lambda _: np.ones((4, 10)))
    assert made.samples >= 8 and not any(made.feeds)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 70), st.floats(0.01, 0.99), st.integers(1, 40))
def test_split_parts_the_samples(samples: int, share: float, batch: int) -> None:
    probes = make(
        [InputSpec("z", "float32", ("batch", 3)), InputSpec("k", "int64", ())],
        samples=samples,
        seed=0,
        batch=batch,
    )
    fit, held = probes.split(share)
    assert fit.samples > 0 and held.samples > 0 and fit.samples + held.samples == probes.samples
    assert abs(fit.samples - share * probes.samples) <= max(1, probes.samples / 16)
    together = np.concatenate([whole(fit, "z"), whole(held, "z")])
    assert np.array_equal(np.unique(together, axis=0), np.unique(whole(probes, "z"), axis=0))
    for part in (fit, held, probes.rebatch(5)):
        assert len({f["z"].shape for f in part.feeds}) == 1
        assert len(whole(part, "z")) == part.samples == part.batch * len(part.feeds)
    assert np.array_equal(whole(probes.rebatch(5), "z"), whole(probes, "z"))
    assert same(fit, probes.split(share)[0])


def test_split_of_fixed_batches_keeps_them_whole() -> None:
    probes = make([InputSpec("z", "float32", (4, 3))], samples=20, seed=0)
    fit, held = probes.split(0.8)
    assert [f["z"].shape for f in (*fit.feeds, *held.feeds)] == [(4, 3)] * 5
    assert (fit.samples, held.samples) == (16, 4)
    assert probes.rebatch(2) is probes


def test_text_cannot_be_made_up() -> None:
    with pytest.raises(UsageError, match="'t' holds text, which cannot be made up; give --inputs"):
        make([InputSpec("t", "object", ("n",))], samples=2, seed=0)


def test_load_gives_back_what_was_saved(tmp_path: Path) -> None:
    file, x = tmp_path / "in.npz", np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    specs = [
        InputSpec("x", "float32", (None, 5)),
        InputSpec("state", "float32", (2, None, 4)),
        InputSpec("sr", "int64", ()),
    ]
    np.savez(file, x=x, state=np.zeros((2, 1, 4), np.float32), sr=np.int64(8000))
    probes = load(file, specs)
    assert (probes.samples, len(probes.feeds), probes.seed, probes.source) == (6, 6, None, "in.npz")
    assert np.array_equal(whole(probes, "x"), x)
    assert all(f["state"].shape == (2, 1, 4) and f["sr"] == 8000 for f in probes.feeds)
    np.savez(file, x=x)
    free, fixed = load(file, specs[:1]), load(file, [InputSpec("x", "float32", (2, 5))])
    assert (len(free.feeds), len(fixed.feeds)) == (1, 3)
    assert np.array_equal(whole(free, "x"), x) and np.array_equal(whole(fixed, "x"), x)
    assert free.split(0.5)[1].samples == 3


F32 = np.float32
REFUSED = {
    "lacks the input 'y'": {"x": np.zeros((4, 5), F32)},
    "holds 'w'": {"x": np.zeros((4, 5), F32), "y": np.zeros((4, 2), np.int64), "w": np.zeros(3)},
    "is float64": {"x": np.zeros((4, 5)), "y": np.zeros((4, 2), np.int64)},
    "has 3 axes": {"x": np.zeros((4, 5, 1), F32), "y": np.zeros((4, 2), np.int64)},
    "make axis 1 5 long": {"x": np.zeros((4, 6), F32), "y": np.zeros((4, 2), np.int64)},
    "4 samples of 'x' and 6 of 'y'": {"x": np.zeros((4, 5), F32), "y": np.zeros((6, 2), np.int64)},
    "holds no sample": {"x": np.zeros((0, 5), F32), "y": np.zeros((0, 2), np.int64)},
    "holds pickled": {"x": np.array([{}, None], object), "y": np.zeros((4, 2), np.int64)},
}


@pytest.mark.parametrize("why", REFUSED)
def test_load_refuses_what_does_not_fit(tmp_path: Path, why: str) -> None:
    file = tmp_path / "in.npz"
    np.savez(file, allow_pickle=True, **REFUSED[why])
    with pytest.raises(UsageError, match=why) as e:
        load(file, [InputSpec("x", "float32", ("n", 5)), InputSpec("y", "int64", ("n", "t"))])
    assert str(file) in e.value.message and "\n" not in e.value.message


def test_load_refuses_an_incomplete_batch(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", x=np.zeros((5, 3), F32))
    with pytest.raises(UsageError, match="multiple of 2"):
        load(tmp_path / "in.npz", [InputSpec("x", "float32", (2, 3))])


def test_load_refuses_what_is_no_archive(tmp_path: Path) -> None:
    good = tmp_path / "good.npz"
    np.savez(good, x=np.arange(4000, dtype=F32).reshape(4, 1000))
    damaged = bytearray(good.read_bytes())
    damaged[1000] ^= 255
    contents = {
        "text": b"hello",
        "empty": b"",
        "pickle": pickle.dumps([1]),
        "cut": good.read_bytes()[:-40],
        "crc": damaged,
    }
    for name, content in contents.items():
        file = tmp_path / f"{name}.npz"
        file.write_bytes(content)
        with pytest.raises(UsageError, match="savez"):
            load(file, [InputSpec("x", "float32", ("n", 1000))])
    for path in (tmp_path / "absent.npz", tmp_path):
        with pytest.raises(UsageError, match="savez"):
            load(path, [])


def test_probes_reach_most_classes_of_a_real_network() -> None:
    file = SHARED / "data/models/cifar10_resnet20.onnx"
    if not file.exists():
        pytest.skip(f"{file} is absent (set ONNXDP_SHARED)")
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    spec = InputSpec("input", "float32", ("batch", 3, 32, 32))

    def answers(feed: Mapping[str, Array]) -> Array:
        return session.run(None, dict(feed))[0]

    def labels(probes: Probes) -> Array:
        return np.concatenate([answers(f) for f in probes.feeds]).argmax(1)

    random, chosen = (make([spec], samples=64, seed=0, pool=192, answers=a) for a in (None, answers))
    counts = np.bincount(labels(chosen), minlength=10)
    assert (counts > 0).sum() >= 7
    assert counts.max() < np.bincount(labels(random)).max()
