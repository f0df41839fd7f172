"""The official formulation of every op in eager PyTorch, the peer that the benchmarks name "official".

It follows what salesforce/MoPro's training step computes and how: similarities of every row with the whole queue and
all prototypes as matrices (the banks copied first), cross-entropies over those, boolean indexing for the kept rows, a
Python loop over the rows for the prototypes, a ring buffer addressed by a host integer, a multiply-add per tensor for
the momentum encoder. 16-bit inputs go as under autocast: products in 16 bits, softmaxes and cross-entropies in float32.
``collective_targets`` follows yuleiqin/capro in the same way, ``soft_neighbour_labels`` the formula of PAWS.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from mopro_fast.ops import colour


def info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits = _instance_logits(q, k, queue, temperature)
    first = torch.zeros(len(q), dtype=torch.int64, device=q.device)
    hit = logits.detach().topk(1, dim=1).indices[:, 0] == 0
    return F.cross_entropy(logits, first, reduction="none"), hit


def correct_labels(
    logits: Tensor, q: Tensor, prototypes: Tensor, labels: Tensor, *, alpha: float, threshold: float, temperature: float
) -> tuple[Tensor, Tensor]:
    return _correct(_wide(logits), _scores(q, prototypes, temperature), labels, alpha, threshold)


def prototype_contrast(q: Tensor, prototypes: Tensor, labels: Tensor, kept: Tensor, temperature: float) -> Tensor:
    """The mean over the kept rows."""
    scores = _scores(q, prototypes, temperature)
    return F.cross_entropy(scores[kept], labels[kept])


@torch.no_grad()
def prototype_update_(prototypes: Tensor, features: Tensor, labels: Tensor, kept: Tensor, momentum: float) -> None:
    for feature, label in zip(features[kept], labels[kept], strict=True):
        prototypes[label] = momentum * prototypes[label] + (1 - momentum) * feature
    prototypes.copy_(F.normalize(prototypes, dim=1))


@torch.no_grad()
def queue_enqueue_(queue: Tensor, cursor: Tensor, keys: Tensor, shadow: Tensor | None = None) -> None:
    """The official queue must be a multiple of the number of keys."""
    begin = int(cursor)
    end = begin + len(keys)
    assert end <= len(queue)
    for bank in [queue] if shadow is None else [queue, shadow]:
        bank[begin:end] = keys
    cursor[0] = end % len(queue)


@torch.no_grad()
def ema_update_(
    targets: list[Tensor], sources: list[Tensor], momentum: float, shadows: list[Tensor] | None = None
) -> None:
    """Every target gets new storage, as in the official code."""
    for target, source in zip(targets, sources, strict=True):
        target.data = target.data * momentum + source.data * (1 - momentum)
    for shadow, target in zip(shadows or [], targets if shadows else [], strict=True):
        shadow.copy_(target)


@torch.no_grad()
def collective_targets(
    z: Tensor, keys: Tensor, aux_weight: Tensor, prototypes: Tensor, *, alpha: float, temperature: float
) -> Tensor:
    """Matrices of N×Q weights and Q×C labels; the queue is copied for each."""
    weights = _wide(z @ keys.clone().T).clamp(0, 1) + 1e-7
    weights = weights / weights.sum(1, keepdim=True)
    labels = alpha * _wide(keys.clone() @ aux_weight.T).softmax(1)
    labels = labels + (1 - alpha) * _scores(keys.clone(), prototypes, temperature).softmax(1)
    targets = _wide(weights.to(z.dtype) @ labels.to(z.dtype)).clamp(0, 1)
    return targets / targets.sum(1, keepdim=True)


@torch.no_grad()
def soft_neighbour_labels(z: Tensor, keys: Tensor, values: Tensor, *, temperature: float) -> Tensor:
    return _wide(_scores(z, keys, temperature).softmax(1).to(values.dtype) @ values)


def batch_norm_act(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, residual: Tensor
) -> Tensor:
    """The end of a block, as torchvision's ResNet writes it."""
    x = F.batch_norm(x, running_mean, running_var, weight, bias, training=True)
    x += residual
    return F.relu(x, inplace=True)


