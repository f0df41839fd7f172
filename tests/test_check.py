"""`mopro-fast check`: every file is read once and named if it is odd, and no interruption changes the index."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from odd_images import SHARED, decode_cases, encoded, odd_images, picture
from PIL import Image

from mopro_fast import cli, files
from mopro_fast.data import check as module
from mopro_fast.data import decode, examine, mapped, parts
from mopro_fast.data.check import check, default_path, load_splits, summary
from mopro_fast.data.decode import OK, TOLERANT, UNREADABLE, VERDICTS
from mopro_fast.data.index import FILE
from mopro_fast.errors import UserError

COLUMNS = ["path", "label", "width", "height", "format", "verdict", "reason", "bytes", "mtime_ns", "crc32"]


@pytest.fixture
def odd(tmp_path):
    """A list file with every odd image and one that is missing."""
    images = odd_images()
    (tmp_path / "images").mkdir()
    for name, (data, _) in images.items():
        (tmp_path / "images" / name).write_bytes(data)
    lines = [f"images/{name} {i % 5 - 1}" for i, name in enumerate(images)] + ["images/missing.jpg 2"]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    return tmp_path / "list.txt"


@pytest.fixture
def run(capsys):
    """Run the command line in this process; -> (exit status, stdout, stderr)."""

    def run(*args):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main([str(a) for a in args])
        return stop.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture(autouse=True)
def mapped_however_few(monkeypatch):
    monkeypatch.setattr(mapped, "FEWEST", 0)


def load(data, split="train"):
    return load_splits(str(data), "auto", None)[split]


def table(path):
    return pq.read_table(path).to_pydict()


def snapshot(folder):
    """All files below the folder: name -> bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def command(*args, stop=(), **environment):
    """The command line in a process of its own, stopped as tests/stopped_command.py does; -> status and stderr."""
    program = [Path(__file__).with_name("stopped_command.py"), *stop] if stop else ["-m", "mopro_fast"]
    words = [sys.executable, *map(str, (*program, *args))]
    environment = {**os.environ, **environment}
    return subprocess.run(words, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


def test_every_file_has_its_row(odd, run):
    status, out, _ = run("check", odd, "--workers", 2)
    assert status == 0
    rows = table(f"{odd}.index.parquet")
    images = odd_images()
    assert list(rows) == COLUMNS
    assert rows["path"] == [f"images/{name}" for name in images] + ["images/missing.jpg"]
    assert rows["label"] == [i % 5 - 1 for i in range(len(images))] + [2]
    assert rows["verdict"] == [VERDICTS[verdict] for _, verdict in images.values()] + ["unreadable"]
    for i, (data, verdict) in enumerate(images.values()):
        path = odd.parent / rows["path"][i]
        assert (rows["bytes"][i], rows["mtime_ns"][i]) == (len(data), path.stat().st_mtime_ns)
        assert (rows["reason"][i] == "") == (verdict == OK)
        if verdict != UNREADABLE:
            assert decode.decode(data).shape == (rows["height"][i], rows["width"][i], 3)
    assert rows["reason"][-1] == "cannot be read: No such file or directory" and rows["bytes"][-1] == -1
    for text in (
        "4 tolerant: truncated or damaged",
        "converted: unusual JPEG: CMYK",
        "images/empty.jpg",
        "missing.jpg",
    ):
        assert text in out, out
    assert out.count("images/cut") <= module.EXAMPLES
    assert sorted(p.name for p in odd.parent.iterdir()) == [
        "images",
        "list.txt",
        "list.txt.index.arrow",
        "list.txt.index.parquet",
    ]


def test_what_check_returns(odd):
    index = load(odd)
    checked = check(index, workers=2, progress=False)
    rows = table(f"{odd}.index.parquet")
    assert checked.path == f"{odd}.index.parquet" and checked.read == len(index)
    assert [VERDICTS[v] for v in checked.verdict] == rows["verdict"] and checked.verdict.dtype == np.uint8
    for name, dtype in (("size", np.int64), ("mtime_ns", np.int64), ("width", np.int32), ("height", np.int32)):
        values = getattr(checked, name)
        assert values.dtype == dtype and values.tolist() == rows["bytes" if name == "size" else name]
    assert checked.reason.to_pylist() == rows["reason"]
    assert f"{len(index)} images: " in summary(index, checked)


def test_bytes_do_not_depend_on_the_workers(odd):
    index = load(odd)
    module._CHUNK, chunk = (5, 5), module._CHUNK
    try:
        for workers in (1, 4):
            check(index, workers=workers, progress=False, path=str(odd.parent / f"{workers}.parquet"))
    finally:
        module._CHUNK = chunk
    assert (odd.parent / "1.parquet").read_bytes() == (odd.parent / "4.parquet").read_bytes()


@pytest.mark.medium
def test_only_what_changed_is_read_again(odd):
    first = check(load(odd), workers=1, progress=False)
    content = Path(first.path).read_bytes()
    again = check(load(odd), workers=1, progress=False)
    assert again.read == 1  # the missing one: it may be there by now
    assert Path(first.path).read_bytes() == content
    # Another size at the same time.
    same_time = (odd.parent / "images/progressive.jpg").stat().st_mtime_ns
    with (odd.parent / "images/progressive.jpg").open("ab") as file:
        file.write(b"more")
    os.utime(odd.parent / "images/progressive.jpg", ns=(same_time, same_time))
    assert check(load(odd), workers=1, progress=False).read == 2
    # Another time, another content, a new file; a line is removed, a label changed.
    folder = odd.parent / "images"
    os.utime(folder / "gray.jpg", ns=(1, 1))
    (folder / "plain.jpg").write_bytes(odd_images()["cut.jpg"][0])
    (folder / "missing.jpg").write_bytes(encoded(picture()))
    lines = odd.read_text().splitlines()
    removed = lines.pop(5)
    lines[3] = f"{lines[3].split()[0]} 77"
    odd.write_text("\n".join(reversed(lines)))
    index = load(odd)
    changed = check(index, workers=1, progress=False, forget=True)
    assert changed.read == 3
    rows = table(first.path)
    assert rows["path"] == [line.split()[0] for line in reversed(lines)] and removed.split()[0] not in rows["path"]
    assert rows["label"] == index.labels.tolist() and 77 in rows["label"]
    at = rows["path"].index
    assert rows["verdict"][at("images/plain.jpg")] == "tolerant" == VERDICTS[TOLERANT]
    assert rows["verdict"][at("images/missing.jpg")] == "ok" and rows["mtime_ns"][at("images/gray.jpg")] == 1
    fresh = check(index, workers=1, progress=False, path=str(odd.parent / "fresh.parquet"))
    assert Path(fresh.path).read_bytes() == Path(first.path).read_bytes()


def test_a_check_of_a_part_keeps_the_rest(odd):
    whole = check(load(odd), workers=1, progress=False)
    lines = odd.read_text().splitlines()
    odd.write_text("\n".join(lines[:4]))
    os.utime(odd.parent / "images/plain.jpg", ns=(1, 1))
    assert check(load(odd), workers=1, progress=False).read == 1
    odd.write_text("\n".join(lines))
    assert check(load(odd), workers=1, progress=False).read == 1  # missing.jpg
    assert sorted(table(whole.path)["path"]) == sorted(line.split()[0] for line in lines)


@pytest.mark.medium
def test_killed_twice_the_index_is_the_same(tmp_path):
    folder = tmp_path / "data" / "class"
    folder.mkdir(parents=True)
    for i in range(300):
        (folder / f"{i:03}.jpg").write_bytes(encoded(picture(150, 200, seed=i), progressive=True))
    for name, (data, _) in odd_images().items():
        (folder / name).write_bytes(data)
    expected = tmp_path / "expected.parquet"
    assert command("check", folder.parent, "--index", expected, "--workers", 2).returncode == 0
    before = snapshot(tmp_path)
    for _ in range(2):  # an item is what a task of 64 files has found, or that a worker is done
        killed = command("check", folder.parent, "--workers", 2, stop=("SIGKILL", 3))
        assert killed.returncode == -signal.SIGKILL
    left = sorted((tmp_path / "data").glob(f"{FILE}.partial.*"), key=lambda part: part.stat().st_size)
    assert sum(part.read_bytes().count(b"\n") for part in left) >= 4 * 64
    with left[0].open("a") as file:
        file.write('["class/000.jpg", 1')  # as a line cut off by the end of the process
    content = left[-1].read_bytes()
    lost = content.index(b"\n")
    left[-1].write_bytes(bytes(lost) + content[lost:])  # a line as a power failure may leave it
    known = sum(part.read_bytes().count(b"\n") for part in left) - 1
    index = load(folder.parent)
    checked = check(index, workers=2, progress=False, forget=True)
    assert checked.read == len(index) - known
    assert (tmp_path / "data" / FILE).read_bytes() == expected.read_bytes()
    (tmp_path / "data" / FILE).unlink()
    Path(mapped.places(str(tmp_path / "data" / FILE))[0]).unlink()
    assert snapshot(tmp_path) == before  # nothing temporary is left


@pytest.mark.medium
def test_killed_it_leaves_no_process(tmp_path):
    (tmp_path / "class").mkdir()
    for i in range(300):
        (tmp_path / "class" / f"{i:03}.jpg").write_bytes(encoded(picture(200, 300, seed=i)))
    mark = f"mopro-fast-test-{os.getpid()}-{time.time_ns()}"

    def processes():
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if mark.encode() in (folder / "environ").read_bytes():
                    found.append(folder.name)
            except OSError:
                pass
        return found

    killed = command("check", tmp_path, "--workers", 2, stop=("SIGKILL", 2), MARK=mark)
    assert killed.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while processes() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not processes()


@pytest.mark.medium
def test_interrupted_by_ctrl_c_it_says_so(tmp_path):
    (tmp_path / "class").mkdir()
    for i in range(300):
        (tmp_path / "class" / f"{i:03}.jpg").write_bytes(encoded(picture(200, 300, seed=i)))
    ended = command("check", tmp_path, "--workers", 2, stop=("SIGINT", 2))
    assert ended.returncode == 130 and "goes on where it stopped" in ended.stderr and "Traceback" not in ended.stderr
    assert check(load(tmp_path), workers=1, progress=False).read < 300


def test_an_index_of_another_version_is_read_again(odd, capsys):
    index = load(odd)
    path = Path(check(index, workers=1, progress=False).path)
    content = path.read_bytes()
    old = pq.read_table(path).drop_columns("crc32")
    pq.write_table(old.replace_schema_metadata({parts._MARK: b"1"}), path)
    capsys.readouterr()
    assert check(index, workers=1, progress=False).read == len(index) and path.read_bytes() == content
    assert capsys.readouterr().err == f"{path} is of another version of mopro_fast: every image is read again\n"


def dying_reader(root, names, parts):
    """As examine.examine, but some files are more than the process can bear."""

    def deadly(root, paths):
        for path in paths:
            if "deadly" in path:
                os.kill(os.getpid(), signal.SIGSEGV)
            yield from decode.examine_files(root, [path])

    examine.examine_files = deadly
    yield from examine.examine(root, names, parts)


@pytest.mark.medium
def test_a_file_that_kills_its_reader_is_named(tmp_path, monkeypatch):
    (tmp_path / "class").mkdir()
    names = ["0.jpg", "1_deadly.jpg", "2_deadly.jpg", "3.jpg", "4.jpg", "5_deadly.jpg"]
    for name in names:
        (tmp_path / "class" / name).write_bytes(encoded(picture()))
    monkeypatch.setattr(module, "examine", dying_reader)
    checked = check(load(tmp_path), workers=2, progress=False)
    assert [v == UNREADABLE for v in checked.verdict] == ["deadly" in name for name in names]
    assert checked.why(1) == "cannot be read: it ends the process that tries (signal 11)"


def test_a_place_that_cannot_be_written(odd, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "open", refusing(str(odd.parent / "list.txt.index"), os.open))
    checked = check(load(odd), workers=1, progress=False)
    assert checked.path.startswith(str(tmp_path / "cache" / "mopro_fast")) and checked.path in capsys.readouterr().err
    assert check(load(odd), workers=1, progress=False).read == 1
    assert len(list((tmp_path / "cache" / "mopro_fast").iterdir())) == 2  # the table, and what is mapped


def refusing(prefix, really):
    def refuse(path, *args, **kwargs):
        if str(path).startswith(prefix):
            raise PermissionError(13, "Permission denied", str(path))
        return really(path, *args, **kwargs)

    return refuse


def test_two_at_a_time(odd):
    with parts.open_parts(default_path(load(odd))), pytest.raises(UserError, match="another check"):
        check(load(odd), workers=1, progress=False)


def test_two_trainings_that_meet_in_a_check(odd, capsys):
    """The second waits for the first, and reads what that found."""
    index = load(odd)
    with ThreadPoolExecutor() as pool:
        with parts.open_parts(default_path(index)):
            second = pool.submit(check, index, workers=1, progress=False, required=False)
            time.sleep(3 * parts._POLL)
            assert not second.done()
        found = second.result()
    assert "another process checks the same images: waiting" in capsys.readouterr().err
    assert found.read == len(index) and check(index, workers=1, progress=False).read == 1  # the one that is missing


def test_training_does_without_an_index_that_cannot_be_kept(odd, monkeypatch, capsys):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(odd.parent / "none"))
    index = load(odd)
    monkeypatch.setattr(os, "open", refusing(default_path(index), os.open))
    monkeypatch.setattr(os, "makedirs", refusing(str(odd.parent / "none"), os.makedirs))
    found = check(index, workers=1, progress=False, required=False)
    assert len(found.verdict) == found.read
    assert "cannot be written (Permission denied): the result of the check is not kept" in capsys.readouterr().err
    with pytest.raises(UserError, match="set --index to another place"):
        check(index, workers=1, progress=False)


