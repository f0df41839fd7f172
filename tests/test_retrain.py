"""Classifier re-training and fine-tuning: what is shown, what moves, and the same bits after interruptions."""

import contextlib
import json
import os
import signal
from collections import Counter
from pathlib import Path

import killed_run
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mopro_fast import cli, ops
from mopro_fast.checkpoints import state as checkpoint
from mopro_fast.checkpoints.formats import digest
from mopro_fast.checkpoints.weights import load_encoder, load_weights
from mopro_fast.data.index import load_index
from mopro_fast.data.order import balancing_repeats, epoch_order
from mopro_fast.downstream.finetune import Finetune, FinetuneTask, choose, with_share
from mopro_fast.downstream.retrain import Retrain, RetrainTask, with_cleaned_labels
from mopro_fast.errors import UserError
from mopro_fast.models.build import build
from mopro_fast.training.loop import Trainer

SIZES = (40, 20, 10, 4)  # images per class, by their true labels
CLASSES = np.repeat(np.arange(4), SIZES)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A list whose labels are all 0; the class shows as brightness. The same images with their classes as val.txt."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for i, y in enumerate(CLASSES):
        Image.fromarray(rng.integers(60 * y, 60 * y + 40, (16, 16, 3), np.uint8)).save(folder / f"{i:03d}.png")
    (folder / "list.txt").write_text("".join(f"{i:03d}.png 0\n" for i in range(len(CLASSES))))
    (folder / "val.txt").write_text("".join(f"{i:03d}.png {y}\n" for i, y in enumerate(CLASSES)))
    labels = np.where(np.arange(len(CLASSES)) % 10 == 9, -1, CLASSES)  # every tenth image is removed
    pq.write_table(
        pa.table({"path": [f"{i:03d}.png" for i in range(len(labels))], "label": labels}), folder / "c.parquet"
    )
    stay = np.flatnonzero(labels >= 0)
    official = {"images": [f"{i:03d}.png" for i in stay], "labels": labels[stay].tolist()}
    (folder / "pseudo_label.json").write_text(json.dumps(official))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = killed_run.config(Path("x"), Path("y"))
    path = tmp_path_factory.mktemp("model") / "step.pt"
    torch.save({"model": build(config).state_dict(), "config": config.to_json()}, path)
    return path


def configure(c, data: Path, out: Path, listed: str):
    c.data.path, c.data.val, c.data.num_classes, c.data.threads = str(data / listed), str(data / "val.txt"), 4, 1
    c.data.image_size = c.data.eval_resize = 16
    c.optim.epochs, c.optim.batch_size, c.optim.lr, c.optim.milestones = 3, 8, 0.1, (2,)
    c.run.out, c.run.device, c.run.log_every, c.run.checkpoint_every, c.run.tensorboard = str(out), "cpu", 3, 4, False
    return c


def retrain(data: Path, out: Path) -> Retrain:
    return configure(Retrain(cleaned=str(data / "c.parquet")), data, out, "list.txt")


def finetune(data: Path, out: Path) -> Finetune:
    return configure(Finetune(), data, out, "val.txt")


@pytest.fixture
def opened():
    """Makes a trainer that does not run to its end; what it holds is let go of after the test."""
    with contextlib.ExitStack() as stack:
        yield lambda c, model: stack.enter_context(contextlib.closing(trainer_of(c, model)))


def trainer_of(c, model: Path) -> Trainer:
    return Trainer((RetrainTask if isinstance(c, Retrain) else FinetuneTask)(c, load_weights(model)))


def run(c, model: Path) -> Trainer:
    trainer = trainer_of(c, model)
    assert trainer.run() == 0
    return trainer


def test_repeats_are_those_of_the_official_list():
    rng = np.random.default_rng(0)
    for classes in (1, 3, 50):
        labels = rng.choice(classes, 5000, p=rng.dirichlet(np.full(classes, 0.3)))
        sizes = Counter(labels.tolist())
        shares = {y: (1 / n) ** 0.5 for y, n in sizes.items()}
        expected = [10 * shares[y] / min(shares.values()) for y in labels.tolist()]
        got = balancing_repeats(labels, np.arange(len(labels)))
        assert ((got == np.floor(expected)) | (np.abs(got - expected) < 1e-9)).all()
        assert got.min() == (10 if classes > 1 else got.max())


