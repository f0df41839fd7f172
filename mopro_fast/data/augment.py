"""The two views' augmentations: their random numbers and crop boxes (numpy, host). Colours: ops/colour.py.

view_q: random resized crop, horizontal flip. view_k: the same, with areas of its own where these are set, and with
grayscale and colour jitter before the flip.
Source: DataLoader/dataloader.py of salesforce/MoPro; the arithmetic is that of torchvision's transforms on
Pillow images, down to the rounding to 8 bits after every operation.
"""

from dataclasses import dataclass

import numpy as np

from mopro_fast.config import AugmentConfig
from mopro_fast.ops.colour import Jitter

ATTEMPTS = 10  # boxes that RandomResizedCrop tries before it takes the central one
WIDEST = 4 / 3  # a crop's width over its height lies between the inverse of this and this
_PER_CROP = 2 * ATTEMPTS + 3
_PER_ROW = 2 * _PER_CROP + 9  # uniforms of one row: both views' crops and flips, grayscale, 4 factors, 4 order keys


@dataclass(frozen=True)
class Crops:
    """The random numbers of n resized crops with flip; they fix a box once an image's size is known."""

    sides: np.ndarray
    """float64 [n, 10, 2]: height and width of every attempt, over the square root of the image's area."""
    place: np.ndarray
    """float64 [n, 2]: vertical and horizontal position in [0, 1) among those where the box fits."""
    flip: np.ndarray
    """bool [n]."""


@dataclass(frozen=True)
class Views:
    """What :func:`draw` draws."""

    q: Crops
    k: Crops
    jitter: Jitter
    """Of view_k."""


def draw(rng: np.random.Generator, n: int, config: AugmentConfig, skip: int = 0) -> Views:
    """Draw the numbers of rows [skip, skip + n) of a batch; ``rng`` must stand at the batch's first row.

    Every row takes the same count of uniforms, so a rank passes over other ranks' rows without drawing them.
    ``rng`` needs a bit generator that can advance, such as PCG64.
    """
    rng.bit_generator.advance(skip * _PER_ROW)
    u = rng.random((n, _PER_ROW))
    q, k, colour = np.split(u, [_PER_CROP, 2 * _PER_CROP], axis=1)
    strength = np.array([config.brightness, config.contrast, config.saturation, config.hue])
    factors = np.array([1.0, 1.0, 1.0, 0.0]) + strength * (2 * colour[:, 1:5] - 1)
    used = np.flatnonzero(strength)  # an operation of strength 0 is left out, as ColorJitter does
    order = used[colour[:, 5:][:, used].argsort(1)]
    jitter = Jitter(colour[:, 0] < config.grayscale, factors.astype(np.float32), order)
    crops = _crops(q, config.scale, config.flip), _crops(k, config.scale_k or config.scale, config.flip)
    return Views(*crops, jitter)


def _crops(u: np.ndarray, scale: tuple[float, float], flip: float) -> Crops:
    low, high = scale
    area = low + (high - low) * u[:, :ATTEMPTS]
    ratio = np.exp(np.log(WIDEST) * (2 * u[:, ATTEMPTS : 2 * ATTEMPTS] - 1))
    sides = np.stack([np.sqrt(area / ratio), np.sqrt(area * ratio)], axis=2)
    return Crops(sides, u[:, -3:-1], u[:, -1] < flip)


def crop_boxes(shapes: np.ndarray, crops: Crops) -> np.ndarray:
    """int64 [n, 4] (top, left, height, width) of the crops in images of these ``shapes``, int [n, 2] (H, W).

    RandomResizedCrop.get_params of torchvision: the first attempt that fits, else the central box whose ratio
    is as near to the image's as WIDEST allows.
    """
    shapes = np.asarray(shapes, np.int64)
    root = np.sqrt(shapes.prod(1).astype(np.float64))
    tried = np.floor(root[:, None, None] * crops.sides + 0.5).astype(np.int64)  # [n, 10, 2]
    fits = ((tried >= 1) & (tried <= shapes[:, None])).all(2)
    central = np.minimum(shapes, np.floor(shapes[:, ::-1] * WIDEST + 0.5).astype(np.int64))
    found = fits.any(1)[:, None]
    size = np.where(found, tried[np.arange(len(tried)), fits.argmax(1)], central)
    room = shapes - size
    corner = np.where(found, np.floor(crops.place * (room + 1)).astype(np.int64), room // 2)
    return np.concatenate([corner, size], axis=1)
