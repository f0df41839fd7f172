"""Low-shot SVMs against plain loops: the draws, the measure, the scores, the layouts, the command."""

import json
import random

import numpy as np
import pytest
from downstream_data import CLASSES, picture, write_checkpoint, write_folders
from sklearn.svm import LinearSVC

from mopro_fast import cli
from mopro_fast.downstream import lowshot
from mopro_fast.downstream.done import Done
from mopro_fast.downstream.lowshot import VOC_CLASSES, draw, svm_scores
from mopro_fast.downstream.svm import average_precision
from mopro_fast.errors import UserError


def test_average_precision_by_hand():
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    present = np.array([True, False, True, False, False, True])
    assert average_precision(present, scores) == pytest.approx((1 + 2 / 3 + 1 / 2) / 3)
    assert average_precision(present[::-1], scores[::-1]) == pytest.approx((1 + 2 / 3 + 1 / 2) / 3)
    # Precision 1/2, 2/3, 3/4: the envelope lifts the earlier ones.
    assert average_precision(np.array([False, True, True, True]), scores[:4]) == pytest.approx(3 / 4)
    # Of equals the later one comes first, as in the official script.
    assert average_precision(np.array([True, False]), np.zeros(2)) == 0.5


def test_average_precision_against_its_definition():
    rng = np.random.default_rng(0)
    for _ in range(20):
        present, scores = rng.random(50) < 0.3, rng.normal(size=50)
        ranked = present[np.argsort(-scores)]
        points = [(ranked[:i].sum() / present.sum(), ranked[:i].mean()) for i in range(1, 51)]
        levels = [j / present.sum() for j in range(1, present.sum() + 1)]
        expected = np.mean([max(p for r, p in points if r >= level - 1e-9) for level in levels])
        assert average_precision(present, scores) == pytest.approx(expected)


def test_the_draws_are_those_of_python_shuffles_from_the_seed():
    labels = np.random.default_rng(0).integers(-1, 4, 60)
    found = draw(labels, (1, 3), runs=2, seed=7)
    random.seed(7)
    for k in (1, 3):
        for run in range(2):
            expected = []
            for c in range(4):
                images = [i for i in range(60) if labels[i] == c]
                random.shuffle(images)
                expected += images[:k]
            assert found[k, run].tolist() == expected


def test_an_image_of_two_classes_may_be_drawn_twice():
    labels = np.array([[1, 1], [-1, 1], [0, -1]], np.int8)
    found = draw(labels, (2,), runs=1, seed=0)[2, 0]
    assert sorted(found) == [0, 0, 1]  # class 0 has one image, what is hard to see counts as absent


def made(several: bool):
    rng = np.random.default_rng(1)
    means = rng.normal(size=(4, 12))
    if several:
        labels = rng.choice([-1, 0, 1], (120, 4), p=[0.5, 0.1, 0.4]).astype(np.int8)
        features = (labels > 0) @ means + rng.normal(0, 1, (120, 12))
    else:
        labels = rng.integers(0, 4, 120)
        features = means[labels] + rng.normal(0, 1, (120, 12))
    features = features.astype(np.float32)
    return features[:70], features[70:], labels[:70], labels[70:]


@pytest.mark.medium
@pytest.mark.parametrize("several", [True, False])
def test_scores_against_the_protocol_written_out(several, tmp_path):
    train, test, train_labels, test_labels = made(several)
    draws = draw(train_labels, (2, 5), runs=2, seed=0)
    found = svm_scores(train, test, train_labels, test_labels, draws, cost=0.5, jobs=2)
    assert len(found) == (16 if several else 4)
    for (k, run, c), (score, _) in found.items():
        rows = draws[k, run]
        x, z = (f / (np.sqrt((f.astype(np.float64) ** 2).sum(1, keepdims=True)) + 1e-5) for f in (train[rows], test))
        if several:
            svm = LinearSVC(C=0.5, class_weight={1: 2, -1: 1}, dual=True, max_iter=2000, random_state=0)
            svm.fit(x, [1 if y > 0 else -1 for y in train_labels[rows, c]])
            expected = average_precision(test_labels[:, c] > 0, svm.decision_function(z))
        else:
            svm = LinearSVC(C=0.5, dual=True, max_iter=2000, random_state=0).fit(x, train_labels[rows])
            expected = svm.score(z, test_labels)
        assert score == pytest.approx(100 * expected, abs=0.05)
    done = Done(tmp_path, "lowshot", {})
    assert svm_scores(train, test, train_labels, test_labels, draws, 0.5, 1, done) == found


