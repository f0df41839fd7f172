"""A MoPro model of a few thousand parameters and its training step."""

import contextlib
import copy

import torch

from mopro_fast.config import MoProConfig, OptimConfig, RunConfig, TrainConfig
from mopro_fast.data.pipeline import Batch
from mopro_fast.models.baseline import CrossEntropy
from mopro_fast.models.classifier import Classifier
from mopro_fast.models.method import Method
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


def small_method(kind: str) -> Method:
    """The other methods: ce, finetune, retrain (whose encoder is frozen)."""
    encoder = small_model().encoder_q
    return (CrossEntropy(encoder) if kind == "ce" else Classifier(encoder, freeze=kind == "retrain")).train()


def train_step(model: Method, rows: int = ROWS, device: str = "cpu", sgd: str = "fused", **run) -> TrainStep:
    optim = OptimConfig(batch_size=rows, momentum=SGD["momentum"], weight_decay=SGD["weight_decay"], sgd=sgd)
    mopro = getattr(model, "config", MoProConfig())
    config = TrainConfig(mopro=mopro, optim=optim, run=RunConfig(**run))
    return TrainStep(config, model, rows, torch.device(device))


def run_steps(step: TrainStep, per_phase: int, around=contextlib.nullcontext) -> list[torch.Tensor]:
    """Steps through all phases on fixed random images, each inside ``around()``; -> the loss of each."""
    losses, shuffle = [], Shuffle(0, ROWS) if isinstance(step.model, MoPro) else with_mixup(step.model)
    for i in range(per_phase * len(PHASES)):
        g = torch.Generator().manual_seed(i)
        view_q, view_k = torch.randint(256, (2, ROWS, SIZE, SIZE, 3), dtype=torch.uint8, generator=g)
        batch = Batch(view_q, view_k, torch.randint(CLASSES, (ROWS,), generator=g), torch.arange(ROWS))
        batch = Batch(*(x.to(step.device) for x in batch))
        with around():
            ((batch, place),) = shuffle([batch], i)
            losses.append(step(batch, place, PHASES[i // per_phase], i, SGD["lr"]).loss.clone())
    return losses


def with_mixup(model: Method):
    """In the place of Shuffle: what is added to batches of one view, for a Classifier mixup's shares and partners."""

    def batches(batches, step: int):
        for batch in batches:
            extra = (torch.tensor([0.9, 0.1]), torch.arange(ROWS).roll(step)) if isinstance(model, Classifier) else ()
            yield batch._replace(view_k=None), tuple(x.to(batch.labels.device) for x in extra)

    return batches
