"""Launches and host synchronisations of one step, the official formulation and ours: counted, no GPU needed.

    python bench/launches.py [--results FOLDER] [--cache FOLDER]

Official (mopro_fast/benchmark/official.py): PyTorch operators that compute something, each at least one launch on a
GPU; reads of a scalar and boolean indexing make the host wait. Ours: Triton launches intercepted at the launcher, CUDA
launches counted by the host build of csrc/, and PyTorch's operators as above.
"""

import argparse
import collections
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import record  # first: it sets what OpenMP reads when torch is imported

# isort: split
import cases
import torch
import torch.nn.functional as F
import variants
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import compile_kernels
import host_cuda

from mopro_fast import kernels
from mopro_fast.benchmark.throughput import Case
from mopro_fast.kernels import batch_norm_stats
from mopro_fast.models.build import build
from mopro_fast.models.resnet import GroupedBatchNorm2d
from mopro_fast.models.speedups import turn_on
from mopro_fast.ops import backends, cuda, reference
from mopro_fast.training.step import TrainStep

LAUNCH_US = 1.5  # from kernel to kernel in a CUDA graph, beside what memory or products take: assumed
FREE = ("empty", "new_empty", "detach", "lift", "alias")  # beside views: nothing is computed


class Counter(TorchDispatchMode):
    """Operators that launch, and those that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        flat = tree_leaves((args, kwargs))
        masked = name.startswith("index") and any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in flat)
        self.waits += name == "_local_scalar_dense" or masked
        ours = func.namespace == "mopro_fast"  # its launches are counted where they happen
        self.launches += not (func.is_view or ours or name.startswith(FREE) or name == "_local_scalar_dense")
        return func(*args, **(kwargs or {}))


def counted(call: Callable) -> dict[str, int]:
    with Counter() as counter:
        call()
    return {"launches": counter.launches, "waits": counter.waits}


def counted_on_our_backends(call: Callable, module) -> dict[str, int]:
    def choose(op: str, _device: str, _choice: str) -> str:
        return "triton" if op in backends.TRITON else "cuda"

    before = module.launches()
    with (
        mock.patch.object(backends, "choose", choose),
        mock.patch.object(cuda, "_launch", lambda name, *args: getattr(module, name)(*args, 0)),
    ):
        backends._implementation.cache_clear()
        found: dict[str, int] = {}
        triton = compile_kernels.launches(lambda: found.update(counted(call)))
        backends._implementation.cache_clear()
    found["launches"] += len(triton) + module.launches() - before
    return found


def require(parser: argparse.ArgumentParser) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("unset TRITON_INTERPRET: there is no launcher to intercept in the interpreter")
    if host_cuda.COMPILER is None:
        parser.error("no C++ compiler: set CXX")


@contextlib.contextmanager
def counting(cache: Path | None):
    """The host build of csrc/, which counts its launches and runs nothing."""
    with tempfile.TemporaryDirectory() as folder:
        module = host_cuda.load(host_cuda.build(cache or Path(folder)))
        module.order(-1)
        yield module


class OfStep(Counter):
    """Launches of a step on tensors without contents, by name: of an op of ours those that its implementation for a GPU
    makes, of a convolution's backward pass one for each gradient, of PyTorch's other operators one."""

    def __init__(self, module) -> None:
        """module: of host_cuda."""
        super().__init__()
        self.by_name: collections.Counter[str] = collections.Counter()
        self._module = module

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, before = func.__name__.split(".")[0], self.launches
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func.namespace == "mopro_fast":
            with self, torch.no_grad(), torch.autocast("cpu", enabled=False):
                self.by_name[name] += self._ours(name, args)
        elif func.namespace == "aten" and self.launches > before:
            self.by_name[name] += sum(args[-1]) if name == "convolution_backward" else 1  # its output_mask
        return out

    def _ours(self, name: str, args: tuple) -> int:
        """Beside PyTorch's operators in it."""
        if name in backends.TRITON:
            return len(compile_kernels.launches(lambda: getattr(kernels, name)(*args)))
        if name in backends.PLAIN:
            getattr(reference, name)(*args)
            return 0
        before = self._module.launches()
        with (
            unset_fake_temporarily(),
            mock.patch.object(cuda, "_launch", lambda of, *a: getattr(self._module, of)(*a, 0)),
        ):
            getattr(cuda, name)(*tree_map(_without_contents, args))
        return self._module.launches() - before


def _without_contents(x):
    """Memory that nothing touches is not there."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) if isinstance(x, torch.Tensor) else x


def of_step(case: Case, module, *names: str) -> collections.Counter[str]:
    """Launches of MoPro's step in bf16, labels corrected, with these of models/speedups.py on; not of the first step,
    which makes the optimizer's buffers and BatchNorm's counts, nor the copies of a batch into a CUDA graph."""
    counts = {(torch.device("cpu"), 0): torch.zeros(1024, dtype=torch.int32)}
    with mock.patch.dict(batch_norm_stats._ARRIVALS, counts), FakeTensorMode():
        config = case.config(precision="bf16")
        model = build(config).train()
        for m in model.modules():
            if isinstance(m, GroupedBatchNorm2d):
                m.fused = "on"
            if isinstance(m, nn.Conv2d):  # fake tensors cannot change their layout
                low = m.weight.detach().contiguous(memory_format=torch.channels_last)
                m.weight = nn.Parameter(low, m.weight.requires_grad)
        model.prototypes.copy_(F.normalize(torch.randn_like(model.prototypes), dim=1))
        turn_on(model, *names)
        step = TrainStep(config, model, case.batch, torch.device("cpu"))
        batch, place, epoch = case.images(), torch.arange(case.batch), config.mopro.start_clean
        step(batch, place, epoch, 0, 0.01)
        with OfStep(module) as counter:
            step(batch, place, epoch, 1, 0.01)
    return counter.by_name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    parser.add_argument("--cache", type=Path, help="where the host build of csrc/ is kept")
    a = parser.parse_args()
    require(parser)
    wanted = [
        cases.Case("head", cases.PAPER),
        cases.Case("head", cases.replace(cases.PAPER, M=cases.GATHERED)),
        cases.Case("ema_update_", cases.Shape(model="resnet50")),
        cases.Case("sgd_ema_update_", cases.Shape(model="resnet50", shadows=True)),
    ]
    rows = []
    with counting(a.cache) as module:
        for case in wanted:
            op = variants.OPS[case.op]
            row = {"op": case.op, "settings": case.settings, "official": counted(op.official(case.state("cpu")))}
            row["ours"] = counted_on_our_backends(op.ours(case.state("cpu")), module)
            rows.append(row)
            print(case.name, row["official"], row["ours"])
    print(record.write("launches", {"rows": rows}, a.results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
