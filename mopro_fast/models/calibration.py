"""Scores that label correction can trust: both softmaxes are calibrated on the labels as given, while training."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mopro_fast.distributed import gather_rows, world

CALIBRATION = "calibration."  # in a model's state dict
LOG_SCALE, BIAS = CALIBRATION + "log_scale", CALIBRATION + "bias"
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
    are held against the labels *as given*, of all rows, kept or not: the parameters follow the gradient of their
    cross-entropy. Where that is zero every class is as probable on average as it is frequent among the given labels,
    and scores are as large as the training images' given labels bear out. (Guo et al., ICML 2017, with the biases of
    Alexandari et al., ICML 2020; they calibrate a finished model on held-out images.)

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
    def move(self, scores: Scores, labels: Tensor, temperature: float) -> None:
        """One step of descent on all ranks' rows but those without a label or with scores that are no numbers.

        scores: of this step, by :meth:`forward`. labels: int64 [N], as given. One collective.
        """
        classes, rows = self.bias.shape[1], len(labels) * world()[1]
        with torch.autocast(labels.device.type, enabled=False):
            of_prototypes = scores.q @ scores.prototypes.T / temperature
        target, sums = labels.clamp(min=0)[:, None], []
        for i, z in enumerate((scores.logits, of_prototypes)):  # [N, C]
            use = ((labels >= 0) & z.isfinite().all(1))[:, None]
            p = torch.where(use, z.softmax(1), 0)
            excess = p.scatter_add(1, target, -use.to(p.dtype))  # softmax − one-hot: d cross-entropy / d z
            of_scale = (excess * torch.where(use, z - self.bias[i], 0)).sum()
            sums += [of_scale[None], excess.sum(0), p.sum(0)]
        mean = gather_rows(torch.cat(sums)[None]).sum(0).view(2, 1 + 2 * classes) / rows
        of_scale, excess, share = mean.split([1, classes, classes], 1)
        self.log_scale.sub_((_RATE * of_scale[:, 0]).clamp_(-_LARGEST, _LARGEST))
        # Relative to the class's share, the curvature; one row more, so as not to follow the noise of rare classes.
        self.bias.sub_((_RATE * excess / (share + 1 / rows)).clamp_(-_LARGEST, _LARGEST))


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
