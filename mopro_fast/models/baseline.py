"""Plain cross-entropy on the given labels, in the shape of the MoPro step: the baseline of every comparison."""

import torch.nn.functional as F
from torch import Tensor, nn

from mopro_fast import ops
from mopro_fast.models.mopro import StepOutput
from mopro_fast.models.resnet import ResNet


class CrossEntropy(nn.Module):
    """State dict: encoder_q.*, so that its encoder loads wherever MoPro's does."""

    METRICS = ("loss", "acc_cls", "kept")

    def __init__(self, encoder_q: ResNet) -> None:
        super().__init__()
        self.encoder_q = encoder_q

    def phase(self, _epoch: int) -> int:
        return 0

    def forward(
        self, view_q: Tensor, _k: None, labels: Tensor, _epoch: int, _place: None, query=None, _key=None
    ) -> StepOutput:
        """As MoPro.forward; rows without a label (−1) are left out, the projection head gets no gradient."""
        logits, q = (query or self.encoder_q)(ops.normalize(view_q))
        logits = logits.float()
        kept = labels >= 0
        rows = kept.sum().clamp(min=1)
        # 0·q keeps the projection head in the graph: distributed training expects a gradient for every parameter
        loss = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum") / rows + 0.0 * q.sum()
        accuracy = (logits.argmax(1) == labels).sum() / rows
        metrics = {"loss": loss.detach(), "acc_cls": accuracy, "kept": kept.float().mean()}
        return StepOutput(loss, metrics, labels, kept)
