"""MoPro (Li, Xiong, Hoi, ICLR 2021): the model and, in ``MoPro.forward``, one step of the paper."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mopro_fast import ops
from mopro_fast.config import MoProConfig
from mopro_fast.distributed import gather_together, world
from mopro_fast.models.resnet import ResNet


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

    METRICS = (*ops.METRICS, "relabelled")

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

    def phase(self, epoch: int) -> int:
        """The first epoch whose steps do the same: 0, 1 or ``start_clean``."""
        return max(first for first in (0, 1, self.config.start_clean) if first <= epoch)

    def forward(
        self,
        view_q: Tensor,
        view_k: Tensor,
        labels: Tensor,
        epoch: int,
        place: Tensor,
        query: nn.Module | None = None,
        key: nn.Module | None = None,
    ) -> StepOutput:
        """Steps 1 and 3–8 of the method for this rank's rows.

        Step 2, ``ξ_k ← m·ξ_k + (1−m)·ξ_q``, is the optimizer's (training/optim.py), right after its own: the official
        code does it at the beginning of the next step, which is the same, since its first is an identity.

        view_q:  uint8 [N, H, W, 3].
        view_k:  uint8 [N, H, W, 3], the other views: of all ranks' W·N images in a random order, so that BatchNorm
                 cannot leak who pairs with whom.
        labels:  int64 [N], −1 where none is given.
        epoch:   0-based; prototypes count from 1, cleaning starts at ``start_clean``.
        place:   int64 [W·N]: where in that order each image is (the inverse permutation).
        query, key: what computes for encoder_q and encoder_k, if not they themselves.
        """
        c, mine = self.config, slice(world()[0] * len(labels), (world()[0] + 1) * len(labels))
        logits, q = (query or self.encoder_q)(ops.normalize(view_q))  # [N, C], [N, D]
        with torch.no_grad():
            _, k = (key or self.encoder_k)(ops.normalize(view_k))

        # Step 6 against the prototypes of earlier steps. used: the label of a row that counts, −1 of one that does not.
        new, kept = labels, labels >= 0
        if epoch >= c.start_clean:
            new, kept = ops.correct_labels(
                logits, q, self.prototypes, labels, alpha=c.alpha, threshold=c.threshold, temperature=c.temperature
            )
        used = torch.where(kept, new, -1)
        all_q, all_k, all_used = gather_together(q, k, used)  # [W·N, D], [W·N, D], [W·N]: the step's one exchange
        all_k = all_k[place]

        # Steps 3, 5 and 8, against the queue and the prototypes of earlier steps; then those two move on.
        loss = ops.mopro_loss(
            logits, q, all_k[mine], self.queue, self.prototypes, used, temperature=c.temperature,
            w_proto=c.w_proto, w_inst=c.w_inst, contrast=epoch >= 1,
        )  # fmt: skip
        ops.queue_enqueue_(self.queue, self.queue_ptr, all_k)  # step 4
        ops.prototype_update_(self.prototypes, all_q, all_used, None, c.proto_momentum)  # step 7
        metrics = dict(zip(ops.METRICS, loss.metrics.unbind(), strict=True))
        metrics["relabelled"] = (new != labels).float().mean()
        return StepOutput(loss.loss, metrics, new, kept)
