"""Evaluation against hand-computed values, plain loops and the trainer's own accuracy."""

import json

import numpy as np
import pytest
import torch
from downstream_data import CLASSES, SIDE, write_checkpoint, write_folders
from PIL import Image

from mopro_fast import cli, ops
from mopro_fast.checkpoints.weights import load_encoder
from mopro_fast.data.index import load_index
from mopro_fast.data.pipeline import EvalLoader
from mopro_fast.downstream.evaluate import expected_calibration, rms_calibration, summary
from mopro_fast.training.evaluate import accuracy

CPU = torch.device("cpu")
SUBSET = ("n05", "n02", "n06")


def test_summary_by_hand():
    nan = [np.nan] * 6
    found = np.array(
        [
            [0.9, 0, 1, 2, 3, 4],
            [0.8, 1, 0, 2, 3, 4],
            [0.7, 1, 2, 0, 3, 4],
            [0.6, 5, 1, 2, 3, 4],
            nan,
            [0.5, 2, 1, 0, 5, 4],
        ],
        np.float32,
    )
    labels = np.array([0, 0, 0, 0, 1, 2])
    r = summary(found, labels, list("abcdef"))
    assert (r["images"], r["unreadable"], r["top1"], r["top5"]) == (5, 1, 40, 80)
    assert r["per_class"] == [
        {"class": "a", "images": 4, "top1": 25.0},
        {"class": "c", "images": 1, "top1": 100.0},
    ]
    assert r["mean_per_class"] == 62.5
    assert r["confusions"] == [
        {"class": "a", "predicted": "b", "images": 2, "share": 50.0},
        {"class": "a", "predicted": "f", "images": 1, "share": 25.0},
    ]
    # In bins (a, b] of 1/15: 0.9 and 0.5 right, 0.8, 0.7 and 0.6 wrong, each alone.
    assert r["calibration"]["ece"] == pytest.approx(100 * (0.1 + 0.8 + 0.7 + 0.6 + 0.5) / 5, rel=1e-6)
    assert r["calibration"]["rms"] is None


def test_calibration_against_plain_loops():
    rng = np.random.default_rng(0)
    confidence = rng.random(1042)
    correct = rng.random(1042) < confidence**2
    ranked = sorted(zip(confidence, correct, strict=True))
    bins = [ranked[100 * i : 100 * i + 100] for i in range(9)] + [ranked[900:]]  # the last takes the rest
    gaps = [(len(b), np.mean([c for c, _ in b]) - np.mean([h for _, h in b])) for b in bins]
    assert rms_calibration(confidence, correct) == pytest.approx(np.sqrt(sum(n * g * g for n, g in gaps) / 1042))
    without = np.sqrt(sum(n * g * g for n, g in gaps[:-1]) / 1042)
    assert rms_calibration(confidence, correct, last_bin=False) == pytest.approx(without)
    ece = 0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            ece += inside.mean() * abs(confidence[inside].mean() - correct[inside].mean())
    assert expected_calibration(confidence, correct) == pytest.approx(ece)
    assert expected_calibration(np.array([1.0, 1.0]), np.array([True, False])) == 0.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    write_checkpoint(folder / "c.pt")
    write_folders(folder / "data", {"train": 1, "val": 9})
    write_folders(folder / "subset", {"": 8}, SUBSET)
    (folder / "synsets.txt").write_text("".join(f"{name} a thing, or two\n" for name in CLASSES))
    (folder / "list.txt").write_text("".join(f"data/val/{c}/0.png {i}\n" for i, c in enumerate(CLASSES)))
    return folder


def run(folder, *args):
    out = folder / "out"
    try:
        cli.main(["eval", *map(str, [folder / "c.pt", "--out", out, "--device", "cpu", *args])])
    except SystemExit as stop:
        assert not stop.code
    return json.loads((out / "eval.json").read_text())["sets"]


def test_the_command_agrees_with_the_trainers_accuracy(folder, capsys):
    sets = run(folder, "--data", folder / "data", "--val", f"list={folder / 'list.txt'}")
    encoder, _ = load_encoder(folder / "c.pt", CPU)
    for name, data in (("val", folder / "data"), ("list", folder / "list.txt")):
        index = load_index(data, "val", num_classes=6)
        loader = EvalLoader(
            index, batch_size=7, rank=0, world_size=1, image_size=SIDE, resize=SIDE, device=CPU, threads=1
        )
        expected = accuracy(encoder, loader, CPU)
        assert {key: sets[name][key] for key in expected} == pytest.approx(expected)
    r = sets["val"]
    assert 0 < r["top1"] < r["top5"] and r["classes"] == 6
    assert sum(c["images"] for c in r["confusions"]) == round(54 * (1 - r["top1"] / 100))
    assert np.mean([c["top1"] for c in r["per_class"]]) == pytest.approx(r["mean_per_class"])
    assert f"{r['top1']:.2f}" in capsys.readouterr().out


@pytest.mark.parametrize("classes", ["synsets.txt", "data/val", None])
def test_a_subset_is_judged_among_its_own_classes(folder, classes):
    subset = ["--val", f"r={folder / 'subset'}"]
    subset += ["--classes", folder / classes] if classes else ["--data", folder / "data"]  # this has all classes
    r = run(folder, *subset)["r"]
    encoder, _ = load_encoder(folder / "c.pt", CPU)
    hits, confidence = [], []
    for name in SUBSET:
        files = [Image.open(folder / "subset" / name / f"{i}.png") for i in range(8)]
        images = torch.stack([torch.from_numpy(np.array(file)) for file in files])
        with torch.no_grad():
            logits = encoder.classifier(encoder.features(ops.normalize(images)))
        own = logits[:, [1, 4, 5]].softmax(1)
        hits += (own.argmax(1) == sorted(SUBSET).index(name)).tolist()
        confidence += own.max(1).values.tolist()
    assert r["top1"] == pytest.approx(100 * np.mean(hits)) and r["top5"] == 100 and r["classes"] == 3
    ece = expected_calibration(np.array(confidence), np.array(hits))
    assert r["calibration"]["ece"] == pytest.approx(100 * ece, abs=1e-3)
    assert {c["class"] for c in r["per_class"]} == set(SUBSET)


def test_the_first_classes_of_larger_data(folder, tmp_path):
    write_checkpoint(tmp_path / "c.pt", classes=4)
    arguments = ["--data", folder / "data", "--out", tmp_path / "out", "--device", "cpu", "--keep-classes", "4"]
    with pytest.raises(SystemExit) as stop:
        cli.main(["eval", *map(str, [tmp_path / "c.pt", *arguments])])
    assert not stop.value.code
    r = json.loads((tmp_path / "out" / "eval.json").read_text())["sets"]["val"]
    assert (r["images"], r["classes"], [c["class"] for c in r["per_class"]]) == (36, 4, list(CLASSES[:4]))


def test_names_given_decide_the_order(folder, tmp_path):
    (tmp_path / "reversed.txt").write_text("\n".join(reversed(CLASSES)))
    data = ["--data", folder / "data"]
    plain = run(folder, *data)["val"]["per_class"]
    turned = run(folder, *data, "--classes", tmp_path / "reversed.txt")["val"]
    labels = 5 - np.repeat(np.arange(6), 9)
    found = np.load(next((folder / "out" / "predictions").glob("val-*.npy")))
    assert turned["top1"] == pytest.approx(100 * np.mean(found[:, 1] == labels))
    assert [c["class"] for c in turned["per_class"]] == [c["class"] for c in plain][::-1]


def test_mistakes(folder, tmp_path, capsys):
    (tmp_path / "few.txt").write_text("n01\nn02\n")
    (tmp_path / "others.txt").write_text("".join(f"m{i}\n" for i in range(6)))
    (tmp_path / "high.txt").write_text(f"{folder}/data/val/n01/0.png 6\n")
    torch.save({n: t for n, t in load_encoder(folder / "c.pt", CPU)[0].state_dict().items() if "class" not in n},
               tmp_path / "bare.pt")  # fmt: skip
    subset = ["--val", f"r={folder / 'subset'}"]
    for checkpoint, wrong, named in (
        ("c.pt", [], "nothing to evaluate on"),
        ("c.pt", subset, "--classes"),
        ("c.pt", [*subset, "--classes", tmp_path / "few.txt"], "has 2 names, the checkpoint has 6 classes"),
        ("c.pt", [*subset, "--classes", tmp_path / "others.txt"], "class n02 is none of the 6 classes"),
        ("c.pt", [*subset, "--classes", tmp_path / "no.txt"], "no.txt"),
        ("c.pt", ["--val", folder / "subset"], "NAME=PATH"),
        ("c.pt", [*subset, f"r={folder / 'data'}"], "a set named r already"),
        ("c.pt", ["--data", tmp_path / "high.txt"], "label 6 is outside [0, 6)"),
        (tmp_path / "bare.pt", ["--data", folder / "data", "--image-size", SIDE], "has no classifier"),
    ):
        arguments = [folder / checkpoint, "--out", tmp_path / "out", "--device", "cpu", *wrong]
        with pytest.raises(SystemExit) as stop:
            cli.main(["eval", *map(str, arguments)])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and named in error and len(error.splitlines()) == 1
