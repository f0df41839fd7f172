"""Re-training the classifier of a model of CAPro, against its official loop written out."""

import json
import os
import signal
from pathlib import Path

import capro_model
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from downstream_data import CLASSES, write_folders
from downstream_data import config as demo_config

from mopro_fast import cli, ops
from mopro_fast.checkpoints import state as checkpoint
from mopro_fast.checkpoints.formats import digest
from mopro_fast.checkpoints.weights import build_encoder, load_weights
from mopro_fast.downstream.retrain import Retrain, RetrainTask, settings
from mopro_fast.training.loop import Trainer
from mopro_fast.training.optim import learning_rate


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """data/, a checkpoint of CAPro as c.pt, and cleaned.json, which drops some images and changes some labels."""
    folder = tmp_path_factory.mktemp("retrain")
    write_folders(folder / "data", {"train": 5, "val": 1})
    c = demo_config()
    c.method = "capro"
    capro_model.write(folder / "c.pt", c)
    images = [f"{name}/{i}.png" for name in CLASSES for i in range(4)]
    labels = [(c + (i == 3)) % len(CLASSES) for c in range(len(CLASSES)) for i in range(4)]
    (folder / "cleaned.json").write_text(json.dumps({"images": images, "labels": labels}))
    return folder


def configure(folder: Path, out: Path) -> Retrain:
    c = settings(capro=True)
    c.cleaned, c.mixup, c.run.out = str(folder / "cleaned.json"), 0.8, str(out)
    c.data.path, c.data.val, c.data.num_classes, c.data.threads = str(folder / "data/train"), None, len(CLASSES), 1
    c.data.image_size = c.data.eval_resize = 16
    c.optim.epochs, c.optim.batch_size, c.optim.lr = 2, 8, 0.05
    c.run.device, c.run.log_every, c.run.checkpoint_every, c.run.tensorboard = "cpu", 1, 1, False
    return c


def trainer_of(c: Retrain, folder: Path) -> Trainer:
    return Trainer(RetrainTask(c, load_weights(folder / "c.pt")))


def last(out: Path) -> checkpoint.RunState:
    return checkpoint.load(checkpoint.all_of(out / "checkpoints")[-1])


def test_the_defaults_are_the_official_settings():
    c = settings(capro=True)
    o = c.optim
    assert (o.epochs, o.batch_size, o.lr, o.momentum, o.weight_decay) == (15, 256, 1e-4, 0.9, 1e-4)
    rates = [learning_rate(o, e, 0, 10) for e in range(15)]
    assert rates == pytest.approx([1e-4 * 0.5 * (1 + np.cos(np.pi * e / 15)) for e in range(15)])
    assert c.data.augment.scale == (0.8, 1.0) and not c.resample and c.freeze
    mopro = settings(capro=False)
    assert mopro == Retrain() and mopro.train_bias and not mopro.mixup_beside and not mopro.moving_statistics


@pytest.mark.medium
@pytest.mark.parametrize("mixup", [0.8, 0.0])
def test_epochs_are_the_official_ones_written_out(folder, tmp_path, mixup):
    c = configure(folder, tmp_path)
    c.mixup = mixup
    trainer = trainer_of(c, folder)
    batches = [batch for epoch in (0, 1) for batch in trainer.loader.epoch(epoch)]
    trainer.close()
    assert len(batches) == 6 and all((b.labels >= 0).all() and len(b.labels) == 8 for b in batches)
    weights = load_weights(folder / "c.pt")
    encoder = build_encoder(weights).train()
    classifier = encoder.classifier.weight
    optimizer = torch.optim.SGD([classifier], 0.05, momentum=0.9, weight_decay=1e-4)
    losses = []
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 0.05 * 0.5 * (1 + np.cos(np.pi * (step // 3) / 2))
        images = ops.normalize(batch.view_q)
        with torch.no_grad():
            x = encoder.features(images)
        loss = F.cross_entropy(x @ classifier.T, batch.labels)
        if mixup:
            rng = np.random.default_rng((3, 0, step))
            share, partner = rng.beta(mixup, mixup), torch.from_numpy(rng.permutation(8))
            with torch.no_grad():
                x = encoder.features(share * images + (1 - share) * images[partner])
            logits = x @ classifier.T
            loss = loss + share * F.cross_entropy(logits, batch.labels)
            loss = loss + (1 - share) * F.cross_entropy(logits, batch.labels[partner])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    trainer = trainer_of(c, folder)
    assert trainer.run() == 0
    found, before = last(tmp_path).model, weights.state
    for name, t in encoder.state_dict().items():
        torch.testing.assert_close(found[f"encoder_q.{name}"], t, rtol=1e-4, atol=1e-6, msg=name)
    count = before["encoder_q.bn1.num_batches_tracked"] + len(batches) * (2 if mixup else 1)
    assert found["encoder_q.bn1.num_batches_tracked"] == count
    moved = {n for n, t in found.items() if not torch.equal(t, before[n])}
    parameters = {n for n in moved if not n.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert parameters == {"encoder_q.classifier.weight"} and "encoder_q.bn1.running_mean" in moved
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [e["loss"] for e in entries if e["split"] == "train"] == pytest.approx(losses, rel=1e-4)


@pytest.mark.medium
def test_interrupted_and_resumed_it_ends_with_the_same_bits(folder, tmp_path):
    assert trainer_of(configure(folder, tmp_path / "whole"), folder).run() == 0
    c = configure(folder, tmp_path / "broken")
    trainer = trainer_of(c, folder)
    step = trainer._train_step

    def stop_here(batch, extra):
        step(batch, extra)
        if trainer.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer._train_step = stop_here
    assert trainer.run() == signal.SIGTERM and last(tmp_path / "broken").step > 0
    assert trainer_of(c, folder).run() == 0
    whole, broken = last(tmp_path / "whole"), last(tmp_path / "broken")
    assert digest(whole.model) == digest(broken.model)
    (a,), (b,) = whole.optimizer["state"].values(), broken.optimizer["state"].values()
    assert torch.equal(a["momentum_buffer"], b["momentum_buffer"])
    logs = [(tmp_path / name / "log.jsonl").read_bytes() for name in ("whole", "broken")]
    assert logs[0] == logs[1]


@pytest.mark.medium
def test_every_default_can_be_changed(folder, tmp_path):
    def run(out: str, *words: str) -> dict[str, torch.Tensor]:
        options = f"--cleaned {folder / 'cleaned.json'} --data {folder / 'data'} --out {tmp_path / out} --device cpu"
        options += " --epochs 1 --batch-size 8 --lr 0.1 --threads 1 --tensorboard False"
        with pytest.raises(SystemExit) as ended:
            cli.main(["retrain", str(folder / "c.pt"), *options.split(), *words])
        assert ended.value.code == 0
        return last(tmp_path / out).model

    model = run("mopro", "--moving-statistics", "False", "--train-bias", "True", "--mixup-beside", "False")
    before = load_weights(folder / "c.pt").state
    moved = {n for n, t in model.items() if not torch.equal(t, before[n])}
    assert moved == {"encoder_q.classifier.weight", "encoder_q.classifier.bias"}
    config = json.loads((tmp_path / "mopro/config.json").read_text())
    assert config["optim"]["schedule"] == "warmup-cosine" and config["data"]["augment"]["scale"] == [0.8, 1.0]
    assert config["resample"] is False
