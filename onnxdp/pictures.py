"""Made-up pictures with the statistics of natural ones: things in front of textured dead leaves.

Leaves (discs, rectangles, polygons) of sizes ``p(s) ~ s^-3`` cover each other and a background.
That alone gives edges at all scales, occlusion and a power spectrum near ``1 / f^2``, which is what the
first layers of a convolutional network answer to. A leaf is filled with one colour of the picture's palette
and shaded, striped, chequered or noisy; colours are mostly grey; the whole is bent, so that outlines curve.

What the last layers answer to lies in things: up to three with a curved, often symmetric outline, shaded as
if round, with a texture that follows their form, before a background that may be out of focus. Pictures
would still be too alike: some layers are patterns, random small networks of the position, instead of leaves.

References
----------
Lee, Mumford and Huang, "Occlusion models for natural images", IJCV 41 (2001).
Baradad et al., "Learning to see by looking at noise", NeurIPS 2021.
Stanley, "Compositional pattern producing networks", Genetic Programming and Evolvable Machines 8 (2007).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import lru_cache

import numpy as np

from onnxdp.records import Array

_SUPERSAMPLED = 64
"""Pictures up to this many pixels (shorter side) are drawn at twice the size."""
_DETAIL = 56
"""The smallest leaf has a radius of the picture's side over this (at least 3 drawn pixels)."""
_COVER = 2.2
"""Drawn area of all leaves over the picture's: exp(-2.2) = 11 % shows the backmost layer, one large leaf."""
_BEND = 0.05
"""About how far a leaf's outline is moved, over the picture's side."""
_PATTERNS = 0.4
"""Share of the layers that are patterns."""
_THINGS = (0, 1, 1, 2, 3)
"""How many things there may be, one as likely as the other."""
_UNITS = 8
"""Units of each layer of a pattern's network: equally many sines, sigmoids, folds and ramps."""


def draw(indices: Iterable[int], channels: int, height: int, width: int, seed: int) -> Array:
    """Draw pictures; picture ``i`` depends on ``(seed, i)`` alone.

    Parameters
    ----------
    indices : iterable of int
        Which pictures.
    channels : int
        1 (grey) or 3.
    height, width : int
        Pixels.
    seed : int

    Returns
    -------
    ndarray of uint8, shape (n, channels, height, width)
        Like pictures from a file: 0 to 255, clipped.
    """
    drawn = [
        _picture(np.random.Generator(np.random.PCG64([seed, i])), channels, height, width) for i in indices
    ]
    return np.stack(drawn) if drawn else np.empty((0, channels, height, width), np.uint8)


