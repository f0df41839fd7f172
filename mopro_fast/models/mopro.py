"""MoPro (Li, Xiong, Hoi, ICLR 2021): the model and, in ``MoPro.forward``, one step of the paper."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mopro_fast import ops
from mopro_fast.config import MoProConfig
from mopro_fast.distributed import gather_together, world
from mopro_fast.models.calibration import Calibration, Scores
from mopro_fast.models.method import Method, StepOutput
from mopro_fast.models.resnet import ResNet


class MoPro(Method):
    """Two encoders, a queue of keys and the class prototypes.

    State dict: encoder_q.*, encoder_k.*, queue [Q, D], queue_ptr int64 [1], prototypes [C, D]; float32 masters;
    with ``config.calibrate`` calibration.log_scale [2] and calibration.bias [2, C].
    """

    METRICS = (*ops.METRICS, "relabelled")

    def __init__(self, encoder_q: ResNet, encoder_k: ResNet, config: MoProConfig) -> None:
        super().__init__(encoder_q, encoder_k)
        self.config, self.key_momentum, self.threshold = config, config.key_momentum, config.threshold
        encoder_k.load_state_dict(encoder_q.state_dict())
        encoder_k.requires_grad_(False)
        classes, dim = encoder_q.classifier.out_features, encoder_q.fc2.out_features
        self.register_buffer("queue", F.normalize(torch.randn(config.queue_size, dim), dim=1))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("prototypes", torch.zeros(classes, dim))
        self.calibration = Calibration(classes) if config.calibrate else None

    def phase(self, epoch: int) -> int:
        """The first epoch whose steps do the same: 0, 1 or ``start_clean``."""
        return max(first for first in (0, 1, self.config.start_clean) if first <= epoch)

    def scores(self, logits: Tensor, q: Tensor) -> Scores:
        """What label correction judges by."""
        if self.calibration is None:
            return Scores(logits, q, self.prototypes)
        return self.calibration(logits, q, self.prototypes, self.config.temperature)

    def correct(self, logits: Tensor, q: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self._correct(self.scores(logits, q), labels)

    def _correct(self, scores: Scores, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        c = self.config
        return ops.correct_labels(
            scores.logits, scores.q, scores.prototypes, labels,
            alpha=c.alpha, threshold=c.threshold, temperature=c.temperature, with_winner=True,
        )  # fmt: skip

    def forward(self, view_q: Tensor, view_k: Tensor, labels: Tensor, epoch: int, place: Tensor) -> StepOutput:
        """One step of the method, as docs/method.md numbers it, for this rank's rows.

        view_q:  uint8 [N, H, W, 3].
        view_k:  uint8 [N, H, W, 3], the other views: of all ranks' W·N images in a random order, so that BatchNorm
                 cannot leak who pairs with whom.
        labels:  int64 [N], −1 where none is given.
        epoch:   0-based; prototypes count from 1, cleaning starts at ``start_clean``.
        place:   int64 [W·N]: where in that order each image is (the inverse permutation).
        """
        c, mine = self.config, slice(world()[0] * len(labels), (world()[0] + 1) * len(labels))

        # Steps 1 and 2: the two encoders. encoder_k has moved towards encoder_q in the optimizer's pass.
        logits, q = self.query(ops.normalize(view_q))  # [N, C], [N, D]
        with self.in_key_dtype(view_k.device):
            _, k = self.key(ops.normalize(view_k))  # [N, D]

        # Step 6: labels are corrected by the prototypes of earlier steps.
        new, kept, winner, score = labels, labels >= 0, None, None
        scores = self.scores(logits, q)
        if epoch >= c.start_clean:
            new, kept, winner, score = self._correct(scores, labels)

        if self.calibration is not None and epoch >= 1:
            self.calibration.move(scores, labels, c.temperature)

        # The step's exchange between ranks.
        all_q, all_k, all_new, all_kept = gather_together(q, k, new, kept)  # [W·N, …]
        all_k = all_k[place]

        # Steps 3, 5 and 8: the losses, against the queue and the prototypes of earlier steps.
        loss = ops.mopro_loss(
            logits, q, all_k[mine], self.queue, self.prototypes, new, kept, temperature=c.temperature,
            w_proto=c.w_proto, w_inst=c.w_inst, contrast=epoch >= 1,
        )  # fmt: skip

        # Steps 4 and 7: queue and prototypes move on.
        ops.queue_enqueue_(self.queue, self.queue_ptr, all_k)
        ops.prototype_update_(self.prototypes, all_q, all_new, all_kept, c.proto_momentum)

        metrics = dict(zip(ops.METRICS, loss.metrics.unbind(), strict=True))
        metrics["relabelled"] = (new != labels).float().mean()
        return StepOutput(loss.loss, metrics, new, kept, winner, score)
