"""What CAPro adds to MoPro's training step: counted, predicted for two GPUs, and timed on a CPU.

    python bench/capro_step.py [--rounds 12] [--results FOLDER]

Counted: both steps of ResNet-50, bf16, run on tensors without contents; every PyTorch operator is at least one launch
on a GPU, and what it reads and writes passes through memory once. Beside it the least, of bench/floor.py. Predicted:
operators one after the other in a CUDA graph. Timed: real steps of a small encoder, in turn in one process.
"""

import argparse
import bisect
import contextlib
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import record  # first: it sets what OpenMP reads when torch is imported

# isort: split
import floor
import launches
import torch
import torch.nn.functional as F
import traffic
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from mopro_fast.benchmark.throughput import Case
from mopro_fast.models import capro
from mopro_fast.models.build import build
from mopro_fast.models.resnet import LAYERS
from mopro_fast.ops import backends, reference
from mopro_fast.training import optim
from mopro_fast.training.step import TrainStep

SHAPES = (Case(256, 1000, device="cpu"), Case(1024, 5000, queue_size=65536, device="cpu"))
TIMED = tuple(
    Case(64, classes, 64, "resnet18", 0.25, queue_size=slots, device="cpu")
    for slots, classes in ((1024, 10), (8192, 10), (1024, 1000), (8192, 1000))
)
CORRECTED, FROZEN = "labels corrected", "labels corrected, encoder frozen"
STAGES = {"vanilla": 0, "prototypes started": 1, CORRECTED: 2}  # an epoch of each
WARM_UP = 2
HIDDEN, DIM = 2048, 128  # of the projection

# bytes/s of a copy and bf16 flop/s: an H200's as measured on one; an H100 is the same chip with memory of 3.35 TB/s by
# its data sheet, of which 90 % is assumed. Speeds of MoPro's whole step: if the 32.5 GFLOP an image of ResNet-50, both
# forwards and a backward, were all; and what it is to reach.
GPUS = {
    "H200": {"bytes_per_s": traffic.BANDWIDTH["H200"], "flop_per_s": traffic.PRODUCTS, "images_per_s": [24300, 7000]},
    "H100": {"bytes_per_s": traffic.BANDWIDTH["H100"], "flop_per_s": traffic.PRODUCTS, "images_per_s": [24300, 5370]},
}
# Not in TrainStep: the anchors' flags are gathered; shifts come from the host; the graph copies both.
INPUTS = 4

RECONSTRUCTION, AUXILIARY, TARGETS = "reconstruction head", "auxiliary classifier", "collective targets"
MIXED, SQUARED, SGD = "mixed cross-entropy", "reconstruction loss", "SGD of all heads, no momentum copy"
REST = "the rest"
PARTS = (RECONSTRUCTION, AUXILIARY, TARGETS, MIXED, SQUARED, SGD)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="timed steps of each variant and shape")
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    a = parser.parse_args(argv)
    net = TIMED[0]
    settings = {"gpus": GPUS, "launch_us": launches.LAUNCH_US, "rounds": a.rounds}
    settings |= {"arch": net.arch, "width": net.width, "px": net.image_size}
    result = {
        "settings": settings,
        "counted": [counted(case) for case in SHAPES],
        "timed": [timed(case, a.rounds) for case in TIMED],
    }
    print(record.write("capro_step", result, a.results))
    return 0


class Operator(NamedTuple):
    """One launch."""

    part: str
    backward: bool
    bytes: int
    flops: int


