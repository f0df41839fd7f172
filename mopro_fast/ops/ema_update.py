"""The momentum encoder's update (MoPro section 3.1, as in MoCo): a multi-tensor exponential moving average."""

import torch
from torch import Tensor

from mopro_fast.ops import backends, checks

backends.define(
    "ema_update_(Tensor(a!)[] targets, Tensor[] sources, float momentum, Tensor(b!)[] shadows) -> ()",
    fake=lambda targets, sources, momentum, shadows: None,
)


def ema_update_(
    targets: list[Tensor], sources: list[Tensor], momentum: float, shadows: list[Tensor] | None = None
) -> None:
    """``t ← momentum·t + (1 − momentum)·s`` for every pair of targets and sources, in place.

    targets:  float32 masters, any shapes (a step of 0.1 % is lost below float32's resolution).
    sources:  same shapes, float32, bfloat16 or float16.
    momentum: in [0, 1].
    shadows:  optional bfloat16 or float16 copies of the targets, rewritten in the same pass.

    Raises ValueError for lists of different lengths, a wrong shape, dtype or device, or a momentum outside [0, 1].
    """
    checks.unit_interval("momentum", momentum)
    shadows = [] if shadows is None else shadows
    if len(sources) != len(targets):
        raise ValueError(f"sources must hold {len(targets)} tensors, one per target, got {len(sources)}")
    if shadows and len(shadows) != len(targets):
        raise ValueError(f"shadows must hold {len(targets)} tensors, one per target, got {len(shadows)}")
    if not targets:
        return
    device = checks.device_of("targets[0]", targets[0])
    low = (torch.bfloat16, torch.float16)
    for i, target in enumerate(targets):
        shape = tuple(target.shape)
        checks.tensor(f"targets[{i}]", target, shape, (torch.float32,), device)
        checks.tensor(f"sources[{i}]", sources[i], shape, (torch.float32, *low), device)
        if shadows:
            checks.tensor(f"shadows[{i}]", shadows[i], shape, low, device)
    with torch.no_grad():
        torch.ops.mopro_fast.ema_update_(targets, sources, momentum, shadows)
