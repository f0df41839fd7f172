"""Checkpoints of earlier versions load, and their runs go on as they would have there."""

import importlib
import json

import old_runs
import pytest
import torch

from mopro_fast.checkpoints.state import FORMAT, load, read, write
from mopro_fast.checkpoints.weights import load_weights
from mopro_fast.cli import COMMANDS
from mopro_fast.errors import UserError


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    old_runs.write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more threads add in another order
    yield tmp_path
    torch.set_num_threads(threads)


def run(command: list[str]) -> None:
    assert importlib.import_module(f"mopro_fast.{COMMANDS[command[0]][0]}").main(command[1:]) == 0


def entries(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_continued(log, name: str) -> None:
    """The log has the last lines of the old one: bit for bit on the kind of machine that wrote it."""
    later = {"classes", "alarm"}  # entries that those versions did not write
    found = [entry for entry in entries(log) if entry["split"] not in later]
    expected = entries(old_runs.FOLDER / f"{name}.jsonl")
    assert 0 < len(found) < len(expected) or name == "import"
    expected = expected[-len(found) :]
    if old_runs.this_machine() == old_runs.WRITTEN_ON:
        assert found == expected
    for entry, want in zip(found, expected, strict=True):
        assert entry.keys() == want.keys()
        for key, value in want.items():
            assert entry[key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4)), key


@pytest.mark.medium
@pytest.mark.parametrize("name", old_runs.COMMANDS)
def test_run_goes_on(inputs, name, capsys):
    step = old_runs.STEP[name]
    old_runs.write_checkpoint(name, inputs / f"out/checkpoints/step_{step:09d}.pt")
    run([*old_runs.COMMANDS[name], "--out", "out"])
    assert f"resuming out/checkpoints/step_{step:09d}.pt" in capsys.readouterr().err
    assert_continued(inputs / "out/log.jsonl", name)


@pytest.mark.medium
def test_imported_run_goes_on(inputs):
    old_runs.write_checkpoint("import", inputs / "imported.pt")
    run([*old_runs.TRAIN, "--out", "out", "--resume", "imported.pt"])
    assert_continued(inputs / "out/log.jsonl", "import")


def test_an_imported_model_of_before_initialises_and_is_no_run(inputs):
    plain = old_runs.write_checkpoint("plain", inputs / "plain.pt")
    weights = load_weights(plain)
    assert (weights.kind, weights.epoch, weights.num_classes) == ("mopro_fast", 1, old_runs.CLASSES)
    run([*old_runs.TRAIN, "--out", "out", "--init", "plain.pt", "--epochs", "1"])
    with pytest.raises(UserError, match=r"plain\.pt was trained on other data than images"):
        run([*old_runs.TRAIN, "--out", "other", "--resume", "plain.pt"])
    assert not (inputs / "other").exists()


@pytest.mark.parametrize("name", [*old_runs.COMMANDS, "import", "plain"])
def test_written_again_they_hold_the_same(tmp_path, name):
    old = old_runs.write_checkpoint(name, tmp_path / "old.pt")
    state = load(old)
    raw = read(old)
    assert all(torch.equal(t, state.model[n]) for n, t in raw["model"].items())
    assert state.config == json.loads(raw["config"])
    write(tmp_path / "new.pt", state)
    new = read(tmp_path / "new.pt")
    assert new["format"] == FORMAT and new.keys() - {"format"} == vars(state).keys()
    again = load(tmp_path / "new.pt")
    for field, value in vars(state).items():
        assert_equal(value, getattr(again, field))


def assert_equal(a, b) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_a_newer_format_is_refused_with_one_line(tmp_path):
    old = old_runs.write_checkpoint("mopro", tmp_path / "old.pt")
    torch.save(read(old) | {"format": FORMAT + 1, "version": "9.1"}, tmp_path / "new.pt")
    for reading in (load, load_weights):
        with pytest.raises(UserError, match=r"new\.pt was written by a newer mopro_fast, 9\.1 .*install") as caught:
            reading(tmp_path / "new.pt")
        assert "\n" not in str(caught.value)
