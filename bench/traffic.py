"""Bytes that ResNet-50's activations move in a step, per image, by how they are computed; and what that predicts.

    python bench/traffic.py [--bandwidth 4.3e12] [--results FOLDER]

Counted from the model's own shapes: every read and write of an activation or of its gradient in bfloat16, of both
forwards and one backward. Weights are left out (they do not grow with the batch). Nothing is run or timed.
"""

import argparse

import record

# isort: split
import torch
from torch import nn

from mopro_fast.models.resnet import BasicBlock, Bottleneck, ResNet

SCHEMES = {
    "separate": "every BatchNorm, ReLU and add on its own",
    "fused": "BatchNorm + add + ReLU fused (ops.batch_norm_act)",
    "in convolutions": "statistics in the convolution before, normalise + ReLU in the one behind",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--bandwidth", type=float, default=4.3e12, help="bytes/s of a copy; default: what one H200 was measured at"
    )
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--results", default=record.RESULTS)
    a = parser.parse_args()
    sizes = activations(a.image_size)
    rows = []
    for scheme, meaning in SCHEMES.items():
        key, query = (sum(layer_values(scheme, *layer, backward) for layer in sizes) * 2 for backward in (False, True))
        rows.append({"scheme": meaning, "mb_key": key / 1e6, "mb_query": query / 1e6})
        rows[-1]["limit"] = a.bandwidth / (key + query)
        print(rows[-1])
    settings = {"bandwidth": a.bandwidth, "image_size": a.image_size}
    print(record.write("traffic", {"settings": settings, "rows": rows}, a.results))
    return 0


def activations(image_size: int) -> list[tuple[int, int, bool, bool]]:
    """Per convolution: values that it reads, that it writes, whether a ReLU follows its BatchNorm, and an add."""
    with torch.device("meta"):
        model = ResNet("resnet50", 1000)
    found, blocks = [], [m for m in model.modules() if isinstance(m, Bottleneck | BasicBlock)]
    last = {id(block.conv3 if isinstance(block, Bottleneck) else block.conv2) for block in blocks}
    shortcut = {id(block.downsample[0]) for block in blocks if block.downsample is not None}

    def note(conv: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        found.append((inputs[0].numel(), output.numel(), id(conv) not in shortcut, id(conv) in last))

    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            m.register_forward_hook(note)
    model(torch.empty(1, 3, image_size, image_size, device="meta"))
    return found


def layer_values(scheme: str, read: int, written: int, relu: bool, add: bool, backward: bool) -> int:
    """Values that a convolution, its BatchNorm, add and ReLU read and write; ``backward``: in both directions."""
    x = written
    if scheme == "separate":
        forward = read + x + 3 * x + (2 * x if relu else 0) + (3 * x if add else 0)
        # ReLU: dy, y in, dx out; BatchNorm: sums of dy and x, then dy, x in, dx out; add: one more gradient to sum.
        back = (3 * x if relu else 0) + 5 * x + (3 * x if add else 0)
    elif scheme == "fused":
        forward = read + x + 3 * x + (x if add else 0)
        back = 5 * x + (2 * x if add else 0)  # x tells where the ReLU let through, but with an add y and g move too
    else:
        # What the next convolution reads is raw; where an add follows, its result is written and read back.
        forward = read + x + (3 * x if add else 0)
        back = 3 * x + (x if relu else 0) + (x if add else 0)
    back += x + read + x + read  # the convolution's: dy in, dx out; dy and its input in, for the weights
    return forward + (back if backward else 0)


if __name__ == "__main__":
    raise SystemExit(main())
