"""`mopro-fast demo capro` with few digits and epochs: all its steps, its table, and a call that goes on."""

import csv
import json
import os
import signal

import pytest

from mopro_fast import demo, demo_capro
from mopro_fast.training.loop import Trainer

pytestmark = pytest.mark.medium
TINY = "--epochs 2 --batch-size 32 --width 0.0625 --start-clean 1"
STAGE = f"--method capro {TINY} --queue-size 64"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    import sklearn.datasets

    digits = tuple(x[:150] for x in sklearn.datasets.load_digits(return_X_y=True))
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda **_: digits)
    monkeypatch.setattr(demo, "TEST", 40)
    options = {"ce": f"--method ce {TINY}", "mopro": TINY, "vanilla": STAGE, "match": "--anchors 2 --nearest 6"}
    options["capro"] = f"{STAGE} --init-proto 0 --threshold 0.3"
    for name, words in options.items():
        monkeypatch.setitem(demo_capro.OPTIONS, name, words)


def test_all_steps_run_and_a_stopped_call_goes_on(tmp_path, capfd, monkeypatch):
    out, whole = tmp_path / "demo", tmp_path / "whole"
    assert demo.main(["capro", "--out", str(whole)]) == 0
    said = capfd.readouterr().out
    steps = [line.split()[2] for line in said.splitlines() if line.startswith("$ mopro-fast")]
    assert steps == ["train", "train", "text", "text", "train", "text", "train", "report"]
    rows = [line.split("  ")[1] for line in said.splitlines() if line.startswith("  ") and " %" in line]
    assert rows == ["cross-entropy", "MoPro", "CAPro"]
    assert said.rstrip().endswith(str(whole / "capro/report.html")) and (whole / "capro/report.html").is_file()
    results = json.loads((whole / "capro.json").read_text())
    assert results["anchors"] == 20 and 0 <= results["anchors_right"] <= 1 and results["capro_top1"] > 0

    step = Trainer._train_step

    def stopped(trainer, *batch):
        step(trainer, *batch)
        if trainer.config.run.out.endswith("capro"):
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", stopped)
        assert demo.main(["capro", "--out", str(out)]) == 128 + signal.SIGINT
    assert not (out / "capro.json").exists()
    capfd.readouterr()
    assert demo.main(["capro", "--out", str(out)]) == 0
    assert capfd.readouterr().err.count("is finished") == 3
    assert json.loads((out / "capro.json").read_text()) == results


def test_every_image_has_a_caption_and_every_class_a_text(tmp_path):
    demo.write_images(tmp_path, 0)
    demo_capro.write_captions(tmp_path, 0)
    with (tmp_path / "captions.csv").open(newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == [row["path"] for row in demo.truth(tmp_path)]
    with (tmp_path / "classes.csv").open(newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == [name for name, _ in demo_capro.CLASSES]
