"""Plain cross-entropy on the given labels, in the shape of the MoPro step: the baseline of every comparison."""

import torch.nn.functional as F
from torch import Tensor

from mopro_fast.models.method import Method, StepOutput


class CrossEntropy(Method):
    """State dict: encoder_q.*, so that its encoder loads wherever MoPro's does."""

    METRICS = ("loss", "acc_cls", "kept")

    def forward(self, view_q: Tensor, _k: None, labels: Tensor, _epoch: int) -> StepOutput:
        """Rows without a label (−1) are left out; the projection head gets no gradient."""
        logits, q = self.query(self.normalize(view_q))
        logits = logits.float()
        kept = labels >= 0
        rows = kept.sum().clamp(min=1)
        # 0·q keeps the projection head in the graph: distributed training expects a gradient for every parameter
        loss = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum") / rows + 0.0 * q.sum()
        accuracy = (logits.argmax(1) == labels).sum() / rows
        metrics = {"loss": loss.detach(), "acc_cls": accuracy, "kept": kept.float().mean()}
        return StepOutput(loss, metrics, labels, kept)