def test_an_epoch_is_drawn_without_putting_back(data):
    index = load_index(data / "val.txt", "train", num_classes=4)
    repeats = balancing_repeats(index.labels, index.ids)
    orders = np.stack([epoch_order(index, 0, epoch, 0, repeats) for epoch in range(2000)])
    assert orders.shape == (2000, len(index)) and (orders[7] == epoch_order(index, 0, 7, 0, repeats)).all()
    assert all((np.bincount(order, minlength=len(index)) <= repeats).all() for order in orders)
    expected = repeats / repeats.sum()
    for part in (orders, orders[:, 0], orders[:, -1]):  # wherever in the epoch
        share = np.bincount(part.ravel(), minlength=len(index)) / part.size
        by_class = [np.bincount(index.labels, weights=w) for w in (share, expected)]
        assert np.allclose(*by_class, atol=5 * np.sqrt(0.25 / 2000 / (1 if part.ndim == 1 else 8)))
    # The variance of an image's count is smaller than with putting back: (R - n) / (R - 1) of it.
    counts = np.stack([np.bincount(order, minlength=len(index)) for order in orders])
    n, total = len(index), repeats.sum()
    variance = n * expected * (1 - expected)
    assert counts.var(0).sum() / variance.sum() == pytest.approx((total - n) / (total - 1), abs=0.02)


@pytest.fixture(scope="module")
def whole(data, model, tmp_path_factory) -> Path:
    """A retraining with resampling and mixup, uninterrupted."""
    out = tmp_path_factory.mktemp("whole")
    c = retrain(data, out)
    c.mixup = 0.2
    trainer = run(c, model)
    assert trainer.steps == 66 // 8 and len(trainer.loader.index.usable) == 67
    return out


def last(out: Path) -> checkpoint.RunState:
    return checkpoint.load(checkpoint.all_of(out / "checkpoints")[-1])


def test_retraining_moves_the_classifier_alone(whole, model):
    before, after = load_weights(model).state, load_weights(checkpoint.all_of(whole / "checkpoints")[-1])
    assert after.epoch == 3 and after.image_size == 16
    for name, t in after.state.items():
        assert torch.equal(t, before[name]) != name.startswith("encoder_q.classifier"), name
    entries = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [e["lr"] for e in entries if e["split"] == "train"][-1] == pytest.approx(0.01)
    accuracy = [e["top1"] for e in entries if e["split"] == "val"]
    assert len(accuracy) == 3 and all(e["images"] == len(CLASSES) for e in entries if e["split"] == "val")


def stopped_at(c, model: Path, at_step: int) -> None:
    trainer = trainer_of(c, model)
    step = trainer._train_step

    def stop_here(batch, place):
        step(batch, place)
        if trainer.global_step == at_step:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer._train_step = stop_here
    assert trainer.run() == signal.SIGTERM


def assert_same_run(one: Path, other: Path) -> None:
    a, b = last(one), last(other)
    assert (a.epoch, a.step) == (b.epoch, b.step) == (3, 0)
    assert digest(a.model) == digest(b.model)
    for i, slot in a.optimizer["state"].items():
        assert torch.equal(slot["momentum_buffer"], b.optimizer["state"][i]["momentum_buffer"])
    assert (one / "log.jsonl").read_bytes() == (other / "log.jsonl").read_bytes()


@pytest.mark.medium
def test_retraining_interrupted_and_resumed_ends_with_the_same_bits(data, model, whole, tmp_path):
    c = retrain(data, tmp_path)
    c.mixup = 0.2
    for at_step in (2, 13):
        stopped_at(c, model, at_step)
    c.cleaned = str(data / "pseudo_label.json")  # the official file says the same
    run(c, model)
    assert_same_run(whole, tmp_path)


