"""SGD and the learning rate of every step."""

import math

import torch
from torch import nn

from mopro_fast.config import OptimConfig


def build_optimizer(encoder: nn.Module, config: OptimConfig) -> torch.optim.SGD:
    return torch.optim.SGD(
        encoder.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
    )


def learning_rate(config: OptimConfig, epoch: int, step: int, steps_per_epoch: int) -> float:
    """The learning rate of this step (0-based). Constant within an epoch, as in the official code, after warm-up."""
    lr = config.lr * (config.batch_size / 256 if config.scale_lr else 1.0)
    warmup = config.warmup_epochs * steps_per_epoch
    done = epoch * steps_per_epoch + step
    if done < warmup:
        return lr * (done + 1) / warmup
    if config.schedule == "cosine":
        return lr * 0.5 * (1.0 + math.cos(math.pi * epoch / config.epochs))
    return lr * 0.1 ** sum(epoch >= milestone for milestone in config.milestones)
