import numpy as np
import pytest

from mopro_fast.data import check as check_module
from mopro_fast.data.index import load_index
from mopro_fast.errors import UserError


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def write_list(root, name, *lines):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text("\n".join(lines) + "\n")


@pytest.fixture
def webvision(tmp_path):
    touch(tmp_path, "google/q1/a.jpg", "google/q2/b.jpg", "flickr/q1/c.jpg", "val_images_256/v.jpg")
    write_list(tmp_path, "info/train_filelist_google.txt", "google/q1/a.jpg 0", "google/q2/b.jpg 2")
    write_list(tmp_path, "info/train_filelist_flickr.txt", "flickr/q1/c.jpg 1")
    write_list(tmp_path, "info/val_filelist.txt", "v.jpg 1")
    return tmp_path


@pytest.fixture
def listed(tmp_path):
    touch(tmp_path, "a.jpg", "dir/with space.jpg", "dir/c.jpg")
    return tmp_path


def refused(*needles, **kwargs):
    arguments = {"split": "train", "num_classes": 3, **kwargs}
    with pytest.raises(UserError) as error:
        load_index(arguments.pop("data"), arguments.pop("split"), **arguments)
    message = str(error.value)
    assert "\n" not in message
    for needle in needles:
        assert str(needle) in message
    return message


@pytest.mark.parametrize("slash", ["", "/"])
@pytest.mark.parametrize("layout", ["auto", "webvision"])
def test_webvision(webvision, slash, layout):
    train = load_index(str(webvision) + slash, "train", num_classes=3, layout=layout)
    assert list(train.paths) == ["google/q1/a.jpg", "google/q2/b.jpg", "flickr/q1/c.jpg"]
    assert train.labels.tolist() == [0, 2, 1] and train.labels.dtype == np.int64
    assert train.ids.tolist() == [0, 1, 2] and len(train) == 3 and train.classes is None
    val = load_index(str(webvision) + slash, "val", num_classes=3, layout=layout)
    assert [val.full_path(i) for i in range(len(val))] == [str(webvision / "val_images_256" / "v.jpg")]


def test_webvision_with_one_train_list(webvision):
    (webvision / "info/train_filelist_google.txt").unlink()
    assert list(load_index(webvision, "train", num_classes=3).paths) == ["flickr/q1/c.jpg"]
    (webvision / "info/train_filelist_flickr.txt").unlink()
    refused("train_filelist_google.txt and no info/train_filelist_flickr.txt", data=webvision)


def test_keep_classes_drops_the_others_and_never_asks_for_their_files(webvision):
    (webvision / "google/q2/b.jpg").unlink()
    kept = load_index(webvision, "train", num_classes=2, keep_classes=2)
    assert kept.labels.tolist() == [0, 1] and kept.ids.tolist() == [0, 1]
    refused("--keep-classes 1", data=webvision, split="val", num_classes=1, keep_classes=1)


def test_list_file(listed):
    write_list(listed, "list.txt", "# a comment", "", "a.jpg -1", "dir/with space.jpg\t2", "  dir/c.jpg 0  ")
    found = load_index(listed / "list.txt", "train", num_classes=3)
    assert list(found.paths) == ["a.jpg", "dir/with space.jpg", "dir/c.jpg"]
    assert found.labels.tolist() == [-1, 2, 0]
    elsewhere = listed / "lists" / "list.txt"
    write_list(listed, "lists/list.txt", "c.jpg 0")
    assert load_index(elsewhere, "train", num_classes=3, root=listed / "dir").full_path(0) == str(listed / "dir/c.jpg")
    refused("c.jpg", data=elsewhere)


def test_absolute_paths_and_a_list_named_without_its_folder(listed, monkeypatch):
    write_list(listed, "list.txt", f"{listed}/a.jpg 0", "dir/c.jpg 1")
    monkeypatch.chdir(listed)
    assert load_index("list.txt", "train", num_classes=3).full_path(0) == str(listed / "a.jpg")


def test_folders(tmp_path):
    touch(tmp_path, "cat/2.JPG", "cat/1.png", "cat/notes.txt", "cat/.hidden.jpg", "ant/x.jpeg", ".git/y.jpg", "z.jpg")
    found = load_index(tmp_path, "train", num_classes=2)
    assert list(found.paths) == ["ant/x.jpeg", "cat/1.png", "cat/2.JPG"]
    assert found.labels.tolist() == [0, 1, 1] and found.classes == ["ant", "cat"]
    first = load_index(tmp_path, "train", num_classes=1, keep_classes=1)
    assert list(first.paths) == ["ant/x.jpeg"] and first.classes == ["ant"]


def test_folders_with_train_and_val(tmp_path):
    touch(tmp_path, "train/a/1.jpg", "train/b/2.jpg", "val/a/3.jpg", "val/b/4.jpg")
    assert list(load_index(tmp_path, "train", num_classes=2).paths) == ["a/1.jpg", "b/2.jpg"]
    assert load_index(tmp_path, "val", num_classes=2).full_path(1) == str(tmp_path / "val/b/4.jpg")


