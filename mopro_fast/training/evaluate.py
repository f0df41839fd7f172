"""Top-1 and top-5 accuracy of an encoder's classifier; what label correction would do to images not trained on."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from mopro_fast import distributed, ops
from mopro_fast.models.method import Method
from mopro_fast.models.resnet import ResNet


@torch.no_grad()
def accuracy(encoder: ResNet, loader: Iterable, device: torch.device, bf16: bool = False) -> dict[str, float | int]:
    """-> top1 and top5 in percent and the number of images, over all ranks. The loader shows each image once.

    With fewer than five classes top5 counts all of them. The encoder is left in the mode it was in.
    """
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    for logits, _, labels in _outputs(encoder, loader, device, bf16, embed=False):
        counts += _hits(logits, labels)
    return _shares(_over_ranks(counts))


@torch.no_grad()
def held_out(model: Method, loader: Iterable, device: torch.device, bf16: bool) -> dict[str, float | None]:
    """:func:`accuracy`, and of a method that corrects labels, as shares of the images: relabelled and removed, which it
    would do to them; sure, with a score above its threshold; sure_right, those of the sure ones whose label is the
    winner (None without any).
    """
    counts = torch.zeros(7, dtype=torch.int64, device=device)
    corrects = False
    for logits, q, labels in _outputs(model.encoder_q, loader, device, bf16, embed=True):
        counts[:3] += _hits(logits, labels)
        if decided := model.correct(logits, q, labels):
            new, kept, winner, score = decided
            corrects, sure = True, score > model.threshold
            of = (kept & (new != labels), ~kept, sure, sure & (winner == labels))
            counts[3:] += torch.stack([mask.sum() for mask in of])
    values = _over_ranks(counts)
    shares = _shares(values[:3])
    if corrects:
        images, (relabelled, removed, sure, right) = max(1, values[2]), values[3:]
        shares |= {"relabelled": relabelled / images, "removed": removed / images, "sure": sure / images}
        shares["sure_right"] = right / sure if sure else None
    return shares


def _outputs(encoder: ResNet, loader: Iterable, device: torch.device, bf16: bool, embed: bool):
    """logits [n, C], q [n, D] or None, and labels [n] of each batch."""
    training = encoder.training
    encoder.eval()
    try:
        for images, labels, _ids in loader:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                features = encoder.features(ops.normalize(images))
                out = encoder.classifier(features), encoder.project(features) if embed else None
            yield *out, labels
    finally:
        encoder.train(training)


def _hits(logits: Tensor, labels: Tensor) -> Tensor:
    """int64 [3]: the label is the first guess, among the first five; rows."""
    top = logits.float().topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return torch.stack([top[:, 0].sum(), top.sum(), torch.full_like(top.sum(), len(labels))])


def _over_ranks(counts: Tensor) -> list[int]:
    if not distributed.alone():
        dist.all_reduce(counts)
    return counts.tolist()


def _shares(counts: list[int]) -> dict[str, float | int]:
    top1, top5, images = counts
    return {"top1": 100 * top1 / max(1, images), "top5": 100 * top5 / max(1, images), "images": images}
