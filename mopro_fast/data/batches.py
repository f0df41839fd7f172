"""What the training loaders share: which rows a step shows, with which random numbers; how a batch looks.

Nothing of it is state. The order of an epoch is a function of (seed, epoch), the random numbers of a batch one of
(seed, epoch, step) and the row in the batch of all ranks. So a run resumes exactly at any step without anything
of the loader in a checkpoint, and W ranks with N rows see the pixels of one rank with W·N. Only an image that
breaks during the run is another matter: see reader.py.
"""

from collections.abc import Callable, Iterator
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


class TrainBatches:
    """Endless, seekable training batches: ``for batch in loader.epoch(e, start_step)``.

    ``batch_size`` counts this rank's rows. An image that cannot be read when its turn comes is replaced by one that
    the epoch leaves out, if there is any: ``lost`` collects (epoch, step, Lost) until it is emptied.
    shuffle_shards, repeats: see order.epoch_order.
    """

    def __init__(
        self,
        index: Index,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        image_size: int,
        augment: AugmentConfig,
        two_views: bool = True,
        device: torch.device,
        threads: int,
        shuffle_shards: int = 0,
        repeats: np.ndarray | None = None,
    ) -> None:
        require_rows(len(index.usable), batch_size * world_size, index.source)
        self.steps_per_epoch = len(index.usable) // (batch_size * world_size)
        self.lost: list[tuple[int, int, Lost]] = []
        self._index, self._augment, self._two_views, self._device = index, augment, two_views, device
        self._batch_size, self._rank, self._world_size, self._seed = batch_size, rank, world_size, seed
        self._image_size, self._threads = image_size, threads
        self._shuffle_shards, self._repeats = shuffle_shards, repeats
        self._latest: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))  # an epoch and its order

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of steps [start_step, steps_per_epoch) of this epoch."""
        for step in range(start_step, self.steps_per_epoch):
            yield self._batch(epoch, step)

    def _batch(self, epoch: int, step: int) -> Batch:
        raise NotImplementedError

    def _order(self, epoch: int) -> np.ndarray:
        if self._latest[0] != epoch:
            self._latest = (epoch, epoch_order(self._index, self._seed, epoch, self._shuffle_shards, self._repeats))
        return self._latest[1]

    def _rows(self, epoch: int, step: int) -> np.ndarray:
        """int64 [N]: the index's rows that this rank shows at this step."""
        first = (step * self._world_size + self._rank) * self._batch_size
        return self._order(epoch)[first : first + self._batch_size]

    def _others(self, epoch: int) -> Callable[[int], np.ndarray]:
        """order.substitutes for the rows of this epoch."""
        order, shown = self._order(epoch), self.steps_per_epoch * self._batch_size * self._world_size
        return lambda row: substitutes(order, shown, self._seed, epoch, row)

    def _draw(self, epoch: int, step: int) -> Views:
        rng = np.random.Generator(np.random.PCG64((_AUGMENT, self._seed, epoch, step)))
        return draw(rng, self._batch_size, self._augment, skip=self._rank * self._batch_size)
