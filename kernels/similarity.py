"""The pass that the losses share: softmax statistics and softmax-weighted mean of a bank of vectors.

For every row n and a bank b of B rows (the queue or the prototypes), with x_nb = q_n·b_b / T:

    M_n = max_b x_nb      Z_n = Σ_b exp(x_nb − M_n)      E_n = Σ_b exp(x_nb − M_n) b_b

so that log-sum-exp = M + log Z, and E/Z = Σ softmax·b: attention with keys = values. d(log-sum-exp)/dq = E/(Z·T).
The bank is cut into splits, one per program, for N = 256 rows alone do not fill a GPU; the next kernel adds the
splits up in their order. Nothing of size N×B is written.

Everything is in base 2: x stands for x·log2(e), exp for exp2.
Traffic from memory: B·D + N·D in, and N·B logits if asked for; from L2 the bank once per row block. Out: N·(D + 2)
floats per split. Source: MoPro equations 3 to 5; the running
maximum and the split of the bank are FlashAttention's (arXiv 2205.14135, section 3.1) and flash-decoding's.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Splits combined at a time, four times that many in flight: at D = 128, 16 KB per program. Not measured.
BLOCK_S = tl.constexpr(8)
# Triton's interpreter holds bfloat16 as bits and would multiply those.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def similarity_fwd_kernel(
    q_ptr, bank_ptr, logits_ptr, m_ptr, z_ptr, e_ptr, logits_m_ptr, logits_z_ptr,
    n_rows, bank_rows, split_rows, dim, scale,
    WITH_E: tl.constexpr, WITH_LOGITS: tl.constexpr, ONE_CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks, splits, chunks of E's columns). scale: log2(e)/T. WITH_LOGITS: M and Z of logits [N, B] too."""
    # 1. This program's rows of q, split of the bank and columns of E.
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = rows < n_rows
    begin = tl.program_id(1) * split_rows
    end = tl.minimum(begin + split_rows, bank_rows)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    if ONE_CHUNK:
        q = widen(load_tile(q_ptr, rows, row_ok, d, dim), bank_ptr)  # [BLOCK_N, BLOCK_D]

    # 2. One pass over the split. The running maximum could be any constant near it, and for unit vectors 1/T is
    #    one; but T = 0.01 or longer vectors must not overflow.
    m = tl.full([BLOCK_N], float("-inf"), tl.float32)
    z = tl.zeros([BLOCK_N], tl.float32)
    e = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    logits_m = tl.full([BLOCK_N], float("-inf"), tl.float32)
    logits_z = tl.zeros([BLOCK_N], tl.float32)
    for first in range(begin, end, BLOCK_B):
        cols = first + tl.arange(0, BLOCK_B)
        col_ok = cols < end
        bank = widen(load_tile(bank_ptr, cols, col_ok, d, dim), q_ptr)  # [BLOCK_B, BLOCK_D]
        if ONE_CHUNK:
            x = dot(q, tl.trans(bank)) * scale  # [BLOCK_N, BLOCK_B]
        else:
            x = long_dot(q_ptr, bank_ptr, rows, row_ok, cols, col_ok, dim, BLOCK_N, BLOCK_B, BLOCK_K) * scale
        x = tl.where(col_ok[None, :], x, float("-inf"))
        m, z, p, rescale = add_tile(m, z, x)
        if WITH_E:
            e = e * rescale[:, None] + dot(p.to(bank.dtype), bank)
        if WITH_LOGITS:
            x = load_logits(logits_ptr, rows, row_ok, cols, col_ok, bank_rows)
            logits_m, logits_z, _, _ = add_tile(logits_m, logits_z, x)

    # 3. Partial results [splits, N] and [splits, N, D]. Every chunk has the same M and Z: the first writes them.
    out = tl.program_id(1).to(tl.int64) * n_rows + rows
    if WITH_E:
        tl.store(e_ptr + out[:, None] * dim + d[None, :], e, row_ok[:, None] & (d < dim)[None, :])
    if tl.program_id(2) == 0:
        tl.store(m_ptr + out, m, row_ok)
        tl.store(z_ptr + out, z, row_ok)
        if WITH_LOGITS:
            tl.store(logits_m_ptr + out, logits_m, row_ok)
            tl.store(logits_z_ptr + out, logits_z, row_ok)


