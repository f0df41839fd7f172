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
    lists = {"targets": (targets, (torch.float32,)), "sources": (sources, (torch.float32, *checks.LOW))}
    if shadows:
        lists["shadows"] = (shadows, checks.LOW)
    if checks.tensor_lists(lists) is None:
        return
    with torch.no_grad():
        torch.ops.mopro_fast.ema_update_(targets, sources, momentum, shadows or [])
