"""Class folders: which are classes, which files are images, and that labels mean the same in both splits."""

import os
import socket

import pytest
from odd_images import encoded, picture
from PIL import Image

from mopro_fast.data.class_folders import class_numbers
from mopro_fast.data.index import load_index, synsets
from mopro_fast.errors import UserError

JPEG = encoded(picture(8, 8))


def images(root, *classes, count=2):
    for name in classes:
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (root / name / f"{i}.jpg").write_bytes(JPEG)
    return root


def labels_of(root, **options):
    """{class folder: label}"""
    index = load_index(root, "train", **{"num_classes": None} | options)
    assert all(
        index.classes[label] == name.split("/")[0] for name, label in zip(index.paths, index.labels, strict=True)
    )
    return {name.split("/")[0]: int(label) for name, label in zip(index.paths, index.labels, strict=True)}


def refused(match, *args, **kwargs):
    with pytest.raises(UserError, match=match) as error:
        load_index(*args, **{"num_classes": None} | kwargs)
    assert "\n" not in str(error.value)


def test_what_systems_and_this_package_make_is_no_class(tmp_path, capsys):
    images(tmp_path, "ant", "bee", "cat", "@eaDir", "lost+found", "__MACOSX", "$RECYCLE.BIN", ".hidden")
    (tmp_path / "@eaDir/sub").mkdir()
    (tmp_path / "bat").mkdir()
    for name, inner in (("a-run", "checkpoints"), ("a-pack", "records")):
        (tmp_path / name / inner).mkdir(parents=True)
    (tmp_path / "a-run/config.json").write_text("{}")
    (tmp_path / "a-pack/manifest.json").write_text("{}")
    assert labels_of(tmp_path, num_classes=3) == {"ant": 0, "bee": 1, "cat": 2}
    said = capsys.readouterr().err
    assert "folders of the system: 4, such as $RECYCLE.BIN" in said
    assert "folders that a command of this package made: 2, such as a-pack" in said
    assert "folders without an image, which are no classes: 1, such as bat" in said


def test_a_class_that_cannot_be_read_is_not_skipped(tmp_path, monkeypatch):
    images(tmp_path, "ant", "bee", "cat")
    (tmp_path / "bat").symlink_to("/not/mounted/bat")
    refused("bat is a link to nowhere: mount what it names", tmp_path, "train")
    (tmp_path / "bat").unlink()
    really = os.scandir

    def scandir(path):
        if str(path).endswith("bee"):
            raise PermissionError(13, "Permission denied")
        return really(path)

    monkeypatch.setattr(os, "scandir", scandir)
    refused("cannot read the folder .*bee: Permission denied", tmp_path, "train")


def test_every_image_is_taken_whatever_it_is_called(tmp_path, capsys):
    images(tmp_path, "ant", "bee")
    names = ["a.jfif", "b.jpe", "c.jpg?w=300", "d", "e.jpg_large", "f.jpg\r", "g.JPG", "h.web"]
    for name in names:
        (tmp_path / "ant" / name).write_bytes(JPEG)
    for kind in ("PNG", "GIF", "BMP", "WEBP", "TIFF", "AVIF", "JPEG2000"):
        Image.fromarray(picture(8, 8)).save(tmp_path / "bee" / f"is-{kind}", kind)
    for name in ("notes.txt", "empty", "page.html"):
        (tmp_path / "bee" / name).write_text("hello" * (name != "empty"))
    (tmp_path / "bee/.other.jpg").write_bytes(JPEG)
    (tmp_path / "bee/inner").mkdir()
    (tmp_path / "beside.jpg").write_bytes(JPEG)
    index = load_index(tmp_path, "train", num_classes=2)
    assert sorted(n for n in index.paths if n.startswith("ant")) == sorted(
        f"ant/{n}" for n in ["0.jpg", "1.jpg", *names]
    )
    assert sum(n.startswith("bee") for n in index.paths) == 2 + 7
    said = capsys.readouterr().err
    for part in (
        "files that are no images: 3, such as bee/",
        "hidden files: 1, such as bee/.other.jpg",
        "folders inside class folders: 1, such as bee/inner",
        "images beside the class folders: 1, such as beside.jpg",
    ):
        assert part in said


def test_files_beside_images_are_counted_and_not_opened(tmp_path, monkeypatch, capsys):
    images(tmp_path, "ant", "bee")
    for suffix in (".json", ".txt", ".XML"):
        (tmp_path / "ant" / f"0{suffix}").write_bytes(JPEG)
    monkeypatch.setattr("builtins.open", None)
    assert len(load_index(tmp_path, "train", num_classes=2)) == 4
    assert "files that are no images: 3, such as ant/0.XML" in capsys.readouterr().err