@triton.jit
def load_tile(ptr, rows, row_ok, d, dim):
    """Rows and columns of a contiguous [*, dim] matrix, zeros beyond its edges."""
    return tl.load(ptr + rows.to(tl.int64)[:, None] * dim + d[None, :], row_ok[:, None] & (d < dim)[None, :], 0.0)


@triton.jit
def load_logits(ptr, rows, row_ok, cols, col_ok, classes):
    """A tile of the classifier's logits in base 2, −inf beyond its edges."""
    at = rows.to(tl.int64)[:, None] * classes + cols[None, :]
    return tl.load(ptr + at, row_ok[:, None] & col_ok[None, :], float("-inf")).to(tl.float32) * LOG2_E


@triton.jit
def widen(x, other_ptr):
    """x, as float32 unless the other operand has its type: a tensor core multiplies one type."""
    if x.dtype != other_ptr.dtype.element_ty:
        x = x.to(tl.float32)
    return x


@triton.jit
def dot(a, b):
    """Float32 accumulation; float32 operands as three tf32 products, which are as exact as float32 ones."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def long_dot(
    q_ptr, bank_ptr, rows, row_ok, cols, col_ok, dim,
    BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """q·bankᵀ in chunks of D, where whole operands would not fit the registers."""
    x = tl.zeros([BLOCK_N, BLOCK_B], tl.float32)
    for first in range(0, dim, BLOCK_K):
        d = first + tl.arange(0, BLOCK_K)
        q = widen(load_tile(q_ptr, rows, row_ok, d, dim), bank_ptr)
        bank = widen(load_tile(bank_ptr, cols, col_ok, d, dim), q_ptr)
        x += dot(q, tl.trans(bank))
    return x


@triton.jit
def add_tile(m, z, x):
    """Take scores x [BLOCK_N, *] into maximum m and sum z; -> m, z, exp(x − m), the factor of older sums."""
    new_m = tl.maximum(m, tl.max(x, 1))
    shift = tl.where(new_m == float("-inf"), 0.0, new_m)  # only −inf so far: exp(−inf − 0) is 0, exp(−inf + inf) NaN
    rescale = tl.exp2(m - shift)
    p = tl.exp2(x - shift[:, None])
    return new_m, z * rescale + tl.sum(p, 1), p, rescale


@triton.jit
def combine_splits(m_ptr, z_ptr, rows, row_ok, n_rows, splits, BLOCK_N: tl.constexpr):
    """M and Z of BLOCK_N rows: all splits in their order."""
    m = tl.full([BLOCK_N], float("-inf"), tl.float32)
    z = tl.zeros([BLOCK_N], tl.float32)
    for first in tl.range(0, splits, BLOCK_S, num_stages=4):
        s = first + tl.arange(0, BLOCK_S)
        at = s.to(tl.int64)[None, :] * n_rows + rows[:, None]
        ok = row_ok[:, None] & (s < splits)[None, :]
        split_m = tl.load(m_ptr + at, ok, float("-inf"))  # [BLOCK_N, BLOCK_S]
        split_z = tl.load(z_ptr + at, ok, 0.0)
        new_m = tl.maximum(m, tl.max(split_m, 1))
        shift = tl.where(new_m == float("-inf"), 0.0, new_m)
        z = z * tl.exp2(m - shift) + tl.sum(split_z * tl.exp2(split_m - shift[:, None]), 1)
        m = new_m
    return m, z


@triton.jit
def combine_splits_with_e(m_ptr, z_ptr, e_ptr, row, n_rows, splits, dim, BLOCK_D: tl.constexpr):
    """M, Z and E [BLOCK_D] of one row: all splits in their order."""
    d = tl.arange(0, BLOCK_D)
    m = float("-inf")
    z = 0.0
    e = tl.zeros([BLOCK_D], tl.float32)
    for first in tl.range(0, splits, BLOCK_S, num_stages=4):
        s = first + tl.arange(0, BLOCK_S)
        at = s.to(tl.int64) * n_rows + row
        split_m = tl.load(m_ptr + at, s < splits, float("-inf"))
        split_z = tl.load(z_ptr + at, s < splits, 0.0)
        split_e = load_tile(e_ptr, at, s < splits, d, dim)  # [BLOCK_S, BLOCK_D]
        new_m = tl.maximum(m, tl.max(split_m, 0))
        shift = tl.where(new_m == float("-inf"), 0.0, new_m)
        rescale, weight = tl.exp2(m - shift), tl.exp2(split_m - shift)
        z = z * rescale + tl.sum(split_z * weight, 0)
        e = e * rescale + tl.sum(split_e * weight[:, None], 0)
        m = new_m
    return m, z, e


class Partials(NamedTuple):
    """What `similarity_fwd_kernel` leaves: float32 [splits, N], and e [splits, N, D]."""

    m: Tensor
    z: Tensor
    e: Tensor
    logits_m: Tensor
    logits_z: Tensor

    @property
    def splits(self) -> int:
        return len(self.m)


class Tiling(NamedTuple):
    """How N rows meet a bank of B rows; constants are the kernel's upper-case parameters."""

    row_blocks: int
    splits: int
    split_rows: int
    chunks: int
    constants: dict[str, int | bool]
    num_warps: int


