"""Label correction per class: the table, the alarms, and what a run writes of them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_step import CLASSES, run_steps, small_model, train_step

from mopro_fast.config import TrainConfig
from mopro_fast.labels import REMOVED, UNSEEN
from mopro_fast.training.classes import Alarm, ClassWatch, agreement_alarm, class_alarms, precision_alarm, table
from mopro_fast.training.evaluate import held_out
from mopro_fast.training.tasks import MoProTask

C, EACH = 5, 80


@pytest.fixture
def given() -> np.ndarray:
    return np.repeat(np.arange(C), EACH)


def judged(given, assigned, names=None) -> list[str]:
    return [alarm.text for alarm in alarms_of(given, assigned, names)]


def alarms_of(given, assigned, names=None) -> list[Alarm]:
    return class_alarms(table(given, assigned, torch.ones(C, 2, dtype=torch.int64)), given, assigned, names)


def test_the_table_counts_each_class(given):
    assigned = given.copy()
    assigned[:7], assigned[80:83], assigned[90], assigned[399] = 3, REMOVED, UNSEEN, 0
    winners = torch.zeros(C, 2, dtype=torch.int64)
    winners[3] = torch.tensor([4, 3 << 20])
    assert table(given, assigned, winners) == {
        "images": [80, 79, 80, 80, 80],
        "relabelled": [7, 0, 0, 0, 1],
        "removed": [0, 3, 0, 0, 0],
        "joined": [1, 0, 0, 7, 0],
        "winner": [0, 0, 0, 4, 0],
        "score": [None, None, None, 0.75, None],
    }


@pytest.mark.parametrize("classes, images", [(5, 80), (1000, 60), (10, 5000)])
def test_where_all_is_well_there_is_no_alarm(classes, images):
    """Correction that is right always: of 40 % wrong labels, evenly spread, and 20 % of images of no class."""
    rng = np.random.default_rng(0)
    true = np.repeat(np.arange(classes), images)
    given = np.where(rng.random(len(true)) < 0.4, rng.integers(classes, size=len(true)), true)
    assigned = np.where(rng.random(len(true)) < 0.2, REMOVED, true)
    assert class_alarms(table(given, assigned, torch.ones(classes, 2, dtype=torch.int64)), given, assigned) == []


def test_a_class_that_empties_is_named_with_where_its_images_went(given):
    assigned = given.copy()
    rows = np.flatnonzero(given == 2)
    assigned[rows[:60]], assigned[rows[60:74]] = REMOVED, 0
    (line,) = judged(given, assigned, names=["ant", "bee", "cat", "dog", "elk"])
    assert line == (
        "label correction empties 1 of 5 classes: "
        "class 2 (cat) was shown with 80 images and has 6 (60 removed, 14 relabelled, 0 joined)"
    )
    assigned[rows[:2]] = 2
    assert judged(given, assigned) == []  # a tenth is left
    few = np.delete(given, rows[49:])  # 49 images are too few to tell
    assert judged(few, np.where(few == 2, REMOVED, few)) == []


def test_classes_that_turn_into_each_other_are_lost_whatever_joins_them(given):
    turned = np.where(given < 3, (given + 1) % 3, given)
    (line,) = judged(given, turned)
    assert line.startswith(
        "label correction empties 3 of 5 classes: class 0 was shown with 80 images and has 80 (0 removed, 80 "
    )


def test_a_class_that_takes_over_others_is_named(given):
    assigned = given.copy()
    assigned[:50], assigned[81:113] = 4, 4
    (line,) = judged(given, assigned)
    assert line.startswith(
        "label correction gives others' images to 1 of 5 classes: class 4 was shown with 80 images and has 162 ("
    )


def test_classes_that_change_places_are_named(given):
    assigned = given.copy()
    assigned[0:41], assigned[80:130] = 1, 0
    (line,) = judged(given, assigned)
    assert line.startswith("classes change places: 41 of 0 became 1, 50 the other way")
    assigned[0] = 0
    assert judged(given, assigned) == []  # half of them


@pytest.mark.parametrize(
    "agreement, told",
    [
        ([40, 50, 44, 43], True),
        ([40, 50, 44, 49], False),  # one bad epoch
        ([40, 50, 49, 49], False),
        ([50, 40], False),
        ([], False),
    ],
)
def test_agreement_with_the_holdout_that_falls_is_named(agreement, told):
    lines = [alarm.text for alarm in agreement_alarm(agreement, 12, 5000)]
    assert lines == ["the model agrees with 43.0 % of the held-out labels, in epoch 11 it was 50.0 %"] * told
    assert not agreement_alarm(agreement, 12, 300)  # so few images cannot tell
    assert not agreement_alarm([100, 60, 60], 12, 5)


def test_relabelling_that_is_wrong_on_trusted_images_is_named():
    (alarm,) = precision_alarm([[20, 10], [4, 5]])
    assert alarm.text == "of 30 trusted images that would get another label 9 would get the right one"
    assert not precision_alarm([[20, 10], [10, 5]]) and not precision_alarm([[10, 9], [0, 0]])


class Log:
    """In the place of a RunLog."""

    active = True

    def __init__(self) -> None:
        self.entries, self.said = [], []

    def entry(self, split, *place_and_values) -> None:
        self.entries.append((split, place_and_values[-1]))

    def say(self, text) -> None:
        self.said.append(text)


def test_the_terminal_says_an_alarm_when_it_begins_and_the_log_every_time(given):
    log, index = Log(), SimpleNamespace(labels=given, classes=None)
    task = MoProTask(TrainConfig())
    watch = ClassWatch(log, index, task.advice, [], trusted=False)

    def epoch(*lost: int, to: int) -> None:
        assigned = np.where(np.isin(given, lost), to, given)
        watch.end_epoch(0, 9, 9, torch.from_numpy(assigned), torch.ones(C, 2, dtype=torch.int64), None)

    epoch(2, to=REMOVED)
    assert log.said == [
        "epoch 1: ATTENTION: label correction empties 1 of 5 classes: class 2 was shown with 80 images and has 0 "
        "(80 removed, 0 relabelled, 0 joined): begin label correction later (--start-clean), or set --calibrate True"
    ]
    epoch(2, to=REMOVED)
    epoch(to=0)
    epoch(2, to=REMOVED)  # it begins anew
    epoch(2, 4, to=REMOVED)  # another class
    epoch(4, to=REMOVED)
    epoch(4, to=0)  # the same class, otherwise
    assert len(log.said) == 3 and [split for split, _ in log.entries].count("alarm") == 6
    task.config.mopro.calibrate = True
    epoch(3, to=0)
    assert log.said[-1].endswith(": begin label correction later (--start-clean), or raise --threshold")


def test_held_out_images_are_counted_by_the_class_that_they_would_become():
    model = small_model()
    given, trusted = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3]), torch.tensor([0, 2, 2, 1, 3, 1, 2, 0])
    ids = torch.arange(1, 17, 2)
    new, kept = torch.tensor([0, 2, 2, 2, -1, 1, 2, 0]), torch.tensor([1, 1, 1, 1, 0, 1, 1, 1], dtype=torch.bool)
    score = torch.tensor([0.9, 0.9, 0.9, 0.9, 0.1, 0.1, 0.1, 0.9])
    model.correct = lambda *_: (new, kept, new.clamp(min=0), score)
    images = torch.zeros(8, 16, 16, 3, dtype=torch.uint8)
    batches, known = [(images, trusted, ids)], torch.stack([ids, given])
    found = held_out(model, batches, torch.device("cpu"), False, known, trusted=True)
    assert found["of_class"] == [[1, 0, 2, 0], [1, 0, 1, 0]]
    assert [found[n] for n in ("images", "relabelled", "removed", "sure")] == [8, 3 / 8, 1 / 8, 5 / 8]
    assert found["sure_right"] == 4 / 5


def test_the_step_counts_the_winners():
    model = small_model()
    step = train_step(model)
    seen = torch.zeros(CLASSES, dtype=torch.int64)
    total = torch.zeros(CLASSES, dtype=torch.float64)
    correct = model._correct

    def noted(*arguments):
        out = correct(*arguments)
        seen.index_add_(0, out[2], torch.ones_like(out[2]))
        total.index_add_(0, out[2], out[3].double())
        return out

    model._correct = noted
    run_steps(step, 3)
    winners = step.preferred()
    assert torch.equal(winners[:, 0], seen) and int(seen.sum()) == 3 * 8  # steps of the epoch that corrects
    torch.testing.assert_close(winners[:, 1] / 2.0**20, total.float(), rtol=0, atol=24 / 2**20)
    assert torch.equal(step.end_epoch()[1], winners) and not step.preferred().any()
