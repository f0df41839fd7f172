"""Instance contrast (MoPro equation 4): the pass over the queue, then a program per row.

    loss = log(exp(x_k) + Σ_b exp(x_b)) − x_k      x_k = q·k/T, x_b = q·queue_b/T
    d loss/dq = (E − k)/T                          E = softmax-weighted mean of k and the queue

Traffic of the second kernel: (D + 2)·4 bytes per row and split; q, k and the gradient once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mopro_fast.kernels.similarity import LN_2, LOG2_E, combine_splits_with_e, row_options, similarity


@triton.jit
def info_nce_fwd_kernel(
    q_ptr, k_ptr, m_ptr, z_ptr, e_ptr, loss_ptr, hit_ptr, grad_ptr,
    n_rows, splits, dim, scale,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (N). scale: log2(e)/T."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    m, z, e = combine_splits_with_e(m_ptr, z_ptr, e_ptr, row, n_rows, splits, dim, BLOCK_D)
    q = tl.load(q_ptr + row * dim + d, d < dim, 0.0).to(tl.float32)
    k = tl.load(k_ptr + row * dim + d, d < dim, 0.0).to(tl.float32)
    x = tl.sum(q * k, 0) * scale
    hit = (x >= m) & (z == z)  # a score that is not a number is in z, but may be missing in m

    # The key joins the bank.
    new_m = tl.maximum(m, x)
    rescale, weight = tl.exp2(m - new_m), tl.exp2(x - new_m)
    z = z * rescale + weight
    e = (e * rescale + k * weight) / z
    tl.store(loss_ptr + row, (new_m - x + tl.log2(z)) * LN_2)
    tl.store(hit_ptr + row, hit)
    tl.store(grad_ptr + row * dim + d, (e - k) * (scale / LOG2_E), d < dim)


def info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """-> loss f32 [N], hit bool [N], d loss / d q f32 [N, D]"""
    q, k, queue = q.contiguous(), k.contiguous(), queue.contiguous()
    n, dim = q.shape
    loss, hit = q.new_empty(n, dtype=torch.float32), q.new_empty(n, dtype=torch.bool)
    grad = q.new_empty(n, dim, dtype=torch.float32)
    if n:
        p = similarity(q, queue, temperature)
        info_nce_fwd_kernel[(n,)](
            q, k, p.m, p.z, p.e, loss, hit, grad,
            n, p.splits, dim, LOG2_E.value / temperature,
            **row_options(dim),
        )  # fmt: skip
    return loss, hit, grad
