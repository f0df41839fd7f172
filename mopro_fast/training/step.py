"""One training step on the device, from a batch to updated weights and sums; on a GPU a CUDA graph.

Nothing in it waits for the device: learning rate and step number are written there beforehand, and what it adds up is
read when it is logged.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mopro_fast import distributed
from mopro_fast.config import TrainConfig
from mopro_fast.data.pipeline import Batch
from mopro_fast.labels import REMOVED, UNSEEN
from mopro_fast.models.baseline import CrossEntropy
from mopro_fast.models.mopro import MoPro, StepOutput
from mopro_fast.models.precision import low_precision
from mopro_fast.training.graph import Graphed
from mopro_fast.training.optim import build_optimizer

_WARM_UP, _WARM_UP_DDP = 3, 11  # eager steps before a capture; the second is what PyTorch asks for under DDP


class TrainStep:
    """Trains ``model`` step by step and keeps what the log and the checkpoints need of it, on the device."""

    def __init__(self, config: TrainConfig, model: MoPro | CrossEntropy, images: int, device: torch.device) -> None:
        """images: how many the index has; ids of batches lie below. The model has its weights already."""
        self.model, self.device = model, device
        self.bf16 = uses_bf16(config, device)
        self._graphed = device.type == "cuda" and config.run.cuda_graph
        mopro = isinstance(model, MoPro)
        self.query, self.key = model.encoder_q, model.encoder_k if mopro else None
        shadows: dict[str, list[Tensor | None]] = {}
        if self.bf16 and mopro and config.run.bf16_weights:
            self.query, shadows["param_shadows"] = low_precision(self.query, torch.bfloat16)
            self.key, shadows["target_shadows"] = low_precision(self.key, torch.bfloat16)
        if config.run.compile:
            for encoder in (self.query, self.key):
                if encoder is not None:
                    encoder.compile(dynamic=False)  # DDP's first pass has images of another size
        # A float lr would be baked into the graph.
        self.lr = torch.zeros(1, device=device) if self._graphed else None
        self.optimizer = build_optimizer(
            model.encoder_q,
            config.optim,
            list(model.encoder_k.parameters()) if mopro else None,
            config.mopro.key_momentum,
            lr=self.lr,
            **shadows,
        )
        if not distributed.alone():
            example = torch.zeros(2, 3, 32, 32, device=device, dtype=self.query.conv1.weight.dtype)
            self.query = distributed.data_parallel(self.query, example)
        warm_up = _WARM_UP if distributed.alone() else _WARM_UP_DDP
        self._call = Graphed(self._run, warm_up) if self._graphed else self._run

        self.sums = torch.zeros(2, len(model.METRICS), dtype=torch.float64, device=device)
        """Of each metric: since the last entry of the log, in this epoch."""
        self.assigned = torch.full((images,), UNSEEN, dtype=torch.int32, device=device)
        """The label that each image was trained with in this epoch, REMOVED or UNSEEN."""
        self.bad_step = torch.full((1,), -1, dtype=torch.int64, device=device)
        """The first step whose loss was not finite; -1: none."""
        self._step = torch.zeros(1, dtype=torch.int64, device=device)

    def __call__(self, batch: Batch, place: Tensor | None, epoch: int, step: int, lr: float) -> StepOutput:
        """The step number ``step`` of ``epoch``. ``batch.view_k`` and ``place``: as MoPro.forward takes them."""
        self._step.fill_(step)
        if self.lr is not None:
            self.lr.fill_(lr)
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
        return self._call(self.model.phase(epoch), batch.view_q, batch.view_k, batch.labels, batch.ids, place)

    def _run(self, epoch: int, view_q: Tensor, view_k: Tensor, labels: Tensor, ids: Tensor, place: Tensor):
        self.optimizer.zero_grad(set_to_none=True)  # first: what is left of an earlier graph would keep its memory
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            out = self.model(view_q, view_k, labels, epoch, place, self.query, self.key)
        out.loss.backward()
        self.optimizer.step()  # with it the key encoder: step 2 of the method
        self.sums += torch.stack([out.metrics[name] for name in self.model.METRICS])
        self.assigned[ids] = torch.where(out.kept, out.labels, REMOVED).to(torch.int32)
        first_bad = (self.bad_step < 0) & ~out.loss.detach().isfinite()
        self.bad_step.copy_(torch.where(first_bad, self._step, self.bad_step))
        return StepOutput(out.loss.detach(), out.metrics, out.labels, out.kept)

    def close(self) -> None:
        """Free the CUDA graph: NCCL, when it is shut down, waits until no graph has its collectives any more."""
        if self._graphed:
            self._call.free()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside model and optimizer. Collective: every rank must call it."""
        sums = distributed.gather_rows(self.sums[None]).cpu()  # [W, 2, metrics]
        names = self.model.METRICS
        return {"sums": {name: sums[:, :, i] for i, name in enumerate(names)}, "assigned": self.decisions()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Another number of ranks shares out the mean of their sums: the log alone differs then. sums: may be empty."""
        rank, ranks = distributed.world()
        for name, saved in state["sums"].items():
            i = self.model.METRICS.index(name)
            self.sums[:, i] = saved[rank] if len(saved) == ranks else saved.mean(0)
        self.assigned.copy_(state["assigned"])

    def decisions(self) -> Tensor:
        """int32 [images] on the CPU: ``assigned`` of all ranks."""
        merged = self.assigned.clone()
        if not distributed.alone():
            torch.distributed.all_reduce(merged, torch.distributed.ReduceOp.MAX)
        return merged.cpu()


def uses_bf16(config: TrainConfig, device: torch.device) -> bool:
    if config.run.precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return config.run.precision == "bf16"


class Shuffle:
    """Exchanges view_k's rows among the ranks, those of the next batch while this one is trained on."""

    def __init__(self, seed: int, rows: int) -> None:
        """rows: of all ranks."""
        self._seed, self._rows = seed, rows
        # A group of its own, so that an exchange does not queue up behind the step's collectives.
        self._group = None if distributed.alone() else torch.distributed.new_group()

    def __call__(self, batches, global_step: int):
        """Of each batch (the first is that of ``global_step``): the batch with view_k shuffled, and ``place``."""
        pending = None
        for batch in batches:
            following = self._start(batch, global_step)
            global_step += 1
            if self._group is None:
                yield following()
                continue
            if pending:
                yield pending()
            pending = following
        if pending:
            yield pending()

    def _start(self, batch: Batch, global_step: int):
        if batch.view_k is None:
            return lambda: (batch, None)
        order = distributed.shuffle_order(self._seed, global_step, self._rows)
        shuffled = distributed.start_exchange(batch.view_k, order, self._group)
        place = distributed.to_device(np.argsort(order), batch.labels.device)
        return lambda: (batch._replace(view_k=shuffled()), place)
