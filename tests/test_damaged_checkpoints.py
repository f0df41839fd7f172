"""A checkpoint with a wrong field is refused by name, and a damaged newest one names the one to go on from."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from fuzz_checkpoints import CLASSES, config, write_run

from mopro_fast.checkpoints import state
from mopro_fast.checkpoints.weights import load_weights
from mopro_fast.downstream import importing
from mopro_fast.downstream.export import export
from mopro_fast.errors import UserError
from mopro_fast.report.run import Run
from mopro_fast.training.loop import Trainer
from mopro_fast.training.tasks import task_of


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("damaged"))


@pytest.fixture
def run(trained, tmp_path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def going_on(trained: Path, run: Path) -> Trainer:
    return Trainer(task_of(config(trained.parent, run)))


def message(function, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


FIELDS = {
    "epoch": [-1, "3", 1.0, None, True, 2**70],
    "step": [[0], -1],
    "ranks": [0],
    "log_bytes": [-1, None],
    "replaced": [[0], [0, -1], (0, 0)],
    "counts": [[1, 2.0], {}],
    "agreement": [[float("nan")], ["x"], 3],
    "classes": [["a"], ["a", 3], "ab"],
    "left_out": [torch.tensor([3, 1]), torch.tensor([1], dtype=torch.int32), [1], torch.tensor([99])],
    "held_out": [torch.tensor([0, 1, 2, 20]), torch.tensor([[0]])],
    "held_out_labels": [torch.tensor([0]), torch.tensor([0, 0, 0, 2])],
    "assigned": [torch.zeros(20), torch.full((20,), 2, dtype=torch.int32), torch.full((20,), -3, dtype=torch.int32)],
    "winners": [torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[0, -1]])],
    "sums": [{"loss": torch.zeros(2, 2, dtype=torch.float64)}, {"loss": 3}, []],
    "optimizer": [3, {}, {"state": {}, "param_groups": [{"params": "x"}]}],
    "model": [None, [], {3: torch.zeros(1)}, {"x": 1}, {"x": torch.tensor([float("nan")])}],
    "config": ["{", "[]", None, {}, '{"data": 3}', '{"optim": {"lr": "x"}}', '{"data": {"augment": {"flip": 7}}}'],
    "format": ["2", -1, 1.5],
    "data_digest": [None],
    "version": [3],
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_wrong_field_is_named_by_all_who_read_it(trained, tmp_path, field):
    whole = state.read(state.all_of(trained / "checkpoints")[-1])
    for value in FIELDS[field]:
        torch.save(whole | {field: value}, tmp_path / "wrong.pt")
        for read in (state.load, load_weights):
            assert re.match(rf".*wrong\.pt is damaged: its {field}\b", message(read, tmp_path / "wrong.pt")), value


@pytest.mark.parametrize("field", ["config", "model", "epoch", "step", "optimizer", "assigned", "left_out", "sums"])
def test_a_missing_field_is_named(trained, tmp_path, field):
    whole = state.read(state.all_of(trained / "checkpoints")[-1])
    torch.save({name: value for name, value in whole.items() if name != field}, tmp_path / "wrong.pt")
    for read in (state.load, load_weights):
        assert message(read, tmp_path / "wrong.pt").endswith(f"wrong.pt is damaged: it has no {field}")


def without(found: dict, name) -> dict:
    return {key: value for key, value in found.items() if key != name}


@pytest.mark.medium
def test_what_does_not_fit_the_model_or_the_data_is_named(trained, run):
    newest = state.all_of(run / "checkpoints")[-1]
    whole = state.read(newest)
    model, sgd = whole["model"], whole["optimizer"]
    (group,) = sgd["param_groups"]
    first, conv = "encoder_q.conv1.weight", sgd["state"][0]["momentum_buffer"]
    queue = "queue"
    cases = {
        "model.encoder_q.conv1.weight is None": {"model": without(model, first)},
        "model.encoder_q.more is float32 3": {"model": model | {"encoder_q.more": torch.zeros(3)}},
        "model.queue is float32 9×4, expected float32 8×4": {"model": model | {queue: torch.zeros(9, 4)}},
        "optimizer is None": {"optimizer": None},
        "optimizer.param_groups is": {"optimizer": sgd | {"param_groups": []}},
        "optimizer.param_groups.0.momentum is 0.5": {"optimizer": sgd | {"param_groups": [group | {"momentum": 0.5}]}},
        "optimizer.state.0.momentum_buffer is float32 1": {
            "optimizer": sgd | {"state": sgd["state"] | {0: {"momentum_buffer": conv[:1]}}}
        },
        "optimizer.state is 999": {"optimizer": sgd | {"state": sgd["state"] | {999: sgd["state"][0]}}},
        "sums.other is": {"sums": {"other": whole["sums"]["loss"]}},
        "winners is": {"winners": torch.zeros(3, 2, dtype=torch.int64)},
        "epoch is 3, expected at most 2": {"epoch": 3},
        "step is 99, expected at most 4": {"step": 99},
        "assigned is": {"assigned": whole["assigned"][:-1]},
    }
    for expected, change in cases.items():
        torch.save(whole | change, newest)
        said = message(going_on, trained, run)
        assert f"{newest} is damaged: its {expected}" in said or expected in said, said
        assert "; the one before it, step_000000005.pt, can be read: remove the damaged file and run" in said
    assert Run(run).state is not None


@pytest.mark.medium
def test_a_damaged_newest_checkpoint_names_the_one_to_go_on_from(trained, run):
    older, old, newest = state.all_of(run / "checkpoints")[-3:]
    newest.write_bytes(newest.read_bytes()[:-5000])
    said = message(going_on, trained, run)
    assert str(newest) in said
    assert said.endswith(
        f"; the one before it, {old.name}, can be read: remove the damaged file and run the same command again"
    )
    said = message(load_weights, run)
    assert str(newest) in said and said.endswith(f"; {old} can be read: give it instead")
    found = Run(run)
    assert found.state is not None and newest.name in found.missing["the newest checkpoint"]
    old.write_bytes(b"")
    assert f"an earlier one, {older.name}, can be read: remove the 2 newer files" in message(going_on, trained, run)
    config_of = config(trained.parent, run)
    config_of.run.resume = str(newest)
    assert message(lambda: Trainer(task_of(config_of))).endswith("run the same command again with --resume auto")
    for path in (old, newest):
        path.unlink()
    assert going_on(trained, run).run() == 0
    for path in state.all_of(run / "checkpoints"):
        path.write_bytes(b"")
    assert message(going_on, trained, run).endswith("no earlier one can be read: begin anew with another --out")
    assert message(load_weights, run).endswith("no older checkpoint of the run can be read")


@pytest.mark.medium
def test_a_log_that_lost_its_end_goes_on_with_whole_lines(trained, run, capsys):
    log = run / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:-1]) + lines[-1][:7])
    assert going_on(trained, run).run() == 0
    assert "log.jsonl has lost its end" in capsys.readouterr().err
    kept = log.read_bytes()
    assert kept.startswith(b"".join(lines[:-1])) and [json.loads(line) for line in kept.splitlines()]


def test_the_classes_names_go_through_every_file(trained, tmp_path):
    newest = state.all_of(trained / "checkpoints")[-1]
    assert state.load(newest).classes == load_weights(newest).classes == [*CLASSES]
    found = state.load(newest)
    found.classes = ["\udcff\udc80", 'tench, "Tinca"\n']  # any bytes that a folder's name can have
    state.write(tmp_path / "odd.pt", found)
    for format in ("official", "safetensors"):
        export(load_weights(tmp_path / "odd.pt"), tmp_path / format, format)
        assert load_weights(tmp_path / format).classes == found.classes
        importing.main([str(tmp_path / format), str(tmp_path / f"{format}.pt")])
        assert state.load(tmp_path / f"{format}.pt").classes == found.classes
    wrong = state.read(tmp_path / "official")
    wrong["mopro_fast"]["classes"] = '["a"]'
    torch.save(wrong, tmp_path / "wrong.pt")
    assert "its classes is a list of 1, expected 2 names" in message(load_weights, tmp_path / "wrong.pt")
