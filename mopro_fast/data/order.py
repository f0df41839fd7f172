"""The order of an epoch: a function of (seed, epoch) and the data, the same on every rank.

Time is linear in the images. Beside the order, 4 bytes an image, memory is what each function says and at most 100 MB.
"""

import functools
from collections.abc import Iterable, Iterator

import numpy as np

from mopro_fast.data.index import Index
from mopro_fast.labels import PIECE, pieces, row_type

_ORDER, _SUBSTITUTE = 0, 2  # first words of the generators' seeds; batches.py has 1
_CANDIDATES = 20


def epoch_order(
    index: Index, seed: int, epoch: int, shuffle_shards: int, repeats: np.ndarray | None = None
) -> np.ndarray:
    """int32 [usable rows]: a permutation of ``index.usable``; with repeats, of as many rows drawn from it.

    int64 from 2³¹ images on. Shards take another 4 bytes an image while they are mixed.

    Files: any permutation. Shards: their own order is shuffled, and rows mix with those of the ``shuffle_shards``
    shards that are open at the time (0: with all), so that what is read lies in a few files.

    repeats: int [images]; the rows are drawn, without putting back, from a list that has each this many times, those
    that are not usable no time.
    """
    rng = np.random.default_rng((_ORDER, seed, epoch))
    if repeats is not None:
        order = _drawn(rng, repeats)
    else:
        order = index.usable
        rng.shuffle(order)
    if index.shards is None or not shuffle_shards:
        return order
    shard = index.shard_of
    group = rng.permutation(shard.max() + 1) // shuffle_shards
    sizes = np.zeros(group.max() + 1, np.int64)
    for piece in pieces(len(order)):
        sizes += np.bincount(group[shard[order[piece]]], minlength=len(sizes))
    mixed, groups = np.empty_like(order), (group[shard[order[piece]]] for piece in pieces(len(order)))
    for piece, places in zip(pieces(len(order)), _places(groups, sizes.cumsum() - sizes), strict=True):
        mixed[places] = order[piece]
    return mixed


