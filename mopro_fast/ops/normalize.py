"""The encoders' input from uint8 images: the step's first kernel, once per view."""

import torch
from torch import Tensor

from mopro_fast.ops import backends, checks

TYPES = (torch.float32, torch.bfloat16, torch.float16)


def _fake(
    images: Tensor, flips: Tensor | None, dtype: torch.dtype, shifts: Tensor | None = None, channels: int = 3
) -> Tensor:
    return images.new_empty(*images.shape[:3], channels, dtype=dtype).permute(0, 3, 1, 2)


backends.define(
    "normalize(Tensor images, Tensor? flips, ScalarType dtype, Tensor? shifts=None, int channels=3) -> Tensor", _fake
)


def normalize(
    images: Tensor,
    *,
    dtype: torch.dtype | None = None,
    flips: Tensor | None = None,
    shifts: Tensor | None = None,
    channels: int = 3,
) -> Tensor:
    """(x/255 + shift - mean) / std of ImageNet, rounded to ``dtype`` at the end.

    images: uint8 [N, H, W, 3].
    dtype:  float32, bfloat16 or float16; None: what autocast computes in, float32 where it is off.
    flips:  bool [N], the images to mirror from left to right; None: none of them.
    shifts: float32 [N, 3], what each image's red, green and blue grow by, in units of full brightness; nothing is
            clamped. None: 0. mopro_fast/ops/colour.py draws them as CAPro does.
    channels: 3, or 4: the fourth is 0, so that a pixel of 16-bit values is 8 bytes.

    Returns [N, channels, H, W] with channels_last strides. Raises ValueError for a wrong shape, dtype or device.
    """
    device = checks.device_of("images", images)
    checks.tensor("images", images, ("N", "H", "W", 3), (torch.uint8,), device)
    if flips is not None:
        checks.tensor("flips", flips, (len(images),), (torch.bool,), device)
    if shifts is not None:
        checks.tensor("shifts", shifts, (len(images), 3), (torch.float32,), device)
    if dtype is None:
        kind = device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
    if dtype not in TYPES:
        raise ValueError(f"dtype must be {', '.join(map(str, TYPES))}, got {dtype}")
    if channels not in (3, 4):
        raise ValueError(f"channels must be 3 or 4, got {channels}")
    return torch.ops.mopro_fast.normalize(images, flips, dtype, shifts, channels)
