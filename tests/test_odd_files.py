"""Files that are none, that never end, or that nobody may read: named, not waited for, not read whole."""

import contextlib
import os
import signal
import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet  # noqa: F401 - now, for later another user may have to read it
import pytest
from odd_images import encoded, picture

from mopro_fast import config
from mopro_fast.checkpoints import state
from mopro_fast.checkpoints.weights import load_weights
from mopro_fast.data import check as module
from mopro_fast.data.cache import decoded
from mopro_fast.data.check import check, default_path, load_splits, summary
from mopro_fast.data.decode import UNREADABLE, crash_reason
from mopro_fast.data.index import read_class_names, recognise
from mopro_fast.data.lists import read_list
from mopro_fast.data.paths import Paths
from mopro_fast.data.reader import Reader
from mopro_fast.data.shards import ShardJob, is_pack, read_manifest, read_record, write_shard
from mopro_fast.data.workers import Crashed
from mopro_fast.downstream import image_map
from mopro_fast.downstream.done import Done
from mopro_fast.downstream.retrain import with_cleaned_labels
from mopro_fast.errors import UserError
from mopro_fast.files import json_object, open_regular, read_regular
from mopro_fast.report.images import read_table
from mopro_fast.report.page import is_page
from mopro_fast.report.run import Run

MOST = 1 << 20


def odd(kind: str, folder: Path, suffix: str = ".jpg") -> Path:
    """Something in the folder that is no file to read."""
    path = folder / f"{kind}{suffix}"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(path))
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "nothing":
        path.symlink_to("nowhere")
    elif kind == "huge":
        path.touch()
        os.truncate(path, 8 << 30)
    return path


WHY = {
    "pipe": "not a regular file but a pipe",
    "socket": "not a regular file but a socket",
    "folder": "not a regular file but a folder",
    "device": "not a regular file but a device",
    "loop": "Too many levels of symbolic links",
    "nothing": "No such file or directory",
    "huge": "8589934592 bytes, at most 1048576 are read",
}


