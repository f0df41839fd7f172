"""CAPro's step against the plain, loop-written method of reference_capro.py, and what its stages leave alone."""

import pytest
import torch
from processes import on_ranks
from reference_capro import PlainCAPro
from small_step import SGD, train_step
from test_step import as_floats, close, smooth

from mopro_fast.config import CAProConfig, MoProConfig
from mopro_fast.data.batches import Batch
from mopro_fast.distributed import shuffle_order, sync_buffers
from mopro_fast.models.capro import CAPro
from mopro_fast.models.resnet import Backbone, ResNet
from mopro_fast.training.step import Shuffle

ROWS, CLASSES, DIM, QUEUE, SIZE = 6, 5, 8, 20, 32  # 6 and 12 rows: neither divides the queue
EPOCH_OF_STEP = [0] * 3 + [1] * 2 + [2] * 3 + [3] * 6 + [4] * 3
INIT, CLEAN, UNFREEZE = 1, 3, 4  # the encoder is frozen until epoch 4
NOTHING_KEPT = 11  # at this step rank 0 keeps no row


def small_capro(**changes) -> CAPro:
    torch.manual_seed(0)
    capro = CAProConfig(init_proto=INIT, anchors="a", unfreeze_epoch=0, w_recn=0.7)
    mopro = MoProConfig(
        queue_size=QUEUE, key_momentum=0.9, proto_momentum=0.9, start_clean=CLEAN, w_inst=0.7, w_proto=1.3
    )
    for name, value in changes.items():
        setattr(capro if hasattr(capro, name) else mopro, name, value)
    encoder = ResNet("resnet18", CLASSES, DIM, width=0.125, stem="small")
    return CAPro(encoder, Backbone("resnet18", 0.125, "small"), mopro, capro).train()


def random_images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (*shape, SIZE, SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def plain_steps(rank: int, ranks: int) -> None:
    with smooth():
        compare_plain_steps(rank, ranks)


def compare_plain_steps(rank: int, ranks: int) -> None:
    model = small_capro(unfreeze_epoch=UNFREEZE)
    plain = PlainCAPro(model, ranks)
    fast = train_step(model, ranks * ROWS)
    shuffle = Shuffle(0, ranks * ROWS)
    optimizers = [torch.optim.SGD(replica.parameters(), **SGD) for replica in plain.replicas]
    relabelled = removed = protected = 0
    for step, epoch in enumerate(EPOCH_OF_STEP):
        g = torch.Generator().manual_seed(100 + step)
        views_q, views_k = random_images(2, ranks, ROWS, seed=100 + step)
        labels = torch.randint(CLASSES, (ranks, ROWS), generator=g)
        labels[torch.rand(ranks, ROWS, generator=g) < 0.15] = -1  # none given
        anchors = torch.rand(ranks, ROWS, generator=g) < 0.3
        model.config.threshold = 0.33
        if step == NOTHING_KEPT:
            model.config.threshold = 1.0
            labels[0], anchors[0] = -1, False
        if step == EPOCH_OF_STEP.index(epoch):
            fast.begin_epoch(epoch)
            if model.starts(epoch):
                images, y = random_images(9), torch.arange(9) % (CLASSES - 1)  # no anchor of the last class
                plain.start(as_floats(images), y)
                sync_buffers(model)  # the running statistics are those of rank 0
                model.prototypes.copy_(starts_from(model, images, y))
                assert not model.prototypes[-1].any()
        order = shuffle_order(0, step, ranks * ROWS)
        results, gradients = plain.step(
            as_floats(views_q), as_floats(views_k), labels, anchors, epoch, order, epoch < UNFREEZE
        )
        ids = torch.arange(ROWS) + rank * ROWS
        ((batch, place),) = shuffle([Batch(views_q[rank], views_k[rank], labels[rank], ids)], step)
        out = fast(batch, (place, anchors[rank], None, None), epoch, step, SGD["lr"])

        want = results[rank]
        for name in (name for name in want if name.startswith("loss")):
            close(out.metrics[name].item(), want[name], 1e-5)
        assert torch.equal(out.kept, want["kept"])
        assert torch.equal(out.labels, want["labels"])
        assert int(model.queue_ptr) == plain.ptr
        close(model.queue, plain.queue, 1e-5)
        close(model.prototypes, plain.prototypes, 1e-5)
        ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert ours.keys() == gradients.keys()
        ours, theirs = (torch.cat([g[name].flatten() for name in gradients]) for g in (ours, gradients))
        close(ours, theirs, 1e-5)
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
        if step == NOTHING_KEPT and rank == 0:
            assert not out.kept.any()
            assert out.loss == 0
        for r, y, anchor in zip(results, labels, anchors, strict=True):
            relabelled += int((r["labels"] != y).sum())
            removed += int((~r["kept"] & (y >= 0)).sum())
            protected += int((anchor & (y >= 0)).sum()) if epoch >= CLEAN else 0

        for o in optimizers:
            o.step()
        plain.update_key_encoder()
        for p, p_plain in zip(model.encoder_k.parameters(), plain.keys[rank].parameters(), strict=True):
            close(p, p_plain, 1e-5)
    assert min(relabelled, removed, protected) > 0, (relabelled, removed, protected)  # every branch was taken


def starts_from(model: CAPro, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    z = model.embed(images, None)
    return torch.nn.functional.normalize(torch.nn.functional.one_hot(labels, CLASSES).T.float() @ z, dim=1)


@pytest.mark.medium
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.ranks)])
def test_steps_through_all_stages_equal_the_plain_method(ranks: int) -> None:
    on_ranks(ranks, plain_steps)