def test_training_leaves_a_file_alone_that_lies_where_the_index_would(odd, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    index = load(odd)
    pq.write_table(pa.table({"mine": [1]}), default_path(index))
    before = Path(default_path(index)).read_bytes()
    found = check(index, workers=1, progress=False, required=False)
    assert found.path.startswith(str(tmp_path / "cache")) and Path(default_path(index)).read_bytes() == before
    with pytest.raises(UserError, match="is no index of `mopro-fast check`: remove it"):
        check(index, workers=1, progress=False)


def test_an_index_that_cannot_be_written_any_more_is_let_go(odd, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parts.pq, "write_table", full)
    found = check(load(odd), workers=1, progress=False, required=False)
    assert len(found.verdict) == found.read and not Path(default_path(load(odd))).exists()
    assert "No space left on device): the result of the check is not kept" in capsys.readouterr().err
    with pytest.raises(UserError, match="No space left on device"):
        check(load(odd), workers=1, progress=False)


def test_two_at_a_time_that_have_nothing_to_write(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (20, 10)).save(tmp_path / name / "1.png")
    found = check(load(tmp_path), workers=1, progress=False)
    with parts.open_parts(default_path(load(tmp_path))):
        again = check(load(tmp_path), workers=1, progress=False)
    assert found.read == 2 and again.read == 0 and again.width.tolist() == [20, 20]


def test_a_lock_whose_file_has_gone_is_not_held(tmp_path, monkeypatch):
    """The other process removes the file, and with it its lock, just when this one has opened it."""
    with pytest.raises(UserError, match="busy"), monkeypatch.context() as patch:
        patch.setattr(files.fcntl, "flock", lambda file, _: os.unlink(file.name))
        with files.locked(str(tmp_path / "x"), "busy"):
            pass
    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    with files.locked(str(tmp_path / "x"), "busy"):
        assert (tmp_path / "x").exists()
    assert not (tmp_path / "x").exists()


def no_locks(*_):
    raise OSError(38, "Function not implemented")


def test_splits_and_places(tmp_path, run):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "a.png").write_bytes(encoded(picture(), "PNG"))
    status, out, _ = run("check", tmp_path, "--workers", 1)
    assert status == 0 and "train: 2 images" in out and "val: 2 images" in out
    assert all((tmp_path / split / FILE).is_file() for split in ("train", "val"))
    status, out, _ = run("check", tmp_path, "--index", tmp_path / "here", "--workers", 1)
    assert (tmp_path / "here").is_file() and (tmp_path / "here.val").is_file()