class Parts(launches.Counter):
    """PyTorch's operators by part of the step; in the backward pass, by the part whose forward pass they belong to."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Operator] = []
        self.ours: Counter[str] = Counter()
        """Calls of ops that are the same few launches in both methods."""
        self._begun, self._parts = [0], [REST]  # from which number of autograd's on, a node is of which part

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        before = self._parts[-1]
        self._begin(name)
        yield
        self._begin(before)

    def inside(self, name: str, owner: Any, attribute: str) -> Any:
        """The patch with which calls of ``owner.attribute`` are of the part."""
        function = getattr(owner, attribute)

        def call(*args, **kwargs):
            with self.part(name):
                return function(*args, **kwargs)

        return mock.patch.object(owner, attribute, call)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before, name = self.launches, func.__name__.split(".")[0]
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func.namespace == "mopro_fast" and name in backends.PLAIN:
            with self, torch.no_grad():  # on CUDA tensors: their products take other operators
                getattr(reference, name)(*tree_map(_on_cuda, args))
        elif func.namespace == "mopro_fast":
            self.ours[name] += 1
        elif func.namespace == "aten" and self.launches > before:
            node = torch._C._current_autograd_node()
            part = self._parts[-1]
            if node is not None:
                part = self._parts[bisect.bisect_right(self._begun, node._sequence_nr()) - 1]
            moved = _bytes(name, args, kwargs or {}, out)
            self.operators.append(Operator(part, node is not None, moved, _flops(name, args, out)))
        return out

    def _begin(self, name: str) -> None:
        self._begun.append(torch.autograd._get_sequence_nr())
        self._parts.append(name)


WRITE_ONLY = ("copy", "zero", "new_zeros", "fill", "_foreach_copy", "_foreach_zero")  # what was there is not read
SPARSE = ("gather", "scatter_add", "index")  # touch as many values as the indices name


def _bytes(name: str, args: tuple, kwargs: dict, out: Any) -> int:
    """Each input read once, each output written once."""
    read, written = ([x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in ((args, kwargs), out))
    if name.startswith(SPARSE):
        indices = next(x for x in read if x.dtype == torch.int64)
        return indices.numel() * (indices.itemsize + 2 * read[0].itemsize)
    if not written:  # the lists of _foreach_*_
        written = [x for x in tree_leaves(args[0]) if isinstance(x, Tensor)]
    if name.startswith(WRITE_ONLY):
        read = read[len(written) :]
    return sum(min(x.numel() * x.itemsize, x.untyped_storage().nbytes()) for x in read + written)


def _flops(name: str, args: tuple, out: Any) -> int:
    """Of matrix products; convolutions are left out: both methods have the same."""
    if name not in ("mm", "addmm"):
        return 0
    return 2 * out.numel() * args[name == "addmm"].shape[1]


def _on_cuda(x: Any) -> Any:
    return torch.empty_like(x, device="cuda") if isinstance(x, Tensor) else x


def step_of(case: Case, method: str, fake: bool = False, frozen: bool = False) -> Callable[[int], None]:
    """A step of TrainStep in an epoch of STAGES; ``call.step`` is it. ``frozen``: the heads alone are trained.

    fake: as on a GPU, in bf16, on tensors without contents, whose layout cannot be changed.
    """
    config = case.config(precision="bf16" if fake else "fp32")
    config.method, config.capro.init_proto = method, 0
    config.capro.unfreeze_epoch = "never" if frozen else 0
    torch.manual_seed(0)
    model = build(config).train()
    if not fake:
        model.to(memory_format=torch.channels_last)
    model.prototypes.copy_(F.normalize(torch.randn_like(model.prototypes), dim=1))
    step = TrainStep(config, model, case.batch, torch.device("cpu"))
    step.begin_epoch(0)
    batch, number = case.images(), itertools.count()
    extra: tuple = (torch.arange(case.batch),)
    if method == "capro":
        extra += (torch.arange(case.batch) % 20 == 0, torch.zeros(2, case.batch, 3), None)

    def call(epoch: int) -> None:
        step(batch, extra, epoch, next(number), 0.01)

    call.step = step
    return call


def count(case: Case, method: str) -> dict[str, Parts]:
    """The operators of a step in each stage; not of the first step, which makes the optimizer's buffers."""
    found = {}
    with FakeTensorMode():
        call = step_of(case, method, fake=True)
        call(0)
        for stage, epoch in STAGES.items():
            with Parts() as found[stage], contextlib.ExitStack() as patches:
                if method == "capro":
                    heads = call.step.model.heads
                    for name, owner, attribute in (
                        (RECONSTRUCTION, heads.reconstruction, "forward"),
                        (AUXILIARY, heads.auxiliary, "forward"),
                        (TARGETS, capro, "soft_targets"),
                        (MIXED, capro, "cross_entropies"),
                        (SQUARED, capro, "squared_error"),
                        (SGD, optim, "_sgd_update_"),
                    ):
                        patches.enter_context(found[stage].inside(name, owner, attribute))
                call(epoch)
    return found


def counted(case: Case) -> dict:
    """What CAPro adds: launches in every stage; of the last one by part launches, bytes, flops, and microseconds."""
    steps = {method: count(case, method) for method in ("mopro", "capro")}
    added = {s: len(steps["capro"][s].operators) - len(steps["mopro"][s].operators) + INPUTS for s in STAGES}
    mopro, ours = (steps[method][CORRECTED] for method in ("mopro", "capro"))
    if ours.ours != mopro.ours:
        raise SystemExit(f"the two steps do not call the same ops: {mopro.ours} and {ours.ours}")
    rows = [row(name, [o for o in ours.operators if o.part == name], least(case)[name]) for name in PARTS]
    rows.append(rest(ours.operators, mopro.operators, case))
    waits = {method: sum(parts.waits for parts in found.values()) for method, found in steps.items()}
    result = {
        "N": case.batch,
        "Q": case.queue_size,
        "C": case.classes,
        "launches": added,
        "waits": waits,
        "parts": rows,
    }
    print(result)
    return result


