"""The functions that the benchmarks run and compare: ours and its peers, for every op.

A factory takes a state (the tensors of one shape) and gives back the call that is timed; the call returns what is
compared with float64. In-place ops run on the same state again and again: averages converge, prototypes are
normalised, SGD's steps are small, so numbers stay finite. Momenta are far from 1, so that a missing term or a wrong
order shows in the comparison; the time does not depend on them.
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import apex_peers
import torch
import torch.nn.functional as F
from torch import Tensor

from mopro_fast import ops
from mopro_fast.benchmark import official

Call = Callable[[], dict[str, Tensor | list[Tensor]]]
Factory = Callable[[SimpleNamespace], Call]
Factories = dict[str, Factory | str]  # a string says why there is none

T, ALPHA, W_PROTO, W_INST = 0.1, 0.5, 1.0, 1.0
PROTO_MOMENTUM, EMA_MOMENTUM = 0.9, 0.9
SGD = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4}


def info_nce(function: Callable, s: SimpleNamespace) -> Call:
    q = s.q.requires_grad_()

    def call():
        loss, hit = function(q, s.k, s.queue, T)
        (grad,) = torch.autograd.grad(loss, q, s.weight)
        return {"loss": loss, "grad_q": grad, "hit": hit}

    return call


def correct_labels(function: Callable, s: SimpleNamespace) -> Call:
    def call():
        labels, kept = function(
            s.logits, s.q, s.bank, s.labels, alpha=ALPHA, threshold=s.threshold, temperature=T
        )  # fmt: skip
        return {"labels": labels, "kept": kept}

    return call


def prototype_contrast(function: Callable, s: SimpleNamespace) -> Call:
    """Ours gives a loss per row, the official formulation its mean over the kept rows."""
    q = s.q.requires_grad_()

    def call():
        loss = function(q, s.bank, s.labels, s.kept, T)
        (grad,) = torch.autograd.grad(loss, q, s.kept_weight if loss.dim() else None)
        return {"loss": loss, "grad_q": grad}

    return call


def prototype_update_(function: Callable, s: SimpleNamespace) -> Call:
    rows, labels, kept = (torch.cat(x) for x in ((s.q, s.more), (s.labels, s.more_labels), (s.kept, s.more_kept)))

    def call():
        function(s.prototypes, rows, labels, kept, PROTO_MOMENTUM)
        return {"prototypes": s.prototypes}

    return call


def queue_enqueue_(function: Callable, s: SimpleNamespace) -> Call:
    keys = torch.cat([s.k, s.more_keys])

    def call():
        function(s.queue, s.cursor, keys)
        return {"queue": s.queue, "cursor": s.cursor}

    return call


def collective_targets(function: Callable, s: SimpleNamespace) -> Call:
    """With 16-bit products where the inputs are of 16 bits."""

    def call():
        return {"targets": function(s.q, s.queue, s.aux_weight, s.bank, alpha=ALPHA, temperature=T)}

    return call


def _collective_targets(z: Tensor, *others: Tensor, **settings: float) -> Tensor:
    return ops.collective_targets(z, *others, **settings, dtype=z.dtype if z.element_size() == 2 else None)


def soft_neighbour_labels(function: Callable, s: SimpleNamespace) -> Call:
    """Keys with one label each."""
    classes = torch.arange(len(s.queue), device=s.queue.device) % len(s.bank)
    values = torch.eye(len(s.bank), dtype=s.queue.dtype, device=s.queue.device)[classes]

    def call():
        return {"labels": function(s.q, s.queue, values, temperature=T)}

    return call


def batch_norm_act(function: Callable, s: SimpleNamespace, layout: torch.memory_format = torch.channels_last) -> Call:
    """Forward and backward: gradients of x, weight, bias and residual."""
    x, residual, dy = (t.contiguous(memory_format=layout) for t in (s.x, s.residual, s.dy))
    inputs = [t.requires_grad_() for t in (x, s.weight, s.bias, residual)]

    def call():
        y = function(x, s.weight, s.bias, s.running_mean, s.running_var, residual)
        grads = torch.autograd.grad(y, inputs, dy)
        names = ("grad_x", "grad_weight", "grad_bias", "grad_residual")
        return {"y": y, **dict(zip(names, grads, strict=True)), **{n: getattr(s, n) for n in RUNNING}}

    return call


def batch_norm_relu_pool(
    function: Callable, s: SimpleNamespace, layout: torch.memory_format = torch.channels_last
) -> Call:
    """Forward and backward: gradients of x, weight and bias."""
    x, dy = (t.contiguous(memory_format=layout) for t in (s.x, s.dy))
    inputs = [t.requires_grad_() for t in (x, s.weight, s.bias)]

    def call():
        y = function(x, s.weight, s.bias, s.running_mean, s.running_var)
        grads = torch.autograd.grad(y, inputs, dy)
        named = dict(zip(("grad_x", "grad_weight", "grad_bias"), grads, strict=True))
        return {"y": y, **named, **{n: getattr(s, n) for n in RUNNING}}

    return call


def pooling_behind_our_op(*args: Tensor) -> Tensor:
    """What batch_norm_relu_pool saves."""
    return F.max_pool2d(ops.batch_norm_act(*args), 3, 2, 1)


def conv1x1_stats_(function: Callable, s: SimpleNamespace, layout: torch.memory_format = torch.channels_last) -> Call:
    x = s.x.contiguous(memory_format=layout)

    def call():
        with torch.no_grad():
            y, mean, rstd = function(x, s.weight, s.running_mean, s.running_var, s.norm)
        return {"y": y, "mean": mean, "rstd": rstd, **{n: getattr(s, n) for n in RUNNING}}

    return call


def conv2d_between_ops(x: Tensor, weight: Tensor, running_mean: Tensor, running_var: Tensor, norm: tuple[Tensor, ...]):
    """PyTorch's convolution between our normalising pass and our statistics: what conv1x1_stats_ saves."""
    y = F.conv2d(torch.ops.mopro_fast.batch_norm_act(x, *norm, None, True)[0], weight.to(x.dtype))
    return y, *torch.ops.mopro_fast.batch_norm_stats_(y, running_mean, running_var, 0.1, 1e-5, 0)


