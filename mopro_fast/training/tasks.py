"""The tasks of ``mopro-fast train``: MoPro and plain cross-entropy."""

import functools
from collections.abc import Iterable, Iterator

from torch import Tensor

from mopro_fast.config import CAPRO, MOPRO, TrainConfig
from mopro_fast.data.batches import Batch
from mopro_fast.models.build import build
from mopro_fast.models.method import Method
from mopro_fast.training.step import Shuffle
from mopro_fast.training.task import Task


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


TASKS = {"mopro": MoProTask, "ce": CrossEntropyTask}


def task_of(config: TrainConfig) -> Task:
    """The task of ``config.method``."""
    return TASKS[config.method](config)
