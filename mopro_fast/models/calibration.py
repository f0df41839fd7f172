"""Scores that label correction can trust: both softmaxes are calibrated on the labels as given, while training."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mopro_fast.distributed import gather_rows, world

LOG_SCALE, BIAS = "calibration.log_scale", "calibration.bias"  # in a model's state dict
_RATE, _LARGEST = 0.05, 0.1  # of descent; the largest move of a parameter in a step


@dataclass
class Scores:
    """What ops.correct_labels and mixed_scores take."""

    logits: Tensor
    """[N, C]."""
    q: Tensor
    """[N, D], or [N, D + 1]."""
    prototypes: Tensor
    """[C, D], or [C, D + 1]."""


class Calibration(nn.Module):
    """A temperature and a bias per class, for the classifier and for the prototypes: z → exp(log_scale)·z + bias.

    A model that trains on labels which it has corrected or selected itself grows surer with every epoch, right or
    wrong, until θ stops nothing; and a class that it rarely prefers loses its images, and is preferred less still. Both
    are kept in check by the labels *as given*, of all rows, kept or not: the parameters follow the gradient of their
    cross-entropy. Where that is zero, the mean confidence is the share of given labels that are met, and every class is
    as probable on average as it is frequent among them. (Guo et al., ICML 2017, with the biases of Alexandari et al.,
    ICML 2020; there after training, on held-out images.)

    State: log_scale float32 [2], bias float32 [2, C]; zeros leave the scores as they are.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.register_buffer("log_scale", torch.zeros(2))
        self.register_buffer("bias", torch.zeros(2, classes))

    def forward(self, logits: Tensor, q: Tensor, prototypes: Tensor, temperature: float) -> Scores:
        """The calibrated scores, float32, without gradient."""
        return calibrated(logits, q, prototypes, temperature, self.log_scale, self.bias)

    @torch.no_grad()
    def move(self, logits: Tensor, q: Tensor, prototypes: Tensor, labels: Tensor, temperature: float) -> None:
        """One step of descent on all ranks' rows but those without a label or with scores that are no numbers.

        logits [N, C], q [N, D], prototypes [C, D], labels int64 [N]. One collective.
        """
        scores, classes = self(logits, q, prototypes, temperature), self.bias.shape[1]
        with torch.autocast(q.device.type, enabled=False):
            of_prototypes = scores.q @ scores.prototypes.T / temperature
        target = labels.clamp(min=0)[:, None]
        gradients = []
        for i, z in enumerate((scores.logits, of_prototypes)):  # [N, C]
            use = ((labels >= 0) & z.isfinite().all(1))[:, None]
            excess = torch.where(use, z.softmax(1), 0)  # softmax − one-hot: d cross-entropy / d z
            excess = excess.scatter_add(1, target, -use.to(excess.dtype))
            unbiased = torch.where(use, z - self.bias[i], 0)
            gradients += [(excess * unbiased).sum(1).mean()[None], excess.mean(0)]
        mean = gather_rows(torch.cat(gradients)[None]).mean(0).view(2, 1 + classes)
        # Relative to 1/C. A class has rows/C rows in a step: the fewer, the slower, so as not to follow their noise.
        of_class = min(classes, len(labels) * world()[1])
        self.log_scale.sub_((_RATE * mean[:, 0]).clamp_(-_LARGEST, _LARGEST))
        self.bias.sub_((_RATE * of_class * mean[:, 1:]).clamp_(-_LARGEST, _LARGEST))


def calibrated(
    logits: Tensor, q: Tensor, prototypes: Tensor, temperature: float, log_scale: Tensor | None, bias: Tensor | None
) -> Scores:
    """As Calibration.forward; None: a model without calibration, whose scores stay as they are.

    The prototypes' biases come in as one more dimension: [q, 1]·[prototype, T·bias]/T.
    """
    if log_scale is None:
        return Scores(logits, q, prototypes)
    scale = log_scale.exp()
    logits, q, prototypes = (x.detach().float() for x in (logits, q, prototypes))
    logits = scale[0] * logits + bias[0]
    q = torch.cat([scale[1] * q, q.new_ones(len(q), 1)], 1)
    return Scores(logits, q, torch.cat([prototypes, temperature * bias[1, :, None]], 1))
