"""Speed-ups of the step that are off until a GPU has shown their gain; `mopro-fast bench` measures each by itself.

Each is a function that turns it on in a method whose encoders do not compute yet (before TrainStep copies them).
docs/performance.md predicts their milliseconds.
"""

from collections.abc import Callable
from typing import TypeVar

import torch

from mopro_fast.errors import UserError
from mopro_fast.models.method import Method
from mopro_fast.models.resnet import Bottleneck, Fork, GroupedBatchNorm2d

M = TypeVar("M", bound=Method)


def turn_on(model: M, *names: str) -> M:
    """The method itself, with these of SPEEDUPS turned on. Raises UserError for another name."""
    for name in names:
        if name not in SPEEDUPS:
            raise UserError(f"no speed-up has the name {name!r}; there are {', '.join(SPEEDUPS)}")
        SPEEDUPS[name](model)
    return model


def residual_joins(model: Method) -> None:
    _fork(model, "on")


def sign_bits(model: Method) -> None:
    _fork(model, "signs")


def _fork(model: Method, how: Fork) -> None:
    for module in (model.encoder_q, *model.encoder_q.blocks()[:-1]):  # the last block's output has one reader
        module.fork = how


def one_launch_norms(model: Method) -> None:
    for m in model.modules():
        if isinstance(m, GroupedBatchNorm2d):
            m.one_launch = True


def key_convolutions(model: Method) -> None:
    """In layer1 and layer2. Layer3 and layer4 are limited by arithmetic, and every block of output channels would
    normalise the same input again."""
    for block in () if model.encoder_k is None else (*model.encoder_k.layer1, *model.encoder_k.layer2):
        if isinstance(block, Bottleneck):
            block.fused_conv = True


def half_keys(model: Method) -> None:
    """The key encoder in float16, the one type that cuDNN's convolutions with BatchNorm inside take; nothing is scaled
    for it has no gradient. Where a value is above 65504 the loss is not finite, and the run stops."""
    model.key_dtype = torch.float16


def key_stream(model: Method) -> None:
    model.key_stream = True


def stem(model: Method) -> None:
    for encoder in (model.encoder_q, model.encoder_k):
        if encoder is not None:
            encoder.fused_stem = True


def padded_input(model: Method) -> None:
    model.image_channels = 4


SPEEDUPS: dict[str, Callable[[Method], None]] = {
    "residual-joins": residual_joins,
    "sign-bits": sign_bits,
    "one-launch-norms": one_launch_norms,
    "key-convolutions": key_convolutions,
    "key-stream": key_stream,
    "stem": stem,
    "padded-input": padded_input,
    "half-keys": half_keys,
}