def tiling(n: int, bank_rows: int, dim: int, half: bool, with_logits: bool, programs: int) -> Tiling:
    """half: both operands are of one 16-bit type. programs: how many run at a time."""
    block_d = block_of(dim)
    if half:  # E takes 64 registers of each of 128 threads, a tile of the bank 16 KB; logits want registers too
        block_d = min(block_d, 512)
        block_n = min(64, max(16, 8192 // block_d))
        block_b = min(block_n, 32 if with_logits or dim % 16 else 64)  # rows not of whole vectors take more registers
        one_chunk, num_warps = dim <= block_d, 8 if with_logits else 4
    else:  # three products want every operand twice in registers: these tiles do not spill, larger ones do
        block_d = min(block_d, 128)
        block_n = block_b = 32
        one_chunk, num_warps = False, 8
    constants = {"BLOCK_N": block_n, "BLOCK_B": block_b, "BLOCK_D": block_d, "BLOCK_K": 32, "ONE_CHUNK": one_chunk}
    row_blocks, tiles = triton.cdiv(n, block_n), max(1, triton.cdiv(bank_rows, block_b))
    if (
        half and tiles * row_blocks >= 16 * programs
    ):  # two per SM with eight tiles each: one multiplies, one exponentiates
        programs *= 2
    tiles_per_split = max(2, triton.cdiv(tiles, max(1, programs // row_blocks)))  # one tile would not pay for its E
    splits = triton.cdiv(tiles, tiles_per_split)
    return Tiling(row_blocks, splits, tiles_per_split * block_b, triton.cdiv(dim, block_d), constants, num_warps)


def tiling_of(q: Tensor, bank: Tensor, with_logits: bool) -> Tiling:
    half = q.dtype == bank.dtype and q.element_size() == 2
    return tiling(len(q), len(bank), q.shape[1], half, with_logits, programs(q.device))


@functools.cache
def programs(device: torch.device) -> int:
    """One program per SM: a second one would repeat each split's start and its write of E. Not measured."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 12  # the interpreter: enough to cut the bank into splits


def similarity(
    q: Tensor, bank: Tensor, temperature: float, logits: Tensor | None = None, with_e: bool = True
) -> Partials:
    """q [N, D] against bank [B, D], and the statistics of logits [N, B] if given. All contiguous, N above 0."""
    (n, dim), t = q.shape, tiling_of(q, bank, logits is not None)

    def partial(*shape: int) -> Tensor:
        return torch.empty(t.splits, n, *shape, dtype=torch.float32, device=q.device)

    m, z = partial(), partial()
    e = partial(dim) if with_e else m  # where a pointer is not used, any will do
    logits_m, logits_z = (m, z) if logits is None else (partial(), partial())
    similarity_fwd_kernel[(t.row_blocks, t.splits, t.chunks if with_e else 1)](
        q, bank, m if logits is None else logits, m, z, e, logits_m, logits_z,
        n, len(bank), t.split_rows, dim, LOG2_E.value / temperature,
        WITH_E=with_e, WITH_LOGITS=logits is not None, **t.constants, num_warps=t.num_warps,
    )  # fmt: skip
    return Partials(m, z, e, logits_m, logits_z)


def block_of(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def row_options(dim: int) -> dict[str, int]:
    """For kernels whose program has one row. Left to itself ptxas stops at 48 to 80 registers for some D and spills;
    with D above 512, Triton 3.6 wants 168."""
    return {"BLOCK_D": block_of(dim), "maxnreg": 128 if dim <= 512 else 168}
