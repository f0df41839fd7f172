"""Both views of images whose pixels lie on the device (MoPro section 3: two random augmentations of each image)."""

import math

import torch
from torch import Tensor

from mopro_fast.ops import backends, checks


def _fake(
    pixels: Tensor,
    images: Tensor,
    boxes: Tensor,
    flips: Tensor,
    gray: Tensor,
    factors: Tensor,
    order: Tensor,
    size: int,
) -> Tensor:
    n, views = flips.shape
    return pixels.new_empty(views, n, size, size, 3)


backends.define(
    "two_views(Tensor pixels, Tensor images, Tensor boxes, Tensor flips, Tensor gray, Tensor factors, Tensor order, "
    "SymInt size) -> Tensor",
    _fake,
)


def largest_side(size: int) -> int:
    """Of an image, in pixels: the kernel's sums over a line, up to 255·2·side²/size, must stay below 2^31."""
    return math.isqrt(4_000_000 * size)


def two_views(
    pixels: Tensor,
    images: Tensor,
    boxes: Tensor,
    flips: Tensor,
    gray: Tensor,
    factors: Tensor,
    order: Tensor,
    size: int,
) -> Tensor:
    """Random resized crops, flipped, the second one with grayscale and colour jitter, each image with its own numbers.

    Resizing is antialiased and bilinear, as Pillow's of the cropped image but for its rounding; the arithmetic on
    colours is Pillow's. Boxes to order are arrays of mopro_fast/data/augment.py.

    pixels:  uint8 [B], the images one after the other, each [H, W, 3].
    images:  int64 [N, 3]: where in pixels an image begins, its height and its width (up to ``largest_side(size)``
             each, and 2^31 bytes in all).
    boxes:   int64 [N, V, 4]: top, left, height and width of each view's crop; V is 1 or 2.
    flips:   bool [N, V].
    gray:    bool [N], of the second view, like the rest.
    factors: float32 [N, 4]: brightness, contrast, saturation, hue.
    order:   int64 [N, up to 4]: the operations to apply, each at most once.
    size:    S, above 0.

    Returns uint8 [V, N, S, S, 3]. An image that does not lie in pixels, or a box that does not lie in its image,
    gives a black view. Raises ValueError for a wrong shape, dtype, device or size.
    """
    device = checks.device_of("pixels", pixels)
    checks.tensor("pixels", pixels, ("B",), (torch.uint8,), device)
    checks.tensor("images", images, ("N", 3), (torch.int64,), device)
    n = len(images)
    checks.tensor("boxes", boxes, (n, "V", 4), (torch.int64,), device)
    views = boxes.shape[1]
    if views not in (1, 2):
        raise ValueError(f"boxes must hold 1 or 2 views, got {views}")
    checks.tensor("flips", flips, (n, views), (torch.bool,), device)
    checks.tensor("gray", gray, (n,), (torch.bool,), device)
    checks.tensor("factors", factors, (n, 4), (torch.float32,), device)
    checks.tensor("order", order, (n, "K"), (torch.int64,), device)
    if order.shape[1] > 4:
        raise ValueError(f"order must have at most 4 columns, got {order.shape[1]}")
    if size < 1:
        raise ValueError(f"size must be above 0, got {size}")
    return torch.ops.mopro_fast.two_views(pixels, images, boxes, flips, gray, factors, order, size)
