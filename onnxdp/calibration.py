"""Real, unlabelled inputs: a folder of pictures or the user's arrays, prepared as the network wants them.

An ONNX file does not say how that is. The user's options do; without any, :mod:`onnxdp.ranges` finds out.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from onnxdp import archives
from onnxdp.answers import Answers
from onnxdp.errors import SetupError, UsageError
from onnxdp.inputs import InputSpec, Layout, channel_axis
from onnxdp.probes import BATCH, Probes, gathered
from onnxdp.ranges import STANDARDISED, TRIED, Misfit, Range, by_answers, by_statistics
from onnxdp.records import Array
from onnxdp.settings import Settings, parse_numbers, parse_range

__all__ = ["ENOUGH", "load", "sized"]

ENOUGH = 128
"""Real inputs beside which made-up ones have nothing to add."""
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_EVEN = 8
"""Many samples are cut to a multiple of this, so that feeds can be of one good size."""


def load(
    specs: Sequence[InputSpec],
    settings: Settings,
    *,
    most: int,
    answers: Answers | None = None,
    misfit: Misfit | None = None,
) -> tuple[Probes, Range | None]:
    """Read the inputs at ``settings.calibrate`` and prepare its pictures by the other settings.

    Bytes are pictures: cut to the network's size and mapped to its range. Floats are taken as they are,
    unless a mean or deviation is given.

    Parameters
    ----------
    specs : sequence of InputSpec
    settings : Settings
    most : int
        Samples to use; where there are more, as many evenly spread ones.
    answers, misfit : callable, optional
        What the network tells of pictures; without them bytes are standardised where no option says more.

    Returns
    -------
    probes : Probes
    range : Range or None
        The range that the pictures came in; None where no input is a picture.

    Raises
    ------
    UsageError
        What is there cannot be read or does not fit; the sentence says which file, why, and what would.
    SetupError
        Pillow is needed and missing.
    """
    path = settings.calibrate
    assert path is not None
    wished = _wished(settings)
    plan = Layout.of(specs, BATCH)
    images = {s.name: s for s in specs if s.kind == "image"}
    arrays, exact = {}, {}
    for name, x in _arrays(path, specs, settings, most, plan).items():
        if name in images and x.dtype == np.uint8:
            exact[name] = _pictures(path, images[name], x, settings)
        else:
            arrays[name] = _as_they_are(path, name, images.get(name), x, settings)
    loose = [n for n in exact if images[n].dtype != "uint8"]
    if wished is not None:
        _suits(wished, settings, exact, loose)
    means = {n: exact[n].mean((0, 2, 3), dtype=np.float64) for n in loose}
    spreads = {n: exact[n].std((0, 2, 3), dtype=np.float64) for n in loose}

    def prepared(chosen: Range, reverse: bool, samples: slice) -> dict[str, Array]:
        """Prepare some of the samples of all inputs."""
        made = {}
        for name, x in exact.items():
            x, step = x[samples], -1 if reverse else 1
            if name in loose:
                x = chosen(x[:, ::step], means[name][::step], spreads[name][::step] + 1e-6)
            made[name] = x.astype(images[name].dtype)
            if channel_axis(images[name].shape) == 3:
                made[name] = made[name].transpose(0, 2, 3, 1)
        rest = {n: x[samples] if plan.axes.get(n) == 0 else x for n, x in arrays.items()}
        return {n: np.ascontiguousarray(x) for n, x in (made | rest).items()}

    few = gathered(path, specs, prepared(wished or STANDARDISED, False, slice(_whole(TRIED, plan))))
    chosen, reverse = wished or STANDARDISED, settings.channel_order == "bgr"
    if wished is None and loose:
        starts = range(0, few.samples, few.batch)

        def feeds(r: Range, flipped: bool) -> list[Mapping[str, Array]]:
            return [prepared(r, flipped, slice(k, k + few.batch)) for k in starts]

        colours = exact[loose[0]].shape[1] > 1 and settings.channel_order is None
        chosen, reverse = _told(feeds, (False, True) if colours else (reverse,), answers, misfit)
    found = gathered(path, specs, prepared(chosen, reverse, slice(None)))
    if loose or not images or exact:
        return found, chosen if loose else None
    return found, _range_of(found, images[next(iter(images))])


def sized(specs: Sequence[InputSpec], probes: Probes) -> list[InputSpec]:
    """Return the inputs with every size that the probes settle, the number of samples apart."""

    def shape(spec: InputSpec) -> tuple[Any, ...]:
        real = probes.feeds[0][spec.name].shape
        free = probes.axes[spec.name] if probes.dynamic else None
        return tuple(d if i == free else n for i, (d, n) in enumerate(zip(spec.shape, real, strict=True)))

    return [replace(s, shape=shape(s)) for s in specs]


def _told(
    feeds: Callable[[Range, bool], list[Mapping[str, Array]]],
    orders: tuple[bool, ...],
    answers: Answers | None,
    misfit: Misfit | None,
) -> tuple[Range, bool]:
    """Choose range and order by what the network remembers, and by its answers where that says nothing."""
    known: tuple[Range, ...] | None = None
    if misfit is not None:
        apart = misfit
        known = (by_statistics(lambda r: apart(feeds(r, orders[0]))),)
    if answers is None:
        return (known or (STANDARDISED,))[0], orders[0]
    asked = answers

    def scores(r: Range, reverse: bool) -> Array:
        return np.concatenate([asked(f) for f in feeds(r, reverse)])

    return by_answers(scores, known, orders) if known else by_answers(scores, orders=orders)


def _wished(settings: Settings) -> Range | None:
    """Return the range that the options name; None where they name none."""
    if settings.input_range is settings.mean is settings.std is None:
        return None
    low, high = parse_range(settings.input_range or "0..1")
    mean = parse_numbers("--mean", settings.mean or "0" if low <= 0 <= high else str(low))
    std = parse_numbers("--std", settings.std or "1")
    unit = 255 / (high - low)
    return Range("as asked", tuple((m - low) * unit for m in mean), tuple(s * unit for s in std))


def _suits(wished: Range, settings: Settings, exact: Mapping[str, Array], loose: Sequence[str]) -> None:
    """Refuse options that do not fit the pictures."""
    for name in (n for n in exact if n not in loose):
        raise UsageError(
            f"The input {name!r} takes bytes as they are in a picture; "
            "leave out --mean, --std and --input-range."
        )
    for name in loose:
        channels = exact[name].shape[1]
        for option, numbers in (("--mean", wished.shift), ("--std", wished.scale)):
            if numbers is not None and len(numbers) not in (1, channels):
                raise UsageError(
                    f"{option} has {len(numbers)} numbers and the input {name!r} has {channels} "
                    f"channel{'s' * (channels > 1)}; give one number per channel."
                )
    if loose and settings.mean is not None and any(not 0 <= s <= 255 for s in wished.shift or ()):
        raise UsageError(
            f"--mean {settings.mean} lies outside of the range {settings.input_range or '0..1'}; "
            "say what it is the mean of with --input-range, such as 0..255."
        )


def _arrays(
    path: Path, specs: Sequence[InputSpec], settings: Settings, most: int, plan: Layout
) -> dict[str, Array]:
    """Read what is at ``path``: at most ``most`` samples of each input, in whole batches."""
    images = [s for s in specs if s.kind == "image"]
    only = (list(specs) if len(specs) == 1 else images) if len(images) <= 1 else []
    if path.suffix.lower() == ".npz" and not path.is_dir():
        arrays = archives.read(path)
    elif len(only) != 1:
        raise UsageError(
            f"{path} can feed one input and the model has {archives.some(s.name for s in specs)}; "
            "give a .npz with one array per input."
        )
    elif path.is_dir():
        files = _listed(path)
        if only[0].kind != "image":
            raise UsageError(
                f"{path} is a folder of pictures and the input {only[0].name!r} "
                f"({archives.shown(only[0].shape)}) takes none; give a .npy."
            )
        files = [files[i] for i in _spread(len(files), most, plan)]
        return {only[0].name: _decoded(files, only[0], settings)}
    elif path.suffix.lower() == ".npy":
        arrays = {only[0].name: archives.read_one(path)}
    elif not path.exists():
        raise UsageError(f"{path} is not there; give a folder of pictures, a .npy or a .npz.")
    else:
        raise UsageError(
            f"{path} is neither a folder of pictures nor a .npy or .npz; put pictures into a folder."
        )
    for spec in specs:
        if plan.axes.get(spec.name) == 0 and spec.name in arrays and not arrays[spec.name].ndim:
            raise UsageError(
                f"{spec.name!r} in {path} is a single number and the model takes "
                f"{archives.shown(spec.shape)}; save an array of samples."
            )
    counted = {n: x for n, x in arrays.items() if plan.axes.get(n) == 0}
    return {n: x[_spread(len(x), most, plan)] if n in counted else x for n, x in arrays.items()}


def _spread(samples: int, most: int, plan: Layout) -> Array:
    """Return the indices of at most ``most`` samples, evenly spread, in whole batches."""
    kept = min(samples, _whole(most, plan))
    step = (_EVEN if kept >= ENOUGH // 2 else 1) if plan.dynamic else plan.batch
    kept = kept - kept % step if kept >= step else kept
    return np.arange(kept) * samples // max(kept, 1)


def _whole(samples: int, plan: Layout) -> int:
    """Return so many samples in whole batches, two of them at least, where the batch is fixed."""
    return samples if plan.dynamic else max(2, samples // plan.batch) * plan.batch


def _listed(folder: Path) -> list[Path]:
    """List the pictures of a folder by name."""
    files = sorted(
        f for f in folder.iterdir() if f.suffix.lower() in _SUFFIXES and not f.name.startswith(".")
    )
    if not files:
        raise UsageError(
            f"{folder} holds no picture ({', '.join(s[1:] for s in _SUFFIXES)}); "
            "give the folder that they lie in."
        )
    return files


def _pillow() -> Any:
    """Import Pillow."""
    try:
        from PIL import Image
    except ImportError as e:
        raise SetupError(
            "Pillow is needed to read and resize pictures and is not installed; "
            "install it with: pip install 'onnxdp[pictures]'."
        ) from e
    return Image


def _decoded(files: Sequence[Path], spec: InputSpec, settings: Settings) -> Array:
    """Decode pictures, all cut to one size; uint8 of shape (n, height, width, channels)."""
    image, channels = _pillow(), _channels(spec)
    found: list[Array] = []
    size: tuple[int, int] | None = None
    for file in files:
        try:
            with image.open(file) as opened:
                picture = opened.convert("L" if channels == 1 else "RGB")
        except (OSError, SyntaxError, ValueError, struct.error, image.DecompressionBombError) as e:
            reason = " ".join(str(e).split())
            raise UsageError(f"{file} cannot be read as a picture ({reason}); remove or replace it.") from e
        size = size or _target(spec, picture.size[::-1], settings)
        found.append(_cut(picture, size, settings.resize))
    return np.stack(found)


def _pictures(path: Path, spec: InputSpec, x: Array, settings: Settings) -> Array:
    """Cut an array of bytes to the network's size; uint8 of shape (n, channels, height, width)."""
    axis, channels = channel_axis(x.shape), _channels(spec)
    if axis is None or x.shape[axis] != channels or not x.size:
        raise UsageError(
            f"{spec.name!r} in {path} has the shape {archives.shown(x.shape)}, which is no set of "
            f"pictures with {channels} channel{'s' * (channels > 1)}; "
            f"give (samples, height, width, {channels})."
        )
    x = x if axis == 3 else x.transpose(0, 2, 3, 1)
    size = _target(spec, x.shape[1:3], settings)
    if size != x.shape[1:3] or settings.resize not in (None, min(size)):
        image = _pillow()
        flat = (image.fromarray(np.ascontiguousarray(p[:, :, 0] if channels == 1 else p)) for p in x)
        x = np.stack([_cut(p, size, settings.resize) for p in flat])
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2))


