"""SGD, alone or in one pass with the momentum encoder's update, and the learning rate of every step."""

import functools
import itertools
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from mopro_fast import installed, ops
from mopro_fast.config import OptimConfig
from mopro_fast.errors import UserError
from mopro_fast.ops import checks, reference

_OWN = ("targets", "ema_momentum", "param_shadows", "target_shadows")
_HOW = ("foreach", "fused")  # options of torch.optim.SGD that do not change what is computed


class _WithTargets:
    """What every SGD here adds to its base class: a momentum encoder, 16-bit copies, and how state is loaded.

    State dicts are torch.optim.SGD's: targets, their momentum and shadows belong to the constructor.
    """

    def _take(
        self,
        targets: Iterable[Tensor | None] | None,
        ema_momentum: float,
        param_shadows: Iterable[Tensor | None] | None,
        target_shadows: Iterable[Tensor | None] | None,
    ) -> None:
        checks.unit_interval("ema_momentum", ema_momentum)
        self.targets, self.ema_momentum = None if targets is None else list(targets), ema_momentum
        self.param_shadows, self.target_shadows = list(param_shadows or []), list(target_shadows or [])
        self._require_counts()
        for i, (p, target) in enumerate(zip(self._params(), self.targets or [], strict=targets is not None)):
            if target is not None and target.shape != p.shape:
                raise ValueError(f"targets[{i}] must have shape {list(p.shape)}, got {list(target.shape)}")

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _require_counts(self) -> None:
        count = len(self._params())
        lists = {"targets": self.targets, "param_shadows": self.param_shadows, "target_shadows": self.target_shadows}
        for name, tensors in lists.items():
            if tensors is not None and len(tensors) != count and (tensors or name == "targets"):
                raise ValueError(f"{name} must hold {count} tensors, one per parameter, got {len(tensors)}")

    def zero_grad(self, set_to_none: bool = True) -> None:
        torch.optim.Optimizer.zero_grad(self, set_to_none)  # apex's own has no set_to_none
        for shadow in self.param_shadows:
            if shadow is not None and shadow.grad is not None:
                shadow.grad = None if set_to_none else shadow.grad.zero_()

    def __getstate__(self) -> dict:
        """For copies and pickles: torch.optim.Optimizer would leave out what is not its own."""
        return super().__getstate__() | {k: v for k, v in vars(self).items() if k in _OWN}

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch.optim.SGD, but a learning rate given as a tensor stays that tensor, whatever was saved, what
        computes stays what it was, and buffers take their parameter's memory format.
        """
        before = [{name: group[name] for name in ("lr", *_HOW) if name in group} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, had in zip(self.param_groups, before, strict=True):
            rate = had["lr"]
            had["lr"] = rate.fill_(float(group["lr"])) if isinstance(rate, Tensor) else float(group["lr"])
            group.update(had)
            for p in group["params"]:
                buffer = self.state[p].get("momentum_buffer") if p in self.state else None
                if buffer is not None and buffer.stride() != p.stride():
                    self.state[p]["momentum_buffer"] = torch.empty_like(p).copy_(buffer)


class SGDEMA(_WithTargets, torch.optim.SGD):
    """Momentum SGD and ``target ← m·target + (1 − m)·param`` in one pass over memory (see ops.sgd_ema_update_).

    The numbers are those of ``torch.optim.SGD`` followed by ``ops.ema_update_``. State dicts are torch.optim.SGD's and
    load in both directions: targets, their momentum and shadows belong to the constructor, not to the state.
    For CUDA graphs give ``lr`` as a float32 tensor [1] on the device and write the schedule into it.
    A parameter without a gradient takes its shadow's: then the shadow was in the forward pass, instead of a cast.
    """

    def __init__(
        self,
        params: Iterable,
        targets: Iterable[Tensor | None],
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

        targets:      one tensor per parameter, in the order of the parameters, through all groups; None where there is
                      none.
        ema_momentum: m, in [0, 1].
        param_shadows, target_shadows: optional bfloat16 or float16 copies, one per parameter, None where there is none.

        Raises ValueError for dampening, maximize or differentiable, which it does not have, and for wrong numbers of
        tensors.
        """
        super().__init__(
            params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize, differentiable=differentiable
        )
        self._rates: dict[int, tuple[float, Tensor]] = {}  # of each group whose lr is a float: its copy on the device
        self._require_supported()
        self._take(list(targets), ema_momentum, param_shadows, target_shadows)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._require_supported()
        self._require_counts()
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
            how = {name: group[name] for name in ("momentum", "weight_decay", "nesterov")}
            for has_shadow, has_target in itertools.product((True, False), repeat=2):
                part = [row for row in rows if (row[4] is not None, row[3] is not None) == (has_shadow, has_target)]
                if not has_target:
                    part = [row for row in part if row[1] is not None]
                if not part:
                    continue
                p, g, b, t, v, w = map(list, zip(*part, strict=True))
                if has_target:
                    ops.sgd_ema_update_(
                        p, g, b, t, **how, lr=self._rate(index, group), ema_momentum=self.ema_momentum,
                        param_shadows=v if has_shadow else None, target_shadows=w if has_shadow else None,
                    )  # fmt: skip
                else:  # a few heads
                    _sgd_update_(p, g, b, self._rate(index, group), v if has_shadow else [], **how)
            begin = end
        return loss

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"_rates": {}}

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