def batch_norm_relu_pool(x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
    """Behind the first convolution, as torchvision's ResNet writes it."""
    x = F.relu(F.batch_norm(x, running_mean, running_var, weight, bias, training=True), inplace=True)
    return F.max_pool2d(x, 3, 2, 1)


def conv1x1_stats_(
    x: Tensor, weight: Tensor, running_mean: Tensor, running_var: Tensor, norm: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """BatchNorm with given statistics, ReLU, convolution, and what the next BatchNorm takes from its output."""
    mean, rstd, norm_weight, norm_bias = norm
    z = F.batch_norm(x, mean[0], rstd[0] ** -2, norm_weight, norm_bias, eps=1e-30)  # PyTorch 2.11 refuses 0
    y = F.conv2d(F.relu(z, inplace=True), weight.to(x.dtype))
    var, mean = torch.var_mean(_wide(y), (0, 2, 3))
    running_mean.lerp_(mean, 0.1)
    running_var.lerp_(var, 0.1)
    count = y.numel() // y.shape[1]
    return y, mean[None], (var * ((count - 1) / count) + 1e-5).rsqrt()[None]


def mopro_loss(
    logits: Tensor, q: Tensor, k: Tensor, queue: Tensor, prototypes: Tensor, labels: Tensor, *,
    temperature: float, w_proto: float, w_inst: float,
) -> SimpleNamespace:  # fmt: skip
    """The losses and accuracies with labels as corrected; a row with label −1 does not count."""
    instance, scores = _instance_logits(q, k, queue, temperature), _scores(q, prototypes, temperature)
    return _losses(_wide(logits), scores, instance, labels, labels >= 0, w_proto, w_inst)


def corrected_loss(
    logits: Tensor, q: Tensor, k: Tensor, queue: Tensor, prototypes: Tensor, labels: Tensor, *,
    temperature: float, alpha: float, threshold: float, w_proto: float, w_inst: float,
) -> SimpleNamespace:  # fmt: skip
    """correct_labels, then mopro_loss, which share their scores as in the official step."""
    instance, scores = _instance_logits(q, k, queue, temperature), _scores(q, prototypes, temperature)
    logits = _wide(logits)
    new, kept = _correct(logits.detach(), scores.detach(), labels, alpha, threshold)
    return _losses(logits, scores, instance, new, kept, w_proto, w_inst)


def _losses(
    logits: Tensor, scores: Tensor, instance: Tensor, labels: Tensor, kept: Tensor, w_proto: float, w_inst: float
) -> SimpleNamespace:
    logits, scores, target = logits[kept], scores[kept], labels[kept]
    first = torch.zeros(len(instance), dtype=torch.int64, device=instance.device)
    loss = (
        F.cross_entropy(logits, target)
        + w_proto * F.cross_entropy(scores, target)
        + w_inst * F.cross_entropy(instance, first)
    )
    pairs = ((logits, target), (scores, target), (instance, first))
    accuracy = [(x.detach().topk(1, dim=1).indices[:, 0] == y).float().mean() for x, y in pairs]
    return SimpleNamespace(loss=loss, accuracy=accuracy, labels=labels, kept=kept)


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """torchvision's ToTensor and Normalize, on uint8 [N, H, W, 3], in the type of mean and std."""
    return (images.permute(0, 3, 1, 2).to(mean.dtype).div(255) - mean[:, None, None]) / std[:, None, None]


def two_views(
    pixels: Tensor, images: Tensor, boxes: Tensor, flips: Tensor, gray: Tensor, factors: Tensor, order: Tensor,
    size: int,
) -> Tensor:  # fmt: skip
    """Image by image as torchvision's transforms on tensors, which the official code has on Pillow's; the colours as
    in mopro_fast.data.augment, all images at once. Resized in the type of ``factors``."""
    views = []
    places = zip(images.tolist(), boxes.tolist(), flips.tolist(), strict=True)
    for (first, height, width), its_boxes, its_flips in places:
        image = pixels[first : first + 3 * height * width].view(height, width, 3).permute(2, 0, 1)
        for (top, left, h, w), flip in zip(its_boxes, its_flips, strict=True):
            crop = image[None, :, top : top + h, left : left + w].to(factors.dtype)
            crop = F.interpolate(crop, (size, size), mode="bilinear", antialias=True).round_().byte()
            views.append(crop.flip(3) if flip else crop)
    q, k = torch.cat(views).permute(0, 2, 3, 1).unflatten(0, (len(images), -1)).unbind(1)
    jitter = colour.Jitter(gray.cpu().numpy(), factors.float().cpu().numpy(), order.cpu().numpy())
    return torch.stack([q, colour.color_jitter(k.contiguous(), jitter)])


def _instance_logits(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """float32 (or wider) [N, 1 + Q], the key first."""
    positive = torch.einsum("nd,nd->n", q, k)[:, None]
    negative = q @ queue.detach().clone().T
    return _wide(torch.cat([positive, negative], dim=1) / temperature)


def _scores(q: Tensor, prototypes: Tensor, temperature: float) -> Tensor:
    """float32 (or wider) [N, C]."""
    return _wide(q @ prototypes.detach().clone().to(q.dtype).T / temperature)


@torch.no_grad()
def _correct(logits: Tensor, scores: Tensor, labels: Tensor, alpha: float, threshold: float) -> tuple[Tensor, Tensor]:
    mixed = alpha * logits.softmax(1) + (1 - alpha) * scores.softmax(1)
    kept = mixed[labels >= 0, labels] > 1 / mixed.shape[1]
    best, guess = mixed.max(1)
    sure = best > threshold
    labels = labels.clone()
    labels[sure] = guess[sure]
    return labels, kept | sure


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.element_size() == 2 else x


class Step:
    """A whole training step of the official code in an epoch that corrects labels, on one device.

    Encoders are ordinary ResNets in float32 and NCHW; images come as float32, normalised. ``autocast`` and
    ``channels_last``: the usual two lines that make it faster.
    """

    def __init__(
        self, encoder_q: torch.nn.Module, encoder_k: torch.nn.Module, config, optim, autocast: bool, channels_last: bool
    ) -> None:
        """config: MoProConfig; optim: OptimConfig."""
        self.c, self.autocast = config, autocast
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.encoder_q, self.encoder_k = (e.train().to(memory_format=self.format) for e in (encoder_q, encoder_k))
        self.encoder_k.requires_grad_(False)
        device, dim = encoder_q.fc2.weight.device, encoder_q.fc2.out_features
        self.queue = F.normalize(torch.randn(config.queue_size, dim, device=device), dim=1)
        self.cursor = torch.zeros(1, dtype=torch.int64, device=device)
        self.prototypes = F.normalize(torch.randn(encoder_q.classifier.out_features, dim, device=device), dim=1)
        self.optimizer = torch.optim.SGD(
            self.encoder_q.parameters(), optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay
        )

    def __call__(self, view_q: Tensor, view_k: Tensor, labels: Tensor) -> Tensor:
        """Normalised images float32 [N, 3, H, W] and int64 [N]; -> the loss."""
        c = self.c
        view_q, view_k = (x.contiguous(memory_format=self.format) for x in (view_q, view_k))
        with torch.autocast(view_q.device.type, torch.bfloat16, enabled=self.autocast):
            logits, q = self.encoder_q(view_q)
            with torch.no_grad():
                ema_update_(list(self.encoder_k.parameters()), list(self.encoder_q.parameters()), c.key_momentum)
                order = torch.randperm(len(view_k)).to(view_k.device)
                _, k = self.encoder_k(view_k[order])
                k = k[torch.argsort(order)]
        out = corrected_loss(
            logits, q, k, self.queue, self.prototypes, labels, temperature=c.temperature, alpha=c.alpha,
            threshold=c.threshold, w_proto=c.w_proto, w_inst=c.w_inst,
        )  # fmt: skip
        queue_enqueue_(self.queue, self.cursor, k)
        prototype_update_(self.prototypes, q.detach(), out.labels, out.kept, c.proto_momentum)
        self.optimizer.zero_grad()
        out.loss.backward()
        self.optimizer.step()
        return out.loss.detach()
