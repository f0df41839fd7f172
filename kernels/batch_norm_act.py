"""BatchNorm in training, residual add and ReLU of NHWC activations; statistics per group of consecutive rows.

    x̂ = (x − mean)·rstd     y = relu(x̂·w + b + residual)     mean, rstd: over the P = rows·H·W positions of a group
    g = dy where y > 0       db = Σ g     dw = Σ g·x̂     dx = w·rstd·(g − Σg/P − x̂·Σ(g·x̂)/P)     d residual = g

Mean and rstd are batch_norm_stats.py's, the rest is one launch. Backward: sums per split, combined in their order by a
second launch or by the program that arrives last; then dx. Only the count of arrivals is atomic.
Values moved per element, forward with statistics + backward: 3 + 5 (x alone tells where y > 0), with a residual 4 + 7.
BatchNorm, add and ReLU as kernels of their own, in place where they can be, move 5 + 8 and 8 + 8. Where two read y, an
addition of their gradients moves 3 more; joined, dy = dy₁ + dy₂ as it is read, 1 more. With a sign bit per value of y,
written forward, backward reads 1/16 in the place of y.
Source: Ioffe and Szegedy 2015 (arXiv 1502.03167); groups are the ranks of a run that does not share statistics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopro_fast.kernels.batch_norm_stats import (
    arrivals,
    arrived_last,
    channels_last,
    finish_in_last,
    finish_tiling,
    group_tile,
    load,
    new,
    part_of,
    split_of,
    split_tile,
    tiling,
)
from mopro_fast.ops.batch_norm_act import signs_shape


@triton.jit
def batch_norm_act_fwd_kernel(
    x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr, signs_ptr,
    positions, split_positions, splits, channels,
    RESIDUAL: tl.constexpr, RELU: tl.constexpr, SIGNS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (groups·splits·channel blocks). SIGNS: a bit per value is written, 0 where y ≤ 0."""
    part, c = part_of(channels, BLOCK_C)
    group, start, count = split_of(part, positions, split_positions, splits)
    mean, rstd = of_group(mean_ptr, group, c, channels), of_group(rstd_ptr, group, c, channels)
    scale, bias = scale_bias(rstd, weight_ptr, bias_ptr, c, channels)
    rows = tl.arange(0, BLOCK_P)
    at = rows[:, None] * channels + c[None, :]
    for first in tl.range(0, count, BLOCK_P, num_stages=3):
        ok = (first + rows < count)[:, None] & (c < channels)[None, :]
        here = (start + first) * channels + at
        y = affine(load(x_ptr + here, ok), mean, scale, bias)
        if RESIDUAL:
            y += load(residual_ptr + here, ok)
        if RELU:
            y = tl.where(y <= 0, 0.0, y)  # NaN stays NaN
        y = y.to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + here, y, ok)
        if SIGNS:
            at_byte, byte_ok = of_bytes(start + first + rows, first + rows < count, c, channels, BLOCK_C)
            tl.store(signs_ptr + at_byte, packed(y, BLOCK_P, BLOCK_C), byte_ok)


