"""Steps 3, 5 and 8 of one MoPro step: the three losses (MoPro equations 3 to 5), their sum and its gradient.

    loss = Σ_kept CE(logits, y)/R + w_proto·Σ_kept CE(q·prototypesᵀ/T, y)/R + w_inst·Σ InfoNCE/N

kept: the R rows that are said to be and whose label y is a class. One pass over the queue, one over the prototypes
with the logits beside them (kernels/similarity.py). Five launches forward (two for the queue, the prototypes, rows,
sums), one backward.
Traffic beyond those passes: (D + 2)·4 bytes per row and split; backward reads the logits and writes their gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopro_fast.kernels.info_nce import info_nce
from mopro_fast.kernels.prototype_contrast import contrast_row, label_of
from mopro_fast.kernels.similarity import LN_2, LOG2_E, block_of, combine_splits, row_options, similarity

SUM_ROWS = 1024  # rows that mopro_loss_sum_kernel adds at a time


@triton.jit
def mopro_loss_fwd_kernel(
    logits_ptr, q_ptr, prototypes_ptr, labels_ptr, kept_ptr, m_ptr, z_ptr, e_ptr, logits_m_ptr, logits_z_ptr,
    cls_ptr, hit_ptr, log_z_ptr, proto_ptr, grad_ptr,
    n_rows, classes, splits, dim, scale,
    CONTRAST: tl.constexpr, WITH_KEPT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (N): both losses of the label, and the prototype loss's gradient to q."""
    row = tl.program_id(0).to(tl.int64)
    label, kept = label_of(labels_ptr, kept_ptr, row, row < n_rows, classes, WITH_KEPT)

    # 1. The classifier's cross-entropy, and whether no class scores higher.
    one = row + tl.arange(0, 1)  # a block of one row, to share what correct_labels does for a block of rows
    m, z = combine_splits(logits_m_ptr, logits_z_ptr, one, one < n_rows, n_rows, splits, 1)
    x = tl.load(logits_ptr + row * classes + label, kept, 0.0).to(tl.float32) * LOG2_E
    tl.store(cls_ptr + one, tl.where(kept, (m - x + tl.log2(z)) * LN_2, 0.0))
    tl.store(hit_ptr + one, kept & (x >= m))
    tl.store(log_z_ptr + one, m + tl.log2(z))

    # 2. The prototypes' cross-entropy and its gradient.
    if CONTRAST:
        contrast_row(
            q_ptr, prototypes_ptr, m_ptr, z_ptr, e_ptr, proto_ptr, grad_ptr,
            row, label, kept, n_rows, splits, dim, scale, BLOCK_D,
        )  # fmt: skip


