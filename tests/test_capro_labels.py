"""Cleaning with a model of CAPro, its official files, and re-training on those."""

import csv
import dataclasses
import json
from pathlib import Path

import capro_model
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from downstream_data import config as demo_config
from PIL import Image

from mopro_fast.checkpoints.weights import load_encoder
from mopro_fast.data.index import load_index
from mopro_fast.downstream import clean as module
from mopro_fast.downstream.clean import TABLE, Clean, clean
from mopro_fast.downstream.features import EncoderConfig
from mopro_fast.downstream.retrain import Retrain, with_cleaned_labels
from mopro_fast.errors import UserError

IMAGES, CLASSES, BROKEN, ANCHORS = 60, 6, 17, (3, 8, 22)
CLOSE = 5e-5
FILES = ("pseudo_label.json", "pseudo_label_all.json", "pseudo_label_all.csv")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A list of random images in two folders with labels 0 to 5, or none; one that nobody can read."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    names = [f"{'ab'[i % 2]}/{i:02d}.png" for i in range(IMAGES)]
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(folder / name)
    (folder / names[BROKEN]).write_bytes(b"not an image")
    labels = [i % (CLASSES + 1) - 1 for i in range(IMAGES)]
    (folder / "list.txt").write_text("".join(f"{name} {y}\n" for name, y in zip(names, labels, strict=True)))
    marks = np.isin(np.arange(IMAGES), ANCHORS).astype(np.int8)
    pq.write_table(pa.table({"path": names, "label": labels, "anchor": marks}), folder / "anchors.parquet")
    lines = [
        f"images/{name} n0{y} {i % 3:05d}-of-00003.tfrecord {1000 + i}"
        for i, (name, y) in enumerate(zip(names, labels, strict=True))
    ]
    (folder / "image_all_tfrecord.pathlist").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory, data) -> Path:
    c = demo_config()
    c.method, c.mopro.alpha, c.mopro.threshold, c.capro.anchors = "capro", 0.4, 0.5, str(data / "anchors.parquet")
    return capro_model.write(tmp_path_factory.mktemp("model") / "step.pt", c, sure=100)


def options(model: Path, data: Path, out: Path, **changes) -> Clean:
    encoder = EncoderConfig(batch_size=4, device="cpu")
    return Clean(str(model), str(data / "list.txt"), str(out), encoder=encoder, **changes)


