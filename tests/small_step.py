"""Models of a few thousand parameters, MoPro first, and their training step."""

import contextlib
import copy

import torch
import torch.nn.functional as F

from mopro_fast.config import CAProConfig, MoProConfig, OptimConfig, RunConfig, TrainConfig
from mopro_fast.data.pipeline import Batch
from mopro_fast.models.baseline import CrossEntropy
from mopro_fast.models.capro import CAPro
from mopro_fast.models.classifier import Classifier
from mopro_fast.models.method import Method
from mopro_fast.models.mopro import MoPro
from mopro_fast.models.resnet import Backbone, ResNet
from mopro_fast.training.step import Shuffle, TrainStep

CLASSES, ROWS, SIZE = 4, 8, 16
SGD = {"lr": 0.005, "momentum": 0.9, "weight_decay": 1e-4}
PHASES = (0, 1, 2)  # an epoch of each


def small_model() -> MoPro:
    torch.manual_seed(0)
    config = MoProConfig(queue_size=32, key_momentum=0.9, proto_momentum=0.9, threshold=0.4, start_clean=2)
    encoder = ResNet("resnet18", CLASSES, 8, width=0.125, stem="small")
    return MoPro(encoder, copy.deepcopy(encoder), config).train()


def small_method(kind: str) -> Method:
    """mopro; capro, in PHASES vanilla with a frozen encoder, started, cleaning; ce, finetune, retrain (also frozen)."""
    model = small_model()
    encoder = model.encoder_q
    if kind == "mopro":
        return model
    if kind == "capro":
        capro = CAProConfig(init_proto=0, unfreeze_epoch=1)
        model = CAPro(encoder, Backbone("resnet18", 0.125, "small"), model.config, capro).train()
        model.prototypes.copy_(F.normalize(torch.randn_like(model.prototypes), dim=1))
        return model
    return (CrossEntropy(encoder) if kind == "ce" else Classifier(encoder, freeze=kind == "retrain")).train()


def train_step(model: Method, rows: int = ROWS, device: str = "cpu", sgd: str = "fused", **run) -> TrainStep:
    optim = OptimConfig(batch_size=rows, momentum=SGD["momentum"], weight_decay=SGD["weight_decay"], sgd=sgd)
    mopro = getattr(model, "config", MoProConfig())
    config = TrainConfig(mopro=mopro, optim=optim, run=RunConfig(**run))
    return TrainStep(config, model, rows, torch.device(device))


def run_steps(step: TrainStep, per_phase: int, around=contextlib.nullcontext) -> list[torch.Tensor]:
    """Steps through all phases on fixed random images, each inside ``around()``; -> the loss of each."""
    losses, shuffle = [], Shuffle(0, ROWS) if step.model.encoder_k is not None else one_view
    for i in range(per_phase * len(PHASES)):
        epoch, g = PHASES[i // per_phase], torch.Generator().manual_seed(i)
        view_q, view_k = torch.randint(256, (2, ROWS, SIZE, SIZE, 3), dtype=torch.uint8, generator=g)
        batch = Batch(view_q, view_k, torch.randint(CLASSES, (ROWS,), generator=g), torch.arange(ROWS))
        batch = Batch(*(x.to(step.device) for x in batch))
        if i % per_phase == 0:
            step.begin_epoch(epoch)
        with around():
            ((batch, place),) = shuffle([batch], i)
            losses.append(step(batch, extra(step.model, place, i), epoch, i, SGD["lr"]).loss.clone())
    return losses


def one_view(batches, _step: int):
    """In the place of Shuffle."""
    return ((batch._replace(view_k=None), None) for batch in batches)


def extra(model: Method, place: torch.Tensor | None, step: int) -> tuple[torch.Tensor | None, ...]:
    """What ``forward`` takes beside the batch: of CAPro anchors and colour shifts, of a Classifier mixup's shares."""
    added: tuple[torch.Tensor, ...] = ()
    if isinstance(model, CAPro):
        added = torch.arange(ROWS) % 3 == step % 3, torch.full((2, ROWS, 3), 0.01 * step)
    elif isinstance(model, Classifier):
        added = torch.tensor([0.9, 0.1]), torch.arange(ROWS).roll(step)
    device = model.encoder_q.classifier.weight.device
    added = tuple(x.to(device) for x in added)
    return (*(() if place is None else (place,)), *added, *((None,) if isinstance(model, CAPro) else ()))
