"""The two views' augmentations: their random numbers (numpy, host), crop boxes and colours (torch, any device).

view_q: random resized crop, horizontal flip. view_k: the same, with grayscale and colour jitter before the flip.
Source: DataLoader/dataloader.py of salesforce/MoPro; the arithmetic is that of torchvision's transforms on
Pillow images, down to the rounding to 8 bits after every operation.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch

from mopro_fast.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

ATTEMPTS = 10  # boxes that RandomResizedCrop tries before it takes the central one
RATIO = (3 / 4, 4 / 3)  # width:height of a crop
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
_PER_CROP = 2 * ATTEMPTS + 3
_PER_ROW = 2 * _PER_CROP + 9  # uniforms of one row: both views' crops and flips, grayscale, 4 factors, 4 order keys
_CPU_PIXELS = 1 << 20  # pixels per piece of color_jitter on a CPU; 2^18 and 2^22 were slower on one thread


@dataclass(frozen=True)
class AugmentConfig:
    """Strengths of the augmentations. A value out of range raises a UserError."""

    scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest area of a crop, as a fraction of the image."""
    flip: float = 0.5
    """Probability of a horizontal flip, in both views."""
    grayscale: float = 0.2
    """Probability that view_k loses its colours."""
    brightness: float = 0.4
    """view_k: brightness is multiplied by a factor of 1 ± this."""
    contrast: float = 0.4
    """view_k: contrast is multiplied by a factor of 1 ± this."""
    saturation: float = 0.4
    """view_k: saturation is multiplied by a factor of 1 ± this."""
    hue: float = 0.4
    """view_k: hue turns by up to ± this part of a full circle (at most 0.5)."""

    def __post_init__(self) -> None:
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise UserError(f"augment scale {low} {high}: give two numbers with 0 < smallest <= largest <= 1")
        highest = {"flip": 1, "grayscale": 1, "brightness": 1, "contrast": 1, "saturation": 1, "hue": 0.5}
        for name, limit in highest.items():
            value = getattr(self, name)
            if not 0 <= value <= limit:
                raise UserError(f"augment {name} must lie in [0, {limit}], got {value}")


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
class Jitter:
    """The random numbers of n colour augmentations; index it to take some of the rows."""

    gray: np.ndarray
    """bool [n]: to grayscale, before everything else."""
    factors: np.ndarray
    """float32 [n, 4] for brightness, contrast, saturation (1 = unchanged) and hue (0 = unchanged)."""
    order: np.ndarray
    """int64 [n, 4]: the four operations in the order they are applied."""

    def __len__(self) -> int:
        return len(self.gray)

    def __getitem__(self, rows: slice) -> "Jitter":
        return Jitter(self.gray[rows], self.factors[rows], self.order[rows])


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
    jitter = Jitter(colour[:, 0] < config.grayscale, factors.astype(np.float32), colour[:, 5:].argsort(1))
    return Views(_crops(q, config), _crops(k, config), jitter)


def _crops(u: np.ndarray, config: AugmentConfig) -> Crops:
    low, high = config.scale
    area = low + (high - low) * u[:, :ATTEMPTS]
    shape, log_ratio = u[:, ATTEMPTS : 2 * ATTEMPTS], np.log(RATIO)
    ratio = np.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * shape)
    sides = np.stack([np.sqrt(area / ratio), np.sqrt(area * ratio)], axis=2)
    return Crops(sides, u[:, -3:-1], u[:, -1] < config.flip)


