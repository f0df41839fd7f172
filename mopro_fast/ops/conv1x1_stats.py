"""A 1×1 convolution between two BatchNorms, for an encoder that needs no gradient."""

import torch
from torch import Tensor

from mopro_fast.ops import backends, checks
from mopro_fast.ops.batch_norm_act import check_statistics, parameter_type


def _fake(x: Tensor, weight: Tensor, running_mean: Tensor, running_var: Tensor, norm, momentum, eps, group: int):
    n, _, height, width = x.shape
    groups = n // group if group else 1
    y = x.new_empty(n, height, width, len(weight)).permute(0, 3, 1, 2)
    return y, *(x.new_empty(groups, len(weight), dtype=parameter_type(x)) for _ in range(2))


backends.define(
    "conv1x1_stats_(Tensor x, Tensor weight, Tensor(a!) running_mean, Tensor(b!) running_var, Tensor[] norm, "
    "float momentum, float eps, int group) -> (Tensor, Tensor, Tensor)",
    _fake,
)


def conv1x1_stats_(
    x: Tensor,
    weight: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    norm: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    *,
    group: int = 0,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """A 1×1 convolution with the training statistics of the BatchNorm behind it, and the one before it on the way in.

    x:      [N, Cin, H, W], at least two values per channel and group.
    weight: [Cout, Cin, 1, 1], rounded to x's type.
    running_mean, running_var: float32 [Cout] of the BatchNorm behind, changed in place as in :func:`batch_norm_act`.
    norm:   mean, rstd (float32 [groups, Cin]), weight and bias (float32 [Cin]) of a BatchNorm before: the input of the
            convolution is relu((x − mean)·rstd·weight + bias), rounded to x's type. None: it is x.
    group, momentum, eps: as in :func:`batch_norm_act`.

    Returns y [N, Cout, H, W] in x's type with channels_last strides, and mean and 1/√(var + eps) of y as stored,
    float32 [groups, Cout]. Has no gradient: refused where one is wanted. Raises ValueError for a wrong argument.
    """
    device = checks.device_of("x", x)
    checks.tensor("x", x, ("N", "Cin", "H", "W"), checks.FLOATS, device)
    n, in_channels = x.shape[:2]
    checks.tensor("weight", weight, ("Cout", in_channels, 1, 1), checks.FLOATS, device)
    check_statistics(x, len(weight), running_mean, running_var, group, momentum, eps)
    if norm is not None:
        groups, wide = n // group if group else 1, (parameter_type(x),)
        for name, value in zip(("mean", "rstd", "weight", "bias"), norm, strict=True):
            shape = (groups, in_channels) if name in ("mean", "rstd") else (in_channels,)
            checks.tensor(f"norm's {name}", value, shape, wide, device)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, *(norm or ()))):
        raise ValueError("x, weight and norm get no gradient here: call conv1x1_stats_ under torch.no_grad()")
    return torch.ops.mopro_fast.conv1x1_stats_(
        x, weight, running_mean, running_var, list(norm or ()), momentum, eps, group
    )
