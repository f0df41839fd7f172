"""Both training views of images that lie on the device: crop and resize, flip; view_k: grayscale and colour jitter.

Along one axis, for output pixel x of S and pixel i of a box of w pixels, in units of 1/(2S) px, so that all are whole
numbers (antialiased bilinear; scale w/S):

    centre = (2x + 1)·w − S      radius = 2·max(w, S)      weight_i = max(0, radius − |2S·i − centre|)

and the value is Σ_y Σ_x weight_y·weight_x·p / (Σ weight_y · Σ weight_x), over the box alone. The sums are exact
integers and the one division rounds correctly: the same pixels on every machine.

One launch. A program makes a whole view, for contrast needs the mean luma of the image as it is at that point of the
order: the view is written, and what contrast and later operations change is read back (from the cache). Splitting
a view over programs would want a second launch, and another pass over half of the views. A pixel takes about 600
instructions: predicted, not measured, are 1 to 1.6 ms a step at N = 256 and 224 px on an H100 or H200.
Traffic: V·N crops in, 3·V·N·S² bytes out, and 6·N·S² more, in cache, for contrast. Source: torchvision's
RandomResizedCrop and ColorJitter on Pillow images, as in mopro_fast/ops/colour.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopro_fast.ops import colour
from mopro_fast.ops.two_views import largest_side

CONTRAST, SATURATION, HUE = (tl.constexpr(c) for c in (colour.CONTRAST, colour.SATURATION, colour.HUE))
ROUND = tl.constexpr(1.5 * 2**23)  # x + ROUND − ROUND: the nearest whole number, halves to the even one


@triton.jit
def two_views_fwd_kernel(
    pixels_ptr, images_ptr, boxes_ptr, flips_ptr, gray_ptr, factors_ptr, order_ptr, out_ptr, total,
    SIZE: tl.constexpr, LARGEST: tl.constexpr, OPERATIONS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (N, views). LARGEST: side of an image. OPERATIONS: columns of order. BLOCK: pixels at a time."""
    # 1. This program's image and box. What does not lie inside of pixels, or of the image, gives a black view.
    row = tl.program_id(0)
    view = tl.program_id(1)
    at = row.to(tl.int64) * tl.num_programs(1) + view
    offset = tl.load(images_ptr + row * 3)
    height = tl.load(images_ptr + row * 3 + 1)
    width = tl.load(images_ptr + row * 3 + 2)
    top, left = tl.load(boxes_ptr + at * 4), tl.load(boxes_ptr + at * 4 + 1)
    box_height, box_width = tl.load(boxes_ptr + at * 4 + 2), tl.load(boxes_ptr + at * 4 + 3)
    ok = (height <= LARGEST) & (width <= LARGEST) & (3 * height * width < 1 << 31)
    ok &= (offset >= 0) & (offset <= total - 3 * height * width)
    ok &= (top >= 0) & (box_height >= 1) & (box_height <= height) & (top <= height - box_height)
    ok &= (left >= 0) & (box_width >= 1) & (box_width <= width) & (left <= width - box_width)
    box_height, box_width = tl.where(ok, box_height, 1).to(tl.int32), tl.where(ok, box_width, 1).to(tl.int32)
    box_ptr = pixels_ptr + tl.where(ok, offset + (top * width + left) * 3, 0)
    line = 3 * width.to(tl.int32)
    flip = tl.load(flips_ptr + at)
    out_ptr += (view.to(tl.int64) * tl.num_programs(0) + row) * (SIZE * SIZE * 3)

    # 2. The colour operations of view_k, up to contrast and from there on.
    operations = tl.where(view == 1, OPERATIONS, 0)
    contrast = operations
    for place in tl.static_range(OPERATIONS):
        if tl.load(order_ptr + row * OPERATIONS + place) == CONTRAST:
            contrast = tl.minimum(contrast, place)
    gray = False
    if view == 1:
        gray = tl.load(gray_ptr + row)

    # 3. Crop, resize, flip, and what comes before contrast.
    lumas = tl.zeros([BLOCK], tl.int32)
    for first in range(0, SIZE * SIZE, BLOCK):
        p = first + tl.arange(0, BLOCK)
        p_ok = p < SIZE * SIZE
        y, x = p // SIZE, p % SIZE
        x = tl.where(flip, SIZE - 1 - x, x)
        r, g, b = resized(box_ptr, line, y, x, box_height, box_width, p_ok & ok, SIZE)
        if gray:
            r = luma(r, g, b)
            g, b = r, r
        for i in range(contrast):
            r, g, b = operation(r, g, b, order_ptr + row * OPERATIONS + i, factors_ptr + row * 4, 0.0)
        lumas += luma(r, g, b).to(tl.int32)  # 0 beyond the view, which is black there
        store(out_ptr, p, p_ok, r, g, b)

    # 4. Contrast and the operations after it.
    if contrast < operations:
        tl.debug_barrier()  # what the program's other threads have written
        mean = ((2 * tl.sum(lumas, 0) + SIZE * SIZE) // (2 * SIZE * SIZE)).to(tl.float32)
        for first in range(0, SIZE * SIZE, BLOCK):
            p = first + tl.arange(0, BLOCK)
            p_ok = p < SIZE * SIZE
            r = tl.load(out_ptr + p * 3, p_ok, 0).to(tl.float32)
            g = tl.load(out_ptr + p * 3 + 1, p_ok, 0).to(tl.float32)
            b = tl.load(out_ptr + p * 3 + 2, p_ok, 0).to(tl.float32)
            for i in range(contrast, operations):
                r, g, b = operation(r, g, b, order_ptr + row * OPERATIONS + i, factors_ptr + row * 4, mean)
            store(out_ptr, p, p_ok, r, g, b)


@triton.jit
def resized(box_ptr, line, y, x, height, width, ok, SIZE: tl.constexpr):
    """-> red, green, blue of pixels (y, x), whole float32. line: bytes from one of the box's lines to the next."""
    first_y, taps_y = reach(y, height, SIZE)
    first_x, taps_x = reach(x, width, SIZE)
    sum_x = tl.zeros_like(x)
    for j in range(taps_x):
        sum_x += weight(first_x + j, x, width, SIZE)
    sum_y = tl.zeros_like(y)
    r, g, b = tl.zeros_like(x).to(tl.int64), tl.zeros_like(x).to(tl.int64), tl.zeros_like(x).to(tl.int64)
    for i in range(taps_y):
        weight_y = weight(first_y + i, y, height, SIZE)
        line_ptr = box_ptr + (first_y + i) * line
        line_r, line_g, line_b = tl.zeros_like(x), tl.zeros_like(x), tl.zeros_like(x)
        for j in range(taps_x):
            weight_x = weight(first_x + j, x, width, SIZE)
            there = ok & (weight_y > 0) & (weight_x > 0)
            line_r += weight_x * tl.load(line_ptr + (first_x + j) * 3, there, 0).to(tl.int32)
            line_g += weight_x * tl.load(line_ptr + (first_x + j) * 3 + 1, there, 0).to(tl.int32)
            line_b += weight_x * tl.load(line_ptr + (first_x + j) * 3 + 2, there, 0).to(tl.int32)
        sum_y += weight_y
        r += weight_y.to(tl.int64) * line_r
        g += weight_y.to(tl.int64) * line_g
        b += weight_y.to(tl.int64) * line_b
    total = tl.maximum((sum_y.to(tl.int64) * sum_x).to(tl.float32), 1.0)  # 0 where p is beyond the view
    return ratio(r, total), ratio(g, total), ratio(b, total)


@triton.jit
def reach(x, length, SIZE: tl.constexpr):
    """-> the first pixel along one axis that may weigh in output pixels x, and how many may."""
    radius = 2 * tl.maximum(length, SIZE)
    taps = (radius + SIZE - 1) // SIZE
    centre = (2 * x + 1) * length - SIZE
    return (centre - radius + 2 * SIZE * taps) // (2 * SIZE) + 1 - taps, taps  # the dividend is not negative


@triton.jit
def weight(i, x, length, SIZE: tl.constexpr):
    """Of the box's pixel i in output pixel x; 0 beyond the box."""
    w = 2 * tl.maximum(length, SIZE) - tl.abs(2 * SIZE * i - (2 * x + 1) * length + SIZE)
    return tl.where((i >= 0) & (i < length), tl.maximum(w, 0), 0)


@triton.jit
def ratio(weighted, total):
    return (tl.div_rn(weighted.to(tl.float32), total) + ROUND) - ROUND


@triton.jit
def store(out_ptr, p, p_ok, r, g, b):
    tl.store(out_ptr + p * 3, r.to(tl.uint8), p_ok)
    tl.store(out_ptr + p * 3 + 1, g.to(tl.uint8), p_ok)
    tl.store(out_ptr + p * 3 + 2, b.to(tl.uint8), p_ok)


# The colours, on whole float32 in [0, 255], operation by operation as in ops/colour.py. No product may be fused with a
# sum: hence enable_fp_fusion=False below.


@triton.jit
def operation(r, g, b, which_ptr, factors_ptr, mean):
    """mean: of the luma, for contrast."""
    which = tl.load(which_ptr) & 3
    factor = tl.load(factors_ptr + which)
    if which == HUE:
        r, g, b = turned(r, g, b, (factor * 255).to(tl.int32).to(tl.float32))  # as cut off as in float64
    else:
        base = tl.where(which == SATURATION, luma(r, g, b), tl.where(which == CONTRAST, mean, 0.0))
        r, g, b = blend(r, base, factor), blend(g, base, factor), blend(b, base, factor)
    return r, g, b


@triton.jit
def luma(r, g, b):
    return tl.floor((r * 19595 + g * 38470 + b * 7471 + 0x8000) * (1 / 65536))


@triton.jit
def blend(x, base, factor):
    return tl.floor(tl.minimum(tl.maximum((x - base) * factor + base, 0.0), 255.0))


@triton.jit
def turned(r, g, b, turn):
    """Hue, through Pillow's 8-bit HSV."""
    value = tl.maximum(tl.maximum(r, g), b)
    low = tl.minimum(tl.minimum(r, g), b)
    chroma = value - low
    fall = tl.div_rn(value * 2 + low - r - g - b, tl.maximum(chroma, 1.0))
    centre = tl.where(r == value, 0.0, tl.where(g == value, 2.0, 4.0))
    side = tl.where(r == value, b - g, tl.where(g == value, r - b, g - r))
    hue = tl.where(side > 0, centre - 1 + fall, tl.where(side < 0, centre + 1 - fall, centre))
    hue = tl.div_rn(hue, 6.0)
    hue = tl.floor((hue - tl.floor(hue)) * 255) + turn
    hue = (hue - tl.floor(hue * (1 / 256)) * 256) * 6
    depth = tl.floor(tl.div_rn(chroma * 255, tl.maximum(value, 1.0))) * value
    r = fallen(value, depth, 510 - tl.abs(hue - 765))
    g = fallen(value, depth, tl.abs(hue - 510) - 255)
    b = fallen(value, depth, tl.abs(hue - 1020) - 255)
    return r, g, b


@triton.jit
def fallen(value, depth, tent):
    drop = tl.div_rn(tl.minimum(tl.maximum(tent, 0.0), 255.0) * depth, 65025.0)
    return value - ((drop + ROUND) - ROUND)


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
    n, views = flips.shape
    out = torch.empty(views, n, size, size, 3, dtype=torch.uint8, device=pixels.device)
    if out.numel():
        block = min(512, triton.next_power_of_2(size * size))  # with 80 registers three programs fit an SM
        two_views_fwd_kernel[(n, views)](
            *(x.contiguous() for x in (pixels, images, boxes, flips, gray, factors, order)), out, len(pixels),
            SIZE=size, LARGEST=largest_side(size), OPERATIONS=order.shape[1], BLOCK=block,
            num_warps=max(1, block // 64), maxnreg=80, enable_fp_fusion=False,
        )  # fmt: skip
    return out
