"""One training step on the device, from a batch to updated weights and sums; on a GPU a CUDA graph.

Nothing in it waits for the device: learning rate and step number are written there beforehand, and what it adds up is
read when it is logged.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mopro_fast import distributed
from mopro_fast.checkpoints.fields import check_optimizer_fits, require, said
from mopro_fast.checkpoints.state import RunState
from mopro_fast.config import Settings
from mopro_fast.data.batches import Batch
from mopro_fast.distributed import gather_rows
from mopro_fast.errors import UserError
from mopro_fast.labels import REMOVED, UNSEEN
from mopro_fast.models.method import Method, StepOutput
from mopro_fast.models.precision import low_precision
from mopro_fast.training.graph import Graphed
from mopro_fast.training.optim import build_optimizer
from mopro_fast.transfer import to_device

_WARM_UP, _WARM_UP_DDP = 3, 11  # eager steps before a capture; the second is what PyTorch asks for under DDP


class TrainStep:
    """Trains ``model`` step by step and keeps what the log and the checkpoints need of it, on the device."""

    def __init__(self, config: Settings, model: Method, images: int, device: torch.device) -> None:
        """images: how many the index has; ids of batches lie below. The model has its weights already.

        Of the config optim and run are read.
        """
        self.model, self.device = model, device
        self.bf16 = uses_bf16(config, device)
        self._graphed = device.type == "cuda" and config.run.cuda_graph
        query, key = model.query, model.key
        copies: dict[Tensor, Tensor] = {}
        if self.bf16 and config.run.bf16_weights:
            query, copies = low_precision(query, torch.bfloat16)
            if key is not None:
                key, of_key = low_precision(key, model.key_dtype or torch.bfloat16)
                copies |= of_key
        if config.run.compile:
            for encoder in (query, key):
                if encoder is not None:
                    encoder.compile(dynamic=False)  # DDP's first pass has images of another size
        self.optimizer = build_optimizer(
            model.trained(),
            config.optim,
            None if model.encoder_k is None else model.followers(),
            model.key_momentum,
            copies=copies,
            lr_on_device=self._graphed,
        )
        self.query, self.key, self._bare = query, key, query
        self._share_gradients()
        warm_up = _WARM_UP if distributed.alone() else _WARM_UP_DDP
        self._call = Graphed(self._run, warm_up) if self._graphed else self._run

        self.sums = torch.zeros(2, len(model.METRICS), dtype=torch.float64, device=device)
        """Of each metric: since the last entry of the log, in this epoch."""
        self.counts = [0, 0]
        """How many steps the sums cover."""
        self.assigned = torch.full((images,), UNSEEN, dtype=torch.int32, device=device)
        """The label that each image was trained with in this epoch, REMOVED or UNSEEN."""
        self.winners = torch.zeros(model.encoder_q.classifier.out_features, 2, dtype=torch.int64, device=device)
        """Of each class in this epoch: how many rows label correction preferred it for, and the sum of its scores in
        units of 2⁻²⁰: whole numbers, whose sum does not depend on the order."""
        self.bad_step = torch.full((1,), -1, dtype=torch.int64, device=device)
        """The first step whose loss was not finite; -1: none."""
        self._step = torch.zeros(1, dtype=torch.int64, device=device)

    def begin_epoch(self, epoch: int) -> None:
        """Freeze and unfreeze what the model says; before the first step of this process in this epoch. Collective."""
        if self.model.set_frozen(epoch):
            self.close()
            self._share_gradients()

    def _share_gradients(self) -> None:
        """Average the gradients of the parameters that now require one over the ranks."""
        self.query = self._bare
        self.model.compute_with(self.query, self.key)  # the last wrapper goes, and its hooks
        if not distributed.alone():
            dtype = next(self._bare.parameters()).dtype
            example = torch.zeros(2, 3, 32, 32, device=self.device, dtype=dtype)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                self.query = distributed.data_parallel(self._bare, example)
            self.model.compute_with(self.query, self.key)

    def __call__(
        self, batch: Batch, extra: Tensor | tuple[Tensor, ...] | None, epoch: int, step: int, lr: float | list[float]
    ) -> StepOutput:
        """The step number ``step`` of ``epoch``.

        extra: what the model's ``forward`` takes beside the batch, as Task.batches gives it; for MoPro ``place`` alone
        will do. lr: one for each group of parameters, or one for all.
        """
        self._step.fill_(step)
        groups = self.optimizer.param_groups
        for group, rate in zip(groups, lr if isinstance(lr, list) else [lr] * len(groups), strict=True):
            if isinstance(group["lr"], Tensor):  # a number would be baked into the graph
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self.counts = [n + 1 for n in self.counts]
        extra = () if extra is None else extra if isinstance(extra, tuple) else (extra,)
        return self._call(self.model.phase(epoch), batch.view_q, batch.view_k, batch.labels, batch.ids, *extra)

    def _run(
        self, epoch: int, view_q: Tensor, view_k: Tensor | None, labels: Tensor, ids: Tensor, *extra: Tensor
    ) -> StepOutput:
        self.optimizer.zero_grad(set_to_none=True)  # first: what is left of an earlier graph would keep its memory
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            out = self.model(view_q, view_k, labels, epoch, *extra)
        out.loss.backward()
        self.optimizer.step()  # with it the key encoder: step 2 of the method
        self.sums += torch.stack([out.metrics[name] for name in self.model.METRICS])
        self.assigned[ids] = torch.where(out.kept, out.labels, REMOVED).to(torch.int32)
        if out.winner is not None:
            scored = torch.stack([torch.ones_like(out.winner), (out.score * 2**20).to(torch.int64)], 1)
            self.winners.index_add_(0, out.winner.clamp(min=0), torch.where(out.winner[:, None] >= 0, scored, 0))
        first_bad = (self.bad_step < 0) & ~out.loss.detach().isfinite()
        self.bad_step.copy_(torch.where(first_bad, self._step, self.bad_step))
        return dataclasses.replace(out, loss=out.loss.detach())

    def means(self, which: int) -> dict[str, float]:
        """The metrics' means over all ranks: which=0 since the last call, 1 in this epoch. Starts the sums anew."""
        sums, ranks = gather_rows(self.sums[which][None]).sum(0), distributed.world()[1]
        means = dict(zip(self.model.METRICS, (sums / (ranks * self.counts[which])).tolist(), strict=True))
        self.sums[which] = 0
        self.counts[which] = 0
        return dict(sorted(means.items()))

    def require_finite(self, epoch: int, step: int, last: Callable[[], str], weights: bool = False) -> None:
        """Raise a UserError for the first step of any rank whose loss was not finite, and ``last()``.

        weights: or for weights that are not finite; all losses can be and the weights after the last of them not.
        Collective.
        """
        found = [
            f"the loss is not finite at epoch {epoch + 1}, step {bad + 1}, rank {rank}"
            for rank, bad in enumerate(gather_rows(self.bad_step).tolist())
            if bad >= 0
        ]
        if weights and not bool(torch.stack(torch._foreach_norm(list(self.model.parameters()))).isfinite().all()):
            found.append(f"weights are not finite at epoch {epoch + 1}, step {step}, rank {distributed.world()[0]}")
        if found:
            raise UserError(f"{found[0]}; {last()}; try a lower --lr or some --warmup-epochs")

    def close(self) -> None:
        """Free the CUDA graph: NCCL, when it is shut down, waits until no graph has its collectives any more."""
        if self._graphed:
            self._call.free()

    def save_into(self, state: RunState) -> None:
        """Its part of a checkpoint. Collective: every rank must call it."""
        sums = gather_rows(self.sums[None]).cpu()  # [W, 2, metrics]
        state.sums = {name: sums[:, :, i] for i, name in enumerate(self.model.METRICS)}
        state.counts, state.assigned, state.winners = list(self.counts), self.decisions(), self.preferred()
        state.optimizer = self.optimizer.state_dict()

    def load_from(self, state: RunState, path: str | Path = "the checkpoint") -> None:
        """Another number of ranks shares out the mean of their sums: the log alone differs then.

        path: of the checkpoint, for the message where it does not fit (fields.Damaged).
        """
        check_optimizer_fits(state.optimizer, self.optimizer, path)
        for name in state.sums:
            require(name in self.model.METRICS, path, f"sums.{name}", "there", f"metrics of {self.model.METRICS}")
        for name in ("assigned", "winners"):
            t, own = getattr(state, name), getattr(self, name)
            require(not len(t) or t.shape == own.shape, path, name, t, said(own))
        self.optimizer.load_state_dict(state.optimizer)
        rank, ranks = distributed.world()
        for name, saved in state.sums.items():
            i = self.model.METRICS.index(name)
            self.sums[:, i] = saved[rank] if len(saved) == ranks else saved.mean(0)
        self.counts = list(state.counts)
        if len(state.assigned):  # checkpoints of format 1 of re-training and fine-tuning have none
            self.assigned.copy_(state.assigned)
        if rank == 0 and len(state.winners):  # a sum over ranks
            self.winners.copy_(state.winners)

    def end_epoch(self) -> tuple[Tensor, Tensor]:
        """-> :meth:`decisions` and :meth:`preferred` of the epoch; both begin anew. Collective."""
        assigned, winners = self.decisions(), self.preferred()
        if assigned is self.assigned:
            assigned = assigned.clone()
        self.assigned.fill_(UNSEEN)
        self.winners.zero_()
        return assigned, winners

    def preferred(self) -> Tensor:
        """int64 [C, 2] on the CPU: ``winners`` of all ranks."""
        return gather_rows(self.winners[None]).sum(0).cpu()

    def decisions(self) -> Tensor:
        """int32 [images] on the CPU: ``assigned`` of all ranks; itself, where it is alone and there."""
        merged = self.assigned
        if not distributed.alone():
            merged = merged.clone()
            torch.distributed.all_reduce(merged, torch.distributed.ReduceOp.MAX)
        return merged.cpu()


def uses_bf16(config: Settings, device: torch.device) -> bool:
    if config.run.precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return config.run.precision == "bf16"


class Shuffle:
    """Exchanges view_k's rows among the ranks, those of the next batch while this one is trained on."""

    def __init__(self, seed: int, rows: int) -> None:
        """rows: of all ranks."""
        self._seed, self._rows = seed, rows
        # A group of its own, so that an exchange does not queue up behind the step's collectives.
        self._group = None if distributed.alone() else distributed.new_group()

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
        place = to_device(np.argsort(order), batch.labels.device)
        return lambda: (batch._replace(view_k=shuffled()), place)
