"""What a run notes of its class folders: labels stay what they were, whatever version began it."""

import numpy as np
import pytest
from odd_images import encoded, picture

from mopro_fast.data.begun import as_begun, begun
from mopro_fast.data.index import load_index


def images(root, *classes):
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(3):
            (root / name / f"{i}.jpg").write_bytes(encoded(picture(8, 8)))
    return root


def note(folder, labels_of, labels=None):
    """images.txt as versions before wrote it, after retrain and finetune had changed the labels."""
    names = [f"{name}/{i}.jpg" for name in labels_of for i in range(3)]
    labels = [labels_of[name.split("/")[0]] for name in names] if labels is None else labels
    (folder / "images.txt").write_text("".join(f"{n} {y}\n" for n, y in zip(names, labels, strict=True)))


@pytest.mark.parametrize(
    ("labels_of", "labels", "classes", "expected"),
    [
        ({"ant": 0, "bee": 1, "cat": 2}, None, 3, ["ant", "bee", "cat"]),
        ({"0": 0, "1": 1, "10": 2, "2": 3}, None, 4, ["0", "1", "10", "2"]),
        ({"ant": 0, "cat": 2}, None, 3, ["ant", "1", "cat"]),  # bee had no image
        ({"ant": 1, "bee": 0}, None, 2, ["ant", "bee"]),  # all labels were cleaned, and changed
        ({"ant": 0, "bee": 1}, [-1, -1, 0, 1, -1, -1], 2, ["ant", "bee"]),  # a share of them
        ({"ant": 0, "cat": 2}, [0, 2, 0, 2, 2, 2], 3, None),  # nobody can tell
        ({"ant": 2, "cat": 0}, None, 3, None),
        ({}, None, 3, None),  # emptied
    ],
)
def test_classes_of_versions_before(tmp_path, labels_of, labels, classes, expected):
    note(tmp_path, labels_of, labels)
    found = begun(tmp_path, None, classes)
    assert expected is None if found is None else found.classes == expected


def test_numbers_that_were_sorted_as_words_stay(tmp_path):
    """A run that went on would else have other labels."""
    data = images(tmp_path / "data", "0", "1", "10", "2")
    note(tmp_path, {"0": 0, "1": 1, "10": 2, "2": 3})
    noted = begun(tmp_path, None, 4)
    index = load_index(data, "train", num_classes=4, classes=noted.classes)
    assert as_begun(index, noted).digest() == noted.digest() == index.digest()
    assert np.bincount(index.labels).tolist() == [3, 3, 3, 3] and index.classes == ["0", "1", "10", "2"]


def test_a_folder_without_an_image_in_between_stays_a_class(tmp_path):
    data = images(tmp_path / "data", "ant", "cat")
    (data / "bee").mkdir()
    note(tmp_path, {"ant": 0, "cat": 2})
    noted = begun(tmp_path, None, 3)
    index = load_index(data, "train", num_classes=3, classes=noted.classes)
    assert index.digest() == noted.digest()
