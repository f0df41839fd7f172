"""CAPro (Qin et al., NeurIPS 2023): the model and, in ``CAPro.forward``, one step of the method (single-label)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mopro_fast import ops
from mopro_fast.config import CAProConfig, MoProConfig
from mopro_fast.distributed import gather_together, world
from mopro_fast.models.calibration import Scores
from mopro_fast.models.method import Method, StepOutput
from mopro_fast.models.resnet import Backbone, ResNet


class CAPro(Method):
    """MoPro with prototypes that start from anchors, an auxiliary classifier that also learns from similar keys
    (collective bootstrapping), and an autoencoder that keeps embeddings faithful to features.

    State dict: encoder_q.*, whose classifier has a bias of zeros; encoder_k.*, without heads; reconstruction.*, from D
    to F by way of 2048; auxiliary.weight [C, D]; queue [Q, D], queue_ptr int64 [1], prototypes [C, D]; float32 masters.
    """

    METRICS = (*ops.METRICS, "relabelled", "loss_aux", "acc_aux", "loss_recn")
    inclusive = True

    def __init__(self, encoder_q: ResNet, encoder_k: Backbone, config: MoProConfig, capro: CAProConfig) -> None:
        super().__init__(encoder_q, encoder_k)
        self.config, self.capro = config, capro
        self.key_momentum, self.threshold = config.key_momentum, config.threshold
        classes, dim, width = encoder_q.classifier.out_features, encoder_q.fc2.out_features, encoder_q.feature_dim
        hidden = encoder_q.fc1.out_features
        self.reconstruction = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.auxiliary = nn.Linear(dim, classes, bias=False)
        self.apply(_initialise)
        nn.init.zeros_(encoder_q.classifier.bias)  # the official classifier has none
        encoder_q.classifier.bias.requires_grad_(False)
        own = encoder_q.state_dict()
        encoder_k.load_state_dict({name: own[name] for name in encoder_k.state_dict()})
        encoder_k.requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(config.queue_size, dim), dim=1))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("prototypes", torch.zeros(classes, dim))
        self.compute_with(Query(encoder_q, self.reconstruction, self.auxiliary), encoder_k)

    def compute_with(self, query: nn.Module, key: nn.Module | None = None) -> None:
        super().compute_with(query, key)
        self.__dict__["heads"] = getattr(query, "module", query)  # inside of data parallelism

    def has_prototypes(self) -> bool:
        """Whether it is past the vanilla stage."""
        return self.capro.init_proto != "never"

    def stage(self, epoch: int) -> "Stage":
        """What the steps of an epoch (0-based) do."""
        c = self.capro
        begun = self.has_prototypes() and epoch > c.init_proto
        return Stage(
            frozen=c.unfreeze_epoch == "never" or epoch < c.unfreeze_epoch,
            contrast=begun,
            clean=begun and epoch >= self.config.start_clean,
            update=begun and c.update_freq > 0 and epoch % c.update_freq == 0,
        )

    def phase(self, epoch: int) -> int:
        return next(first for first in range(epoch + 1) if self.stage(first) == self.stage(epoch))

    def starts(self, epoch: int) -> bool:
        """Whether the prototypes are computed from the anchors before this epoch."""
        c = self.capro
        again = c.update_freq == 0 and self.stage(epoch).contrast
        return self.has_prototypes() and (epoch == c.init_proto or again)

    def set_frozen(self, epoch: int) -> bool:
        frozen = self.stage(epoch).frozen
        changed, self.heads.frozen = self.heads.frozen != frozen, frozen
        self.heads.encoder.backbone().requires_grad_(not frozen)
        return changed

    def trained(self) -> list[list[nn.Parameter]]:
        heads = [*self.reconstruction.parameters(), *self.auxiliary.parameters()]
        return [[p for p in self.encoder_q.parameters() if p is not self.encoder_q.classifier.bias] + heads]

    def judges(self) -> bool:
        """Not before the prototypes have started."""
        return bool(self.prototypes.any())

    def scores(self, logits: Tensor, z: Tensor) -> Scores:
        """What label correction judges by."""
        return Scores(logits, z, self.prototypes)

    def correct(
        self, logits: Tensor, z: Tensor, labels: Tensor, anchors: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        c = self.config
        return ops.correct_labels(
            logits, z, self.prototypes, labels, alpha=c.alpha, threshold=c.threshold, temperature=c.temperature,
            anchors=anchors, inclusive=self.inclusive, with_winner=True,
        )  # fmt: skip

    def forward(
        self, view_q: Tensor, view_k: Tensor, labels: Tensor, epoch: int, place: Tensor, anchors: Tensor | None = None,
        shifts: Tensor | None = None, weights: Tensor | None = None,
    ) -> StepOutput:  # fmt: skip
        """One step, as docs/capro.md numbers it, for this rank's rows.

        view_q:  uint8 [N, H, W, 3].
        view_k:  uint8 [N, H, W, 3], the other views: of all ranks' W·N images in a random order.
        labels:  int64 [N], −1 where none is given.
        epoch:   0-based.
        place:   int64 [W·N]: where in that order each image is (the inverse permutation).
        anchors: bool [N]: rows whose labels are neither corrected nor dropped; None: no row.
        shifts:  float32 [2, N, 3]: the colour shifts of view_q and view_k (ops.normalize); None: no shift.
        weights: float32 [N]: row weights, which enter as their mean over kept rows, as in the code; None: all 1.
        """
        c, own, stage = self.config, self.capro, self.stage(epoch)
        mine = slice(world()[0] * len(labels), (world()[0] + 1) * len(labels))
        shift_q, shift_k = (None, None) if shifts is None else shifts

        # Steps 1 to 3: the two encoders. encoder_k has moved towards encoder_q in the optimizer's pass; it shares the
        # projection as this step's query pass has it.
        reads = [t for t in (view_k, shift_k) if t is not None]
        key = self.key_pass(lambda: self.key(self.normalize(view_k, shifts=shift_k)), *reads)
        logits, z, x, r, a = self.query(self.normalize(view_q, shifts=shift_q), stage.contrast)
        with torch.no_grad():
            k = self.heads.encoder.project(key())  # [N, D]

        # Step 8: labels are corrected by the prototypes of earlier steps.
        new, kept, winner, score = labels, labels >= 0, None, None
        if stage.clean:
            new, kept, winner, score = self.correct(logits, z, labels, anchors)

        # The step's exchange between ranks.
        all_z, all_k, all_new, all_kept = gather_together(z, k, new, kept)  # [W·N, …]
        all_k = all_k[place]

        # Steps 4, 7 and 10: MoPro's losses, against the queue and the prototypes of earlier steps.
        loss = ops.mopro_loss(
            logits, z, all_k[mine], self.queue, self.prototypes, new, kept, temperature=c.temperature,
            w_proto=c.w_proto, w_inst=c.w_inst, contrast=stage.contrast,
        )  # fmt: skip

        # Steps 5 and 6: the keys enter the queue, then it gives the targets of collective bootstrapping.
        ops.queue_enqueue_(self.queue, self.queue_ptr, all_k)
        rows = Rows(self, stage, logits.detach().float(), z.detach(), a.detach().float(), new.clamp(min=0))
        targets, share = soft_targets(own.soft_label, rows, own.beta)
        soften = 1 - share  # from the labels to the targets, of one classifier
        of_aux = own.soft_label in OF_AUXILIARY

        # Step 10: what CAPro adds to the loss.
        count = kept.sum().clamp(min=1)
        hard, soft = (share, soften) if of_aux else (1.0, 0.0)
        loss_aux = cross_entropies(a, rows.labels, targets, hard, soft, kept) / count
        softened = 0.0 if of_aux else cross_entropies(logits, rows.labels, targets, -soften, soften, kept) / count
        loss_recn = squared_error(r, x.detach(), kept) / count
        omega = (kept if weights is None else kept * weights).sum() / count  # 0 where no row is kept
        total = omega * (loss.loss + softened + loss_aux) + own.w_recn * loss_recn

        # Step 9: the prototypes move on.
        if stage.update:
            ops.prototype_update_(self.prototypes, all_z, all_new, all_kept, c.proto_momentum)

        metrics = dict(zip(ops.METRICS, loss.metrics.unbind(), strict=True))
        metrics |= {"loss": total.detach(), "loss_cls": metrics["loss_cls"] + softened, "loss_aux": loss_aux.detach()}
        metrics |= {"loss_recn": loss_recn.detach(), "relabelled": (new != labels).float().mean()}
        metrics["acc_aux"] = (kept & (rows.aux.argmax(1) == new)).sum() / count
        return StepOutput(total, {name: m.detach() for name, m in metrics.items()}, new, kept, winner, score)

    @torch.no_grad()
    def embed(self, images: Tensor, shifts: Tensor | None) -> Tensor:
        """Embeddings of the key encoder [N, D], of which the prototypes begin as means; running statistics.

        images: uint8 [N, H, W, 3]; shifts: float32 [N, 3].
        """
        self.key.eval()
        try:
            with self.in_key_dtype(images.device):
                features = self.key(self.normalize(images, shifts=shifts))
            return self.heads.encoder.project(features)
        finally:
            self.key.train()


class Stage(NamedTuple):
    """What the steps of an epoch do."""

    frozen: bool
    """The heads alone are trained; the encoder's BatchNorm statistics and the key encoder move on."""
    contrast: bool
    """The prototypical loss counts, and the reconstruction's gradient stays in its own weights."""
    clean: bool
    """Labels are corrected."""
    update: bool
    """The prototypes move."""