def _picture(rng: np.random.Generator, channels: int, height: int, width: int) -> Array:
    """One picture, uint8 of shape (channels, height, width)."""
    zoom = 2 if min(height, width) <= _SUPERSAMPLED else 1
    x = _scene(rng, channels, zoom * height, zoom * width, zoom)
    if zoom == 2:
        x = (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4
    # One light pass stands in for antialiasing where nothing was supersampled; the rest is the lens.
    for _ in range(int(rng.integers(0, 2)) if zoom == 2 else int(rng.integers(1, 4))):
        x = _smooth(_smooth(x, 1), 2)
    contrast = 52.0 * math.exp(rng.normal(0.0, 0.3))
    x = x * (contrast / max(float(x.std()), 1e-3))
    x += 118.0 + rng.normal(0.0, 12.0) - float(x.mean())
    return np.clip(np.rint(x), 0, 255).astype(np.uint8)


def _scene(rng: np.random.Generator, channels: int, height: int, width: int, zoom: int) -> Array:
    """Things in front of a background; float32 of shape (channels, height, width), any scale."""

    def layer() -> Array:
        if rng.random() < _PATTERNS:
            x = _pattern(rng, channels, height, width)
        else:
            x = _bent(rng, _fill(rng, *_label_map(rng, height, width), zoom, channels))
        return np.asarray(x / max(float(x.std()), 1e-3), np.float32)

    x = layer()
    things = int(rng.choice(_THINGS))
    if things:  # the background may be out of focus
        for _ in range(int(rng.uniform(0, 10) * math.sqrt(height * width) / 224)):
            x = _smooth(_smooth(x, 1), 2)
    for _ in range(things):
        _put_thing(rng, x, layer)
    return x


def _bent(rng: np.random.Generator, x: Array) -> Array:
    """Move every pixel a little, neighbours alike; (channels, height, width)."""
    _, height, width = x.shape
    reach = _BEND * math.sqrt(height * width) * math.exp(rng.normal(0.0, 0.5))
    scales = ((3, 1.0), (7, 0.4), (16, 0.12))
    moved = np.sum([reach * share * _waves(rng, 2, height, width, cells) for cells, share in scales], 0)
    rows = np.rint(np.arange(height)[:, None] + moved[0]).clip(0, height - 1).astype(np.intp)
    columns = np.rint(np.arange(width) + moved[1]).clip(0, width - 1).astype(np.intp)
    return np.asarray(x[:, rows, columns])


def _waves(rng: np.random.Generator, count: int, height: int, width: int, cells: int) -> Array:
    """Smooth noise, deviation about 1: cubic B-splines over ``cells`` squared, (count, height, width)."""
    made = rng.standard_normal((count, cells + 3, cells + 3), dtype=np.float32)
    return np.asarray(1.6 * (_splines(height, cells) @ made @ _splines(width, cells).T))


@lru_cache(64)
def _splines(size: int, cells: int) -> Array:
    """Weights of cubic B-splines over ``cells`` at ``size`` places, (size, cells + 3)."""
    at = np.arange(size, dtype=np.float32) * np.float32(cells / size)
    cell = np.minimum(at.astype(np.intp), cells - 1)
    f = at - cell
    weights = ((1 - f) ** 3, 3 * f**3 - 6 * f**2 + 4, -3 * f**3 + 3 * f**2 + 3 * f + 1, f**3)
    spread = np.zeros((size, cells + 3), np.float32)
    for k, weight in enumerate(weights):
        spread[np.arange(size), cell + k] = weight / 6
    return spread


def _pattern(rng: np.random.Generator, channels: int, height: int, width: int) -> Array:
    """Let a small random network loose on the position and smooth noise; (channels, height, width)."""
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None].repeat(width, 1)
    x = np.linspace(-1, 1, width, dtype=np.float32)[None].repeat(height, 0)
    if rng.random() < 0.4:
        x = np.abs(x)  # mirrored
    place = np.stack([x, y, np.hypot(x, y)])
    noise = 0.5 * _waves(rng, 3, height, width, int(rng.integers(3, 12)))
    first = np.concatenate([place, noise]).reshape(6, -1)
    z, quarter = first, _UNITS // 4
    for _ in range(int(rng.integers(2, 5))):
        matrix = rng.normal(0.0, rng.uniform(0.5, 2.5), (_UNITS, len(z))).astype(np.float32)
        a = matrix @ z + rng.standard_normal((_UNITS, 1), dtype=np.float32)
        sines, sigmoids, folds, ramps = (a[k : k + quarter] for k in range(0, _UNITS, quarter))
        np.sin(3 * sines, out=sines)
        np.tanh(sigmoids, out=sigmoids)
        np.subtract(np.abs(folds), 1, out=folds)
        np.clip(ramps, -1, 1, out=ramps)
        z = np.concatenate([a, first[:3]])
    out = (rng.normal(size=(1, _UNITS)) + rng.normal(0.0, 0.35, (channels, _UNITS))).astype(np.float32)
    made = (out @ z[:_UNITS]).reshape(channels, height, width)
    grain = 0.1 * float(made.std())
    return np.asarray(made + grain * rng.standard_normal((1, height, width), dtype=np.float32))


def _put_thing(rng: np.random.Generator, x: Array, layer: Callable[[], Array]) -> None:
    """Draw a thing into (channels, height, width), in place."""
    channels, height, width = x.shape
    side = math.sqrt(height * width)
    size, longer = side * rng.uniform(0.16, 0.45), math.exp(rng.normal(0.0, 0.5))
    cy, cx = ((0.5 + rng.normal(0.0, 0.16, 2)) * (height, width)).tolist()  # float64 would spread
    angle = rng.random() * math.tau
    dy, dx = np.arange(height, dtype=np.float32)[:, None] - cy, np.arange(width, dtype=np.float32) - cx
    along, across = dx * math.cos(angle) + dy * math.sin(angle), dy * math.cos(angle) - dx * math.sin(angle)
    if rng.random() < 0.6:
        across = np.abs(across)  # both sides alike
    radius = np.hypot(along / longer, across * longer)
    depth = radius / (size * _outline(rng, np.arctan2(across * longer, along / longer)))
    inside = ((1 - depth) * (size / 1.5)).clip(0, 1)
    body = _skin(rng, side, along, across, radius, layer, channels)
    light = rng.normal(0.0, 0.7 / size, 2).tolist()
    body = body + (1.2 * np.sqrt((1 - depth**2).clip(0, 1)) - 0.72 + light[0] * along + light[1] * across)
    x += (body - x) * inside


