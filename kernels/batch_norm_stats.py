"""Mean and 1/√(var + eps) of NHWC activations per channel and group of consecutive rows; the running statistics' step.

    n = n₁ + n₂    δ = mean₂ − mean₁    mean = mean₁ + δ·n₂/n    M2 = M2₁ + M2₂ + δ²·n₁·n₂/n       M2 = Σ(x − mean)²

The positions of a group are cut into splits, one per program; a second launch, or the program that arrives last,
combines them in their order. No large sums cancel, and nothing is atomic but the count of arrivals. Traffic: x once,
and 8 bytes per split and channel. Loads are asynchronous (num_stages): docs/kernels.md, BatchNorm.
Source: Welford 1962 within a program, Chan, Golub and LeVeque 1983 between them; BatchNorm is Ioffe and Szegedy's
(arXiv 1502.03167).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from mopro_fast.kernels.similarity import programs


@triton.jit
def batch_norm_stats_fwd_kernel(
    x_ptr, arrivals_ptr, split_mean_ptr, split_m2_ptr, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr,
    groups, positions, split_positions, splits, channels, momentum, eps,
    LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Grid (groups·splits·channel blocks): mean and M2 of a split → [groups, splits, C]. positions: P of a group.

    LAST: the last program of a channel block does what batch_norm_stats_finish_kernel does.
    """
    part, c = part_of(channels, BLOCK_C)
    _, start, count = split_of(part, positions, split_positions, splits)
    rows = tl.arange(0, BLOCK_P)
    at = rows[:, None] * channels + c[None, :]
    # Every place of the tile has its own running mean and M2 (Welford); they are pooled once, at the end.
    mean = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    seen = 0.0
    for first in tl.range(0, count, BLOCK_P, num_stages=4):
        ok = (first + rows < count)[:, None] & (c < channels)[None, :]
        x = tl.where(ok, load(x_ptr + (start + first) * channels + at, ok), mean)
        seen += 1.0
        delta = x - mean
        mean += delta * (1.0 / seen)
        m2 += delta * (x - mean)
    seen_by_row = (tl.maximum(count - rows, 0) + BLOCK_P - 1) // BLOCK_P
    _, mean, m2 = pool(seen_by_row.to(tl.float32)[:, None], mean, m2, 0)
    out = part * channels + c
    tl.store(split_mean_ptr + out, mean, c < channels)
    tl.store(split_m2_ptr + out, m2, c < channels)
    if LAST:  # noqa: SIM102, a constant
        if arrived_last(arrivals_ptr, groups * splits, channels, BLOCK_C):
            finish_stats_of(
                c, split_mean_ptr, split_m2_ptr, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr,
                groups, positions, split_positions, splits, channels, momentum, eps, BLOCK_G, BLOCK_S, BLOCK_C, 4,
            )  # fmt: skip


