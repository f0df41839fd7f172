"""A bottleneck of the encoder that needs no gradient, with less of its activations moved through memory."""

import torch
from torch import Tensor, nn

from mopro_fast import ops


def bottleneck(block: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    """``block((x, residual))`` of a ``Bottleneck`` in training, without a gradient.

    The 1×1 convolutions take the statistics of their outputs themselves, and the third normalises its input, so bn2's
    output is never written: 27·C values move per position where all else is fused, not 34·C, C being conv2's channels.
    """
    if block.downsample is not None:
        residual = block.downsample(residual)
    y, norm = _conv1x1(block.conv1, block.bn1, x, None)
    y = block.conv2(torch.ops.mopro_fast.batch_norm_act(y, *norm, None, True)[0])
    y, norm = _conv1x1(block.conv3, block.bn3, y, _norm(block.bn2, y))
    return torch.ops.mopro_fast.batch_norm_act(y, *norm, residual, True)[0]


def _conv1x1(conv: nn.Conv2d, bn: nn.BatchNorm2d, x: Tensor, norm: tuple | None) -> tuple[Tensor, tuple]:
    """-> the convolution's output and how bn will normalise it"""
    y, mean, rstd = ops.conv1x1_stats_(
        x, conv.weight, bn.running_mean, bn.running_var, norm, group=bn.group, momentum=bn.momentum, eps=bn.eps
    )
    return y, (mean, rstd, bn.weight, bn.bias)


def _norm(bn: nn.BatchNorm2d, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    statistics = bn.running_mean, bn.running_var, bn.momentum, bn.eps, bn.group, bn.one_launch
    return (*torch.ops.mopro_fast.batch_norm_stats_(y, *statistics), bn.weight, bn.bias)
