"""A 1×1 convolution of NHWC activations as a matrix product that normalises its input on the way in and takes its
output's statistics on the way out: for an encoder that needs no gradient.

    y = z·Wᵀ     z = x, or relu(x·s + b − mean·s) of the BatchNorm before, s = w·rstd     → mean and M2 of y per split

A program keeps a block of output channels and walks the tiles of its split of a group's positions, whose loads are
pipelined from tile to tile. Each place of two rows that a thread holds of a column has its own running mean and M2
(Welford) of the values as they are stored: no thread waits for another before the end. batch_norm_stats.py's second
launch does the rest. Traffic per position: Cin in, Cout out; every block of output channels reads, and normalises, the
same x again, from L2. As kernels of their own, normalising moves 2·Cin and statistics Cout more.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopro_fast.kernels.batch_norm_act import of_group, scale_bias
from mopro_fast.kernels.batch_norm_stats import Statistics, Tiling, channels_last, new, part_of, pool, split_of
from mopro_fast.kernels.similarity import dot, programs


@triton.jit
def conv1x1_stats_fwd_kernel(
    x_ptr, weight_ptr, mean_ptr, rstd_ptr, norm_weight_ptr, norm_bias_ptr, y_ptr, split_mean_ptr, split_m2_ptr,
    positions, split_positions, splits, channels, in_channels,
    NORM: tl.constexpr, CHUNKS: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (groups·splits·channel blocks). channels: Cout, in_channels: Cin, in CHUNKS of BLOCK_K."""
    part, c = part_of(channels, BLOCK_C)
    group, start, count = split_of(part, positions, split_positions, splits)
    k = tl.arange(0, BLOCK_K)
    if CHUNKS == 1:  # stay in shared memory and registers
        w = weight_tile(weight_ptr, k, in_channels, c, channels)
        if NORM:
            scale, bias = norm_of(mean_ptr, rstd_ptr, norm_weight_ptr, norm_bias_ptr, group, k, in_channels)
    rows = tl.arange(0, BLOCK_P)
    upper = tl.arange(0, BLOCK_P // 2) // 8 * 16 + tl.arange(0, BLOCK_P // 2) % 8  # of each place; the other is 8 below
    seen = 0.0
    mean = tl.zeros([BLOCK_P // 2, BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_P // 2, BLOCK_C], tl.float32)
    y = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    # One loop over tiles and chunks: the pipeline does not drain at the end of a tile.
    for step in tl.range(0, tl.cdiv(count, BLOCK_P) * CHUNKS, num_stages=STAGES):
        # 1. One chunk of one tile of y.
        first = step // CHUNKS * BLOCK_P
        row_ok = first + rows < count
        position = start + first + rows  # int64
        if CHUNKS > 1:
            k = step % CHUNKS * BLOCK_K + tl.arange(0, BLOCK_K)
            w = weight_tile(weight_ptr, k, in_channels, c, channels)
        x_ok = row_ok[:, None] & (k < in_channels)[None, :]
        x = tl.load(x_ptr + position[:, None] * in_channels + k[None, :], x_ok, 0.0)
        if NORM:
            if CHUNKS > 1:
                scale, bias = norm_of(mean_ptr, rstd_ptr, norm_weight_ptr, norm_bias_ptr, group, k, in_channels)
            z = x.to(tl.float32) * scale[None, :] + bias[None, :]
            x = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL).to(x.dtype)
        y += dot(x, w)

        # 2. The tile's values and their statistics.
        if step % CHUNKS == CHUNKS - 1:
            stored = y.to(y_ptr.dtype.element_ty)
            y_ok = row_ok[:, None] & (c < channels)[None, :]
            tl.store(y_ptr + position[:, None] * channels + c[None, :], stored, y_ok)
            pairs = tl.reshape(stored.to(tl.float32), [BLOCK_P // 16, 2, 8, BLOCK_C])  # a thread of a dot has both
            a, b = tl.split(tl.permute(pairs, (0, 2, 3, 1)))
            a, b = tl.reshape(a, mean.shape), tl.reshape(b, mean.shape)
            mean, m2 = welford(seen + 1.0, mean, m2, a, (first + upper < count)[:, None])
            mean, m2 = welford(seen + 2.0, mean, m2, b, (first + upper + 8 < count)[:, None])
            seen += 2.0
            y = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    members = tl.cdiv(tl.maximum(count - upper, 0), BLOCK_P) + tl.cdiv(tl.maximum(count - upper - 8, 0), BLOCK_P)
    _, mean, m2 = pool(members.to(tl.float32)[:, None], mean, m2, 0)
    out = part * channels + c
    tl.store(split_mean_ptr + out, mean, c < channels)
    tl.store(split_m2_ptr + out, m2, c < channels)


@triton.jit
def weight_tile(ptr, k, in_channels, c, channels):
    """Wᵀ [BLOCK_K, BLOCK_C]"""
    ok = (k < in_channels)[:, None] & (c < channels)[None, :]
    return tl.load(ptr + c[None, :] * in_channels + k[:, None], ok, 0.0)


@triton.jit
def norm_of(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, group, k, in_channels):
    """-> factor and summand of a channel: one multiplication and addition per value"""
    scale, bias = scale_bias(of_group(rstd_ptr, group, k, in_channels), weight_ptr, bias_ptr, k, in_channels)
    return scale, bias - of_group(mean_ptr, group, k, in_channels) * scale


@triton.jit
def welford(seen, mean, m2, x, ok):
    """Mean and M2 with one more row; one that is missing, as in the last tile alone, changes neither."""
    x = tl.where(ok, x, mean)
    delta = x - mean
    mean += delta * (1.0 / seen)
    return mean, m2 + delta * (x - mean)


def tiling(x: Tensor, groups: int, channels: int, norm: bool) -> tuple[Tiling, dict[str, int]]:
    """-> tiling, compiler's options. Larger tiles spill, and more stages of 128 input channels do. Not measured.

    Weights of up to 32 KB stay: two programs of a warpgroup share an SM, one multiplies while the other normalises,
    stores and takes statistics. Others come from L2 with every tile, which is twice as tall for that.
    """
    in_channels = x.shape[1]
    positions = x.numel() // in_channels // groups
    block_c = max(16, min(128, triton.next_power_of_2(channels)))
    block_k = max(16, triton.next_power_of_2(in_channels))
    options = {}
    if x.element_size() == 4 or in_channels % 16 or channels % 16:  # tf32x3 and narrow accesses take more registers
        block_p, block_c, block_k, per_sm, warps, stages = 64, min(64, block_c), min(16, block_k), 1, 8, 3
        options["maxnreg"] = 168
    elif in_channels == block_k <= (128 if norm else 256) and block_k * block_c <= 16384:
        block_p, per_sm, warps, stages = 64, 2, 4, 4 if block_k <= 64 else 2
    else:
        block_p, block_k, per_sm, warps, stages = 128, min(32 if norm else 64, block_k), 1, 8, 4
    channel_blocks, tiles = triton.cdiv(channels, block_c), triton.cdiv(positions, block_p)
    tiles = triton.cdiv(tiles, max(1, per_sm * programs(x.device) // (groups * channel_blocks)))
    splits = triton.cdiv(positions, tiles * block_p)
    blocks = {"BLOCK_P": block_p, "BLOCK_C": block_c, "BLOCK_K": block_k}
    blocks |= {"CHUNKS": triton.cdiv(in_channels, block_k), "STAGES": stages}
    t = Tiling((groups * splits * channel_blocks,), (positions, tiles * block_p, splits, channels), blocks)
    return t, options | {"num_warps": warps}


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
    s = Statistics(x, groups, t, running_mean, running_var, momentum, eps)
    of_x = [v.contiguous() for v in norm] or [s.mean] * 4  # where a pointer is not used, any will do
    conv1x1_stats_fwd_kernel[t.grid](
        x, weight, *of_x, y, *s.splits, *t.integers, in_channels,
        NORM=bool(norm), **t.blocks, **options,
    )  # fmt: skip
    s.finish()
    return y, *s.moved()
