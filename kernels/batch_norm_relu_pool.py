"""BatchNorm in training, ReLU and 3×3 max-pooling (stride 2, border 1) of NHWC activations: a ResNet's stem.

    m = the largest x of a window, where w·rstd < 0 the smallest     y = relu((m − mean)·rstd·w + b)
    g = Σ dy of the windows whose m is here and whose y > 0     db = Σ g     dw = Σ g·x̂
    dx = w·rstd·(g − Σg/P − x̂·Σ(g·x̂)/P)     P: positions of x in a group; Σ g and Σ g·x̂ need dy and m alone

Affine map, ReLU and rounding are monotone, so y is the largest output as rounded. Statistics: batch_norm_stats.py.
A program walks down lines and keeps what two windows share. A NaN or infinite x makes its group's statistics and
outputs NaN. Backward's sums are batch_norm_act's, over the pooled positions.
Values moved per element of x, in 16 bits: forward 1¼, with a gradient to come 1⅝; backward ½ and 2⅜, in three launches.
batch_norm_act and PyTorch's pooling with its int64 indices move 4¼ and 7¼.
Source: Ioffe and Szegedy 2015 (arXiv 1502.03167); of equal x the first counts, as in PyTorch's max_pool2d.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopro_fast.kernels.batch_norm_act import affine, gradient_sums, input_gradient, joined, of_group, scale_bias
from mopro_fast.kernels.batch_norm_stats import Tiling, channels_last, load, part_of, split_of
from mopro_fast.kernels.similarity import programs


@triton.jit
def batch_norm_relu_pool_fwd_kernel(
    x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, y_ptr, x_max_ptr, indices_ptr,
    lines, split_lines, splits, channels, height, width, out_height, out_width,
    KEEP: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (groups·splits·blocks of a line of y·channel blocks). lines: of y, in a group."""
    part, w, c = block_of(channels, out_width, BLOCK_W, BLOCK_C)
    group, start, count = split_of(part, lines, split_lines, splits)
    mean, rstd = of_group(mean_ptr, group, c, channels), of_group(rstd_ptr, group, c, channels)
    scale, bias = scale_bias(rstd, weight_ptr, bias_ptr, c, channels)
    sign = tl.where(scale < 0, -1.0, 1.0)
    out = w[:, None] * channels + c[None, :]
    ok = (w < out_width)[:, None] & (c < channels)[None, :]
    # Of a window, line 0 is line 2 of the one above.
    image, h = image_line(start, out_height)
    top, top_at = line_max(x_ptr, image * height + 2 * h - 1, h > 0, w, c, sign, width, out_width, channels)
    for i in tl.range(0, count, num_stages=3):
        image, h = image_line(start + i, out_height)
        line = image * height + 2 * h
        best, place = tl.where(h > 0, top, float("-inf")), top_at
        m, m_at = line_max(x_ptr, line, True, w, c, sign, width, out_width, channels)
        top, top_at = line_max(x_ptr, line + 1, 2 * h + 1 < height, w, c, sign, width, out_width, channels)
        place = tl.where(m > best, 3 + m_at, place)
        best = tl.maximum(best, m)
        place = tl.where(top > best, 6 + top_at, place)
        best = tl.maximum(best, top)
        x_max = best * sign[None, :]
        y = affine(x_max, mean, scale, bias)
        here = (start + i) * out_width * channels + out
        tl.store(y_ptr + here, tl.where(y <= 0, 0.0, y), ok)  # NaN stays NaN
        if KEEP:
            tl.store(x_max_ptr + here, x_max, ok)
            tl.store(indices_ptr + here, tl.where(y <= 0, 9, place).to(tl.uint8), ok)


