"""ResNet encoders with a classifier and a projection head, under the official MoPro parameter names.

He et al., "Deep residual learning for image recognition" (2016); heads as in MoPro section 3.1: classifier and
projection (features → 2048, ReLU → embedding) both sit on the pooled feature.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mopro_fast import ops
from mopro_fast.models import forward_only

Fork = Literal["off", "on", "signs"]
"""How a block hands its output on: once, twice, or twice with the signs kept (``ops.batch_norm_act``)."""
Pair = Tensor | tuple[Tensor, Tensor]
"""What a block reads: one activation, or it twice, for its convolution and for its residual."""


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm, then the residual and the ReLU behind it, in training with the statistics of groups of ``group`` rows.

    One device with 256 rows in groups of 32 normalises as eight devices with 32 rows each do. The running
    statistics move once per step, towards the mean over the groups. ``group=0``: all rows are one group.
    Parameters and buffers are those of BatchNorm2d; they stay float32 whatever x is. The encoder counts
    the batches.

    fused:      "auto" runs ``ops.batch_norm_act`` where it has a kernel, "on" everywhere, "off" nowhere.
    one_launch: of ``ops.batch_norm_act``. Off: not measured on a GPU yet.
    forward's pool: end with the max-pooling of a stem, 3×3 of stride 2, behind a ReLU (``ops.batch_norm_relu_pool``).
    """

    group: int = 0
    fused: Literal["auto", "on", "off"] = "auto"
    one_launch: bool = False

    def forward(
        self, x: Tensor, residual: Tensor | None = None, relu: bool = False, fork: Fork = "off", pool: bool = False
    ) -> Pair:
        if self.training and self.group and len(x) % self.group:
            raise ValueError(f"the batch of {len(x)} rows is not a multiple of bn_group={self.group}")
        if pool and (residual is not None or not relu):
            raise ValueError("pool needs relu=True and no residual")
        if pool and self.training and self._is_fused(x.device.type):
            return ops.batch_norm_relu_pool(
                x, self.weight, self.bias, self.running_mean, self.running_var, group=self.group,
                momentum=self.momentum, eps=self.eps, fork=fork != "off", one_launch=self.one_launch,
            )  # fmt: skip
        if self.training and self._is_fused(x.device.type):
            return ops.batch_norm_act(
                x, self.weight, self.bias, self.running_mean, self.running_var, residual,
                relu=relu, group=self.group, momentum=self.momentum, eps=self.eps, fork=fork != "off",
                signs=fork == "signs", one_launch=self.one_launch,
            )  # fmt: skip
        if self.training and self.group not in (0, len(x)):
            x = self._by_groups(x)
        else:
            statistics = self.running_mean, self.running_var
            x = F.batch_norm(x, *statistics, self.weight, self.bias, self.training, self.momentum, self.eps)
        if residual is not None:
            x = x.add_(residual)
        x = F.relu(x, inplace=True) if relu else x
        x = F.max_pool2d(x, 3, 2, padding=1) if pool else x
        return x if fork == "off" else (x, x)

    def _is_fused(self, device: str) -> bool:
        return self.fused == "on" or (self.fused == "auto" and ops.backends.is_fused("batch_norm_act", device))

    def _by_groups(self, x: Tensor) -> Tensor:
        parts, means, variances = [], [], []
        for rows in x.split(self.group):
            mean, var = self.running_mean.clone(), self.running_var.clone()
            parts.append(F.batch_norm(rows, mean, var, self.weight, self.bias, True, self.momentum, self.eps))
            means.append(mean)
            variances.append(var)
        self.running_mean.copy_(torch.stack(means).mean(0))
        self.running_var.copy_(torch.stack(variances).mean(0))
        return torch.cat(parts)


class BasicBlock(nn.Module):
    """fork: of its output. Off: not measured on a GPU yet."""

    expansion = 1
    fork: Fork = "off"

    def __init__(self, inplanes: int, planes: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = GroupedBatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = GroupedBatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Pair) -> Pair:
        x, residual = x if isinstance(x, tuple) else (x, x)
        if self.downsample is not None:
            residual = self.downsample(residual)
        x = self.bn1(self.conv1(x), relu=True)
        return self.bn2(self.conv2(x), residual, relu=True, fork=self.fork)


class Bottleneck(nn.Module):
    """Both are off, for they are not measured on a GPU yet.

    fused_conv: without a gradient, run as ``forward_only.bottleneck``.
    fork:       of its output.
    """

    expansion = 4
    fused_conv: bool = False
    fork: Fork = "off"

    def __init__(self, inplanes: int, planes: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = GroupedBatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, bias=False)
        self.bn2 = GroupedBatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * self.expansion, 1, bias=False)
        self.bn3 = GroupedBatchNorm2d(planes * self.expansion)
        self.downsample = downsample

    def forward(self, x: Pair) -> Pair:
        x, residual = x if isinstance(x, tuple) else (x, x)
        if self.fused_conv and self.training and not torch.is_grad_enabled():
            return forward_only.bottleneck(self, x, residual)
        if self.downsample is not None:
            residual = self.downsample(residual)
        x = self.bn1(self.conv1(x), relu=True)
        x = self.bn2(self.conv2(x), relu=True)
        return self.bn3(self.conv3(x), residual, relu=True, fork=self.fork)


