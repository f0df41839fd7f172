"""Bytes that a training step exchanges, and the efficiency to expect of 1 to 64 GPUs: a prediction, not a measurement.

    python bench/scaling.py [--rows 256] [--gpus 1 8 64] ...    every assumption is an argument

The bytes are those of the real model's parameters in the buckets that DDP makes of them; a test compares them with what
two ranks hand to their collectives. Time is a model of one line per collective: latency per hop + bytes / bandwidth,
the slower of NVLink and InfiniBand, less what is hidden behind computation. Collectives do not slow each other down or
the computation; the log's few hundred bytes every 50 steps are left out.
"""

import ast
import inspect
import math
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise

import record  # first: it sets what OpenMP reads when torch is imported

# isort: split
import torch
import torch.distributed as dist
import tyro
from torch import nn

from mopro_fast.config import DataConfig, OptimConfig, TrainConfig
from mopro_fast.models.build import build
from mopro_fast.models.mopro import MoPro
from mopro_fast.models.precision import low_precision


@dataclass
class Assumptions:
    """Each with its source, or the word assumed."""

    gpus: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """W."""
    classes: tuple[int, ...] = (1000, 5000)
    """C."""
    rows: int = 256
    """N, rows per GPU, whatever W."""
    px: int = 224
    """Side of the views."""
    images_per_second: float = 5190
    """Of one H200 alone, N=256, predicted by part: docs/performance.md. A slower step hides more."""
    backward_share: float = 0.5
    """Of the step that is the query encoder's backward pass: 16.2 of the 32.5 GFLOP per image."""
    overlap: float = 0.8
    """Share of that backward pass during which gradients travel unnoticed: assumed."""
    gpus_per_node: int = 8
    """Joined by NVLink, each with a network card of its own: an HGX board."""
    nvlink_gbytes: float = 370
    """GB/s per GPU and direction: an H100's 450 less protocol, as NCCL's authors state (NVIDIA/nccl-tests issue 212).
    NVLink SHARP, which would help the all-reduce, is left out."""
    infiniband_gbytes: float = 45
    """GB/s per network card and direction: 400 Gb/s (NDR), 90 % of it assumed."""
    nvlink_us: float = 1.5
    """Latency of a hop between GPUs of a node: assumed."""
    infiniband_us: float = 8.0
    """Latency of a hop between nodes: assumed."""
    launch_us: float = 10.0
    """Of a collective, whatever its size: assumed."""
    images: int = 2_400_000
    """Of an epoch (WebVision 1.0), which shares out what is sent once an epoch."""
    results: str = str(record.RESULTS)
    """Folder of the result file."""


@dataclass
class Collective:
    """One kind of collective in a step."""

    name: str
    kind: str
    """all_reduce, all_gather, all_to_all or broadcast."""
    sizes: list[int]
    """Bytes that a rank hands to each call."""
    dtypes: str
    hidden: str
    """Behind what: "backward", "step", or "" for nothing."""
    late: int = 0
    """How many of the last calls are not hidden all the same."""
    per_epoch: bool = False
    on_cpu: bool = False
    """Over the hosts' network, not a GPU's links: bytes alone are counted."""


def collectives(model: MoPro, query: nn.Module, rows: int, px: int) -> list[Collective]:
    """What a step sends whatever the number of ranks, in the order of starting.

    model: with the float32 masters. query: what computes for its encoder, whose gradients travel.
    """
    dim = model.queue.shape[1]
    buckets, late = gradient_buckets(query)
    kinds = sorted({dtype for _, dtype in buckets})
    buffers: dict[torch.dtype, int] = {}  # sync_buffers packs those of a type
    for b in model.buffers():
        buffers[b.dtype] = buffers.get(b.dtype, 0) + b.numel() * b.element_size()
    twice = 2 * list(buffers.values())
    return [
        Collective("view_k, a batch ahead", "all_to_all", [rows * px * px * 3], "uint8", "step"),
        Collective("q, k, labels and kept", "all_gather", [rows * (4 * dim + 4 * dim + 9)], "packed", ""),
        Collective("gradients", "all_reduce", [size for size, _ in buckets], ", ".join(kinds), "backward", late),
        Collective("stop flag, between CPUs", "all_reduce", [8], "int64", "step", on_cpu=True),
        Collective("buffers, twice an epoch", "broadcast", twice, "float32, int64", "", per_epoch=True),
    ]


def gradient_buckets(module: nn.Module) -> tuple[list[tuple[int, str]], int]:
    """(bytes, dtype) of DDP's buckets in the order of its backward pass, that of the parameters reversed; and how many
    at the end have the stem's gradients, which come last, or wait for such a bucket: DDP keeps the order.
    """
    params = [p for p in module.parameters() if p.requires_grad][::-1]
    limits = [dist._DEFAULT_FIRST_BUCKET_BYTES, 25 * 2**20]
    like = [torch.empty_like(p, device="meta") for p in params]
    groups, _ = dist._compute_bucket_assignment_by_size(like, limits, [], list(range(len(params))))
    sizes = [sum(params[i].numel() * params[i].element_size() for i in group) for group in groups]
    dtypes = [str(params[group[0]].dtype).removeprefix("torch.") for group in groups]
    stem = len(params) - 3  # a convolution, a BatchNorm's weight and bias
    late = sum(last >= stem for last in accumulate(map(max, groups), max))
    return list(zip(sizes, dtypes, strict=True)), late


