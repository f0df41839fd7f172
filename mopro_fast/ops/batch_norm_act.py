"""BatchNorm in training, the residual and the ReLU behind it: what an encoder does between two convolutions."""

import functools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mopro_fast.ops import backends, checks


def parameter_type(x: Tensor) -> torch.dtype:
    """Of statistics and parameters."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_statistics(
    x: Tensor, channels: int, running_mean: Tensor, running_var: Tensor, group: int, momentum: float, eps: float
) -> None:
    """Refuse what no statistics per group of x's rows can be taken with; channels: of the running statistics."""
    checks.tensor("running_mean", running_mean, (channels,), (parameter_type(x),), x.device)
    checks.tensor("running_var", running_var, (channels,), (parameter_type(x),), x.device)
    checks.unit_interval("momentum", momentum)
    checks.positive("eps", eps)
    n, _, height, width = x.shape
    if isinstance(group, bool) or not isinstance(group, int | torch.SymInt) or group < 0:
        raise ValueError(f"group must be a whole number of at least 0, got {group}")
    if group and n % group:
        raise ValueError(f"group must divide the {n} rows of x, got {group}")
    if n and (group or n) * height * width == 1:
        raise ValueError(f"x must have at least two values per channel and group, got shape {list(x.shape)}")


def _stats_fake(x, running_mean, running_var, momentum, eps, group, one_launch=False):
    groups = len(x) // group if group else 1
    return tuple(x.new_empty(groups, x.shape[1], dtype=parameter_type(x)) for _ in range(2))