def test_digest_is_of_paths_and_labels_alone(listed):
    write_list(listed, "one.txt", "a.jpg 0", "dir/c.jpg 1")
    write_list(listed, "two.txt", "# the same", "a.jpg 0", "dir/c.jpg 1")
    write_list(listed, "other.txt", "a.jpg 0", "dir/c.jpg 2")
    write_list(listed, "order.txt", "dir/c.jpg 1", "a.jpg 0")
    one, two, other, order = (
        load_index(listed / f"{name}.txt", "train", num_classes=3).digest() for name in ("one", "two", "other", "order")
    )
    assert one == two and len({one, other, order}) == 3


def test_each_file_is_looked_at_once(listed, monkeypatch):
    write_list(listed, "list.txt", "a.jpg 0", "dir/c.jpg 2")
    index = load_index(listed / "list.txt", "train", num_classes=3)
    monkeypatch.setattr(check_module, "stats", None)
    for _ in range(2):
        found = check_module.check(index, workers=1, progress=False)
        assert found.size.tolist() == index.stats.size.tolist() == [1] * len(index)


def test_no_such_data(tmp_path):
    refused("no such file or folder", tmp_path / "nowhere", data=tmp_path / "nowhere")


def test_a_pack_that_was_interrupted_is_no_folder_of_classes(tmp_path):
    touch(tmp_path, ".packing.json", "records/train-000000.json.gz", "train-000000.tar")
    refused("holds no manifest.json", "mopro-fast pack", data=tmp_path, num_classes=1)


def test_a_folder_one_too_high_is_refused(tmp_path):
    touch(tmp_path, "photos/cat/1.jpg", "photos/dog/1.jpg", "more/2.jpg")
    refused("photos holds folders, not images", "give it", data=tmp_path, num_classes=2)


def test_unknown_layout_says_what_was_looked_for(tmp_path):
    touch(tmp_path, "a.jpg")
    refused("train_filelist_google.txt", "val_filelist.txt", "class folders", data=tmp_path)


@pytest.mark.parametrize("layout", ["list", "folder"])
def test_layout_that_the_data_has_not(listed, layout):
    data = listed if layout == "list" else listed / "a.jpg"
    refused(data, "--layout", data=data, layout=layout)


@pytest.mark.parametrize("lines", [[], ["# nothing"]])
def test_empty_list(listed, lines):
    write_list(listed, "list.txt", *lines)
    refused("list.txt", "no image", data=listed / "list.txt")


@pytest.mark.parametrize("line", ["a.jpg", "a.jpg x", "a.jpg 1.5", "7", "a.jpg 99999999999999999999"])
def test_malformed_line(listed, line):
    write_list(listed, "list.txt", "a.jpg 0", "", line)
    refused("list.txt:3", line, data=listed / "list.txt")


def test_list_that_is_not_text(listed):
    (listed / "list.txt").write_bytes(b"\xff\xfe\x00")
    refused("list.txt", "UTF-8", data=listed / "list.txt")


@pytest.mark.parametrize("label", [3, 700, -2])
def test_label_out_of_range(listed, label):
    write_list(listed, "list.txt", "a.jpg 0", "# comment", f"dir/c.jpg {label}")
    message = refused("list.txt:3", f"label {label} ", "[0, 3)", data=listed / "list.txt")
    assert (f"--num-classes to at least {label + 1}" in message) == (label > 0)


def test_no_label_is_for_training_only(listed):
    write_list(listed, "list.txt", "a.jpg 0", "dir/c.jpg -1")
    refused("list.txt:2", "-1", data=listed / "list.txt", split="val")


def test_missing_images_are_counted_and_the_first_named(listed):
    write_list(listed, "list.txt", "a.jpg 0", *(f"gone{i}/x.jpg 0" for i in range(4)), "a.jpg/y.jpg 0", "dir/d.jpg 1")
    message = refused("6 of 7", "gone0/x.jpg, gone1/x.jpg, gone2/x.jpg, ...", listed, data=listed / "list.txt")
    assert "gone3" not in message


def test_folders_without_images(tmp_path):
    touch(tmp_path, "a/notes.txt", "b/.hidden.jpg")
    refused("no image in its 2 class folders", data=tmp_path, num_classes=2)


@pytest.mark.parametrize("arguments", [{"num_classes": 3}, {"num_classes": 3, "keep_classes": 3}])
def test_wrong_number_of_class_folders(tmp_path, arguments):
    touch(tmp_path, "a/1.jpg", "b/1.jpg")
    setting = "--keep-classes 3" if "keep_classes" in arguments else "--num-classes 3"
    refused("2 class folders", setting, data=tmp_path, **arguments)


def test_folder_without_class_folders(tmp_path):
    touch(tmp_path, "train/a.jpg", "val/a.jpg")
    refused("no class folders", data=tmp_path)
