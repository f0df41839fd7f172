"""Colours of the views, on any device: ImageNet's normalisation, grayscale, colour jitter, principal shifts.

The arithmetic is that of torchvision's transforms on Pillow images, down to the rounding to 8 bits after every
operation. Source: DataLoader/dataloader.py of salesforce/MoPro.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch

from mopro_fast.transfer import to_device

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Of ImageNet's colours, as lighting noise takes them (Krizhevsky et al. 2012, section 4.1; CAPro's values): λ, and v in
# rows of red, green, blue.
PRINCIPAL_SIZES = np.array([0.2175, 0.0188, 0.0045])
PRINCIPAL_COLOURS = np.array([[-0.5675, -0.5808, -0.5836], [0.7192, -0.0045, -0.6948], [0.4009, -0.8140, 0.4203]])
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


@dataclass(frozen=True)
class Jitter:
    """The random numbers of n colour augmentations; index it to take some of the rows."""

    gray: np.ndarray
    """bool [n]: to grayscale, before everything else."""
    factors: np.ndarray
    """float32 [n, 4]: brightness, contrast, saturation (1 = unchanged) and hue (part of a full circle)."""
    order: np.ndarray
    """int64 [n, up to 4]: the operations (BRIGHTNESS ... HUE) in the order they are applied; others are skipped."""

    def __len__(self) -> int:
        return len(self.gray)

    def __getitem__(self, rows: slice) -> "Jitter":
        return Jitter(self.gray[rows], self.factors[rows], self.order[rows])


def color_jitter(images: torch.Tensor, jitter: Jitter) -> torch.Tensor:
    """Grayscale, then the colour operations, each image with its own factors and order.

    images: uint8 [N, H, W, 3] on any device; -> a new tensor of the same kind. All images at once, in as few launches
    as the operations' order allows. What each operation takes is known on the host, and everything the device needs
    goes there in one copy: nothing waits for the device.
    """
    n = len(images)
    if n != len(jitter):
        raise ValueError(f"jitter has {len(jitter)} rows, images has {n}")
    if not jitter.gray.any() and not jitter.order.size:
        return images.clone()
    # 1. The plan. Hue costs most, so it runs once, with the rows' sequences aligned at it. Sorted by how many
    #    operations precede hue, the rows that take part in a step lie side by side: a prefix, after hue a suffix.
    n, operations = jitter.order.shape
    is_hue = jitter.order == HUE
    before = (is_hue.cumsum(1) == 0).sum(1)
    rows = np.argsort(-before)
    before, order, factors = before[rows], jitter.order[rows], jitter.factors[rows].astype(np.float64)
    early = [(slice(0, (before > i).sum()), order[:, i]) for i in range(before.max())]
    late = []
    for i in range(1, operations - before.min()):
        part = slice((before + i >= operations).sum(), n)
        late.append((part, order[np.arange(n), np.minimum(before + i, operations - 1)]))
    # 2. Its numbers, to the device in one copy (float64 holds them all exactly): hue's turn in 8-bit steps, the
    #    sorting and its inverse, the rows to make grey, and each blend's weights of luma and mean and its factor.
    gray = np.flatnonzero(jitter.gray[rows])
    numbers = [np.trunc(factors[:, HUE] * 255), rows, rows.argsort(), np.resize(gray, n)]
    for _, which in early + late:
        numbers += [which == SATURATION, which == CONTRAST, factors[np.arange(n), which]]
    on_device = to_device(np.stack(numbers), images.device)
    to_sorted, from_sorted, gray_rows = on_device[1:4].long()
    parameters = on_device.float()[:, :, None, None, None]
    # 3. Apply, in float32 planes that hold whole values.
    x = images.index_select(0, to_sorted).permute(0, 3, 1, 2).contiguous().float()
    if len(gray):
        gray_rows = gray_rows[: len(gray)]
        x.index_copy_(0, gray_rows, _luma(x.index_select(0, gray_rows)).repeat(1, 3, 1, 1))
    blends = parameters[4:].unflatten(0, (len(early + late), 3))
    for (part, _), blend in zip(early, blends[: len(early)], strict=True):
        _blend_(x[part], *blend[:, part])
    if is_hue.any():
        x = _hue(x, parameters[0])
    for (part, _), blend in zip(late, blends[len(early) :], strict=True):
        _blend_(x[part], *blend[:, part])
    out = torch.empty_like(images)
    return out.copy_(x.permute(0, 2, 3, 1)).index_select(0, from_sorted)


# The operations, on x float32 [m, 3, H, W] with whole values in [0, 255], with parameters float32 [m, 1, 1, 1].


def _luma(x: torch.Tensor) -> torch.Tensor:
    """[m, 1, H, W]: Pillow's mode L, ITU-R 601 weights in 16-bit fixed point; exact, as all sums stay below 2^24."""
    r, g, b = x.split(1, dim=1)
    return (r * 19595).add_(g, alpha=38470).add_(b, alpha=7471).add_(0x8000).mul_(2**-16).floor_()


