"""Top-1 and top-5 accuracy of an encoder's classifier."""

from collections.abc import Iterable

import torch
import torch.distributed as dist

from mopro_fast import distributed, ops
from mopro_fast.models.resnet import ResNet


@torch.no_grad()
def accuracy(encoder: ResNet, loader: Iterable, device: torch.device, bf16: bool = False) -> dict[str, float | int]:
    """-> top1 and top5 in percent and the number of images, over all ranks. The loader shows each image once.

    With fewer than five classes top5 counts all of them. The encoder is left in the mode it was in.
    """
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    shown = 0
    training = encoder.training
    encoder.eval()
    for images, labels, _ids in loader:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = encoder.classifier(encoder.features(ops.normalize(images)))
        top = logits.float().topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        counts += torch.stack([top[:, 0].sum(), top.sum()])
        shown += len(labels)
    encoder.train(training)
    counts = torch.cat([counts, torch.tensor([shown], device=device)])
    if not distributed.alone():
        dist.all_reduce(counts)
    top1, top5, images = counts.tolist()
    return {"top1": 100 * top1 / max(1, images), "top5": 100 * top5 / max(1, images), "images": images}