def test_lost_links_and_other_entries(tmp_path, capsys):
    images(tmp_path, "ant", "bee")
    (tmp_path / "ant/lost.jpg").symlink_to("/not/mounted.jpg")
    (tmp_path / "ant/loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "ant/lost").symlink_to("/not/mounted")
    os.mkfifo(tmp_path / "bee/pipe.jpg")
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.getcwd()
        os.chdir(tmp_path / "bee")  # a socket's name is at most 108 bytes long
        listening.bind("socket")
        os.chdir(here)
        index = load_index(tmp_path, "train", num_classes=2)
    assert {"ant/lost.jpg", "ant/loop.jpg"} <= set(index.paths) and len(index) == 6
    assert "entries that are no files: 3, such as ant/lost" in capsys.readouterr().err


def test_validation_is_matched_by_name(tmp_path):
    images(tmp_path / "train", "ant", "bee", "cat")
    images(tmp_path / "val", "bee", "cat")
    train = load_index(tmp_path, "train", num_classes=3)
    val = load_index(tmp_path, "val", num_classes=3, classes=train.classes)
    assert val.labels.tolist() == [1, 1, 2, 2] and val.classes == train.classes
    images(tmp_path / "val", "dog")
    refused("val: class dog is none of the 3 classes .*ant is there", tmp_path, "val", classes=train.classes)
    refused("class dog is outside the 2 classes", tmp_path, "val", num_classes=2, classes=["ant", "bee", "cat", "dog"])
    kept = load_index(tmp_path, "val", num_classes=2, keep_classes=2, classes=["ant", "bee"])
    assert kept.labels.tolist() == [1, 1]


@pytest.mark.parametrize("names", [["0", "1", "10", "2"], ["000", "001", "010", "002"]])
def test_folders_called_by_numbers_are_these_labels(tmp_path, names, capsys):
    images(tmp_path, *names)
    assert labels_of(tmp_path, num_classes=11) == {name: int(name) for name in names}
    assert "4 class folders, called by numbers up to 10: the other classes have no image" in capsys.readouterr().err
    assert labels_of(tmp_path, num_classes=2, keep_classes=2) == {name: int(name) for name in names[:2]}
    other = [name.lstrip("0") or "0" for name in names]
    known = load_index(tmp_path, "train", num_classes=11).classes
    assert class_numbers(other, known, "val") == {name: int(name) for name in other}


def test_numbers_that_are_no_labels_are_refused(tmp_path):
    images(tmp_path / "one", "1", "2", "3")
    refused(
        r"3 is outside \[0, 3\): none is called 0, and labels count from 0", tmp_path / "one", "train", num_classes=3
    )
    images(tmp_path / "ids", "20230001", "20230002")
    refused(r"20230002 is outside .*: rename them \(c123", tmp_path / "ids", "train")
    refused(r"20230002 is outside .*: rename them \(c123", tmp_path / "ids", "train", num_classes=2)
    images(tmp_path / "twice", "1", "01", "0")
    refused("class folders 01 and 1 are the same number", tmp_path / "twice", "train", num_classes=2)
    images(tmp_path / "mixed", "0", "2", "10", "cat")
    refused("class folder 2 would have the label 2|class folder 10 would have the label 1", tmp_path / "mixed", "train")


def test_names_known_from_elsewhere():
    """Of packs made when 10 came before 2, and of synsets that a folder calls by number."""
    assert class_numbers(["2", "10"], ["0", "1", "10", "2"], "") == {"2": 3, "10": 2}
    assert class_numbers(["02"], ["0", "1", "10", "2"], "") == {}
    assert class_numbers(["0", "2"], ["ant", "bee", "cat"], "") == {"0": 0, "2": 2}
    assert class_numbers(["0", "ant"], ["ant", "bee"], "") == {"ant": 0}


def test_synsets_that_do_not_tell_classes_apart_are_no_names(tmp_path, capsys):
    (tmp_path / "info").mkdir()
    assert synsets(str(tmp_path)) is None
    (tmp_path / "info/synsets.txt").write_bytes(b"\xef\xbb\xbfn01 tench\r\n\nn02 caf\xe9\n")
    assert synsets(str(tmp_path)) == ["n01", "n02"]
    (tmp_path / "info/synsets.txt").write_text("n01 crane\nn01 crane\n")
    assert synsets(str(tmp_path)) is None
    assert "the class n01 is there twice: the classes are taken without names" in capsys.readouterr().err
