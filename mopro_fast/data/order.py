"""The order of an epoch: a function of (seed, epoch) and the data, the same on every rank."""

import numpy as np

from mopro_fast.data.index import Index

_ORDER, _SUBSTITUTE = 0, 2  # first words of the generators' seeds; batches.py has 1
_CANDIDATES = 20


def epoch_order(index: Index, seed: int, epoch: int, shuffle_shards: int) -> np.ndarray:
    """int64 [usable rows]: a permutation of ``index.usable``.

    Files: any permutation. Shards: their own order is shuffled, and rows mix with those of the ``shuffle_shards``
    shards that are open at the time (0: with all), so that what is read lies in a few files.
    """
    rows = index.usable
    rng = np.random.default_rng((_ORDER, seed, epoch))
    order = rows[rng.permutation(len(rows))]
    if index.shards is None or not shuffle_shards:
        return order
    shard = index.shard_of
    place = rng.permutation(shard.max() + 1)
    return order[np.argsort(place[shard[order]] // shuffle_shards, kind="stable")]


def substitutes(order: np.ndarray, shown: int, seed: int, epoch: int, row: int) -> np.ndarray:
    """int64 [20 to 40]: rows to show in place of ``row``, one after the other until one can be read.

    First those that the epoch leaves out, order[shown:], up to 20; these may be few, and broken as well: then any.
    """
    rng = np.random.default_rng((_SUBSTITUTE, seed, epoch, row))
    left_out = rng.permutation(order[shown:])[:_CANDIDATES]
    return np.concatenate([left_out, order[rng.integers(len(order), size=_CANDIDATES)]])
