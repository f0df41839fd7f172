"""Bytes that ResNet-50's activations move in a step, per image, by how they are computed; and what that predicts.

    python bench/traffic.py [--bandwidth 4.3e12] [--results FOLDER]

Counted from the model's own shapes: every read and write of an activation or of its gradient in bfloat16, of both
forwards and one backward. Weights are left out (they do not grow with the batch). Nothing is run or timed. The second
roof is convolutions: their flops at rates that are assumed. `step_mb` is the whole step with speed-ups switched on.
"""

import argparse
from collections.abc import Collection
from typing import NamedTuple

import record

# isort: split
import torch
from torch import nn

from mopro_fast.models.resnet import Bottleneck, ResNet

SCHEMES = {
    "separate": "every BatchNorm, ReLU and add on its own",
    "fused": "BatchNorm + add + ReLU fused (ops.batch_norm_act)",
    "in convolutions": "statistics in the convolution before, normalise + ReLU in the one behind",
}
BANDWIDTH = {"H100": 3.0e12, "H200": 4.3e12}  # bytes/s of a copy: 90 % of the data sheet's, assumed; measured on one
PRODUCTS = 790e12  # flop/s of a large bf16 product, measured on one H200; an H100 is the same chip
RATES = {"forward": 0.62, "dgrad": 0.55, "wgrad": 0.42}  # of it, by convolutions: assumed
# Published results of MLPerf Training, ResNet-50, none of them run here: images a second of each of so many GPUs.
ANCHORS = (
    {"what": "MLPerf v4.0, MXNet (NGC 24.04), fp16", "gpu": "H200", "gpus": 8, "supervised": 7950},
    {"what": "MLPerf v4.0, MXNet (NGC 24.04), fp16", "gpu": "H100", "gpus": 8, "supervised": 7160},
    {"what": "MLPerf v3.1", "gpu": "H100", "gpus": None, "supervised": 7055},
    {"what": "MLPerf v3.1", "gpu": "H100", "gpus": 64, "supervised": 4908},
)
# The step as it is, N=256: GB, milliseconds on an H100 and an H200. Predicted from the sources and the compiled
# kernels: the memory-bound ones reach 88 % of BANDWIDTH but for the pooling, convolutions RATES or their memory.
PARTS = (
    ("convolutions", None, 26.8, 23.9),
    ("BatchNorm: statistics", 11.4, 4.2, 2.9),
    ("BatchNorm: normalise, add, ReLU", 28.4, 10.8, 7.5),
    ("BatchNorm: sums of the backward pass", 17.0, 6.4, 4.5),
    ("BatchNorm: dx", 17.1, 6.5, 4.5),
    ("gradients added where two meet", 8.6, 3.2, 2.2),
    ("max-pooling", 2.8, 1.8, 1.3),
    ("SGD and momentum encoder", 0.9, 0.35, 0.25),
    ("BatchNorm's second launches, gaps, head, copies", None, 2.3, 2.3),
)


class Layer(NamedTuple):
    """A convolution, its BatchNorm and what follows."""

    read: int
    """Values of an image."""
    written: int
    relu: bool
    add: bool
    flops: int
    """Forward."""
    first: bool
    """No gradient of its input."""


class Block(NamedTuple):
    """Values that a bottleneck's three convolutions write for an image."""

    conv1: int
    conv2: int
    conv3: int