def _outline(rng: np.random.Generator, direction: Array) -> Array:
    """How far a thing reaches into each direction (radians), about 1: a random Fourier series."""
    k = np.arange(2, 9)[:, None]
    size, phase = rng.normal(0.0, 0.5, k.shape) / k, rng.random(k.shape) * math.tau
    turn = np.linspace(-math.pi, math.pi, 361)
    reach = np.maximum(1 + (size * np.sin(k * turn + phase)).sum(0), 0.05).astype(np.float32)
    return np.asarray(reach[np.rint((direction + math.pi) * (360 / math.tau)).astype(np.intp)])


def _skin(
    rng: np.random.Generator,
    side: float,
    along: Array,
    across: Array,
    radius: Array,
    layer: Callable[[], Array],
    channels: int,
) -> Array:
    """Colour and texture of a thing: stripes, rings, checks or another layer; (channels, height, width)."""
    colour = rng.normal(0.0, 0.35, (channels, 1, 1)) + rng.normal()
    strength = rng.normal(0.0, 0.3, (channels, 1, 1)) + rng.normal(0.0, 0.8)
    kind = int(rng.integers(0, 4))
    if kind == 3:
        return np.asarray(0.7 * layer() + colour.astype(np.float32))
    frequency = math.tau / math.exp(rng.uniform(math.log(4), math.log(max(5.0, side / 4.5))))
    wobble = _waves(rng, 1, along.shape[0], along.shape[1], int(rng.integers(4, 20)))[0]
    texture = np.sin((radius if kind == 1 else along) * frequency + 2 * wobble)
    if kind == 2:
        texture = np.sign(texture * np.sin(across * frequency + wobble))
    return np.asarray(strength.astype(np.float32) * texture + colour.astype(np.float32))


def _label_map(rng: np.random.Generator, height: int, width: int) -> tuple[Array, Array, Array]:
    """Which leaf shows at each pixel.

    Returns
    -------
    label : ndarray of int32, shape (height, width)
    centres : ndarray of float32, shape (leaves, 2)
        Row and column.
    radii : ndarray of float32, shape (leaves,)
    """
    side = math.sqrt(height * width)
    low, high = max(3.0, side / _DETAIL), max(4.0, side / 2.2)
    # p(s) ~ s^-3 has the mean square 2 log(high / low) / (low^-2 - high^-2); a leaf fills about 2.6 r^2.
    mean_square = 2 * math.log(high / low) / (low**-2 - high**-2)
    count = math.ceil(_COVER * side**2 / (2.6 * mean_square))
    u = rng.random(count)
    radii = ((high**-2) + u * (low**-2 - high**-2)) ** -0.5
    radii[0] = 2 * side  # the backmost leaf is the background
    centres = rng.random((count, 2)) * (height, width)
    corners = rng.choice([0, 3, 4, 4, 5, 6], count)
    angles = rng.random(count) * math.tau
    stretch = np.exp(rng.normal(0.0, 0.35, count))
    sizes = np.array([1.0, 0, 0, 0.6, 0.8, 0.9, 0.9])[corners] * radii
    label = _painted(centres, sizes, corners, angles, stretch, (height, width))
    return label, centres.astype(np.float32), radii.astype(np.float32)


def _painted(
    centres: Array, sizes: Array, corners: Array, angles: Array, stretch: Array, shape: tuple[int, int]
) -> Array:
    """Lay the leaves over the first one in their order.

    A disc has a radius, any other leaf so many edges at that distance from its centre; rectangles are
    stretched. All are convex, so that each row of pixels of a leaf is one run.

    Returns
    -------
    ndarray of int32, the given shape
        Which leaf shows at each pixel.
    """
    height, width = shape
    many = np.maximum(corners, 1)
    longer = np.where(corners == 4, stretch, 1.0)
    reach = np.where(corners, sizes * np.maximum(2.0, 1.5 * longer), sizes)
    top = np.maximum(np.ceil(centres[:, 0] - reach), 0).astype(np.intp)
    rows = np.minimum(np.floor(centres[:, 0] + reach), height - 1).astype(np.intp) + 1 - top
    rows[0] = 0
    leaf, row = _ranges(top, np.maximum(rows, 0))
    dy, edged = row - centres[leaf, 0], corners[leaf] > 0
    right = np.where(edged, np.inf, np.sqrt(np.maximum(sizes[leaf] ** 2 - dy**2, 0.0)))
    left = -right
    for k in range(int(corners.max())):  # those of fewer edges meet theirs again
        normal = angles + k % many * math.tau / many
        far = sizes * np.where(k % 2, 1 / np.maximum(longer, 1.0), longer)
        dx = (far[leaf] - np.sin(normal)[leaf] * dy) / np.cos(normal)[leaf]
        ahead = (np.cos(normal) > 0)[leaf]
        np.minimum(right, dx, out=right, where=edged & ahead)
        np.maximum(left, dx, out=left, where=edged & ~ahead)
    start = np.clip(np.ceil(centres[leaf, 1] + left), 0, width).astype(np.intp)
    end = np.clip(np.ceil(centres[leaf, 1] + right), 0, width).astype(np.intp)
    run, pixel = _ranges(row * width + start, np.maximum(end - start, 0))
    label = np.zeros(height * width, np.int32)
    label[pixel] = leaf[run]  # of several, the last
    return label.reshape(shape)