LAYERS: dict[str, tuple[type[nn.Module], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
}


class ResNet(nn.Module):
    """images [N, 3, H, W] → (logits [N, num_classes], embedding of unit length [N, embed_dim], float32).

    arch:      resnet18, resnet34, resnet50 or resnet101.
    width:     multiplies the channels of the four stages (2 and 4 are the paper's wide models).
    stem:      "imagenet" (7×7 stride 2, max-pooling) or "small" (3×3 stride 1) for images of 16–112 px.
    bn_group:  rows per BatchNorm group, 0 for all (see GroupedBatchNorm2d).
    fused_stem: pool behind conv1 in the kernels of its BatchNorm, where they run. Off: not measured on a GPU yet.
    fork:      of the output of that stem (see Fork).
    recompute: keep only what goes into each block and compute the rest again in the backward pass, to save memory.
    """

    recompute: bool = False
    fused_stem: bool = False
    fork: Fork = "off"

    def __init__(
        self,
        arch: str,
        num_classes: int,
        embed_dim: int = 128,
        width: float = 1,
        stem: str = "imagenet",
        bn_group: int = 0,
    ) -> None:
        super().__init__()
        block, depths = LAYERS[arch]
        small = stem == "small"
        self.conv1 = nn.Conv2d(3, 64, 3 if small else 7, 1 if small else 2, padding=1 if small else 3, bias=False)
        self.bn1 = GroupedBatchNorm2d(64)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, padding=1)
        self.inplanes = 64
        base = int(64 * width)
        self.layer1 = self._stage(block, base, depths[0], stride=1)
        self.layer2 = self._stage(block, base * 2, depths[1], stride=2)
        self.layer3 = self._stage(block, base * 4, depths[2], stride=2)
        self.layer4 = self._stage(block, base * 8, depths[3], stride=2)
        self.feature_dim = base * 8 * block.expansion
        self.classifier = nn.Linear(self.feature_dim, num_classes)
        self.fc1 = nn.Linear(self.feature_dim, 2048)
        self.fc2 = nn.Linear(2048, embed_dim)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                fan_out = m.kernel_size[0] * m.kernel_size[1] * m.out_channels
                nn.init.normal_(m.weight, std=math.sqrt(2 / fan_out))
        self._norms = [m for m in self.modules() if isinstance(m, GroupedBatchNorm2d)]
        for norm in self._norms:
            norm.group = bn_group

    def _stage(self, block: type[nn.Module], planes: int, depth: int, stride: int) -> nn.Sequential:
        downsample = None
        if stride != 1 or self.inplanes != planes * block.expansion:
            downsample = nn.Sequential(
                nn.Conv2d(self.inplanes, planes * block.expansion, 1, stride, bias=False),
                GroupedBatchNorm2d(planes * block.expansion),
            )
        blocks = [block(self.inplanes, planes, stride, downsample)]
        self.inplanes = planes * block.expansion
        blocks += [block(self.inplanes, planes, 1, None) for _ in range(1, depth)]
        return nn.Sequential(*blocks)

    def features(self, x: Tensor) -> Tensor:
        """images [N, 3, H, W] → pooled features [N, feature_dim]; any H and W. Or [N, 4, H, W] with a
        fourth channel without weight."""
        if self.training:  # in one launch, not 53
            torch._foreach_add_([norm.num_batches_tracked for norm in self._norms], 1)
        x = _padded_convolution(self.conv1, x) if x.shape[1] == self.conv1.in_channels + 1 else self.conv1(x)
        if self.fused_stem and isinstance(self.maxpool, nn.MaxPool2d):
            x = self.bn1(x, relu=True, fork=self.fork, pool=True)
        else:
            x = self.maxpool(self.bn1(x, relu=True))
        for block in self.blocks():
            x = _recomputed(block, x) if self.recompute and torch.is_grad_enabled() else block(x)
        return _pooled(x)

    def blocks(self) -> list[nn.Module]:
        return [*self.layer1, *self.layer2, *self.layer3, *self.layer4]

    def project(self, features: Tensor) -> Tensor:
        """pooled features → embedding of unit length, float32 whatever autocast says."""
        return F.normalize(self.fc2(F.relu(self.fc1(features))).float(), dim=1)

    def backbone(self) -> nn.ModuleList:
        """All but the heads."""
        heads = ("classifier", "fc1", "fc2")
        return nn.ModuleList(module for name, module in self.named_children() if name not in heads)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(x)
        return self.classifier(features), self.project(features)


class Backbone(ResNet):
    """A ResNet without heads: images [N, 3, H, W] → pooled features [N, feature_dim]. Arguments: as of ResNet."""

    def __init__(self, arch: str, width: float = 1, stem: str = "imagenet", bn_group: int = 0) -> None:
        super().__init__(arch, 1, 1, width, stem, bn_group)
        del self.classifier, self.fc1, self.fc2

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)


def _padded_convolution(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """conv(x) for an x with one more channel, which gets no weight."""
    weight = F.pad(conv.weight, (0, 0, 0, 0, 0, 1))
    return F.conv2d(x, weight, None, conv.stride, conv.padding)


def _pooled(x: Tensor) -> Tensor:
    """The mean over H and W: [N, C, H, W] → [N, C]. As x lies in memory, so that its gradient lies there, too: that of
    x.mean((2, 3)) is written in NCHW whatever x is, and the next backward pass copies it."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).mean((1, 2))
    return x.mean((2, 3))


def _recomputed(block: nn.Module, x: Pair) -> Pair:
    contexts = contextlib.nullcontext(), _statistics_at_rest(block)
    return checkpoint(block, x, use_reentrant=False, preserve_rng_state=False, context_fn=lambda: contexts)


@contextlib.contextmanager
def _statistics_at_rest(block: nn.Module) -> Iterator[None]:
    """The running statistics have moved in the forward pass already."""
    norms = [m for m in block.modules() if isinstance(m, GroupedBatchNorm2d)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum
