"""Prototypical contrast (MoPro equation 5): the pass over the prototypes, then a program per row.

    loss = log Σ_c exp(q·c/T) − q·c_y/T      d loss/dq = (E − c_y)/T      both 0 where the row is not used

Traffic of the second kernel: (D + 2)·4 bytes per row and split; q, one prototype and the gradient per row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopro_fast.kernels.similarity import LN_2, LOG2_E, combine_splits_with_e, row_options, similarity


@triton.jit
def prototype_contrast_fwd_kernel(
    q_ptr, prototypes_ptr, labels_ptr, kept_ptr, m_ptr, z_ptr, e_ptr, loss_ptr, grad_ptr,
    n_rows, classes, splits, dim, scale,
    WITH_KEPT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (N). scale: log2(e)/T."""
    row = tl.program_id(0).to(tl.int64)
    label, use = label_of(labels_ptr, kept_ptr, row, row < n_rows, classes, WITH_KEPT)
    contrast_row(
        q_ptr, prototypes_ptr, m_ptr, z_ptr, e_ptr, loss_ptr, grad_ptr,
        row, label, use, n_rows, splits, dim, scale, BLOCK_D,
    )  # fmt: skip


@triton.jit
def label_of(labels_ptr, kept_ptr, rows, ok, classes, WITH_KEPT: tl.constexpr):
    """The rows' labels, and whether the rows count."""
    label = tl.load(labels_ptr + rows, ok, -1)
    use = (label >= 0) & (label < classes)
    if WITH_KEPT:
        use = use & (tl.load(kept_ptr + rows, ok, 0) != 0)
    return label, use


@triton.jit
def contrast_row(
    q_ptr, prototypes_ptr, m_ptr, z_ptr, e_ptr, loss_ptr, grad_ptr,
    row, label, use, n_rows, splits, dim, scale,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Loss and gradient of one row, zeros unless `use`; a label outside [0, C) must come without it."""
    d = tl.arange(0, BLOCK_D)
    m, z, e = combine_splits_with_e(m_ptr, z_ptr, e_ptr, row, n_rows, splits, dim, BLOCK_D)
    q = tl.load(q_ptr + row * dim + d, d < dim, 0.0).to(tl.float32)
    c = tl.load(prototypes_ptr + label * dim + d, (d < dim) & use, 0.0).to(tl.float32)
    x = tl.sum(q * c, 0) * scale
    tl.store(loss_ptr + row, tl.where(use, (m - x + tl.log2(z)) * LN_2, 0.0))
    tl.store(grad_ptr + row * dim + d, tl.where(use, (e / z - c) * (scale / LOG2_E), 0.0), d < dim)


def prototype_contrast(
    q: Tensor, prototypes: Tensor, labels: Tensor, kept: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """-> loss f32 [N], d loss / d q f32 [N, D]"""
    q, prototypes, labels = q.contiguous(), prototypes.contiguous(), labels.contiguous()
    n, dim = q.shape
    loss, grad = q.new_empty(n, dtype=torch.float32), q.new_empty(n, dim, dtype=torch.float32)
    if n:
        p = similarity(q, prototypes, temperature)
        prototype_contrast_fwd_kernel[(n,)](
            q, prototypes, labels, labels if kept is None else kept.contiguous(), p.m, p.z, p.e, loss, grad,
            n, len(prototypes), p.splits, dim, LOG2_E.value / temperature,
            WITH_KEPT=kept is not None, **row_options(dim),
        )  # fmt: skip
    return loss, grad
