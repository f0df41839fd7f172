"""Predicted peak memory of a training step per GPU, by part: no memory and no GPU are used.

    python bench/memory.py [--rows 256 512 1024] [--classes 1000 5000] ...    every assumption is an argument

The real step of the real model runs on fake tensors, which have sizes and no contents. Counted are the storages that it
makes and drops, as PyTorch does on a GPU, and those that autograd keeps for the backward pass. What a GPU's libraries
take besides is assumed.
"""

import contextlib
import weakref
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import record  # first: it sets what OpenMP reads when torch is imported

# isort: split
import torch
import tyro
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mopro_fast.config import DataConfig, OptimConfig, RunConfig, TrainConfig
from mopro_fast.data.pipeline import Batch
from mopro_fast.models.build import build
from mopro_fast.training.step import TrainStep


@dataclass
class Assumptions:
    """What is predicted, and what is assumed of it."""

    rows: tuple[int, ...] = (256, 512, 1024)
    """N, rows per GPU."""
    classes: tuple[int, ...] = (1000, 5000)
    """C."""
    px: int = 224
    """Side of the views."""
    batches: int = 5
    """Batches of two views in memory: the one trained on, the graph's copy of it, and those ahead of it, one in the
    exchange among the ranks (counted as two: what is sent and what is received) and one in the loader."""
    loader_gb: float = 2.0
    """Of the GPU's image decoder: assumed."""
    libraries_gb: float = 2.0
    """CUDA's context, kernels, NCCL's buffers, workspaces of cuDNN and cuBLAS: assumed."""
    slack: float = 0.05
    """Share that the graph's memory pool loses to rounding and gaps, of what it holds: assumed."""
    budget_gb: float = 80.0
    """The GPU's memory, 10⁹ bytes."""
    results: str = str(record.RESULTS)
    """Folder of the result file."""


class Live(TorchDispatchMode):
    """Bytes of the storages made inside the mode that are alive: ``now``, and the ``most`` there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._note(x.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Storages that autograd keeps for the backward pass of what runs inside, each once, without those of ``known``."""

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        known = {x.untyped_storage()._cdata for x in known}
        self.storages: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage._cdata not in known:
                self.storages[storage._cdata] = storage.nbytes()
            return x

        super().__init__(pack, lambda x: x)

    @property
    def bytes(self) -> int:
        return sum(self.storages.values())


def size(tensors: Iterable[Tensor | None]) -> int:
    """Bytes, a storage once however many tensors share it."""
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors if x is not None}.values())


def step_parts(config: TrainConfig, rows: int, fake: bool = True) -> dict[str, int]:
    """Bytes of a step's parts in the last phase, with the bf16 copies of ``config``; the last one is what else is
    alive at the peak: the activations and gradients of the moment, the key encoder's, and the head's.
    """
    px = config.data.image_size
    with FakeTensorMode() if fake else contextlib.nullcontext(), Live() as live:
        model = build(config).train()
        step = TrainStep(config, model, rows, torch.device("cpu"))
        views = torch.zeros(2, rows, px, px, 3, dtype=torch.uint8)
        numbers = torch.zeros(rows, dtype=torch.int64)
        batch, place = Batch(*views.unbind(), numbers, numbers.clone()), numbers.clone()
        epoch, optimizer = config.mopro.start_clean, step.optimizer
        step(batch, place, epoch, 0, 0.0)  # makes the optimizer's buffers
        grads = [p.grad for p in step.query.parameters()]
        state = {
            "float32 weights of both encoders": list(model.parameters()),
            "SGD's momentum": [x["momentum_buffer"] for x in optimizer.state.values()],
            "bf16 copies of both": [*optimizer.param_shadows, *optimizer.target_shadows],
            "queue, prototypes, BatchNorm statistics": list(model.buffers()),
        }
        parts = {name: size(tensors) for name, tensors in state.items()} | {"gradients": size(grads)}
        optimizer.zero_grad(set_to_none=True)
        del grads
        live.most = before = live.now
        saved = Saved(x for x in tree_leaves(state) if x is not None)
        with saved:
            step(batch, place, epoch, 1, 0.0)
        parts["activations kept for the backward pass"] = saved.bytes
        parts["else, at the peak"] = live.most - before - saved.bytes
    return parts


def predicted(a: Assumptions, rows: int, classes: int) -> dict:
    config = TrainConfig(
        data=DataConfig(num_classes=classes, image_size=a.px),
        optim=OptimConfig(batch_size=rows),
        run=RunConfig(precision="bf16"),
    )
    parts = step_parts(config, rows)
    parts["batches"] = a.batches * 2 * rows * a.px * a.px * 3
    parts["gaps in the pool (assumed)"] = round(a.slack * sum(parts.values()))
    parts["image decoder (assumed)"] = round(a.loader_gb * 1e9)
    parts["libraries (assumed)"] = round(a.libraries_gb * 1e9)
    return {"N": rows, "C": classes, "parts": parts, "total": sum(parts.values())}


def main(a: Assumptions) -> None:
    cases = []
    for classes in a.classes:
        for rows in a.rows:
            cases.append(predicted(a, rows, classes))
            print(f"N={rows} C={classes}: {cases[-1]['total'] / 1e9:.1f} GB of {a.budget_gb:g}")
    settings = {name: value for name, value in asdict(a).items() if name != "results"}
    print(record.write("memory", {"assumptions": settings, "cases": cases}, a.results))


if __name__ == "__main__":
    main(tyro.cli(Assumptions, description=__doc__))