def balancing_repeats(labels: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """int32 [images]: how often each is in the official list for classifier re-training of these rows; 0: not there.

    Classes are drawn in proportion to the square root of their size; the largest one's images are there ten times.

    labels: int [images]; those of the rows are 0 or more. rows: int [n].
    """
    sizes = np.zeros(int(labels.max(initial=-1)) + 1, np.int64)
    for piece in pieces(len(rows)):
        sizes += np.bincount(labels[rows[piece]], minlength=len(sizes))
    shares = (1 / sizes[sizes > 0]) ** 0.5
    shares = shares / shares.sum()  # cancels, but for the last bits, which decide what is cut to which whole number
    of_class = np.zeros(len(sizes), np.int32)
    of_class[sizes > 0] = 10 * shares / shares.min(initial=1)
    repeats = np.zeros(len(labels), np.int32)
    for piece in pieces(len(rows)):
        repeats[rows[piece]] = of_class[labels[rows[piece]]]
    return repeats


def _drawn(rng: np.random.Generator, repeats: np.ndarray) -> np.ndarray:
    """int32 [n]: the first n of a shuffled list that has i repeats[i] times, without that list; n: how many it has.

    Places of the list are drawn in rounds of n; one that was drawn before is passed over. A bit for each place says
    whether an image begins there; the count of these bits up to a place is the number of the image that has it. Beside
    the result it takes 2.5 bits a place, and at most 12 bytes an image that is not in the list.
    """
    total = int(repeats.sum(dtype=np.int64))
    begins, before = np.zeros((2, total // 64 + 1), np.uint64)  # a bit for each place
    end = 0
    for piece in pieces(len(repeats)):
        times = repeats[piece]
        ends = end + times.cumsum(dtype=np.int64)
        np.add.at(begins, *_bits((ends - times)[times > 0]))
        end = ends[-1]
    begun = np.bitwise_count(begins).cumsum(dtype=row_type(len(repeats)))  # images, up to the end of each word
    absent = np.flatnonzero(repeats == 0).astype(begun.dtype)
    drawn, count = np.empty(len(repeats) - len(absent), begun.dtype), 0
    absent -= np.arange(len(absent), dtype=absent.dtype)  # how many images of the list come before each
    while count < len(drawn):
        for piece in pieces(len(drawn)):
            places = rng.integers(total, size=piece.stop - piece.start)
            if count == len(drawn):
                continue  # what is drawn after the order goes on after this round
            places, turns = _sorted(places)
            words, bits = _bits(places)
            new = before[words] & bits == 0
            new[1:] &= places[1:] != places[:-1]
            words, bits = words[new], bits[new]
            np.add.at(before, words, bits)
            after = begins[words] & -(bits << 1)  # images that begin later in the word
            rows = np.full(len(turns), -1, drawn.dtype)  # by turn
            own = begun[words] - 1 - np.bitwise_count(after)  # numbers among the images of the list
            rows[turns[new]] = own + np.searchsorted(absent, own, side="right")
            rows = rows[rows >= 0][: len(drawn) - count]
            drawn[count : count + len(rows)] = rows
            count += len(rows)
    return drawn


def _bits(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """-> the number of each place's word of 64 bits, int64 [n], and the place's bit in it, uint64 [n]."""
    return places >> 6, np.left_shift(1, places & 63, dtype=np.uint64, casting="unsafe")


def substitutes(order: np.ndarray, shown: int, seed: int, epoch: int, row: int) -> np.ndarray:
    """int64 [20 to 40]: rows to show in place of ``row``, one after the other until one can be read.

    First those that the epoch leaves out, order[shown:], up to 20; these may be few, and broken as well: then any.
    shown: how many rows the epoch shows; where it has more than the order, that begins again.
    """
    rng = np.random.default_rng((_SUBSTITUTE, seed, epoch, row))
    left_out = rng.permutation(order[shown:])[:_CANDIDATES]
    places = rng.integers(max(shown, len(order)), size=_CANDIDATES)
    return np.concatenate([left_out, order[places % len(order)]]).astype(np.int64)


def place_in_class(labels: np.ndarray) -> np.ndarray:
    """int32 [n], int64 from 2³¹ on: how many of the same label come earlier. labels: int [n]."""
    parts = [labels[piece] for piece in pieces(len(labels))]
    classes = functools.reduce(np.union1d, parts, labels[:0])
    found = np.empty(len(labels), row_type(len(labels)))
    numbers = (np.searchsorted(classes, part) for part in parts)
    for piece, places in zip(pieces(len(labels)), _places(numbers, np.zeros(len(classes), np.int64)), strict=True):
        found[piece] = places
    return found


def _places(parts: Iterable[np.ndarray], following: np.ndarray) -> Iterator[np.ndarray]:
    """Of each part int64 [n]: where its members go if each group's lie together, in the order in which they come.

    parts: int [n] each, n ≤ PIECE: the groups of the members. following: int64 [groups]: the place of each group's
    next member; it moves on.
    """
    for part in parts:
        groups, members = _sorted(part)
        starts = np.flatnonzero(np.diff(groups, prepend=-1))  # groups are 0 or more
        own, counts = groups[starts], np.diff(starts, append=len(groups))
        places = np.empty(len(part), np.int64)
        places[members] = np.arange(len(part)) + np.repeat(following[own] - starts, counts)
        following[own] += counts
        yield places


def _sorted(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """-> the values, 0 or more, sorted, and where each was, equal ones in their order: int64 [n], n ≤ PIECE.

    Sorting whole numbers is faster than finding their order.
    """
    keys = values.astype(np.int64)
    keys *= PIECE
    keys += np.arange(len(keys))
    keys.sort()
    return keys // PIECE, keys % PIECE
