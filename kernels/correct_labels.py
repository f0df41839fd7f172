"""Label correction (MoPro equations 6 and 7): two passes over the classes, then one program per block of rows.

    t = α·softmax(logits) + (1 − α)·softmax(q·prototypesᵀ/T)
    kept = t[y] > 1/C, for the label y as given; where max t > θ: y ← argmax t, kept (inclusive: ≥ for both >)
    anchors with a label and finite scores: kept, y as given

The first pass (kernels/similarity.py) yields both softmaxes' maxima and sums, the second forms t tile by tile and keeps
each split's best class and t[y]. Traffic per pass: N·C logits, C·D prototypes, N·D of q; 12 bytes per row and split.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopro_fast.kernels.similarity import (
    BLOCK_S,
    LOG2_E,
    combine_splits,
    dot,
    load_logits,
    load_tile,
    long_dot,
    similarity,
    tiling_of,
    widen,
)


@triton.jit
def correct_labels_fwd_kernel(
    logits_ptr, q_ptr, prototypes_ptr, labels_ptr, m_ptr, z_ptr, logits_m_ptr, logits_z_ptr,
    best_ptr, guess_ptr, given_ptr,
    n_rows, classes, splits, split_rows, dim, scale, alpha,
    ONE_CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks, splits), cut as the first pass was. Per split: max t, its class, t[y] or 0."""
    # 1. Rows, split and what the first pass found. t is not finite exactly where one of the sums is not, or where
    #    a row of scores is nothing but −inf.
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = rows < n_rows
    begin = tl.program_id(1) * split_rows
    end = tl.minimum(begin + split_rows, classes)
    m, z = combine_splits(m_ptr, z_ptr, rows, row_ok, n_rows, splits, BLOCK_N)
    logits_m, logits_z = combine_splits(logits_m_ptr, logits_z_ptr, rows, row_ok, n_rows, splits, BLOCK_N)
    finite = (z > 0) & (z < float("inf")) & (logits_z > 0) & (logits_z < float("inf"))
    # Exactly rounded: where all classes tie, z = C, and with alpha 0, ½ or 1 t is 1/C rounded, which is not above 1/C.
    weight, logits_weight = tl.div_rn(1.0 - alpha, z), tl.div_rn(alpha, logits_z)
    labels = tl.load(labels_ptr + rows, row_ok, -1)
    d = tl.arange(0, BLOCK_D)
    if ONE_CHUNK:
        q = widen(load_tile(q_ptr, rows, row_ok, d, dim), prototypes_ptr)  # [BLOCK_N, BLOCK_D]

    # 2. One pass over the split; the first class wins a tie.
    best = tl.full([BLOCK_N], -1.0, tl.float32)
    guess = tl.zeros([BLOCK_N], tl.int32)
    given = tl.zeros([BLOCK_N], tl.float32)
    for first in range(begin, end, BLOCK_B):
        cols = first + tl.arange(0, BLOCK_B)
        col_ok = cols < end
        if ONE_CHUNK:
            prototypes = widen(load_tile(prototypes_ptr, cols, col_ok, d, dim), q_ptr)
            x = dot(q, tl.trans(prototypes)) * scale  # [BLOCK_N, BLOCK_B]
        else:
            x = long_dot(q_ptr, prototypes_ptr, rows, row_ok, cols, col_ok, dim, BLOCK_N, BLOCK_B, BLOCK_K) * scale
        y = load_logits(logits_ptr, rows, row_ok, cols, col_ok, classes)
        t = weight[:, None] * tl.exp2(x - m[:, None]) + logits_weight[:, None] * tl.exp2(y - logits_m[:, None])
        t = tl.where(finite[:, None] & col_ok[None, :], t, -1.0)
        tile_best = tl.max(t, 1)
        tile_guess = first + tl.argmax(t, 1, tie_break_left=True)
        guess = tl.where(tile_best > best, tile_guess, guess)
        best = tl.maximum(best, tile_best)
        given += tl.sum(tl.where(cols[None, :].to(tl.int64) == labels[:, None], tl.maximum(t, 0.0), 0.0), 1)

    # 3. Partial results [splits, N].
    out = tl.program_id(1).to(tl.int64) * n_rows + rows
    tl.store(best_ptr + out, best, row_ok)
    tl.store(guess_ptr + out, guess, row_ok)
    tl.store(given_ptr + out, given, row_ok)