def test_interrupted_it_goes_on_from_the_svms_that_are_done(tmp_path):
    arguments = made(several=True)
    draws = draw(arguments[2], (2,), runs=2, seed=0)
    whole = svm_scores(*arguments, draws, cost=0.5)
    done = Done(tmp_path, "lowshot", {"seed": 0})
    done.add("2 0 1", [12.5, True])
    (kept,) = tmp_path.glob(".lowshot-*.jsonl")
    kept.write_text(kept.read_text() + '\n["2 0 2", [1')  # a kill in the middle of a line
    again = Done(tmp_path, "lowshot", {"seed": 0})
    assert again.results == {"2 0 1": [12.5, True]}
    assert svm_scores(*arguments, draws, 0.5, 1, again) == whole | {(2, 0, 1): (12.5, True)}
    assert len(Done(tmp_path, "lowshot", {"seed": 0}).results) == 8
    assert Done(tmp_path, "lowshot", {"seed": 1}).results == {}


def write_voc(root, images):
    rng = np.random.default_rng(0)
    folder = root / "VOCdevkit" / "VOC2007"
    (folder / "JPEGImages").mkdir(parents=True)
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    for split, first in (("trainval", 0), ("test", images)):
        labels = np.full((images, 20), -1)
        for i in range(images):
            labels[i, rng.integers(20)] = rng.choice([0, 1])
            labels[i, i % 20] = 1
            picture(i % 6, rng).save(folder / "JPEGImages" / f"{first + i:06d}.jpg")
        for c, name in enumerate(VOC_CLASSES):
            lines = "".join(f"{first + i:06d} {labels[i, c]:2d}\n" for i in range(images))
            (folder / "ImageSets" / "Main" / f"{name}_{split}.txt").write_text(lines)
    return labels


@pytest.mark.medium
def test_voc(tmp_path, capsys):
    labels = write_voc(tmp_path, images=130)
    for data in (tmp_path, tmp_path / "VOCdevkit", tmp_path / "VOCdevkit" / "VOC2007"):
        task = lowshot.load(str(data), None)
        assert np.array_equal(task.test_labels, labels) and task.test.paths[3] == "000133.jpg"
    checkpoint, out = write_checkpoint(tmp_path / "c.pt"), tmp_path / "out"
    options = ["--k", "1", "2", "--runs", "2", "--device", "cpu", "--jobs", "1"]
    run("lowshot", checkpoint, "--data", tmp_path, "--out", out, *options)
    printed, result = capsys.readouterr().out, json.loads((out / "lowshot.json").read_text())
    assert result["metric"] == "mAP" and list(result["classes"]) == list(VOC_CLASSES)
    for k, of_k in result["k"].items():
        assert of_k["mean"] == pytest.approx(np.mean(of_k["runs"]))
        assert of_k["mean"] == pytest.approx(np.mean([of_class[k] for of_class in result["classes"].values()]))
        assert of_k["std"] == pytest.approx(np.std(of_k["runs"]))
        assert f"{k:>3s}  {of_k['mean']:7.2f} ± {of_k['std']:5.2f}" in printed
    drawn = next((out / "features").glob("drawn-*.npy"))
    assert len(np.load(drawn)) <= 2 * (20 + 40)  # of the 130 training images only those drawn
    assert not list(out.glob(".lowshot*"))


