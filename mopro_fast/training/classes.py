"""What label correction does to each class, and the alarms while it goes wrong. All of it once an epoch, on rank 0."""

import math

import numpy as np
import torch
from torch import Tensor

from mopro_fast.data.index import Index
from mopro_fast.labels import by_class, left, relabellings
from mopro_fast.models.method import Method
from mopro_fast.training.evaluate import held_out
from mopro_fast.training.log import RunLog

FEWEST = 50  # images that a class must have had for an alarm about it
LOST, GROWN = 0.1, 2.0  # of the images that a class came with
SWAPPED = 0.5  # of the images of both classes
FALLEN, HELD_OUT = 2.0, 200  # points of agreement with at least so many held-out images
WRONG, CHANGED = 0.5, 20  # precision of relabelling, of at least so many trusted images that it would change
_NAMED = 3  # classes in one line


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


def class_alarms(
    found: dict[str, list], given: np.ndarray, assigned: np.ndarray, names: list[str] | None = None
) -> list[str]:
    """A line for each kind of thing that goes wrong with classes.

    found: of :func:`table`. names: of the classes.
    """
    images, relabelled, removed, joined = (np.array(found[n]) for n in ("images", "relabelled", "removed", "joined"))
    now, enough = left(found), images >= FEWEST
    own = now - joined
    lines = []

    def name(c: int) -> str:
        return str(c) if names is None else f"{c} ({names[c]})"

    def each(classes: np.ndarray, what: str) -> None:
        if len(classes):
            some = [
                f"class {name(c)} came with {images[c]} images and has {now[c]} "
                f"({removed[c]} removed, {relabelled[c]} relabelled, {joined[c]} joined)"
                for c in classes[:_NAMED].tolist()
            ]
            lines.append(f"{len(classes)} of {len(images)} classes {what}: {_some(some, len(classes))}")

    lost = np.flatnonzero(enough & (own < LOST * images))
    each(lost[np.argsort(own[lost], kind="stable")], "are being lost")
    grown = np.flatnonzero(enough & (now > GROWN * images))
    each(grown[np.argsort(-now[grown], kind="stable")], "take over others")
    pairs = relabellings(given, assigned, 2 * len(images))  # more cannot be half of a class
    moved = {(a, b): n for a, b, n in pairs if a >= 0 and enough[a] and n > SWAPPED * images[a]}
    swapped = [(a, b) for a, b in moved if a < b and (b, a) in moved]
    if swapped:
        some = [f"{moved[a, b]} of {name(a)} became {name(b)}, {moved[b, a]} the other way" for a, b in swapped]
        lines.append(f"classes change places: {_some(some, len(swapped))}: compare the class numbers of your lists")
    return lines


def agreement_alarm(agreement: list[float], epoch: int, images: int) -> str:
    """A line if the last two epochs agree with the held-out labels clearly less than an earlier one; else empty.

    agreement: percent, of the epochs up to ``epoch`` (0-based), the first of them the last before correction.
    """
    if len(agreement) < 3 or images < HELD_OUT:
        return ""
    best = max(agreement[:-2])
    error = 100 * math.sqrt(max(best / 100 * (1 - best / 100), 0.01) / images)
    if best - max(agreement[-2:]) <= max(FALLEN, 3 * error):
        return ""
    then = epoch + 2 - len(agreement) + agreement.index(best)  # 1-based
    return f"the model agrees with {agreement[-1]:.1f} % of the held-out labels, in epoch {then} it was {best:.1f} %"


def precision_alarm(of_class: list[list[int]]) -> str:
    """A line if most of the trusted images that would be relabelled would be so wrongly; else empty.

    of_class: of evaluate.held_out.
    """
    changed, right = (sum(counts) for counts in of_class)
    if changed < CHANGED or right >= WRONG * changed:
        return ""
    return f"of {changed} trusted images that would get another label {right} would get the right one"


class ClassWatch:
    """Writes :func:`table` and the alarms of each epoch into the log; new alarms are shown on the terminal, too."""

    def __init__(self, log: RunLog, index: Index, advice: str, agreement: list[float], trusted: bool) -> None:
        """advice: what to do. agreement: as of :func:`agreement_alarm`, so far. trusted: the held-out labels are not
        those that the images came with.
        """
        self._log, self._index, self._advice, self._trusted = log, index, advice, trusted
        self.agreement = list(agreement)
        self._told: set[str] = set()

    def judge_held_out(self, model: Method, loader, device: torch.device, bf16: bool) -> dict:
        """evaluate.held_out, whose numbers of each class go into the table."""
        found = held_out(model, loader, device, bf16, torch.from_numpy(self._index.labels).to(device), self._trusted)
        self._of_class = found.pop("of_class", None)
        return found

    def end_epoch(
        self, epoch: int, step: int, global_step: int, assigned: Tensor, winners: Tensor, holdout: dict | None
    ) -> None:
        """holdout: what :meth:`judge_held_out` found in this epoch."""
        corrected = bool(winners.any())
        if holdout:
            self.agreement = [*(self.agreement if corrected else []), holdout["top1"]]
        if not corrected or not self._log.active:
            return
        given, assigned = self._index.labels, assigned.numpy()
        found = table(given, assigned, winners)
        lines = [f"{line}: {self._advice}" for line in class_alarms(found, given, assigned, self._index.classes)]
        if holdout:
            lines += [agreement_alarm(self.agreement, epoch, holdout["images"])]
            if self._of_class:
                found |= dict(zip(("held_out_changed", "held_out_right"), self._of_class, strict=True))
                lines += [precision_alarm(self._of_class)]
        self._log.entry("classes", epoch, step, global_step, found)
        lines = [line for line in lines if line]
        for line in lines:
            self._log.entry("alarm", epoch, step, global_step, {"text": line})
            if line.partition(" came ")[0] not in self._told:
                self._log.say(f"epoch {epoch + 1}: ATTENTION: {line}")
        self._told = {line.partition(" came ")[0] for line in lines}


def _some(parts: list[str], all_of_them: int) -> str:
    more = f"; and {all_of_them - _NAMED} more" if all_of_them > _NAMED else ""
    return "; ".join(parts[:_NAMED]) + more
