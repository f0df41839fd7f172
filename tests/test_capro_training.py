"""CAPro through the trainer: interrupted and resumed bit for bit, on two ranks, in its other modes; its refusals."""

import os
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from processes import on_ranks
from small_step import SGD, train_step
from test_capro import CLASSES, ROWS, random_images, small_capro
from test_training import EPOCHS, STEPS, assert_same_run, digits, final_state, opened, run_and_stop_at, small_config  # noqa: F401

from mopro_fast import cli
from mopro_fast.checkpoints.state import write
from mopro_fast.checkpoints.weights import load_weights
from mopro_fast.config import TrainConfig, recipe
from mopro_fast.data.batches import Batch
from mopro_fast.data.index import load_index
from mopro_fast.distributed import gather_rows
from mopro_fast.downstream.importing import resumable
from mopro_fast.errors import UserError
from mopro_fast.training.loop import Trainer
from mopro_fast.training.tasks import CAProTask, task_of

EACH = 7  # anchors of a class: 70 of all, which no batch of 64 divides


@pytest.fixture(scope="session")
def anchors(digits, tmp_path_factory) -> Path:  # noqa: F811
    index = load_index(digits, "train", num_classes=10)
    first = np.concatenate([np.flatnonzero(index.labels == c)[:EACH] for c in range(10)])
    table = {"path": list(index.paths[first]), "label": index.labels[first], "anchor": np.ones(len(first), np.int8)}
    path = tmp_path_factory.mktemp("anchors") / "anchors.parquet"
    pq.write_table(pa.table(table | {"weight": np.linspace(0.5, 1.5, len(first))}), path)
    return path


def capro_config(data: Path, anchors: Path, out: Path, **changes) -> TrainConfig:
    """Epoch 0: vanilla and frozen; 1: prototypes start; 2: they count, and labels are corrected."""
    c = small_config(data, out)
    c.method, c.mopro.start_clean = "capro", 2
    c.capro.anchors, c.capro.init_proto, c.capro.unfreeze_epoch = str(anchors), 1, 1
    for name, value in changes.items():
        part, _, setting = name.partition("_")
        setattr(getattr(c, part), setting, value)
    return c


@pytest.fixture(scope="session")
def uninterrupted(digits, anchors, tmp_path_factory) -> Path:  # noqa: F811
    out = tmp_path_factory.mktemp("uninterrupted_capro")
    assert Trainer(task_of(capro_config(digits, anchors, out))).run() == 0
    return out


@pytest.mark.medium
def test_stopped_in_every_stage_and_resumed_it_ends_with_the_same_bits(digits, anchors, uninterrupted, tmp_path):  # noqa: F811
    for at_step in (3, STEPS, STEPS + 7, 2 * STEPS + 6):  # vanilla, before and after the prototypes' start, cleaning
        run_and_stop_at(capro_config(digits, anchors, tmp_path), at_step)
    assert Trainer(task_of(capro_config(digits, anchors, tmp_path))).run() == 0
    assert_same_run(uninterrupted, tmp_path)
    assert final_state(tmp_path)[0].model["prototypes"].norm(dim=1).allclose(torch.ones(10))


@pytest.mark.medium
def test_stopped_while_prototypes_start_it_computes_them_again(digits, anchors, uninterrupted, tmp_path, monkeypatch):  # noqa: F811
    begin, stops = CAProTask.begin_epoch, [1]

    def stop_inside(task, model, epoch, *rest):
        if model.starts(epoch) and stops:
            stops.clear()
            embed = model.embed
            monkeypatch.setattr(model, "embed", lambda *a: (os.kill(os.getpid(), signal.SIGTERM), embed(*a))[1])
        begin(task, model, epoch, *rest)

    monkeypatch.setattr(CAProTask, "begin_epoch", stop_inside)
    assert Trainer(task_of(capro_config(digits, anchors, tmp_path))).run() == signal.SIGTERM
    assert Trainer(task_of(capro_config(digits, anchors, tmp_path))).run() == 0
    assert_same_run(uninterrupted, tmp_path)


def start_on(rank: int, ranks: int, data: Path, anchors: Path, found: Path) -> None:
    trainer = opened(capro_config(data, anchors, found.parent / f"run{ranks}"))
    trainer.model.prototypes.zero_()
    trainer.task.begin_epoch(trainer.model, 1, trainer.device, bf16=False)
    p = trainer.model.prototypes
    assert torch.equal(gather_rows(p), p.repeat(ranks, 1))
    if rank == 0:
        torch.save(p, found)