class Shapes(NamedTuple):
    layers: list[Layer]
    blocks: list[Block]
    stem: int
    """Values that the first convolution writes, and of them a quarter behind the pooling."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bandwidth", type=float, default=BANDWIDTH["H200"], help="bytes/s of a copy")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--results", default=record.RESULTS)
    a = parser.parse_args(argv)
    if not 0 < a.bandwidth < float("inf"):
        parser.error(f"--bandwidth must be a finite number above 0, got {a.bandwidth}")
    if a.image_size < 32:
        parser.error(f"--image-size must be at least 32, got {a.image_size}")
    layers = shapes(a.image_size).layers
    rows = []
    for scheme, meaning in SCHEMES.items():
        key, query = (
            sum(layer_values(scheme, *layer[:4], backward) for layer in layers) * 2 for backward in (False, True)
        )
        rows.append({"scheme": meaning, "mb_key": key / 1e6, "mb_query": query / 1e6})
        rows[-1]["limit"] = a.bandwidth / (key + query)
        rows[-1]["limit_convolutions"] = 1 / sum(seconds(layer, backward) for layer in layers for backward in (0, 1))
        print(rows[-1])
    key, query = (sum(sum(flops(layer, backward).values()) for layer in layers) for backward in (0, 1))
    anchors = [
        # One more forward pass makes four thirds of the work of a forward and a backward pass.
        {**x, "tflop_per_s": x["supervised"] * query / 1e12, "mopro": x["supervised"] * 3 / 4}
        | {"of_memory": x["supervised"] * rows[-1]["mb_query"] * 1e6 / BANDWIDTH[x["gpu"]]}
        for x in ANCHORS
    ]
    settings = {"bandwidth": a.bandwidth, "image_size": a.image_size, "products": PRODUCTS, "rates": RATES}
    settings["gflop"] = {"query": query / 1e9, "key": key / 1e9}
    parts = [dict(zip(("part", "gb", *BANDWIDTH), part, strict=True)) for part in PARTS]
    print(record.write("traffic", {"settings": settings, "rows": rows, "anchors": anchors, "parts": parts}, a.results))
    return 0


def shapes(image_size: int) -> Shapes:
    with torch.device("meta"):
        model = ResNet("resnet50", 1000)
    found: list[Layer] = []
    written: dict[nn.Module, int] = {}
    blocks = [m for m in model.modules() if isinstance(m, Bottleneck)]
    last = {block.conv3 for block in blocks}
    shortcut = {block.downsample[0] for block in blocks if block.downsample is not None}

    def note(conv: nn.Conv2d, inputs: tuple, output: torch.Tensor) -> None:
        done = 2 * output.numel() * conv.weight[0].numel()
        read, written[conv] = inputs[0].numel(), output.numel()
        found.append(Layer(read, written[conv], conv not in shortcut, conv in last, done, conv is model.conv1))

    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            m.register_forward_hook(note)
    model(torch.empty(1, 3, image_size, image_size, device="meta"))
    each = [Block(*(written[conv] for conv in (block.conv1, block.conv2, block.conv3))) for block in blocks]
    return Shapes(found, each, written[model.conv1])


def flops(layer: Layer, backward: bool) -> dict[str, int]:
    """Of the convolution; ``backward``: in both directions."""
    if not backward:
        return {"forward": layer.flops}
    return {"forward": layer.flops, "dgrad": 0 if layer.first else layer.flops, "wgrad": layer.flops}


def seconds(layer: Layer, backward: bool) -> float:
    """Of the convolution, if memory were no limit."""
    return sum(done / (RATES[name] * PRODUCTS) for name, done in flops(layer, backward).items())


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


# Values moved by what follows the first convolution, for each value that it writes: now, and with "stem" on.
STEM_QUERY = (
    1 + 2 + (1 + 1 / 4 + 1) + (1 / 4 + 1 + 1) + 2 + 3,  # statistics, act, pool (int64 indices), its backward, sums, dx
    1 + (1 + 1 / 4 + 1 / 4 + 1 / 8) + 1 / 2 + (1 + 1 / 4 + 1 / 8 + 1),  # statistics, act and pool, sums, dx
)
STEM_KEY = (
    1 + 2 + (1 + 1 / 4 + 1),
    1 + (1 + 1 / 4),
)


def step_mb(s: Shapes, on: Collection[str] = (), fused: Collection[int] = ()) -> tuple[float, float]:
    """Megabytes of an image, of the query encoder and of the key encoder, with these of models/speedups.py on.

    fused: the blocks of the key encoder that "key-convolutions" runs without a gradient's bookkeeping, by number.
    Beside the table's row "fused": the pooling, and the sums of two gradients, which meet in front of every block.
    """
    query, key = (sum(layer_values("fused", *layer[:4], backward) for layer in s.layers) for backward in (True, False))
    pooled, outputs = s.stem // 4, [block.conv3 for block in s.blocks]
    query += (STEM_QUERY[0] - 3 - 5) * s.stem + 3 * (pooled + sum(outputs[:-1]))  # BatchNorm's are in layer_values
    key += (STEM_KEY[0] - 3) * s.stem
    if "stem" in on:
        query -= (STEM_QUERY[0] - STEM_QUERY[1]) * s.stem
        key -= (STEM_KEY[0] - STEM_KEY[1]) * s.stem
    if {"residual-joins", "sign-bits"} & set(on):
        # An add reads two gradients and writes one, which the sums read; joined, the sums read two, and of the stem dx.
        query -= 2 * sum(outputs[:-1]) + (pooled if "stem" in on else 0)
    if "sign-bits" in on:  # not y tells where the ReLU let through, but a bit that is written and read
        query -= (1 - 2 / 16) * sum(outputs[:-1])
    # 27·C values in place of 34·C: two statistics less, and bn2's output is neither written nor read.
    key -= sum(b.conv1 + 2 * b.conv2 + b.conv3 for b in (s.blocks[i] for i in fused))
    return 2 * query / 1e6, 2 * key / 1e6


if __name__ == "__main__":
    raise SystemExit(main())
