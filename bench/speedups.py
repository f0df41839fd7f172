"""What each of models/speedups.py saves of a step: megabytes and launches counted, milliseconds predicted.

    python bench/speedups.py [--results FOLDER] [--cache FOLDER]

Megabytes: bench/traffic.py's step_mb. Launches: those of the step on tensors without contents with the speed-up on
(bench/launches.py), N=256; at N=32 they are the same. Milliseconds: bytes at 88 % of a copy's bandwidth, and what a
launch takes in a CUDA graph. Nothing is run on a GPU.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import record  # first: it sets what OpenMP reads when torch is imported

# isort: split
import launches
import torch
import traffic

from mopro_fast.benchmark.throughput import Case
from mopro_fast.models.build import build
from mopro_fast.models.resnet import Bottleneck
from mopro_fast.models.speedups import SPEEDUPS, turn_on

GPUS, ROWS = traffic.BANDWIDTH, (256, 32)
EFFICIENCY = 0.88  # of a copy's bandwidth that a memory-bound kernel reaches: assumed
LAUNCH_US = launches.LAUNCH_US, launches.LAUNCH_US  # least and most
STEP_AT_32 = {"H100": 3200, "H200": 3750}  # images a second of the step as it is, N=32: predicted
ALL = "all"

Range = tuple[float, float]
"""Least and most."""


def nothing(_gpu: str, _rows: int) -> Range:
    return 0.0, 0.0


def last_program_us() -> Range:
    """For each second launch of BatchNorm's that the last program of the first one replaces: the launch and the kernel
    less what they take there, where one program does what a grid did: from a few partial results a channel to 264 of
    them, read from L2. All assumed."""
    launch_and_kernel, there = 3.3, (1.2, 2.7)
    return launch_and_kernel - there[1], launch_and_kernel - there[0]


def of_smaller_tiles(gpu: str, rows: int) -> Range:
    """Statistics that finish themselves have 48 KB of an SM in flight, not 96: at worst 3 % of their time. Assumed."""
    return -0.03 * traffic.PARTS[1][2 + list(GPUS).index(gpu)] * rows / 256, 0.0


def of_padding(_gpu: str, rows: int) -> Range:
    """Of both encoders, where cuDNN pads: what it reads and writes for that, and better kernels. Else 51 MB more are
    written. Assumed."""
    return -0.02 * rows / 256, 0.8 * rows / 256


def of_overlap(gpu: str, rows: int) -> Range:
    """Assumed: where launches leave the GPU idle, as at N=32, a tenth of the step."""
    tenth = 0.1 * 1e3 * rows / STEP_AT_32[gpu]
    return (0.5, 1.5) if rows > 32 else (tenth, tenth)


class Prediction(NamedTuple):
    what: str
    """What it does."""
    beside: Callable[[str, int], Range] = nothing
    """Milliseconds saved beside bytes and launches: (GPU, rows)."""
    launch_us: Range = LAUNCH_US
    """Microseconds for each launch saved."""
    of_bytes: Range = (1.0, 1.0)
    """Share of the time of the bytes saved that is saved."""


PREDICTIONS = {
    "key-convolutions": Prediction(
        "the key encoder's 1×1 convolutions of layer1 and layer2 take the statistics of their outputs and normalise "
        "their inputs; nothing is saved where our product moves its bytes at half of a copy's bandwidth",
        of_bytes=(0.0, 1.0),
    ),
    "residual-joins": Prediction("two gradients that meet are added where BatchNorm's sums read them"),
    "sign-bits": Prediction("the same, and a bit for each value says where the ReLU let through, not its output"),
    "stem": Prediction("the first BatchNorm, ReLU and max-pooling in one kernel, which keeps a byte for each maximum"),
    "padded-input": Prediction(
        "a fourth input channel of zeros; something is saved where cuDNN pads today", of_padding
    ),
    "one-launch-norms": Prediction(
        "BatchNorm's last program combines what the others have summed, without a second launch",
        of_smaller_tiles,
        last_program_us(),
    ),
    "half-keys": Prediction("the key encoder in float16: nothing is saved unless cuDNN has better kernels for it"),
    "key-stream": Prediction(
        "the key encoder's forward beside the query encoder's, on a stream of its own", of_overlap
    ),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    parser.add_argument("--cache", type=Path, help="where the host build of csrc/ is kept")
    a = parser.parse_args(argv)
    launches.require(parser)
    case, shapes = Case(max(ROWS), 1000, device="cpu"), traffic.shapes(224)
    with launches.counting(a.cache) as module:
        base = cost((), launches.of_step(case, module), shapes)
        print(base)
        rows: list[dict] = []
        alone: dict[str, tuple[float, int]] = {}
        for name in (*SPEEDUPS, ALL):
            on = tuple(SPEEDUPS) if name == ALL else (name,)
            found = cost(on, launches.of_step(case, module, *on), shapes)
            alone[name] = moved(base) - moved(found), base["launches"] - found["launches"]
            rows.append({"name": name, "what": "" if name == ALL else PREDICTIONS[name].what, **found})
            rows[-1]["ms"] = {gpu: {n: saved_ms(alone, name, on, gpu, n) for n in ROWS} for gpu in GPUS}
            print(rows[-1])
    step = {
        gpu: {256: sum(part[i] for part in traffic.PARTS), 32: 32e3 / STEP_AT_32[gpu]} for i, gpu in enumerate(GPUS, 2)
    }
    settings = {
        "last_program_us": last_program_us(),
        "bandwidth": GPUS,
        "efficiency": EFFICIENCY,
        "launch_us": LAUNCH_US,
        "queue_size": case.queue_size,
    }
    print(record.write("speedups", {"settings": settings, "base": base, "step_ms": step, "rows": rows}, a.results))
    return 0


def cost(on: tuple[str, ...], by_name: dict[str, int], shapes: traffic.Shapes) -> dict:
    query, key = traffic.step_mb(shapes, on, fused_blocks(on))
    return {"mb_query": query, "mb_key": key, "launches": sum(by_name.values())}


def fused_blocks(on: tuple[str, ...]) -> list[int]:
    """The key encoder's blocks that run without a gradient's bookkeeping, by number."""
    with torch.device("meta"):
        model = build(Case(2, 10).config())
    blocks = [m for m in turn_on(model, *on).encoder_k.modules() if isinstance(m, Bottleneck)]
    return [i for i, block in enumerate(blocks) if block.fused_conv]


def moved(cost: dict) -> float:
    return cost["mb_query"] + cost["mb_key"]


def saved_ms(alone: dict[str, tuple[float, int]], name: str, on: tuple[str, ...], gpu: str, rows: int) -> Range:
    """By ``name``, which turns these on. alone: megabytes and launches that each saves by itself, ``name`` as well."""
    mb, left = alone[name]
    per_mb = 1e6 * rows / (EFFICIENCY * GPUS[gpu]) * 1e3
    low = high = mb * per_mb
    for one in on:
        p, (own_mb, own_launches) = PREDICTIONS[one], alone[one]
        low -= (1 - p.of_bytes[0]) * own_mb * per_mb
        high -= (1 - p.of_bytes[1]) * own_mb * per_mb
        if p.launch_us != LAUNCH_US:  # of all together, what no such one saves by itself is of LAUNCH_US
            left -= own_launches
            low, high = (s + 1e-3 * own_launches * us for s, us in zip((low, high), p.launch_us, strict=True))
        low, high = (s + ms for s, ms in zip((low, high), p.beside(gpu, rows), strict=True))
    low, high = (s + 1e-3 * left * us for s, us in zip((low, high), LAUNCH_US, strict=True))
    return low, high


if __name__ == "__main__":
    raise SystemExit(main())
