"""The tasks of ``mopro-fast train``: MoPro, CAPro and plain cross-entropy."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from contextlib import closing

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mopro_fast import peers
from mopro_fast.config import CAPRO, MOPRO, TrainConfig
from mopro_fast.console import Progress, plural
from mopro_fast.data import inputs
from mopro_fast.data.anchors import read_anchors, table_at
from mopro_fast.data.batches import Batch
from mopro_fast.data.index import Index
from mopro_fast.distributed import by_rank0, gather_lists, gather_rows, say, world
from mopro_fast.errors import UserError
from mopro_fast.models.build import build
from mopro_fast.models.method import Method
from mopro_fast.ops.colour import principal_shifts
from mopro_fast.training.step import Shuffle
from mopro_fast.training.task import Task
from mopro_fast.transfer import to_device

COLOUR = 5  # first word of the generator's seed; data/ has 0 to 2 and 4, supervised.py 3
STEP, START = 0, 1  # its third: a training step, the prototypes' start


class CrossEntropyTask(Task):
    """Plain cross-entropy on the given labels."""

    config: TrainConfig
    free = MOPRO | CAPRO

    def build(self) -> Method:
        return build(self.config)


class MoProTask(Task):
    """MoPro: view_k's rows change ranks before the step."""

    config: TrainConfig
    free = CAPRO
    two_views = True

    def advice(self, relabelling: bool) -> str:
        ways = ["begin label correction later (--start-clean)"]
        ways += ["raise --threshold"] * relabelling + ["set --calibrate True"] * (not self.config.mopro.calibrate)
        return ", or ".join(ways)

    def build(self) -> Method:
        return build(self.config)

    @functools.cached_property
    def _shuffle(self) -> Shuffle:  # once: it makes a process group
        return Shuffle(self.config.run.seed, self.config.optim.batch_size)

    def batches(self, batches: Iterable[Batch], global_step: int) -> Iterator[tuple[Batch, tuple[Tensor, ...]]]:
        return ((batch, (place,)) for batch, place in self._shuffle(batches, global_step))


class CAProTask(MoProTask):
    """CAPro: MoPro's, with anchors and colour shifts. Prototypes start from the anchors at ``init_proto``."""

    free = frozenset()
    begins_with = "table of --anchors"

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        if config.capro.anchors:
            table_at(config.capro.anchors)  # before the images are checked

    def advice(self, relabelling: bool) -> str:
        return ", or ".join(["begin label correction later (--start-clean)"] + ["raise --threshold"] * relabelling)

    def shown(self, index: Index) -> tuple[Index, np.ndarray | None]:
        if path := self.config.capro.anchors:
            self._anchors = by_rank0(lambda: read_anchors(path, index))
            self.initial = self._anchors.digest
            others = by_rank0(lambda: np.union1d(index.left_out, np.flatnonzero(~self._anchors.mask)))
            self._shown_anchors = dataclasses.replace(index, left_out=others)
            if not self._shown_anchors.num_usable:
                raise UserError(f"--anchors {path}: none of its images is shown: they are held out or cannot be read")
            if self.config.capro.row_weights and self._anchors.weights is None:
                raise UserError(
                    f"--row-weights True: --anchors {path} has no column weight: add it, or leave the option out"
                )
        return index, None

    def begin_epoch(self, model: Method, epoch: int, device: torch.device, bf16: bool) -> None:
        """The prototypes become the means of their anchors' embeddings, by the key encoder, with view_q's crops."""
        if not model.starts(epoch):
            return
        anchors, (rank, ranks) = self._shown_anchors, world()
        loader = inputs.train_loader(self.config, anchors, device, two_views=False, whole=True)
        size, classes, sums, lost = self.config.optim.batch_size // ranks, len(model.prototypes), 0, []
        with closing(loader), Progress("prototypes", loader.steps_per_epoch, "batches", active=rank == 0) as bar:
            for step, batch in enumerate(loader.epoch(epoch)):
                peers.moved()
                shifts = self._shifts((START, epoch, step), 1, device)
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    z = model.embed(batch.view_q, None if shifts is None else shifts[0])
                # Each anchor once: neither those that fill the last batch nor another in the place of a broken one.
                rows, shown = loader.rows(epoch, step), batch.ids.cpu().numpy()
                real = np.arange(size) + (step * ranks + rank) * size < anchors.num_usable
                lost += rows[real & (rows != shown)].tolist()
                use = to_device((real & (rows == shown))[:, None], device)
                z = torch.cat([z, torch.ones_like(z[:, :1])], 1).double() * use
                sums = sums + F.one_hot(batch.labels, classes).T.double() @ z  # [C, D + 1]
                bar.update()
        if lost := gather_lists(lost):
            say(f"{plural(len(lost), 'anchor')} cannot be read any more, such as {anchors.name(lost[0])}: left out")
        sums, count = gather_rows(sums[None]).sum(0).split([sums.shape[1] - 1, 1], 1)
        model.prototypes.copy_(F.normalize(sums / (count + 1e-6), dim=1))

    def batches(self, batches: Iterable[Batch], global_step: int) -> Iterator[tuple[Batch, tuple[Tensor | None, ...]]]:
        mask = weights = None
        for step, (batch, (place,)) in enumerate(super().batches(batches, global_step), global_step):
            device = batch.labels.device
            if mask is None and self.initial:
                mask = to_device(self._anchors.mask, device)
                weights = to_device(self._anchors.weights, device) if self.config.capro.row_weights else None
            anchors, of_rows = (None if table is None else table[batch.ids] for table in (mask, weights))
            yield batch, (place, anchors, self._shifts((STEP, step), 2, device), of_rows)

    def _shifts(self, position: tuple[int, ...], views: int, device: torch.device) -> Tensor | None:
        """Colour shifts float32 [views, N, 3] of this rank's rows: a function of the seed and the position."""
        c, (rank, ranks) = self.config, world()
        if not c.capro.colour_shift:
            return None
        size = c.optim.batch_size // ranks
        rng = np.random.default_rng((COLOUR, c.run.seed, *position))
        draws = rng.normal(scale=c.capro.colour_shift, size=(views, ranks * size, 3))[:, rank * size :][:, :size]
        return to_device(principal_shifts(draws.reshape(-1, 3)).reshape(views, size, 3), device)


TASKS = {"mopro": MoProTask, "capro": CAProTask, "ce": CrossEntropyTask}


def task_of(config: TrainConfig) -> Task:
    """The task of ``config.method``."""
    return TASKS[config.method](config)
