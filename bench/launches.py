"""Launches and host synchronisations of one step, the official formulation and ours: counted, no GPU needed.

    python bench/launches.py [--results FOLDER] [--cache FOLDER]

Official (mopro_fast/benchmark/official.py): PyTorch operators that compute something, each at least one launch on a
GPU; reads of a scalar and boolean indexing make the host wait. Ours: Triton launches intercepted at the launcher, CUDA
launches counted by the host build of csrc/, and PyTorch's operators as above.
"""

import argparse
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
import variants
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import compile_kernels
import host_cuda

from mopro_fast.ops import backends, cuda

FREE = ("empty", "new_empty", "detach", "lift", "alias")  # beside views: nothing is computed


class Counter(TorchDispatchMode):
    """Operators that launch, and those that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        flat = torch.utils._pytree.tree_leaves((args, kwargs))
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    parser.add_argument("--cache", type=Path, help="where the host build of csrc/ is kept")
    a = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("unset TRITON_INTERPRET: there is no launcher to intercept in the interpreter")
    if host_cuda.COMPILER is None:
        parser.error("no C++ compiler: set CXX")
    wanted = [
        cases.Case("head", cases.PAPER),
        cases.Case("head", cases.replace(cases.PAPER, M=cases.GATHERED)),
        cases.Case("ema_update_", cases.Shape(model="resnet50")),
        cases.Case("sgd_ema_update_", cases.Shape(model="resnet50", shadows=True)),
    ]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        module = host_cuda.load(host_cuda.build(a.cache or Path(folder)))
        module.order(-1)  # count only
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
