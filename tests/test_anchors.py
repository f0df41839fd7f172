"""Tables of anchors, written by hand: what is read of them, and what is refused in one line."""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mopro_fast.data.anchors import read_anchors
from mopro_fast.data.index import Index
from mopro_fast.data.paths import Paths
from mopro_fast.errors import UserError

NAMES = ["a.jpg", "b.jpg", "sub/c.jpg", "d.jpg", "a.jpg", "e.jpg"]  # a.jpg is there with two labels
LABELS = [0, 1, 1, 2, 2, -1]


@pytest.fixture
def index():
    return Index("/images", Paths(NAMES), np.array(LABELS), None, "list.txt")


@pytest.fixture
def write(tmp_path):
    def write(**columns):
        pq.write_table(pa.table(columns), tmp_path / "anchors.parquet")
        return str(tmp_path)

    return write


def read(path, index):
    found = read_anchors(path, index)
    assert found.mask.dtype == bool and found.mask.shape == (len(index),)
    assert found.weights is None or (found.weights.dtype == np.float32 and found.weights.shape == (len(index),))
    return np.flatnonzero(found.mask).tolist()


def refusal(path, index):
    with pytest.raises(UserError) as caught:
        read_anchors(path, index)
    text = str(caught.value)
    assert text.isprintable() and "anchors.parquet" in text and ": " in text
    return text.replace(path, "DIR")


def test_by_path_with_a_label(write, index, capsys):
    path = write(path=["d.jpg", "sub/c.jpg", "b.jpg"], label=[2, 1, 1], anchor=[1, 1, 0], dist=[0.5, 0.2, 0.1])
    assert read(path, index) == [2, 3] == read(f"{path}/anchors.parquet", index)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"{path}/anchors.parquet: 2 anchors in 2 of 3 classes; without any: 1, such as 0"
    named = dataclasses.replace(index, classes=["n01\n", "n02", "n03"])
    read(path, named)
    assert capsys.readouterr().err.endswith(r"such as n01\n" + "\n")


def test_by_path_alone_booleans_and_names_as_bytes(write, index):
    path = write(path=pa.array([b"./b.jpg", b"/images/d.jpg"], pa.binary()), anchor=[True, False])
    assert read(path, index) == [1]


def test_by_id(write, index):
    path = write(id=[4, 0, 3], label=[2, 0, 1], anchor=pa.array([1, 0, 0], pa.int8()), neighbours=[[1, 2]] * 3)
    assert read(path, index) == [4]


def test_a_path_goes_before_an_id(write, index):
    assert read(write(path=["b.jpg"], id=[9], anchor=[1]), index) == [1]


def test_an_image_in_several_rows(write, index):
    """With labels a row is for those of that label, without for all of the image."""
    assert read(write(path=["a.jpg", "b.jpg"], label=[2, 1], anchor=[1, 1]), index) == [1, 4]
    assert read(write(path=["a.jpg", "a.jpg"], label=[2, 0], anchor=[1, 0]), index) == [4]
    assert read(write(path=["a.jpg"], anchor=[1]), index) == [0, 4]
    assert read(write(path=["a.jpg", "a.jpg"], label=[2, 2], anchor=[1, 1]), index) == [4]
    assert refusal(write(path=["b.jpg", "a.jpg", "a.jpg"], label=[1, 2, 2], anchor=[1, 1, 0]), index) == (
        "DIR/anchors.parquet has a.jpg twice: keep one of the rows"
    )
    again = Index("/images", Paths(["a.jpg"] * 3), np.array([1, 1, 1]), None, "list.txt")
    assert read(write(path=["a.jpg"] * 3, label=[1] * 3, anchor=[0, 1, 0]), again) == [1]  # row by row
    assert read(write(path=["a.jpg"], label=[1], anchor=[1]), again) == [0, 1, 2]


def test_labels_matter_for_anchors_alone(write, index):
    path = write(path=["b.jpg", "d.jpg", "a.jpg"], label=[1, 77, 77], anchor=[1, 0, 0], weight=[1, 2, 3.0])
    assert read(path, index) == [1]
    assert read_anchors(path, index).weights.tolist() == [3, 1, 1, 2, 1, 1]
    two = Index("/images", Paths(["x.jpg", "y.jpg"]), np.array([1, 0]), None, "list.txt")
    path = write(path=["y.jpg", "x.jpg"], label=[0, 5], anchor=[1, 0], weight=[1, 3.0])
    assert read(path, two) == [1] and read_anchors(path, two).weights.tolist() == [3, 1]


def test_weights(write, index):
    assert read_anchors(write(path=["b.jpg"], anchor=[1]), index).weights is None
    found = read_anchors(write(id=[1, 5, 4], label=[1, -1, 2], anchor=[1, 0, 0], weight=[2, 0, 1]), index)
    assert found.weights.tolist() == [1, 2, 1, 1, 1, 0]