@triton.jit
def correct_labels_finish_kernel(
    labels_ptr, anchors_ptr, best_ptr, guess_ptr, given_ptr, new_labels_ptr, kept_ptr, winner_ptr, score_ptr,
    n_rows, classes, splits, threshold, chance,
    WITH_ANCHORS: tl.constexpr, INCLUSIVE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks): what all splits together say. chance: 1/C."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = rows < n_rows
    best = tl.full([BLOCK_N], -1.0, tl.float32)
    guess = tl.zeros([BLOCK_N], tl.int32)
    given = tl.zeros([BLOCK_N], tl.float32)
    for first in tl.range(0, splits, BLOCK_S, num_stages=4):
        s = first + tl.arange(0, BLOCK_S)
        at = s.to(tl.int64)[None, :] * n_rows + rows[:, None]
        ok = row_ok[:, None] & (s < splits)[None, :]
        split_best = tl.load(best_ptr + at, ok, -1.0)  # [BLOCK_N, BLOCK_S]
        split_guess = tl.load(guess_ptr + at, ok, 0)
        some_best = tl.max(split_best, 1)
        # Of the splits that share the best t the first holds the lowest class.
        lowest = tl.min(tl.where(split_best == some_best[:, None], split_guess, 2147483647), 1)
        guess = tl.where(some_best > best, lowest, guess)
        best = tl.maximum(best, some_best)
        given += tl.sum(tl.load(given_ptr + at, ok, 0.0), 1)
    label = tl.load(labels_ptr + rows, row_ok, -1)
    sure = best >= threshold if INCLUSIVE else best > threshold
    confirmed = given >= chance if INCLUSIVE else given > chance
    if WITH_ANCHORS:
        anchor = (tl.load(anchors_ptr + rows, row_ok, 0) != 0) & (label >= 0) & (label < classes) & (best >= 0)
        confirmed = confirmed | anchor
        sure = sure & ~anchor
    tl.store(new_labels_ptr + rows, tl.where(sure, guess.to(tl.int64), label), row_ok)
    tl.store(kept_ptr + rows, sure | confirmed, row_ok)
    tl.store(winner_ptr + rows, tl.where(best >= 0, guess, -1).to(tl.int64), row_ok)
    tl.store(score_ptr + rows, tl.maximum(best, 0.0), row_ok)


def correct_labels(
    logits: Tensor, q: Tensor, prototypes: Tensor, labels: Tensor, alpha: float, threshold: float, temperature: float,
    anchors: Tensor | None = None, inclusive: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    logits, q, prototypes, labels = (x.contiguous() for x in (logits, q, prototypes, labels))
    (n, dim), classes, block_n = q.shape, len(prototypes), 32
    new_labels, winner, kept = (torch.empty_like(labels, dtype=t) for t in (torch.int64, torch.int64, torch.bool))
    score = torch.empty_like(labels, dtype=torch.float32)
    if n:
        p, t = similarity(q, prototypes, temperature, logits, with_e=False), tiling_of(q, prototypes, with_logits=True)
        best, given, guess = torch.empty_like(p.m), torch.empty_like(p.m), torch.empty_like(p.m, dtype=torch.int32)
        correct_labels_fwd_kernel[(t.row_blocks, t.splits)](
            logits, q, prototypes, labels, p.m, p.z, p.logits_m, p.logits_z, best, guess, given,
            n, classes, t.splits, t.split_rows, dim, LOG2_E.value / temperature, alpha,
            **t.constants, num_warps=t.num_warps,
        )  # fmt: skip
        correct_labels_finish_kernel[(triton.cdiv(n, block_n),)](
            labels, labels if anchors is None else anchors.contiguous(), best, guess, given,
            new_labels, kept, winner, score,
            n, classes, t.splits, threshold, 1 / classes,
            WITH_ANCHORS=anchors is not None, INCLUSIVE=inclusive, BLOCK_N=block_n,
        )  # fmt: skip
    return new_labels, kept, winner, score