RUNNING = ("running_mean", "running_var")


def apex_batch_norm_act(s: SimpleNamespace) -> Call:
    """In float16, the only type that it takes; as many bytes as bfloat16."""
    norm = apex_peers.batch_norm_act(s.weight, s.bias, s.running_mean, s.running_var, 0.1, 1e-5, relu=True)
    half = {n: getattr(s, n).half() for n in ("x", "residual", "dy")} | {"weight": norm.weight, "bias": norm.bias}
    return batch_norm_act(lambda x, *rest: norm(x, rest[-1]), SimpleNamespace(**vars(s) | half))


def mopro_loss(function: Callable, s: SimpleNamespace) -> Call:
    """Forward and backward: gradients of logits and q."""
    labels = torch.where(s.kept, s.labels, -1)
    logits, q = s.logits.requires_grad_(), s.q.requires_grad_()

    def call():
        out = function(logits, q, s.k, s.queue, s.bank, labels, temperature=T, w_proto=W_PROTO, w_inst=W_INST)
        return _loss_and_gradients(out.loss, logits, q)

    return call


def _loss_and_gradients(loss: Tensor, logits: Tensor, q: Tensor) -> dict[str, Tensor]:
    grad_logits, grad_q = torch.autograd.grad(loss, (logits, q))
    return {"loss": loss, "grad_logits": grad_logits, "grad_q": grad_q}


def head(loss: Callable, enqueue: Callable, update: Callable, s: SimpleNamespace) -> Call:
    """Steps 3 to 8 of the method, forward and backward; concatenating the other ranks' rows stands for gathering.

    The prototypes are the float32 masters.
    """
    logits, q, gathers = s.logits.requires_grad_(), s.q.requires_grad_(), len(s.more) > 0

    def gathered(x: Tensor, more: Tensor) -> Tensor:
        return torch.cat([x, more]) if gathers else x

    def call():
        out = loss(
            logits, q, s.k, s.queue, s.prototypes, s.labels,
            temperature=T, alpha=ALPHA, threshold=s.threshold, w_proto=W_PROTO, w_inst=W_INST,
        )  # fmt: skip
        found = _loss_and_gradients(out.loss, logits, q) | {"labels": out.labels, "kept": out.kept}
        keys, rows = gathered(s.k, s.more_keys), gathered(q.detach(), s.more)
        if s.queue_master is None:
            enqueue(s.queue, s.cursor, keys)
        else:
            enqueue(s.queue_master, s.cursor, keys, s.queue)
        labels, kept = gathered(out.labels, s.more_labels), gathered(out.kept, s.more_kept)
        update(s.prototypes, rows, labels, kept, PROTO_MOMENTUM)
        queues = {"queue": s.queue} | ({} if s.queue_master is None else {"queue_master": s.queue_master})
        return found | queues | {"cursor": s.cursor, "prototypes": s.prototypes}

    return call


def _ours_loss(
    logits: Tensor, q: Tensor, k: Tensor, queue: Tensor, prototypes: Tensor, labels: Tensor, *,
    temperature: float, alpha: float, threshold: float, w_proto: float, w_inst: float,
) -> SimpleNamespace:  # fmt: skip
    """As MoPro.forward has it."""
    new, kept = ops.correct_labels(
        logits, q, prototypes, labels, alpha=alpha, threshold=threshold, temperature=temperature
    )
    loss, _ = ops.mopro_loss(
        logits, q, k, queue, prototypes, new, kept, temperature=temperature, w_proto=w_proto, w_inst=w_inst
    )
    return SimpleNamespace(loss=loss, labels=new, kept=kept)