def test_places(tmp_path):
    lists = tmp_path / lowshot.PLACES_LISTS
    lists.mkdir()
    images = tmp_path / lowshot.PLACES_IMAGES / "a"
    images.mkdir(parents=True)
    for i in range(205):
        (images / f"v{i}.jpg").touch()
    for split in ("train", "val"):
        (lists / f"{split}_places205.csv").write_text("".join(f"a/{split[0]}{i}.jpg {i}\n" for i in range(205)))
    task = lowshot.load(str(tmp_path), None)  # training images are looked at when they are drawn
    assert task.train.paths[7] == "a/t7.jpg" and task.test.full_path(7) == str(images / "v7.jpg")
    assert task.train_labels.tolist() == list(range(205))


def run(*args):
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in args])
    assert not stop.value.code


@pytest.mark.medium
def test_class_folders_and_their_mistakes(tmp_path, capsys):
    data, checkpoint = write_folders(tmp_path / "data", {"train": 6, "val": 4}), write_checkpoint(tmp_path / "c.pt")
    arguments = ["--data", data, "--out", tmp_path / "out", "--runs", "2", "--device", "cpu", "--jobs", "1"]
    run("lowshot", checkpoint, *arguments, "--k", "1", "5")
    first = (tmp_path / "out" / "lowshot.json").read_bytes()
    result = json.loads(first)
    assert result["metric"] == "accuracy" and result["k"]["5"]["mean"] > 100 / len(CLASSES)
    run("lowshot", checkpoint, *arguments, "--k", "1", "5")
    assert (tmp_path / "out" / "lowshot.json").read_bytes() == first
    broken = data / "train" / "n01" / "0.png"
    broken.write_bytes(broken.read_bytes()[:20])
    run("lowshot", checkpoint, *arguments, "--k", "6")  # all that there are, but for this one
    assert "n01/0.png" in capsys.readouterr().err
    for wrong, named in (
        (["--k", "8"], "class n01 has 6 images"),
        (["--k", "0"], "--k must be at least 1"),
        (["--k", "2", "2"], "names a number twice"),
        (["--cost", "0"], "--cost"),
        (["--k", "1", "--data", data / "train"], "--val"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["lowshot", *map(str, [checkpoint, *arguments, *wrong])])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and named in error and len(error.splitlines()) == 1


def test_numbers_without_images_are_no_classes(tmp_path):
    write_folders(tmp_path, {"": 3}, CLASSES[:2])
    for name, images in (("train", "01"), ("test", "2")):
        lines = "".join(f"{CLASSES[c]}/{i}.png {3 * c}\n" for c in (0, 1) for i in images)
        (tmp_path / f"{name}.txt").write_text(lines)
    task = lowshot.load(str(tmp_path / "train.txt"), str(tmp_path / "test.txt"))
    lowshot._require_enough(task, (1, 2))
    assert sorted(draw(task.train_labels, (2,), 1, 0)[2, 0]) == [0, 1, 2, 3]
    with (tmp_path / "test.txt").open("a") as file:
        file.write("n01/0.png 1\n")
    with pytest.raises(UserError, match=r"class 1 has 0 images in .*train\.txt, fewer than the 2 needed: add some"):
        lowshot._require_enough(lowshot.load(str(tmp_path / "train.txt"), str(tmp_path / "test.txt")), (1, 2))


def test_lists_of_voc_that_do_not_fit_together(tmp_path):
    write_voc(tmp_path, images=20)
    main = tmp_path / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main"
    for name, text, message in (
        ("cat_test.txt", "000020  2\n", "expected labels 1, 0 and -1"),
        ("cat_test.txt", "000020  1\n", "aeroplane_test.txt and cat_test.txt name different images"),
        ("cat_test.txt", "000020\n", "expected lines of the form"),
    ):
        (main / name).write_text(text)
        with pytest.raises(UserError, match=message):
            lowshot.load(str(tmp_path), None)
    (main / "cat_test.txt").unlink()
    with pytest.raises(UserError, match=r"cannot read .*cat_test\.txt"):
        lowshot.load(str(tmp_path), None)
