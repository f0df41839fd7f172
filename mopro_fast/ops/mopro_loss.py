"""What one MoPro step minimises (MoPro section 3.2, equations 3 to 5): the three losses and their sum."""

from typing import NamedTuple

import torch
from torch import Tensor

from mopro_fast.ops import backends, checks

METRICS = ("loss", "loss_cls", "loss_proto", "loss_inst", "acc_cls", "acc_inst", "kept")


class MoProLoss(NamedTuple):
    """What :func:`mopro_loss` returns."""

    loss: Tensor
    """Float32 scalar (float64 for float64 inputs), with a gradient to logits and q."""
    metrics: Tensor
    """Float32 [7] in the order of ``METRICS``: the loss and its three means, the share of kept rows whose label has the
    highest logit, the share of rows whose key beats the queue, the share of kept rows. No gradient."""


def _fake(logits, q, k, queue, prototypes, labels, *_):
    (n, dim), new, f32, f64 = q.shape, q.new_empty, torch.float32, torch.float64
    grad_type = f64 if f64 in (q.dtype, k.dtype, queue.dtype) else f32
    anything = (logits.dtype, q.dtype, k.dtype, queue.dtype, prototypes.dtype)
    return (
        new((), dtype=f64 if f64 in anything else f32), new(len(METRICS), dtype=f32),
        new(n, dim, dtype=grad_type), new(n, dim, dtype=grad_type),
        new(n, dtype=f64 if logits.dtype == f64 else f32), new(1, dtype=f32),
    )  # fmt: skip


def _setup(ctx, inputs, output) -> None:
    logits, q, _, _, _, labels, kept, _, w_proto, w_inst, _ = inputs
    _, _, inst_grad, proto_grad, log_z, rows = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else zeros are made for the outputs that have none
    ctx.save_for_backward(logits, labels, kept, inst_grad, proto_grad, log_z, rows)
    ctx.weights, ctx.q_dtype = (w_proto, w_inst), q.dtype


def _backward(ctx, loss_grad: Tensor, *_):
    if loss_grad is None:
        return (None,) * 11
    grads = torch.ops.mopro_fast.mopro_loss_backward(loss_grad, *ctx.saved_tensors, *ctx.weights, ctx.q_dtype)
    return (*grads, *[None] * 9)


backends.define(
    "mopro_loss(Tensor logits, Tensor q, Tensor k, Tensor queue, Tensor prototypes, Tensor labels, Tensor? kept, "
    "float temperature, float w_proto, float w_inst, bool contrast) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
    _backward,
    _setup,
)
backends.define(
    "mopro_loss_backward(Tensor loss_grad, Tensor logits, Tensor labels, Tensor? kept, Tensor inst_grad, "
    "Tensor proto_grad, Tensor log_z, Tensor rows, float w_proto, float w_inst, ScalarType q_dtype) "
    "-> (Tensor, Tensor)",
    fake=lambda loss_grad, logits, labels, kept, inst_grad, proto_grad, log_z, rows, w_proto, w_inst, q_dtype: (
        torch.empty_like(logits, memory_format=torch.contiguous_format),
        torch.empty_like(inst_grad, dtype=q_dtype),
    ),
)


def mopro_loss(
    logits: Tensor,
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    kept: Tensor | None = None,
    *,
    temperature: float,
    w_proto: float = 1.0,
    w_inst: float = 1.0,
    contrast: bool = True,
) -> MoProLoss:
    """:func:`info_nce` and :func:`prototype_contrast` of one batch, with the classifier's loss.

    ``loss = Σ CE(logits, y)/R + w_proto·Σ CE(q·prototypesᵀ/T, y)/R + w_inst·mean(InfoNCE)``, the first two sums over
    the R kept rows with labels y; without a kept row both are 0.

    logits:     [N, C] of the classifier; gets a gradient.
    q:          [N, D] queries of unit length; gets a gradient.
    k:          [N, D] keys.
    queue:      [Q, D] keys of earlier batches.
    prototypes: [C, D] before this batch's update.
    labels:     int64 [N] as corrected (:func:`correct_labels`); a row whose label is outside [0, C) is not kept.
    kept:       bool [N], or None for all rows.
    temperature above 0.
    contrast:   whether the prototypical loss counts (in MoPro from epoch 1).

    One pass over the queue and one over the prototypes; nothing of size N×Q is stored, and of size N×C only the
    gradient of the logits. Gradients are of first order. Raises ValueError for a wrong argument.
    """
    n, d = checks.embeddings(q, "queue", queue)
    checks.tensor("k", k, (n, d), checks.FLOATS, q.device)
    checks.tensor("prototypes", prototypes, ("C", d), checks.FLOATS, q.device)
    checks.some_classes(prototypes)
    checks.tensor("logits", logits, (n, len(prototypes)), checks.FLOATS, q.device)
    checks.labels_and_kept(labels, kept, n, q.device)
    checks.positive("temperature", temperature)
    checks.number("w_proto", w_proto)
    checks.number("w_inst", w_inst)
    return MoProLoss(
        *torch.ops.mopro_fast.mopro_loss(
            logits, q, k.detach(), queue.detach(), prototypes.detach(), labels, kept,
            temperature, w_proto, w_inst, contrast,
        )[:2]
    )  # fmt: skip