@pytest.mark.medium
@pytest.mark.ranks
def test_prototypes_start_as_the_means_of_their_anchors_on_any_number_of_ranks(digits, anchors, tmp_path):  # noqa: F811
    for ranks in (1, 2):
        on_ranks(ranks, start_on, digits, anchors, tmp_path / f"{ranks}.pt")
    one, two = (torch.load(tmp_path / f"{ranks}.pt") for ranks in (1, 2))
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one.norm(dim=1), torch.ones(10))


def train_on(_rank: int, _ranks: int, config: TrainConfig) -> None:
    assert Trainer(task_of(config)).run() == 0


@pytest.mark.slow
@pytest.mark.ranks
def test_two_ranks_train_through_all_stages(digits, anchors, tmp_path):  # noqa: F811
    on_ranks(2, train_on, capro_config(digits, anchors, tmp_path))
    state = final_state(tmp_path)[0]
    assert state.model["prototypes"].isfinite().all()
    assert state.model["auxiliary.weight"].isfinite().all()


MODES = {
    "device-cache": {"data_cache": "device"},
    "recompute": {"run_recompute": True},
    "bf16": {"run_precision": "bf16"},
    "never": {"capro_unfreeze_epoch": "never"},
    "vanilla": {"capro_init_proto": "never", "capro_anchors": ""},
    "anew": {"capro_update_freq": 0},
    "softmax": {"capro_bootstrap_weights": "softmax"},
    "weights": {"capro_row_weights": True},
    "torch-sgd": {"optim_sgd": "torch"},
}


@pytest.mark.medium
@pytest.mark.parametrize("mode", MODES)
def test_it_trains_in_every_mode(mode, digits, anchors, uninterrupted, tmp_path):  # noqa: F811
    assert Trainer(task_of(capro_config(digits, anchors, tmp_path, **MODES[mode]))).run() == 0
    ours, plain = final_state(tmp_path)[0].model, final_state(uninterrupted)[0].model
    same = {name: torch.equal(t, plain[name]) for name, t in ours.items()}
    if mode == "recompute":
        assert all(same.values()), [name for name in same if not same[name]]
        return
    assert not same["auxiliary.weight"]
    assert bool(ours["prototypes"].any()) == (mode != "vanilla")
    assert all(t.isfinite().all() for t in ours.values())


def test_another_table_of_anchors_is_refused_at_resume(digits, anchors, tmp_path):  # noqa: F811
    run_and_stop_at(capro_config(digits, anchors, tmp_path / "run"), 3)
    table = pq.read_table(anchors)
    pq.write_table(table.take(list(reversed(range(len(table))))), tmp_path / "moved.parquet")
    opened(capro_config(digits, tmp_path / "moved.parquet", tmp_path / "run"))  # the same anchors elsewhere
    pq.write_table(table.slice(1), tmp_path / "other.parquet")
    with pytest.raises(UserError, match="began with another table of --anchors"):
        opened(capro_config(digits, tmp_path / "other.parquet", tmp_path / "run"))


def test_without_a_column_of_weights_rows_cannot_be_weighed(digits, anchors, tmp_path):  # noqa: F811
    pq.write_table(pq.read_table(anchors).drop(["weight"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="has no column weight"):
        opened(capro_config(digits, tmp_path / "a.parquet", tmp_path / "run", capro_row_weights=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"capro_anchors": ""}, "--init-proto 1 needs --anchors"),
        ({"mopro_start_clean": 1}, "--start-clean 1 must be above --init-proto 1"),
        ({"mopro_calibrate": True}, "--calibrate True is MoPro's"),
        ({"capro_soft_label": 0, "capro_bootstrap_weights": "softmax"}, "has no effect with --soft-label 0"),
        (
            {"capro_anchors": "", "capro_init_proto": "never", "capro_row_weights": True},
            "needs --anchors with a column",
        ),
        ({"mopro_queue_size": 32}, "--queue-size 32 is smaller"),
        ({"capro_init_proto": "never"}, "--anchors has no effect with --init-proto never"),
        ({"optim_epochs": 1, "mopro_start_clean": 3}, "--init-proto 1 is none of the 1 epochs"),
        ({"capro_unfreeze_epoch": 3}, "--unfreeze-epoch 3 is none of the 3 epochs"),
    ],
    ids=["anchors", "start-clean", "calibrate", "weights", "row-weights", "queue", "unread", "too-late", "frozen"],
)
def test_contradictions_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        capro_config(Path("data"), Path("anchors"), Path("out"), **changes).validate()


