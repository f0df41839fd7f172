"""Twenty training steps of the real model against the plain, loop-written method of reference_step.py."""

import copy
import json
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from processes import on_ranks
from reference_step import PlainMoPro
from small_step import SGD, run_steps, small_model, train_step

from mopro_fast.config import MoProConfig
from mopro_fast.data.pipeline import Batch
from mopro_fast.distributed import data_parallel, gather_rows, shuffle_order, start_exchange
from mopro_fast.models.mopro import MoPro
from mopro_fast.models.resnet import GroupedBatchNorm2d, ResNet
from mopro_fast.training.step import Shuffle

STEPS, ROWS, CLASSES, DIM, QUEUE, SIZE = 20, 6, 5, 8, 20, 32  # 6 and 12 rows: neither divides the queue
EPOCH_OF_STEP = [0] * 5 + [1] * 5 + [2] * 10
NOTHING_KEPT = 13  # at this step rank 0 keeps no row
GOLDEN = Path(__file__).with_name("golden_losses.json")


def close(actual, expected, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def as_floats(images):
    """uint8 [..., H, W, 3] → normalised float32 [..., 3, H, W], with ImageNet's mean and standard deviation."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((images / 255 - mean) / std).movedim(-1, -3)


def smooth():
    """At a ReLU's kink a rounding difference of 1e-8 becomes a jump in the gradient, and of ~700,000 units some sit
    there in every step. SiLU in its place leaves float32 rounding alone between two versions."""
    return mock.patch.object(F, "relu", lambda x, **_: F.silu(x))


def twenty_steps(rank: int, ranks: int, bn_group: int) -> None:
    with smooth():
        compare_twenty_steps(rank, ranks, bn_group)


def compare_twenty_steps(rank: int, ranks: int, bn_group: int) -> None:
    torch.manual_seed(3)
    config = MoProConfig(
        queue_size=QUEUE,
        key_momentum=0.9,
        proto_momentum=0.9,
        alpha=0.5,
        threshold=0.4,
        start_clean=2,
        w_inst=0.7,
        w_proto=1.3,
    )
    encoder = ResNet("resnet18", CLASSES, DIM, width=0.125, stem="small", bn_group=bn_group)
    model = MoPro(encoder, copy.deepcopy(encoder), config).train()
    plain = PlainMoPro(encoder, model.queue, config, ranks)
    fast = train_step(model, ranks * ROWS)
    shuffle = Shuffle(0, ranks * ROWS)
    plain_optimizers = [torch.optim.SGD(e.parameters(), **SGD) for e in plain.encoder_q]
    relabelled = removed = 0
    for step, epoch in enumerate(EPOCH_OF_STEP):
        g = torch.Generator().manual_seed(100 + step)
        shape = (ranks, ROWS, SIZE, SIZE, 3)
        views_q, views_k = (torch.randint(256, shape, dtype=torch.uint8, generator=g) for _ in range(2))
        labels = torch.randint(CLASSES - 2, (ranks, ROWS), generator=g)  # few classes: every batch repeats some
        labels[torch.rand(ranks, ROWS, generator=g) < 0.15] = -1  # none given
        config.threshold = 0.4
        if step == NOTHING_KEPT:
            config.threshold = 1.0
            with torch.no_grad():
                logits, q = copy.deepcopy(plain.encoder_q[0])(as_floats(views_q[0]))
                t = 0.5 * logits.softmax(1) + 0.5 * (q @ plain.prototypes.T / config.temperature).softmax(1)
                labels[0] = t.argmin(1)
        order = shuffle_order(0, step, ranks * ROWS)
        results, gradients = plain.step(as_floats(views_q), as_floats(views_k), labels, epoch, order)
        ids = torch.arange(ROWS) + rank * ROWS
        ((batch, place),) = shuffle([Batch(views_q[rank], views_k[rank], labels[rank], ids)], step)
        out = fast(batch, place, epoch, step, SGD["lr"])

        want = results[rank]
        for name in ("loss", "loss_cls", "loss_proto", "loss_inst"):
            close(out.metrics[name].item(), want[name], 1e-5)
        assert torch.equal(out.kept, want["kept"])
        assert torch.equal(out.labels, want["labels"])
        assert int(model.queue_ptr) == plain.ptr
        close(model.queue, plain.queue, 1e-5)
        close(model.prototypes, plain.prototypes, 1e-5)
        ours = torch.cat([p.grad.flatten() for p in encoder.parameters()])
        theirs = torch.cat([gradients[name].flatten() for name, _ in encoder.named_parameters()])
        close(ours, theirs, 1e-5)
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()
        if step == NOTHING_KEPT and rank == 0:
            assert not out.kept.any() and out.loss.isfinite()
        decided = torch.cat([torch.where(r["kept"], r["labels"], -1) for r in results])
        assert torch.equal(fast.decisions(), decided.int())
        relabelled += sum(int((r["labels"] != y).sum()) for r, y in zip(results, labels, strict=True))
        removed += sum(int((~r["kept"]).sum()) for r in results)

        for o in plain_optimizers:
            o.step()
        plain.update_key_encoder()
        for p, p_plain in zip(model.encoder_k.parameters(), plain.encoder_k[rank].parameters(), strict=True):
            close(p, p_plain, 1e-5)
    assert relabelled > 0 and removed > 0  # the run did go through every branch


@pytest.mark.medium
@pytest.mark.parametrize(
    "ranks, bn_group",
    [
        (1, 0),
        (1, 3),
        pytest.param(2, 0, marks=pytest.mark.ranks),
        pytest.param(2, 3, marks=[pytest.mark.ranks, pytest.mark.slow]),
    ],
)
def test_twenty_steps_equal_the_plain_method(ranks: int, bn_group: int) -> None:
    on_ranks(ranks, twenty_steps, bn_group)


def shuffle_round_trip(rank: int, ranks: int) -> None:
    rows = 5
    everything = torch.arange(ranks * rows * 4).reshape(ranks * rows, 2, 2).to(torch.uint8)
    mine = everything[rank * rows : (rank + 1) * rows]
    for step in range(5):
        order = shuffle_order(7, step, ranks * rows)
        there = start_exchange(mine, order)()
        assert torch.equal(gather_rows(there), everything[torch.from_numpy(order)])
        assert torch.equal(start_exchange(there, order.argsort())(), mine)


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_rows_change_ranks_and_come_back(ranks: int) -> None:
    on_ranks(ranks, shuffle_round_trip)


def first_gradients_again(rank: int, _ranks: int) -> None:
    """From three ranks on the order of a sum matters: a fresh wrapper must sum as one that has run for a while."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(*(torch.nn.Linear(40, 40) for _ in range(12)))
    wrapped = data_parallel(module, torch.zeros(2, 40))
    x = torch.randn(8, 40, generator=torch.Generator().manual_seed(rank))
    gradients = []
    for _ in range(3):
        module.zero_grad()
        wrapped(x).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])