def _channels_last(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def signs_shape(x: Tensor) -> tuple[int, int, int, int]:
    """Of the bytes with a bit per value of x, whose channels 8 divides."""
    n, channels, height, width = x.shape
    return n, height, width, channels // 8


def _fake(x, mean, rstd, weight, bias, residual, relu, signs=False, one_launch=False):
    return _channels_last(x), x.new_empty(signs_shape(x) if signs else 0, dtype=torch.uint8)


def _backward_fake(dy, dy2, x, y, mean, rstd, weight, bias, relu, one_launch=False):
    dresidual = x.new_empty(0) if y is None else _channels_last(x)
    return _channels_last(x), torch.empty_like(weight), torch.empty_like(bias), dresidual


def _setup(ctx, inputs, output) -> None:
    x, mean, rstd, weight, bias, residual, ctx.relu, _, ctx.one_launch = inputs
    ctx.with_residual = residual is not None
    ctx.set_materialize_grads(False)  # signs have none
    y = output[0] if ctx.relu and ctx.with_residual else None  # else x alone tells where y is above 0
    ctx.save_for_backward(x, y, mean, rstd, weight, bias)


def _backward(ctx, dy: Tensor | None, _):
    if dy is None:
        return (None,) * 9
    x, y, mean, rstd, weight, bias = ctx.saved_tensors
    dx, dweight, dbias, dresidual = torch.ops.mopro_fast.batch_norm_act_backward(
        dy, None, x, y, mean, rstd, weight, bias, ctx.relu, ctx.one_launch
    )
    if ctx.with_residual and y is None:
        dresidual = dy
    return dx, None, None, dweight, dbias, dresidual if ctx.with_residual else None, None, None, None


class Forked(torch.autograd.Function):
    """An output that is handed on twice; the op of its backward pass adds the two gradients as it reads them."""

    @staticmethod
    def forward(ctx, run, back, *inputs) -> tuple[Tensor, Tensor]:
        """run(*inputs) -> output, what is kept; back(dy, dy2 or None, *kept) -> the gradients of inputs."""
        y, kept = run(*inputs)
        ctx.back, ctx.inputs = back, len(inputs)
        ctx.save_for_backward(*kept)
        ctx.set_materialize_grads(False)
        return y, y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor | None, dy2: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            dy, dy2 = dy2, None
        grads = [None] * ctx.inputs if dy is None else ctx.back(dy, dy2, *ctx.saved_tensors)
        return None, None, *grads


def _run_forked(x, mean, rstd, weight, bias, residual, signs: bool):
    y, bits = torch.ops.mopro_fast.batch_norm_act(x, mean, rstd, weight, bias, residual, True, signs)
    return y, (x, bits if signs else y, mean, rstd, weight, bias)


def _back_forked(one_launch: bool, dy: Tensor, dy2: Tensor | None, *kept: Tensor):
    dx, dweight, dbias, dresidual = torch.ops.mopro_fast.batch_norm_act_backward(dy, dy2, *kept, True, one_launch)
    return dx, None, None, dweight, dbias, dresidual, None


backends.define(
    "batch_norm_stats_(Tensor x, Tensor(a!) running_mean, Tensor(b!) running_var, float momentum, float eps, "
    "int group, bool one_launch=False) -> (Tensor, Tensor)",
    _stats_fake,
)
# mean and rstd are functions of x: x's gradient has their part, and they have none.
backends.define(
    "batch_norm_act(Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, Tensor? residual, bool relu, "
    "bool signs=False, bool one_launch=False) -> (Tensor, Tensor)",
    _fake,
    _backward,
    _setup,
)
backends.define(
    "batch_norm_act_backward(Tensor dy, Tensor? dy2, Tensor x, Tensor? y, Tensor mean, Tensor rstd, Tensor weight, "
    "Tensor bias, bool relu, bool one_launch=False) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
)


def batch_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    residual: Tensor | None = None,
    *,
    relu: bool = True,
    group: int = 0,
    momentum: float = 0.1,
    eps: float = 1e-5,
    fork: bool = False,
    signs: bool = False,
    one_launch: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``relu(batch_norm(x) + residual)`` in training; each group of rows has the statistics of its own rows.

    x:            [N, C, H, W], at least two values per channel and group; gets a gradient.
    weight, bias: float32 [C]; get a gradient.
    running_mean, running_var: float32 [C], changed in place: one step of ``momentum`` towards the mean over the
                  groups of their means and unbiased variances.
    residual:     as x, or None; gets a gradient.
    relu:         whether to end with a ReLU.
    group:        consecutive rows that share statistics; 0: all N. N must be a multiple of it.
    momentum:     in [0, 1].
    eps:          above 0, added to the (biased) variance.
    fork:         return the output twice, for two readers: the backward pass adds their gradients as it reads them.
                  Needs a residual and the ReLU.
    signs:        with fork: keep a bit per value for the backward pass, which then does not read the output. Without
                  effect unless 8 divides C.
    one_launch:   let the last program of a launch combine what all of them have summed up, not a launch of its own.

    Returns [N, C, H, W] in x's type with channels_last strides; other inputs are brought to these strides first.
    Statistics are float32, as sums of squared distances from means, so that nothing cancels; float64 inputs with
    float64 parameters stay float64. An empty batch leaves the running statistics alone. Gradients are of first order.
    Raises ValueError for a wrong argument.
    """
    device = checks.device_of("x", x)
    checks.tensor("x", x, ("N", "C", "H", "W"), checks.FLOATS, device)
    checks.tensor("weight", weight, (x.shape[1],), (parameter_type(x),), device)
    checks.tensor("bias", bias, (x.shape[1],), (parameter_type(x),), device)
    if residual is not None:
        checks.tensor("residual", residual, tuple(x.shape), (x.dtype,), device)
    check_statistics(x, x.shape[1], running_mean, running_var, group, momentum, eps)
    if fork and (residual is None or not relu):
        raise ValueError("fork needs a residual and relu=True")
    with torch.no_grad():
        mean, rstd = torch.ops.mopro_fast.batch_norm_stats_(
            x, running_mean, running_var, momentum, eps, group, one_launch
        )
    if fork and torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias, residual)):
        back = functools.partial(_back_forked, one_launch)
        return Forked.apply(_run_forked, back, x, mean, rstd, weight, bias, residual, signs and x.shape[1] % 8 == 0)
    y, _ = torch.ops.mopro_fast.batch_norm_act(x, mean, rstd, weight, bias, residual, relu, False, one_launch)
    return (y, y) if fork else y
