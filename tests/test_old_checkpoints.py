"""Checkpoints of earlier versions load, and their runs go on as they would have there."""

import importlib
import json

import old_runs
import pytest
import torch

from mopro_fast.cli import COMMANDS


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
    found, expected = entries(log), entries(old_runs.FOLDER / f"{name}.jsonl")
    assert found
    expected = expected[-len(found) :]
    if old_runs.this_machine() == old_runs.WRITTEN_ON:
        assert found == expected
    for entry, want in zip(found, expected, strict=True):
        assert entry.keys() == want.keys()
        for key, value in want.items():
            assert entry[key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4)), key


@pytest.mark.medium
@pytest.mark.parametrize("name", old_runs.COMMANDS)
def test_run_goes_on(inputs, name):
    step = old_runs.STEP[name]
    old_runs.write_checkpoint(name, inputs / f"out/checkpoints/step_{step:09d}.pt")
    run([*old_runs.COMMANDS[name], "--out", "out"])
    assert_continued(inputs / "out/log.jsonl", name)


@pytest.mark.medium
def test_imported_run_goes_on(inputs):
    old_runs.write_checkpoint("import", inputs / "imported.pt")
    run([*old_runs.TRAIN, "--out", "out", "--resume", "imported.pt"])
    assert_continued(inputs / "out/log.jsonl", "import")