@pytest.mark.parametrize("kind", WHY)
def test_what_cannot_be_read_is_said_at_once(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = odd(kind, tmp_path)
    with pytest.raises(OSError) as error:
        read_regular(path, MOST)
    assert (error.value.strerror, error.value.filename) == (WHY[kind], str(path))


@pytest.mark.parametrize("size", [0, 1, 4096, MOST])
def test_a_regular_file_is_read_whole(tmp_path, size):
    path = tmp_path / "a"
    path.write_bytes(os.urandom(size))
    data, status = read_regular(path, MOST)
    assert data == path.read_bytes()
    assert (status.st_size, status.st_mtime_ns) == (size, path.stat().st_mtime_ns)
    with open_regular(path) as file:
        assert file.read() == data


@pytest.mark.parametrize("most, read", [(MOST, 3000), (2999, None)], ids=["to_its_end", "not_beyond_most"])
def test_a_file_that_grows_while_it_is_read(tmp_path, monkeypatch, most, read):
    path = tmp_path / "a"
    path.write_bytes(bytes(1000))
    once = os.fstat

    def grown(number):
        status = once(number)
        path.write_bytes(bytes(3000))
        return status

    monkeypatch.setattr(os, "fstat", grown)
    if read is None:
        with pytest.raises(OSError, match="3000 bytes, at most 2999 are read"):
            read_regular(path, most)
    else:
        assert len(read_regular(path, most)[0]) == read


def test_a_file_that_says_nothing_of_its_size():
    assert read_regular("/proc/self/status", MOST)[0].startswith(b"Name:")


def test_no_handle_is_left_open(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for kind in WHY:
        with pytest.raises(OSError):
            read_regular(odd(kind, tmp_path), MOST)
    assert len(os.listdir("/proc/self/fd")) == before


def reasons(most: int = 1 << 29) -> dict[str, str]:
    return {kind: why.replace(str(MOST), str(most)) for kind, why in WHY.items()}


@pytest.fixture
def listed(tmp_path, monkeypatch):
    """A list of a good image and of all that is none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.jpg").write_bytes(encoded(picture()))
    names = ["good.jpg", *(odd(kind, tmp_path).name for kind in WHY)]
    (tmp_path / "list.txt").write_text("".join(f"{name} 0\n" for name in names))
    return load_splits(str(tmp_path / "list.txt"), "auto", None)["train"]


def test_a_check_leaves_them_out_by_name(listed):
    checked = check(listed, workers=1, progress=False)
    assert checked.reason.to_pylist() == ["", *(f"cannot be read: {why}" for why in reasons().values())]
    assert (checked.verdict == UNREADABLE).tolist() == [False] + [True] * len(WHY)
    (Path(listed.root) / "pipe.jpg").unlink()
    (Path(listed.root) / "pipe.jpg").write_bytes(encoded(picture()))
    assert check(listed, workers=1, progress=False).why(1) == ""


def test_slow_storage_does_not_hold_up_a_training(listed, monkeypatch, capsys):
    """Files that it has no time to compare are taken as they were checked; `mopro-fast check` takes the time."""
    before = check(listed, workers=1, progress=False)
    Path(listed.full_path(0)).write_bytes(b"another")
    monkeypatch.setattr(module, "_BUDGET", 0.0)
    found = check(listed, workers=1, progress=False, required=False)
    assert found.size.tolist() == before.size.tolist()
    assert "0 of 8 files are compared with the last check, others not for lack of time" in capsys.readouterr().err
    monkeypatch.setattr(module, "stats", None)
    assert check(listed, workers=1, progress=False, required=False, trust=True).size.tolist() == before.size.tolist()
    monkeypatch.undo()
    assert check(listed, workers=1, progress=False).size[0] == len(b"another")


def test_the_summary_names_them(listed):
    assert "pipe.jpg: not a regular file but a pipe" in summary(listed, check(listed, workers=1, progress=False))


def test_the_loaders_do_without_them(listed):
    reader = Reader(listed, 2)
    read = reader.start(listed.ids, None)()
    reader.close()
    assert read.rows.tolist() == [0] and {row: reason for row, _, reason in read.lost} == {
        row: why for row, why in enumerate(reasons().values(), 1)
    }
    first, *others = decoded(listed, listed.ids, 2, show=False)  # of --cache device and the report
    assert first.shape == picture().shape and others == list(reasons().values())


def test_a_pack_leaves_them_out(listed, tmp_path):
    (tmp_path / "out" / "records").mkdir(parents=True)
    job = ShardJob(
        listed.root, str(tmp_path / "out"), "train-000000", listed.ids, listed.labels, listed.paths, 256, 90, {}
    )
    assert [images for images, *_ in write_shard(job)] == [1] * len(listed)
    found = check_record(tmp_path / "out")
    assert found == [f"cannot be read: {why}" for why in reasons().values()]


def check_record(out: Path) -> list[str]:
    return [reason for *_, reason in read_record(str(out), "train-000000")["skipped"]]


def test_a_pack_tries_again_what_did_not_answer(tmp_path):
    (tmp_path / "good.jpg").write_bytes(encoded(picture()))
    (tmp_path / "out" / "records").mkdir(parents=True)
    ids, labels = np.array([0]), np.array([0])
    job = ShardJob(str(tmp_path), str(tmp_path / "out"), "train-000000", ids, labels, Paths(["good.jpg"]), 256, 90, {})
    list(write_shard(job._replace(crashed={0: crash_reason(Crashed(-signal.SIGALRM))})))
    assert check_record(tmp_path / "out") == ["cannot be read: no answer for 120 s"]
    list(write_shard(job))
    assert check_record(tmp_path / "out") == []
    assert [read for _, read, _ in write_shard(job)] == [None]


def test_in_class_folders_they_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/a").mkdir(parents=True)
    (tmp_path / "data/a/good.jpg").write_bytes(encoded(picture()))
    for kind in WHY:
        odd(kind, tmp_path / "data/a")
    odd("pipe", tmp_path / "data/a", "")
    (tmp_path / "data/b").symlink_to(".")  # walked for ever by who follows it
    with pytest.raises(UserError, match="b holds folders, not images"):
        load_splits("data", "auto", None)
    (tmp_path / "data/b").unlink()
    index = load_splits("data", "auto", None)["train"]
    assert sorted(index.paths) == sorted(f"a/{name}.jpg" for name in ("good", "device", "huge", "loop", "nothing"))
    said = capsys.readouterr().err
    assert "entries that are no files: 3, such as a/pipe" in said and "folders inside class folders: 1" in said
    odd("loop", tmp_path / "data", "")
    with pytest.raises(UserError, match="data/loop: Too many levels of symbolic links: make it readable, or remove it"):
        load_splits("data", "auto", None)


def cleaned(path: Path) -> None:
    with_cleaned_labels(SimpleNamespace(cleaned=str(path), pathlist=""), None)


def run_with(name: str):
    """The function that reads this file of a run."""

    def read(path: Path) -> None:
        folder = path.parent / "run"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / name).symlink_to(path)
        run = Run(folder)
        entries = {
            "log.jsonl": lambda: run.log,
            "labels.pt": lambda: run.labels,
            "left_out.csv": lambda: run.listed(name),
        }
        assert not entries[name]()
        raise UserError(" ".join(run.missing.values()) + name)

    return read


def manifest(path: Path) -> None:
    (path.parent / "manifest.json").symlink_to(path)
    assert not is_pack(path.parent) and json_object(path) == {} and is_page(path) is False
    try:
        read_manifest(path.parent)
    except UserError as error:
        raise UserError(f"{error} {path}") from None


INPUTS = {
    "list": (lambda path: read_list(str(path), lambda _: True), ".txt"),
    "classes": (lambda path: read_class_names(str(path)), ".txt"),
    "config": (config.read, ".json"),
    "checkpoint": (state.read, ".pt"),
    "weights": (load_weights, ".safetensors"),
    "cleaned_json": (cleaned, ".json"),
    "cleaned_table": (cleaned, ".parquet"),
    "table": (read_table, ".parquet"),
    "manifest": (manifest, ".json"),
    "log": (run_with("log.jsonl"), ""),
    "labels": (run_with("labels.pt"), ""),
    "left_out": (run_with("left_out.csv"), ""),
}


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "loop", "nothing", "huge"])
@pytest.mark.parametrize("reader, suffix", INPUTS.values(), ids=INPUTS)
def test_as_another_input_it_is_one_line(tmp_path, monkeypatch, reader, suffix, kind):
    monkeypatch.chdir(tmp_path)
    path = odd(kind, tmp_path, suffix)
    with pytest.raises(UserError) as error:
        reader(path)
    assert "\n" not in str(error.value) and (path.name in str(error.value) or reader.__name__ == "read")


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "loop"])
def test_as_data_it_is_one_line(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = odd(kind, tmp_path)
    with pytest.raises(UserError, match=path.name):
        load_splits(str(path), "auto", None)


def test_a_damaged_index_of_the_data_is_made_anew(listed):
    os.mkfifo(default_path(listed))
    with pytest.raises(UserError, match="is no file: remove it, or set --index"):
        check(listed, workers=1, progress=False)


def test_finished_work_that_cannot_be_read_is_done_again(tmp_path):
    done = Done(tmp_path, "probe", {})
    done.add("a", 1)
    done.add("b", [2])
    (own,) = tmp_path.glob(".probe-*")
    with own.open("ab") as file:
        file.write(b'\n\xff\n5\n["c"')
    os.mkfifo(tmp_path / own.name.replace(".0.", ".1."))
    assert Done(tmp_path, "probe", {}).results == {"a": 1, "b": [2]}


@pytest.mark.parametrize("damage", ["shape", "cut", "pipe", "text"])
def test_features_that_cannot_be_read_are_named(tmp_path, listed, damage):
    path = tmp_path / "train-0.npy"
    np.save(path, np.zeros((len(listed), 3 if damage == "shape" else 4), np.float32))
    if damage == "cut":
        os.truncate(path, 140)
    if damage == "text":
        path.write_text("no numbers\n")
    parts = tmp_path / "train-0.parts"
    if damage == "pipe":
        path.unlink()
        parts.mkdir()
        os.mkfifo(parts / "0.npz")
    with pytest.raises(UserError, match=rf"cannot read {parts if damage == 'pipe' else path}.* remove it"):
        image_map.compute(listed, path, None, 4, {"batch_size": 2})


@contextlib.contextmanager
def of_another_user(folder: Path):
    """The folder, meanwhile, may not be read."""
    user = os.geteuid()
    folder.chmod(0)
    try:
        if user == 0:
            os.seteuid(65534)
        yield
    finally:
        os.seteuid(user)
        folder.chmod(0o700)


def test_what_another_user_keeps_is_named(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.jpg").write_bytes(encoded(picture()))
    names = ["x.txt", "x.pt", "x.safetensors", "x.json", "x.parquet"]
    with of_another_user(tmp_path):
        for reader, name in [
            (lambda path: load_splits(str(path), "auto", None), "x.txt"),
            (lambda path: load_splits(str(path), "auto", None), "a"),
            *((load_weights, name) for name in names),
            (state.read, "x.pt"),
            (config.read, "x.json"),
            (read_table, "x.parquet"),
            (cleaned, "x.json"),
            (lambda path: recognise(str(path)), "a"),
        ]:
            with pytest.raises(UserError, match=name):
                reader(tmp_path / name)