@triton.jit
def batch_norm_act_bwd_sums_kernel(
    dy_ptr, dy2_ptr, x_ptr, y_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, g_ptr, split_g_ptr, split_gx_ptr,
    group_g_ptr, group_gx_ptr, dweight_ptr, dbias_ptr, arrivals_ptr,
    groups, positions, split_positions, splits, channels,
    RELU: tl.constexpr, RESIDUAL: tl.constexpr, JOINED: tl.constexpr, SIGNS: tl.constexpr, LAST: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Grid (groups·splits·channel blocks): Σ g and Σ g·x̂ of a split → [groups, splits, C].

    RESIDUAL: where y > 0 is read from y, and g is written, the residual's gradient. JOINED: dy is dy + dy2.
    SIGNS: y is the forward pass's signs. LAST: the last program of a channel block does what
    batch_norm_act_bwd_finish_kernel does.
    """
    part, c = part_of(channels, BLOCK_C)
    group, start, count = split_of(part, positions, split_positions, splits)
    mean, rstd = of_group(mean_ptr, group, c, channels), of_group(rstd_ptr, group, c, channels)
    scale, bias = scale_bias(rstd, weight_ptr, bias_ptr, c, channels)
    rows = tl.arange(0, BLOCK_P)
    at = rows[:, None] * channels + c[None, :]
    g_sum = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    gx_sum = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for first in tl.range(0, count, BLOCK_P, num_stages=3):
        ok = (first + rows < count)[:, None] & (c < channels)[None, :]
        here = (start + first) * channels + at
        g, x = load(dy_ptr + here, ok), load(x_ptr + here, ok)
        if JOINED:
            g = joined(g, dy2_ptr, here, ok)
        if RESIDUAL:
            if SIGNS:
                at_byte, byte_ok = of_bytes(start + first + rows, first + rows < count, c, channels, BLOCK_C)
                y = unpacked(tl.load(y_ptr + at_byte, byte_ok, 0), BLOCK_P, BLOCK_C)
            else:
                y = load(y_ptr + here, ok)
            g = tl.where(y <= 0, 0.0, g)
            tl.store(g_ptr + here, g, ok)
        elif RELU:
            g = tl.where(affine(x, mean, scale, bias) <= 0, 0.0, g)
        g_sum += g
        gx_sum += g * (x - mean[None, :])
    out = part * channels + c
    tl.store(split_g_ptr + out, tl.sum(g_sum, 0), c < channels)
    tl.store(split_gx_ptr + out, tl.sum(gx_sum, 0) * rstd, c < channels)
    if LAST:  # noqa: SIM102, a constant
        if arrived_last(arrivals_ptr, groups * splits, channels, BLOCK_C):
            finish_sums_of(
                c, split_g_ptr, split_gx_ptr, group_g_ptr, group_gx_ptr, dweight_ptr, dbias_ptr,
                groups, splits, channels, BLOCK_G, BLOCK_S, BLOCK_C, 4,
            )  # fmt: skip


@triton.jit
def batch_norm_act_bwd_finish_kernel(
    split_g_ptr, split_gx_ptr, g_ptr, gx_ptr, dweight_ptr, dbias_ptr,
    groups, splits, channels,
    BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (channel blocks): both sums per group [groups, C], and over the groups the gradients of weight and bias."""
    finish_sums_of(
        tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C),
        split_g_ptr, split_gx_ptr, g_ptr, gx_ptr, dweight_ptr, dbias_ptr,
        groups, splits, channels, BLOCK_G, BLOCK_S, BLOCK_C, 1,
    )  # fmt: skip


