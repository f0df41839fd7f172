"""What kernels/two_views.py divides by multiplying: every case that could round otherwise, against divisions."""

import importlib
import itertools

import numpy as np
import pytest
import torch

from mopro_fast.ops.colour import HUE, Jitter, color_jitter

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

kernel = importlib.import_module("mopro_fast.kernels.two_views")
fallen, luma, ratio, reciprocal = kernel.fallen, kernel.luma, kernel.ratio, kernel.reciprocal
turned, whole, ROUND = kernel.turned, kernel.whole, kernel.ROUND
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = 1024 if torch.cuda.is_available() else 1 << 16


@triton.jit
def quotients_kernel(a_ptr, b_ptr, out_ptr, n, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, b = tl.load(a_ptr + i, i < n, 1.0), tl.load(b_ptr + i, i < n, 1.0)
    tl.store(out_ptr + i, whole(ratio(a, b, reciprocal(b, WIDE))), i < n)


@triton.jit
def reciprocals_kernel(x_ptr, out_ptr, n, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, reciprocal(tl.load(x_ptr + i, i < n, 1.0), WIDE), i < n)


@triton.jit
def lumas_kernel(r_ptr, g_ptr, b_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    r, g, b = tl.load(r_ptr + i, i < n, 0.0), tl.load(g_ptr + i, i < n, 0.0), tl.load(b_ptr + i, i < n, 0.0)
    tl.store(out_ptr + i, luma(r, g, b), i < n)


@triton.jit
def turned_kernel(in_ptr, out_ptr, n, turn, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    r, g = tl.load(in_ptr + i, i < n, 0.0), tl.load(in_ptr + n + i, i < n, 0.0)
    r, g, b = turned(r, g, tl.load(in_ptr + 2 * n + i, i < n, 0.0), turn)
    tl.store(out_ptr + i, r, i < n)
    tl.store(out_ptr + n + i, g, i < n)
    tl.store(out_ptr + 2 * n + i, b, i < n)


@triton.jit
def falls_kernel(depth_ptr, tent_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    depth, tent = tl.load(depth_ptr + i, i < n, 0.0), tl.load(tent_ptr + i, i < n, 0.0)
    value = tl.zeros_like(depth) + 255.0
    tl.store(out_ptr + i, fallen(value + ROUND, depth, tent), i < n)


def launched(function, *arrays, planes=1, turn=(), **options):
    """-> what it writes for float32 arrays."""
    given = [torch.from_numpy(np.ascontiguousarray(x, np.float32)).to(DEVICE) for x in arrays]
    out, n = torch.empty_like(given[0]), len(given[0]) // planes
    function[(-(-n // BLOCK),)](*given, out, n, *turn, BLOCK=BLOCK, enable_fp_fusion=False, **options)
    return out.cpu().numpy()


def nearly_halves(totals, steps=2):
    """-> float32 a, b with a / b next to every k + ½ of a byte, b of the totals."""
    b = np.repeat(np.float32(totals), 256)
    a = (b.astype(np.float64) * np.tile(np.arange(256) + 0.5, len(totals))).astype(np.float32)
    near = [(a.view(np.int32) + step).view(np.float32) for step in range(-steps, steps + 1)]
    return np.concatenate(near), np.tile(b, len(near))


@pytest.mark.parametrize("wide", [False, True])
def test_quotients_next_to_halves(wide):
    """A float next to k + ½ ends in 15 zeros at least, so that a divisor of 24 bits is wrong about it only where its
    lower 16 bits are nearly 0: all of those, and some others. Without ``wide`` sums end at 16·10^6."""
    tops = np.arange(1 << 7, 1 << 8) << 16
    totals = np.concatenate([tops + near for near in range(-9, 10)])
    totals = totals[(totals >= 1 << 23) & ((totals < 16_000_000) | wide)]
    others = np.random.Generator(np.random.PCG64(0)).integers(1, 16_000_000, 400)
    a, b = nearly_halves(np.concatenate([totals, others, np.arange(1, 9), [448 * 448, 16_000_000]]))
    assert (launched(quotients_kernel, a, b, WIDE=wide) == np.rint(a / b)).all()


def test_reciprocals_of_long_sums_next_to_a_power_of_two():
    x = np.arange((1 << 24) - 99, 1 << 24).astype(np.float32)
    assert (launched(reciprocals_kernel, x, WIDE=True) == np.float32(1) / x).all()


def test_lumas():
    r, g, b = np.random.Generator(np.random.PCG64(1)).integers(0, 256, (3, 1 << 18))
    r, g, b = (np.concatenate([x, np.arange(256)]) for x in (r, g, b))
    sums = r * 19595 + g * 38470 + b * 7471 + 0x8000
    assert (sums % 65536 == 0).any() and (launched(lumas_kernel, r, g, b) == sums >> 16).all()


@pytest.mark.parametrize("turn", [0, -51, 84, 127])
def test_every_hue_and_every_depth(turn):
    """Of every chroma with every middle channel, in all sectors and on both sides; of every chroma of every value."""
    high, low = np.meshgrid(np.arange(256), np.arange(256), indexing="ij")
    high, low = high[high >= low], low[high >= low]
    full = np.full_like(high, 255)
    hues = np.stack([(full, 255 - high + low, 255 - high), (high, (high + low) // 2, low)], 1).reshape(3, -1)
    colours = np.concatenate([hues[list(order)].T for order in itertools.permutations(range(3))])
    jitter = Jitter(np.zeros(1, bool), np.float32([[1, 1, 1, turn / 255]]), np.array([[HUE]]))
    jitter.factors[0, HUE] = np.nextafter(jitter.factors[0, HUE], np.float32(np.copysign(2, turn)))
    expected = color_jitter(torch.from_numpy(colours.astype(np.uint8))[None, None], jitter)[0, 0].numpy()
    result = launched(turned_kernel, colours.T.ravel(), planes=3, turn=[float(turn)])
    assert (result == expected.T.ravel()).all()


def test_every_fall():
    depths = np.unique(np.outer(np.arange(256), np.arange(256)))
    depth, tent = np.repeat(depths, 256), np.tile(np.arange(256), len(depths))
    expected = 255 - np.rint((depth * tent).astype(np.float32) / np.float32(65025))
    assert (launched(falls_kernel, depth, tent) == expected).all()