def _channels(spec: InputSpec) -> int:
    """Return how many channels an input's pictures have: 1 or 3."""
    axis = channel_axis(spec.shape)
    size = None if axis is None else spec.shape[axis]
    return size if isinstance(size, int) else 3


def _target(spec: InputSpec, first: tuple[int, ...], settings: Settings) -> tuple[int, int]:
    """Return height and width to cut to: the network's, where they are free those of the first picture."""
    down = 2 if channel_axis(spec.shape) == 1 else 1
    scale = settings.resize / min(first) if settings.resize else 1
    sides = [
        d if isinstance(d, int) else round(n * scale)
        for d, n in zip(spec.shape[down : down + 2], first, strict=True)
    ]
    if settings.resize is not None and settings.resize < min(sides):
        raise UsageError(
            f"--resize {settings.resize} is smaller than the pictures of {sides[0]}x{sides[1]} that the "
            f"model takes; give {min(sides)} or more."
        )
    return sides[0], sides[1]


def _cut(picture: Any, size: tuple[int, int], shorter: int | None) -> Array:
    """Resize a Pillow image to a shorter side, or to cover ``size``; return its centre, (h, w, channels)."""
    (height, width), (w, h) = size, picture.size
    cover = max(height / h, width / w)
    scale = cover if shorter is None else max(cover, shorter / min(h, w))
    new = max(width, round(w * scale)), max(height, round(h * scale))
    if new != (w, h):
        picture = picture.resize(new, _pillow().Resampling.BILINEAR)
    left, top = (new[0] - width) // 2, (new[1] - height) // 2
    x = np.asarray(picture.crop((left, top, left + width, top + height)))
    return x[:, :, None] if x.ndim == 2 else x


