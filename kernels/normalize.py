"""uint8 images to what the encoders take: normalise, cast, and mirror where asked, in one pass.

    out = x·1/(255 std_c) + (shift_c − mean_c)/std_c        in float32, rounded once (fused), then cast

The step's first kernel, for each view. In plain PyTorch it is three: to float32, the affine map, the cast.
shift: 0, or three numbers per image, which join the constants before any pixel is read. A fourth channel is 0.
Traffic per value: 1 byte in (0 for the fourth), 2 (bfloat16) or 4 (float32) out; in PyTorch 19 or 13.
Source: torchvision's normalize.
"""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from mopro_fast.ops.colour import IMAGENET_MEAN, IMAGENET_STD

MEAN, STD = np.array(IMAGENET_MEAN), np.array(IMAGENET_STD)
SHIFT_R, SHIFT_G, SHIFT_B = map(tl.constexpr, np.float32(-MEAN / STD).tolist())
SCALE_R, SCALE_G, SCALE_B = map(tl.constexpr, np.float32(1 / (255 * STD)).tolist())
RSTD_R, RSTD_G, RSTD_B = map(tl.constexpr, np.float32(1 / STD).tolist())


@triton.jit
def normalize_fwd_kernel(
    images_ptr, flips_ptr, shifts_ptr, out_ptr, values, row_values,
    FLIP: tl.constexpr, SHIFT: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (N, blocks of the H·W·CHANNELS values of out). row_values: W·3. SHIFT: shifts [N, 3] are added."""
    image = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = i < values
    channel = i % CHANNELS
    start = image.to(tl.int64) * values
    source = i if CHANNELS == 3 else i // CHANNELS * 3 + channel
    image_ptr = images_ptr + (start if CHANNELS == 3 else start // CHANNELS * 3)
    if FLIP:
        mirrored = source - 2 * (source % row_values) + row_values - 3 + 2 * channel  # pixel W − 1 − x of the same line
        source = tl.where(tl.load(flips_ptr + image), mirrored, source)
    given = ok
    if CHANNELS == 4:
        given &= channel < 3
    x = tl.load(image_ptr + source, given, 0).to(tl.float32)
    scale = tl.where(channel == 0, SCALE_R, tl.where(channel == 1, SCALE_G, SCALE_B))
    if SHIFT:
        shift_r = tl.fma(tl.load(shifts_ptr + 3 * image), RSTD_R, SHIFT_R)
        shift_g = tl.fma(tl.load(shifts_ptr + 3 * image + 1), RSTD_G, SHIFT_G)
        shift_b = tl.fma(tl.load(shifts_ptr + 3 * image + 2), RSTD_B, SHIFT_B)
        shift = tl.where(channel == 0, shift_r, tl.where(channel == 1, shift_g, shift_b))
    else:
        shift = tl.where(channel == 0, SHIFT_R, tl.where(channel == 1, SHIFT_G, SHIFT_B))
    out = tl.fma(x, scale, shift)
    if CHANNELS == 4:
        out = tl.where(channel < 3, out, 0.0)
    tl.store(out_ptr + start + i, out.to(out_ptr.dtype.element_ty), ok)


def normalize(
    images: Tensor, flips: Tensor | None, dtype: torch.dtype, shifts: Tensor | None = None, channels: int = 3
) -> Tensor:
    n, height, width, _ = images.shape
    out = torch.empty(n, height, width, channels, dtype=dtype, device=images.device)
    if out.numel():
        values = height * width * channels
        # Two loads of 16 bytes a thread; mirrored, or for four channels, a byte at a time. With shifts two loads spill
        # where 16 divides no image.
        block = 4096 if flips is None and shifts is None else 2048
        normalize_fwd_kernel[(n, triton.cdiv(values, block))](
            images.contiguous(), *(images if x is None else x.contiguous() for x in (flips, shifts)),
            out, values, width * 3,
            FLIP=flips is not None, SHIFT=shifts is not None, CHANNELS=channels, BLOCK=block,
        )  # fmt: skip
    return out.permute(0, 3, 1, 2)
