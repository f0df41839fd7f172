"""Encoders that compute in 16 bits while their float32 masters are trained."""

import copy

import torch
from torch import Tensor, nn

from mopro_fast.models.resnet import ResNet


def low_precision(encoder: ResNet, dtype: torch.dtype) -> tuple[ResNet, list[Tensor | None]]:
    """The encoder with ``dtype`` copies of its convolutions' and linear layers' parameters.

    BatchNorm's parameters and running statistics are not copied but shared, in float32. Also returned, for each of
    the encoder's parameters, is the copy or None: the optimizer rewrites them in its own pass (SGDEMA's shadows), so
    that no step casts weights.
    """
    norms = [m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    shared = {id(t): t for norm in norms for t in (*norm.parameters(), *norm.buffers())}
    copies = {
        id(p): nn.Parameter(p.detach().to(dtype), p.requires_grad) for p in encoder.parameters() if id(p) not in shared
    }
    return copy.deepcopy(encoder, {**shared, **copies}), [copies.get(id(p)) for p in encoder.parameters()]
