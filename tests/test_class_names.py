"""Labels mean the same on both sides: what a checkpoint was trained on, and the data it meets."""

import pytest
import torch
from downstream_data import CLASSES, write_checkpoint, write_folders

from mopro_fast import cli
from mopro_fast.checkpoints.state import load
from mopro_fast.checkpoints.weights import initialise, load_weights


def run(capsys, *words):
    """-> exit status, stderr"""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main([*map(str, words)])
    return stop.value.code or 0, capsys.readouterr().err


@pytest.fixture
def checkpoint(tmp_path):
    """A run's checkpoint that was trained on CLASSES."""
    path = write_checkpoint(tmp_path / "c.pt")
    found = torch.load(path, weights_only=True)
    torch.save(found | {"classes": list(CLASSES)}, path)
    return path


@pytest.fixture
def others(tmp_path):
    """As many class folders, one of which is called otherwise and comes first by name."""
    root = write_folders(tmp_path / "others", {"": 4})
    (root / CLASSES[-1]).rename(root / "a01")
    return root


def test_evaluation_is_by_name(checkpoint, tmp_path, others, capsys):
    data = write_folders(tmp_path / "data", {"": 3}, CLASSES[1:3])
    status, error = run(capsys, "eval", checkpoint, "--val", f"v={data}", "--out", tmp_path / "ev", "--device", "cpu")
    assert status == 0, error
    status, error = run(
        capsys, "eval", checkpoint, "--val", f"v={others}", "--out", tmp_path / "ev2", "--device", "cpu"
    )
    assert status == 2 and "class a01 is none of the 6 classes" in error


def test_cleaning_is_by_name(checkpoint, tmp_path, others, capsys):
    status, error = run(capsys, "clean", checkpoint, "--data", others, "--out", tmp_path / "cl", "--device", "cpu")
    assert status == 2 and "class a01 is none of the 6 classes" in error


def test_retraining_needs_the_same_classes(checkpoint, tmp_path, others, capsys):
    (tmp_path / "labels.json").write_text('{"images": ["a01/0.png"], "labels": [0]}')
    words = ["retrain", checkpoint, "--cleaned", tmp_path / "labels.json", "--data", others, "--out", tmp_path / "r"]
    status, error = run(capsys, *words, "--device", "cpu", "--batch-size", 4, "--epochs", 1)
    assert status == 2 and "label 0 is n01 there and a01 here: give the data of its training" in error


def test_fine_tuning_on_other_classes_begins_with_a_new_classifier(checkpoint, tmp_path, others, capsys):
    words = ["--device", "cpu", "--batch-size", 4, "--epochs", 1, "--tensorboard", False, "--data"]
    status, error = run(capsys, "finetune", checkpoint, *words, others, "--out", tmp_path / "f")
    assert status == 0 and "a new classifier: " in error and "has other classes" in error
    names = ["a01", *CLASSES[:-1]]
    assert load_weights(tmp_path / "f").classes == names
    same = write_folders(tmp_path / "same", {"": 4})
    status, error = run(capsys, "finetune", checkpoint, *words, same, "--out", tmp_path / "g")
    assert status == 0 and "a new classifier" not in error


def test_initial_weights_of_other_classes(checkpoint, capsys):
    from mopro_fast.config import TrainConfig, from_dict
    from mopro_fast.models.build import build

    state = load(checkpoint)
    fresh, model = (build(from_dict(TrainConfig, state.config, "it")) for _ in range(2))
    model.load_state_dict(fresh.state_dict())
    initialise(model, checkpoint, ["a01", *CLASSES[:-1]])
    assert "has other classes: its classifier and prototypes are not taken" in capsys.readouterr().err
    own, given = model.state_dict(), state.model
    for name, t in fresh.state_dict().items():
        expected = t if "classifier" in name or name == "prototypes" else given.get(name, t)
        assert torch.equal(own[name], expected), name
    initialise(model, checkpoint, list(CLASSES))
    assert all(torch.equal(model.state_dict()[name], t) for name, t in given.items())
    assert capsys.readouterr().err == ""
