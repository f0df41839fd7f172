"""The order of an epoch: a function of (seed, epoch) and the data, the same on every rank."""

import numpy as np

from mopro_fast.data.index import Index

_ORDER, _SUBSTITUTE = 0, 2  # first words of the generators' seeds; batches.py has 1
_CANDIDATES = 20


def epoch_order(
    index: Index, seed: int, epoch: int, shuffle_shards: int, repeats: np.ndarray | None = None
) -> np.ndarray:
    """int64 [usable rows]: a permutation of ``index.usable``; with repeats, of as many rows drawn from it.

    Files: any permutation. Shards: their own order is shuffled, and rows mix with those of the ``shuffle_shards``
    shards that are open at the time (0: with all), so that what is read lies in a few files.

    repeats: int64 [usable rows]; the rows are drawn, without putting back, from a list that has each this many times.
    """
    rows = index.usable
    rng = np.random.default_rng((_ORDER, seed, epoch))
    order = rows[rng.permutation(len(rows)) if repeats is None else _drawn(rng, repeats)]
    if index.shards is None or not shuffle_shards:
        return order
    shard = index.shard_of
    place = rng.permutation(shard.max() + 1)
    return order[np.argsort(place[shard[order]] // shuffle_shards, kind="stable")]


def balancing_repeats(labels: np.ndarray) -> np.ndarray:
    """int64 [n]: how often each image is in the official list for classifier re-training.

    Classes are drawn in proportion to the square root of their size; the largest one's images are there ten times.
    """
    _, inverse, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    shares = (1 / sizes) ** 0.5
    shares = shares / shares.sum()  # cancels, but for the last bits, which decide what is cut to which whole number
    return (10 * shares / shares.min()).astype(np.int64)[inverse]


def _drawn(rng: np.random.Generator, repeats: np.ndarray) -> np.ndarray:
    """int64 [n]: the first n of a shuffled list that has i repeats[i] times, without that list."""
    ends = repeats.cumsum()
    places = np.empty(0, np.int64)
    while len(places) < len(ends):
        places = np.concatenate([places, rng.integers(ends[-1], size=len(ends))])
        places = places[np.sort(np.unique(places, return_index=True)[1])]  # a place drawn again is passed over
    return np.searchsorted(ends, places[: len(ends)], side="right")


def substitutes(order: np.ndarray, shown: int, seed: int, epoch: int, row: int) -> np.ndarray:
    """int64 [20 to 40]: rows to show in place of ``row``, one after the other until one can be read.

    First those that the epoch leaves out, order[shown:], up to 20; these may be few, and broken as well: then any.
    """
    rng = np.random.default_rng((_SUBSTITUTE, seed, epoch, row))
    left_out = rng.permutation(order[shown:])[:_CANDIDATES]
    return np.concatenate([left_out, order[rng.integers(len(order), size=_CANDIDATES)]])


def place_in_class(labels: np.ndarray) -> np.ndarray:
    """int64 [n]: how many of the same label come earlier."""
    order = np.argsort(labels, kind="stable")
    place = np.empty(len(labels), np.int64)
    place[order] = np.arange(len(labels)) - np.searchsorted(labels[order], labels[order])
    return place
