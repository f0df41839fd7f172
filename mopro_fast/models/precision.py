"""Encoders that compute in 16 bits while their float32 masters are trained."""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def low_precision(module: M, dtype: torch.dtype) -> tuple[M, dict[Tensor, Tensor]]:
    """The module with ``dtype`` copies of its convolutions' and linear layers' parameters, and those by their masters.

    BatchNorm's parameters and running statistics are not copied but shared, in float32. The optimizer rewrites the
    copies in its own pass (SGDEMA's shadows), so that no step casts weights.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    shared = {id(t): t for norm in norms for t in (*norm.parameters(), *norm.buffers())}
    copies = {
        p: nn.Parameter(p.detach().to(dtype), p.requires_grad) for p in module.parameters() if id(p) not in shared
    }
    return copy.deepcopy(module, {**shared, **{id(p): own for p, own in copies.items()}}), copies