def row(name: str, operators: list[Operator], cost: floor.Cost | None) -> dict:
    found = {"part": name, "forward": sum(not o.backward for o in operators)}
    found |= {"backward": len(operators) - found["forward"]}
    found |= {"bytes": sum(o.bytes for o in operators), "flops": sum(o.flops for o in operators)}
    found["us"] = {gpu: sum(microseconds(o, gpu) for o in operators) for gpu in GPUS}
    return found | {"least_bytes": cost and cost.bytes, "least_flops": cost and cost.flops}


def rest(ours: list[Operator], mopro: list[Operator], case: Case) -> dict:
    """What the parts leave of the difference: sums, metrics, gradients that meet, less MoPro's pass over the heads."""
    found, less = (row(REST, [o for o in side if o.part == REST], None) for side in (ours, mopro))
    spared = floor.sgd_ema_update_(head_elements(case)["mopro"], True).bytes
    for name in ("forward", "backward", "bytes", "flops"):
        found[name] -= less[name]
    found["forward"] += INPUTS
    found["bytes"] -= spared
    for gpu, g in GPUS.items():
        found["us"][gpu] += INPUTS * launches.LAUNCH_US - less["us"][gpu] - 1e6 * spared / g["bytes_per_s"]
    return found


def microseconds(o: Operator, gpu: str) -> float:
    g = GPUS[gpu]
    return launches.LAUNCH_US + floor.floor_us(floor.Cost(o.bytes, o.flops), g["bytes_per_s"], g["flop_per_s"])


def features_of(case: Case) -> int:
    return 8 * int(64 * case.width) * LAYERS[case.arch][0].expansion


def head_elements(case: Case) -> dict[str, int]:
    """Parameters of the heads: MoPro's, which have a momentum copy, and CAPro's."""
    f, c = features_of(case), case.classes
    projection = (f + 1) * HIDDEN + (HIDDEN + 1) * DIM
    back = (DIM + 1) * HIDDEN + (HIDDEN + 1) * f
    return {"mopro": (f + 1) * c + projection, "capro": f * c + projection + back + DIM * c}


def least(case: Case) -> dict[str, floor.Cost]:
    """What each part must move and multiply; the reconstruction's gradient ends at z."""
    n, c, f = case.batch, case.classes, features_of(case)
    inner, outer = floor.linear(n, DIM, HIDDEN, 2, into=False), floor.linear(n, HIDDEN, f, 2, into=True)
    return {
        RECONSTRUCTION: floor.Cost(inner.bytes + outer.bytes, inner.flops + outer.flops),
        AUXILIARY: floor.linear(n, DIM, c, 2, into=True),
        TARGETS: floor.collective_targets(n, c, case.queue_size, DIM, 4),
        MIXED: floor.cross_entropies(n, c, 2),
        SQUARED: floor.squared_error(n, f, 2),
        SGD: floor.sgd_update_(head_elements(case)["capro"]),
    }


def timed(case: Case, rounds: int) -> dict:
    """Medians of a step of each method in each stage, and of CAPro's over MoPro's, round by round."""
    mopro, ours, frozen = step_of(case, "mopro"), step_of(case, "capro"), step_of(case, "capro", frozen=True)
    calls = {(name, s): (call, e) for s, e in STAGES.items() for name, call in (("mopro", mopro), ("capro", ours))}
    calls["capro", FROZEN] = frozen, STAGES[CORRECTED]
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for number in range(WARM_UP + rounds):
        for key, (call, epoch) in calls.items():
            began = time.perf_counter()
            call(epoch)
            if number >= WARM_UP:
                times[key].append(1e3 * (time.perf_counter() - began))
    stages = {}
    for stage in (*STAGES, FROZEN):
        peer, own = times["mopro", CORRECTED if stage == FROZEN else stage], times["capro", stage]
        ratio = statistics.median(a / b for a, b in zip(own, peer, strict=True))
        stages[stage] = {"mopro_ms": statistics.median(peer), "capro_ms": statistics.median(own), "ratio": ratio}
    result = {"N": case.batch, "Q": case.queue_size, "C": case.classes, "stages": stages}
    print(result)
    return result


if __name__ == "__main__":
    raise SystemExit(main())
