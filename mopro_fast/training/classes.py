"""What label correction does to each class, and the alarms while it goes wrong. All of it once an epoch, on rank 0."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mopro_fast.data.index import Index
from mopro_fast.labels import by_class, left, relabellings
from mopro_fast.models.method import Method
from mopro_fast.training.evaluate import held_out
from mopro_fast.training.log import RunLog
from mopro_fast.transfer import to_device

FEWEST = 50  # images that a class must have had for an alarm about it
LOST, GROWN = 0.1, 2.0  # of the images that a class came with
SWAPPED = 0.5  # of the images of both classes
FALLEN, HELD_OUT = 2.0, 200  # points of agreement with at least so many held-out images
WRONG, CHANGED = 0.5, 20  # precision of relabelling, of at least so many trusted images that it would change
RENUMBERED = "compare the class numbers of your lists"
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


@dataclass
class Alarm:
    """One thing that goes wrong in an epoch."""

    text: str
    """What, without advice."""
    kind: Literal["lost", "grown", "swapped", "agreement", "precision"]
    classes: frozenset[int] = frozenset()
    """Of which classes, if it is about classes."""
    relabelling: bool = True
    """Whether it comes from labels that were changed; else from images that were removed."""


def class_alarms(
    found: dict[str, list], given: np.ndarray, assigned: np.ndarray, names: list[str] | None = None
) -> list[Alarm]:
    """One for each kind of thing that goes wrong with classes.

    found: of :func:`table`. names: of the classes.
    """
    images, relabelled, removed, joined = (np.array(found[n]) for n in ("images", "relabelled", "removed", "joined"))
    now, enough = left(found), images >= FEWEST
    own = now - joined
    alarms = []

    def name(c: int) -> str:
        return str(c) if names is None else f"{c} ({names[c]})"

    def each(kind: Literal["lost", "grown"], classes: np.ndarray, what: str) -> None:
        if len(classes):
            some = [
                f"class {name(c)} was shown with {images[c]} images and has {now[c]} "
                f"({removed[c]} removed, {relabelled[c]} relabelled, {joined[c]} joined)"
                for c in classes[:_NAMED].tolist()
            ]
            text = f"{what} {len(classes)} of {len(images)} classes: {_some(some, len(classes))}"
            relabelling = kind == "grown" or bool(relabelled[classes].sum() >= removed[classes].sum())
            alarms.append(Alarm(text, kind, frozenset(classes.tolist()), relabelling))

    lost = np.flatnonzero(enough & (own < LOST * images))
    each("lost", lost[np.argsort(own[lost], kind="stable")], "label correction empties")
    grown = np.flatnonzero(enough & (now > GROWN * images))
    each("grown", grown[np.argsort(-now[grown], kind="stable")], "label correction gives others' images to")
    pairs = relabellings(given, assigned, 2 * len(images))  # more cannot be half of a class
    moved = {(a, b): n for a, b, n in pairs if a >= 0 and enough[a] and n > SWAPPED * images[a]}
    swapped = [(a, b) for a, b in moved if a < b and (b, a) in moved]
    if swapped:
        some = [f"{moved[a, b]} of {name(a)} became {name(b)}, {moved[b, a]} the other way" for a, b in swapped]
        text = f"classes change places: {_some(some, len(swapped))}"
        alarms.append(Alarm(text, "swapped", frozenset(c for pair in swapped for c in pair)))
    return alarms


def agreement_alarm(agreement: list[float], epoch: int, images: int) -> list[Alarm]:
    """One if the last two epochs agree with the held-out labels clearly less than an earlier one; else none.

    agreement: percent, of the epochs up to ``epoch`` (0-based), the first of them the last before correction.
    """
    if len(agreement) < 3 or images < HELD_OUT:
        return []
    best = max(agreement[:-2])
    error = 100 * math.sqrt(max(best / 100 * (1 - best / 100), 0.01) / images)
    if best - max(agreement[-2:]) <= max(FALLEN, 3 * error):
        return []
    then = epoch + 2 - len(agreement) + agreement.index(best)  # 1-based
    now = f"the model agrees with {agreement[-1]:.1f} % of the held-out labels"
    return [Alarm(f"{now}, in epoch {then} it was {best:.1f} %", "agreement")]


def precision_alarm(of_class: list[list[int]]) -> list[Alarm]:
    """One if most of the trusted images that would be relabelled would be so wrongly; else none.

    of_class: of evaluate.held_out.
    """
    changed, right = (sum(counts) for counts in of_class)
    if changed < CHANGED or right >= WRONG * changed:
        return []
    return [
        Alarm(f"of {changed} trusted images that would get another label {right} would get the right one", "precision")
    ]


class ClassWatch:
    """Writes :func:`table` and the alarms of each epoch into the log; new alarms are shown on the terminal, too."""

    def __init__(
        self, log: RunLog, index: Index, advice: Callable[[bool], str], agreement: list[float], trusted: bool
    ) -> None:
        """advice: Task.advice. agreement: as of :func:`agreement_alarm`, so far. trusted: the held-out labels are known
        to be right.
        """
        self._log, self._index, self._advice, self._trusted = log, index, advice, trusted
        self.agreement = list(agreement)
        self._told: dict[str, frozenset[int]] = {}  # what the terminal has said, by kind

    def judge_held_out(self, model: Method, loader, device: torch.device, bf16: bool) -> dict:
        """evaluate.held_out, whose numbers of each class go into the table."""
        rows = self._index.held_out
        given = to_device(np.stack([rows, self._index.labels[rows]]), device)
        found = held_out(model, loader, device, bf16, given, self._trusted)
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
        alarms = class_alarms(found, given, assigned, self._index.classes)
        if holdout:
            alarms += agreement_alarm(self.agreement, epoch, holdout["images"])
            if self._of_class:
                found |= dict(zip(("held_out_changed", "held_out_right"), self._of_class, strict=True))
                alarms += precision_alarm(self._of_class)
        self._log.entry("classes", epoch, step, global_step, found)
        for alarm in alarms:
            advice = RENUMBERED if alarm.kind == "swapped" else self._advice(alarm.relabelling)
            text = f"{alarm.text}: {advice}"
            self._log.entry("alarm", epoch, step, global_step, {"text": text})
            if alarm.kind not in self._told or alarm.classes - self._told[alarm.kind]:
                self._log.say(f"epoch {epoch + 1}: ATTENTION: {text}")
        self._told = {alarm.kind: alarm.classes | self._told.get(alarm.kind, frozenset()) for alarm in alarms}


def _some(parts: list[str], all_of_them: int) -> str:
    more = f"; and {all_of_them - _NAMED} more" if all_of_them > _NAMED else ""
    return "; ".join(parts[:_NAMED]) + more
