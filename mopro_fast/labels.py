"""The names of what can be said of a label, and how many images of each class it is said of."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

NO_LABEL = -1  # allowed in training data
REMOVED = -1  # in a record of decisions: kept out of the losses
UNSEEN = -2  # in a record of decisions: not shown in this epoch
DECISIONS = ("kept", "relabelled", "removed", "unreadable")  # what label correction says of an image
SHOWN = DECISIONS[:3]  # of an image that was shown


def verdicts(given: np.ndarray, new: np.ndarray) -> np.ndarray:
    """int8 [n]: index into SHOWN, −1 where the image was not shown."""
    verdict = np.where(new == REMOVED, 2, np.where(new == given, 0, 1)).astype(np.int8)
    return np.where(new == UNSEEN, np.int8(-1), verdict)


def by_class(given: np.ndarray, new: np.ndarray, classes: int) -> dict[str, np.ndarray]:
    """Per given class, int64 [C]: images shown, relabelled and removed of them, and others' images relabelled to it.

    The estimated noise rate is (relabelled + removed) / images.
    """
    verdict = verdicts(given, new)

    def count(labels: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return np.bincount(labels[mask & (labels >= 0)], minlength=classes)

    return {
        "images": count(given, verdict >= 0),
        "relabelled": count(given, verdict == 1),
        "removed": count(given, verdict == 2),
        "joined": count(new, verdict == 1),
    }


def left(of_class: Mapping[str, ArrayLike]) -> np.ndarray:
    """Per class [C]: the images that are trained with it, kept or joined. of_class: as of :func:`by_class`."""
    of = {name: np.asarray(of_class[name]) for name in ("images", "relabelled", "removed", "joined")}
    return of["images"] - of["relabelled"] - of["removed"] + of["joined"]


def relabellings(given: np.ndarray, new: np.ndarray, most: int = 100) -> list[list[int]]:
    """The most frequent [given, new, images]; given −1: no label was given."""
    rows = verdicts(given, new) == 1
    width = int(new.max(initial=0)) + 1
    keys, counts = np.unique((given[rows] + 1) * width + new[rows], return_counts=True)
    order = np.argsort(-counts, kind="stable")[:most]
    return np.column_stack([keys[order] // width - 1, keys[order] % width, counts[order]]).tolist()