def sent(c: Collective, size: int, gpus: int, a: Assumptions) -> tuple[float, float]:
    """Bytes of one call that leave a GPU through NVLink, and through its network card to another node."""
    if gpus == 1 or c.on_cpu:
        return 0.0, 0.0
    nodes = math.ceil(gpus / a.gpus_per_node)
    local = min(gpus, a.gpus_per_node)
    if c.kind == "all_to_all":  # a random permutation: every rank gets as much
        return size * (local - 1) / gpus, size * (gpus - local) / gpus
    through = {"all_reduce": 2 * size * (gpus - 1) / gpus, "all_gather": size * (gpus - 1), "broadcast": size}[c.kind]
    return through, through / local if nodes > 1 else 0.0  # as many rings as cards, each with its part of the data


def seconds(c: Collective, size: int, gpus: int, a: Assumptions) -> float:
    """Of one call on W ranks; an all-reduce takes the better of ring and tree, as NCCL does."""
    if gpus == 1 or c.on_cpu:
        return 0.0
    nodes, local = math.ceil(gpus / a.gpus_per_node), min(gpus, a.gpus_per_node)
    nvlink, infiniband = a.nvlink_us * 1e-6, a.infiniband_us * 1e-6
    ring = (gpus - nodes) * nvlink + (nodes * infiniband if nodes > 1 else 0)  # once round
    inside, outside = sent(c, size, gpus, a)
    transfer = max(inside / a.nvlink_gbytes, outside / a.infiniband_gbytes) / 1e9
    tree = (local - 1) * nvlink + math.ceil(math.log2(nodes)) * infiniband  # from a leaf to the root
    if c.kind == "all_reduce":
        links = max(2 * size / a.nvlink_gbytes, 2 * size / local / a.infiniband_gbytes if nodes > 1 else 0) / 1e9
        time = min(2 * ring + transfer, 2 * tree + links)
    elif c.kind == "all_to_all":
        time = max(nvlink, infiniband if nodes > 1 else 0) + transfer
    else:
        time = ring + transfer
    return a.launch_us * 1e-6 + time


def predicted(found: list[Collective], gpus: int, a: Assumptions) -> dict:
    """Milliseconds of a step, of what it sends and of what of that is not hidden; efficiency against one GPU."""
    alone = a.rows / a.images_per_second
    steps = a.images / (a.rows * gpus)
    total = exposed = 0.0
    for c in found:
        times = [seconds(c, size, gpus, a) for size in c.sizes]
        time = sum(times) / (steps if c.per_epoch else 1)
        total += time
        if c.hidden == "backward":
            early = sum(times[: len(times) - c.late])
            exposed += sum(times) - early + max(0.0, early - a.overlap * a.backward_share * alone)
        elif c.hidden == "step":
            exposed += max(0.0, time - alone)
        else:
            exposed += time
    step = alone + exposed
    return {
        "gpus": gpus,
        "communication_ms": 1e3 * total,
        "exposed_ms": 1e3 * exposed,
        "step_ms": 1e3 * step,
        "images_per_second": gpus * a.rows / step,
        "efficiency": alone / step,
    }


def described(c: Collective, a: Assumptions) -> dict:
    links = {}
    for gpus in (min(max(a.gpus), a.gpus_per_node), max(a.gpus)):
        each = [sent(c, size, gpus, a) for size in c.sizes]
        links[str(gpus)] = {"nvlink": sum(x for x, _ in each), "infiniband": sum(y for _, y in each)}
    return {**asdict(c), "bytes": sum(c.sizes), "sent": links}


def main(a: Assumptions) -> None:
    for name, value in asdict(a).items():
        if name == "results":
            continue
        shares, latency = name in ("overlap", "backward_share"), name.endswith("_us")
        for x in value if isinstance(value, tuple) else (value,):
            if not (0 <= x <= 1 if shares else 0 <= x < math.inf if latency else 0 < x < math.inf):
                allowed = "in [0, 1]" if shares else "finite and at least 0" if latency else "finite and above 0"
                raise SystemExit(f"scaling.py: --{name.replace('_', '-')} must be {allowed}, got {x}")
    cases = []
    for classes in a.classes:
        config = TrainConfig(data=DataConfig(num_classes=classes), optim=OptimConfig(batch_size=a.rows))
        with torch.device("meta"):
            model = build(config)
        found = collectives(model, low_precision(model.encoder_q, torch.bfloat16)[0], a.rows, a.px)
        speeds = [predicted(found, gpus, a) for gpus in a.gpus]
        cases.append({"C": classes, "collectives": [described(c, a) for c in found], "speeds": speeds})
        print(f"C={classes}: " + ", ".join(f"{s['gpus']} GPUs {100 * s['efficiency']:.1f} %" for s in speeds))
    settings = {name: value for name, value in asdict(a).items() if name != "results"}
    sources = {name: " ".join(text.split()) for name, text in _field_docstrings().items()}
    result = {"assumptions": settings, "sources": sources, "cases": cases}
    print(record.write("scaling", result, a.results))


def _field_docstrings() -> dict[str, str]:
    body = ast.parse(inspect.getsource(Assumptions)).body[0].body
    return {f.target.id: text.value.value for f, text in pairwise(body) if isinstance(f, ast.AnnAssign)}


if __name__ == "__main__":
    main(tyro.cli(Assumptions, description=__doc__))
