"""Top-1 and top-5 accuracy of an encoder's classifier; what label correction would do to images not trained on."""

from collections.abc import Collection

import torch
import torch.distributed as dist
from torch import Tensor

from mopro_fast import distributed, ops, peers
from mopro_fast.console import Progress
from mopro_fast.models.method import Method
from mopro_fast.models.resnet import ResNet


@torch.no_grad()
def accuracy(encoder: ResNet, loader: Collection, device: torch.device, bf16: bool = False) -> dict[str, float | int]:
    """-> top1 and top5 in percent and the number of images, over all ranks. The loader shows each image once.

    With fewer than five classes top5 counts all of them. The encoder is left in the mode it was in.
    """
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    for logits, _, labels, _ in _outputs(encoder, loader, device, bf16, embed=False):
        counts += _hits(logits, labels)
    return _shares(_over_ranks(counts))


@torch.no_grad()
def held_out(
    model: Method, loader: Collection, device: torch.device, bf16: bool, given: Tensor, trusted: bool
) -> dict[str, float | int | list[int] | None]:
    """:func:`accuracy` on the held-out labels, and of a method that corrects labels what it would do to these images,
    as shares of them: relabelled, removed; sure (a score above its threshold). sure_right: of the sure ones, how many
    have the held-out label that it prefers (None without any).

    given: int64 [2, n], ids in rising order, of these images at least, and the labels that they came with; these are
    what is corrected.
    trusted: the held-out labels are known to be right. Then of_class has two lists [C]: how many images would become
    each class, and how many of them rightly.
    """
    classes = model.encoder_q.classifier.out_features
    counts = torch.zeros(7 + 2 * classes, dtype=torch.int64, device=device)
    judges = model.judges()
    known, labels_of = given
    for logits, q, labels, ids in _outputs(model.encoder_q, loader, device, bf16, embed=True):
        counts[:3] += _hits(logits, labels)
        if not judges:
            continue
        own = labels_of[torch.searchsorted(known, ids)]
        new, kept, winner, score = model.correct(logits, q, own)
        changed = kept & (new != own)
        sure = score >= model.threshold if model.inclusive else score > model.threshold
        counts[3:7] += torch.stack([mask.sum() for mask in (changed, ~kept, sure, sure & (winner == labels))])
        for i, mask in enumerate((changed, changed & (new == labels))):
            of_class = counts[7 + i * classes : 7 + (i + 1) * classes]
            of_class.index_add_(0, new.clamp(min=0), mask.to(torch.int64))
    values = _over_ranks(counts)
    found = _shares(values[:3])
    if judges:
        images, (relabelled, removed, sure, right) = max(1, values[2]), values[3:7]
        found |= {"relabelled": relabelled / images, "removed": removed / images, "sure": sure / images}
        found["sure_right"] = right / sure if sure else None
        if trusted:
            found["of_class"] = [values[7 : 7 + classes], values[7 + classes :]]
    return found


def _outputs(encoder: ResNet, loader: Collection, device: torch.device, bf16: bool, embed: bool):
    """logits [n, C], q [n, D] or None, labels [n] and ids [n] of each batch."""
    training = encoder.training
    encoder.eval()
    try:
        with Progress("evaluation", len(loader), "batches", active=distributed.world()[0] == 0) as bar:
            for images, labels, ids in loader:
                peers.moved()
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    features = encoder.features(ops.normalize(images))
                    out = encoder.classifier(features), encoder.project(features) if embed else None
                yield *out, labels, ids
                bar.update()
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


def told(values: dict) -> str:
    """What :func:`accuracy` or :func:`held_out` found, for the terminal."""
    text = f"top-1 {values['top1']:.2f} % top-5 {values['top5']:.2f} % of {values['images']} images"
    if "sure" not in values:
        return text
    right = "" if values["sure_right"] is None else f", of these {100 * values['sure_right']:.0f} % have that label"
    shares = {name: f"{100 * values[name]:.1f} %" for name in ("relabelled", "removed", "sure")}
    return (
        f"{text}; it would relabel {shares['relabelled']}, remove {shares['removed']}; sure of {shares['sure']}{right}"
    )
