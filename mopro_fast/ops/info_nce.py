"""The instance contrastive loss (MoPro equation 4; InfoNCE of van den Oord et al. 2018 with MoCo's queue)."""

import torch
from torch import Tensor

from mopro_fast.ops import backends, checks


def _fake(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    n, d = q.shape
    wide = torch.float64 if torch.float64 in (q.dtype, k.dtype, queue.dtype) else torch.float32
    return q.new_empty(n, dtype=wide), q.new_empty(n, dtype=torch.bool), q.new_empty(n, d, dtype=wide)


def _setup(ctx, inputs, output) -> None:
    _, hit, grad = output
    ctx.mark_non_differentiable(hit, grad)
    ctx.set_materialize_grads(False)  # else zeros are made for the outputs that have none
    ctx.save_for_backward(grad)
    ctx.dtype = inputs[0].dtype


def _backward(ctx, grad_loss: Tensor, _hit, _grad):
    if grad_loss is None:
        return None, None, None, None
    (grad,) = ctx.saved_tensors
    return (grad_loss[:, None] * grad).to(ctx.dtype), None, None, None


backends.define(
    "info_nce(Tensor q, Tensor k, Tensor queue, float temperature) -> (Tensor, Tensor, Tensor)",
    _fake,
    _backward,
    _setup,
)


def info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy of ``[q·k, q·queueᵀ]/temperature`` with the key as the right answer, per row.

    q:           [N, D] queries; the only input that gets a gradient (first order).
    k:           [N, D] keys.
    queue:       [Q, D] negatives, any Q.
    temperature: above 0.

    Returns (loss float32 [N], float64 for float64 inputs; hit bool [N]); hit: the positive is at least every negative.
    Raises ValueError for a wrong shape, dtype, device or temperature.
    """
    n, d = checks.embeddings(q, "queue", queue)
    checks.tensor("k", k, (n, d), checks.FLOATS, q.device)
    checks.positive("temperature", temperature)
    loss, hit, _ = torch.ops.mopro_fast.info_nce(q, k.detach(), queue.detach(), temperature)
    return loss, hit
