"""What a task gets from the trainer, shown on a method of one file (linear_probe.py); a run's folder."""

import json
import os
import signal
from pathlib import Path

import linear_probe
import pytest
from downstream_data import CLASSES, write_checkpoint, write_folders

from mopro_fast.checkpoints import state
from mopro_fast.checkpoints.formats import digest
from mopro_fast.config import RunConfig, TrainConfig
from mopro_fast.errors import UserError
from mopro_fast.training.command import run
from mopro_fast.training.loop import Trainer
from mopro_fast.training.run import RunFolder


def log_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.medium
def test_a_method_of_one_file_has_progress_log_resume_and_evaluation(tmp_path, capfd):
    assert len(Path(linear_probe.__file__).read_text().splitlines()) <= 60
    weights = write_checkpoint(tmp_path / "weights.pt")
    images = write_folders(tmp_path / "images", {"train": 6, "val": 2})
    whole, stopped = (str(tmp_path / name) for name in ("whole", "stopped"))
    assert run(linear_probe.task(weights, str(images), whole)) == 0
    told = capfd.readouterr().err
    assert "epoch 3/3 step 4/4 | loss " in told and "epoch 3/3 val: top-1 " in told
    entries = log_of(tmp_path / "whole")
    assert [e["images"] for e in entries if e["split"] == "val"] == [2 * len(CLASSES)] * 3
    losses = [e["loss"] for e in entries if e["split"] == "epoch"]
    assert losses[2] < losses[1] < losses[0]

    trainer = Trainer(linear_probe.task(weights, str(images), stopped))
    step = trainer._train_step

    def stop(batch, extra) -> None:
        step(batch, extra)
        if trainer.global_step == 6:  # in the middle of the second epoch
            os.kill(os.getpid(), signal.SIGTERM)

    trainer._train_step = stop
    assert trainer.run() == signal.SIGTERM
    assert run(linear_probe.task(weights, str(images), stopped)) == 0
    assert "resuming" in capfd.readouterr().err
    assert log_of(tmp_path / "stopped") == entries
    last = [state.load(state.all_of(tmp_path / name / "checkpoints")[-1]).model for name in ("whole", "stopped")]
    assert digest(last[0]) == digest(last[1])
    before = state.read(weights)["model"]
    moved = {name for name, t in last[0].items() if not t.equal(before[name])}
    assert moved == {"encoder_q.classifier.weight", "encoder_q.classifier.bias"}


def test_a_folder_is_one_run_s_at_a_time(tmp_path):
    config = TrainConfig(run=RunConfig(str(tmp_path / "run")))
    folder = RunFolder(config)
    with pytest.raises(UserError, match=r"another process writes into --out .*run: wait for it, or name another"):
        RunFolder(config)
    folder.close()
    assert not (tmp_path / "run").exists()  # nothing was written
    RunFolder(config).close()
    (tmp_path / "run").mkdir()
    folder = RunFolder(config)
    (tmp_path / "run/.mopro_fast").unlink()  # as a user may who thinks that it is stale
    folder.close()
    assert (tmp_path / "run").exists()  # it is the user's
