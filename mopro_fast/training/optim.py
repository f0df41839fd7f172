"""SGD, alone or in one pass with the momentum encoder's update, and the learning rate of every step."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from mopro_fast import ops
from mopro_fast.config import OptimConfig
from mopro_fast.ops import checks


class SGDEMA(torch.optim.SGD):
    """Momentum SGD and ``target ← m·target + (1 − m)·param`` in one pass over memory (see ops.sgd_ema_update_).

    The numbers are those of ``torch.optim.SGD`` followed by ``ops.ema_update_``. State dicts are torch.optim.SGD's and
    load in both directions: targets, their momentum and shadows belong to the constructor, not to the state.
    For CUDA graphs give ``lr`` as a float32 tensor [1] on the device and write the schedule into it.
    A parameter without a gradient takes its shadow's: then the shadow was in the forward pass, instead of a cast.
    """

    def __init__(
        self,
        params: Iterable,
        targets: Iterable[Tensor],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        ema_momentum: float,
        param_shadows: Iterable[Tensor | None] | None = None,
        target_shadows: Iterable[Tensor | None] | None = None,
        dampening: float = 0.0,
        maximize: bool = False,
        differentiable: bool = False,
    ) -> None:
        """As torch.optim.SGD, and:

        targets:      one tensor per parameter, in the order of the parameters, through all groups.
        ema_momentum: m, in [0, 1].
        param_shadows, target_shadows: optional bfloat16 or float16 copies, one per parameter, None where there is none.

        Raises ValueError for dampening, maximize or differentiable, which it does not have, and for wrong numbers of
        tensors.
        """
        super().__init__(
            params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize, differentiable=differentiable
        )
        checks.unit_interval("ema_momentum", ema_momentum)
        self.targets, self.ema_momentum = list(targets), ema_momentum
        self.param_shadows, self.target_shadows = list(param_shadows or []), list(target_shadows or [])
        self._rates: dict[int, tuple[float, Tensor]] = {}  # of each group whose lr is a float: its copy on the device
        self._require_supported()
        params = [p for group in self.param_groups for p in group["params"]]
        for i, (p, target) in enumerate(zip(params, self.targets, strict=True)):
            if target.shape != p.shape:
                raise ValueError(f"targets[{i}] must have shape {list(p.shape)}, got {list(target.shape)}")

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._require_supported()
        begin = 0
        for index, group in enumerate(self.param_groups):
            params = group["params"]
            if not params:
                continue
            end = begin + len(params)
            shadows = self.param_shadows[begin:end] or [None] * len(params)
            grads = [_gradient(p, shadow) for p, shadow in zip(params, shadows, strict=True)]
            buffers = self._buffers(params, grads) if group["momentum"] else [None] * len(params)
            target_shadows = self.target_shadows[begin:end] or [None] * len(params)
            rows = list(zip(params, grads, buffers, self.targets[begin:end], shadows, target_shadows, strict=True))
            for has_shadow in (True, False):
                part = [row for row in rows if (row[4] is not None) == has_shadow]
                if not part:
                    continue
                p, g, b, t, v, w = map(list, zip(*part, strict=True))
                ops.sgd_ema_update_(
                    p, g, b, t,
                    lr=self._rate(index, group),
                    momentum=group["momentum"],
                    weight_decay=group["weight_decay"],
                    nesterov=group["nesterov"],
                    ema_momentum=self.ema_momentum,
                    param_shadows=v if has_shadow else None,
                    target_shadows=w if has_shadow else None,
                )  # fmt: skip
            begin = end
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for shadow in self.param_shadows:
            if shadow is not None and shadow.grad is not None:
                shadow.grad = None if set_to_none else shadow.grad.zero_()

    def __getstate__(self) -> dict:
        """For copies and pickles: torch.optim.Optimizer would leave out what is not its own."""
        own = {name: getattr(self, name) for name in ("targets", "ema_momentum", "param_shadows", "target_shadows")}
        return super().__getstate__() | own | {"_rates": {}}

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch.optim.SGD; a learning rate given as a tensor stays that tensor, whatever was saved, and buffers
        take their parameter's memory format.
        """
        rates = [group["lr"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, rate in zip(self.param_groups, rates, strict=True):
            if isinstance(rate, Tensor):
                rate.fill_(float(group["lr"]))
                group["lr"] = rate
            for p in group["params"]:
                buffer = self.state[p].get("momentum_buffer") if p in self.state else None
                if buffer is not None and buffer.stride() != p.stride():
                    self.state[p]["momentum_buffer"] = torch.empty_like(p).copy_(buffer)

    def _buffers(self, params: list[Tensor], grads: list[Tensor | None]) -> list[Tensor | None]:
        """Made when a parameter has its first gradient, as torch.optim.SGD does."""
        buffers = []
        for p, grad in zip(params, grads, strict=True):
            state = self.state[p] if grad is not None else {}
            if grad is not None and state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(p)
            buffers.append(state.get("momentum_buffer"))
        return buffers

    def _rate(self, index: int, group: dict) -> Tensor:
        if isinstance(group["lr"], Tensor):
            return group["lr"].reshape(1)
        value, rate = self._rates.get(index, (None, None))
        if value != group["lr"]:
            device = group["params"][0].device
            rate = torch.empty(1, dtype=torch.float32, device=device) if rate is None else rate
            self._rates[index] = group["lr"], rate.fill_(group["lr"])
        return rate

    def _require_supported(self) -> None:
        for group in self.param_groups:  # anew every step: groups can be edited, and loaded from a state dict
            for name in ("dampening", "maximize", "differentiable"):
                if group[name]:
                    raise ValueError(f"SGDEMA does not have {name}, got {name}={group[name]}")
        count = sum(len(group["params"]) for group in self.param_groups)
        lists = {"targets": self.targets, "param_shadows": self.param_shadows, "target_shadows": self.target_shadows}
        for name, tensors in lists.items():
            if len(tensors) != count and (tensors or name == "targets"):
                raise ValueError(f"{name} must hold {count} tensors, one per parameter, got {len(tensors)}")


def _gradient(p: Tensor, shadow: Tensor | None) -> Tensor | None:
    grad = shadow.grad if p.grad is None and shadow is not None else p.grad
    if grad is not None and grad.layout != torch.strided:
        raise ValueError("SGDEMA does not take sparse gradients")
    return grad


def build_optimizer(
    encoder: nn.Module,
    config: OptimConfig,
    targets: Iterable[Tensor] | None = None,
    ema_momentum: float | None = None,
    *,
    lr: float | Tensor | None = None,
    **shadows: list[Tensor | None],
) -> torch.optim.SGD:
    """SGD for the encoder; given the momentum encoder's parameters and momentum, one that updates those as well.

    lr: in place of the config's, such as a tensor. shadows: SGDEMA's.
    """
    options = {
        "lr": config.lr if lr is None else lr,
        "momentum": config.momentum,
        "weight_decay": config.weight_decay,
        "nesterov": config.nesterov,
    }
    if targets is None:
        return torch.optim.SGD(encoder.parameters(), **options, fused=isinstance(lr, Tensor))
    return SGDEMA(encoder.parameters(), targets, ema_momentum=ema_momentum, **options, **shadows)


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
