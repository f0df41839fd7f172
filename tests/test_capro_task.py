"""What CAPro's task adds to batches and where its prototypes come from; details of its model."""

from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from processes import on_ranks
from small_step import SGD, train_step
from test_capro import CLASSES, ROWS, random_images, small_capro
from test_capro_training import anchors, capro_config, digits  # noqa: F401

from mopro_fast import ops
from mopro_fast.data.batches import Batch
from mopro_fast.data.index import load_index
from mopro_fast.training import tasks
from mopro_fast.training.loop import Trainer
from mopro_fast.training.optim import SGDThenEMA
from mopro_fast.training.tasks import CAProTask, task_of


def whole_images(digits, anchors, out, **changes):  # noqa: F811
    """Settings whose crops are the files' own pixels."""
    c = capro_config(digits, anchors, out, capro_colour_shift=0.0, **changes)
    c.data.image_size = c.data.eval_resize = 32
    c.data.augment = type(c.data.augment)(scale=(1.0, 1.0), flip=0.0)
    return c


@pytest.mark.parametrize("cache", ["no", "device"])
@pytest.mark.medium
def test_prototypes_are_the_means_of_the_anchors_that_are_shown(cache, digits, anchors, tmp_path):  # noqa: F811
    """70 anchors, some held out, in batches of 64: none counts twice, and each for its own class."""
    trainer = Trainer(task_of(whole_images(digits, anchors, tmp_path, data_holdout="0.2", data_cache=cache)))
    model, index = trainer.model, trainer.index
    rows = np.flatnonzero(trainer.task._anchors.mask)
    used = rows[np.isin(rows, index.usable)]
    assert 0 < len(used) < len(rows) == 70
    files = [digits / index.paths[i] for i in used]
    pixels = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    z = model.embed(torch.from_numpy(np.stack(pixels)), None)
    labels = torch.from_numpy(index.labels[used])
    expected = F.normalize(torch.stack([z[labels == c].mean(0) for c in range(10)]), dim=1)
    trainer.task.begin_epoch(model, 1, trainer.device, bf16=False)
    trainer.close()
    torch.testing.assert_close(model.prototypes, expected, rtol=1e-4, atol=1e-5)


def test_each_row_gets_its_own_anchor_weight_and_shifts(digits, anchors, tmp_path):  # noqa: F811
    config = capro_config(digits, anchors, tmp_path, capro_row_weights=True)
    task = task_of(config)
    task.shown(load_index(digits, "train", num_classes=10))
    table, ids = task._anchors, torch.tensor([5, 700, 0, 33] * 16)
    batch = Batch(torch.zeros(64, 1), torch.zeros(64, 1), torch.zeros(64), ids)
    found = [extra for _, extra in task.batches([batch, batch], 7)]
    for place, mask, shifts, weights in found:
        assert sorted(place.tolist()) == list(range(64))
        assert mask.tolist() == table.mask[ids].tolist()
        assert weights.tolist() == table.weights[ids].tolist()
        assert shifts.shape == (2, 64, 3)
    assert not torch.equal(found[0][2], found[1][2])
    again = next(iter(task.batches([batch], 8)))[1]
    assert torch.equal(again[2], found[1][2])  # a function of the step


def test_colour_shifts_have_the_strength_that_is_set_and_are_those_of_one_rank(digits, anchors, tmp_path):  # noqa: F811
    config = capro_config(digits, anchors, tmp_path, capro_colour_shift=0.1, optim_batch_size=4096)
    task = CAProTask(config)
    draws = ops.colour.principal_shifts(np.random.default_rng(0).normal(scale=0.1, size=(100000, 3)))
    whole = task._shifts((0, 3), 2, torch.device("cpu"))
    torch.testing.assert_close(whole.std((0, 1)), torch.from_numpy(draws.std(0)), rtol=0.1, atol=0)
    assert abs(np.corrcoef(whole[0, :, 0], whole[1, :, 0])[0, 1]) < 0.1  # the views' are independent
    parts = []
    for rank in (0, 1):
        with mock.patch.object(tasks, "world", lambda rank=rank: (rank, 2)):
            parts.append(task._shifts((0, 3), 2, torch.device("cpu")))
    assert torch.equal(torch.cat(parts, 1), whole)
    config.capro.colour_shift = 0.0
    assert task._shifts((0, 3), 2, torch.device("cpu")) is None


def test_each_view_is_shifted_by_its_own():
    model = small_capro()
    view_q, view_k = random_images(2, ROWS)
    shifts, seen = torch.rand(2, ROWS, 3), []
    normalize = ops.normalize

    def see(images, shifts=None, **how):
        seen.append(shifts)
        return normalize(images, shifts=shifts, **how)

    with mock.patch.object(ops, "normalize", see):
        model(view_q, view_k, torch.arange(ROWS) % CLASSES, 0, torch.arange(ROWS), None, shifts)
        model.embed(view_q, shifts[0])
    assert [torch.equal(a, b) for a, b in zip(seen, (*shifts, shifts[0]), strict=True)] == [True] * 3


def test_a_fresh_model_has_two_encoders_alike_and_the_codes_initial_biases():
    model = small_capro()
    own = model.encoder_q.state_dict()
    assert all(torch.equal(t, own[name]) for name, t in model.encoder_k.state_dict().items())
    assert not any(name.startswith(("classifier", "fc1", "fc2")) for name in model.encoder_k.state_dict())
    for layer in (model.encoder_q.fc1, model.reconstruction[2]):
        assert bool((layer.bias == 0.01).all())
    assert not model.encoder_q.classifier.bias.any()
    bound = (6 / model.auxiliary.in_features) ** 0.5
    assert 0.9 * bound < float(model.auxiliary.weight.detach().abs().max()) <= bound