def _blend_(x: torch.Tensor, of_luma: torch.Tensor, of_mean: torch.Tensor, factor: torch.Tensor) -> None:
    """Pillow's ImageEnhance, in place: base + factor·(x - base), the fraction cut off.

    The base is black for brightness, the luma for saturation, its rounded mean for contrast: weights of 0 or 1.
    """
    luma = _luma(x)
    total = luma.sum((1, 2, 3), keepdim=True, dtype=torch.float64)  # mean() would multiply by 1/pixels on a GPU
    mean = total.div_(_divisor(luma.shape[2:].numel(), total.dtype, x.device)).add_(0.5).floor_().float()
    base = luma.mul_(of_luma).add_(mean.mul_(of_mean))
    x.sub_(base).mul_(factor).add_(base).clamp_(0, 255).floor_()


def _hue(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Through Pillow's 8-bit HSV, whose hue has steps of up to 6 levels: no step may differ. ``turn`` is in steps.

    Selections are lerps by weights of 0 and 1: on a CPU torch.where takes ten times as long.
    """
    r, g, b = x.unbind(1)
    # 1. RGB to HSV. Written with the middle channel, each sector's hue rounds once, which is what Pillow's does.
    value, low = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    chroma = value - low
    fall = (value * 2).add_(low).sub_(r).sub_(g).sub_(b).div_(chroma.clamp(min=1))  # (value - middle) / chroma
    red, green = (
        (r - value).add_(1).clamp_(min=0),
        (g - value).add_(1).clamp_(min=0),
    )  # 1 where it is the highest
    side = torch.lerp(torch.lerp(g - r, r - b, green), b - g, red).sign_()  # on which side of the sector's centre
    centre = (red - 1).mul_(green.mul_(2).sub_(4))  # 0, 2, 4 for red, green, blue
    hue = (centre - side).add_(side.mul_(fall)).div_(_divisor(6, x.dtype, x.device))
    hue = hue.sub_(hue.floor()).mul_(255).floor_().add_(turn[:, 0])
    hue.sub_((hue * (1 / 256)).floor_().mul_(256))  # the turned hue wraps
    # 2. HSV to RGB: every channel falls from the value by value·saturation·tent(hue). Hue in sixths and tents are
    # scaled by 255, so that all products are whole and below 2^24.
    depth = (chroma * 255).div_(value.clamp(min=1)).floor_().mul_(value)
    hue.mul_(6)
    tents = 510 - (hue - 765).abs_(), (hue - 510).abs_().sub_(255), (hue - 1020).abs_().sub_(255)
    whole = _divisor(255 * 255, x.dtype, x.device)
    return torch.stack([value - tent.clamp_(0, 255).mul_(depth).div_(whole).round_() for tent in tents], dim=1)


@functools.lru_cache
def _divisor(number: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """0-dim and on the device; kept. By a Python number, or a 0-dim tensor on the CPU, PyTorch does not divide a CUDA
    tensor: it multiplies by the reciprocal, which rounds otherwise (ATen/native/cuda/BinaryDivTrueKernel.cu)."""
    return torch.full((), number, dtype=dtype, device=device)


def principal_shifts(draws: np.ndarray) -> np.ndarray:
    """An RGB shift per image along the colours' principal axes: Σ_j draws[:, j]·λ_j·v_j, for :func:`normalize`.

    draws: [n, 3], normal draws as they are to be scaled (in CAPro of deviation 0.1); -> float32 [n, 3].
    """
    return (draws[:, :, None] * (PRINCIPAL_SIZES[:, None] * PRINCIPAL_COLOURS)).sum(1).astype(np.float32)


def normalize(images: torch.Tensor, shifts: torch.Tensor | None = None) -> torch.Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] with channels_last strides: (x/255 + shift - mean) / std of ImageNet.

    shifts: float32 [N, 3]; None: 0.
    """
    shift, scale, rstd = _imagenet(images.device)
    if shifts is not None:
        shift = torch.addcmul(shift, shifts[:, :, None, None], rstd)
    return torch.addcmul(shift, images.permute(0, 3, 1, 2).float(), scale)


@functools.lru_cache
def _imagenet(device: torch.device) -> tuple[torch.Tensor, ...]:
    """-mean/std, 1/(255 std), 1/std, float32 [3, 1, 1]; kept, since a copy to the device would make each step wait."""
    mean, std = np.array(IMAGENET_MEAN), np.array(IMAGENET_STD)
    constants = np.stack([-mean / std, 1 / (255 * std), 1 / std])[:, :, None, None]
    return torch.from_numpy(constants).float().to(device).unbind()