@pytest.fixture(scope="module")
def whole(model, data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    clean(options(model, data, out, format="capro"))
    return out


def rows_of(out: Path) -> list[dict]:
    return pq.read_table(out / TABLE).to_pylist()


def test_every_image_has_the_verdict_of_capro(whole, model, data):
    encoder, weights = load_encoder(model, torch.device("cpu"))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    rows = rows_of(whole)
    for i, row in enumerate(rows):
        assert row["anchor"] == (i in ANCHORS)
        if i == BROKEN:
            assert (row["verdict"], row["auxiliary_best"]) == ("unreadable", None)
            continue
        pixels = torch.from_numpy(np.array(Image.open(data / row["path"]))) / 255
        with torch.no_grad():
            logits, z = encoder(((pixels - mean) / std).permute(2, 0, 1)[None])
        state = weights.state
        parts = logits[0].softmax(0), (state["prototypes"] @ z[0] / 0.1).softmax(0)
        mixed = 0.4 * parts[0] + 0.6 * parts[1]
        best, given = int(mixed.argmax()), row["given"]
        assert abs(mixed.max() - 0.5) > CLOSE and abs(mixed[given] - 1 / 6) > CLOSE, "too near to judge"
        label = best if mixed.max() >= 0.5 else given if given >= 0 and mixed[given] >= 1 / 6 else -1
        assert (row["best"], row["label"]) == (best, label)
        scores = {"score": mixed, "classifier": parts[0], "prototype": parts[1]}
        for name, p in (scores | {"auxiliary": (state["auxiliary.weight"] @ z[0]).softmax(0)}).items():
            assert row[f"{name}_best"] == pytest.approx(float(p[best]), abs=CLOSE)
            assert row[f"{name}_given"] == (None if given < 0 else pytest.approx(float(p[given]), abs=CLOSE))
    verdicts = [r["verdict"] for r in rows]
    assert min(verdicts.count(v) for v in ("kept", "relabelled", "removed")) >= 5
    assert any(rows[i]["verdict"] != "kept" for i in ANCHORS), "anchors are not protected"


def test_a_score_at_its_limit_counts():
    frozen = type("Frozen", (), {"run": lambda *_: (torch.zeros(2, 6), torch.zeros(2, 64)), "encoder": None})()
    o = Clean("", alpha=1.0, threshold=1 / 6, temperature=0.1)
    own = [torch.zeros(6, 64), None, None, torch.zeros(6, 64)]
    found = module.score(frozen, own, torch.zeros(2, 1), torch.tensor([3, -1]), o)
    assert found.shape == (2, 10) and found[:, 0].tolist() == [0, 0]
    assert module.score(frozen, own, torch.zeros(2, 1), torch.tensor([3, -1]), dataclasses.replace(o, threshold=0.2))[
        :, 0
    ].tolist() == [3, -1]
    mopro = module.score(frozen, [*own[:3], None], torch.zeros(2, 1), torch.tensor([3, -1]), o)
    assert mopro.shape == (2, 8) and mopro[:, 0].tolist() == [-1, -1]


def test_the_table_says_what_it_was_made_with(whole):
    settings = json.loads(pq.read_schema(whole / TABLE).metadata[b"mopro_fast.clean"])
    assert settings["rule"] == "CAPro's, anchors not protected" and settings["transform"] == "evaluation"
    columns = pq.read_schema(whole / TABLE).names
    assert columns[-3:] == ["auxiliary_given", "auxiliary_best", "anchor"] and columns[6:12] == [*module.SCORES]


def text(row: dict, label: int) -> list[list[str]]:
    of = "given" if label == row["given"] else "best"
    names = ("classifier", "auxiliary", "prototype", "score")
    return [] if label < 0 else [[str(label), *(f"{row[f'{name}_{of}']:.2f}" for name in names)]]


@pytest.mark.parametrize("records", [False, True])
def test_the_official_files(whole, model, data, tmp_path, records):
    out = whole
    if records:
        pathlist, out = str(data / "image_all_tfrecord.pathlist"), tmp_path
        clean(options(model, data, out, format="capro", pathlist=pathlist))
        assert (out / TABLE).read_bytes() == (whole / TABLE).read_bytes()
    found = json.loads((out / "capro" / FILES[0]).read_text())
    every = json.loads((out / "capro" / FILES[1]).read_text())
    with (out / "capro" / FILES[2]).open(newline="") as file:
        header, *lines = csv.reader(file)
    rows = [r for r in rows_of(out) if r["verdict"] != "unreadable"]
    place = {r["path"]: (f"{r['id'] % 3:05d}-of-00003.tfrecord", 1000 + r["id"]) for r in rows}
    place = place if records else {r["path"]: (r["path"], -1) for r in rows}
    kept = [r for r in rows if r["label"] >= 0]
    assert found["samples"] == [[Path(place[r["path"]][0]).name, place[r["path"]][1]] for r in kept]
    assert found["targets"] == [[r["label"]] for r in kept] and found["domains"] == [r["anchor"] for r in kept]
    folders = [str(Path(place[r["path"]][0]).parent).replace(".", "") for r in kept]
    assert [found["index2root"][str(i)] for i in found["roots"]] == folders
    assert found["root2index"] == {root: int(i) for i, root in found["index2root"].items()}
    assert len(every) == len(lines) == len(rows) and len(header) == 7
    for row, (name, before, after, domain), line in zip(rows, every, lines, strict=True):
        file, offset = place[row["path"]]
        assert (name, domain) == (f"{file}@{offset}", row["anchor"])
        assert before == text(row, row["given"])
        assert after == text(row, row["given"] if row["label"] < 0 else row["label"])
        assert line[:2] == [f"{Path(file).name}@{offset}", str(int(row["label"] >= 0))]
        assert line[2:4] == [",".join(c[0]) if c else "" for c in (before, after)]
        assert line[4:] == [str(len(before)), str(len(after)), str(int(bool(before) and before[0][0] == after[0][0]))]


@pytest.mark.parametrize("records", [False, True])
def test_retraining_reads_the_official_labels(whole, data, tmp_path, records):
    pathlist = str(data / "image_all_tfrecord.pathlist") if records else ""
    if records:
        module.capro_labels.write(whole / TABLE, tmp_path / "capro", pathlist)
    file = (tmp_path if records else whole) / "capro" / FILES[0]
    index = load_index(data / "list.txt", "train", num_classes=CLASSES)
    c = Retrain(cleaned=str(file), pathlist=pathlist)
    c.data.num_classes = CLASSES
    assert with_cleaned_labels(c, index).labels.tolist() == [r["label"] for r in rows_of(whole)]
    if records:
        with pytest.raises(UserError, match=r"is a file of records: set --pathlist"):
            with_cleaned_labels(dataclasses.replace(c, pathlist=""), index)
        (tmp_path / "short").write_text("a/00.png n00 00000-of-00003.tfrecord 1000\n")
        with pytest.raises(UserError, match=r"of other data than .*it has 0000\d-of-00003\.tfrecord@"):
            with_cleaned_labels(dataclasses.replace(c, pathlist=str(tmp_path / "short")), index)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"targets": [[1, 2]]}, "has several labels or none"),
        ({"roots": []}, "1 samples, 0 roots, 1 targets"),
        ({"samples": [["a.png"]]}, "is no .file, offset."),
        ({"index2root": []}, "index2root is no object"),
    ],
)
def test_damaged_official_labels_are_refused(data, tmp_path, change, message):
    good = {"samples": [["00.png", -1]], "targets": [[1]], "roots": [0], "index2root": {"0": "a"}}
    index = load_index(data / "list.txt", "train", num_classes=CLASSES)
    c = Retrain(cleaned=str(tmp_path / "x.json"))
    (tmp_path / "x.json").write_text(json.dumps(good))
    assert with_cleaned_labels(c, index).labels.max() == 1
    (tmp_path / "x.json").write_text(json.dumps(good | change))
    with pytest.raises(UserError, match=f"cannot read the cleaned labels .*{message}"):
        with_cleaned_labels(c, index)