@pytest.mark.parametrize("which", [0, 1, 2, 3, 4, 6, 7, 8, 9, 10])
def test_soft_labels_go_where_they_belong(which):
    """Losses, written out from the outputs; soft labels of the auxiliary classifier: 0, 7, 10."""
    model = small_capro(soft_label=which, init_proto=0, beta=0.3, update_freq=5)  # the prototypes stay
    model.prototypes.copy_(F.normalize(torch.randn(CLASSES, 8), dim=1))
    labels, outputs = torch.arange(ROWS) % CLASSES, []
    model.heads.register_forward_hook(lambda *hooked: outputs.append(hooked[2]) and None)
    out = model(*random_images(2, ROWS), labels, 1, torch.arange(ROWS))
    logits, z, _, _, a = (x.detach() for x in outputs[0])
    own, aux, prototypes = logits.softmax(1), a.softmax(1), (z @ model.prototypes.T / 0.1).softmax(1)
    weights = model.auxiliary.weight.detach()
    bank = ops.collective_targets(z, model.queue, weights, model.prototypes, alpha=0.5, temperature=0.1)
    mixed = 0.5 * own + 0.5 * prototypes
    uniform = torch.full_like(own, 1 / CLASSES)
    targets = {0: own, 1: own, 2: uniform, 3: own, 4: own, 6: prototypes, 7: bank, 8: aux, 9: bank, 10: aux}[which]
    given = {3: own, 4: mixed}.get(which)
    share = torch.full((ROWS,), 0.7) if given is None else given[torch.arange(ROWS), labels]
    share = torch.ones(ROWS) if which == 0 else share

    def softened(scores):
        soft = -(targets * scores.log_softmax(1)).sum(1)
        return (share * F.cross_entropy(scores, labels, reduction="none") + (1 - share) * soft).mean()

    of_aux = which in (0, 7, 10)
    expected_cls = F.cross_entropy(logits, labels) if of_aux else softened(logits)
    expected_aux = softened(a) if of_aux else F.cross_entropy(a, labels)
    torch.testing.assert_close(out.metrics["loss_cls"], expected_cls, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.metrics["loss_aux"], expected_aux, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.metrics["acc_aux"], (a.argmax(1) == labels).float().mean())
    m = out.metrics
    total = m["loss_cls"] + m["loss_aux"] + 0.7 * m["loss_inst"] + 1.3 * m["loss_proto"] + 0.7 * m["loss_recn"]
    torch.testing.assert_close(out.loss.detach(), total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("enabled", "dtype"), [(True, torch.bfloat16), (False, None)], ids=["bf16", "fp32"])
def test_collective_targets_multiply_in_the_steps_precision(enabled, dtype):
    model, seen = small_capro(), []
    targets = ops.collective_targets

    def see(*args, dtype, **options):
        seen.append(dtype)
        return targets(*args, dtype=dtype, **options)

    with mock.patch.object(ops, "collective_targets", see), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        model(*random_images(2, ROWS), torch.arange(ROWS) % CLASSES, 0, torch.arange(ROWS))
    assert seen == [dtype]


def test_weights_of_one_change_nothing_and_scale_all_but_the_reconstruction():
    views, labels = random_images(2, ROWS), torch.arange(ROWS) % CLASSES
    outs = [
        small_capro()(*views, labels, 0, torch.arange(ROWS), None, None, weights)
        for weights in (None, torch.ones(ROWS), torch.arange(ROWS) / 5.0)
    ]
    assert torch.equal(outs[0].loss, outs[1].loss)
    recn = 0.7 * outs[0].metrics["loss_recn"]
    torch.testing.assert_close(outs[2].loss.detach() - recn, 0.5 * (outs[0].loss.detach() - recn))


def bf16_steps(rank: int, ranks: int) -> None:
    """Two ranks whose encoders compute with copies in 16 bits, frozen first and then not."""
    model = small_capro(unfreeze_epoch=1)
    step = train_step(model, ROWS * ranks, precision="bf16")
    conv = model.encoder_q.conv1.weight.detach().clone()
    for epoch in (0, 1):
        step.begin_epoch(epoch)
        views = random_images(2, ROWS, seed=rank)
        batch = Batch(*views, torch.arange(ROWS) % CLASSES, torch.arange(ROWS))
        out = step(batch, torch.arange(ROWS * ranks), epoch, 0, SGD["lr"])
        assert out.loss.isfinite()
        assert torch.equal(model.encoder_q.conv1.weight, conv) == (epoch == 0)


@pytest.mark.medium
@pytest.mark.ranks
def test_two_ranks_train_in_sixteen_bits() -> None:
    on_ranks(2, bf16_steps)


def test_parameters_that_start_later_join_fused_sgd():
    """PyTorch's fused SGD takes momentum buffers of all parameters or of none."""
    early, late = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = SGDThenEMA([early, late], None, lr=0.1, momentum=0.9, fused=True)
    plain = torch.optim.SGD([torch.nn.Parameter(torch.ones(3)) for _ in range(2)], lr=0.1, momentum=0.9)
    for trained in ([0], [0, 1], [0, 1]):
        for o in (optimizer, plain):
            for i, p in enumerate(o.param_groups[0]["params"]):
                p.grad = torch.ones(3) if i in trained else None
            o.step()
    for p, q in zip(optimizer.param_groups[0]["params"], plain.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(p, q)
