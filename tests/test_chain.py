"""bench/chain.py at small size: training, cleaning, re-training, judging, exchange and report, one after the other."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mopro_fast import cli

CLASSES, IMAGES, OUTSIDE, TEST = 3, 60, 6, 15


@pytest.fixture
def chain(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "bench"))
    import chain

    return chain


def write_data(folder: Path) -> None:
    """Images of a colour per class, a quarter with another class's label, and grey ones from outside."""
    rng = np.random.default_rng(0)
    truth = np.concatenate([np.arange(IMAGES) % CLASSES, np.full(OUTSIDE, -1)])
    given = np.where((np.arange(len(truth)) % 4 == 0) | (truth < 0), rng.integers(CLASSES, size=len(truth)), truth)
    for name, labels in (("train", truth), ("test", np.arange(TEST) % CLASSES)):
        (folder / name).mkdir(parents=True)
        for i, label in enumerate(labels):
            pixels = rng.integers(0, 60, (36, 40, 3))
            if label >= 0:
                pixels[:, :, label] += 150
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    lists = {
        "train_list": ("train", given),
        "train_truth": ("train", truth),
        "test_list": ("test", np.arange(TEST) % CLASSES),
    }
    for name, (split, labels) in lists.items():
        (folder / f"{name}.txt").write_text("".join(f"{split}/{i}.png {label}\n" for i, label in enumerate(labels)))


@pytest.mark.slow
def test_the_whole_chain_runs_and_goes_on_after_an_interruption(chain, tmp_path, monkeypatch, capsys):
    write_data(tmp_path / "data")
    commands = []

    def in_process(*command: str) -> None:
        commands.append(command[0])
        if len(commands) == 4:
            raise KeyboardInterrupt
        assert cli._run(list(command)) == 0

    monkeypatch.setattr(chain, "run", in_process)
    options = ["width=0.0625", "batch-size=12", "queue-size=24", "start-clean=2", "num-classes=3", "tensorboard=False"]
    words = ["chain.py", str(tmp_path / "data"), str(tmp_path / "out"), "--epochs", "4", "--retrain-epochs", "2"]
    words += ["--retrain-set", "batch-size=6", "tensorboard=False", "--set", *options]
    monkeypatch.setattr("sys.argv", [*words, "--k", "1", "2", "--results", str(tmp_path / "results")])
    with pytest.raises(KeyboardInterrupt):
        chain.main()
    assert chain.main() == 0
    assert "is finished: 4 epochs done" in capsys.readouterr().err
    order = ["train", "clean", "retrain", "eval", "eval", "lowshot", "probe", "export", "export", "import", "report"]
    assert commands[4:] == order
    result = json.loads((tmp_path / "results" / "chain.json").read_text())
    assert set(result["top1"]) == {"before", "after"}
    assert result["cleaning"]["noise_before"] == pytest.approx(
        np.mean([a != b for a, b in zip(*labels(tmp_path / "data"), strict=True) if b >= 0])
    )
    for name in ("model.safetensors", "official.tar", "imported.pt", "report.html"):
        assert (tmp_path / "out" / name).stat().st_size > 10_000


def labels(folder: Path) -> list[list[int]]:
    lists = ((folder / f"train_{name}.txt").read_text().splitlines() for name in ("list", "truth"))
    return [[int(line.split()[1]) for line in lines] for lines in lists]


def test_cleaning_is_judged_by_the_true_labels(chain, tmp_path):
    truth = np.array([0, 0, 1, 1, 2, -1, -1])
    given = [0, 1, 1, 0, 2, 0, 1]  # rows 1 and 3 are wrong
    label = [0, 0, 0, 2, -1, -1, 1]  # row 1 put right, 2 spoilt, 3 wrong still, 4 lost, one of two outsiders removed
    verdict = ["kept", "relabelled", "relabelled", "relabelled", "removed", "removed", "kept"]
    pq.write_table(pa.table({"given": given, "label": label, "verdict": verdict}), tmp_path / "t.parquet")
    found = chain.judge(tmp_path / "t.parquet", truth)
    assert found == {
        "noise_before": 0.4, "noise_after": 0.5, "precision": 1 / 3, "recall": 0.5,
        "out_of_distribution_removed": 0.5, "in_distribution_removed": 0.2,
    }  # fmt: skip
    pq.write_table(pa.table({"given": [0], "label": [0], "verdict": ["kept"]}), tmp_path / "t.parquet")
    assert chain.judge(tmp_path / "t.parquet", np.array([0]))["precision"] is None
