"""color_jitter on a CPU: a few images at a time, in planes that stay in a core's cache, numbers as plain scalars.

The arithmetic is augment.py's for a GPU, operation by operation: equal to Pillow's to the bit.
"""

import threading
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mopro_fast.data.augment import Jitter

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
_PLANES = 11
_PIXELS = 1 << 16  # at once: measured; with fewer calls cost more, with more the planes leave the cache
# tent(hue) = sign·|hue - middle| + offset, for red, green, blue.
_TENTS = torch.tensor([[765, 510, 1020], [-1, 1, 1], [510, -255, -255]]).float()[:, :, None, None, None]
_scratch = threading.local()


def jitter_(images: Tensor, jitter: "Jitter") -> None:
    """uint8 [N, H, W, 3], in place."""
    n, height, width, _ = images.shape
    at_once = max(1, min(n, _PIXELS // (height * width)))
    planes = getattr(_scratch, "planes", None)
    if planes is None or planes.shape[1:] != (at_once, height, width):
        planes = _scratch.planes = torch.empty(_PLANES, at_once, height, width)
    sequences, factors = jitter.order.tolist(), jitter.factors.tolist()
    coloured = []
    for i, gray in enumerate(jitter.gray.tolist()):
        if gray:
            _gray_(images[i], sequences[i], factors[i], planes[:4, 0])
        elif sequences[i]:
            coloured.append(i)
    for first in range(0, len(coloured), at_once):
        rows = coloured[first : first + at_once]
        one = [(images[i], sequences[i], factors[i]) for i in rows]
        _jitter_(*zip(*one, strict=True), planes[:, : len(rows)])


def _gray_(image: Tensor, sequence: list[int], factors: list[float], planes: Tensor) -> None:
    """A grey image is one plane, and stays as it is under saturation and hue."""
    x, luma = planes[:3], planes[3]
    _luma(x.copy_(image.permute(2, 0, 1)), luma)
    for operation in sequence:
        if operation in (BRIGHTNESS, CONTRAST):
            _blend_(luma, operation, factors[operation], luma)
    image.copy_(luma.to(torch.uint8)[..., None])


def _jitter_(
    images: tuple[Tensor, ...], sequences: tuple[list[int], ...], factors: tuple[list[float], ...], planes: Tensor
) -> None:
    """m times uint8 [H, W, 3], in place; ``planes``: float32 [11, m, H, W]. Hue costs most and runs for all at once."""
    x, free = planes[:3], planes[3:]
    for i, (image, sequence) in enumerate(zip(images, sequences, strict=True)):
        x[:, i].copy_(image.permute(2, 0, 1))
        for operation in sequence[: _hue_in(sequence)]:
            _blend_(x[:, i], operation, factors[i][operation], free[0, i])
    if any(HUE in sequence for sequence in sequences):
        _hue_(x, torch.tensor([int(f[HUE] * 255) for f in factors])[:, None, None], free)
    for i, (image, sequence) in enumerate(zip(images, sequences, strict=True)):
        for operation in sequence[_hue_in(sequence) + 1 :]:
            _blend_(x[:, i], operation, factors[i][operation], free[0, i])
        image.copy_(x[:, i].to(torch.uint8).permute(1, 2, 0))  # in one step it would take half as long again


def _hue_in(sequence: list[int]) -> int:
    return sequence.index(HUE) if HUE in sequence else len(sequence)


def _luma(x: Tensor, out: Tensor) -> Tensor:
    r, g, b = x.unbind()
    return torch.mul(r, 19595, out=out).add_(g, alpha=38470).add_(b, alpha=7471).add_(0x8000).mul_(2**-16).floor_()


def _blend_(x: Tensor, operation: int, factor: float, free: Tensor) -> None:
    """x: [3, H, W], or [H, W] if it is grey."""
    if operation == BRIGHTNESS:
        x.mul_(factor)
    else:
        base = _luma(x, free) if x.ndim == 3 else x
        if operation == CONTRAST:
            base = int(base.sum(dtype=torch.float64).item() / base.numel() + 0.5)
        x.sub_(base).mul_(factor).add_(base)
    x.clamp_(0, 255).floor_()


def _hue_(x: Tensor, turn: Tensor, free: Tensor) -> None:
    """float32 [3, m, H, W] through Pillow's 8-bit HSV, turned by int64 [m, 1, 1] of its steps. ``free``: 8 planes."""
    r, g, b = x.unbind()
    value, low, chroma, fall, red, green, side, other = free.unbind()
    torch.maximum(r, g, out=value)
    torch.minimum(r, g, out=low)
    torch.maximum(torch.minimum(value, b, out=other), low, out=fall)  # the middle channel
    torch.maximum(value, b, out=value)
    torch.minimum(low, b, out=low)
    torch.sub(value, low, out=chroma)
    # Written with the middle channel, each sector's hue rounds once.
    torch.sub(value, fall, out=fall).div_(torch.clamp(chroma, min=1, out=other))
    torch.sub(r, value, out=red).add_(1).clamp_(min=0)  # 1 where it is the highest
    torch.sub(g, value, out=green).add_(1).clamp_(min=0)
    torch.lerp(torch.sub(g, r, out=side), torch.sub(r, b, out=other), green, out=side)
    torch.lerp(side, torch.sub(b, g, out=other), red, out=side).sign_()  # on which side of the sector's centre
    hue = red.sub_(1).mul_(green.mul_(2).sub_(4)).sub_(side)  # centre: 0, 2, 4 for red, green, blue
    hue.add_(side.mul_(fall)).div_(6)
    hue.sub_(torch.floor(hue, out=other)).mul_(255).floor_().add_(turn)
    hue.sub_(torch.mul(hue, 1 / 256, out=other).floor_().mul_(256)).mul_(6)  # the turned hue wraps; now in sixths
    # Every channel falls from the value by value·saturation·tent(hue). Tents are scaled by 255.
    depth = chroma.mul_(255).div_(torch.clamp(value, min=1, out=other)).floor_().mul_(value)
    torch.sub(hue, _TENTS[0], out=x).abs_().mul_(_TENTS[1]).add_(_TENTS[2]).clamp_(0, 255)
    torch.sub(value, x.mul_(depth).div_(65025).round_(), out=x)
