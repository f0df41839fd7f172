"""What label correction does to each class, and the alarms while it goes wrong. All of it once an epoch, on the CPU."""

import math

import numpy as np
from torch import Tensor

from mopro_fast.data.index import Index
from mopro_fast.labels import by_class, relabellings
from mopro_fast.training.log import RunLog

FEWEST = 10  # images that a class must have had for an alarm about it
LOST, GROWN = 0.1, 2.0  # of the images that a class came with
SWAPPED = 0.5  # of the images of both classes
_NAMED = 3  # classes in one line
_PAIRS = 1000  # the most frequent relabellings are looked at


def table(given: np.ndarray, assigned: np.ndarray, winners: Tensor) -> dict[str, list]:
    """An epoch's numbers of each class, lists of length C:

    images, relabelled, removed, joined: see labels.by_class; images are trained with the class if they keep it or join.
    winner: how many images the class won, whether or not that was enough to relabel; score: their mean score, or None.

    given, assigned: int [images], labels as they came and as they were trained with (REMOVED, UNSEEN).
    winners: int64 [C, 2], TrainStep.preferred().
    """
    count, total = winners.numpy().T
    score = np.divide(total, 2.0**20 * count, out=np.zeros(len(count)), where=count > 0)
    counts = {name: x.tolist() for name, x in by_class(given, assigned, len(count)).items()}
    scores = [round(s, 4) if n else None for s, n in zip(score.tolist(), count.tolist(), strict=True)]
    return counts | {"winner": count.tolist(), "score": scores}


def alarms(
    found: dict[str, list],
    given: np.ndarray,
    assigned: np.ndarray,
    agreement: list[float],
    held_out: int,
    names: list[str] | None = None,
) -> list[str]:
    """One line for each thing that goes wrong, with what to do.

    found: of :func:`table`. agreement: percent, of each epoch since the first, the last one's is this epoch's; empty
    without a holdout of ``held_out`` images.
    """
    images, relabelled, removed, joined = (np.array(found[n]) for n in ("images", "relabelled", "removed", "joined"))
    left, enough = images - relabelled - removed + joined, images >= FEWEST
    lines = []

    def name(c: int) -> str:
        return str(c) if names is None else f"{c} ({names[c]})"

    def each(classes: np.ndarray, what: str, advice: str) -> None:
        if not len(classes):
            return
        some = "; ".join(
            f"class {name(c)} came with {images[c]} images and has {left[c]} ({removed[c]} removed, "
            f"{relabelled[c]} relabelled, {joined[c]} joined)"
            for c in classes[:_NAMED].tolist()
        )
        more = f"; and {len(classes) - _NAMED} more" if len(classes) > _NAMED else ""
        lines.append(f"{len(classes)} of {len(images)} classes {what}: {some}{more}: {advice}")

    empty = np.flatnonzero(enough & (left < LOST * images))
    each(empty[np.argsort(left[empty], kind="stable")], "are being lost", _LATER)
    grown = np.flatnonzero(enough & (left > GROWN * images))
    each(grown[np.argsort(-left[grown], kind="stable")], "take over others", _LATER)
    moved = {(a, b): n for a, b, n in relabellings(given, assigned, _PAIRS) if a >= 0}
    for (a, b), n in moved.items():
        back = moved.get((b, a), 0)
        if a < b and n > SWAPPED * images[a] >= SWAPPED * FEWEST and back > SWAPPED * images[b] >= SWAPPED * FEWEST:
            lines.append(
                f"classes {name(a)} and {name(b)} change places: {n} images of {a} became {b}, {back} the other way: "
                "compare their names with your lists"
            )
    if worse := _fallen(agreement, held_out):
        lines.append(worse)
    return lines


_LATER = "label correction feeds on itself: begin it later (--start-clean), raise --threshold, or set --calibrate True"


def _fallen(agreement: list[float], images: int) -> str:
    """A line if the last two epochs agree with the held-out labels clearly less than an earlier one."""
    if len(agreement) < 3:
        return ""
    best = max(agreement[:-2])
    noise = 300 * math.sqrt(max(best / 100 * (1 - best / 100), 0.01) / images)  # three standard errors, in points
    if best - max(agreement[-2:]) <= max(2.0, noise):
        return ""
    epoch = agreement.index(best) + 1
    return (
        f"the model agrees with {agreement[-1]:.1f} % of the held-out labels, in epoch {epoch} it was {best:.1f} %: "
        f"the labels get worse: {_LATER}"
    )


class ClassWatch:
    """Writes :func:`table` and :func:`alarms` of each epoch into the log; alarms are shown on the terminal, too."""

    def __init__(self, log: RunLog, index: Index, agreement: list[float]) -> None:
        """agreement: of the epochs so far; it grows."""
        self._log, self._index, self.agreement = log, index, agreement

    def end_epoch(
        self, epoch: int, step: int, global_step: int, assigned: Tensor, winners: Tensor, holdout: dict | None
    ) -> None:
        """holdout: what evaluate.held_out found in this epoch."""
        if holdout:
            self.agreement.append(holdout["top1"])
        if not winners.any():  # no label was corrected
            return
        given, assigned = self._index.labels, assigned.numpy()
        found = table(given, assigned, winners)
        self._log.entry("classes", epoch, step, global_step, found)
        images = holdout["images"] if holdout else 0
        for text in alarms(found, given, assigned, self.agreement, images, self._index.classes):
            self._log.entry("alarm", epoch, step, global_step, {"text": text})
            self._log.say(f"epoch {epoch + 1}: ATTENTION: {text}")
