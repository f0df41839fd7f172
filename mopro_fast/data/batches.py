"""What the training loaders share: which rows a step shows, with which random numbers; how a batch looks.

Nothing of it is state. The order of an epoch is a function of (seed, epoch), the random numbers of a batch one of
(seed, epoch, step) and the row in the batch of all ranks. So a run resumes exactly at any step without anything
of the loader in a checkpoint, and W ranks with N rows see the pixels of one rank with W·N. Only an image that
breaks during the run is another matter: see reader.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import numpy as np
import torch

from mopro_fast.config import AugmentConfig
from mopro_fast.data.augment import Views, draw
from mopro_fast.data.index import Index
from mopro_fast.data.order import epoch_order, substitutes
from mopro_fast.data.reader import Lost
from mopro_fast.errors import UserError

_AUGMENT = 1  # first word of the generators' seeds; order.py has others


class Batch(NamedTuple):
    """One rank's rows of a step, on the loader's device."""

    view_q: torch.Tensor
    """uint8 [N, S, S, 3]."""
    view_k: torch.Tensor | None
    """uint8 [N, S, S, 3], or None with one view."""
    labels: torch.Tensor
    """int64 [N]; -1: none given."""
    ids: torch.Tensor
    """int64 [N]: rows of the index."""


def require_rows(images: int, batch_size: int, source: str) -> None:
    """Raise a UserError if an epoch would have no step."""
    if images < batch_size:
        raise UserError(
            f"batch larger than the data: {batch_size} rows over all ranks, {images} images in {source}: "
            "lower --batch-size"
        )


@dataclass(eq=False)
class Batches:
    """What the loaders of training and of evaluation have in common."""

    index: Index
    _: KW_ONLY
    batch_size: int
    """This rank's rows."""
    rank: int
    world_size: int
    image_size: int
    device: torch.device
    threads: int


@dataclass(eq=False, kw_only=True)
class TrainBatches(Batches):
    """Endless, seekable training batches: ``for batch in loader.epoch(e, start_step)``.

    An image that cannot be read when its turn comes is replaced by one that the epoch leaves out, if there is any:
    ``lost`` collects (epoch, step, Lost) until it is emptied.
    """

    seed: int
    augment: AugmentConfig
    two_views: bool = True
    shuffle_shards: int = 0
    """This and ``repeats``: see order.epoch_order."""
    repeats: np.ndarray | None = None
    whole: bool = False
    """An epoch shows every usable row (once, without ``repeats``), however few there are: its first rows, again, fill
    the last batch. Row i of N at a step is a fill-in unless (step · world_size + rank) · N + i < index.num_usable."""

    def __post_init__(self) -> None:
        images, rows = self.index.num_usable, self.batch_size * self.world_size
        held_out = f" without the {len(self.index.held_out)} of --holdout" if len(self.index.held_out) else ""
        source = self.index.source + held_out
        if not self.whole:
            require_rows(images, rows, source)
        elif not images:
            raise UserError(f"no image of {source} can be shown: name more images, or others")
        self.steps_per_epoch = -(-images // rows) if self.whole else images // rows
        self.lost: list[tuple[int, int, Lost]] = []
        self._latest: tuple[int, np.ndarray] = (-1, np.empty(0, np.int32))  # an epoch and its order

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of steps [start_step, steps_per_epoch) of this epoch."""
        for step in range(start_step, self.steps_per_epoch):
            yield self._batch(epoch, step)

    def _batch(self, epoch: int, step: int) -> Batch:
        raise NotImplementedError

    def _order(self, epoch: int) -> np.ndarray:
        if self._latest[0] != epoch:
            self._latest = (-1, np.empty(0, np.int32))  # its memory, before the next one takes as much
            self._latest = (epoch, epoch_order(self.index, self.seed, epoch, self.shuffle_shards, self.repeats))
        return self._latest[1]

    def rows(self, epoch: int, step: int) -> np.ndarray:
        """int64 [N]: the index's rows that this rank shows at this step."""
        first, order = (step * self.world_size + self.rank) * self.batch_size, self._order(epoch)
        return order[np.arange(first, first + self.batch_size) % len(order)].astype(np.int64)

    def _others(self, epoch: int) -> Callable[[int], np.ndarray]:
        """order.substitutes for the rows of this epoch."""
        order, shown = self._order(epoch), self.steps_per_epoch * self.batch_size * self.world_size
        return lambda row: substitutes(order, shown, self.seed, epoch, row)

    def _draw(self, epoch: int, step: int) -> Views:
        rng = np.random.Generator(np.random.PCG64((_AUGMENT, self.seed, epoch, step)))
        return draw(rng, self.batch_size, self.augment, skip=self.rank * self.batch_size)


@dataclass(eq=False, kw_only=True)
class EvalBatches(Batches):
    """Every usable image once over all ranks (rank r has them r::W): shorter side to ``resize``, central crop.

    Iterate, as often as needed, over (images uint8 [n, S, S, 3], labels int64 [n], ids int64 [n]) on ``device``; the
    last batch may be smaller, and a rank may have none. Images that cannot be read when their turn comes are left
    out; ``lost`` has those of the latest pass.
    """

    resize: int

    def __post_init__(self) -> None:
        size, resize = self.image_size, self.resize
        if resize < size:
            raise UserError(f"cannot crop {size} px from a shorter side of {resize} px: raise --eval-resize")
        self.lost: list[Lost] = []

    @property
    def _rows(self) -> np.ndarray:
        """int32 or int64: the index's rows that this rank shows."""
        return self.index.usable[self.rank :: self.world_size]
