"""A MoPro model of a few thousand parameters and its training step."""

import contextlib
import copy

import torch

from mopro_fast.config import MoProConfig, OptimConfig, RunConfig, TrainConfig
from mopro_fast.data.pipeline import Batch
from mopro_fast.models.mopro import MoPro
from mopro_fast.models.resnet import ResNet
from mopro_fast.training.step import Shuffle, TrainStep

CLASSES, ROWS, SIZE = 4, 8, 16
SGD = {"lr": 0.005, "momentum": 0.9, "weight_decay": 1e-4}
PHASES = (0, 1, 2)  # an epoch of each


def small_model() -> MoPro:
    torch.manual_seed(0)
    config = MoProConfig(queue_size=32, key_momentum=0.9, proto_momentum=0.9, threshold=0.4, start_clean=2)
    encoder = ResNet("resnet18", CLASSES, 8, width=0.125, stem="small")
    return MoPro(encoder, copy.deepcopy(encoder), config).train()


def train_step(model: MoPro, rows: int = ROWS, device: str = "cpu", sgd: str = "fused", **run) -> TrainStep:
    optim = OptimConfig(batch_size=rows, momentum=SGD["momentum"], weight_decay=SGD["weight_decay"], sgd=sgd)
    config = TrainConfig(mopro=model.config, optim=optim, run=RunConfig(**run))
    return TrainStep(config, model, rows, torch.device(device))


def run_steps(step: TrainStep, per_phase: int, around=contextlib.nullcontext) -> list[torch.Tensor]:
    """Steps through all phases on fixed random images, each inside ``around()``; -> the loss of each."""
    losses, shuffle = [], Shuffle(0, ROWS)
    for i in range(per_phase * len(PHASES)):
        g = torch.Generator().manual_seed(i)
        view_q, view_k = torch.randint(256, (2, ROWS, SIZE, SIZE, 3), dtype=torch.uint8, generator=g)
        batch = Batch(view_q, view_k, torch.randint(CLASSES, (ROWS,), generator=g), torch.arange(ROWS))
        batch = Batch(*(x.to(step.device) for x in batch))
        with around():
            ((batch, place),) = shuffle([batch], i)
            losses.append(step(batch, place, PHASES[i // per_phase], i, SGD["lr"]).loss.clone())
    return losses
