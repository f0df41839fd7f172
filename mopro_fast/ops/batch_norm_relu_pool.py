"""BatchNorm in training, ReLU and 3×3 max-pooling of stride 2: what a ResNet does behind its first convolution."""

import functools

import torch
from torch import Tensor

from mopro_fast.ops import backends, checks
from mopro_fast.ops.batch_norm_act import Forked, check_statistics, parameter_type


def _pooled(x: Tensor, **kind) -> Tensor:
    n, channels, height, width = x.shape
    return x.new_empty(n, (height + 1) // 2, (width + 1) // 2, channels, **kind).permute(0, 3, 1, 2)


def _fake(x, mean, rstd, weight, bias, keep, one_launch=False):
    kept = (_pooled(x), _pooled(x, dtype=torch.uint8)) if keep else (x.new_empty(0), x.new_empty(0, dtype=torch.uint8))
    return _pooled(x), *kept


def _setup(ctx, inputs, output) -> None:
    x, mean, rstd, weight, bias, keep, ctx.one_launch = inputs
    _, x_max, indices = output
    ctx.mark_non_differentiable(x_max, indices)
    ctx.set_materialize_grads(False)  # else zeros are made for the outputs that have none
    if keep:
        ctx.save_for_backward(x, x_max, indices, mean, rstd, weight, bias)


def _back_forked(one_launch: bool, dy: Tensor, dy2: Tensor | None, *kept: Tensor):
    dx, dweight, dbias = torch.ops.mopro_fast.batch_norm_relu_pool_backward(dy, dy2, *kept, one_launch)
    return dx, None, None, dweight, dbias


def _backward(ctx, dy: Tensor | None, *_):
    if dy is None:
        return (None,) * 7
    if not ctx.saved_tensors:
        raise RuntimeError("batch_norm_relu_pool has no gradient where it was called with keep=False")
    return *_back_forked(ctx.one_launch, dy, None, *ctx.saved_tensors), None, None


def _run_forked(x, mean, rstd, weight, bias):
    y, *kept = torch.ops.mopro_fast.batch_norm_relu_pool(x, mean, rstd, weight, bias, True)
    return y, (x, *kept, mean, rstd, weight, bias)


# mean and rstd are functions of x, as in batch_norm_act. keep: what the backward pass wants beside x.
backends.define(
    "batch_norm_relu_pool(Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, bool keep, "
    "bool one_launch=False) -> (Tensor, Tensor, Tensor)",
    _fake,
    _backward,
    _setup,
)
backends.define(
    "batch_norm_relu_pool_backward(Tensor dy, Tensor? dy2, Tensor x, Tensor x_max, Tensor indices, Tensor mean, "
    "Tensor rstd, Tensor weight, Tensor bias, bool one_launch=False) -> (Tensor, Tensor, Tensor)",
    lambda dy, dy2, x, x_max, indices, mean, rstd, weight, bias, one_launch=False: (
        torch.empty_like(x, memory_format=torch.channels_last), torch.empty_like(weight), torch.empty_like(bias)
    ),
)  # fmt: skip


def batch_norm_relu_pool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    group: int = 0,
    momentum: float = 0.1,
    eps: float = 1e-5,
    fork: bool = False,
    one_launch: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``max_pool2d(relu(batch_norm(x)), 3, 2, 1)`` in training; arguments as of :func:`batch_norm_act`.

    x:            [N, C, H, W], at least two values per channel and group; gets a gradient.
    weight, bias: float32 [C]; get a gradient.
    running_mean, running_var: float32 [C], changed in place.
    fork:         return the output twice, for two readers: the backward pass adds their gradients as it reads them.
    one_launch:   as of :func:`batch_norm_act`.

    Returns [N, C, ⌈H/2⌉, ⌈W/2⌉] in x's type with channels_last strides, the bits of :func:`batch_norm_act` and
    max_pool2d. A window's gradient goes to the first position of its largest (with a negative weight smallest) x: where
    only rounding makes values equal, to the larger one. Without a gradient to come, nothing is kept for it.
    Gradients are of first order. Raises ValueError for a wrong argument.
    """
    device = checks.device_of("x", x)
    checks.tensor("x", x, ("N", "C", "H", "W"), checks.FLOATS, device)
    checks.tensor("weight", weight, (x.shape[1],), (parameter_type(x),), device)
    checks.tensor("bias", bias, (x.shape[1],), (parameter_type(x),), device)
    check_statistics(x, x.shape[1], running_mean, running_var, group, momentum, eps)
    with torch.no_grad():
        mean, rstd = torch.ops.mopro_fast.batch_norm_stats_(
            x, running_mean, running_var, momentum, eps, group, one_launch
        )
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias))
    if fork and keep:
        return Forked.apply(_run_forked, functools.partial(_back_forked, one_launch), x, mean, rstd, weight, bias)
    y, _, _ = torch.ops.mopro_fast.batch_norm_relu_pool(x, mean, rstd, weight, bias, keep, one_launch)
    return (y, y) if fork else y