@triton.jit
def mopro_loss_sum_kernel(
    labels_ptr, kept_ptr, cls_ptr, hit_ptr, proto_ptr, inst_ptr, inst_hit_ptr, loss_ptr, metrics_ptr, rows_ptr,
    n_rows, n, classes, w_proto, w_inst,
    CONTRAST: tl.constexpr, WITH_KEPT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: sums over the rows in a fixed order. n: the rows as a float, at least 1."""
    cls = tl.zeros([BLOCK_N], tl.float32)
    hit = tl.zeros([BLOCK_N], tl.float32)
    proto = tl.zeros([BLOCK_N], tl.float32)
    inst = tl.zeros([BLOCK_N], tl.float32)
    inst_hit = tl.zeros([BLOCK_N], tl.float32)
    kept = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, n_rows, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        ok = rows < n_rows
        cls += tl.load(cls_ptr + rows, ok, 0.0)
        hit += tl.load(hit_ptr + rows, ok, 0).to(tl.float32)
        if CONTRAST:
            proto += tl.load(proto_ptr + rows, ok, 0.0)
        inst += tl.load(inst_ptr + rows, ok, 0.0)
        inst_hit += tl.load(inst_hit_ptr + rows, ok, 0).to(tl.float32)
        _, use = label_of(labels_ptr, kept_ptr, rows, ok, classes, WITH_KEPT)
        kept += use.to(tl.float32)

    count = tl.maximum(tl.sum(kept, 0), 1.0)
    cls_mean = tl.sum(cls, 0) / count
    proto_mean = tl.sum(proto, 0) / count
    inst_mean = tl.sum(inst, 0) / n
    loss = cls_mean + w_proto * proto_mean + w_inst * inst_mean
    tl.store(loss_ptr, loss)
    tl.store(rows_ptr, count)
    tl.store(metrics_ptr + 0, loss)
    tl.store(metrics_ptr + 1, cls_mean)
    tl.store(metrics_ptr + 2, proto_mean)
    tl.store(metrics_ptr + 3, inst_mean)
    tl.store(metrics_ptr + 4, tl.sum(hit, 0) / count)
    tl.store(metrics_ptr + 5, tl.sum(inst_hit, 0) / n)
    tl.store(metrics_ptr + 6, tl.sum(kept, 0) / n)


@triton.jit
def mopro_loss_bwd_kernel(
    loss_grad_ptr, logits_ptr, labels_ptr, kept_ptr, log_z_ptr, rows_ptr, inst_grad_ptr, proto_grad_ptr,
    logits_grad_ptr, q_grad_ptr,
    n_rows, classes, dim, w_proto, w_inst,
    WITH_KEPT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (N, blocks of classes): (softmax − one-hot)/R where kept; the first block of a row also scales q's."""
    row = tl.program_id(0).to(tl.int64)
    loss_grad = tl.load(loss_grad_ptr).to(tl.float32)
    per_row = loss_grad / tl.load(rows_ptr)
    label, kept = label_of(labels_ptr, kept_ptr, row, row < n_rows, classes, WITH_KEPT)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    x = tl.load(logits_ptr + row * classes + c, (c < classes) & kept, 0.0).to(tl.float32) * LOG2_E
    softmax = tl.exp2(x - tl.load(log_z_ptr + row))
    target = c.to(tl.int64) == label
    logits_grad = tl.where(kept, (softmax - target.to(tl.float32)) * per_row, 0.0)
    tl.store(logits_grad_ptr + row * classes + c, logits_grad, c < classes)
    if tl.program_id(1) == 0:
        d = tl.arange(0, BLOCK_D)
        inst = tl.load(inst_grad_ptr + row * dim + d, d < dim, 0.0)
        proto = tl.load(proto_grad_ptr + row * dim + d, d < dim, 0.0)  # zeros where not kept
        q_grad = inst * (w_inst * loss_grad / n_rows) + proto * (w_proto * per_row)
        tl.store(q_grad_ptr + row * dim + d, q_grad, d < dim)


def mopro_loss(
    logits: Tensor, q: Tensor, k: Tensor, queue: Tensor, prototypes: Tensor, labels: Tensor, kept: Tensor | None,
    temperature: float, w_proto: float, w_inst: float, contrast: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """-> loss f32 [], metrics f32 [7]; for the backward pass inst_grad, proto_grad, log_z, rows."""
    logits, q, prototypes, labels = (x.contiguous() for x in (logits, q, prototypes, labels))
    (n, dim), classes, with_kept = q.shape, len(prototypes), kept is not None
    kept = kept.contiguous() if with_kept else labels

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    loss, metrics, rows = new(), new(7), new(1)
    cls, proto, log_z, hit = new(n), new(n), new(n), new(n, dtype=torch.bool)
    proto_grad = new(n, dim) if contrast else new(n, dim).zero_()
    inst, inst_hit, inst_grad = info_nce(q, k, queue, temperature)
    if n:
        p = similarity(q, prototypes, temperature, logits, with_e=contrast)
        mopro_loss_fwd_kernel[(n,)](
            logits, q, prototypes, labels, kept, p.m, p.z, p.e, p.logits_m, p.logits_z,
            cls, hit, log_z, proto, proto_grad,
            n, classes, p.splits, dim, LOG2_E.value / temperature,
            CONTRAST=contrast, WITH_KEPT=with_kept, **row_options(dim),
        )  # fmt: skip
    mopro_loss_sum_kernel[(1,)](
        labels, kept, cls, hit, proto, inst, inst_hit, loss, metrics, rows,
        n, float(max(1, n)), classes, w_proto, w_inst,
        CONTRAST=contrast, WITH_KEPT=with_kept, BLOCK_N=SUM_ROWS,
    )  # fmt: skip
    return loss, metrics, inst_grad, proto_grad, log_z, rows


def mopro_loss_backward(
    loss_grad: Tensor, logits: Tensor, labels: Tensor, kept: Tensor | None, inst_grad: Tensor, proto_grad: Tensor,
    log_z: Tensor, rows: Tensor, w_proto: float, w_inst: float, q_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> gradients of logits [N, C] and q [N, D], in their types"""
    logits, labels = logits.contiguous(), labels.contiguous()
    (n, classes), dim, block_c = logits.shape, inst_grad.shape[1], 1024
    logits_grad, q_grad = torch.empty_like(logits), torch.empty_like(inst_grad, dtype=q_dtype)
    if n:
        mopro_loss_bwd_kernel[(n, triton.cdiv(classes, block_c))](
            loss_grad, logits, labels, labels if kept is None else kept.contiguous(), log_z, rows,
            inst_grad, proto_grad, logits_grad, q_grad,
            n, classes, dim, w_proto, w_inst,
            WITH_KEPT=kept is not None, BLOCK_C=block_c, BLOCK_D=block_of(dim),
        )  # fmt: skip
    return logits_grad, q_grad