def test_the_recipes_are_the_scripts():
    for name, epochs, init, clean in (("capro-webvision", 60, 5, 11), ("capro-google500", 120, 10, 21)):
        second, first = recipe(name), recipe(f"{name}-vanilla")
        c = second.capro
        assert (second.optim.epochs, c.init_proto, c.unfreeze_epoch) == (epochs, init, init)
        assert second.mopro.start_clean == clean
        assert (first.optim.epochs, first.capro.init_proto, first.capro.unfreeze_epoch) == (120, "never", 0)
        for both in (first, second):
            m, crops = both.mopro, both.data.augment
            assert (m.threshold, m.queue_size, both.capro.beta, both.optim.schedule) == (
                0.6,
                8192,
                0.1,
                "warmup-cosine",
            )
            assert (crops.scale, crops.scale_k) == ((0.8, 1.0), (0.2, 1.0))


def test_a_frozen_encoder_keeps_its_bits_and_its_statistics_move():
    model = small_capro(unfreeze_epoch="never")
    step = train_step(model)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    step.begin_epoch(0)
    view_q, view_k = random_images(2, ROWS)
    batch = Batch(view_q, view_k, torch.arange(ROWS) % CLASSES, torch.arange(ROWS))
    step(batch, torch.arange(ROWS), 0, 0, SGD["lr"])
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    trunk = [f"encoder_q.{name}" for name, _ in model.encoder_q.named_parameters()]
    heads = ("encoder_q.classifier.weight", "encoder_q.fc1", "encoder_q.fc2")
    assert not changed & {name for name in trunk if not name.startswith(heads)}
    assert {"encoder_q.bn1.running_mean", "encoder_q.classifier.weight", "encoder_q.fc2.bias"} <= changed
    assert {"auxiliary.weight", "reconstruction.0.weight", "reconstruction.2.bias", "queue"} <= changed


def test_a_head_of_weight_zero_still_decays():
    model = small_capro(w_recn=0.0, w_proto=0.0, w_inst=0.0)
    step = train_step(model)
    step.begin_epoch(0)
    weight = model.reconstruction[0].weight.detach().clone()
    batch = Batch(*random_images(2, ROWS), torch.arange(ROWS) % CLASSES, torch.arange(ROWS))
    step(batch, torch.arange(ROWS), 0, 0, SGD["lr"])
    expected = weight * (1 - SGD["lr"] * SGD["weight_decay"])
    torch.testing.assert_close(model.reconstruction[0].weight.detach(), expected, rtol=1e-6, atol=1e-9)


def test_anchors_that_are_all_held_out_are_refused(digits, anchors, tmp_path):  # noqa: F811
    names = [str(name) for name in pq.read_table(anchors)["path"].to_pylist()]
    (tmp_path / "held.txt").write_text("".join(f"{name} 0\n" for name in names))
    with pytest.raises(UserError, match="none of its images is shown"):
        opened(capro_config(digits, anchors, tmp_path / "run", data_holdout=str(tmp_path / "held.txt")))


@pytest.mark.medium
def test_an_official_file_with_prototypes_goes_on_with_anchors(digits, anchors, uninterrupted, tmp_path):  # noqa: F811
    """It does not know which anchors its prototypes came from."""
    assert cli._run(["export", str(uninterrupted), str(tmp_path / "x.tar"), "--format", "capro"]) == 0
    config = capro_config(digits, anchors, tmp_path / "run", optim_epochs=EPOCHS + 1)
    weights = load_weights(tmp_path / "x.tar")
    state = resumable(weights, config)
    state.imported = True
    write(tmp_path / "x.pt", state)
    config.run.resume = str(tmp_path / "x.pt")
    assert Trainer(task_of(config)).run() == 0
    config.method = "mopro"
    with pytest.raises(UserError, match="is a checkpoint of --method capro"):
        resumable(weights, config)


@pytest.mark.medium
def test_what_is_no_second_stage_and_no_cleaned_table_is_refused(digits, anchors, tmp_path):  # noqa: F811
    config = capro_config(digits, "", tmp_path / "vanilla", capro_init_proto="never", capro_anchors="", optim_epochs=1)
    config.capro.unfreeze_epoch = 0
    assert Trainer(task_of(config)).run() == 0
    data = ["--data", str(digits)]
    with pytest.raises(UserError, match="has no prototypes yet"):
        cli._run(["clean", str(tmp_path / "vanilla"), *data, "--out", str(tmp_path / "clean")])
    words = ["retrain", str(tmp_path / "vanilla"), *data, "--cleaned", str(anchors), "--out", str(tmp_path / "retrain")]
    with pytest.raises(UserError, match="it is a table of anchors: give what `mopro-fast clean` wrote"):
        cli._run([*words, "--batch-size", "32"])