def ema_update_(function: Callable, s: SimpleNamespace) -> Call:
    def call():
        function(s.targets, s.params, EMA_MOMENTUM, s.target_shadows)
        return {"targets": s.targets} | ({"target_shadows": s.target_shadows} if s.target_shadows else {})

    return call


def foreach_ema(targets: list[Tensor], sources: list[Tensor], momentum: float, shadows: list[Tensor] | None) -> None:
    torch._foreach_mul_(targets, momentum)
    torch._foreach_add_(targets, sources, alpha=1 - momentum)
    if shadows:
        torch._foreach_copy_(shadows, targets)


def sgd_ema_update_(s: SimpleNamespace) -> Call:
    settings = SGD | {"lr": torch.full((1,), SGD["lr"], device=s.params[0].device)}

    def call():
        ops.sgd_ema_update_(
            s.params, s.grads, s.buffers, s.targets, **settings, nesterov=False, ema_momentum=EMA_MOMENTUM,
            param_shadows=s.param_shadows, target_shadows=s.target_shadows,
        )  # fmt: skip
        return _sgd_outputs(s)

    return call


def torch_sgd(s: SimpleNamespace, ema: Callable, **kind: bool) -> Call:
    """torch.optim.SGD, then `ema`, then the 16-bit copies of the parameters."""
    parameters = [torch.nn.Parameter(p) for p in s.params]  # the same storage
    optimizer = torch.optim.SGD(parameters, **SGD, **kind)
    for p, grad, buffer in zip(parameters, s.grads, s.buffers, strict=True):
        p.grad = grad
        optimizer.state[p]["momentum_buffer"] = buffer

    @torch.no_grad()
    def call():
        optimizer.step()
        ema(s.targets, s.params, EMA_MOMENTUM, s.target_shadows)
        if s.param_shadows:
            torch._foreach_copy_(s.param_shadows, s.params)
        return _sgd_outputs(s)

    return call


def _sgd_outputs(s: SimpleNamespace) -> dict[str, list[Tensor]]:
    names = ["params", "buffers", "targets"] + (["param_shadows", "target_shadows"] if s.param_shadows else [])
    return {name: getattr(s, name) for name in names}


def apex_ema(targets: list[Tensor], sources: list[Tensor], momentum: float, shadows: list[Tensor] | None) -> None:
    import amp_C

    overflow = _overflow(targets[0].device)
    amp_C.multi_tensor_axpby(65536, overflow, [targets, sources, targets], momentum, 1 - momentum, -1)
    if shadows:
        torch._foreach_copy_(shadows, targets)


def apex_sgd(s: SimpleNamespace) -> Call:
    import amp_C

    def call():
        amp_C.multi_tensor_sgd(
            65536, _overflow(s.params[0].device), [s.grads, s.params, s.buffers],
            SGD["weight_decay"], SGD["momentum"], 0.0, SGD["lr"], False, False, False, 1.0,
        )  # fmt: skip
        apex_ema(s.targets, s.params, EMA_MOMENTUM, s.target_shadows)
        if s.param_shadows:
            torch._foreach_copy_(s.param_shadows, s.params)
        return _sgd_outputs(s)

    return call


def normalize(function: Callable, s: SimpleNamespace) -> Call:
    """As the step calls it: nothing is mirrored."""

    def call():
        return {"pixels": function(s)}

    return call


def _official_normalize(s: SimpleNamespace) -> Tensor:
    out = official.normalize(s.views, s.mean, s.std)
    return out if out.dtype == torch.float64 else out.to(s.dtype)


def two_views(function: Callable, s: SimpleNamespace) -> Call:
    def call():
        return {"views": function(s.pixels, s.images, s.boxes, s.flips, s.gray, s.factors, s.order, s.size)}

    return call


@functools.cache
def _overflow(device: torch.device) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)


def _apex(factory: Factory) -> Factory | str:
    found = importlib.util.find_spec("amp_C") is not None  # PyPI's other package of the name apex has none
    return factory if found else "NVIDIA's apex (amp_C) is not installed"


def compiled(function: Callable) -> Callable:
    torch._dynamo.reset()  # else the ninth shape of a function would silently run eagerly
    return torch.compile(function, dynamic=False)


UNROLLED = "the loop over rows would be unrolled: its compile time grows with the rows"


@dataclass(frozen=True)
class Op:
    """ours: what is measured; official, compiled and others: its peers.

    uncapturable: why the official formulation is not put into a CUDA graph, beyond its waiting for the device.
    """

    ours: Factory
    official: Factory
    compiled: Factory | str
    others: Factories = field(default_factory=dict)
    uncapturable: str = ""