@pytest.mark.medium
def test_finetuning_killed_and_resumed_ends_with_the_same_bits(data, model, tmp_path):
    c = finetune(data, tmp_path / "whole")
    c.optim.encoder_lr = 0.02
    trainer = run(c, model)
    assert [g["lr"] for g in trainer.train_step.optimizer.param_groups] == [pytest.approx(0.1 * 0.2), 0.02]
    before, after = load_weights(model).state, last(tmp_path / "whole").model
    same = {name for name, t in after.items() if torch.equal(t, before[name])}
    assert same == {n for n in after if ".fc1." in n or ".fc2." in n}  # the projection, which no label reaches

    c.run.out = str(tmp_path / "broken")
    trainer = trainer_of(c, model)
    step = trainer._train_step

    def die(batch, place):
        if trainer.global_step == 7:  # after a log entry that the checkpoint at 4 does not know
            raise MemoryError
        step(batch, place)

    trainer._train_step = die
    with pytest.raises(MemoryError):
        trainer.run()
    run(c, model)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_what_is_shown_are_images_that_stayed_with_their_new_labels(data, model, tmp_path, opened):
    trainer = opened(retrain(data, tmp_path), model)
    shown = Counter()
    for epoch in range(3):
        for batch in trainer.loader.epoch(epoch):
            assert (batch.labels.numpy() == CLASSES[batch.ids.numpy()]).all()
            shown.update(batch.ids.tolist())
    trainer.loader.close()
    assert not any(i % 10 == 9 for i in shown)
    first, rare = ([shown[i] for i, y in enumerate(CLASSES) if y == wanted and i % 10 != 9] for wanted in (0, 3))
    assert np.mean(rare) > 1.5 * np.mean(first)


@pytest.mark.medium
@pytest.mark.parametrize("freeze", [True, False])
def test_an_epoch_is_the_official_one_written_out(data, model, tmp_path, freeze, opened):
    """Two optimizers as in classifier_retrain.py; the encoder's, with --finetune, keeps its learning rate."""
    c = retrain(data, tmp_path)
    c.freeze, c.optim.epochs, c.optim.milestones = freeze, 2, (1,)
    c.optim.encoder_lr = None if freeze else 0.05
    trainer = opened(c, model)
    batches = [[*trainer.loader.epoch(epoch)] for epoch in (0, 1)]
    trainer.close()
    encoder, _ = load_encoder(model, torch.device("cpu"))
    classifier = encoder.classifier
    body = [p for n, p in encoder.named_parameters() if not n.startswith(("classifier", "fc"))]
    optimizer = torch.optim.SGD(classifier.parameters(), 0.1, momentum=0.9)
    optimizer_encoder = torch.optim.SGD(body, 0.05, momentum=0.9)
    for epoch, shown in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 0.1 * 0.1**epoch
        encoder.train(not freeze)
        for batch in shown:
            with torch.set_grad_enabled(not freeze):
                features = encoder.features(ops.normalize(batch.view_q))
            loss = F.cross_entropy(classifier(features), batch.labels)
            encoder.zero_grad()
            loss.backward()
            optimizer.step()
            if not freeze:
                optimizer_encoder.step()
    run(c, model)
    for name, t in encoder.state_dict().items():
        torch.testing.assert_close(last(tmp_path).model[f"encoder_q.{name}"], t, rtol=1e-5, atol=1e-6, msg=name)


def test_mixup_mixes_images_and_losses(data, model, tmp_path, opened):
    c = finetune(data, tmp_path)
    c.mixup = 1.0
    trainer = opened(c, model)
    batch = next(trainer.loader.epoch(0))
    trainer.step = 2
    rng = np.random.default_rng((3, 0, 2))
    share, partner = rng.beta(1, 1), torch.from_numpy(rng.permutation(8))
    assert 0.05 < share < 0.95 and (partner != torch.arange(8)).any()
    images = ops.normalize(batch.view_q)
    logits = trainer.model.query(share * images + (1 - share) * images[partner])
    one_hot = F.one_hot(batch.labels, 4) * share + F.one_hot(batch.labels[partner], 4) * (1 - share)
    expected = -(one_hot * logits.log_softmax(1)).sum(1).mean().item()
    trainer._train_step(*next(trainer.task.batches([batch], trainer.global_step)))
    trainer.loader.close()
    assert trainer.train_step.sums[0, 0].item() == pytest.approx(expected, rel=1e-5)


def test_a_share_of_the_images():
    labels = np.repeat([0, 1, 2, 3, -1], [600, 300, 17, 3, 100])
    for balanced in (False, True):
        chosen = choose(labels, 0.1, balanced, seed=0)
        assert len(set(chosen.tolist())) == len(chosen) and (labels[chosen] >= 0).all()
        assert chosen.tolist() == choose(labels, 0.1, balanced, seed=0).tolist()
        assert set(chosen.tolist()) != set(choose(labels, 0.1, balanced, seed=1).tolist())
        sizes = np.bincount(labels[chosen], minlength=4).tolist()
        assert sizes == [60, 30, 2, 1] if balanced else sum(sizes) == 92 and sizes[:2] != [60, 30]
    assert sorted(choose(labels, 1.0, False, 0)) == list(range(920)) == sorted(choose(labels, 1.0, True, 0))