@torch.no_grad()
def _sgd_update_(
    params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], lr: Tensor, shadows: list[Tensor], *,
    momentum: float, weight_decay: float, nesterov: bool,
) -> None:  # fmt: skip
    reference.sgd_ema_update_(
        params, grads, buffers, [], lr, momentum, weight_decay, nesterov, 0.0, shadows, []
    )  # fmt: skip


def _gradient(p: Tensor, shadow: Tensor | None) -> Tensor | None:
    grad = shadow.grad if p.grad is None and shadow is not None else p.grad
    if grad is not None and grad.layout != torch.strided:
        raise ValueError("SGDEMA does not take sparse gradients")
    return grad


class _ThenEMA(_WithTargets):
    """The base class's step, then ``ops.ema_update_``: what SGDEMA does, in several passes over memory."""

    def __init__(
        self,
        params: Iterable,
        targets: Iterable[Tensor | None] | None = None,
        *,
        ema_momentum: float | None = None,
        param_shadows: Iterable[Tensor | None] | None = None,
        target_shadows: Iterable[Tensor | None] | None = None,
        **options,
    ) -> None:
        """As SGDEMA. Without targets it is the base class alone, which gets the options."""
        super().__init__(params, **options)
        self._take(targets, 0.0 if targets is None else ema_momentum, param_shadows, target_shadows)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = self._params()
        shadows, target_shadows = (x or [None] * len(params) for x in (self.param_shadows, self.target_shadows))
        lent = [(p, v) for p, v in zip(params, shadows, strict=True) if p.grad is None and v is not None]
        for p, shadow in lent:
            p.grad = None if shadow.grad is None else shadow.grad.to(p.dtype)
        for group in self.param_groups:  # fused SGD wants all buffers of a group or none: some parameters start later
            for p in group["params"] if group["momentum"] else ():
                if p.grad is not None and self.state[p].get("momentum_buffer") is None:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        super().step()
        for p, _ in lent:
            p.grad = None
        copies = [(v, p.detach()) for p, v in zip(params, shadows, strict=True) if v is not None]
        if copies:
            with torch.no_grad():
                torch._foreach_copy_(*map(list, zip(*copies, strict=True)))
        rows = list(zip(self.targets or [], params, target_shadows, strict=self.targets is not None))
        rows = [row for row in rows if row[0] is not None]
        for has_shadow in (True, False):
            part = [row for row in rows if (row[2] is not None) == has_shadow]
            if part:
                t, p, w = map(list, zip(*part, strict=True))
                ops.ema_update_(t, p, self.ema_momentum, w if has_shadow else None)
        return loss