def crop_boxes(shapes: np.ndarray, crops: Crops) -> np.ndarray:
    """int64 [n, 4] (top, left, height, width) of the crops in images of these ``shapes``, int [n, 2] (H, W).

    RandomResizedCrop.get_params of torchvision: the first attempt that fits, else the central box whose ratio
    is as near to the image's as RATIO allows.
    """
    shapes = np.asarray(shapes, np.int64)
    root = np.sqrt(shapes.prod(1).astype(np.float64))
    tried = np.floor(root[:, None, None] * crops.sides + 0.5).astype(np.int64)  # [n, 10, 2]
    fits = ((tried >= 1) & (tried <= shapes[:, None])).all(2)
    central = np.minimum(shapes, np.floor(shapes[:, ::-1] * [1 / RATIO[0], RATIO[1]] + 0.5).astype(np.int64))
    found = fits.any(1)[:, None]
    size = np.where(found, tried[np.arange(len(tried)), fits.argmax(1)], central)
    room = shapes - size
    corner = np.where(found, np.floor(crops.place * (room + 1)).astype(np.int64), room // 2)
    return np.concatenate([corner, size], axis=1)


def color_jitter(images: torch.Tensor, jitter: Jitter) -> torch.Tensor:
    """Grayscale and the four colour operations, each image with its own factors and order.

    images: uint8 [N, H, W, 3] on any device; -> a new tensor of the same kind. Which rows an operation takes is
    known on the host, and everything the device needs goes there in one copy: nothing waits for the device.
    A factor that changes nothing skips its operation, as ColorJitter(hue=0) does.
    """
    n, height, width, _ = images.shape
    if n != len(jitter):
        raise ValueError(f"jitter has {len(jitter)} rows, images has {n}")
    out = torch.empty_like(images, memory_format=torch.contiguous_format)
    piece = max(1, _CPU_PIXELS // (height * width) if images.device.type == "cpu" else n)
    for first in range(0, n, piece):
        rows = slice(first, first + piece)
        planes = images[rows].permute(0, 3, 1, 2).contiguous().float()
        _jitter_planes(planes, jitter[rows])
        out[rows] = planes.permute(0, 2, 3, 1)
    return out


def _jitter_planes(planes: torch.Tensor, jitter: Jitter) -> None:
    """color_jitter in place on float32 [n, 3, H, W] that holds whole values."""
    # 1. The work list: every operation's rows and their factors, in order.
    factors = jitter.factors.astype(np.float64)
    idle = factors == [1, 1, 1, 0]
    factors[:, HUE] = np.trunc(factors[:, HUE] * 255)  # in steps of the 8-bit hue
    work = [(_grayscale, np.flatnonzero(jitter.gray), np.zeros(len(jitter)))]
    for position in range(4):
        for operation, function in enumerate((_brightness, _contrast, _saturation, _hue)):
            rows = np.flatnonzero((jitter.order[:, position] == operation) & ~idle[:, operation])
            work.append((function, rows, factors[:, operation]))
    work = [(function, rows, values[rows]) for function, rows, values in work if len(rows)]
    if not work:
        return
    # 2. Rows and factors to the device, in one copy (float64 holds both exactly).
    packed = torch.from_numpy(np.concatenate([np.stack([rows, values]) for _, rows, values in work], axis=1))
    if planes.device.type == "cuda":
        packed = packed.pin_memory().to(planes.device, non_blocking=True)
    index, factor = packed[0].long(), packed[1].float()[:, None, None, None]
    # 3. Apply. Fractions are cut off after every operation, as Pillow does.
    first = 0
    for function, rows, _ in work:
        part = slice(first, first + len(rows))
        changed = function(planes.index_select(0, index[part]), factor[part])
        planes.index_copy_(0, index[part], changed.floor_())
        first += len(rows)


# The operations: x float32 [m, 3, H, W] with whole values, factor float32 [m, 1, 1, 1] -> values in [0, 255].


def _luma(x: torch.Tensor) -> torch.Tensor:
    """[m, 1, H, W]: Pillow's mode L, ITU-R 601 weights in 16-bit fixed point; exact, as all sums stay below 2^24."""
    r, g, b = x.split(1, dim=1)
    return (r * 19595).add_(g, alpha=38470).add_(b, alpha=7471).add_(0x8000).mul_(2**-16).floor_()


def _blend(base: torch.Tensor, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return (x - base).mul_(factor).add_(base).clamp_(0, 255)


def _grayscale(x: torch.Tensor, _factor: torch.Tensor) -> torch.Tensor:
    return _luma(x).repeat(1, 3, 1, 1)


def _brightness(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return (x * factor).clamp_(0, 255)


def _contrast(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    mean = _luma(x).mean((1, 2, 3), keepdim=True, dtype=torch.float64)
    return _blend((mean + 0.5).floor_().float(), x, factor)


def _saturation(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return _blend(_luma(x), x, factor)


def _hue(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Through Pillow's 8-bit HSV, whose hue has steps of up to 6 levels: no step may differ. ``turn`` is in steps.

    Selections are lerps by weights of 0 and 1: on a CPU torch.where takes ten times as long.
    """
    r, g, b = x.unbind(1)
    # 1. RGB to HSV. Written with the middle channel, each sector's hue rounds once, which is what Pillow's does.
    value, low = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    chroma = value - low
    fall = (value * 2).add_(low).sub_(r).sub_(g).sub_(b).div_(chroma.clamp(min=1))  # (value - middle) / chroma
    red, green = (r - value).add_(1).clamp_(min=0), (g - value).add_(1).clamp_(min=0)  # 1 where it is the highest
    side = torch.lerp(torch.lerp(g - r, r - b, green), b - g, red).sign_()  # on which side of the sector's centre
    centre = (red - 1).mul_(green.mul_(2).sub_(4))  # 0, 2, 4 for red, green, blue
    hue = (centre - side).add_(side.mul_(fall)).div_(6)
    hue = hue.sub_(hue.floor()).mul_(255).floor_().add_(turn[:, 0])
    hue.sub_((hue * (1 / 256)).floor_().mul_(256))  # the turned hue wraps
    # 2. HSV to RGB: every channel falls from the value by value·saturation·tent(hue). Hue in sixths and tents are
    # scaled by 255, so that all products are whole and below 2^24.
    depth = (chroma * 255).div_(value.clamp(min=1)).floor_().mul_(value)
    hue.mul_(6)
    tents = 510 - (hue - 765).abs_(), (hue - 510).abs_().sub_(255), (hue - 1020).abs_().sub_(255)
    return torch.stack([value - tent.clamp_(0, 255).mul_(depth).div_(65025).round_() for tent in tents], dim=1)


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] with channels_last strides: (x/255 - mean) / std of ImageNet."""
    shift, scale = _imagenet(images.device)
    return torch.addcmul(shift, images.permute(0, 3, 1, 2).float(), scale)


@functools.lru_cache
def _imagenet(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """-mean/std and 1/(255 std), float32 [3, 1, 1]; kept, since a copy to the device would make each step wait."""
    mean, std = np.array(IMAGENET_MEAN), np.array(IMAGENET_STD)
    pair = torch.from_numpy(np.stack([-mean / std, 1 / (255 * std)])).float().to(device)
    return pair[0, :, None, None], pair[1, :, None, None]