class Query(nn.Module):
    """images [N, 3, H, W] → logits [N, C], z [N, D] of unit length, features x [N, F], reconstruction [N, F] and
    auxiliary logits [N, C]."""

    frozen = False

    def __init__(self, encoder: ResNet, reconstruction: nn.Module, auxiliary: nn.Module) -> None:
        super().__init__()
        self.encoder, self.reconstruction, self.auxiliary = encoder, reconstruction, auxiliary

    def forward(self, images: Tensor, detached: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """detached: the reconstruction's gradient ends at z."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            x = self.encoder.features(images)
        z = self.encoder.project(x)
        r = self.reconstruction(z.detach() if detached else z)
        return self.encoder.classifier(x), z, x, r, self.auxiliary(z)


@dataclass
class Rows:
    """What a step's soft targets are made of; without gradient."""

    model: CAPro
    stage: Stage
    logits: Tensor
    """float32 [N, C]."""
    z: Tensor
    """float32 [N, D]."""
    aux: Tensor
    """float32 [N, C]: auxiliary logits."""
    labels: Tensor
    """int64 [N] after correction; 0 where there is none."""

    def own(self) -> Tensor:
        return self.logits.softmax(1)

    def auxiliary(self) -> Tensor:
        return self.aux.softmax(1)

    def prototypes(self) -> Tensor:
        m = self.model
        with torch.autocast(self.z.device.type, enabled=False):
            return (self.z @ m.prototypes.T / m.config.temperature).softmax(1)

    def mixed(self) -> Tensor:
        alpha = self.model.config.alpha
        return alpha * self.own() + (1 - alpha) * self.prototypes() if self.stage.contrast else self.own()

    def neighbours(self) -> Tensor:
        """Collective bootstrapping: the label distribution of similar keys in the queue."""
        m, low = self.model, torch.is_autocast_enabled(self.z.device.type)
        return ops.collective_targets(
            self.z, m.queue, m.auxiliary.weight, m.prototypes, alpha=m.config.alpha, temperature=m.config.temperature,
            weights=m.capro.bootstrap_weights, dtype=torch.get_autocast_dtype(self.z.device.type) if low else None,
        )  # fmt: skip

    def given(self, p: Tensor) -> Tensor:
        """[N, 1]: what p says of each row's label."""
        return p.gather(1, self.labels[:, None])


OF_AUXILIARY = (0, 7, 10)
"""Soft labels that the auxiliary classifier learns from, or none; the classifier learns from the others."""
TARGETS: dict[int, Callable[[Rows], Tensor]] = {
    1: Rows.own,
    2: lambda rows: torch.full_like(rows.logits, 1 / rows.logits.shape[1]),
    3: Rows.own,
    4: Rows.own,
    6: Rows.prototypes,
    7: Rows.neighbours,
    8: Rows.auxiliary,
    9: Rows.neighbours,
    10: Rows.auxiliary,
}
"""The distribution that the given labels are mixed with, by --soft-label, the code's --use_soft_label."""
SHARES: dict[int, Callable[[Rows], Tensor]] = {
    3: lambda rows: rows.given(rows.own()),
    4: lambda rows: rows.given(rows.mixed()),
}
"""How much of a row's label is the given one, where it is not 1 − β: self-contained confidence."""


def soft_targets(which: int, rows: Rows, beta: float) -> tuple[Tensor | None, Tensor | float]:
    """-> the distribution [N, C] or None, and the share of the given label, [N, 1] or a number."""
    if which not in TARGETS or (which == 6 and not rows.stage.contrast):
        return None, 1.0
    return TARGETS[which](rows), SHARES[which](rows) if which in SHARES else 1 - beta


def cross_entropies(
    logits: Tensor, labels: Tensor, targets: Tensor | None, hard: Tensor | float, soft: Tensor | float, kept: Tensor
) -> Tensor:
    """The sum over kept rows of hard·CE(logits, labels) + soft·CE(logits, targets)."""
    log_p = logits.float().log_softmax(1)
    rows = -hard * log_p.gather(1, labels[:, None])
    if targets is not None:
        rows = rows - soft * (targets * log_p).sum(1, keepdim=True)
    return torch.where(kept, rows[:, 0], 0).sum()


def squared_error(r: Tensor, x: Tensor, kept: Tensor) -> Tensor:
    """The sum over kept rows of the mean over columns of (r − x)²."""
    return torch.where(kept, (r.float() - x.float()).square().mean(1), 0).sum()


def _initialise(module: nn.Module) -> None:
    """The code's initial weights; its two encoders differ at first, ours do not."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.kaiming_uniform_(module.weight)
        if module.bias is not None:
            nn.init.constant_(module.bias, 0.01)
