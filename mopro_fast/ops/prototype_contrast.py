"""The prototypical contrastive loss (MoPro equation 5)."""

import torch
from torch import Tensor

from mopro_fast.ops import backends, checks


def _fake(q: Tensor, prototypes: Tensor, labels: Tensor, kept: Tensor | None, temperature: float):
    wide = torch.float64 if torch.float64 in (q.dtype, prototypes.dtype) else torch.float32
    return q.new_empty(len(q), dtype=wide), q.new_empty(q.shape, dtype=wide)


def _setup(ctx, inputs, output) -> None:
    _, grad = output
    ctx.mark_non_differentiable(grad)
    ctx.set_materialize_grads(False)  # else zeros are made for the outputs that have none
    ctx.save_for_backward(grad)
    ctx.dtype = inputs[0].dtype


def _backward(ctx, grad_loss: Tensor, _grad):
    if grad_loss is None:
        return None, None, None, None, None
    (grad,) = ctx.saved_tensors
    return (grad_loss[:, None] * grad).to(ctx.dtype), None, None, None, None


backends.define(
    "prototype_contrast(Tensor q, Tensor prototypes, Tensor labels, Tensor? kept, float temperature) "
    "-> (Tensor, Tensor)",
    _fake,
    _backward,
    _setup,
)


def prototype_contrast(
    q: Tensor, prototypes: Tensor, labels: Tensor, kept: Tensor | None, temperature: float
) -> Tensor:
    """Cross-entropy of ``q·prototypesᵀ/temperature`` with the row's label, per row; 0 where not kept.

    q:           [N, D] queries; the only input that gets a gradient (first order).
    prototypes:  [C, D].
    labels:      int64 [N]; a row whose label is outside [0, C) counts as not kept.
    kept:        bool [N], or None for all rows.
    temperature: above 0.

    Returns the loss, float32 [N] (float64 for float64 inputs). Raises ValueError for a wrong argument.
    """
    n, _ = checks.embeddings(q, "prototypes", prototypes)
    checks.labels_and_kept(labels, kept, n, q.device)
    checks.positive("temperature", temperature)
    loss, _ = torch.ops.mopro_fast.prototype_contrast(q, prototypes.detach(), labels, kept, temperature)
    return loss
