"""MoPro (Li, Xiong, Hoi, ICLR 2021): the model and, in ``MoPro.forward``, one step of the paper."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mopro_fast import ops
from mopro_fast.config import MoProConfig
from mopro_fast.models.resnet import ResNet
from mopro_fast.training.distributed import exchange_rows, gather_rows, start_exchange


@dataclass
class StepOutput:
    """What one step gives back. Means are over this rank's rows; shares are over its N rows."""

    loss: Tensor
    """What is minimised, float32 scalar: classification + w_proto·prototype + w_inst·instance."""
    metrics: dict[str, Tensor]
    """Detached float32 scalars for the log."""
    labels: Tensor
    """int64 [N]: the labels after correction."""
    kept: Tensor
    """bool [N]: the rows that count as in-distribution, clean or corrected."""


class MoPro(nn.Module):
    """Two encoders, a queue of keys and the class prototypes.

    State dict: encoder_q.*, encoder_k.*, queue [Q, D], queue_ptr int64 [1], prototypes [C, D]; float32 masters.
    """

    def __init__(self, encoder_q: ResNet, encoder_k: ResNet, config: MoProConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder_q, self.encoder_k = encoder_q, encoder_k
        encoder_k.load_state_dict(encoder_q.state_dict())
        encoder_k.requires_grad_(False)
        classes, dim = encoder_q.classifier.out_features, encoder_q.fc2.out_features
        self.register_buffer("queue", F.normalize(torch.randn(config.queue_size, dim), dim=1))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("prototypes", torch.zeros(classes, dim))

    def forward(
        self,
        view_q: Tensor,
        view_k: Tensor,
        labels: Tensor,
        epoch: int,
        order: np.ndarray,
        query: nn.Module | None = None,
    ) -> StepOutput:
        """Steps 1 and 3–8 of the method for this rank's rows.

        Step 2, ``ξ_k ← m·ξ_k + (1−m)·ξ_q``, is the optimizer's (training/optim.py), right after its own: the official
        code does it at the beginning of the next step, which is the same, since its first is an identity.

        view_q, view_k: uint8 [N, H, W, 3], two views of the same N images.
        labels:         int64 [N], −1 where none is given.
        epoch:          0-based; prototypes count from 1, cleaning starts at ``start_clean``.
        order:          permutation of all ranks' W·N rows for view_k's shuffle.
        query:          encoder_q wrapped for distributed training.
        """
        c = self.config
        shuffled = start_exchange(view_k, order)  # on its way while the query is computed
        logits, q = (query or self.encoder_q)(ops.normalize(view_q))  # [N, C], [N, D]
        with torch.no_grad():  # keys: rows change groups and ranks, so that BatchNorm cannot leak who pairs with whom
            _, k = self.encoder_k(ops.normalize(shuffled()))
            k = exchange_rows(k, np.argsort(order))

        # Steps 3, 5, 6 and 8 against the queue and the prototypes of earlier steps: instance contrast, label
        # correction, classification, prototypical contrast. Then those two move on with this step's rows.
        loss, metrics, labels, kept, used = ops.mopro_loss(
            logits, q, k, self.queue, self.prototypes, labels,
            temperature=c.temperature, alpha=c.alpha, threshold=c.threshold, w_proto=c.w_proto, w_inst=c.w_inst,
            contrast=epoch >= 1, correct=epoch >= c.start_clean,
        )  # fmt: skip
        ops.queue_enqueue_(self.queue, self.queue_ptr, gather_rows(k))  # step 4
        ops.prototype_update_(self.prototypes, gather_rows(q), gather_rows(used), None, c.proto_momentum)  # step 7
        return StepOutput(loss, dict(zip(ops.METRICS, metrics.unbind(), strict=True)), labels, kept)