def test_a_list_of_names(tmp_path):
    for path in ("a/x.jpg", "a/y z.jpg", "b/x.jpg", "b/w.jpg"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    index = load_index(tmp_path, "train", num_classes=2, layout="folder")
    names = index.paths.tolist()

    def labels(text: str) -> dict[str, int]:
        (tmp_path / "names.txt").write_text(text)
        got = with_share(Finetune(list=str(tmp_path / "names.txt")), index).labels
        return {names[i]: int(got[i]) for i in np.flatnonzero(got >= 0)}

    assert labels("y z.jpg\nb/x.jpg\n") == {"a/y z.jpg": 0, "b/x.jpg": 1}
    assert labels("# comment\n\nw.jpg 7\n") == {"b/w.jpg": 1}
    for text, expected in {"x.jpg": ":1: several", "\nno.jpg": ":2: no such", "#": "names no image"}.items():
        with pytest.raises(UserError, match=expected):
            labels(text)


def test_an_image_that_is_listed_twice_has_the_label_of_each_row(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).touch()
    (tmp_path / "list.txt").write_text("a.png 0\nb.png 1\na.png 1\n")
    pq.write_table(pa.table({"path": ["a.png", "b.png", "a.png"], "label": [0, -1, 2]}), tmp_path / "c.parquet")
    c = Retrain(cleaned=str(tmp_path / "c.parquet"))
    index = load_index(tmp_path / "list.txt", "train", num_classes=2)
    assert with_cleaned_labels(c, index).labels.tolist() == [0, -1, 2]


def test_a_table_in_the_order_of_the_images_is_read_in_pieces_without_looking_names_up(data, monkeypatch):
    monkeypatch.setattr("mopro_fast.downstream.retrain._ROWS", 16)
    index, c = load_index(data / "list.txt", "train", num_classes=4), Retrain(cleaned=str(data / "c.parquet"))
    expected = with_cleaned_labels(Retrain(cleaned=str(data / "pseudo_label.json")), index).labels  # by name
    monkeypatch.setattr("mopro_fast.data.paths.Paths.rows_of", None)
    assert np.array_equal(with_cleaned_labels(c, index).labels, expected)
    with pytest.raises(TypeError):  # another order, though at the end alone
        with_cleaned_labels(c, index.take(np.r_[:72, 73, 72]))


def test_refusals(data, model, whole, tmp_path):
    def refusal(change, configured=retrain) -> str:
        c = configured(data, tmp_path / "new")
        change(c)
        with pytest.raises(UserError) as caught:
            trainer_of(c, model)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "set --cleaned" in refusal(lambda c: setattr(c, "cleaned", ""))
    assert "cannot read the cleaned labels" in refusal(lambda c: setattr(c, "cleaned", str(data / "val.txt")))
    assert "no cleaned labels at" in refusal(lambda c: setattr(c, "cleaned", str(tmp_path)))
    assert "cannot write into --out" in refusal(lambda c: setattr(c.run, "out", str(data / "val.txt" / "x")))
    other = pa.table({"path": ["000.png", "other.png"], "label": [0, 0]})
    pq.write_table(other, tmp_path / "other.parquet")
    assert "it has other.png" in refusal(lambda c: setattr(c, "cleaned", str(tmp_path / "other.parquet")))
    pq.write_table(other.slice(0, 1).set_column(1, "label", [[4]]), tmp_path / "high.parquet")
    assert "has the label 4" in refusal(lambda c: setattr(c, "cleaned", str(tmp_path / "high.parquet")))
    assert "--encoder-lr has no effect" in refusal(lambda c: setattr(c.optim, "encoder_lr", 0.1))
    assert "--share must lie" in refusal(lambda c: setattr(c, "share", 0), finetune)
    assert "batch larger" in refusal(lambda c: setattr(c, "share", 0.01), finetune)

    def resumed(c) -> None:
        c.run.out = str(whole)
        c.mixup = 0.2

    assert "optim.lr=0.1, this one has 0.2" in refusal(lambda c: (resumed(c), setattr(c.optim, "lr", 0.2)))
    state = torch.load(model, weights_only=True)
    state["model"]["encoder_q.classifier.bias"][0] += 1
    torch.save(state, tmp_path / "model.pt")
    c = retrain(data, whole)
    c.mixup = 0.2
    with pytest.raises(UserError, match="another checkpoint"):
        trainer_of(c, tmp_path / "model.pt")
    pq.write_table(other.slice(0, 1), tmp_path / "one.parquet")
    assert "on other data than" in refusal(lambda c: (resumed(c), setattr(c, "cleaned", str(tmp_path / "one.parquet"))))
    assert "already holds a run" in refusal(lambda c: (resumed(c), setattr(c.run, "resume", "never")))


def test_the_command_line(data, model, tmp_path, capsys):
    def status(*args) -> int:
        with pytest.raises(SystemExit) as caught:
            cli.main([str(a) for a in args])
        return caught.value.code

    options = ["--data", data / "val.txt", "--out", tmp_path / "run", "--device", "cpu", "--epochs", "1"]
    options += ["--batch-size", "8", "--share", "0.5", "--balanced", "True", "--new-classifier", "True"]
    assert status("finetune", model, *options) == 0
    assert "37 of 74 images are shown, 4 steps per epoch" in capsys.readouterr().err
    assert json.loads((tmp_path / "run/config.json").read_text())["data"]["image_size"] == 16  # the checkpoint's
    bare = {n: t for n, t in load_weights(model).encoder().items() if not n.startswith(("classifier", "fc"))}
    torch.save(bare, tmp_path / "bare.pt")  # of 3×3 stems nobody knows the images' size
    assert status("finetune", tmp_path / "bare.pt", *options[:-2]) == 2
    assert "set --image-size" in capsys.readouterr().err
    assert status("finetune", "--data", "x") == 2 and status("retrain", tmp_path / "no.pt") == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_the_options_of_train_are_honoured(data, model, tmp_path, monkeypatch, opened):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: compiled.append(module))
    c = finetune(data, tmp_path / "a")
    c.run.compile, c.run.precision = True, "bf16"
    trainer = opened(c, model)
    assert compiled == [trainer.train_step.query]
    assert next(trainer.train_step.query.parameters()).dtype == torch.bfloat16
    c = finetune(data, tmp_path / "b")
    c.run.recompute, c.run.precision, c.run.bf16_weights = True, "bf16", False
    trainer = opened(c, model)
    assert trainer.model.encoder_q.recompute
    assert next(trainer.train_step.query.parameters()).dtype == torch.float32
    c = finetune(data, tmp_path / "c")
    c.optim.sgd = "apex"
    with pytest.raises(UserError, match="--sgd apex"):
        opened(c, model)