def _ranges(starts: Array, counts: Array) -> tuple[Array, Array]:
    """Return, for every member of the ranges one after the other, which range it is of, and the member."""
    which = np.repeat(np.arange(len(counts)), counts)
    return which, np.arange(len(which)) + (starts - np.cumsum(counts) + counts)[which]


def _fill(
    rng: np.random.Generator, label: Array, centres: Array, radii: Array, zoom: int, channels: int
) -> Array:
    """Colour and texture of every leaf; float32 of shape (channels, height, width), any scale."""
    count, (height, width) = len(radii), label.shape
    colour, texture_colour = _palette(rng, count, channels)
    kind = rng.choice(5, count, p=[0.25, 0.2, 0.2, 0.2, 0.15])  # flat, shading, noise, stripes, checks
    strength = rng.gamma(2.0, 0.25, count)
    frequency = math.tau / (zoom * np.exp(rng.uniform(math.log(2.5), math.log(16.0), count)))
    direction = rng.random(count) * math.tau
    phase = rng.random(count) * math.tau
    shade = rng.normal(0.0, 0.6, (count, 2)) / np.minimum(radii, 64.0 * zoom)[:, None] * (kind != 0)[:, None]

    def at(values: Array) -> Array:
        return np.asarray(values.astype(np.float32)[label])

    y, x = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)
    level = y * at(shade[:, 0]) + x * at(shade[:, 1]) - at((centres * shade).sum(1))
    np.clip(level, -1.5, 1.5, out=level)
    rough = rng.standard_normal((height // zoom, width // zoom), dtype=np.float32)
    rough = rough.repeat(zoom, 0).repeat(zoom, 1)
    level += rough * at(np.where(kind == 2, strength, 0.04))
    wavy = np.flatnonzero((kind >= 3)[label.ravel()])
    leaf = label.ravel()[wavy]
    row, column = (wavy // width).astype(np.float32), (wavy % width).astype(np.float32)

    def wave(turn: float) -> Array:
        fy = (frequency * np.sin(direction + turn)).astype(np.float32)
        fx = (frequency * np.cos(direction + turn)).astype(np.float32)
        return np.asarray(np.sin(row * fy[leaf] + column * fx[leaf] + phase.astype(np.float32)[leaf]))

    swing = wave(0.0)
    check = (kind == 4)[leaf]
    swing[check] = 1.4 * np.sign(swing[check] * wave(math.pi / 2)[check])
    level.ravel()[wavy] += swing * strength.astype(np.float32)[leaf]
    return np.stack([at(colour[:, c]) + level * at(texture_colour[:, c]) for c in range(channels)])


def _palette(rng: np.random.Generator, count: int, channels: int) -> tuple[Array, Array]:
    """Colour and direction of texture of each leaf, (count, channels) each.

    A picture has 3 to 8 base colours. Luminance varies most; red-green and blue-yellow deviate by a share
    of it that differs between pictures, so that some are grey and few are gaudy.
    """
    entries = int(rng.integers(3, 9))
    chroma = rng.gamma(2.0, 0.1)
    opponent = np.array([[1.0, 1.0, 1.0], [0.7, -0.5, 0.1], [0.4, 0.2, -0.9]])
    amounts = np.array([1.0, chroma, chroma])
    base = rng.normal(size=(entries, 3)) * amounts
    own = base[rng.integers(0, entries, count)] + rng.normal(size=(count, 3)) * amounts * 0.25
    texture = np.concatenate([np.ones((count, 1)), rng.normal(size=(count, 2)) * chroma * 0.5], axis=1)
    if channels == 1:
        return own[:, :1], np.ones((count, 1))
    return own @ opponent, texture @ opponent


def _smooth(x: Array, axis: int) -> Array:
    """Binomial smoothing [1, 2, 1] / 4 along one axis of (channels, height, width), edges repeated."""
    out = 2 * x
    a, b = np.moveaxis(out, axis, 0), np.moveaxis(x, axis, 0)
    a[1:] += b[:-1]
    a[:-1] += b[1:]
    a[0] += b[0]
    a[-1] += b[-1]
    out *= np.float32(0.25)
    return out
