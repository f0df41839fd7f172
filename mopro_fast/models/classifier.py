"""Cross-entropy of a trained encoder's classifier, alone or with the encoder: re-training and fine-tuning."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mopro_fast.models.method import Method, StepOutput
from mopro_fast.models.resnet import ResNet


class _Logits(nn.Module):
    def __init__(self, encoder: ResNet, freeze: bool) -> None:
        super().__init__()
        self.encoder, self.frozen = encoder, freeze

    def forward(self, *images: Tensor) -> Tensor:
        """The logits of each of these batches, one after the other: BatchNorm takes each by itself."""
        return torch.cat([self._logits(batch) for batch in images])

    def _logits(self, images: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = self.encoder.features(images)
        return self.encoder.classifier(features)


class Classifier(Method):
    """State dict: encoder_q.*, as every model of this package. The projection head is not trained."""

    def __init__(
        self,
        encoder_q: ResNet,
        freeze: bool,
        *,
        moving_statistics: bool = False,
        train_bias: bool = True,
        mixup_beside: bool = False,
    ) -> None:
        """freeze: train the classifier alone; with moving_statistics the frozen encoder normalises by the batch and its
        running statistics move. train_bias: the classifier's. mixup_beside: mixed images add their loss to that of the
        images as they are, instead of taking its place."""
        super().__init__(encoder_q)
        self.frozen, self.mixup_beside = freeze, mixup_beside
        self.normalises_by_batch = moving_statistics or not freeze
        encoder_q.requires_grad_(not freeze)
        encoder_q.classifier.requires_grad_(True)
        encoder_q.classifier.bias.requires_grad_(train_bias)
        encoder_q.fc1.requires_grad_(False)
        encoder_q.fc2.requires_grad_(False)
        self.compute_with(_Logits(encoder_q, freeze))

    def train(self, mode: bool = True) -> "Classifier":
        super().train(mode)
        for module in (self.encoder_q, self.query):
            module.train(mode and self.normalises_by_batch)
        return self

    def trained(self) -> list[list[nn.Parameter]]:
        """The classifier; the rest, if it is not frozen."""
        named = [(name, p) for name, p in self.encoder_q.named_parameters() if p.requires_grad]
        groups = [[p for name, p in named if name.startswith("classifier.") == own] for own in (True, False)]
        return groups[:1] if self.frozen else groups

    def forward(self, view_q: Tensor, _k: None, labels: Tensor, _epoch: int, *mixup: Tensor) -> StepOutput:
        """mixup: none, or shares float32 [2] of each image and of its partner, and who that is, int64 [N]."""
        images = [self.normalize(view_q)]
        if mixup:
            shares, partner = mixup
            mixed = shares[0] * images[0].float() + shares[1] * images[0][partner].float()
            images = [images[0], mixed] if self.mixup_beside else [mixed]
        logits = self.query(*images).float().chunk(len(images))
        loss = F.cross_entropy(logits[-1], labels)
        if mixup:
            loss = shares[0] * loss + shares[1] * F.cross_entropy(logits[-1], labels[partner])
        if len(logits) > 1:
            loss = F.cross_entropy(logits[0], labels) + loss
        hits = logits[0].detach().argmax(1) == labels
        metrics = {"loss": loss.detach().double(), "acc_cls": hits.double().mean()}
        return StepOutput(loss, metrics, labels, torch.ones_like(hits))