def _plain(run: Callable[[Callable, SimpleNamespace], Call], name: str) -> Op:
    return Op(
        ours=lambda s: run(getattr(ops, name), s),
        official=lambda s: run(getattr(official, name), s),
        compiled=lambda s: run(compiled(getattr(official, name)), s),
    )


REBINDS = "it gives every tensor new storage, which a replay cannot follow"
OPS = {
    "ema_update_": replace(
        _plain(ema_update_, "ema_update_"),
        compiled="it gives every tensor new storage; the compiled foreach form stands for it",
        others={
            "foreach": lambda s: ema_update_(foreach_ema, s),
            "foreach, compiled": lambda s: ema_update_(compiled(foreach_ema), s),
            "apex": _apex(lambda s: ema_update_(apex_ema, s)),
        },
        uncapturable=REBINDS,
    ),
    "sgd_ema_update_": Op(
        ours=sgd_ema_update_,
        official=lambda s: torch_sgd(s, official.ema_update_, foreach=False),
        compiled="the optimizer's loop over 165 tensors would be unrolled; SGD(fused) stands for it",
        others={
            "SGD(foreach) + foreach": lambda s: torch_sgd(s, foreach_ema, foreach=True),
            "SGD(fused) + foreach": lambda s: torch_sgd(s, foreach_ema, fused=True),
            "apex": _apex(apex_sgd),
        },
        uncapturable=REBINDS,
    ),
    "queue_enqueue_": _plain(queue_enqueue_, "queue_enqueue_"),
    "info_nce": _plain(info_nce, "info_nce"),
    "correct_labels": _plain(correct_labels, "correct_labels"),
    "prototype_contrast": _plain(prototype_contrast, "prototype_contrast"),
    "prototype_update_": replace(_plain(prototype_update_, "prototype_update_"), compiled=UNROLLED),
    "collective_targets": replace(
        _plain(collective_targets, "collective_targets"), ours=lambda s: collective_targets(_collective_targets, s)
    ),
    "soft_neighbour_labels": _plain(soft_neighbour_labels, "soft_neighbour_labels"),
    "batch_norm_act": Op(
        ours=lambda s: batch_norm_act(ops.batch_norm_act, s),
        official=lambda s: batch_norm_act(official.batch_norm_act, s, torch.contiguous_format),
        compiled=lambda s: batch_norm_act(compiled(official.batch_norm_act), s),  # in channels_last
        others={
            "official, channels_last": lambda s: batch_norm_act(official.batch_norm_act, s),
            "apex, float16": apex_peers.missing() or apex_batch_norm_act,
        },
    ),
    "batch_norm_relu_pool": Op(
        ours=lambda s: batch_norm_relu_pool(ops.batch_norm_relu_pool, s),
        official=lambda s: batch_norm_relu_pool(official.batch_norm_relu_pool, s, torch.contiguous_format),
        compiled=lambda s: batch_norm_relu_pool(compiled(official.batch_norm_relu_pool), s),  # in channels_last
        others={
            "official, channels_last": lambda s: batch_norm_relu_pool(official.batch_norm_relu_pool, s),
            "pooling behind our op": lambda s: batch_norm_relu_pool(pooling_behind_our_op, s),
        },
    ),
    "conv1x1_stats_": Op(
        ours=lambda s: conv1x1_stats_(ops.conv1x1_stats_, s),
        official=lambda s: conv1x1_stats_(official.conv1x1_stats_, s, torch.contiguous_format),
        compiled=lambda s: conv1x1_stats_(compiled(official.conv1x1_stats_), s),  # in channels_last
        others={
            "official, channels_last": lambda s: conv1x1_stats_(official.conv1x1_stats_, s),
            "conv2d between our ops": lambda s: conv1x1_stats_(conv2d_between_ops, s),
        },
    ),
    "mopro_loss": _plain(mopro_loss, "mopro_loss"),
    "normalize": Op(
        ours=lambda s: normalize(lambda s: ops.normalize(s.views, dtype=s.dtype), s),
        official=lambda s: normalize(_official_normalize, s),
        compiled=lambda s: normalize(compiled(_official_normalize), s),
    ),
    "two_views": replace(_plain(two_views, "two_views"), compiled="the loop over images would be unrolled"),
    "head": Op(
        ours=lambda s: head(_ours_loss, ops.queue_enqueue_, ops.prototype_update_, s),
        official=lambda s: head(official.corrected_loss, official.queue_enqueue_, official.prototype_update_, s),
        compiled=lambda s: head(
            compiled(official.corrected_loss), official.queue_enqueue_, official.prototype_update_, s
        ),
    ),
}