def test_anchors_are_told_if_they_are_known(whole, model, data, tmp_path, capsys):
    state = torch.load(model, weights_only=True)
    config = json.loads(state["config"])
    config["capro"]["anchors"] = str(tmp_path / "gone.parquet")
    torch.save(state | {"config": json.dumps(config)}, tmp_path / "c.pt")
    clean(options(tmp_path / "c.pt", data, tmp_path / "a"))
    assert {r["anchor"] for r in rows_of(tmp_path / "a")} == {None}
    clean(options(tmp_path / "c.pt", data, tmp_path / "b", anchors=str(data)))
    assert rows_of(tmp_path / "b") == rows_of(whole)
    (tmp_path / "gone.parquet").write_text("of something else")
    clean(options(tmp_path / "c.pt", data, tmp_path / "c"))
    assert "the column anchor stays empty: cannot read the anchors" in capsys.readouterr().err
    assert rows_of(tmp_path / "c") == rows_of(tmp_path / "a")
    with pytest.raises(UserError, match=r"no anchors at .*nowhere"):
        clean(options(model, data, tmp_path / "d", anchors=str(tmp_path / "nowhere")))


def test_a_finished_cleaning_gets_its_official_files(whole, model, data, tmp_path):
    clean(options(model, data, tmp_path))
    before = (tmp_path / TABLE).read_bytes()
    assert not (tmp_path / "capro").exists()
    clean(options(model, data, tmp_path, format="capro"))
    assert (tmp_path / TABLE).read_bytes() == before
    assert all((tmp_path / "capro" / f).read_bytes() == (whole / "capro" / f).read_bytes() for f in FILES)


def test_refusals(whole, model, data, tmp_path):
    state = torch.load(model, weights_only=True)
    state["model"] = {n: t for n, t in state["model"].items() if n.startswith("encoder_q") or n == "prototypes"}
    torch.save(state, tmp_path / "mopro.pt")
    for name, value in {"format": "capro", "anchors": str(data)}.items():
        with pytest.raises(UserError, match=f"--{name} .* is for checkpoints of CAPro"):
            clean(options(tmp_path / "mopro.pt", data, tmp_path / "out", **{name: value}))
    with pytest.raises(UserError, match="--pathlist x has no effect without --format capro"):
        clean(options(model, data, tmp_path / "out", pathlist="x"))
    with pytest.raises(UserError, match="no file at --pathlist"):
        clean(options(model, data, tmp_path / "out", format="capro", pathlist=str(tmp_path / "x")))
    for lines, message in {
        "a/00.png n00 f 1\n": "does not name b/01.png: give the list of the same data",
        "a/00.png f 1\n": "is not a path, synset, file and offset",
        "a/00.png n00 f 1\nx/a/00.png n00 f 2\n": "names a/00.png twice",
    }.items():
        (tmp_path / "list").write_text(lines)
        with pytest.raises(UserError, match=message):
            module.capro_labels.write(whole / TABLE, tmp_path / "out", str(tmp_path / "list"))
    assert not [*(tmp_path / "out").iterdir()]