@triton.jit
def finish_sums_of(
    c, split_g_ptr, split_gx_ptr, g_ptr, gx_ptr, dweight_ptr, dbias_ptr,
    groups, splits, channels,
    BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    dbias = tl.zeros([BLOCK_C], tl.float32)
    dweight = tl.zeros([BLOCK_C], tl.float32)
    for first_group in range(0, groups, BLOCK_G):
        g = tl.zeros([BLOCK_G, BLOCK_S, BLOCK_C], tl.float32)
        gx = tl.zeros([BLOCK_G, BLOCK_S, BLOCK_C], tl.float32)
        for first in tl.range(0, splits, BLOCK_S, num_stages=STAGES):
            at, ok = split_tile(first_group, groups, first, splits, c, channels, BLOCK_G, BLOCK_S)
            g += tl.load(split_g_ptr + at, ok, 0.0)
            gx += tl.load(split_gx_ptr + at, ok, 0.0)
        g_groups, gx_groups = tl.sum(g, 1), tl.sum(gx, 1)
        at, ok = group_tile(first_group, groups, c, channels, BLOCK_G)
        tl.store(g_ptr + at, g_groups, ok)
        tl.store(gx_ptr + at, gx_groups, ok)
        dbias += tl.sum(g_groups, 0)
        dweight += tl.sum(gx_groups, 0)
    tl.store(dbias_ptr + c, dbias, c < channels)
    tl.store(dweight_ptr + c, dweight, c < channels)


@triton.jit
def batch_norm_act_bwd_kernel(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, g_ptr, gx_ptr, dx_ptr,
    positions, split_positions, splits, channels,
    RELU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (groups·splits·channel blocks). RELU: dy is not g yet."""
    part, c = part_of(channels, BLOCK_C)
    group, start, count = split_of(part, positions, split_positions, splits)
    mean, rstd = of_group(mean_ptr, group, c, channels), of_group(rstd_ptr, group, c, channels)
    scale, bias = scale_bias(rstd, weight_ptr, bias_ptr, c, channels)
    g_mean = of_group(g_ptr, group, c, channels) / positions
    gx_mean = rstd * of_group(gx_ptr, group, c, channels) / positions
    rows = tl.arange(0, BLOCK_P)
    at = rows[:, None] * channels + c[None, :]
    for first in tl.range(0, count, BLOCK_P, num_stages=3):
        ok = (first + rows < count)[:, None] & (c < channels)[None, :]
        here = (start + first) * channels + at
        g, x = load(dy_ptr + here, ok), load(x_ptr + here, ok)
        if RELU:
            g = tl.where(affine(x, mean, scale, bias) <= 0, 0.0, g)
        tl.store(dx_ptr + here, input_gradient(g, x, mean, scale, g_mean, gx_mean), ok)


@triton.jit
def joined(dy, dy2_ptr, at, ok):
    """dy + dy2, rounded as if the sum had been stored."""
    return (dy + load(dy2_ptr + at, ok)).to(dy2_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def of_bytes(position, position_ok, c, channels, BLOCK_C: tl.constexpr):
    """Offsets into the signs [positions, C/8] for channels c, and which of them exist; 8 divides C."""
    byte = tl.min(c, 0) // 8 + tl.arange(0, BLOCK_C // 8)
    at = position[:, None] * (channels // 8) + byte[None, :]
    return at, position_ok[:, None] & (byte < channels // 8)[None, :]


@triton.jit
def packed(y, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Signs of y [P, C] → bytes [P, C/8]. Bit i is channel i of its eight: 0 where y ≤ 0; NaN counts as above."""
    bits = tl.reshape(tl.where(y <= 0, 0, 1), [BLOCK_P, BLOCK_C // 8, 8])
    return tl.sum(bits << tl.arange(0, 8)[None, None, :], 2).to(tl.uint8)


@triton.jit
def unpacked(bytes, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """-> int32 [P, C], 0 or 1"""
    bits = (bytes.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, [BLOCK_P, BLOCK_C])


@triton.jit
def of_group(ptr, group, c, channels):
    """Of [groups, C], the group's channels."""
    return tl.load(ptr + group * channels + c, c < channels, 0.0)


@triton.jit
def scale_bias(rstd, weight_ptr, bias_ptr, c, channels):
    return tl.load(weight_ptr + c, c < channels, 0.0) * rstd, tl.load(bias_ptr + c, c < channels, 0.0)


@triton.jit
def affine(x, mean, scale, bias):
    """BatchNorm's output, in one order of operations: the backward pass must find the signs of the forward pass."""
    return (x - mean[None, :]) * scale[None, :] + bias[None, :]


@triton.jit
def input_gradient(g, x, mean, scale, g_mean, gx_mean):
    return (g - g_mean[None, :] - (x - mean[None, :]) * gx_mean[None, :]) * scale[None, :]


# Of the kernels without sums. An SM holds six programs of four warps with the 80 registers that dx wants. Not measured.
ELEMENTWISE = {"tile_bytes": 4096, "per_sm": 6}


def batch_norm_act(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool,
    signs: bool = False, one_launch: bool = False,  # noqa: ARG001, the backward pass's
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> y; its signs, uint8 [N, H, W, C/8], without elements unless they are wanted"""
    x, (mean, rstd, weight, bias) = channels_last(x), (t.contiguous() for t in (mean, rstd, weight, bias))
    y = torch.empty_like(x, memory_format=torch.channels_last)
    bits = torch.empty(signs_shape(x) if signs else 0, dtype=torch.uint8, device=x.device)
    if y.numel():
        t = tiling(x, len(mean), **ELEMENTWISE)
        batch_norm_act_fwd_kernel[t.grid](
            x, mean, rstd, weight, bias, y if residual is None else channels_last(residual), y, bits, *t.integers,
            RESIDUAL=residual is not None, RELU=relu, SIGNS=signs, **t.blocks,
        )  # fmt: skip
    return y, bits


def batch_norm_act_backward(
    dy: Tensor, dy2: Tensor | None, x: Tensor, y: Tensor | None, mean: Tensor, rstd: Tensor, weight: Tensor,
    bias: Tensor, relu: bool, one_launch: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dy2: added to dy; only where y is given. y: or its signs.

    -> gradients of x, weight, bias; of the residual where y is given, else no elements
    """
    if dy2 is not None and y is None:
        raise ValueError("dy2 needs y")
    dy, x = channels_last(dy), channels_last(x)
    mean, rstd, weight, bias = (t.contiguous() for t in (mean, rstd, weight, bias))
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    g = x.new_empty(0) if y is None else torch.empty_like(dx)
    if not x.numel():
        return dx, torch.zeros_like(weight), torch.zeros_like(bias), g
    g_sum, gx_sum, dweight, dbias = gradient_sums(dy, dy2, x, y, mean, rstd, weight, bias, g, relu, one_launch)
    t = tiling(x, len(mean), **ELEMENTWISE)
    batch_norm_act_bwd_kernel[t.grid](
        dy if y is None else g, x, mean, rstd, weight, bias, g_sum, gx_sum, dx, *t.integers,
        RELU=relu and y is None, **t.blocks,
    )  # fmt: skip
    return dx, dweight, dbias, g


def gradient_sums(
    dy: Tensor, dy2: Tensor | None, x: Tensor, y: Tensor | None, mean: Tensor, rstd: Tensor, weight: Tensor,
    bias: Tensor, g: Tensor, relu: bool, one_launch: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> Σ g and Σ g·x̂ f32 [groups, C], the gradients of weight and bias; g is written where y is given"""
    groups, channels = mean.shape
    signs = y is not None and y.dtype == torch.uint8
    t = tiling(x, groups, tile_bytes=8192, per_sm=2)
    split_g, split_gx = (new(x, groups, t.splits, channels) for _ in range(2))
    results = new(x, groups, channels), new(x, groups, channels), torch.empty_like(weight), torch.empty_like(bias)
    counts = arrivals(x, channels) if one_launch else None
    last = counts is not None
    batch_norm_act_bwd_sums_kernel[t.grid](
        dy, dy if dy2 is None else channels_last(dy2), x, x if y is None else y if signs else channels_last(y),
        mean, rstd, weight, bias, g, split_g, split_gx, *results, counts if last else split_g, groups, *t.integers,
        RELU=relu, RESIDUAL=y is not None, JOINED=dy2 is not None, SIGNS=signs, LAST=last,
        **t.blocks, **finish_in_last(groups, t.splits, last), num_warps=8, maxnreg=128,
    )  # fmt: skip
    if not last:
        grid, blocks = finish_tiling(groups, t.splits, channels)
        batch_norm_act_bwd_finish_kernel[grid](split_g, split_gx, *results, groups, t.splits, channels, **blocks)
    return results
