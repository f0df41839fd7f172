"""From texts to anchors: `mopro-fast text read`, `embed` and `match` one after another."""

import contextlib
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from downstream_data import write_checkpoint, write_folders
from processes import on_ranks
from test_rerank import by_loops

from mopro_fast import cli
from mopro_fast.data.anchors import read_anchors
from mopro_fast.data.index import load_index
from mopro_fast.downstream import row_map
from mopro_fast.errors import UserError
from mopro_fast.files import json_object
from mopro_fast.text import embed, graph, hashing, match
from mopro_fast.text.captions import captions

NAMES = ["great grey owl", "steam locomotive", "red apple"]
ABOUT = ["nocturnal bird prey feathers", "railway engine wheels smoke", "round sweet fruit tree"]
EACH = 40


def text(*words: str) -> None:
    cli._run(["text", *map(str, words)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """data.txt, texts.csv, classes.csv, truth.txt, features.npy, and T: the texts, read and embedded."""
    folder, rng = tmp_path_factory.mktemp("match"), np.random.default_rng(0)
    true = np.arange(3).repeat(EACH)
    given = np.where(rng.random(len(true)) < 0.6, true, rng.integers(3, size=len(true)))
    said = captions(true, list(zip(NAMES, ABOUT, strict=True)), 0)
    (folder / "data.txt").write_text("".join(f"{i:03d}.jpg {c}\n" for i, c in enumerate(given)))
    (folder / "truth.txt").write_text("".join(f"{i:03d}.jpg {c}\n" for i, c in enumerate(true)))
    (folder / "texts.csv").write_text("path,text\n" + "".join(f"{i:03d}.jpg,{t}\n" for i, t in enumerate(said)))
    lines = [f"{c},{name},{ABOUT[c]}\n" for c, name in enumerate(NAMES)]
    (folder / "classes.csv").write_text("label,name,description\n" + "".join(lines))
    features = rng.standard_normal((3, 16))[true] + 0.4 * rng.standard_normal((len(true), 16))
    np.save(folder / "features.npy", features.astype(np.float32))
    text("read", folder / "data.txt", "--texts", folder / "texts.csv", "--out", folder / "T")
    text("embed", folder / "T", "--classes", folder / "classes.csv", "--device", "cpu")
    return folder


@pytest.fixture
def texts(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder / "T", tmp_path / "T"))


def smoothed(folder: Path, texts: Path, *more: str) -> dict:
    text(
        "match", texts, "--features", folder / "features.npy", "--truth", folder / "truth.txt", "--device", "cpu", *more
    )
    return json_object(texts / match.REPORT)


def test_anchors_are_more_often_right_than_labels_and_smoothing_helps(folder, texts, capfd):
    text("match", texts, "--keep", "0", "--anchors", "10", "--truth", folder / "truth.txt")
    plain = json_object(texts / match.REPORT)
    assert plain["images_right"] / plain["images_known"] < 0.8 < plain["anchors_right"] / plain["anchors_known"]
    table = pq.read_table(texts / "anchors.parquet").to_pydict()
    empty = np.array(pq.read_table(texts / "texts.parquet")["empty"])
    assert np.isnan(np.array(table["dist"])[empty]).all() and not np.array(table["anchor"])[empty].any()
    assert plain["no_text"] == empty.sum() and "neighbours" not in table

    after = smoothed(folder, texts, "--anchors", "10")
    assert after["anchors_right"] == after["anchors_known"] == 30
    vectors, of_classes = (np.load(texts / f"{name}.npy").astype(np.float64) for name in ("embeddings", "classes"))
    table = pq.read_table(texts / "anchors.parquet").to_pydict()
    a = np.zeros((3 * EACH, 3 * EACH))
    for i in range(3 * EACH):
        a[i, table["neighbours"][i]] = table["weights"][i]
    a = np.maximum(a, a.T) * (1 - np.eye(3 * EACH))
    means = a @ vectors
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    of_classes /= np.linalg.norm(of_classes, axis=1, keepdims=True)
    for c in range(3):
        own = np.flatnonzero(np.array(table["label"]) == c)
        expected = by_loops(np.concatenate((of_classes[c : c + 1], means[own])))
        np.testing.assert_allclose(np.array(table["dist"])[own], expected, atol=1e-4)
        np.testing.assert_allclose(np.array(table["sim"])[own], means[own] @ of_classes[c], atol=1e-5)
    assert "anchors right: 30 of 30 (100.0%)" in capfd.readouterr().out
    table = pq.read_table(texts / "anchors.parquet").to_pydict()
    assert table["neighbours"][7][0] == 7 and table["weights"][7] == sorted(table["weights"][7])
    for c in range(3):  # the nearest ones
        own = np.flatnonzero(np.array(table["label"]) == c)
        order = own[np.array(table["dist"])[own].argsort(kind="stable")]
        assert np.flatnonzero(np.array(table["anchor"]) * (np.array(table["label"]) == c)).tolist() == sorted(
            order[:10]
        )
    index = load_index(folder / "data.txt", "train", num_classes=3, missing=True)
    assert read_anchors(str(texts), index).mask.sum() == 30
    assert smoothed(folder, texts, "--anchors", "10", "--edge", "similarity")["anchors_right"] == 30


def test_texts_of_other_classes_are_told(texts, capfd):
    """Rows of the classes' table that have changed places, in another writing; one with the text of another class."""

    def told(lines: list[str]) -> str:
        (texts.parent / "told.csv").write_text("label,name,description\n" + "".join(lines))
        text("embed", texts, "--classes", texts.parent / "told.csv")
        captured = capfd.readouterr()
        return captured.out + captured.err

    rows = [f'"({name.upper()})","{about}."\n' for name, about in zip(NAMES, ABOUT, strict=True)]
    assert "nearest to one other" not in told([f"{c},{row}" for c, row in enumerate(rows)])
    shifted = told([f"{(c + 1) % 3},{row}" for c, row in enumerate(rows)])
    assert (
        "in 3 of 3 classes more texts are nearest to one other class's text than to their own: 0, 1, 2: look" in shifted
    )
    equal = told([f"0,{rows[0]}", f"1,{rows[1]}", f"2,{rows[0]}"])
    assert "which therefore cannot be told apart: 1, such as 0 ((GREAT GREY OWL)) and 2" in equal
    text("match", texts, "--keep", "0", "--anchors", "-5")
    assert "15 random anchors in 3 of 3 classes" in capfd.readouterr().out


def test_how_words_are_written_does_not_count(texts):
    """As of classes with punctuation, capitals and accents apart, and of texts that are not cleaned."""
    expected = embedded(texts)
    lines = [
        f'{c},"{name.title()},","({about})! (the)"\n' for c, (name, about) in enumerate(zip(NAMES, ABOUT, strict=True))
    ]
    (texts.parent / "punctuated.csv").write_text("label,name,description\n" + "".join(lines))
    text("embed", texts, "--classes", texts.parent / "punctuated.csv", "--device", "cpu")
    assert embedded(texts)[:2] == expected[:2]
    import pyarrow as pa

    said = pa.chunked_array([["Caf\u00e9, (Owl)", "cafe\u0301 owl", "OWL caf\u00e9_", "owl"]])
    v = hashing.Hashing(said)(np.arange(4))
    assert (v[0] == v[1]).all() and (v[0] == v[2]).all() and 0 < v[0] @ v[3] < 1


def test_random_anchors_are_as_often_right_as_labels(folder, texts):
    found = smoothed(folder, texts, "--anchors", "-12", "--seed", "2")  # seed 0 drew which labels are wrong
    assert found["anchor_images"] == 36 and found["anchors_right"] < 33
    first = (texts / "anchors.parquet").read_bytes()
    kept = set(texts.glob("anchors-*.parquet"))
    smoothed(folder, texts, "--anchors", "-12", "--seed", "2")
    assert set(texts.glob("anchors-*.parquet")) == kept  # the same anchors
    smoothed(folder, texts, "--anchors", "-12", "--seed", "1")
    assert first in [path.read_bytes() for path in texts.glob("anchors-*.parquet")]
    assert (texts / "anchors.parquet").read_bytes() != first


def test_a_checkpoint_gives_the_features(tmp_path):
    write_folders(tmp_path / "data", {"train": 4})
    write_checkpoint(tmp_path / "c.pt")
    images = sorted((tmp_path / "data").rglob("*.png"))
    images[2].write_bytes(b"no image")
    lines = "".join(
        f"{path.relative_to(tmp_path / 'data' / 'train')},some words {i % 3}\n" for i, path in enumerate(images)
    )
    (tmp_path / "texts.csv").write_text("path,text\n" + lines)
    text("read", tmp_path / "data/train", "--texts", tmp_path / "texts.csv", "--out", tmp_path / "T")
    text("embed", tmp_path / "T", "--device", "cpu")  # classes by their folders' names
    words = ["--features", tmp_path / "c.pt", "--keep", "2", "--nearest", "4", "--anchors", "1"]
    text("match", tmp_path / "T", *words, "--device", "cpu", "--batch-size", "4")
    table = pq.read_table(tmp_path / "T/anchors.parquet").to_pydict()
    lost = table["path"].index(str(images[2].relative_to(tmp_path / "data" / "train")))
    assert table["neighbours"][lost] == [] and np.isnan(table["dist"][lost])
    assert [len(n) for i, n in enumerate(table["neighbours"]) if i != lost] == [2] * (len(images) - 1)
    shutil.move(tmp_path / "data", tmp_path / "moved")
    text("match", tmp_path / "T", *words, "--device", "cpu", "--batch-size", "4", "--data", tmp_path / "moved/train")


def test_one_image_equal_texts_and_no_text(tmp_path, capfd):
    """A class of one image; a class whose texts are all equal; a class without any text; an image listed twice."""
    rows = ["a.jpg 0", *(f"b{i}.jpg 1" for i in range(30)), "c.jpg 2", "d.jpg -1", "b0.jpg 1", "b1.jpg 0"]
    (tmp_path / "data.txt").write_text("\n".join(rows))
    (tmp_path / "texts.csv").write_text(
        "path,text\na.jpg,owl\nd.jpg,apple\n" + "".join(f"b{i}.jpg,same words\n" for i in range(30))
    )
    (tmp_path / "classes.csv").write_text("label,name\n0,owl\n1,engine words\n2,apple\n")
    text("read", tmp_path / "data.txt", "--texts", tmp_path / "texts.csv", "--out", tmp_path / "T")
    text("embed", tmp_path / "T", "--classes", tmp_path / "classes.csv")
    text("match", tmp_path / "T", "--keep", "0", "--anchors", "2")
    assert "every image that was compared is an anchor (lower --anchors): 1\n" in capfd.readouterr().out
    table = pq.read_table(tmp_path / "T/anchors.parquet").to_pydict()
    chosen = [i for i, a in enumerate(table["anchor"]) if a]
    assert chosen == [0, 1, 2, 33, 34]  # of equal texts the first, and the first once more where it is listed again
    assert len(set(table["dist"][1:31])) == 1 and np.isnan(table["dist"][31]) and np.isnan(table["dist"][32])
    read_anchors(str(tmp_path / "T"), load_index(tmp_path / "data.txt", "train", num_classes=3, missing=True))


def test_own_vectors(folder, texts, tmp_path):
    rng = np.random.default_rng(0)
    own, classes = rng.standard_normal((3 * EACH, 8)).astype(np.float32), rng.standard_normal((3, 8))
    np.save(tmp_path / "own.npy", own)
    np.save(tmp_path / "classes.npy", classes)
    words = ("--encoder", f"npy:{tmp_path / 'own.npy'}", "--class-embeddings", tmp_path / "classes.npy")
    text("embed", texts, *words)
    np.testing.assert_array_equal(np.load(texts / "embeddings.npy"), own)
    smoothed(folder, texts)
    before = (texts / "anchors.parquet").read_bytes()
    assert list(texts.glob("matches-*.npy"))
    for scale, kind in ((2.0**-120, np.float32), (1, np.float64)):  # lengths count in relation to one another
        np.save(tmp_path / "own.npy", own.astype(kind) * kind(scale))
        text("embed", texts, *words)
        assert not (texts / "anchors.parquet").exists()  # they were of other vectors
        assert [path.read_bytes() for path in texts.glob("anchors-*.parquet")] == [before]  # a run may need them
        smoothed(folder, texts)
        assert (texts / "anchors.parquet").read_bytes() == before
    half, tables = own.astype(np.float16), []
    for kind in (np.float16, np.float32):
        np.save(tmp_path / "own.npy", half.astype(kind))
        text("embed", texts, *words)
        smoothed(folder, texts)
        tables.append(pq.read_table(texts / "anchors.parquet"))
    assert tables[0].equals(tables[1])
    np.save(tmp_path / "own.npy", own * 0)
    text("embed", texts, *words)
    with pytest.raises(UserError, match=r"no anchor: .* 120 without a text, their own or of similar images: look at"):
        text("match", texts, "--keep", "0")
    np.save(tmp_path / "own.npy", own[1:])
    mine = shutil.copy(texts / "embeddings.npy", texts / "texts-mine.npy")
    text("embed", texts, "--encoder", f"npy:{mine}", "--class-embeddings", tmp_path / "classes.npy")
    assert Path(mine).exists()
    np.save(tmp_path / "own.npy", own[1:])
    with pytest.raises(UserError, match=r"own\.npy \(it has 119 rows for 120 texts"):
        text("embed", texts, *words)
    np.save(tmp_path / "own.npy", own[:, 1:])
    with pytest.raises(UserError, match=r"have 7 numbers and the classes' 8"):
        text("embed", texts, *words)
    own[5, 2] = np.inf
    np.save(tmp_path / "own.npy", own)
    with pytest.raises(UserError, match=r"vector 5 has numbers that are not finite"):
        text("embed", texts, *words)
    for value in (1e200, 1e-200):
        own = np.ones((3 * EACH, 8))
        own[7] = value
        np.save(tmp_path / "own.npy", own)
        with pytest.raises(UserError, match=r"vector 7 has .* that float32 cannot hold"):
            text("embed", texts, *words)


@pytest.mark.parametrize(
    ("step", "words", "message"),
    [
        ("match", "T", "give --features CKPT, .* or --keep 0"),
        (
            "match",
            "T --keep 0 --features features.npy",
            "--features .*features.npy and --keep 0: the former has no effect",
        ),
        ("match", "T --keep 0 --edge similarity", "--edge similarity and --keep 0: the former has"),
        ("match", "T --keep 0 --seed 3", "--seed 3 and --anchors above 0"),
        ("match", "T --keep 0 --batch-size 3", "--batch-size 3 and --keep 0: the former has no effect"),
        ("match", "T --features features.npy --data x", "--data x and --features FILE.npy"),
        ("match", "T --features features.npy --image-size 7", "--image-size 7 and --features FILE.npy"),
        ("match", "T --features features.npy --keep 30", "--keep 30 is more than --nearest 20"),
        ("match", "T --features texts.npy", r"cannot take .*texts\.npy \(No such file"),
        ("match", "T --features short.npy", "it has 3 rows for 120 images"),
        ("match", "T --features wide", r"float64 \[120, 16\], not \[120, E\] of float32"),
        ("match", "T --features empty.npy", r"float32 \[120, 0\], not"),
        ("match", "T --features several.npz", "it holds several arrays"),
        ("match", "T --features broken.npy", "no image has features by --features .*broken.npy"),
        ("match", "T --keep 0 --anchors -3 --seed -1", "--seed must be at least 0, got -1"),
        ("match", "T --keep 0 --anchors 0", "--anchors must not be 0"),
        ("match", "T --keep 0 --truth wrong.txt", "no image of the texts, which are such as 000.jpg, but such as no"),
        ("match", "T --features features.npy --keep 1", "--keep 1 keeps .* only the image itself"),
        ("match", "damaged --keep 0", "classes.npy is not what was written there: run `mopro-fast text embed"),
        ("match", "T --keep 0 --truth twice.txt", r"twice\.txt:1: 000\.jpg has another label in another line"),
        ("match", "none --keep 0", "mopro-fast text read"),
        ("match", "unembedded --keep 0", "mopro-fast text embed"),
        ("match", "other --keep 0", "was made from another texts.parquet"),
        ("embed", "T --encoder bert", "--encoder bert is none of hash, minilm and npy:FILE"),
        ("embed", "T --encoder npy:x.npy", "--class-embeddings"),
        ("embed", "T --encoder npy:x.npy --class-embeddings y.npy --classes z", "--classes has no effect with"),
        ("embed", "T", "the data does not name its classes: give their texts"),
        ("words", "T", "no step 'words'"),
    ],
)
def test_mistakes_are_named(folder, texts, step, words, message):
    shutil.copytree(texts, texts.parent / "unembedded")
    (texts.parent / "unembedded/text.json").unlink()
    shutil.copytree(texts, texts.parent / "other")
    about = json_object(texts / "text.json") | {"texts": "0"}
    (texts.parent / "other/text.json").write_text(str(about).replace("'", '"'))
    shutil.copy(folder / "features.npy", texts.parent)
    np.save(texts.parent / "short.npy", np.zeros((3, 16), np.float32))
    shutil.copytree(texts, texts.parent / "damaged")
    np.save(texts.parent / "damaged/classes.npy", np.load(texts / "classes.npy") * 2)
    np.save(texts.parent / "empty.npy", np.zeros((120, 0), np.float32))
    np.save(texts.parent / "broken.npy", np.full((120, 2), np.nan, np.float32))
    np.savez(texts.parent / "several.npz", a=np.zeros(3))
    with open(texts.parent / "wide", "wb") as file:
        np.save(file, np.zeros((120, 16)))
    (texts.parent / "wrong.txt").write_text("no.jpg 1\n")
    (texts.parent / "twice.txt").write_text("000.jpg 1\n./000.jpg 2\n")
    here = [str(texts.parent / word) if word.split(".")[0] in NAMED else word for word in words.split()]
    with pytest.raises(UserError, match=message):
        text(step, *here)


NAMED = {"T", "features", "texts", "short", "wrong", "none", "unembedded", "other", "damaged", "twice"}
NAMED |= {"empty", "broken", "several", "wide"}


def test_truth_takes_the_names_that_data_take(folder, texts, capfd):
    lines = (folder / "truth.txt").read_text().splitlines()
    text("match", texts, "--keep", "0", "--truth", folder / "truth.txt")
    expected = json_object(texts / match.REPORT)
    odd = [f"./{lines[0]}", *(f"{folder}/{line}" for line in lines[1:]), "away.jpg 0"]
    (texts.parent / "odd.txt").write_text("\n".join(odd))
    text("match", texts, "--keep", "0", "--truth", texts.parent / "odd.txt")
    assert json_object(texts / match.REPORT) | {"truth": expected["truth"]} == expected
    assert "1 of 121 images have no text here, such as away.jpg" in capfd.readouterr().err
    (texts.parent / "odd.txt").write_text("000.jpg 1\n001.jpg 3\n")
    text("match", texts, "--keep", "0", "--truth", texts.parent / "odd.txt")
    assert "1 label of classes that no image has, such as 3 in line 2" in capfd.readouterr().err
    assert (json_object(texts / match.REPORT)["images_known"], json_object(texts / match.REPORT)["images_right"]) <= (
        2,
        1,
    )
    text("match", texts, "--keep", "0", "--truth", folder / "data.txt")
    assert "this says nothing" in capfd.readouterr().out
    empty = pq.read_table(texts / "texts.parquet")["empty"].to_pylist().index(True)
    (texts.parent / "odd.txt").write_text(lines[empty])
    text("match", texts, "--keep", "0", "--truth", texts.parent / "odd.txt")
    assert "anchors right: none is known; of all images" in capfd.readouterr().out


def test_images_that_are_not_compared_are_told_apart(folder, texts, capfd):
    features = np.load(folder / "features.npy")
    features[3], features[4, 2], features[5, 0] = 0, np.nan, np.inf
    np.save(texts.parent / "some.npy", features)
    text("match", texts, "--features", texts.parent / "some.npy", "--device", "cpu", "--anchors", "1")
    told = capfd.readouterr().out
    assert "3 anchors in 3 of 3 classes, of 120 images\n" in told and "no anchor in" not in told
    assert "not compared: 3 without features (unreadable, or features that are 0 or not finite)\n" in told
    classes = np.load(texts / "classes.npy")
    classes[1:] = 0
    np.save(texts.parent / "few.npy", classes)
    shutil.copy(texts / "embeddings.npy", texts.parent / "own.npy")
    own = ("--encoder", f"npy:{texts.parent / 'own.npy'}", "--class-embeddings", texts.parent / "few.npy")
    text("embed", texts, *own)
    assert "few.npy: vectors that are 0, as of classes without a text: 2" in capfd.readouterr().err
    text("match", texts, "--features", texts.parent / "some.npy", "--device", "cpu", "--anchors", "1")
    told, found = capfd.readouterr().out, json_object(texts / match.REPORT)
    assert (
        "every image that was compared" not in told
        and "1 anchor in 1 of 3 classes" in told
        and "no anchor in 2 of 3 classes: 1, 2\n" in told
    )
    given = np.array(pq.read_table(texts / "texts.parquet")["label"])
    assert (found["no_class_text"], found["no_features"]) == ((given > 0).sum(), (given[3:6] == 0).sum())


def test_a_copy_without_its_mark_and_one_that_cannot_be_written(texts):
    (texts / ".mopro_fast").unlink()
    text("match", texts, "--keep", "0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mopro_fast.files._held", Mock(side_effect=PermissionError(13, "no", ".")))
        with pytest.raises(UserError, match="a copy of the folder where you can write"):
            text("match", texts, "--keep", "0")


def test_packed_images_and_images_that_are_gone(tmp_path):
    write_folders(tmp_path / "data", {"train": 4, "val": 1})
    write_checkpoint(tmp_path / "c.pt")
    images = sorted((tmp_path / "data/train").rglob("*.png"))
    names = [str(path.relative_to(tmp_path / "data/train")) for path in images]
    (tmp_path / "texts.csv").write_text("path,text\n" + "".join(f"{n},words {i % 3}\n" for i, n in enumerate(names)))
    text("read", tmp_path / "data", "--texts", tmp_path / "texts.csv", "--out", tmp_path / "T")
    text("embed", tmp_path / "T", "--device", "cpu")
    words = ["--features", tmp_path / "c.pt", "--keep", "2", "--nearest", "4", "--anchors", "1", "--device", "cpu"]
    text("match", tmp_path / "T", *words)
    expected = (tmp_path / "T/anchors.parquet").read_bytes()
    cli._run(["pack", str(tmp_path / "data"), str(tmp_path / "pack")])
    shutil.rmtree(tmp_path / "data")
    for cache in tmp_path.glob("T/*-*.npy"):
        cache.unlink()
    with pytest.raises(UserError, match=r"data is gone: say where the images lie now, --data PATH"):
        text("match", tmp_path / "T", *words)
    with pytest.raises(UserError, match=r"--root x has no effect: .*pack is no list file"):
        text("match", tmp_path / "T", *words, "--data", tmp_path / "pack", "--root", "x")
    text("match", tmp_path / "T", *words, "--data", tmp_path / "pack")  # in another order
    assert (tmp_path / "T/anchors.parquet").read_bytes() == expected
    write_folders(tmp_path / "data", {"train": 3, "val": 1})
    with pytest.raises(UserError, match=r"not the data .* \(it lacks .*png\)"):
        text("match", tmp_path / "T", *words)


@contextlib.contextmanager
def interrupted_after_three_parts():
    write, written = row_map._write_part, []

    def dies(*args) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(write(*args))

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(row_map, "_SAVE_EVERY", 0)
        patch.setattr(row_map, "_write_part", dies)
        yield


def test_interrupted_it_goes_on_with_the_same_bytes(folder, texts, monkeypatch):
    monkeypatch.setitem(graph._ROWS, "cpu", 16)
    smoothed(folder, texts)
    expected = (texts / "anchors.parquet").read_bytes()
    for path in [*texts.glob("graph-*"), *texts.glob("matches-*"), texts / "anchors.parquet"]:
        path.unlink()
    with interrupted_after_three_parts():
        smoothed(folder, texts)
    assert len(list(texts.glob("graph-*.parts/*.npz"))) == 3
    rows, decide = [], graph.neighbours
    monkeypatch.setattr(graph, "neighbours", lambda f, s, some, k: rows.extend(some.tolist()) or decide(f, s, some, k))
    smoothed(folder, texts)
    assert len(rows) == 3 * EACH - 48 and (texts / "anchors.parquet").read_bytes() == expected


def test_texts_are_not_replaced_before_the_anchors_of_the_old_ones_are_set_aside(folder, texts, monkeypatch):
    text("match", texts, "--keep", "0")
    (texts.parent / "other.csv").write_text("path,text\n000.jpg,an owl\n")
    words = ["read", folder / "data.txt", "--texts", texts.parent / "other.csv", "--out", texts]
    for name in ("set_aside", "files.replacing"):
        with monkeypatch.context() as patch:
            patch.setattr(f"mopro_fast.text.folder.{name}", Mock(side_effect=KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                text(*words)
        assert (texts / "anchors.parquet").exists() == (name == "set_aside")
    text(*words)
    assert not (texts / "anchors.parquet").exists() and len(list(texts.glob("anchors-*.parquet"))) == 1


def embedded(texts: Path) -> list[bytes]:
    return [(texts / name).read_bytes() for name in ("embeddings.npy", "classes.npy", "text.json")]


def test_embed_interrupted_goes_on_with_the_same_bytes(folder, texts, monkeypatch):
    expected = embedded(texts)
    monkeypatch.setattr(embed, "_BATCH", 8)
    for name in ("embeddings.npy", "classes.npy", "text.json"):
        (texts / name).unlink()
    words = ("embed", texts, "--classes", folder / "classes.csv", "--device", "cpu")
    with interrupted_after_three_parts():
        text(*words)
    assert len(list(texts.glob("texts-*.parts/*.npz"))) == 3 and not (texts / "text.json").exists()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(embed, "_write", Mock(side_effect=KeyboardInterrupt))
        text(*words)
    assert list(texts.glob("texts-*.npy")) and not (texts / "text.json").exists()
    text(*words)
    assert embedded(texts) == expected and not list(texts.glob("texts-*.*"))


def of_rank(rank: int, _ranks: int, folder: Path, texts: Path) -> None:
    embed._BATCH = 8
    o = embed.Embed(str(texts), str(folder / "classes.csv"))
    before = embedded(texts)
    embed.embed(o, texts, match.read_texts(texts), torch.device("cpu"))
    assert rank or embedded(texts) == before
    graph._ROWS["cpu"] = 16
    o = match.Match(str(texts), str(folder / "features.npy"))
    match.match(o, texts, match.read_texts(texts), torch.device("cpu"))


@pytest.mark.ranks
@pytest.mark.medium
def test_two_ranks_write_the_same_bytes(folder, texts):
    smoothed(folder, texts)
    expected = (texts / "anchors.parquet").read_bytes()
    for path in [*texts.glob("graph-*"), *texts.glob("matches-*"), texts / "anchors.parquet"]:
        path.unlink()
    on_ranks(2, of_rank, folder, texts)
    assert (texts / "anchors.parquet").read_bytes() == expected


def test_rare_words_count_most_and_their_order_does_not():
    import pyarrow as pa

    said = pa.chunked_array([["owl photo", "photo owl", "train photo", "", "  ", "photo", "owl"]])
    v = hashing.Hashing(said)(np.arange(7))
    assert v.dtype == np.float32 and v.shape == (7, hashing.WIDTH)
    np.testing.assert_allclose(np.linalg.norm(v, axis=1), [1, 1, 1, 0, 0, 1, 1], rtol=1e-6)
    np.testing.assert_array_equal(v[0], v[1])
    assert v[0] @ v[6] > v[0] @ v[5] > v[0] @ v[2] > 0
    np.testing.assert_array_equal(hashing.Hashing(said)(np.array([2])), v[2:3])
    assert not hashing.Hashing(pa.chunked_array([["", " "]]))(np.arange(2)).any()


def test_images_of_a_list_that_have_moved(tmp_path):
    write_folders(tmp_path / "images", {"train": 2})
    write_checkpoint(tmp_path / "c.pt")
    names = [str(path.relative_to(tmp_path / "images")) for path in sorted((tmp_path / "images").rglob("*.png"))]
    (tmp_path / "list.txt").write_text("".join(f"{name} 0\n" for name in names))
    (tmp_path / "texts.csv").write_text("path,text\n" + "".join(f"{name},some words\n" for name in names))
    (tmp_path / "classes.csv").write_text("label,name\n0,words\n")
    options = ["--texts", tmp_path / "texts.csv", "--root", tmp_path / "images", "--out", tmp_path / "T"]
    text("read", tmp_path / "list.txt", *options)
    text("embed", tmp_path / "T", "--classes", tmp_path / "classes.csv", "--device", "cpu")
    shutil.move(tmp_path / "images", tmp_path / "moved")
    words = ["--features", tmp_path / "c.pt", "--keep", "2", "--nearest", "4", "--device", "cpu"]
    with pytest.raises(UserError, match=r"images are missing under .*images: .* set --root"):
        text("match", tmp_path / "T", *words)
    text("match", tmp_path / "T", *words, "--root", tmp_path / "moved")
    shutil.move(tmp_path / "list.txt", tmp_path / "moved")
    (tmp_path / "T/anchors.parquet").unlink()
    text("match", tmp_path / "T", *words, "--data", tmp_path / "moved/list.txt")
    assert (tmp_path / "T/anchors.parquet").exists()
