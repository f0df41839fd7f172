"""Both training views of images that lie on the device: crop and resize, flip; view_k: grayscale and colour jitter.

Along one axis, for output pixel x of S and pixel i of a box of w pixels, in units of 1/(2S) px, so that all are whole
numbers (antialiased bilinear; scale w/S):

    centre = (2x + 1)·w − S      radius = 2·max(w, S)      weight_i = max(0, radius − |2S·i − centre|)

and the value is Σ_y Σ_x weight_y·weight_x·p / (Σ weight_y · Σ weight_x), over the box alone. The sums are exact
integers and the one division rounds correctly: the same pixels on every machine.

One launch. A program makes a whole view, for contrast needs the mean luma of the image as it is at that point of the
order: the view is written, and what contrast and later operations change is read back (from the cache). Splitting
a view over programs would want a second launch, and another pass over half of the views. It is limited by arithmetic:
a program goes down strips of a tile's width, so that a column's weights are known before its loops, reads only what
lies in the box, so that no load has a mask, and divides by multiplying with one reciprocal a pixel.
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
    SIZE: tl.constexpr, LARGEST: tl.constexpr, OPERATIONS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid (N, views). LARGEST: side of an image. OPERATIONS: columns of order. ROWS, COLUMNS: of a tile."""
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
    taps_y, taps_x = tl.where(ok, taps(box_height, SIZE), 0), taps(box_width, SIZE)
    box_ptr = pixels_ptr + tl.where(ok, offset + (top * width + left) * 3, 0)
    line = 3 * width.to(tl.int32)
    # Weights sum up to at most 2.5·max(w, S)²/S along an axis: to 16·10^6 in all, of values up to 255 below 2^32.
    narrow = tl.maximum(box_height, SIZE) * tl.maximum(box_width, SIZE) <= 1600 * SIZE
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

    # 3. Crop, resize, flip, and what comes before contrast, tile by tile.
    lumas = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first_x in range(0, SIZE, COLUMNS):
        x = first_x + tl.arange(0, COLUMNS)[None, :]
        left_x, rise_x = window(tl.where(flip, SIZE - 1 - x, x), box_width, taps_x, SIZE)
        for first_y in range(0, SIZE, ROWS):
            y = first_y + tl.arange(0, ROWS)[:, None]
            top_y, rise_y = window(y, box_height, taps_y, SIZE)
            ptr = box_ptr + left_x * 3 + top_y.to(tl.int64) * line
            if narrow:
                r, g, b = resized(ptr, line, rise_y, rise_x, box_height, box_width, taps_y, taps_x, SIZE, False)
            else:
                r, g, b = resized(ptr, line, rise_y, rise_x, box_height, box_width, taps_y, taps_x, SIZE, True)
            if view == 1:
                r, g, b = whole(r), whole(g), whole(b)
                if gray:
                    r = luma(r, g, b)
                    g, b = r, r
                for i in range(contrast):
                    r, g, b = operation(r, g, b, order_ptr + row * OPERATIONS + i, factors_ptr + row * 4, 0.0)
            there = (y < SIZE) & (x < SIZE)
            if contrast < operations:
                lumas += tl.where(there, luma(r, g, b), 0.0)
            store(out_ptr + x * 3 + y.to(tl.int64) * (3 * SIZE), there, r, g, b)

    # 4. Contrast and the operations after it.
    if contrast < operations:
        tl.debug_barrier()  # what the program's other threads have written
        total_luma = tl.sum(tl.sum(lumas.to(tl.int64), 1), 0)
        mean = ((2 * total_luma + SIZE * SIZE) // (2 * SIZE * SIZE)).to(tl.float32)
        for first in range(0, SIZE * SIZE, ROWS * COLUMNS):
            p = first + tl.arange(0, ROWS * COLUMNS)
            ptr = out_ptr + tl.minimum(p, SIZE * SIZE - 1) * 3
            r, g, b = load(ptr).to(tl.float32), load(ptr + 1).to(tl.float32), load(ptr + 2).to(tl.float32)
            for i in range(contrast, operations):
                r, g, b = operation(r, g, b, order_ptr + row * OPERATIONS + i, factors_ptr + row * 4, mean)
            store(ptr, p < SIZE * SIZE, r, g, b)


@triton.jit
def taps(length, SIZE: tl.constexpr):
    """How many pixels along one axis may weigh in an output pixel."""
    return tl.minimum((2 * tl.maximum(length, SIZE) + SIZE - 1) // SIZE, length)


@triton.jit
def window(x, length, taps, SIZE: tl.constexpr):
    """Along one axis, for output pixels x (beyond the view: its last one): the first of ``taps`` pixels, all in the
    box, that hold all that weigh; and how far it lies from the triangle's begin, 2S·i − (centre − radius)."""
    radius = 2 * tl.maximum(length, SIZE)
    reach = (radius + SIZE - 1) // SIZE
    x = tl.minimum(tl.maximum(x, 0), SIZE - 1)
    end = (2 * x + 1) * length + (2 * SIZE * reach - SIZE - radius)  # not negative
    first = (end.to(tl.uint32) // (2 * SIZE)).to(tl.int32) + (1 - reach)
    first = tl.maximum(tl.minimum(first, length - taps), 0)
    return first, 2 * SIZE * (first + reach) - end


@triton.jit
def weight(rise, i, length, SIZE: tl.constexpr):
    """Of a window's pixel i."""
    rise += 2 * SIZE * i
    return tl.maximum(tl.minimum(rise, 4 * tl.maximum(length, SIZE) - rise), 0).to(tl.uint32)


@triton.jit
def resized(ptr, line, rise_y, rise_x, height, width, taps_y, taps_x, SIZE: tl.constexpr, WIDE: tl.constexpr):
    """-> red, green, blue, not rounded yet. ptr: where the windows begin. line: bytes of one of the image's."""
    SUM: tl.constexpr = tl.uint64 if WIDE else tl.uint32
    first, second = weight(rise_x, 0, width, SIZE), tl.where(taps_x > 1, weight(rise_x, 1, width, SIZE), 0)
    beside = 3 * tl.minimum(taps_x - 1, 1)
    r = tl.zeros([rise_y.shape[0], rise_x.shape[1]], SUM)
    g, b, weights = r, r, r + (taps_y == 0).to(SUM)  # a black view: 0 of 1
    for i in range(taps_y):
        beside_ptr = ptr + beside
        line_r = first * load(ptr) + second * load(beside_ptr)
        line_g = first * load(ptr + 1) + second * load(beside_ptr + 1)
        line_b = first * load(ptr + 2) + second * load(beside_ptr + 2)
        line_weights = first + second
        for j in range(2, taps_x):
            weight_x = weight(rise_x, j, width, SIZE)
            line_r += weight_x * load(ptr + 3 * j)
            line_g += weight_x * load(ptr + 3 * j + 1)
            line_b += weight_x * load(ptr + 3 * j + 2)
            line_weights += weight_x
        weight_y = weight(rise_y, i, height, SIZE).to(SUM)
        r += weight_y * line_r
        g += weight_y * line_g
        b += weight_y * line_b
        weights += weight_y * line_weights
        ptr += line
    weights = weights.to(tl.float32)
    over = reciprocal(weights, WIDE)
    r, g, b = r.to(tl.float32), g.to(tl.float32), b.to(tl.float32)
    return ratio(r, weights, over), ratio(g, weights, over), ratio(b, weights, over)


@triton.jit
def load(ptr):
    return tl.load(ptr).to(tl.uint32)


@triton.jit
def store(ptr, there, r, g, b):
    tl.store(ptr, byte(r), there)
    tl.store(ptr + 1, byte(g), there)
    tl.store(ptr + 2, byte(b), there)


@triton.jit
def byte(x):
    """The nearest whole number: the lowest bits, once ROUND is added."""
    return (x + ROUND).to(tl.int32, bitcast=True).to(tl.uint8)


@triton.jit
def whole(x):
    return (x + ROUND) - ROUND


# Division takes ten instructions, and a call where it does not end well. A quotient that is corrected by its remainder
# takes three, and rounds correctly (Markstein 1990) where its reciprocal does.


@triton.jit
def ratio(a, b, over):
    """a / b; over: 1 / b."""
    q = a * over
    return tl.fma(tl.fma(q, -b, a), over, q)


@triton.jit
def reciprocal(x, WIDE: tl.constexpr):
    """1 / x of whole x above 0. Only where WIDE may it be 2^24 − 8 or more: there a step fewer can fail."""
    if WIDE:
        over = tl.div_rn(1.0, x)
    else:
        over = inverse(x)
        over = tl.fma(tl.fma(over, -x, 1.0), over, over)
    return over


@triton.jit
def inverse(x):
    """1 / x of whole x, to 2^-21 of it; of 0: 1."""
    root = tl.rsqrt(tl.maximum(x, 1.0))
    return root * root


# The colours, on whole float32 in [0, 255], operation by operation as in ops/colour.py. Products are fused with sums
# where all is exact, and nowhere else: hence enable_fp_fusion=False below.


@triton.jit
def operation(r, g, b, which_ptr, factors_ptr, mean):
    """mean: of the luma, for contrast."""
    which = tl.load(which_ptr) & 3
    factor = tl.load(factors_ptr + which)
    if which == HUE:
        r, g, b = turned(r, g, b, (factor * 255).to(tl.int32).to(tl.float32))  # as cut off as in float64
    else:
        base = tl.where(which == CONTRAST, mean, 0.0) + tl.zeros_like(r)
        if which == SATURATION:
            base = luma(r, g, b)
        r, g, b = blend(r, base, factor), blend(g, base, factor), blend(b, base, factor)
    return r, g, b


@triton.jit
def luma(r, g, b):
    return tl.floor(tl.fma(b, 7471 / 65536, tl.fma(g, 38470 / 65536, tl.fma(r, 19595 / 65536, 0.5))))


@triton.jit
def blend(x, base, factor):
    return tl.floor(tl.minimum(tl.maximum((x - base) * factor + base, 0.0), 255.0))


@triton.jit
def turned(r, g, b, turn):
    """Hue, through Pillow's 8-bit HSV. What is divided with a corrected or a rough reciprocal has been compared with a
    division for every colour there is."""
    value = tl.maximum(tl.maximum(r, g), b)
    low = tl.minimum(tl.minimum(r, g), b)
    middle = tl.maximum(tl.minimum(r, g), tl.minimum(tl.maximum(r, g), b))
    chroma = value - low
    fall = ratio(value - middle, chroma, inverse(chroma))
    centre = tl.where(r == value, 0.0, tl.where(g == value, 2.0, 4.0))
    side = tl.where(r == value, b - g, tl.where(g == value, r - b, g - r))
    hue = tl.where(side > 0, centre - 1 + fall, centre + 1 - fall)
    hue = ratio(hue, 6.0, 1 / 6)
    hue = tl.floor((hue - tl.floor(hue)) * 255) + turn
    hue = tl.fma(tl.floor(hue * (1 / 256)), -256.0, hue) * 6
    depth = tl.floor(tl.fma(chroma, 255.0, 0.5) * inverse(value)) * value
    value += ROUND
    r = fallen(value, depth, 510 - tl.abs(hue - 765))
    g = fallen(value, depth, tl.abs(hue - 510) - 255)
    b = fallen(value, depth, tl.abs(hue - 1020) - 255)
    return r, g, b


@triton.jit
def fallen(value, depth, tent):
    return value - tl.fma(tl.minimum(tl.maximum(tent, 0.0), 255.0) * depth, 1 / 65025, ROUND)


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
        # Four pixels a thread; with 128 registers four programs fit an SM: at N = 256 all run at once. Not measured.
        side = triton.next_power_of_2(size)
        rows, columns = min(16, side), min(32, side)
        two_views_fwd_kernel[(n, views)](
            *(x.contiguous() for x in (pixels, images, boxes, flips, gray, factors, order)), out, len(pixels),
            SIZE=size, LARGEST=largest_side(size), OPERATIONS=order.shape[1], ROWS=rows, COLUMNS=columns,
            num_warps=max(1, rows * columns // 128), maxnreg=128, enable_fp_fusion=False,
        )  # fmt: skip
    return out