def _as_they_are(path: Path, name: str, spec: InputSpec | None, x: Array, settings: Settings) -> Array:
    """Take an array as it is, floats in the input's type; a given mean and deviation are applied."""
    if spec is None:
        return x
    for option in ("resize", "channel_order", "input_range"):
        if getattr(settings, option) is not None:
            raise UsageError(
                f"{name!r} in {path} is {x.dtype.name} and taken as it is, so that "
                f"--{option.replace('_', '-')} has nothing to do; leave it out, or save bytes (uint8)."
            )
    if x.dtype.kind != "f" or np.dtype(spec.dtype).kind != "f":
        return x
    axis = channel_axis(spec.shape)
    if (settings.mean or settings.std) and axis is not None and x.ndim == 4:
        shape = [1, 1, 1, 1]
        shape[axis] = -1
        mean = np.asarray(parse_numbers("--mean", settings.mean or "0")).reshape(shape)
        std = np.asarray(parse_numbers("--std", settings.std or "1")).reshape(shape)
        for option, numbers in (("--mean", mean), ("--std", std)):
            if numbers.size not in (1, x.shape[axis]):
                raise UsageError(
                    f"{option} has {numbers.size} numbers and {name!r} in {path} has {x.shape[axis]} "
                    "channels; give one number per channel."
                )
        x = (x - mean) / std
    return x.astype(spec.dtype)


def _range_of(probes: Probes, spec: InputSpec) -> Range:
    """Return the range in which ordinary pictures are like those that were given ready."""
    axis = channel_axis(spec.shape)
    assert axis is not None
    x = np.concatenate([f[spec.name] for f in probes.feeds]).astype(np.float64)
    axes = tuple(i for i in range(4) if i != axis)
    return Range.like(x.mean(axes), x.std(axes))