def test_settings_that_it_would_not_read_are_not_asked_for(model, capsys):
    with pytest.raises(SystemExit):
        cli._run(["retrain", str(model), "--help"])
    text = capsys.readouterr().out
    assert "--scale" in text and "--flip" in text
    hidden = ("scale-k", "hue", "grayscale", "brightness", "contrast", "saturation", "init")
    assert not any(f"--{name}" in text for name in hidden)


@pytest.mark.medium
def test_other_labels_of_class_folders_are_another_run(model, tmp_path):
    """images.txt keeps the labels that the run began with."""
    names = [f"{c}/{i}.png" for c in range(4) for i in range(6)]
    for i, name in enumerate(names):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 16, 3), 9 * i, np.uint8)).save(tmp_path / "data" / name)

    def cleaned(shift: int) -> Retrain:
        labels = [(int(name[0]) + shift) % 4 for name in names]
        (tmp_path / f"{shift}.json").write_text(json.dumps({"images": names, "labels": labels}))
        c = configure(Retrain(cleaned=str(tmp_path / f"{shift}.json")), tmp_path, tmp_path / "run", "data")
        c.data.val = None
        return c

    run(cleaned(0), model)
    with pytest.raises(UserError, match=r"on other data than .*choose another --out$"):
        trainer_of(cleaned(1), model)
    c = cleaned(0)
    c.resample, c.cleaned = False, cleaned(1).cleaned
    with pytest.raises(UserError, match=r"resample=True, this one has False: .*choose another --out$"):
        trainer_of(c, model)
    (tmp_path / "data" / names[0]).unlink()
    with pytest.raises(UserError, match=f"it has {names[0]}, which is not there"):
        trainer_of(cleaned(0), model)
