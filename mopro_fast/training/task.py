"""What differs from method to method; the trainer (loop.py) does the rest."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from mopro_fast.config import Settings
from mopro_fast.data.batches import Batch
from mopro_fast.data.index import Index
from mopro_fast.models.method import Method
from mopro_fast.training.optim import learning_rate


class Task:
    """A method and its settings. A subclass has :meth:`build`; the rest is there to be overridden.

    Every task gets progress, log, checkpoints of its model's state dict, exact resume, and after every epoch the top-1
    and top-5 accuracy of its model's ``encoder_q``. It honours ``config.data`` (what view_k alone needs if
    ``two_views``), ``config.optim`` and ``config.run``.
    """

    command = "train"
    """Whose run a folder is."""
    two_views = False
    """Whether batches have a view_k."""
    free: frozenset[str] = frozenset()
    """Settings of its own that may change between an interrupted run and its continuation."""
    initial = ""
    """The digest of what else the run begins with, :attr:`begins_with`; it goes on with the same alone. Empty: whatever
    it was."""
    begins_with = "checkpoint"
    """What that is, for messages."""

    def __init__(self, config: Settings) -> None:
        self.config = config

    def labelled(self, index: Index) -> Index:
        """The training set with the labels to train on."""
        return index

    def shown(self, index: Index) -> tuple[Index, np.ndarray | None]:
        """The training set without the images that are not shown, and how often the others are (order.epoch_order)."""
        return index, None

    def build(self) -> Method:
        """The model on the CPU, with the weights of a fresh run."""
        raise NotImplementedError

    def begin_epoch(self, model: Method, epoch: int, device: torch.device, bf16: bool) -> None:
        """Before the first step of an epoch. bf16: whether steps compute in 16 bits. Collective."""

    def batches(self, batches: Iterable[Batch], global_step: int) -> Iterator[tuple[Batch, tuple[Tensor, ...]]]:  # noqa: ARG002
        """Each batch, the first of ``global_step``, with what else the model's ``forward`` takes."""
        return ((batch, ()) for batch in batches)

    def advice(self, relabelling: bool) -> str:  # noqa: ARG002
        """What to do where label correction goes wrong: by changing labels, or by removing images."""
        return ""

    def learning_rates(self, epoch: int, step: int, steps: int) -> list[float]:
        """Of each group of ``Method.trained``, at this step of ``steps`` in the epoch; the log has the first."""
        return [learning_rate(self.config.optim, epoch, step, steps)]
