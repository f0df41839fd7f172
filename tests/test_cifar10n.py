"""bench/cifar10n.py: its grid, what it refuses, its statistics, and tiny trainings that are stopped and go on."""

import importlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mopro_fast.errors import UserError

BENCH = Path(__file__).parent.parent / "bench"
CLASSES, IMAGES, OUTSIDE, TEST = 10, 120, 8, 40


@pytest.fixture
def cifar10n(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("cifar10n")


def write_data(folder: Path) -> None:
    """JPEGs of a grey level per class, a third with another label, and some from outside."""
    rng = np.random.default_rng(0)
    truth = np.concatenate([np.arange(IMAGES) % CLASSES, np.full(OUTSIDE, -1)])
    given = np.where((np.arange(len(truth)) % 3 == 0) | (truth < 0), rng.integers(CLASSES, size=len(truth)), truth)
    tested = np.arange(TEST) * CLASSES // TEST  # grouped by class
    for name, labels in (("train", truth), ("test", tested)):
        (folder / name).mkdir(parents=True)
        for i, label in enumerate(labels):
            pixels = rng.integers(0, 30, (32, 32, 3)) + 20 * max(label, 0)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.jpg")
    for name, split, labels in (
        ("train_list", "train", given),
        ("train_truth", "train", truth),
        ("test_list", "test", tested),
    ):
        (folder / f"{name}.txt").write_text("".join(f"{split}/{i}.jpg {label}\n" for i, label in enumerate(labels)))


def test_alternatives_in_braces_are_multiplied(cifar10n):
    assert cifar10n.expand(["ce=--method ce", "m=--start-clean {3,10} --lr 0.1 --threshold {0.6,0.8}", "b="]) == [
        ("ce", ["--method", "ce"]),
        ("m start-clean=3 threshold=0.6", ["--start-clean", "3", "--lr", "0.1", "--threshold", "0.6"]),
        ("m start-clean=3 threshold=0.8", ["--start-clean", "3", "--lr", "0.1", "--threshold", "0.8"]),
        ("m start-clean=10 threshold=0.6", ["--start-clean", "10", "--lr", "0.1", "--threshold", "0.6"]),
        ("m start-clean=10 threshold=0.8", ["--start-clean", "10", "--lr", "0.1", "--threshold", "0.8"]),
        ("b", []),
    ]


@pytest.mark.parametrize(
    "words, said",
    [
        (["--run", "mopro"], "expected NAME=OPTIONS"),
        (["--run", "a=--seed 3"], "--seed is set by this bench"),
        (["--common=--data=elsewhere"], "--data=elsewhere is set by this bench"),
        (["--run", "a=--methdo ce"], "--methdo"),
        (["--run", "a=--start-clean 0"], "--start-clean must be at least 1"),
        (["--run", "a=", "--run", "a=--lr 1"], "two runs have the name 'a'"),
    ],
    ids=range(6),
)
def test_mistakes_end_before_anything_starts(cifar10n, tmp_path, capsys, words, said):
    write_data(tmp_path / "data")
    with pytest.raises((SystemExit, UserError)) as error:
        cifar10n.main([str(tmp_path / "data"), "--runs", str(tmp_path / "runs"), *words])
    assert said in str(error.value) + capsys.readouterr().err
    assert not list(tmp_path.glob("runs/*/*"))
    with pytest.raises(SystemExit, match="no train_truth"):
        cifar10n.main([str(tmp_path), "--runs", str(tmp_path / "runs")])


def run_of(name: str, seed: int, top1: float, recall: list) -> dict:
    return {"name": name, "seed": seed, "top1": top1, "class_recall": recall}


def test_runs_are_compared_seed_by_seed(cifar10n):
    runs = [
        run_of("ce", 0, 80.0, [90.0, 70.0]), run_of("mopro", 0, 83.0, [44.0, 35.0]),
        run_of("ce", 1, 82.0, [80.0, 80.0]), run_of("mopro", 1, 83.0, [0.0, 39.0]),
        run_of("ce", 2, 81.0, [0.0, 80.0]), run_of("mopro", 2, 83.0, [0.0, 80.0]),
        run_of("mopro", 3, 10.0, [0.0, 0.0]), run_of("late", 1, 81.5, [80.0, 80.0]),
    ]  # fmt: skip
    pairs = cifar10n.paired(runs, "ce")
    assert pairs.keys() == {"mopro", "late"}
    assert pairs["mopro"] == {
        "peer": "ce", "seeds": [0, 1, 2], "mean": 2.0, "sd": 1.0,
        "standard_error": pytest.approx(1 / 3**0.5), "classes_below_half": [1, 2, 0],
    }  # fmt: skip
    assert pairs["late"] | {"mean": -0.5, "sd": None, "standard_error": None, "seeds": [1]} == pairs["late"]

    of_labels = {"precision": 0.5, "recall": 0.25, "ood_removed": 0.1, "kept_right": 0.7, "corrections": 3}
    for r in runs:
        none = {"corrections": 0, "ood_removed": 0.0} if r["name"] == "ce" else {}
        r |= of_labels | none | {"classes_lost": r["seed"], "alarms": [{}] * r["seed"], "agreement": 40.0 + r["seed"]}
        r |= {"options": "--method ce" if r["name"] == "ce" else "", "commit": "abc"}
    settings = {"images": 9, "out_of_distribution": 1, "wrong": 0.4, "test_images": 3, "common": "--epochs 2"}
    result = {"settings": settings | {"chosen": "by hand"}, "runs": runs, "paired": pairs}
    result["conditions"] = {"gpu": None, "cpu": "a CPU", "torch": "2"}
    text = importlib.import_module("tables").cifar10n(result)
    rows = text.splitlines()[2:5]
    assert rows[0].startswith("| ce (`--method ce`) | 81.0 ± 1.0 | – | – | – | – | 70.0 ± 0.0 | 0, 1, 2 | – |")
    assert "| +2.0 ± 0.6 | 50.0 ± 0.0 | 25.0 ± 0.0 | 10.0 ± 0.0 | 70.0 ± 0.0 | 0, 1, 2, 3 | 1, 2, 0 |" in rows[1]
    assert rows[1].endswith("| 41.5 ± 1.3 |") and rows[2].startswith("| late | 81.5 | -0.5 |")
    assert "Settings: by hand. a CPU;" in text and "40 % with a wrong label" in text


def test_the_lists_of_a_part(cifar10n, tmp_path):
    write_data(tmp_path / "data")
    given, true = cifar10n.write_lists(tmp_path / "data", tmp_path / "runs", 50, 30, 20)
    lists = {n: (tmp_path / f"runs/{n}_list.txt").read_text().splitlines() for n in ("train", "rest", "test")}
    assert [len(lines) for lines in lists.values()] == [50, 30, 20] and len(given) == len(true) == 50
    assert not {*lists["train"]} & {*lists["rest"]}
    assert [int(line.split()[1]) for line in lists["train"]] == given.tolist()
    assert np.bincount([int(line.split()[1]) for line in lists["test"]]).tolist() == [2] * CLASSES
    given, _ = cifar10n.write_lists(tmp_path / "data", tmp_path / "runs", None, 30, None)
    assert len(given) == IMAGES + OUTSIDE and not (tmp_path / "runs/rest_list.txt").read_text()


STOPPING = """
import os, signal, cifar10n
ended = cifar10n.Run.ended
def stopping(run):
    log = run.folder / "log.jsonl"
    if run.name != "ce" and log.is_file() and log.stat().st_size:
        os.kill(os.getpid(), signal.SIGTERM)
    return ended(run)
cifar10n.Run.ended = stopping
raise SystemExit(cifar10n.main())
"""


@pytest.mark.slow
def test_what_is_stopped_goes_on_to_the_same_result(tmp_path):
    write_data(tmp_path / "data")
    small = "--width 0.0625 --epochs 2 --batch-size 16 --queue-size 32 --log-every 1 --checkpoint-every 2 --embed-dim 8"
    words = [str(tmp_path / "data"), "--seeds", "2", "--processes", "2", "--common", small, "--chosen", "by hand"]
    words += ["--run", "ce=--method ce", "--run", "mopro=--start-clean 1 --threshold {0.3}", "--part", "100"]

    def call(folder: str, *command: str) -> subprocess.CompletedProcess:
        out = ["--runs", str(tmp_path / folder), "--results", str(tmp_path / folder)]
        return subprocess.run([sys.executable, *command, *words, *out], capture_output=True, text=True, cwd=BENCH)

    stopped = call("stopped", "-c", STOPPING)
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
    assert "FAILED" not in stopped.stderr
    assert len(list((tmp_path / "stopped").glob("*/*/result.json"))) < 4
    results = {}
    for folder in ("stopped", "whole"):
        done = call(folder, "cifar10n.py")
        assert done.returncode == 0, done.stderr
        results[folder] = result = json.loads((tmp_path / folder / "cifar10n.json").read_text())
    assert results["stopped"] == results["whole"]
    assert [(r["name"], r["seed"]) for r in result["runs"]] == [
        (name, seed) for seed in (0, 1) for name in ("ce", "mopro threshold=0.3")
    ]
    for r in result["runs"]:
        assert len(r["curves"]["val"]) == 2 and r["top1"] == r["curves"]["val"][-1]
        assert np.mean(r["class_recall"]) == pytest.approx(r["top1"])
        assert [c["epoch"] for c in r["classes"]] == ([] if r["name"] == "ce" else [2])
    assert result["paired"]["mopro threshold=0.3"]["seeds"] == [0, 1] and not result["failed"]
    assert "| mopro threshold=0.3" in done.stdout
    words += ["--run", "broken=--init nowhere.pt"]
    failed = call("whole", "cifar10n.py")
    assert failed.returncode == 1 and "broken, seed 1: FAILED with status 2" in failed.stderr
    assert "nowhere.pt" in failed.stderr and "ce, seed" not in failed.stderr  # what is finished is left alone
    result = json.loads((tmp_path / "whole" / "cifar10n.json").read_text())
    assert result["failed"] == [["broken", 0], ["broken", 1]]
    words[words.index("--common") + 1] += " --lr 0.2"
    assert "holds a run with other settings" in call("whole", "cifar10n.py").stderr
