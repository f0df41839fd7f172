"""Label correction per class: the table, the alarms, and what a run writes of them."""

import numpy as np
import pytest
import torch
from small_step import CLASSES, run_steps, small_model, train_step

from mopro_fast.labels import REMOVED, UNSEEN
from mopro_fast.training.classes import alarms, table

C, EACH = 5, 40


@pytest.fixture
def given() -> np.ndarray:
    return np.repeat(np.arange(C), EACH)


def judged(given, assigned, agreement=(), held_out=0, names=None) -> list[str]:
    found = table(given, assigned, torch.ones(C, 2, dtype=torch.int64))
    return alarms(found, given, assigned, list(agreement), held_out, names)


def test_the_table_counts_each_class(given):
    assigned = given.copy()
    assigned[:7], assigned[40:43], assigned[50], assigned[199] = 3, REMOVED, UNSEEN, 0
    winners = torch.zeros(C, 2, dtype=torch.int64)
    winners[3] = torch.tensor([4, 3 << 20])
    assert table(given, assigned, winners) == {
        "images": [40, 39, 40, 40, 40],
        "relabelled": [7, 0, 0, 0, 1],
        "removed": [0, 3, 0, 0, 0],
        "joined": [1, 0, 0, 7, 0],
        "winner": [0, 0, 0, 4, 0],
        "score": [None, None, None, 0.75, None],
    }


def test_where_all_is_well_there_is_no_alarm(given):
    rng = np.random.default_rng(0)
    assigned = np.where(rng.random(len(given)) < 0.4, rng.integers(C, size=len(given)), given)
    assigned[rng.random(len(given)) < 0.2] = REMOVED
    assert judged(given, assigned, [30, 41, 40, 44, 43.5], 500) == []


def test_a_class_that_empties_is_named_with_where_its_images_went(given):
    assigned = given.copy()
    rows = np.flatnonzero(given == 2)
    assigned[rows[:30]], assigned[rows[30:37]] = REMOVED, 0
    (line,) = judged(given, assigned, names=["ant", "bee", "cat", "dog", "elk"])
    assert line.startswith(
        "1 of 5 classes are being lost: "
        "class 2 (cat) came with 40 images and has 3 (30 removed, 7 relabelled, 0 joined): "
    )
    assert "--start-clean" in line
    assert judged(given, np.where(np.arange(len(given)) == rows[0], 2, assigned)) == []  # a tenth is left
    few = np.delete(given, rows[9:])  # nine images are too few to tell
    assert judged(few, np.where(few == 2, REMOVED, few)) == []


def test_a_class_that_takes_over_others_is_named(given):
    assigned = given.copy()
    assigned[:25], assigned[41:57] = 4, 4
    (line,) = judged(given, assigned)
    assert line.startswith("1 of 5 classes take over others: class 4 came with 40 images and has 81 (")


def test_classes_that_change_places_are_named(given):
    assigned = given.copy()
    assigned[0:21], assigned[40:65] = 1, 0
    (line,) = judged(given, assigned)
    assert line.startswith("classes 0 and 1 change places: 21 images of 0 became 1, 25 the other way")
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
def test_agreement_with_the_holdout_that_falls_is_named(given, agreement, told):
    lines = judged(given, given, agreement, 5000)
    assert len(lines) == told
    assert not told or "43.0 % of the held-out labels, in epoch 2 it was 50.0 %" in lines[0]
    assert judged(given, given, agreement, 300) == []  # so few images cannot tell


def test_the_step_counts_the_winners_without_waiting():
    model = small_model()
    step = train_step(model)
    seen = torch.zeros(CLASSES, dtype=torch.int64)
    total = torch.zeros(CLASSES, dtype=torch.float64)
    correct = model.correct

    def noted(*arguments):
        out = correct(*arguments)
        seen.index_add_(0, out[2], torch.ones_like(out[2]))
        total.index_add_(0, out[2], out[3].double())
        return out

    model.correct = noted
    run_steps(step, 3)
    winners = step.preferred()
    assert torch.equal(winners[:, 0], seen) and int(seen.sum()) == 3 * 8  # steps of the epoch that corrects
    torch.testing.assert_close(winners[:, 1] / 2.0**20, total.float(), rtol=0, atol=24 / 2**20)
    assert torch.equal(step.end_epoch()[1], winners) and not step.preferred().any()
