"""Calibration: its gradient, where it leads, and that a run without it is the official one."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from processes import on_ranks
from small_step import CLASSES, run_steps, small_model, train_step

from mopro_fast.distributed import gather_rows
from mopro_fast.models import calibration
from mopro_fast.models.calibration import BIAS, LOG_SCALE, Calibration
from mopro_fast.models.mopro import MoPro
from mopro_fast.ops import reference

T = 0.1


def batch(n: int, classes: int, right: float, seed: int):
    """Scores that prefer one class with a margin of 6, labels that meet it with this probability."""
    g = torch.Generator().manual_seed(seed)
    liked = torch.randint(classes, (n,), generator=g)
    labels = torch.where(torch.rand(n, generator=g) < right, liked, torch.randint(classes, (n,), generator=g))
    prototypes = torch.eye(classes)
    return 6.0 * F.one_hot(liked, classes).float(), F.one_hot(liked, classes) * 0.6, prototypes, labels


def test_it_moves_along_the_gradient_of_both_cross_entropies():
    g = torch.Generator().manual_seed(0)
    logits, q, prototypes = (torch.randn(shape, generator=g) for shape in ((7, 5), (7, 3), (5, 3)))
    labels = torch.tensor([0, 4, 2, 2, -1, 1, 3])
    logits[5, 2], q[6] = float("nan"), float("inf")  # these rows do not count
    own = Calibration(5)
    own.log_scale.copy_(torch.tensor([-0.4, 0.3]))
    own.bias.copy_(0.3 * torch.randn(2, 5, generator=g))
    before = own.log_scale.clone(), own.bias.clone()
    own.move(own(logits, q, prototypes, T), labels, T)
    for j, rows in enumerate(([0, 1, 2, 3, 6], [0, 1, 2, 3, 5])):
        log_scale, bias = (x[j].clone().requires_grad_() for x in before)
        scores = logits if j == 0 else q @ prototypes.T / T
        loss = F.cross_entropy(log_scale.exp() * scores[rows] + bias, labels[rows], reduction="sum") / 7
        of_scale, of_bias = torch.autograd.grad(loss, (log_scale, bias))
        share = (log_scale.exp() * scores[rows] + bias).detach().softmax(1).sum(0) / 7
        moved = (own.log_scale[j] - before[0][j], own.bias[j] - before[1][j])
        torch.testing.assert_close(moved[0], (-0.05 * of_scale).clamp(-0.1, 0.1), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(moved[1], (-0.05 * of_bias / (share + 1 / 7)).clamp(-0.1, 0.1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("right", [0.3, 0.6, 0.95])
def test_the_confidence_becomes_the_share_of_given_labels_that_are_met(right):
    own, classes = Calibration(20), 20
    for step in range(400):
        logits, q, prototypes, labels = batch(256, classes, right, step)
        own.move(own(logits, q, prototypes, T), labels, T)
    logits, q, prototypes, labels = batch(20_000, classes, right, 1000)
    met = float((logits.argmax(1) == labels).float().mean())
    s = own(logits, q, prototypes, T)
    for z in (s.logits, s.q @ s.prototypes.T / T):
        assert float(z.softmax(1).max(1).values.mean()) == pytest.approx(met, abs=0.03)


def test_a_class_that_is_never_preferred_becomes_as_probable_as_it_is_given():
    """The feedback that empties a class: its scores fall, its images are removed, its scores fall."""
    own, classes = Calibration(10), 10
    for step in range(600):
        logits, q, prototypes, labels = batch(256, classes, 0.6, step)
        logits[:, 3], prototypes[3] = logits[:, 3] - 5, -0.2
        own.move(own(logits, q, prototypes, T), labels, T)
    s = own(logits, q, prototypes, T)
    for z in (s.logits, s.q @ s.prototypes.T / T):
        assert float(z.softmax(1)[:, 3].mean()) == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize("classes, rows, head", [(10, 128, 0.1), (1000, 512, 0.1), (300, 256, 0.2)])
def test_frequent_classes_do_not_make_it_swing(classes, rows, head):
    own, g = Calibration(classes), torch.Generator().manual_seed(0)
    shares = torch.full((classes,), (1 - head) / (classes - 1))
    shares[0] = head
    prototypes, seen = torch.eye(classes, 8), []
    for _ in range(400):
        labels = torch.multinomial(shares, rows, replacement=True, generator=g)
        logits = 0.1 * torch.randn(rows, classes, generator=g)
        own.move(own(logits, torch.zeros(rows, 8), prototypes, T), labels, T)
        seen.append(own.bias[0, 0].item())
    last = torch.tensor(seen[-100:])
    assert last.std() < 0.1 and last.diff().abs().max() < 0.05
    s = own(logits, torch.zeros(rows, 8), prototypes, T)
    assert float(s.logits.softmax(1)[:, 0].mean()) == pytest.approx(head, rel=0.2)


def test_it_moves_from_epoch_1_and_only_when_asked():
    plain = small_model()
    assert plain.calibration is None and not any("calibration" in name for name in plain.state_dict())
    plain.config.calibrate = True
    model = MoPro(plain.encoder_q, plain.encoder_k, plain.config).train()
    assert {LOG_SCALE, BIAS} <= model.state_dict().keys() and not model.calibration.log_scale.any()
    step = train_step(model)
    calls, move = [], model.calibration.move
    model.calibration.move = lambda *args: calls.append(args) or move(*args)
    run_steps(step, 2)
    assert len(calls) == 4  # of the phases 1 and 2
    assert model.calibration.log_scale.all() and model.calibration.bias.any()
    s = model.scores(torch.zeros(3, CLASSES), torch.zeros(3, 8))
    want = reference.mixed_scores(s.logits, s.q, s.prototypes, 0.5, T)[0]
    got = model.correct(torch.zeros(3, CLASSES), torch.zeros(3, 8), torch.tensor([0, 1, -1]))
    torch.testing.assert_close(got[3], want.max(1).values)
    torch.testing.assert_close(want[0], 0.5 * (model.calibration.bias.softmax(1)).sum(0))


def on_a_rank(rank: int, ranks: int) -> None:
    """Two steps on this rank's part of the rows, and on all rows."""
    parts, whole = Calibration(6), Calibration(6)
    for step in range(2):
        logits, q, prototypes, labels = batch(8, 6, 0.5, step)
        labels[step] = -1
        mine = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
        parts.move(parts(logits[mine], q[mine], prototypes, T), labels[mine], T)
        with mock.patch.multiple(calibration, gather_rows=lambda x: x, world=lambda: (0, 1)):
            whole.move(whole(logits, q, prototypes, T), labels, T)
    for name, own in parts.state_dict().items():
        torch.testing.assert_close(own, whole.state_dict()[name], rtol=1e-5, atol=1e-7)
        assert all(torch.equal(own, other) for other in gather_rows(own[None]))


@pytest.mark.ranks
def test_ranks_move_it_as_one_rank_with_all_rows():
    on_ranks(2, on_a_rank)
