"""Speed-ups of the step that are off until a GPU has shown their gain; `mopro-fast bench` measures each by itself.

Each is a function that turns it on in a method whose encoders do not compute yet (before TrainStep copies them).
docs/performance.md predicts their milliseconds.
"""

from collections.abc import Callable
from typing import TypeVar

from mopro_fast.models.method import Method
from mopro_fast.models.resnet import Bottleneck

M = TypeVar("M", bound=Method)


def turn_on(model: M, *names: str) -> M:
    """The method itself, with these of SPEEDUPS turned on; all of them where none is named."""
    for name in names or SPEEDUPS:
        SPEEDUPS[name](model)
    return model


def key_convolutions(model: Method) -> None:
    for m in model.encoder_k.modules():
        if isinstance(m, Bottleneck):
            m.fused_conv = True


def stem(model: Method) -> None:
    for encoder in (model.encoder_q, model.encoder_k):
        if encoder is not None:
            encoder.fused_stem = True


def padded_input(model: Method) -> None:
    model.image_channels = 4


SPEEDUPS: dict[str, Callable[[Method], None]] = {
    "key-convolutions": key_convolutions,
    "stem": stem,
    "padded-input": padded_input,
}
