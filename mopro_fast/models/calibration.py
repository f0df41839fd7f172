"""Confidence that label correction has earned: temperature scaling (Guo et al., ICML 2017) while training."""

import torch
from torch import Tensor, nn

CALIBRATION = "calibration.log_scale"  # in a model's state dict
_RATE, _LARGEST = 0.05, 0.05  # of the gradient in a step, and its largest move


class Calibration(nn.Module):
    """One factor for the classifier's logits and one for the prototypes' scores, so that both softmaxes are as sure as
    the labels that came with the images bear out.

    A model that trains on labels it has corrected or selected itself grows surer with every epoch, right or wrong, and
    θ then stops nothing. The factors follow the gradient of the cross-entropy with the labels *as given*, of all
    rows, kept or not: where that is least, the mean confidence is the share of given labels it meets. They do
    not change which class wins either softmax.

    State: log_scale float32 [2], the logarithms of both factors; 0: scores as they are.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("log_scale", torch.zeros(2))

    def forward(self, logits: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """logits [N, C] and q [N, D], each times its factor; no gradient."""
        return scaled(logits, q, self.log_scale)

    @torch.no_grad()
    def slopes(self, logits: Tensor, q: Tensor, prototypes: Tensor, labels: Tensor, temperature: float) -> Tensor:
        """float32 [N, 2]: of each row, the gradient of both cross-entropies to log_scale; 0 without a label."""
        logits, q = self(logits, q)
        labelled = labels >= 0
        target = labels.clamp(min=0)[:, None]
        slopes = []
        with torch.autocast(q.device.type, enabled=False):
            scores = q @ prototypes.T / temperature
        for z in (logits, scores):  # [N, C]
            slope = (z.softmax(1) * z).sum(1) - z.gather(1, target)[:, 0]  # d CE(a·z, y) / d log a
            slopes.append(torch.where(labelled & slope.isfinite(), slope, 0))
        return torch.stack(slopes, 1)

    @torch.no_grad()
    def move(self, slopes: Tensor) -> None:
        """One step of descent; slopes [W·N, 2]: of all ranks' rows."""
        self.log_scale.sub_((_RATE * slopes.mean(0)).clamp(-_LARGEST, _LARGEST))


def scaled(logits: Tensor, q: Tensor, log_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """As Calibration.forward; None: a model without calibration, whose scores stay."""
    if log_scale is None:
        return logits, q
    of_logits, of_q = log_scale.exp().unbind()
    return logits.detach().float() * of_logits, q.detach().float() * of_q
