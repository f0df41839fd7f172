"""The prediction of scaling: its bytes are those of real collectives, its times those of its own rules."""

import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import on_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mopro_fast import distributed
from mopro_fast.config import DataConfig, ModelConfig, MoProConfig, OptimConfig, RunConfig, TrainConfig
from mopro_fast.data.pipeline import Batch
from mopro_fast.models.build import build
from mopro_fast.models.precision import low_precision
from mopro_fast.models.resnet import ResNet
from mopro_fast.training.step import Shuffle, TrainStep

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import scaling

KINDS = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "alltoall_base_": "all_to_all",
    "broadcast_": "broadcast",
}
ROWS, PX = 4, 16


class Handed(TorchDispatchMode):
    """What is handed to collectives: of each kind, (bytes, dtype) of every call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = defaultdict(list)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            # An all-gather and an all-to-all take their result first.
            name = func.__name__.split(".")[0]
            mine = args[1] if name in ("_allgather_base_", "alltoall_base_") else args[0]
            for x in tree_leaves(mine):
                self.calls[KINDS[name]].append((x.numel() * x.element_size(), str(x.dtype).removeprefix("torch.")))
        return func(*args, **(kwargs or {}))


def step_of_a_rank(_rank: int, ranks: int) -> None:
    for precision in ("fp32", "bf16"):
        compare_a_step(ranks, precision)


def compare_a_step(ranks: int, precision: str) -> None:
    config = TrainConfig(
        data=DataConfig(num_classes=1000),
        model=ModelConfig(arch="resnet18", stem="small", width=0.25, embed_dim=8),
        mopro=MoProConfig(queue_size=32),
        optim=OptimConfig(batch_size=ranks * ROWS),
        run=RunConfig(precision=precision),
    )
    torch.manual_seed(0)
    model = build(config).train()
    step = TrainStep(config, model, 64, torch.device("cpu"))
    views = torch.randint(256, (2, ROWS, PX, PX, 3), dtype=torch.uint8)
    batch = Batch(*views.unbind(), torch.arange(ROWS), torch.arange(ROWS))
    shuffle = Shuffle(0, ranks * ROWS)
    with distributed.StopSignal() as stop:
        for i in range(2):  # in the first step DDP tells the ranks its buckets
            with Handed() as handed:
                ((mine, place),) = shuffle([batch], i)
                step(mine, place, 0, i, 0.1)
                stop.poll()
        in_a_step, handed.calls = handed.calls, defaultdict(list)
        with handed:
            for _ in range(2):
                distributed.sync_buffers(model)
        stop.poll()
    found = scaling.collectives(model, step.query.module, ROWS, PX)
    for kind in ("all_to_all", "all_gather", "all_reduce"):
        mine = [c for c in found if c.kind == kind]
        assert len(in_a_step[kind]) == sum(len(c.sizes) for c in mine), (kind, in_a_step[kind])
        assert sum(size for size, _ in in_a_step[kind]) == sum(sum(c.sizes) for c in mine), kind
    assert not in_a_step["broadcast"]
    expected, actual = defaultdict(int, int64=8), defaultdict(int)
    for size, dtype in scaling.gradient_buckets(step.query.module)[0]:
        expected[dtype] += size
    for size, dtype in in_a_step["all_reduce"]:
        actual[dtype] += size
    assert actual == expected and ("bfloat16" in actual) == (precision == "bf16")
    (gradients,) = [c for c in found if c.name == "gradients"]
    assert len(gradients.sizes) >= len(expected)  # more than one bucket of a type
    (buffers,) = [c for c in found if c.per_epoch]
    assert sorted(size for size, _ in handed.calls["broadcast"]) == sorted(buffers.sizes)


@pytest.mark.medium
@pytest.mark.ranks
def test_bytes_are_those_that_two_ranks_hand_over() -> None:
    on_ranks(2, step_of_a_rank)


A = scaling.Assumptions(launch_us=0, nvlink_us=1, infiniband_us=10, nvlink_gbytes=100, infiniband_gbytes=10)


def reduce(*sizes: int, hidden: str = "", late: int = 0) -> scaling.Collective:
    return scaling.Collective("x", "all_reduce", list(sizes), "float32", hidden, late)


def test_what_leaves_a_gpu() -> None:
    c = reduce(800)
    assert scaling.sent(c, 800, 1, A) == (0, 0)
    assert scaling.sent(c, 800, 8, A) == (2 * 700, 0)
    assert scaling.sent(c, 800, 16, A) == (1500, 1500 / 8)
    views = scaling.Collective("x", "all_to_all", [1600], "uint8", "step")
    assert scaling.sent(views, 1600, 16, A) == (700, 800)


def test_time_of_a_collective() -> None:
    assert scaling.seconds(reduce(10**9), 10**9, 2, A) == pytest.approx(2e-6 + 1e9 / 100e9)
    # 16 GPUs in a ring: 14 hops inside the nodes and 2 between them, twice; the cards carry an eighth each.
    ring = 2 * (14e-6 + 20e-6) + 2e9 * 15 / 16 / 8 / 10e9
    assert scaling.seconds(reduce(10**9), 10**9, 16, A) == pytest.approx(ring)
    # Nothing to carry: up and down a tree, 7 hops inside and one between.
    assert scaling.seconds(reduce(0), 0, 16, A) == pytest.approx(2 * (7e-6 + 10e-6))


def test_buckets_that_wait_for_the_stem() -> None:
    """Alone in their type, BatchNorm's gradients are complete at the very end, and DDP lets none overtake them."""
    with torch.device("meta"):
        encoder = ResNet("resnet50", 1000)
    for module, types, late in (
        (low_precision(encoder, torch.bfloat16)[0], ["bfloat16", "bfloat16", "float32", "bfloat16"], 2),
        (encoder, ["float32"] * 6, 1),
    ):
        buckets, waiting = scaling.gradient_buckets(module)
        assert sorted(dtype for _, dtype in buckets) == sorted(types) and waiting == late
        assert sum(size for size, _ in buckets) == sum(p.numel() * p.element_size() for p in module.parameters())


def test_what_is_hidden_costs_nothing() -> None:
    alone = A.rows / A.images_per_second
    size = int(1e9 * 50e-3)  # 0.5 ms on two GPUs
    one = scaling.seconds(reduce(size), size, 2, A)
    last_alone = scaling.predicted([reduce(size, size, hidden="backward", late=1)], 2, A)
    assert last_alone["exposed_ms"] == pytest.approx(1e3 * one)
    assert last_alone["communication_ms"] == pytest.approx(2e3 * one)
    nothing = scaling.predicted([reduce(size, size, hidden="backward")], 2, replace(A, overlap=0))
    assert nothing["exposed_ms"] == pytest.approx(2e3 * one)
    assert nothing["efficiency"] == pytest.approx(alone / (alone + 2 * one))
    assert scaling.predicted([reduce(size, hidden="step")], 2, A)["efficiency"] == 1
    assert scaling.predicted([reduce(size)], 1, A)["efficiency"] == 1
