"""The columns of an index in a file that is mapped: the same as from the lists and tables, or not taken."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from odd_images import encoded, picture

from mopro_fast.config import DataConfig
from mopro_fast.data import index as index_module
from mopro_fast.data import inputs, mapped, shards
from mopro_fast.data.check import check, load_splits
from mopro_fast.data.index import load_index
from mopro_fast.data.pack import Pack, pack
from mopro_fast.errors import UserError

COLUMNS = {"label": np.arange(40), "path": pa.array([b"\xff%d" % i for i in range(40)], pa.large_binary())}


@pytest.fixture(autouse=True)
def mapped_however_few(monkeypatch, tmp_path):
    monkeypatch.setattr(mapped, "FEWEST", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path):
    """A list of 12 images."""
    (tmp_path / "data").mkdir()
    for i in range(12):
        (tmp_path / f"data/{i}.jpg").write_bytes(encoded(picture(seed=i)))
    (tmp_path / "data/list.txt").write_text("".join(f"{i}.jpg {i % 3}\n" for i in range(12)))
    return tmp_path / "data/list.txt"


def load(data: Path):
    return load_index(data, "train", num_classes=3, missing=True)


def parsed(monkeypatch) -> list[str]:
    """The lists that are parsed from now on."""
    names, read_list = [], index_module.read_list
    monkeypatch.setattr(index_module, "read_list", lambda name, *args: names.append(name) or read_list(name, *args))
    return names


def test_what_is_written_is_read(tmp_path):
    path = str(tmp_path / "x.arrow")
    assert mapped.write(path, COLUMNS, {"of": [1, None]}) and mapped.about_of(path)["of"] == [1, None]
    found = mapped.read(path, {"of": [1, None]})
    assert found["path"].equals(COLUMNS["path"]) and np.array_equal(found["label"], COLUMNS["label"])
    assert found["label"].base is not None and not found["label"].flags.writeable
    assert mapped.read(path, {"of": [2, None]}) is None and mapped.read(path, {"other": 1}) is None


def test_a_damaged_file_is_not_taken(tmp_path):
    path = tmp_path / "x.arrow"
    mapped.write(str(path), COLUMNS, {})
    content = path.read_bytes()
    at = content.index(COLUMNS["label"].tobytes())
    for damaged in (content[:at] + b"\1" + content[at + 1 :], content[:-9], content[:at], b""):
        path.write_bytes(damaged)
        assert mapped.read(str(path), {}) is None
        assert mapped.write(str(path), COLUMNS, {}) and mapped.read(str(path), {}) is not None


def test_no_flipped_bit_is_taken(tmp_path):
    path = tmp_path / "x.arrow"
    columns = COLUMNS | {"reason": pa.array(["", "odd"] * 20, pa.large_string())}
    mapped.write(str(path), columns, {"of": 1})
    content, rng = path.read_bytes(), np.random.default_rng(0)
    for at, bit in zip(
        rng.integers(len(content), size=2000).tolist(), rng.integers(8, size=2000).tolist(), strict=True
    ):
        flipped = bytearray(content)
        flipped[at] ^= 1 << bit
        path.write_bytes(flipped)
        found = mapped.read(str(path), {"of": 1})
        assert found is None or (found.keys() == columns.keys() and np.array_equal(found["label"], columns["label"]))
        assert found is None or all(found[name].equals(columns[name]) for name in ("path", "reason"))


def test_one_of_another_version_is_made_again(tmp_path, monkeypatch):
    path = str(tmp_path / "x.arrow")
    with monkeypatch.context() as patch:
        patch.setattr(mapped, "_VERSION", 0)
        mapped.write(path, COLUMNS, {})
    assert mapped.read(path, {}) is None and mapped.write(path, COLUMNS, {}) and mapped.read(path, {}) is not None


def test_what_another_machine_may_replace_is_read(tmp_path, monkeypatch):
    mounts, path = tmp_path / "mountinfo", str(tmp_path / "x.arrow")
    mounts.write_text(
        "25 1 254:0 / / rw,relatime shared:1 - ext4 /dev/root rw\n90 25 0:45 / /data\\040set rw - nfs4 a:/b rw\n"
    )
    assert [mapped._is_remote(os.makedev(*n), str(mounts)) for n in ((254, 0), (0, 45), (0, 4))] == [False, True, False]
    mapped.write(path, COLUMNS, {})
    for remote in (False, True):
        monkeypatch.setattr(mapped, "_is_remote", lambda _, remote=remote: remote)
        found = mapped.read(path, {})
        assert (path in Path("/proc/self/maps").read_text()) is not remote and len(found["label"]) == 40
        del found


def test_only_such_a_file_is_replaced(tmp_path):
    path = tmp_path / "x.arrow"
    path.write_text("mine")
    assert not mapped.write(str(path), COLUMNS, {}) and path.read_text() == "mine"
    assert not mapped.write(str(tmp_path / "none/x.arrow"), COLUMNS, {})
    found = mapped.kept(str(tmp_path / "x.parquet"), COLUMNS, {})
    assert np.array_equal(found["label"], COLUMNS["label"])
    assert len(list((tmp_path / "cache/mopro_fast").iterdir())) == 1


def test_a_list_is_parsed_once(data, monkeypatch):
    first = load(data)
    checked = check(first, workers=1, progress=False)
    names = parsed(monkeypatch)
    again = load(data)
    assert not names and again.digest() == first.digest() and again.paths.equals(first.paths)
    found = check(again, workers=1, progress=False)
    assert found.read == 0 and found.path == checked.path
    for name in ("verdict", "size", "mtime_ns", "crc32", "width", "height"):
        assert np.array_equal(getattr(found, name), getattr(checked, name))
    assert found.reason.to_pylist() == checked.reason.to_pylist()
    data.write_text(data.read_text().replace("3.jpg 0", "3.jpg 2"))
    assert load(data).labels[3] == 2 and names == [str(data)]
    assert check(load(data), workers=1, progress=False).read == 0
    assert load(data).labels[3] == 2 and len(names) == 2  # once more, for the check
    with pytest.raises(UserError, match=r"list\.txt:3: label 2 is outside \[0, 2\)"):
        load_index(data, "train", num_classes=2)


def test_other_labels_are_not_those_of_the_list(data):
    """Re-training and fine-tuning check the images with labels of their own."""
    for labels in (np.full(12, -1), np.arange(12) % 2):
        check(load(data).with_labels(labels), workers=1, progress=False)
        assert load(data).labels.tolist() == [i % 3 for i in range(12)]
    index, judged = inputs.hold_out(load(data), DataConfig(num_classes=3, holdout="0.5"))
    assert index.made_of is not None and judged.made_of is None


def test_a_part_of_the_classes_is_not_the_whole(data, monkeypatch):
    check(load(data), workers=1, progress=False)
    part = load_index(data, "train", num_classes=3, keep_classes=1, missing=True)
    assert len(part) == 4 and check(part, workers=1, progress=False).read == 0
    assert len(load(data)) == 12 and check(load(data), workers=1, progress=False, forget=True).read == 0
    names = parsed(monkeypatch)
    assert len(load(data)) == 12 and not names


def test_what_depends_on_the_files_there_is_asked_again(data):
    data.write_text(data.read_text() + "#new.jpg 1\n")
    checked = check(load(data), workers=1, progress=False)
    assert mapped.about_of(mapped.places(checked.path)[0])["made_of"] is None
    (data.parent / "#new.jpg").write_bytes(encoded(picture()))
    assert len(load(data)) == 13


def test_a_file_that_changes_is_read_again(data):
    checked = check(load(data), workers=1, progress=False)
    (data.parent / "5.jpg").write_bytes(encoded(picture(30, 40)))
    assert check(load(data), workers=1, progress=False).read == 1
    found = check(load(data), workers=1, progress=False)
    assert found.read == 0 and (found.width[5], found.height[5]) == (40, 30)
    assert pq.read_table(checked.path)["width"][5].as_py() == 40


def test_a_file_that_stays_lost_costs_no_new_table(data):
    (data.parent / "5.jpg").unlink()
    checked = check(load(data), workers=1, progress=False)
    files = [Path(checked.path), Path(mapped.places(checked.path)[0])]
    before = [path.stat().st_mtime_ns for path in files]
    left = Path(f"{checked.path}.partial.01234567")  # of a check that was ended before it removed that
    left.write_text('["0.jpg", 1, 1, "JPEG", "unreadable", "", 1, 1, 1]\n')
    assert check(load(data), workers=1, progress=False).read == 1
    assert [path.stat().st_mtime_ns for path in files] == before and not left.exists()
    (data.parent / "5.jpg").write_bytes(encoded(picture()))
    assert check(load(data), workers=1, progress=False).verdict[5] == 0


def test_without_its_table_everything_is_read_again(data):
    checked = check(load(data), workers=1, progress=False)
    os.unlink(checked.path)
    assert check(load(data), workers=1, progress=False).read == 12


def test_class_folders_that_change(tmp_path):
    for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg"):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_bytes(encoded(picture()))
    check(load_splits(str(tmp_path / "d"), "auto", None)["train"], workers=1, progress=False)
    (tmp_path / "d/a/0.jpg").write_bytes(encoded(picture(9, 7)))
    index = load_splits(str(tmp_path / "d"), "auto", None)["train"]
    found = check(index, workers=1, progress=False)
    assert found.read == 1 and found.width[0] == 7
    assert mapped.read(mapped.places(found.path)[0], {"digest": index.digest()}) is not None
    assert check(index, workers=1, progress=False).read == 0


def test_a_pack(data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    pack({"train": load(data)}, Pack(str(data), str(out), shard_images=5, size=16), 1)
    first = shards.open_shards(out)
    monkeypatch.setattr(shards, "_read_table", None)
    again = shards.open_shards(out)
    assert again.paths.equals(first.paths) and again.read(3) == first.read(3)
    for name in shards._COLUMNS:
        assert getattr(again, name).dtype == getattr(first, name).dtype
        assert np.array_equal(getattr(again, name), getattr(first, name))
    part = again.take(np.array([7, 2]))
    assert [part.read(0), part.read(1)] == [first.read(7), first.read(2)] and part.paths[1] == first.paths[2]
    monkeypatch.undo()
    (out / "train.parquet").write_bytes((out / "train.parquet").read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="is not as it was made"):
        shards.open_shards(out)
