"""The names of what can be said of a label, and how many images of each class it is said of."""

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import ArrayLike

NO_LABEL = -1  # allowed in training data
REMOVED = -1  # in a record of decisions: kept out of the losses
UNSEEN = -2  # in a record of decisions: not shown in this epoch
DECISIONS = ("kept", "relabelled", "removed", "unreadable")  # what label correction says of an image
SHOWN = DECISIONS[:3]  # of an image that was shown
PIECE = 1 << 20


def pieces(images: int, each: int | None = None) -> Iterator[slice]:
    """A column of so many images in pieces (default: of PIECE): what is computed of one at a time takes megabytes."""
    each = each or PIECE
    return (slice(first, min(first + each, images)) for first in range(0, images, each))


def verdicts(given: np.ndarray, new: np.ndarray) -> np.ndarray:
    """int8 [n]: index into SHOWN, −1 where the image was not shown. given, new: int [n]."""
    verdict = (new != given).astype(np.int8)
    verdict[new == REMOVED] = 2
    verdict[new == UNSEEN] = -1
    return verdict


def by_class(given: np.ndarray, new: np.ndarray, classes: int) -> dict[str, np.ndarray]:
    """Per given class, int64 [C]: images shown, relabelled and removed of them, and others' images relabelled to it.

    The estimated noise rate is (relabelled + removed) / images. given, new: int [n].
    """
    width = max(classes, int(given.max(initial=-1)) + 1, int(new.max(initial=-1)) + 1)
    found = {name: np.zeros(width, np.int64) for name in ("images", "relabelled", "removed", "joined")}
    for piece in pieces(len(given)):
        old, now = given[piece], new[piece]
        verdict = verdicts(old, now)
        masks = verdict >= 0, verdict == 1, verdict == 2, verdict == 1
        for count, labels, mask in zip(found.values(), (old, old, old, now), masks, strict=True):
            count += np.bincount(labels[mask & (labels >= 0)], minlength=width)
    return found


def left(of_class: Mapping[str, ArrayLike]) -> np.ndarray:
    """Per class [C]: the images that are trained with it, kept or joined. of_class: as of :func:`by_class`."""
    of = {name: np.asarray(of_class[name]) for name in ("images", "relabelled", "removed", "joined")}
    return of["images"] - of["relabelled"] - of["removed"] + of["joined"]


def relabellings(given: np.ndarray, new: np.ndarray, most: int = 100) -> list[list[int]]:
    """The most frequent [given, new, images]; given −1: no label was given. given, new: int [n]."""
    width = int(new.max(initial=0)) + 1
    dtype = np.int32 if (int(given.max(initial=0)) + 2) * width < 1 << 31 else np.int64
    keys = [np.empty(0, dtype)]
    for piece in pieces(len(given)):
        rows = verdicts(given[piece], new[piece]) == 1
        keys.append((given[piece][rows].astype(dtype) + 1) * width + new[piece][rows].astype(dtype))
    keys, counts = np.unique(np.concatenate(keys), return_counts=True)
    order = np.argsort(-counts, kind="stable")[:most]
    return np.column_stack([keys[order] // width - 1, keys[order] % width, counts[order]]).tolist()


def row_type(rows: int) -> type[np.signedinteger]:
    """Of row numbers below this count."""
    return np.int32 if rows < 1 << 31 else np.int64
