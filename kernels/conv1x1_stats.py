"""A 1×1 convolution of NHWC activations as a matrix product that normalises its input on the way in and takes its
output's statistics on the way out: for an encoder that needs no gradient.

    y = z·Wᵀ     z = x, or relu((x − mean)·rstd·w + b) of the BatchNorm before     → mean and M2 of y per split

A program keeps a block of output channels and walks the tiles of its split of a group's positions; M2 and mean of each
tile, of the values as they are stored, join those of the tiles before (Chan). batch_norm_stats.py's second launch does
the rest. Traffic per position: Cin in, Cout out. As kernels of their own, normalising moves 2·Cin and statistics Cout
more. The weights come from L2 for every tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopro_fast.kernels.batch_norm_act import affine, of_group, scale_bias
from mopro_fast.kernels.batch_norm_stats import Tiling, channels_last, finish_stats, merge, new, part_of, split_of
from mopro_fast.kernels.similarity import dot, programs


@triton.jit
def conv1x1_stats_fwd_kernel(
    x_ptr, weight_ptr, mean_ptr, rstd_ptr, norm_weight_ptr, norm_bias_ptr, y_ptr, split_mean_ptr, split_m2_ptr,
    positions, split_positions, splits, channels, in_channels,
    NORM: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (groups·splits·channel blocks). channels: Cout, in_channels: Cin."""
    part, c = part_of(channels, BLOCK_C)
    group, start, count = split_of(part, positions, split_positions, splits)
    rows = tl.arange(0, BLOCK_P)
    seen = 0.0
    mean = tl.zeros([BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_C], tl.float32)
    for first in range(0, count, BLOCK_P):
        # 1. One tile of y.
        row_ok = first + rows < count
        position = start + first + rows  # int64; offsets that do not depend on `first` would stay in registers
        y = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        x_rows = x_ptr + position[:, None] * in_channels
        for first_k in range(0, in_channels, BLOCK_K):
            k = first_k + tl.arange(0, BLOCK_K)
            x = tl.load(x_rows + k[None, :], row_ok[:, None] & (k < in_channels)[None, :], 0.0)
            if NORM:
                x_mean = of_group(mean_ptr, group, k, in_channels)
                x_rstd = of_group(rstd_ptr, group, k, in_channels)
                scale, bias = scale_bias(x_rstd, norm_weight_ptr, norm_bias_ptr, k, in_channels)
                z = affine(x.to(tl.float32), x_mean, scale, bias)
                x = tl.where(z <= 0, 0.0, z).to(x.dtype)
            w_ok = (k < in_channels)[:, None] & (c < channels)[None, :]
            w = tl.load(weight_ptr + c[None, :] * in_channels + k[:, None], w_ok, 0.0)  # [BLOCK_K, BLOCK_C]
            y += dot(x, w)
        y = y.to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + position[:, None] * channels + c[None, :], y, row_ok[:, None] & (c < channels)[None, :])

        # 2. Its statistics, of whole tiles but the last.
        y = y.to(tl.float32)
        more = tl.minimum(count - first, BLOCK_P).to(tl.float32)
        more_mean = tl.sum(tl.where(row_ok[:, None], y, 0.0), 0) / more
        apart = tl.where(row_ok[:, None], y - more_mean[None, :], 0.0)
        mean, m2 = merge(seen, mean, m2, more, more_mean, tl.sum(apart * apart, 0))
        seen += more
    out = part * channels + c
    tl.store(split_mean_ptr + out, mean, c < channels)
    tl.store(split_m2_ptr + out, m2, c < channels)


def tiling(x: Tensor, groups: int, channels: int, norm: bool) -> tuple[Tiling, dict[str, int]]:
    """-> tiling, compiler's options. Larger tiles spill, and with a norm ptxas does if left to itself. Two programs
    of 16-bit values share an SM: one stores and takes statistics while the other multiplies. Not measured."""
    in_channels = x.shape[1]
    positions = x.numel() // in_channels // groups
    if x.element_size() == 2:
        block_p, block_k, per_sm = 64 if norm else 128, 32, 2
        options = {"num_warps": 4, "maxnreg": 224} if norm else {"num_warps": 4}
    else:  # three tf32 products take more registers
        block_p, block_k, per_sm = 64, 16, 1
        options = {"num_warps": 8, "maxnreg": 168}
    block_c = max(16, min(64, triton.next_power_of_2(channels)))
    block_k = max(16, min(block_k, triton.next_power_of_2(in_channels)))
    channel_blocks, tiles = triton.cdiv(channels, block_c), triton.cdiv(positions, block_p)
    tiles = triton.cdiv(tiles, max(1, per_sm * programs(x.device) // (groups * channel_blocks)))
    splits = triton.cdiv(positions, tiles * block_p)
    blocks = {"BLOCK_P": block_p, "BLOCK_C": block_c, "BLOCK_K": block_k}
    return Tiling((groups * splits * channel_blocks,), (positions, tiles * block_p, splits, channels), blocks), options


def conv1x1_stats_(
    x: Tensor, weight: Tensor, running_mean: Tensor, running_var: Tensor, norm: list[Tensor], momentum: float,
    eps: float, group: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> y [N, Cout, H, W], its mean and rstd f32 [groups, Cout]"""
    x, weight = channels_last(x), weight.to(x.dtype).contiguous()
    n, in_channels, height, width = x.shape
    channels, groups = len(weight), n // group if group else 1
    y = torch.empty(n, channels, height, width, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if not x.numel():
        return y, new(x, groups, channels).zero_(), new(x, groups, channels).fill_(eps**-0.5)
    t, options = tiling(x, groups, channels, bool(norm))
    split_mean, split_m2 = (new(x, groups, t.splits, channels) for _ in range(2))
    of_x = [v.contiguous() for v in norm] or [split_mean] * 4  # where a pointer is not used, any will do
    conv1x1_stats_fwd_kernel[t.grid](
        x, weight, *of_x, y, split_mean, split_m2, *t.integers, in_channels,
        NORM=bool(norm), **t.blocks, **options,
    )  # fmt: skip
    return y, *finish_stats(split_mean, split_m2, t, running_mean, running_var, momentum, eps)