def test_mistakes_end_in_one_line(tmp_path, odd, run):
    (tmp_path / "bad.txt").write_text("images/empty.jpg 0\n")
    for args, named in (
        ([tmp_path / "nowhere"], ["no such file or folder", "nowhere"]),
        ([odd, "--index", tmp_path / "no/such/folder/x"], ["no/such/folder/x", "--index"]),
        ([odd, "--workers", "-1"], ["--workers", "-1"]),
    ):
        status, out, error = run("check", *args)
        assert status == 2 and len(error.splitlines()) == 1 and all(text in error for text in named), error
    status, out, _ = run("check", tmp_path / "bad.txt", "--workers", 1)
    assert status == 1 and "empty file" in out


@pytest.mark.medium
@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared folder: set MOPRO_FAST_SHARED")
def test_all_decode_cases(tmp_path, run):
    files = decode_cases(tmp_path / "cases")
    names = [str(file.relative_to(tmp_path)) for file in files]
    (tmp_path / "list.txt").write_text("".join(f"{name} 0\n" for name in names), encoding="utf-8")
    status, out, _ = run("check", tmp_path / "list.txt", "--workers", 2)
    assert status == 0
    rows = table(tmp_path / "list.txt.index.parquet")
    assert rows["path"] == names and len(names) == 133
    assert all(
        bool(reason) == (verdict != "ok") for reason, verdict in zip(rows["reason"], rows["verdict"], strict=True)
    )
    assert "133 images: 98 as they are, 21 need converting, 7 damaged, read as far as they go, 7 cannot be read" in out