@triton.jit
def batch_norm_stats_finish_kernel(
    split_mean_ptr, split_m2_ptr, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr,
    groups, positions, split_positions, splits, channels, momentum, eps,
    BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (channel blocks): mean and 1/√(var + eps) [groups, C]; one step of the running statistics to their mean."""
    finish_stats_of(
        tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C),
        split_mean_ptr, split_m2_ptr, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr,
        groups, positions, split_positions, splits, channels, momentum, eps, BLOCK_G, BLOCK_S, BLOCK_C, 1,
    )  # fmt: skip


@triton.jit
def finish_stats_of(
    c, split_mean_ptr, split_m2_ptr, mean_ptr, rstd_ptr, running_mean_ptr, running_var_ptr,
    groups, positions, split_positions, splits, channels, momentum, eps,
    BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    mean_sum = tl.zeros([BLOCK_C], tl.float32)
    var_sum = tl.zeros([BLOCK_C], tl.float32)
    for first_group in range(0, groups, BLOCK_G):
        count = tl.zeros([1, 1], tl.float32)
        mean = tl.zeros([BLOCK_G, BLOCK_C], tl.float32)
        m2 = tl.zeros([BLOCK_G, BLOCK_C], tl.float32)
        for first in tl.range(0, splits, BLOCK_S, num_stages=STAGES):
            at, ok = split_tile(first_group, groups, first, splits, c, channels, BLOCK_G, BLOCK_S)
            left = positions - (first + tl.arange(0, BLOCK_S)).to(tl.int64) * split_positions
            more, more_mean, more_m2 = pool(
                tl.minimum(tl.maximum(left, 0), split_positions).to(tl.float32)[None, :, None],
                tl.load(split_mean_ptr + at, ok, 0.0),
                tl.load(split_m2_ptr + at, ok, 0.0),
                1,
            )
            mean, m2 = merge(count, mean, m2, more, more_mean, more_m2)
            count += more
        at, ok = group_tile(first_group, groups, c, channels, BLOCK_G)
        tl.store(mean_ptr + at, mean, ok)
        tl.store(rstd_ptr + at, 1.0 / tl.sqrt(m2 / count + eps), ok)
        mean_sum += tl.sum(mean, 0)
        var_sum += tl.sum(m2 / (count - 1.0), 0)  # unbiased, as PyTorch's running variance
    old_mean = tl.load(running_mean_ptr + c, c < channels)
    old_var = tl.load(running_var_ptr + c, c < channels)
    tl.store(running_mean_ptr + c, old_mean + momentum * (mean_sum / groups - old_mean), c < channels)
    tl.store(running_var_ptr + c, old_var + momentum * (var_sum / groups - old_var), c < channels)


@triton.jit
def arrived_last(arrivals_ptr, programs, channels, BLOCK_C: tl.constexpr):
    """Whether this program is the last of its channel block to come here, and sees what the others have stored. The
    count is 0 again afterwards."""
    count_ptr = arrivals_ptr + tl.program_id(0) % tl.cdiv(channels, BLOCK_C)
    tl.debug_barrier()  # the stores of all threads of this program come before the count, which releases them
    last = tl.atomic_add(count_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(count_ptr, 0)
    return last


@triton.jit
def part_of(channels, BLOCK_C: tl.constexpr):
    """-> which of the groups' splits this program has (int64), its channels [BLOCK_C].

    Channel blocks run fastest: programs of the same moment then read whole lines of x, not 128 bytes of every line.
    """
    blocks = tl.cdiv(channels, BLOCK_C)
    part, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    return part.to(tl.int64), block * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def split_of(part, positions, split_positions, splits):
    """-> the split's group, its first position among those of all groups (both int64), how many it has."""
    group, begin = part // splits, part % splits * split_positions
    return group, group * positions + begin, tl.minimum(positions - begin, split_positions).to(tl.int32)


@triton.jit
def load(ptr, ok):
    return tl.load(ptr, ok, 0.0).to(tl.float32)


@triton.jit
def group_tile(first_group, groups, c, channels, BLOCK_G: tl.constexpr):
    """Offsets into [groups, C], and which of them exist."""
    g = first_group + tl.arange(0, BLOCK_G)
    return g.to(tl.int64)[:, None] * channels + c[None, :], (g < groups)[:, None] & (c < channels)[None, :]


@triton.jit
def split_tile(
    first_group, groups, first, splits, c, channels, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr
):  # fmt: skip
    """Offsets into [groups, splits, C], and which of them exist."""
    g = first_group + tl.arange(0, BLOCK_G)
    s = first + tl.arange(0, BLOCK_S)
    row = g.to(tl.int64)[:, None] * splits + s[None, :]
    ok = (g < groups)[:, None] & (s < splits)[None, :]
    return row[:, :, None] * channels + c[None, None, :], ok[:, :, None] & (c < channels)[None, None, :]


@triton.jit
def merge(count, mean, m2, more, more_mean, more_m2):
    """Mean and M2 of two parts; the second has members."""
    share = more / (count + more)
    delta = more_mean - mean
    return mean + delta * share, m2 + more_m2 + delta * delta * (count * share)


@triton.jit
def pool(count, mean, m2, AXIS: tl.constexpr):
    """Count, mean and M2 of everything along an axis; its first count is above 0."""
    total = tl.sum(count, AXIS)
    pooled = tl.sum(mean * count, AXIS) / total
    apart = mean - tl.expand_dims(pooled, AXIS)
    return total, pooled, tl.sum(m2 + apart * apart * count, AXIS)


class Tiling(NamedTuple):
    """How programs share x; the names are the kernels'."""

    grid: tuple[int]
    integers: tuple[int, int, int, int]
    """positions, split_positions, splits, channels"""
    blocks: dict[str, int]

    @property
    def splits(self) -> int:
        return self.integers[2]


def tiling(x: Tensor, groups: int, tile_bytes: int, per_sm: int) -> Tiling:
    """tile_bytes: of x, that a program has in hand at a time. per_sm: programs on an SM, no more than it holds at a
    time; each walks the tiles of its split, for a loop is what the compiler pipelines. Where groups and channel blocks
    are more than that, or divide it badly, each is one split and SMs idle at the end. Not measured."""
    channels = x.shape[1]
    positions = x.numel() // channels // groups
    block_c = min(64, triton.next_power_of_2(channels))  # a cache line of 16-bit values
    block_p = tile_bytes // x.element_size() // max(32, block_c)  # taller tiles of a few channels would spill
    channel_blocks, tiles = triton.cdiv(channels, block_c), triton.cdiv(positions, block_p)
    split_positions = block_p * triton.cdiv(tiles, max(1, per_sm * programs(x.device) // (groups * channel_blocks)))
    splits = triton.cdiv(positions, split_positions)
    blocks = {"BLOCK_P": block_p, "BLOCK_C": block_c}
    return Tiling((groups * splits * channel_blocks,), (positions, split_positions, splits, channels), blocks)


def finish_tiling(groups: int, splits: int, channels: int) -> tuple[tuple[int], dict[str, int]]:
    """-> grid, blocks and warps of the launches that combine splits. All splits at once, and as many groups as go with
    them: there are a few hundred rows of partial results, and every turn of a loop would cost a memory latency."""
    block_s = min(512, triton.next_power_of_2(splits))
    block_g = min(512 // block_s, triton.next_power_of_2(groups))
    block_c = 8  # a sector of 32 bytes of a split. Not measured
    num_warps = max(1, block_s * block_g * block_c // 512)
    blocks = {"BLOCK_G": block_g, "BLOCK_S": block_s, "BLOCK_C": block_c, "num_warps": num_warps}
    return (triton.cdiv(channels, block_c),), blocks


def finish_in_last(groups: int, splits: int, last: bool) -> dict[str, int]:
    """Blocks of what the last program combines: 16 partial results of its channels in hand, and three times as many
    under way, for there may be hundreds. More would spill. Not measured."""
    if not last:
        return {"BLOCK_G": 1, "BLOCK_S": 1}
    block_s = min(16, triton.next_power_of_2(splits))
    return {"BLOCK_G": min(16 // block_s, triton.next_power_of_2(groups)), "BLOCK_S": block_s}


_ARRIVALS: dict[tuple[torch.device, int], Tensor] = {}
COUNTS = 1024


def arrivals(x: Tensor, channels: int) -> Tensor | None:
    """Zeros for `arrived_last`, of x's device and the current stream. What was captured on a stream, and what runs
    there, must not run at the same time. None where the first call is captured, for the zeros would be written at the
    replay; and where there are more blocks of 64 channels than counts."""
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    key = x.device, torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    if key not in _ARRIVALS and not capturing:
        _ARRIVALS[key] = torch.zeros(COUNTS, dtype=torch.int32, device=x.device)
    return _ARRIVALS.get(key) if channels <= 64 * COUNTS else None


def batch_norm_stats_(
    x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float, group: int,
    one_launch: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> mean, rstd f32 [groups, C]"""
    x, channels = channels_last(x), x.shape[1]
    groups = len(x) // group if group else 1
    if not x.numel():
        return new(x, groups, channels).zero_(), new(x, groups, channels).fill_(eps**-0.5)
    counts = arrivals(x, channels) if one_launch else None
    last = counts is not None
    # Two programs on an SM, with 128 registers of 8 warps each. Where the last one finishes, the larger tile spills;
    # with the smaller 48 KB of an SM are in flight, not 96, and more programs would leave more to combine. Not measured
    t = tiling(x, groups, tile_bytes=8192 if last else 16384, per_sm=2)
    s = Statistics(x, groups, t, running_mean, running_var, momentum, eps)
    batch_norm_stats_fwd_kernel[t.grid](
        x, counts if last else s.mean, *s.arguments,
        LAST=last, **t.blocks, **finish_in_last(groups, t.splits, last), num_warps=8,
    )  # fmt: skip
    if not last:
        s.finish()
    return s.moved()


class Statistics:
    """What the kernels of the statistics share: partial results, mean, rstd f32 [groups, C], running statistics."""

    def __init__(
        self, x: Tensor, groups: int, t: Tiling, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float
    ) -> None:
        channels = t.integers[-1]
        self.splits = tuple(new(x, groups, t.splits, channels) for _ in range(2))
        self.mean, self.rstd = (new(x, groups, channels) for _ in range(2))
        self._given = running_mean, running_var
        self._running = running_mean.contiguous(), running_var.contiguous()
        self.arguments = (*self.splits, self.mean, self.rstd, *self._running, groups, *t.integers, momentum, eps)

    def finish(self) -> None:
        """The second launch."""
        groups, splits, channels = self.splits[0].shape
        grid, blocks = finish_tiling(groups, splits, channels)
        batch_norm_stats_finish_kernel[grid](*self.arguments, **blocks)

    def moved(self) -> tuple[Tensor, Tensor]:
        """-> mean, rstd; the running statistics have moved"""
        for given, own in zip(self._given, self._running, strict=True):
            if given is not own:
                given.copy_(own)
        increment_version(list(self._given))
        return self.mean, self.rstd


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def new(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)