@pytest.mark.ranks
def test_the_first_step_after_a_resume_sums_gradients_as_the_others() -> None:
    on_ranks(4, first_gradients_again)


def test_shuffle_depends_on_seed_and_step_alone() -> None:
    assert (shuffle_order(1, 2, 64) == shuffle_order(1, 2, 64)).all()
    assert (shuffle_order(1, 2, 64) != shuffle_order(1, 3, 64)).any()
    assert (shuffle_order(1, 2, 64) != shuffle_order(2, 2, 64)).any()


def test_missing_labels_are_learnt_only_once_relabelled() -> None:
    torch.manual_seed(0)
    config = MoProConfig(queue_size=8, start_clean=2, threshold=0.0)
    encoder = ResNet("resnet18", 4, 8, width=0.125, stem="small")
    model = MoPro(encoder, copy.deepcopy(encoder), config).train()
    views = torch.randint(256, (2, 4, 8, 8, 3), dtype=torch.uint8)
    labels = torch.tensor([0, -1, 1, -1])
    place = torch.arange(4)
    out = model(views[0], views[1], labels, 0, place)
    assert out.kept.tolist() == [True, False, True, False]
    assert model.prototypes.norm(dim=1).gt(0).tolist() == [True, True, False, False]
    out = model(views[0], views[1], labels, 2, place)
    assert out.kept.all() and (out.labels >= 0).all()


def test_grouped_batchnorm_is_batchnorm_of_each_group() -> None:
    torch.manual_seed(0)
    grouped = ResNet("resnet18", 3, 8, width=0.125, stem="small", bn_group=4).train()
    x = torch.randn(8, 3, 8, 8).to(memory_format=torch.channels_last)
    split = copy.deepcopy(grouped)
    parts = [copy.deepcopy(grouped)(rows) for rows in x.split(4)]
    logits, _ = split(x)
    close(logits, torch.cat([p[0] for p in parts]), 1e-6)
    bn = grouped.bn1
    stem = F.conv2d(x, grouped.conv1.weight, padding=1)
    mean = torch.stack([rows.mean((0, 2, 3)) for rows in stem.split(4)]).mean(0)
    var = torch.stack([rows.transpose(0, 1).flatten(1).var(1) for rows in stem.split(4)]).mean(0)
    close(split.bn1.running_mean, 0.9 * bn.running_mean + 0.1 * mean, 1e-5)
    close(split.bn1.running_var, 0.9 * bn.running_var + 0.1 * var, 1e-5)
    split.eval()(x)
    assert {int(b) for name, b in split.named_buffers() if name.endswith("num_batches_tracked")} == {1}


@pytest.mark.parametrize("fused", ["on", "off"])
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_activations_computed_twice_give_the_same_bits(arch: str, fused: str) -> None:
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        encoder = ResNet(arch, 4, 8, width=0.125, stem="small", bn_group=2).train()
        encoder.recompute = recompute
        for m in encoder.modules():
            if isinstance(m, GroupedBatchNorm2d):
                m.fused = fused
        kept: dict[int, int] = {}

        def note(x, kept=kept):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            logits, q = encoder(torch.randn(4, 3, 16, 16))
        (logits.sum() + q[:, 0].sum()).backward()
        gradients = [p.grad for p in encoder.parameters()]
        results.append((sum(kept.values()), [logits.detach(), *gradients, *encoder.buffers()]))
    (much, a), (little, b) = results
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert little < 0.7 * much


def golden_losses() -> list[float]:
    """Twelve steps through all phases on fixed random images: the loss of each."""
    return [loss.item() for loss in run_steps(train_step(small_model()), 4)]


def test_losses_are_the_committed_ones() -> None:
    """python -c 'import test_step; test_step.write_golden()' in tests/ renews the file, on purpose only."""
    with smooth():
        torch.testing.assert_close(golden_losses(), json.loads(GOLDEN.read_text()), rtol=1e-5, atol=0)


def write_golden() -> None:
    with smooth():
        GOLDEN.write_text(json.dumps(golden_losses()) + "\n")