def test_the_digest_is_of_what_matters(write, index):
    def digest(index=index, **columns):
        return read_anchors(write(**columns), index).digest

    one = digest(path=["b.jpg", "d.jpg"], label=[1, 2], anchor=[1, 1])
    assert len(one) == 64
    assert one == digest(anchor=[1, 0, 1], id=[3, 0, 1], label=[2, 0, 1], dist=[1, 2, 3], weight=[1, 1, 1.0])
    others = [
        digest(path=["b.jpg", "d.jpg"], anchor=[1, 0]),
        digest(path=["b.jpg", "d.jpg"], anchor=[1, 1], weight=[1, 2]),
        digest(path=["b.jpg", "d.jpg", "a.jpg"], anchor=[1, 1, 0], weight=[1, 1, 2]),
        digest(path=["b.jpg", "d.jpg", "a.jpg"], anchor=[1, 1, 1], weight=[1, 1, 2]),
        digest(dataclasses.replace(index, labels=index.labels[::-1] + 1), path=["b.jpg", "d.jpg"], anchor=[1, 1]),
    ]
    assert len({one, *others}) == 6


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"path": ["a.jpg"]}, "cannot read the anchors DIR/anchors.parquet: it has no column anchor: write it as in"),
        ({"anchor": [1]}, "without one it needs a column id"),
        ({"anchor": [1], "id": [1]}, "without one it needs a column label"),
        ({"anchor": [0.5], "path": ["b.jpg"]}, "anchor is not whole numbers or booleans everywhere"),
        ({"anchor": [1, None], "path": ["b.jpg", "d.jpg"]}, "anchor is not whole numbers or booleans everywhere"),
        ({"anchor": [1], "path": [1]}, "path is not text everywhere"),
        ({"anchor": [1], "id": ["x"], "label": [1]}, "id is not whole numbers everywhere"),
        ({"anchor": [1], "path": ["b.jpg"], "label": ["x"]}, "label is not whole numbers everywhere"),
        ({"anchor": [1], "path": ["b.jpg"], "weight": ["x"]}, "weight is not numbers everywhere"),
        ({"anchor": [1, 2], "path": ["b.jpg", "d.jpg"]}, "d.jpg has anchor 2: write 1 for an anchor, 0 for any other"),
        ({"anchor": [-1], "path": ["b.jpg"]}, "b.jpg has anchor -1: -1 is for images with several labels: write 1"),
        ({"anchor": [0, 0], "path": ["b.jpg", "d.jpg"]}, "DIR/anchors.parquet has no anchor: write 1"),
        ({"anchor": [True, False], "path": ["b.jpg", "x\n.jpg"]}, r"than list.txt: it has x\n.jpg, which is not there"),
        ({"anchor": [1, 0], "id": [1, 6], "label": [1, 1]}, "it has id 6, and ids there are 0 to 5: give the data"),
        ({"anchor": [1, 0], "id": [1, -1], "label": [1, 1]}, "it has id -1"),
        ({"anchor": [1, 0, 0], "id": [1, 3, 3], "label": [1] * 3}, "anchors.parquet has id 3 (d.jpg) twice: keep one"),
        (
            {"anchor": [0, 1], "path": ["b.jpg", "d.jpg"], "label": [3, 1]},
            "the anchor d.jpg has label 1, and 2 in list.txt: an anchor keeps the label it came with",
        ),
        ({"anchor": [1], "path": ["a.jpg"], "label": [1]}, "the anchor a.jpg has label 1, and 0 in list.txt"),
        ({"anchor": [1], "id": [3], "label": [-1]}, "the anchor id 3 (d.jpg) has label -1, and 2 in list.txt"),
        ({"anchor": [1], "path": ["e.jpg"]}, "the anchor e.jpg has no label in list.txt: give it one there"),
        ({"anchor": [1], "id": [5], "label": [-1]}, "the anchor e.jpg has no label in list.txt"),
        ({"anchor": [1, 0], "path": ["b.jpg", "d.jpg"], "weight": [1, None]}, "d.jpg has no weight: give each row"),
        ({"anchor": [1], "path": ["b.jpg"], "weight": [-0.5]}, "b.jpg has weight -0.5: give each row a finite one of"),
        ({"anchor": [1], "path": ["b.jpg"], "weight": [1e300]}, "b.jpg has weight inf"),
        (
            {"anchor": [1, 1], "path": ["b.jpg"] * 2, "weight": [1, 2]},
            "DIR/anchors.parquet has b.jpg twice: keep one of the rows",
        ),
    ],
)
def test_mistakes_are_one_line(columns, message, write, index):
    assert message in refusal(write(**columns), index)


def test_files_that_are_no_table(tmp_path, index):
    assert refusal(str(tmp_path), index).startswith("no anchors at DIR/anchors.parquet: name a table of anchors")
    (tmp_path / "anchors.parquet").write_text("path,anchor\n")
    assert refusal(str(tmp_path), index).startswith("cannot read the anchors DIR/anchors.parquet: ")
    pq.write_table(pa.table([[1], [1]], names=["anchor", "anchor"]), tmp_path / "anchors.parquet")
    assert "anchor" in refusal(str(tmp_path), index)