@triton.jit
def batch_norm_relu_pool_bwd_kernel(
    dy_ptr, dy2_ptr, indices_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, g_ptr, gx_ptr, dx_ptr,
    lines, split_lines, splits, channels, height, width, out_height, out_width, positions,
    DY2: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid as forward; a line h of y goes with lines 2h and 2h + 1 of x. positions: P.

    All windows that have a part in positions (2h, 2w) to (2h + 1, 2w + 1): (h, w), (h, w + 1), and these of line h + 1.
    """
    part, w, c = block_of(channels, out_width, BLOCK_W, BLOCK_C)
    group, start, count = split_of(part, lines, split_lines, splits)
    mean, rstd = of_group(mean_ptr, group, c, channels), of_group(rstd_ptr, group, c, channels)
    scale = tl.load(weight_ptr + c, c < channels, 0.0) * rstd
    g_mean = of_group(g_ptr, group, c, channels) / positions
    gx_mean = rstd * of_group(gx_ptr, group, c, channels) / positions
    at = 2 * w[:, None] * channels + c[None, :]
    left_ok = (w < out_width)[:, None] & (c < channels)[None, :]
    right_ok = (2 * w + 1 < width)[:, None] & (c < channels)[None, :]
    dy, i, dy_r, i_r = windows(dy_ptr, dy2_ptr, indices_ptr, start, True, w, c, out_width, channels, DY2)
    for n in tl.range(0, count, num_stages=3):
        image, h = image_line(start + n, out_height)
        line = (image * height + 2 * h) * width * channels
        # The next line: of this image it adds to line 2h + 1 of x; of the next it is the next turn's, and adds nothing,
        # for a window at the top of an image has no maximum in its line 0.
        more = (h + 1 < out_height) | (n + 1 < count)
        dy_b, i_b, dy_br, i_br = windows(
            dy_ptr, dy2_ptr, indices_ptr, start + n + 1, more, w, c, out_width, channels, DY2
        )
        g = at_place(dy, i, 4)
        g_r = at_place(dy, i, 5) + at_place(dy_r, i_r, 3)
        g_b = at_place(dy, i, 7) + at_place(dy_b, i_b, 1)
        g_br = at_place(dy, i, 8) + at_place(dy_r, i_r, 6) + at_place(dy_b, i_b, 2) + at_place(dy_br, i_br, 0)
        store_dx(x_ptr, dx_ptr, line + at, left_ok, g, mean, scale, g_mean, gx_mean)
        store_dx(x_ptr, dx_ptr, line + channels + at, right_ok, g_r, mean, scale, g_mean, gx_mean)
        line += width * channels
        inside = 2 * h + 1 < height
        store_dx(x_ptr, dx_ptr, line + at, left_ok & inside, g_b, mean, scale, g_mean, gx_mean)
        store_dx(x_ptr, dx_ptr, line + channels + at, right_ok & inside, g_br, mean, scale, g_mean, gx_mean)
        dy, i, dy_r, i_r = dy_b, i_b, dy_br, i_br


@triton.jit
def block_of(channels, out_width, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr):
    """-> which of the groups' splits this program has (int64), its columns of y [BLOCK_W], its channels [BLOCK_C]."""
    part, c = part_of(channels, BLOCK_C)
    blocks = tl.cdiv(out_width, BLOCK_W)
    return part // blocks, (part % blocks).to(tl.int32) * BLOCK_W + tl.arange(0, BLOCK_W), c


@triton.jit
def image_line(line, out_height):
    """Of a line of y among those of all images: the image (int64) and where in it."""
    line = line.to(tl.int32)
    return (line // out_height).to(tl.int64), line % out_height


@triton.jit
def line_max(x_ptr, line, exists, w, c, sign, width, out_width, channels):
    """The largest sign·x of columns 2w − 1, 2w and 2w + 1 of a line, and which has it first: 0, 1 or 2."""
    ptr = x_ptr + line * width * channels + (2 * w[:, None] * channels + c[None, :])
    ok = (c < channels)[None, :] & exists
    best = column(ptr - channels, ((w > 0) & (w < out_width))[:, None], ok, sign)
    m = column(ptr, (w < out_width)[:, None], ok, sign)
    place = tl.where(m > best, 1, 0)
    best = tl.maximum(best, m)
    m = column(ptr + channels, (2 * w + 1 < width)[:, None], ok, sign)
    return tl.where(exists, tl.maximum(best, m), float("-inf")), tl.where(m > best, 2, place)


@triton.jit
def column(ptr, inside, ok, sign):
    return load(ptr, inside & ok) * sign[None, :] + tl.where(inside, 0.0, float("-inf"))


@triton.jit
def gradient(dy_ptr, dy2_ptr, at, ok, DY2: tl.constexpr):
    dy = load(dy_ptr + at, ok)
    if DY2:
        dy = joined(dy, dy2_ptr, at, ok)
    return dy


@triton.jit
def windows(dy_ptr, dy2_ptr, indices_ptr, line, exists, w, c, out_width, channels, DY2: tl.constexpr):
    """Of windows w and w + 1 of a line of y: gradients, 0 where there is none, and places."""
    at = line * out_width * channels + (w[:, None] * channels + c[None, :])
    ok = (w < out_width)[:, None] & (c < channels)[None, :] & exists
    ok_r = (w + 1 < out_width)[:, None] & (c < channels)[None, :] & exists
    dy, dy_r = gradient(dy_ptr, dy2_ptr, at, ok, DY2), gradient(dy_ptr, dy2_ptr, at + channels, ok_r, DY2)
    return dy, tl.load(indices_ptr + at, ok, 0), dy_r, tl.load(indices_ptr + at + channels, ok_r, 0)


@triton.jit
def at_place(dy, places, PLACE: tl.constexpr):
    """What these windows give to the position that is at this place of theirs."""
    return tl.where(places == PLACE, dy, 0.0)


@triton.jit
def store_dx(x_ptr, dx_ptr, at, ok, g, mean, scale, g_mean, gx_mean):
    tl.store(dx_ptr + at, input_gradient(g, load(x_ptr + at, ok), mean, scale, g_mean, gx_mean), ok)


def line_tiling(x: Tensor, y: Tensor, groups: int, per_sm: int) -> Tiling:
    """As tiling, in lines of y; integers: lines of a group, split_lines, splits, channels."""
    channels, (height, width) = x.shape[1], y.shape[2:]
    block_w, block_c = 8, min(64, triton.next_power_of_2(channels))  # 8 divides 56, of 224 px. Not measured
    of_a_line, lines = triton.cdiv(width, block_w) * triton.cdiv(channels, block_c), len(x) // groups * height
    split_lines = triton.cdiv(lines, max(1, per_sm * programs(x.device) // (groups * of_a_line)))
    splits = triton.cdiv(lines, split_lines)
    grid, integers = (groups * splits * of_a_line,), (lines, split_lines, splits, channels)
    blocks = {"BLOCK_W": block_w, "BLOCK_C": block_c, "num_warps": x.element_size()}  # a thread has 16 bytes of x
    return Tiling(grid, integers, blocks)


def batch_norm_relu_pool(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, keep: bool,
    one_launch: bool = False,  # noqa: ARG001, the backward pass's
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> y, and for the backward pass, else empty: x at each window's maximum, its place (9: y is 0) uint8"""
    x, (mean, rstd, weight, bias) = channels_last(x), (t.contiguous() for t in (mean, rstd, weight, bias))
    n, channels, height, width = x.shape
    y = x.new_empty(n, (height + 1) // 2, (width + 1) // 2, channels).permute(0, 3, 1, 2)
    x_max = torch.empty_like(y) if keep else x.new_empty(0)
    indices = torch.empty_like(x_max, dtype=torch.uint8)
    if y.numel():
        t = line_tiling(x, y, len(mean), per_sm=8 if x.element_size() == 2 else 5)  # that an SM holds
        batch_norm_relu_pool_fwd_kernel[t.grid](
            x, mean, rstd, weight, bias, y, x_max, indices, *t.integers, *x.shape[2:], *y.shape[2:],
            KEEP=keep, **t.blocks,
        )  # fmt: skip
    return y, x_max, indices


def batch_norm_relu_pool_backward(
    dy: Tensor, dy2: Tensor | None, x: Tensor, x_max: Tensor, indices: Tensor, mean: Tensor, rstd: Tensor,
    weight: Tensor, bias: Tensor, one_launch: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dy2: a second gradient of y, or None. -> gradients of x, weight, bias"""
    dy, x, x_max, indices = (channels_last(t) for t in (dy, x, x_max, indices))
    mean, rstd, weight, bias = (t.contiguous() for t in (mean, rstd, weight, bias))
    groups, channels = mean.shape
    dx = torch.empty_like(x)
    if not x.numel():
        return dx, torch.zeros_like(weight), torch.zeros_like(bias)
    dys, with_second = (dy, dy if dy2 is None else channels_last(dy2)), {"DY2": dy2 is not None}
    g = x.new_empty(0)  # is not written
    g_sum, gx_sum, dweight, dbias = gradient_sums(dy, dy2, x_max, None, mean, rstd, weight, bias, g, True, one_launch)
    t = line_tiling(x, dy, groups, per_sm=6 if x.element_size() == 2 else 5)  # that sm_80 holds
    batch_norm_relu_pool_bwd_kernel[t.grid](
        *dys, indices, x, mean, rstd, weight, g_sum, gx_sum, dx, *t.integers, *x.shape[2:], *dy.shape[2:],
        x.numel() // channels // groups, **with_second, **t.blocks,
    )  # fmt: skip
    return dx, dweight, dbias
