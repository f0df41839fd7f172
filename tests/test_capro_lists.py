"""CAPro's official lists of images, in and out."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mopro_fast import cli
from mopro_fast.errors import UserError

IMAGES = [("google/q1/a b.jpg", 0, 0.4), ("google/q1/c.jpg", 0, 0.2), ("google/q2/d.jpg", 1, 0.5)]
IMAGES += [("google/q1/e.jpg", 0, 0.2), ("google/q2/f.jpg", 1, 0.5), ("google/q1/g.jpg", 0, 0.2)]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """Their lists: records of two files, whose offsets begin anew."""
    monkeypatch.chdir(tmp_path)
    places = [("records/one" if i < 3 else "records/two", 7 * (i % 3)) for i in range(len(IMAGES))]
    lines = [f"{path} n0{label} {file} {o}" for (path, label, _), (file, o) in zip(IMAGES, places, strict=True)]
    Path("pathlist").write_text("\n".join(lines) + "\n")
    info = [{"label": label, "sample_weight": 0.5 + i, "meta_dist": d} for i, (_, label, d) in enumerate(IMAGES)]
    train = [f"{file}@{o} {json.dumps(one)}" for (file, o), one in zip(places, info, strict=True)]
    Path("train.txt").write_text("\n".join(train) + "\n")
    val = [f"{file.split('/')[1]}@{o} {label}" for (_, label, _), (file, o) in zip(IMAGES, places, strict=True)]
    Path("val.txt").write_text("\n".join(val) + "\n")
    return tmp_path


def refusal(*words: str) -> str:
    with pytest.raises(UserError) as error:
        cli._run(list(words))
    return str(error.value)


def test_a_training_list_gives_labels_and_the_nearest_anchors_of_each_class(capsys):
    assert cli._run(["import", "train.txt", "out", "--pathlist", "pathlist", "--anchors", "2"]) == 0
    assert Path("out/list.txt").read_text() == "".join(f"{path} {label}\n" for path, label, _ in IMAGES)
    table = pq.read_table("out/anchors.parquet").to_pydict()
    assert table["path"] == [path for path, _, _ in IMAGES]
    assert table["anchor"] == [0, 1, 1, 1, 1, 0]  # ties in the list's order
    assert table["dist"] == [d for _, _, d in IMAGES]
    assert table["weight"] == [0.5 + i for i in range(len(IMAGES))]
    assert "6 images, 4 anchors" in capsys.readouterr().out


def test_it_goes_out_as_it_came_in():
    cli._run(["import", "train.txt", "out", "--pathlist", "pathlist"])
    assert cli._run(["export", "out/anchors.parquet", "back.txt", "--format", "capro", "--pathlist", "pathlist"]) == 0
    came, went = (Path(name).read_text().splitlines() for name in ("train.txt", "back.txt"))
    for before, after in zip(came, went, strict=True):
        place, _, info = before.partition(" ")
        assert after.partition(" ")[0] == place
        ours = json.loads(after.partition(" ")[2])
        assert ours.items() >= json.loads(info).items()
        assert (ours["meta_label"], ours["meta_sim"], ours["conf_score"]) == ([ours["label"]], [1.0], 1.0)


def test_without_distances_their_topk_takes_our_anchors():
    columns = {"path": [path for path, _, _ in IMAGES], "label": [0, 0, 1, 0, 1, 0], "anchor": [0, 0, 0, 1, 1, 0]}
    pq.write_table(pa.table(columns), "a.parquet")
    cli._run(["export", "a.parquet", "back.txt", "--format", "capro", "--pathlist", "pathlist"])
    found = [json.loads(line.partition(" ")[2])["meta_dist"] for line in Path("back.txt").read_text().splitlines()]
    assert found == [1, 1, 1, 0, 0, 1]


def test_a_validation_list_gives_labels_alone():
    assert cli._run(["import", "val.txt", "out", "--pathlist", "pathlist"]) == 0
    assert Path("out/list.txt").read_text().splitlines()[0] == "google/q1/a b.jpg 0"
    assert not Path("out/anchors.parquet").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("records/one@8 1", "entry 1: pathlist has no image at records/one@8"),
        ("records/one 1", "has no image at records/one"),
        ("records/one@0", "no label and no JSON"),
        ('records/one@0 {"label": 1}', "meta_dist is missing"),
        ('records/one@0 {"label": [1, 2], "meta_dist": [0.1]}', "several labels"),
        ("records/one@0 1,2", "several labels"),
        ('records/one@0 {"label": -1, "meta_dist": 0.1}', "label is no number"),
    ],
    ids=["offset", "no-place", "empty", "no-distance", "several", "commas", "negative"],
)
def test_mistakes_are_one_line(line, message):
    Path("bad.txt").write_text(line + "\n")
    found = refusal("import", "bad.txt", "out", "--pathlist", "pathlist")
    assert message in found
    assert "\n" not in found
    assert not Path("out").exists()


def test_options_of_lists_belong_to_lists():
    assert "is for a table of anchors" in refusal("export", "a.pt", "b", "--format", "capro", "--pathlist", "pathlist")
    assert "--anchors must be at least 1" in refusal(
        "import", "train.txt", "o", "--pathlist", "pathlist", "--anchors", "0"
    )
    pq.write_table(pa.table({"path": ["x.jpg"], "label": [0], "anchor": [1]}), "a.parquet")
    assert "does not name x.jpg" in refusal("export", "a.parquet", "b", "--format", "capro", "--pathlist", "pathlist")
    assert not Path("b").exists()
