"""Speed-ups of the step that are off until a GPU has shown their gain; `mopro-fast bench` measures each by itself.

Each is a function that turns it on in a method whose encoders do not compute yet (before TrainStep copies them).
docs/performance.md predicts their milliseconds.
"""

from collections.abc import Callable
from typing import TypeVar

import torch

from mopro_fast.models.method import Method
from mopro_fast.models.resnet import Bottleneck

M = TypeVar("M", bound=Method)


def turn_on(model: M, *names: str) -> M:
    """The method itself, with these of SPEEDUPS turned on; all of them where none is named."""
    for name in names or SPEEDUPS:
        SPEEDUPS[name](model)
    return model


def key_convolutions(model: Method) -> None:
    """Where memory is the limit: in layer3 and layer4 the product is, and there each of the more blocks of output
    channels would normalise its input again."""
    for stage in (model.encoder_k.layer1, model.encoder_k.layer2):
        for block in stage:
            if isinstance(block, Bottleneck):
                block.fused_conv = True


def half_keys(model: Method) -> None:
    """The key encoder in float16, the one type that cuDNN's convolutions with BatchNorm inside take; nothing is scaled
    for it has no gradient. Where a value is above 65504 the loss is not finite, and the run stops."""
    model.key_dtype = torch.float16


SPEEDUPS: dict[str, Callable[[Method], None]] = {
    "key-convolutions": key_convolutions,
    "half-keys": half_keys,
}
