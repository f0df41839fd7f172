"""The trainer as a user runs it: interrupted and resumed bit for bit, on one and two ranks, and its refusals."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import on_ranks

from mopro_fast import cli
from mopro_fast.checkpoints import state as checkpoint
from mopro_fast.config import OptimConfig, TrainConfig, recipe
from mopro_fast.demo import LOOKS_LIKE, write_images
from mopro_fast.errors import UserError
from mopro_fast.labels import UNSEEN
from mopro_fast.training.loop import Trainer
from mopro_fast.training.optim import learning_rate
from mopro_fast.training.step import TrainStep
from mopro_fast.training.tasks import MoProTask, task_of

EPOCHS, IMAGES, TESTS, STEPS = 3, 740, 100, 11  # of the demo's images, in batches of 64


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    write_images(folder, seed=0)
    for name, images in (("train_filelist_google", IMAGES), ("val_filelist", TESTS)):
        file = folder / f"info/{name}.txt"
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:images]))
    return folder


def small_config(data: Path, out: Path) -> TrainConfig:
    c = recipe("demo")
    c.data.path, c.run.out, c.run.device = str(data), str(out), "cpu"
    c.data.image_size = c.data.eval_resize = 8
    c.model.width = 0.125
    c.optim.epochs, c.mopro.start_clean, c.mopro.threshold = EPOCHS, 2, 0.3
    c.run.tensorboard, c.run.log_every = False, 5
    return c


def final_state(out: Path) -> tuple[checkpoint.RunState, bytes, torch.Tensor]:
    state = checkpoint.load(checkpoint.all_of(out / "checkpoints")[-1])
    assert (state.epoch, state.step) == (EPOCHS, 0)
    log = (out / "log.jsonl").read_bytes()
    return state, log, torch.load(out / "labels.pt", weights_only=True)


def assert_same_run(one: Path, other: Path) -> None:
    (a, log_a, labels_a), (b, log_b, labels_b) = final_state(one), final_state(other)
    for name in a.model:
        assert torch.equal(a.model[name], b.model[name]), name
    for i, slot in a.optimizer["state"].items():
        assert torch.equal(slot["momentum_buffer"], b.optimizer["state"][i]["momentum_buffer"])
    assert log_a == log_b
    assert torch.equal(labels_a, labels_b)


@pytest.fixture(scope="session")
def uninterrupted(digits, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted")
    assert Trainer(task_of(small_config(digits, out))).run() == 0
    return out


def opened(config: TrainConfig) -> Trainer:
    """A trainer that is not to run."""
    trainer = Trainer(task_of(config))
    trainer.close()
    return trainer


def run_and_stop_at(config: TrainConfig, at_step: int) -> None:
    trainer = Trainer(task_of(config))
    step = trainer._train_step

    def stop_here(*batch):
        step(*batch)
        if trainer.global_step == at_step:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer._train_step = stop_here
    assert trainer.run() == signal.SIGTERM


@pytest.mark.medium
def test_stopped_in_every_phase_and_resumed_it_ends_with_the_same_bits(digits, uninterrupted, tmp_path):
    for at_step in (3, STEPS + 7, 2 * STEPS + 6):  # epoch 0, prototypes, cleaning
        run_and_stop_at(small_config(digits, tmp_path), at_step)
    assert Trainer(task_of(small_config(digits, tmp_path))).run() == 0
    assert_same_run(uninterrupted, tmp_path)


@pytest.mark.medium
def test_with_calibration_it_resumes_with_the_same_bits_and_cleans(digits, tmp_path):
    def config(out: Path) -> TrainConfig:
        c = small_config(digits, out)
        c.mopro.calibrate, c.mopro.start_clean, c.data.holdout = True, 1, "0.1"
        return c

    assert Trainer(task_of(config(tmp_path / "whole"))).run() == 0
    for at_step in (5, 10 + 4, 2 * 10 + 6):
        run_and_stop_at(config(tmp_path / "stopped"), at_step)
    assert Trainer(task_of(config(tmp_path / "stopped"))).run() == 0
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    model = final_state(tmp_path / "whole")[0].model
    assert model["calibration.log_scale"].all() and model["calibration.bias"].any()
    for name in ("one", "zeros"):  # clean judges by calibrated scores
        state = final_state(tmp_path / "whole")[0]
        if name == "zeros":
            state.model["calibration.log_scale"].zero_()
            state.model["calibration.bias"].zero_()
        checkpoint.write(tmp_path / f"{name}.pt", state)
        words = [str(tmp_path / f"{name}.pt"), "--data", str(digits), "--out", str(tmp_path / name)]
        assert cli._run(["clean", *words]) == 0
    first, second = (json.loads((tmp_path / name / "clean.json").read_text())["totals"] for name in ("one", "zeros"))
    assert first != second


@pytest.mark.medium
def test_killed_without_warning_it_goes_on_from_the_last_checkpoint(digits, uninterrupted, tmp_path):
    config = small_config(digits, tmp_path)
    config.run.checkpoint_every = 8
    trainer = Trainer(task_of(config))
    step = trainer._train_step

    def die(*batch):
        if trainer.global_step == STEPS + 10:  # after a log entry that the checkpoint at 8 does not know
            raise MemoryError
        step(*batch)

    trainer._train_step = die
    with pytest.raises(MemoryError):
        trainer.run()
    assert Trainer(task_of(config)).run() == 0
    assert_same_run(uninterrupted, tmp_path)


def test_a_finished_run_says_so_and_changes_nothing(digits, uninterrupted):
    before = final_state(uninterrupted)[1]
    assert Trainer(task_of(small_config(digits, uninterrupted))).run() == 0
    assert final_state(uninterrupted)[1] == before


def test_what_a_run_leaves_behind(uninterrupted):
    entries = [json.loads(line) for line in (uninterrupted / "log.jsonl").read_text().splitlines()]
    assert [e["epoch"] for e in entries if e["split"] == "val"] == list(range(EPOCHS))
    assert all(0 <= e["top1"] <= e["top5"] <= 100 and e["images"] == TESTS for e in entries if e["split"] == "val")
    epochs = [e for e in entries if e["split"] == "epoch"]
    assert epochs[0]["loss_proto"] == 0 and epochs[1]["loss_proto"] > 0
    assert epochs[1]["relabelled"] == 0 and epochs[2]["relabelled"] > 0
    assert len(checkpoint.all_of(uninterrupted / "checkpoints")) == small_config(uninterrupted, uninterrupted).run.keep
    assert json.loads((uninterrupted / "config.json").read_text())["optim"]["epochs"] == EPOCHS
    labels = torch.load(uninterrupted / "labels.pt", weights_only=True)
    assert len(labels) == IMAGES and int((labels == -2).sum()) == IMAGES - STEPS * 64
    assert "images_per_second" in json.loads((uninterrupted / "timing.jsonl").read_text().splitlines()[0])


def test_a_run_writes_the_table_of_every_epoch_that_corrects(uninterrupted):
    entries = [json.loads(line) for line in (uninterrupted / "log.jsonl").read_text().splitlines()]
    (found,) = [e for e in entries if e["split"] == "classes"]
    (epoch,) = [e for e in entries if e["split"] == "epoch" and e["epoch"] == found["epoch"]]
    shown = epoch["step"] * 64
    assert sum(found["images"]) == sum(found["winner"]) == shown
    assert sum(found["relabelled"]) == sum(found["joined"]) == round(epoch["relabelled"] * shown)
    assert sum(found["removed"]) == round((1 - epoch["kept"]) * shown)
    assert all(score is None or 0.1 <= score <= 1 for score in found["score"])


def test_every_digit_has_the_same_shares_of_wrong_labels(digits):
    with (digits / "truth.csv").open(newline="") as file:
        given, true = np.array([[int(row[name]) for name in ("given", "true")] for row in csv.DictReader(file)]).T
    for c in range(10):
        of_class = given[true == c]
        assert np.mean(of_class == c) == pytest.approx(0.5, abs=1 / len(of_class))
        assert np.mean(of_class == LOOKS_LIKE[c]) == pytest.approx(0.15 + 0.35 / 9, abs=2 / len(of_class))
    assert np.ptp(np.bincount(given[true < 0])) <= 1


def holding_out(digits: Path, out: Path, holdout: str) -> TrainConfig:
    config = small_config(digits, out)
    config.data.holdout, config.optim.epochs = holdout, 2
    return config


@pytest.mark.medium
def test_held_out_images_are_judged_and_never_trained_on(digits, tmp_path):
    config = holding_out(digits, tmp_path / "a", "0.1")
    config.mopro.start_clean = 1
    trainer = Trainer(task_of(config))
    rows, given = trainer.index.held_out, trainer.index.labels
    sizes = np.bincount(given)
    assert np.bincount(given[rows]).tolist() == np.rint(0.1 * sizes).tolist()  # a tenth of each class
    judged = trainer.eval_sets["holdout"]
    assert np.array_equal(judged.usable, rows) and (judged.labels == given).all()
    assert trainer.steps == (IMAGES - len(rows)) // 64
    assert trainer.run() == 0
    labels = torch.load(tmp_path / "a/labels.pt", weights_only=True).numpy()
    assert (labels[rows] == UNSEEN).all() and (labels == UNSEEN).sum() == IMAGES - trainer.steps * 64
    entries = [json.loads(line) for line in (tmp_path / "a/log.jsonl").read_text().splitlines()]
    found = [e for e in entries if e["split"] == "holdout"]
    assert [e["images"] for e in found] == [len(rows)] * 2
    assert all(0 <= e[name] <= 1 for e in found for name in ("relabelled", "removed", "sure", "sure_right"))
    last = checkpoint.load(checkpoint.all_of(tmp_path / "a/checkpoints")[-1])
    assert last.agreement == [e["top1"] for e in found] and last.held_out.tolist() == rows.tolist()

    config = holding_out(digits, tmp_path / "b", "0.1")  # another seed: the same images
    config.run.seed = 5
    assert np.array_equal(opened(config).index.held_out, rows)


@pytest.mark.medium
def test_a_list_of_trusted_images_is_held_out_with_its_labels(digits, tmp_path):
    index = opened(small_config(digits, tmp_path / "whole")).index
    trusted = {index.paths[i]: int(index.labels[i] + 1) % 10 for i in (3, 70, 500)}
    (tmp_path / "trusted.txt").write_text("".join(f"{name} {label}\n" for name, label in trusted.items()))
    trainer = opened(holding_out(digits, tmp_path / "opened", str(tmp_path / "trusted.txt")))
    assert trainer.index.held_out.tolist() == [3, 70, 500]
    assert (trainer.index.labels == index.labels).all()  # as they came
    judged = trainer.eval_sets["holdout"]
    assert judged.usable.tolist() == [3, 70, 500]
    assert {judged.paths[i]: int(judged.labels[i]) for i in judged.usable} == trusted

    trusted = {index.paths[i]: int(index.labels[i]) for i in (3, 70, 500)}  # all right as they came
    (tmp_path / "trusted.txt").write_text("".join(f"{name} {label}\n" for name, label in trusted.items()))
    config = holding_out(digits, tmp_path / "run", str(tmp_path / "trusted.txt"))
    config.mopro.start_clean = 1
    assert Trainer(task_of(config)).run() == 0
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    found = [e for e in log if e["split"] == "classes"]
    assert [sum(e["held_out_changed"]) <= 3 and len(e["held_out_right"]) == 10 for e in found] == [True]
    (tmp_path / "trusted.txt").rename(tmp_path / "moved.txt")
    config.data.holdout = str(tmp_path / "moved.txt")  # the same list elsewhere
    opened(config)
    config.data.holdout = str(tmp_path / "trusted.txt")
    lines = [f"{name} {(label + 1) % 10}\n" for name, label in trusted.items()]  # other labels
    (tmp_path / "trusted.txt").write_text("".join(lines))
    with pytest.raises(UserError, match="judged them by other labels"):
        Trainer(task_of(config))
    (tmp_path / "trusted.txt").write_text(f"{index.paths[4]} 1\n")
    with pytest.raises(
        UserError, match=r"held out other images, or judged them by other labels, than --holdout .*choose another --out"
    ):
        Trainer(task_of(config))
    with pytest.raises(UserError, match="than --holdout ''"):
        Trainer(task_of(holding_out(digits, tmp_path / "run", "")))
    for text, message in (
        ("nowhere.jpg 1\n", r"trusted\.txt:1: nowhere\.jpg is no image of .*--val"),
        (f"# mine\n{index.paths[4]} 10\n", r"trusted\.txt:2: .* needs a label in \[0, 10\)"),
        (f"{index.paths[4]} 1\n{index.paths[4]} 2\n", r"trusted\.txt:2: .* has two labels, 1 and 2"),
    ):
        (tmp_path / "trusted.txt").write_text(text)
        with pytest.raises(UserError, match=message):
            Trainer(task_of(holding_out(digits, tmp_path / "other", str(tmp_path / "trusted.txt"))))


@pytest.mark.parametrize("holdout, message", [
    ("1.5", "a share must lie between 0 and 1"),
    ("0", "a share must lie between 0 and 1"),
    ("0.0001", "no labelled image of .* is held out"),
    ("nan", "a share must lie between 0 and 1"),
    ("5%", "neither a share of the images, such as 0.05, nor a list file"),
])  # fmt: skip
def test_a_wrong_holdout_is_named(digits, tmp_path, holdout, message):
    with pytest.raises(UserError, match=message):
        Trainer(task_of(holding_out(digits, tmp_path / "run", holdout)))
    assert not (tmp_path / "run").exists()


@pytest.mark.medium
def test_entries_are_means_over_their_steps(digits, tmp_path, monkeypatch):
    losses, closed, step = [], [], TrainStep.__call__

    def noted(*args):
        out = step(*args)
        losses.append(out.loss.item())
        return out

    monkeypatch.setattr(TrainStep, "__call__", noted)
    monkeypatch.setattr(TrainStep, "close", lambda step: closed.append(step))
    config = small_config(digits, tmp_path)
    config.optim.epochs = 2
    assert Trainer(task_of(config)).run() == 0
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for split in ("train", "epoch"):
        begin = 0
        for entry in (e for e in entries if e["split"] == split):
            end = entry["epoch"] * STEPS + entry["step"]
            assert entry["loss"] == pytest.approx(sum(losses[begin:end]) / (end - begin), rel=1e-6)
            begin = end
        assert begin == 2 * STEPS == len(losses)
    assert len(closed) == 1  # a GPU's graph is gone before NCCL is


def arguments(digits: Path, out: Path) -> list[str]:
    options = {"data": digits, "out": out, "device": "cpu", "epochs": EPOCHS, "image-size": 8, "eval-resize": 8}
    options |= {"width": 0.125, "start-clean": 2, "threshold": 0.3, "log-every": 5, "tensorboard": False}
    return ["train", "demo", *(str(x) for k, v in options.items() for x in (f"--{k}", v))]


def train_on_a_rank(_rank: int, _ranks: int, words: list[str]) -> None:
    """In the process group that is there: the same training as under torchrun, sooner begun."""
    assert cli._run(words) == 0


@pytest.mark.slow
@pytest.mark.ranks
def test_torchrun_two_ranks_sigterm_resume_same_bits(digits, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    on_ranks(2, train_on_a_rank, arguments(digits, whole))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    stopping = [str(Path(__file__).with_name("stopped_command.py")), "SIGTERM", str(STEPS + 4)]
    command = [*torchrun, *stopping, *arguments(digits, broken)]
    stopped = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    state = checkpoint.load(checkpoint.all_of(broken / "checkpoints")[-1])
    assert (state.epoch, state.step >= 4) == (1, True), "it was not stopped in the middle of an epoch"
    assert "stopped by signal 15" in stopped.stderr and "the same command goes on from there" in stopped.stderr
    resumed = subprocess.run(
        [*torchrun, "-m", "mopro_fast", *arguments(digits, broken)], stderr=subprocess.PIPE, text=True
    )
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(whole, broken)


def test_cross_entropy_runs_through_the_same_loop(digits, tmp_path):
    config = small_config(digits, tmp_path)
    config.method, config.optim.epochs = "ce", 1
    assert Trainer(task_of(config)).run() == 0
    saved = checkpoint.all_of(tmp_path / "checkpoints")[-1]
    weights = checkpoint.load(saved).model
    assert all(name.startswith("encoder_q.") for name in weights)
    config = small_config(digits, tmp_path / "from_ce")
    config.run.init = str(saved)
    model = opened(config).model
    assert torch.equal(model.encoder_q.fc1.weight, weights["encoder_q.fc1.weight"])
    assert torch.equal(model.encoder_k.fc1.weight, weights["encoder_q.fc1.weight"])


@pytest.mark.medium
def test_cached_on_the_device_it_trains_on_the_same_images(digits, uninterrupted, tmp_path):
    config = small_config(digits, tmp_path)
    config.data.cache, config.optim.epochs = "device", 1
    assert Trainer(task_of(config)).run() == 0
    (cached, *_), (decoded, *_) = ((out / "log.jsonl").read_text().splitlines() for out in (tmp_path, uninterrupted))
    loss = [json.loads(line)["loss"] for line in (cached, decoded)]
    assert loss[0] == pytest.approx(loss[1], rel=0.02)  # pixels differ by rounding


def test_weights_that_are_not_finite_are_never_saved(digits, tmp_path):
    trainer = opened(small_config(digits, tmp_path))
    with torch.no_grad():
        trainer.model.encoder_q.fc1.weight[0, 0] = float("inf")
    with pytest.raises(UserError, match="weights are not finite at epoch 1, step 0, rank 0"):
        trainer._save()
    assert not checkpoint.all_of(tmp_path / "checkpoints")


@pytest.mark.medium
def test_killed_in_an_evaluation_it_goes_on_from_the_end_of_the_epoch(digits, uninterrupted, tmp_path, monkeypatch):
    def die(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("mopro_fast.training.loop.accuracy", die)
        with pytest.raises(MemoryError):
            Trainer(task_of(small_config(digits, tmp_path))).run()
    trainer = Trainer(task_of(small_config(digits, tmp_path)))
    assert (trainer.epoch, trainer.step) == (0, STEPS)
    assert trainer.run() == 0
    assert_same_run(uninterrupted, tmp_path)


@pytest.mark.medium
def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoints(digits, tmp_path):
    config = small_config(digits, tmp_path)
    config.optim.epochs = 1
    assert Trainer(task_of(config)).run() == 0
    good = checkpoint.all_of(tmp_path / "checkpoints")[-1]
    config = small_config(digits, tmp_path / "diverging")
    config.run.init, config.optim.lr, config.optim.warmup_epochs = str(good), 1e6, 0
    with pytest.raises(UserError, match=r"not finite at epoch 1, step \d+, rank 0; last checkpoint: none yet"):
        Trainer(task_of(config)).run()
    assert not checkpoint.all_of(tmp_path / "diverging" / "checkpoints")


def test_resume_refuses_another_run(digits, uninterrupted, tmp_path):
    def refusal(change) -> str:
        config = small_config(digits, uninterrupted)
        change(config)
        with pytest.raises(UserError) as caught:
            Trainer(task_of(config))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "optim.lr=0.05, this one has 0.1" in refusal(lambda c: setattr(c.optim, "lr", 0.1))
    assert "another architecture" in refusal(lambda c: setattr(c.model, "arch", "resnet34"))
    assert "another architecture" in refusal(lambda c: setattr(c.model, "embed_dim", 16))
    assert "already holds a run" in refusal(lambda c: setattr(c.run, "resume", "never"))
    assert "no checkpoint at no/where.pt" in refusal(lambda c: setattr(c.run, "resume", "no/where.pt"))
    older = str(checkpoint.all_of(uninterrupted / "checkpoints")[0])
    assert "choose another --out" in refusal(lambda c: setattr(c.run, "resume", older))
    other = tmp_path / "other"
    write_images(other, seed=1)
    assert "trained on other data" in refusal(lambda c: setattr(c.data, "path", str(other)))
    text = tmp_path / "text.pt"
    text.write_text("not a checkpoint")
    assert "is it a whole file?" in refusal(lambda c: setattr(c.run, "resume", str(text)))


def test_a_checkpoint_older_than_some_settings_goes_on(digits, uninterrupted, tmp_path):
    saved = checkpoint.all_of(uninterrupted / "checkpoints")[0]
    state = checkpoint.load(saved)
    del state.config["run"]["bf16_weights"], state.config["optim"]["sgd"]
    del state.config["capro"], state.config["data"]["augment"]["scale_k"]
    checkpoint.save(tmp_path / "checkpoints", state.epoch * STEPS, state, 1)
    config = small_config(digits, tmp_path)
    config.capro.beta, config.capro.anchors = 0.2, "anchors"  # nothing that MoPro reads
    trainer = opened(config)
    assert (trainer.epoch, trainer.step) == (state.epoch, state.step)
    changed = small_config(digits, tmp_path)
    changed.run.bf16_weights = False
    with pytest.raises(UserError, match=r"run\.bf16_weights=True, this one has False"):
        Trainer(task_of(changed))


def test_of_capro_only_the_place_of_the_anchors_may_change(digits, uninterrupted, tmp_path, monkeypatch):
    state = checkpoint.load(checkpoint.all_of(uninterrupted / "checkpoints")[-1])
    checkpoint.save(tmp_path / "checkpoints", state.epoch * STEPS, state, 1)
    monkeypatch.setattr(MoProTask, "free", frozenset())
    config = small_config(digits, tmp_path)
    config.capro.anchors = "elsewhere"
    assert opened(config).epoch == EPOCHS
    config.capro.beta = 0.2
    with pytest.raises(UserError, match=r"capro\.beta=0\.1, this one has 0\.2"):
        Trainer(task_of(config))


def test_initial_weights_must_fit(digits, uninterrupted, tmp_path):
    saved = checkpoint.all_of(uninterrupted / "checkpoints")[-1]
    config = small_config(digits, tmp_path)
    config.run.init, config.optim.epochs = str(saved), 1
    model = opened(config).model
    assert torch.equal(model.prototypes, checkpoint.load(saved).model["prototypes"])
    config.mopro.queue_size = 128  # only the query encoder must fit
    model = opened(config).model
    assert torch.equal(model.encoder_k.fc2.weight, checkpoint.load(saved).model["encoder_k.fc2.weight"])
    config.model.width = 0.25
    with pytest.raises(UserError, match=r"another architecture: .* set --arch, --width"):
        Trainer(task_of(config))


def test_a_checkpoint_is_whole_or_absent(tmp_path, monkeypatch):
    for step in range(5):
        checkpoint.save(tmp_path, step, checkpoint.RunState({}, {}), keep=2)
    assert [p.name for p in checkpoint.all_of(tmp_path)] == ["step_000000003.pt", "step_000000004.pt"]

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError, match=r"cannot write .*step_000000009.pt: No space left on device: make room"):
        checkpoint.save(tmp_path, 9, checkpoint.RunState({}, {}), keep=2)
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []
    assert len(checkpoint.all_of(tmp_path)) == 2


def test_learning_rate_schedules():
    step = OptimConfig(lr=0.1, epochs=90, milestones=(40, 80))
    assert [round(learning_rate(step, e, 0, 10), 6) for e in (0, 39, 40, 79, 80, 89)] == [
        0.1,
        0.1,
        0.01,
        0.01,
        0.001,
        0.001,
    ]
    cosine = OptimConfig(lr=0.1, epochs=10, schedule="cosine")
    assert learning_rate(cosine, 0, 5, 10) == 0.1 and learning_rate(cosine, 5, 0, 10) == pytest.approx(0.05)
    scaled = OptimConfig(lr=0.1, batch_size=1024, scale_lr=True, warmup_epochs=2)
    assert learning_rate(scaled, 0, 0, 10) == pytest.approx(0.4 / 20)
    assert learning_rate(scaled, 1, 9, 10) == pytest.approx(0.4) == learning_rate(scaled, 2, 0, 10)


WARMUP_COSINE = {  # epochs of warm-up: the learning rate of some epochs of 20
    0: {0: 0.1, 2: 0.0975528258, 10: 0.05, 18: 0.0024471742},
    5: {0: 0.02, 1: 0.02, 2: 0.04, 4: 0.08, 5: 0.1, 8: 0.0904508497, 18: 0.0043227271},
    10: {0: 0.01, 1: 0.01, 2: 0.02, 9: 0.09, 10: 0.1, 11: 0.0975528258, 15: 0.05, 18: 0.0095491503},
}


@pytest.mark.parametrize("first", WARMUP_COSINE)
def test_learning_rate_after_a_warmup_of_epochs(first):
    """As CAPro's code sets it, once per epoch: lr·max(e, 1)/U up to e = U, then lr·(1 + cos(π(e − U)/(E − U)))/2."""
    config = OptimConfig(lr=0.1, epochs=20, schedule="warmup-cosine", warmup_epochs=first)
    expected = WARMUP_COSINE[first]
    for step in (0, 6):
        found = {epoch: learning_rate(config, epoch, step, 7) for epoch in expected}
        assert found == pytest.approx(expected, rel=1e-8)
    scaled = dataclasses.replace(config, batch_size=1024, scale_lr=True)
    assert learning_rate(scaled, 18, 0, 7) == pytest.approx(4 * expected[18], rel=1e-8)
