"""Real inputs: what is read, how it is prepared, what the network tells of its range; every refusal."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from onnxdp import calibration, model, normalisation, preparation, probes, runtime, weights
from onnxdp.errors import SetupError, UsageError
from onnxdp.network import Network
from onnxdp.pictures import draw
from onnxdp.probes import InputSpec, Probes
from onnxdp.ranges import CENTRED, RANGES, STANDARDISED, Range, by_answers, by_statistics
from onnxdp.records import Array
from onnxdp.settings import Settings

Image = pytest.importorskip("PIL.Image")

SHARED = Path(os.environ.get("ONNXDP_SHARED", Path(__file__).parents[2] / "shared"))
F32 = np.float32
EPS = float(np.finfo(F32).eps)
PICTURE = InputSpec("x", "float32", ("batch", 3, 32, 32))
PIXELS = draw(range(6), 3, 32, 32, 7).transpose(0, 2, 3, 1)


def whole(found: Probes, name: str = "x") -> Array:
    return np.concatenate([f[name] for f in found.feeds])


def read(path: Path, spec: InputSpec = PICTURE, most: int = 128, **options: object) -> Array:
    return whole(calibration.load([spec], Settings(calibrate=path, **options), most=most)[0])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "pictures"
    made.mkdir()
    for i, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(made / f"{i}.png")
    return made


def needed(file: str) -> Path:
    path = SHARED / "data" / file
    if not path.exists():
        pytest.skip(f"{path} is absent (set ONNXDP_SHARED)")
    return path


# --- what is read -------------------------------------------------------------------------------------------


def test_a_folder_and_arrays_of_the_same_pictures_are_the_same(folder: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "last.npy", PIXELS)
    np.save(tmp_path / "first.npy", PIXELS.transpose(0, 3, 1, 2))
    np.savez(tmp_path / "keyed.npz", x=PIXELS)
    expected = read(folder)
    for name in ("last.npy", "first.npy", "keyed.npz"):
        assert np.array_equal(read(tmp_path / name), expected)
    (folder / "notes.txt").write_text("no picture")
    (folder / ".3.png").write_text("what a file manager leaves")
    assert np.array_equal(read(folder), expected)


def test_pictures_are_standardised_where_nothing_is_said(folder: Path) -> None:
    x = read(folder).astype(np.float64)
    assert x.shape == (6, 3, 32, 32)
    # Numbers of a few units are rounded once to float32, and 1e-6 is added to the deviation of some 50.
    assert np.abs(x.mean((0, 2, 3))).max() < 4 * EPS
    assert np.abs(x.std((0, 2, 3)) - 1).max() < 4 * EPS + 1e-6


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({"input_range": "0..1"}, lambda x: x / 255),
        ({"input_range": "-1..1"}, lambda x: x / 127.5 - 1),
        ({"input_range": "0..255", "channel_order": "bgr"}, lambda x: x[:, ::-1]),
        (
            {"input_range": "0..255", "mean": "104,117,123"},
            lambda x: x - np.reshape([104, 117, 123], (3, 1, 1)),
        ),
        (
            {"mean": "0.485,0.456,0.406", "std": "0.229,0.224,0.225"},
            lambda x: (
                (x / 255 - np.reshape([0.485, 0.456, 0.406], (3, 1, 1)))
                / np.reshape([0.229, 0.224, 0.225], (3, 1, 1))
            ),
        ),
        (
            {"mean": "0.4,0.5,0.6", "std": "0.5", "channel_order": "bgr"},
            lambda x: (x[:, ::-1] / 255 - np.reshape([0.4, 0.5, 0.6], (3, 1, 1))) / 0.5,
        ),
    ],
)
@pytest.mark.parametrize("last", [False, True])
def test_options_are_applied_to_bytes(
    folder: Path, options: dict[str, str], value: Callable[[Array], Array], last: bool
) -> None:
    spec = InputSpec("x", "float32", ("batch", 32, 32, 3)) if last else PICTURE
    x = read(folder, spec, **options)
    expected = value(PIXELS.transpose(0, 3, 1, 2).astype(np.float64))
    expected = expected.transpose(0, 2, 3, 1) if last else expected
    # In float64 (255 times its epsilon), then rounded once.
    assert np.abs(x - expected).max() <= EPS * np.abs(expected).max()


def test_floats_are_taken_as_they_are_unless_a_mean_is_given(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(4, 3, 32, 32))
    np.save(tmp_path / "x.npy", x)
    assert np.array_equal(read(tmp_path / "x.npy"), x.astype(F32))
    shifted = read(tmp_path / "x.npy", mean="1,2,3", std="2,4,8")
    expected = (x - np.reshape([1, 2, 3], (3, 1, 1))) / np.reshape([2, 4, 8], (3, 1, 1))
    assert np.array_equal(shifted, expected.astype(F32))


def test_networks_of_bytes_get_bytes(folder: Path) -> None:
    assert np.array_equal(read(folder, InputSpec("x", "uint8", ("n", 32, 32, 3))), PIXELS)


def test_grey_networks_get_grey_pictures(folder: Path) -> None:
    x = read(folder, InputSpec("x", "float32", ("n", 1, 32, 32)), input_range="0..255")
    grey = PIXELS @ np.array([0.299, 0.587, 0.114])
    assert np.abs(x[:, 0] - grey).max() <= 1  # Pillow's weights, to a whole number


def test_other_inputs_come_along(tmp_path: Path) -> None:
    specs = [PICTURE, InputSpec("ids", "int64", ("batch", 4), vocabulary=9)]
    ids = np.arange(24).reshape(6, 4) % 9
    np.savez(tmp_path / "x.npz", x=PIXELS, ids=ids)
    found, _ = calibration.load(specs, Settings(calibrate=tmp_path / "x.npz"), most=3)
    assert np.array_equal(whole(found, "ids"), ids[[0, 2, 4]])
    np.save(tmp_path / "x.npy", PIXELS[[0, 2, 4]])
    assert np.array_equal(whole(found), read(tmp_path / "x.npy"))


@limits(max_examples=25, deadline=None)
@given(st.integers(20, 90), st.integers(20, 90), st.integers(8, 40), st.integers(8, 40))
def test_the_centre_is_kept(width: int, height: int, w: int, h: int) -> None:
    """A picture symmetric about its centre stays so, whatever is resized and cut."""
    row, column = (np.abs(np.linspace(-1, 1, n)) for n in (height, width))
    plane = np.rint(255 * (0.5 * row[:, None] + 0.5 * column)).astype(np.uint8)
    one = calibration._cut(Image.fromarray(plane), (h, w), None)[:, :, 0].astype(int)
    assert one.shape == (h, w)
    scale = max(h / height, w / width)
    # The crop may be off the centre by half a pixel, the rounded size by another; a slope is 255 / side.
    bound = 2 + 2 * 255 / (min(width, height) * scale)
    assert np.abs(one - one[::-1]).max() <= bound and np.abs(one - one[:, ::-1]).max() <= bound


def test_resize_cuts_out_the_centre(tmp_path: Path) -> None:
    made = tmp_path / "pictures"
    made.mkdir()
    pixels = np.full((64, 96, 3), 10, np.uint8)
    pixels[16:48, 32:64] = 200  # the middle half of the shorter side
    Image.fromarray(pixels).save(made / "a.png")
    near = read(made, input_range="0..255", resize=64)
    far = read(made, input_range="0..255", resize=32)
    assert (near == 200).all()
    assert (far == 10).any() and np.array_equal(far, read(made, input_range="0..255"))


def test_free_sizes_are_the_first_pictures(tmp_path: Path) -> None:
    made = tmp_path / "pictures"
    made.mkdir()
    for name, size in (("b", (40, 60)), ("a", (50, 30)), ("c", (8, 9))):
        Image.fromarray(np.zeros((*size, 3), np.uint8)).save(made / f"{name}.bmp")
    spec = InputSpec("x", "float32", ("n", 3, "h", "w"))
    assert read(made, spec).shape == (3, 3, 50, 30)
    assert read(made, spec, resize=60).shape == (3, 3, 100, 60)


def test_many_pictures_are_thinned_evenly(tmp_path: Path) -> None:
    x = np.broadcast_to(np.arange(200, dtype=np.uint8)[:, None, None, None], (200, 32, 32, 3))
    np.save(tmp_path / "x.npy", x)
    kept = read(tmp_path / "x.npy", most=100, input_range="0..255")[:, 0, 0, 0]
    assert len(kept) == 96 and kept[0] == 0 and set(np.diff(kept)) <= {2, 3}
    fixed = InputSpec("x", "float32", (3, 3, 32, 32))
    assert len(read(tmp_path / "x.npy", fixed, most=100)) == 99


# --- what the network tells ---------------------------------------------------------------------------------


def wants(file: Path, wanted: Range, reverse: bool = False) -> Network:
    """Return a network that was taught on standardised RGB pictures, changed to want another preparation."""
    proto = onnx.load(file)
    old = proto.graph.input[0].name
    # Bytes have the mean 118 and the deviation 55, about; standardised ones become such bytes and back.
    shift, scale = wanted.shift or (118.0,), wanted.scale or (55.0,)
    constants = {
        "a": np.float32(scale[0] / 55),
        "b": np.float32((shift[0] - 118) / 55),
        "r": np.array([2, 1, 0]),
    }
    nodes = [
        onnx.helper.make_node("Gather", ["new", "r"], ["ordered"], axis=1),
        onnx.helper.make_node("Mul", ["ordered" if reverse else "new", "a"], ["scaled"]),
        onnx.helper.make_node("Add", ["scaled", "b"], [old]),
    ][0 if reverse else 1 :]
    rest = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend([*nodes, *rest])
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()
    )
    proto.graph.input[0].name = "new"
    made = model.read(proto)
    return Network(made, weights.find(made.ir), threads=1)


@pytest.mark.parametrize("wanted", RANGES, ids=[r.name for r in RANGES])
def test_remembered_statistics_choose_the_range_of_made_up_pictures(wanted: Range) -> None:
    network = wants(needed("models/cifar10_resnet56.onnx"), wanted)
    misfit = normalisation.misfit(network)
    assert misfit is not None
    spec = InputSpec("new", "float32", ("n", 3, 32, 32))
    found = probes.make([spec], samples=32, seed=0, misfit=misfit)
    assert np.array_equal(
        whole(found, "new"), whole(probes.make([spec], samples=32, seed=0, wanted=wanted), "new")
    )


@pytest.mark.parametrize("file", ["resnet20", "googlenet_narrow"])
def test_folded_statistics_tell_nothing(file: str) -> None:
    assert normalisation.misfit(wants(needed(f"models/cifar10_{file}.onnx"), STANDARDISED)) is None


def test_statistics_of_nought_and_one_tell_nothing() -> None:
    assert (
        normalisation.misfit(wants(needed("models/imagenet_resnet18_large_ktb.onnx"), STANDARDISED)) is None
    )


def test_a_range_must_be_clearly_better() -> None:
    for share, best in ((0.49, CENTRED), (0.51, STANDARDISED)):
        assert by_statistics(lambda r, s=share: s if r is CENTRED else 1.0) is best
    assert by_statistics(lambda r: np.nan if r is CENTRED else 1.0) is STANDARDISED  # float16 overflowed


def test_unknown_answers_keep_the_pictures_as_they_are() -> None:
    rng = np.random.default_rng(0)
    boxes = rng.normal(size=(8, 5, 9))  # of many positions, not of classes
    for scores in (boxes, np.ones((8, 1)), np.ones((8, 10))):
        assert by_answers(lambda r, o, z=scores: z * (100 if o else 1)) == (STANDARDISED, False)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("wanted", RANGES, ids=[r.name for r in RANGES])
@pytest.mark.parametrize("file", ["resnet20", "resnet56"])  # without statistics, with
def test_answers_to_real_pictures_choose_range_and_order(
    tmp_path: Path, file: str, wanted: Range, reverse: bool
) -> None:
    pictures = np.load(needed("eval/cifar10_calibration1024.npz"))["x"][64:128]
    network = wants(needed(f"models/cifar10_{file}.onnx"), wanted, reverse)
    np.save(tmp_path / "x.npy", pictures)
    spec = InputSpec("new", "float32", ("n", 3, 32, 32))
    found, told = calibration.load(
        [spec],
        Settings(calibrate=tmp_path / "x.npy"),
        most=64,
        answers=network.answers(),
        misfit=normalisation.misfit(network),
    )
    assert told is wanted
    order = "bgr" if reverse else "rgb"
    bare, _ = calibration.load([spec], Settings(calibrate=tmp_path / "x.npy", channel_order=order), most=64)
    if wanted is STANDARDISED:
        assert np.array_equal(whole(found, "new"), whole(bare, "new"))
    plain = whole(found, "new").mean((0, 2, 3), dtype=np.float64)
    means = pictures.mean((0, 1, 2))[:: -1 if reverse else 1]
    if wanted.shift is not None:
        expected = (means - wanted.shift[0]) / wanted.scale[0]
        # every number is scaled and shifted in float32
        assert np.abs(plain - expected).max() < 4 * 2.0**-23 * np.abs(means / wanted.scale[0]).max()


# --- mixing -------------------------------------------------------------------------------------------------


def test_made_up_pictures_fill_up_in_the_range_of_the_real_ones(tmp_path: Path) -> None:
    pictures = np.load(needed("eval/cifar10_calibration1024.npz"))["x"]
    network = wants(needed("models/cifar10_resnet20.onnx"), RANGES[2])
    for count, expected in ((48, (48, 80)), (160, ())):
        np.save(tmp_path / "x.npy", pictures[:count])
        settings = Settings(calibrate=tmp_path / "x.npy")
        found = preparation.probes_for(
            runtime.input_specs(network.specification), settings, network, usual=192
        )
        assert found.parts == expected and found.samples == (128 if expected else 160)
        x = whole(found, "new")
        assert x.min() >= 0 and x.max() <= 1
        for part in found.split(0.75) if expected else ():
            assert (
                abs(part.parts[0] - part.samples * 48 / 128) <= 1.5
            )  # whole pictures, and the share is rounded
            real = {p.tobytes() for p in whole(found, "new")[:48]}
            assert sum(p.tobytes() in real for p in whole(part, "new")) == part.parts[0]


@limits(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.02, 0.98))
def test_a_split_holds_out_some_of_each_kind(a: int, b: int, share: float) -> None:
    spec = InputSpec("z", "float32", ("n", 2))
    both = probes.make([spec], samples=a, seed=0).join(probes.make([spec], samples=b, seed=1))
    assert both.fits(both) and both.parts[0] >= a and sum(both.parts) == both.samples
    fit, held = both.split(share)
    assert [m + n for m, n in zip(fit.parts, held.parts, strict=True)] == list(both.parts)
    assert (fit.samples, held.samples) == (sum(fit.parts), sum(held.parts))
    if held.samples >= 4 and min(both.parts) / both.samples > 1 / held.samples:
        assert min(held.parts) > 0
    sums = np.sort(np.concatenate([whole(p, "z") for p in (fit, held)]).sum(1))
    assert np.array_equal(sums, np.sort(whole(both, "z").sum(1)))


def test_what_is_ready_is_joined_by_pictures_like_it(tmp_path: Path) -> None:
    mean, deviation = np.array([3.0, -2.0, 0.5]), np.array([0.1, 7.0, 1.0])
    x = np.random.default_rng(0).normal(size=(64, 3, 32, 32)) * deviation[:, None, None] + mean[:, None, None]
    np.save(tmp_path / "x.npy", x)
    _, told = calibration.load([PICTURE], Settings(calibrate=tmp_path / "x.npy"), most=64)
    made = whole(probes.make([PICTURE], samples=64, seed=0, wanted=told))
    assert np.abs((made.mean((0, 2, 3)) - mean) / deviation).max() < 0.3
    assert np.abs(np.log(made.std((0, 2, 3)) / deviation)).max() < 0.2


def test_samples_of_other_sizes_do_not_fit() -> None:
    def made(*shape: int | str, dtype: str = "float32") -> Probes:
        return probes.make([InputSpec("z", dtype, shape)], samples=4, seed=0)

    assert made("n", 5).fits(made("n", 5))
    assert not made("n", 5).fits(made("n", 6))
    assert not made("n", 5).fits(made(2, 5))
    assert not made(2, 5).fits(made(4, 5))


# --- refusals -----------------------------------------------------------------------------------------------


def refused(path: Path, why: str, spec: InputSpec = PICTURE, **options: object) -> None:
    with pytest.raises(UsageError, match=why) as e:
        read(path, spec, **options)
    assert "\n" not in e.value.message and e.value.message.endswith(".")


def test_folders_that_cannot_be_used(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no picture")
    refused(tmp_path / "absent", "is not there")
    refused(folder / "0.png", "neither a folder")
    refused(folder, "takes none", InputSpec("z", "float32", ("n", 7)))
    (folder / "9.png").write_text("hello")
    refused(folder, "9.png cannot be read as a picture")
    (folder / "9.png").unlink()
    Image.fromarray(np.repeat(PIXELS[0], 8, axis=0)).save(folder / "9.jpeg", quality=95)
    (folder / "9.jpeg").write_bytes((folder / "9.jpeg").read_bytes()[:-600])
    refused(folder, "9.jpeg cannot be read as a picture.*truncated")
    (folder / "9.jpeg").write_bytes(b"")
    refused(folder, "9.jpeg cannot be read")
    damaged = bytearray((folder / "0.png").read_bytes())
    damaged[60] ^= 255
    (folder / "9.jpeg").unlink()
    (folder / "0.png").write_bytes(damaged)
    refused(folder, "0.png cannot be read")


def test_arrays_that_cannot_be_used(tmp_path: Path) -> None:
    file = tmp_path / "x.npy"
    np.save(file, np.array([{}, None], object), allow_pickle=True)
    refused(file, "pickled objects")
    file.write_text("hello")
    refused(file, "pickled objects or no whole array")
    np.save(file, PIXELS)
    file.write_bytes(file.read_bytes()[:-9])
    refused(file, "no whole array")
    np.save(file, PIXELS[..., :2])
    refused(file, r"no set of pictures with 3 channels; give \(samples, height, width, 3\)")
    np.save(file, PIXELS[0])
    refused(file, "no set of pictures")
    np.save(file, PIXELS[:0])
    refused(file, "no set of pictures|holds no sample")
    np.save(file, np.zeros((4, 5, 32, 32), F32))
    refused(file, "make axis 1 3 long")
    bad = np.zeros((4, 3, 32, 32), F32)
    bad[2, 1, 0, 0] = np.nan
    np.save(file, bad)
    refused(file, "NaN")
    with file.open("wb") as f:
        np.savez(f, x=PIXELS)
    refused(file, "name it .npz")
    np.savez(tmp_path / "x.npz", y=PIXELS)
    refused(tmp_path / "x.npz", "lacks the input 'x'")
    np.savez(tmp_path / "x.npz", x=PIXELS, y=PIXELS)
    refused(tmp_path / "x.npz", "holds 'y', which is no input")
    np.save(file, PIXELS[:5])
    refused(file, "multiple of 8", InputSpec("x", "float32", (8, 3, 32, 32)))
    np.save(file, np.float32(3))
    refused(file, "a single number")


def test_one_array_cannot_feed_two_inputs(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", PIXELS)
    specs = [InputSpec("a", "float32", ("n", 4)), InputSpec("b", "float32", ("n", 4))]
    with pytest.raises(UsageError, match=r"'a', 'b'; give a \.npz"):
        calibration.load(specs, Settings(calibrate=tmp_path / "x.npy"), most=9)


def test_options_that_do_not_fit_the_pictures(folder: Path, tmp_path: Path) -> None:
    refused(folder, "2 numbers.*3 channels", mean="0.1,0.2")
    refused(folder, "1 channel;", InputSpec("x", "float32", ("n", 1, 32, 32)), std="1,2,3")
    refused(folder, "outside of the range 0..1", mean="104,117,123")
    refused(folder, "--resize 31 is smaller", resize=31)
    refused(folder, "takes bytes as they are", InputSpec("x", "uint8", ("n", 3, 32, 32)), mean="0.5")
    np.save(tmp_path / "x.npy", np.zeros((4, 3, 32, 32), F32))
    refused(tmp_path / "x.npy", "--resize has nothing to do", resize=40)
    refused(tmp_path / "x.npy", "2 numbers", mean="1,2")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"mean": "0.5"}, "--mean prepares the pictures of --calibrate, which is missing"),
        ({"channel_order": "bgr"}, "--channel-order prepares"),
        ({"calibrate": "x", "inputs": "y.npz"}, "--calibrate and --inputs both"),
        ({"calibrate": "x", "channel_order": "grb"}, "rgb, bgr"),
        ({"calibrate": "x", "resize": 0}, "number of pixels"),
        ({"calibrate": "x", "input_range": "1..0"}, "two numbers such as"),
        ({"calibrate": "x", "input_range": "0-1"}, "two numbers such as"),
        ({"calibrate": "x", "mean": "a,b"}, "numbers with commas between"),
        ({"calibrate": "x", "mean": "nan"}, "numbers with commas between"),
        ({"calibrate": "x", "std": "1,0,1"}, "numbers above 0"),
    ],
)
def test_options_that_mean_nothing(options: dict[str, object], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        Settings(**options)


def test_a_missing_pillow_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(SetupError, match=r"onnxdp\[pictures\]"):
        read(folder)
    np.save(tmp_path / "x.npy", PIXELS)  # of the right size already
    assert len(read(tmp_path / "x.npy")) == 6