class SGDThenEMA(_ThenEMA, torch.optim.SGD):
    """torch.optim.SGD, then the momentum encoder."""


@functools.cache
def _apex_class() -> type[torch.optim.Optimizer]:
    """FusedSGD of NVIDIA's apex, then the momentum encoder."""
    installed.require_apex("--sgd apex")
    try:
        import amp_C  # noqa: F401  apex hides why this fails
        from apex.optimizers import FusedSGD
    except Exception as error:  # built for another torch or CUDA: whatever that raises
        raise UserError(
            f"--sgd apex: NVIDIA's apex cannot be imported ({type(error).__name__}: {error}): build it again for "
            f"PyTorch {torch.__version__}"
        ) from None

    class ApexThenEMA(_ThenEMA, FusedSGD):
        def get_momentums(self, params: list[Tensor]) -> tuple[list[Tensor], bool]:
            """FusedSGD begins every buffer anew where the last one is missing, so none may be."""
            for p in params:
                if self.state[p].get("momentum_buffer") is None:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            return super().get_momentums(params)

    return ApexThenEMA


def sgd_class(sgd: str, device: torch.device) -> type[torch.optim.Optimizer]:
    """The optimizer that OptimConfig.sgd names; a UserError where it cannot run."""
    if sgd != "apex":
        return SGDEMA if sgd == "fused" else SGDThenEMA
    if device.type != "cuda":
        raise UserError(f"--sgd apex: NVIDIA's FusedSGD needs a GPU, not device {device.type}: choose fused or torch")
    return _apex_class()


def build_optimizer(
    groups: list[list[Tensor]],
    config: OptimConfig,
    targets: Iterable[Tensor | None] | None = None,
    ema_momentum: float | None = None,
    *,
    copies: dict[Tensor, Tensor] | None = None,
    lr_on_device: bool = False,
) -> torch.optim.Optimizer:
    """SGD for groups of parameters; given the momentum encoder's parameters and momentum, it updates those as well.

    targets: in the order of the parameters. copies: 16-bit copies by their masters (models/precision.py).
    lr_on_device: every group's learning rate is a float32 tensor [1], into which the schedule is written.
    """
    params = [p for group in groups for p in group]
    targets = None if targets is None else list(targets)
    chosen = sgd_class(config.sgd, params[0].device)
    if targets is None and chosen is SGDEMA:
        chosen = SGDThenEMA
    options = {"momentum": config.momentum, "weight_decay": config.weight_decay, "nesterov": config.nesterov}
    if chosen is SGDThenEMA:
        options["fused"] = params[0].is_cuda or None
    if copies:
        options["param_shadows"] = [copies.get(p) for p in params]
        options["target_shadows"] = None if targets is None else [copies.get(p) for p in targets]
    rates = [torch.full((1,), config.lr, device=params[0].device) if lr_on_device else config.lr for _ in groups]
    named = [{"params": group, "lr": lr} for group, lr in zip(groups, rates, strict=True)]
    return chosen(named, targets, lr=config.lr, ema_momentum=ema_momentum, **options)


def learning_rate(config: OptimConfig, epoch: int, step: int, steps_per_epoch: int) -> float:
    """The learning rate of this step (0-based). Constant within an epoch, as in the official code, after warm-up.

    warmup-cosine: also during warm-up, as in CAPro's official code.
    """
    lr = config.lr * (config.batch_size / 256 if config.scale_lr else 1.0)
    if config.schedule == "warmup-cosine":
        first = config.warmup_epochs
        if first > 0 and epoch <= first:
            return lr * max(epoch, 1) / first
        return lr * 0.5 * (1.0 + math.cos(math.pi * (epoch - first) / (config.epochs - first)))
    warmup = config.warmup_epochs * steps_per_epoch
    done = epoch * steps_per_epoch + step
    if done < warmup:
        return lr * (done + 1) / warmup
    if config.schedule == "cosine":
        return lr * 0.5 * (1.0 + math.cos(math.pi * epoch / config.epochs))
    return lr * config.decay ** sum(epoch >= milestone for milestone in config.milestones)
