"""Calibration: its gradient, where it leads, and that a run without it is the official one."""

import pytest
import torch
import torch.nn.functional as F
from small_step import CLASSES, run_steps, small_model, train_step

from mopro_fast.models.calibration import CALIBRATION, Calibration
from mopro_fast.models.mopro import MoPro

T = 0.1


def batch(n: int, classes: int, right: float, seed: int):
    """Scores that prefer one class with a margin of 6, labels that meet it with this probability."""
    g = torch.Generator().manual_seed(seed)
    liked = torch.randint(classes, (n,), generator=g)
    labels = torch.where(torch.rand(n, generator=g) < right, liked, torch.randint(classes, (n,), generator=g))
    prototypes = torch.eye(classes)
    return 6.0 * F.one_hot(liked, classes).float(), F.one_hot(liked, classes) * 0.6, prototypes, labels


def test_slopes_are_the_gradients_of_both_cross_entropies():
    g = torch.Generator().manual_seed(0)
    logits, q, prototypes = (torch.randn(shape, generator=g) for shape in ((7, 5), (7, 3), (5, 3)))
    labels = torch.tensor([0, 4, 2, 2, -1, 1, 3])
    calibration = Calibration()
    calibration.log_scale.copy_(torch.tensor([-0.4, 0.3]))
    slopes = calibration.slopes(logits, q, prototypes, labels, T)
    for i in range(7):
        log_scale = calibration.log_scale.clone().requires_grad_()
        scale = log_scale.exp()
        for j, z in enumerate((scale[0] * logits[i], prototypes @ (scale[1] * q[i]) / T)):
            if labels[i] < 0:
                assert slopes[i, j] == 0
                continue
            (gradient,) = torch.autograd.grad(F.cross_entropy(z, labels[i]), log_scale, retain_graph=True)
            torch.testing.assert_close(slopes[i, j], gradient[j], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("right", [0.3, 0.6, 0.95])
def test_the_confidence_becomes_the_share_of_given_labels_that_are_met(right):
    calibration, classes = Calibration(), 20
    for step in range(300):
        logits, q, prototypes, labels = batch(256, classes, right, step)
        calibration.move(calibration.slopes(logits, q, prototypes, labels, T))
    logits, q, prototypes, labels = batch(20_000, classes, right, 1000)
    met = float((logits.argmax(1) == labels).float().mean())
    of_classifier, of_prototypes = calibration(logits, q)
    for z in (of_classifier, of_prototypes @ prototypes.T / T):
        assert float(z.softmax(1).max(1).values.mean()) == pytest.approx(met, abs=0.03)


def test_rows_that_are_no_numbers_do_not_move_it():
    calibration, (logits, q, prototypes, labels) = Calibration(), batch(8, 4, 0.5, 0)
    logits[2], q[3] = float("nan"), float("inf")
    slopes = calibration.slopes(logits, q, prototypes, labels, T)
    assert slopes.isfinite().all() and slopes[2, 0] == 0 and slopes[3, 1] == 0


def test_it_moves_from_epoch_1_and_only_when_asked():
    plain = small_model()
    assert plain.calibration is None and CALIBRATION not in plain.state_dict()
    plain.config.calibrate = True
    model = MoPro(plain.encoder_q, plain.encoder_k, plain.config).train()
    assert CALIBRATION in model.state_dict() and not model.calibration.log_scale.any()
    step = train_step(model)
    seen, move = [], model.calibration.move
    model.calibration.move = lambda slopes: seen.append(slopes) or move(slopes)
    run_steps(step, 2)
    assert len(seen) == 4  # of the phases 1 and 2
    assert model.calibration.log_scale.all()
    decided = model.correct(torch.zeros(3, CLASSES), torch.zeros(3, 8), torch.tensor([0, 1, -1]))
    assert decided[3].tolist() == pytest.approx([1 / CLASSES] * 3)
