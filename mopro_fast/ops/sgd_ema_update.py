"""Momentum SGD and the momentum encoder's update in one pass (torch.optim.SGD; MoPro section 3.1, as in MoCo)."""

import torch
from torch import Tensor

from mopro_fast.ops import backends, checks
from mopro_fast.ops.ema_update import ema_update_

F32 = (torch.float32,)

backends.define(
    "sgd_ema_update_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] buffers, Tensor(c!)[] targets, Tensor lr, "
    "float momentum, float weight_decay, bool nesterov, float ema_momentum, Tensor(d!)[] param_shadows, "
    "Tensor(e!)[] target_shadows) -> ()",
    fake=lambda *_: None,
)


def sgd_ema_update_(
    params: list[Tensor],
    grads: list[Tensor | None],
    buffers: list[Tensor | None],
    targets: list[Tensor],
    *,
    lr: Tensor | float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    ema_momentum: float,
    param_shadows: list[Tensor] | None = None,
    target_shadows: list[Tensor] | None = None,
) -> None:
    """A step of ``torch.optim.SGD`` (dampening 0) on ``params``, then ``t ← m·t + (1 − m)·p``, in place.

    ``g ← grad + weight_decay·p; b ← momentum·b + g; p ← p − lr·(g + momentum·b if nesterov else b)``.
    As with torch.optim.SGD a parameter without a gradient stays as it is; its target still moves.

    params:         float32 masters, any shapes.
    grads:          same shapes, float32, bfloat16 or float16; None where there is none.
    buffers:        same shapes, float32, zeros before the first step; ignored where the gradient is None, and all of
                    them (any list) if momentum is 0.
    targets:        same shapes, float32: the momentum encoder.
    lr:             float32 [1] on the device, read there when the step runs (what a captured CUDA graph needs), or
                    a float.
    momentum, ema_momentum: in [0, 1]; nesterov wants momentum above 0. weight_decay: at least 0.
    param_shadows, target_shadows: both or neither: copies, each bfloat16 or float16, rewritten in the same pass.

    Raises ValueError for lists of different lengths, a wrong shape, dtype or device, or a number out of range.
    """
    for name, value in {"momentum": momentum, "ema_momentum": ema_momentum}.items():
        checks.unit_interval(name, value)
    checks.number("weight_decay", weight_decay)
    if not 0.0 <= weight_decay < float("inf"):
        raise ValueError(f"weight_decay must be a finite number of at least 0, got {weight_decay}")
    if nesterov and momentum == 0:
        raise ValueError("nesterov needs a momentum above 0, got 0")
    lists = {"params": (params, F32), "grads": (grads, (*F32, *checks.LOW)), "targets": (targets, F32)}
    if momentum:
        lists["buffers"] = (buffers, F32)
    if param_shadows or target_shadows:
        lists["param_shadows"] = (param_shadows or [], checks.LOW)
        lists["target_shadows"] = (target_shadows or [], checks.LOW)
    checks.same_length({name: tensors for name, (tensors, _) in lists.items()})

    without = [i for i, grad in enumerate(grads) if grad is None]
    if without:
        shadows = [target_shadows[i] for i in without] if target_shadows else None
        ema_update_([targets[i] for i in without], [params[i] for i in without], ema_momentum, shadows)
        lists = {
            name: ([t for t, grad in zip(tensors, grads, strict=True) if grad is not None], dtypes)
            for name, (tensors, dtypes) in lists.items()
        }
    device = checks.tensor_lists(lists)
    if device is None:
        return
    if not isinstance(lr, Tensor):
        checks.number("lr", lr)
        if not 0.0 <= lr < float("inf"):
            raise ValueError(f"lr must be a finite number of at least 0, got {lr}")
        lr = torch.full((1,), lr, dtype=torch.float32, device=device)
    checks.tensor("lr", lr, (1,), F32, device)
    params, grads, targets, buffers, param_shadows, target_shadows = (
        lists.get(name, ([],))[0]
        for name in ("params", "grads", "targets", "buffers", "param_shadows", "target_shadows")
    )
    with torch.no_grad():
        torch.ops.mopro_fast.sgd_ema_update_(
            params, grads, buffers, targets, lr, momentum, weight_decay, nesterov, ema_momentum,
            param_shadows, target_shadows,
        )  # fmt: skip
