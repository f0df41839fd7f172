"""NVIDIA's apex as a peer of fused BatchNorm: its NHWC BatchNorm with addition and ReLU, apex.contrib.groupbn.

It takes float16 and nothing else, whole batches and no groups of rows (its bn_group counts GPUs that share statistics),
and adds only where a ReLU follows. Its bytes are those of bfloat16, so its time stands beside bfloat16's.
"""

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from mopro_fast import installed
from mopro_fast.errors import UserError


def missing() -> str | None:
    """Why there is no such peer here, if so."""
    try:
        installed.require_apex("groupbn")
    except UserError as error:
        return str(error)
    return None if importlib.util.find_spec("bnp") else "groupbn: NVIDIA's apex was built without --bnp"


def batch_norm_act(
    weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float, relu: bool
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """-> f(x, residual) in training mode; float32 [C] on the GPU are taken as they are and updated.

    x, residual and the result: float16 [N, C, H, W], channels-last; a residual needs ``relu``.
    """
    from apex.contrib.groupbn import BatchNorm2d_NHWC

    norm = BatchNorm2d_NHWC(len(weight), fuse_relu=relu).to(weight.device)
    norm.weight, norm.bias = (torch.nn.Parameter(x, x.requires_grad) for x in (weight, bias))
    norm.running_mean, norm.running_var = running_mean, running_var
    norm.momentum, norm.eps = momentum, eps

    def call(x: Tensor, residual: Tensor | None = None) -> Tensor:
        rows = [None if t is None else t.permute(0, 2, 3, 1) for t in (x, residual)]  # [N, H, W, C], contiguous
        return norm(*rows).permute(0, 3, 1, 2)

    call.weight, call.bias = norm.weight, norm.bias  # where their gradients arrive
    return call
