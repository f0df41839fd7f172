"""No command writes over a user's files, into another's folder, or where another process writes."""

import json
import os
import shutil
from pathlib import Path

import every_command
import pytest
import two_writers
from every_command import FILES, FOLDERS
from fuzz_checkpoints import write_run
from processes import on_ranks

from mopro_fast import cli, distributed
from mopro_fast.checkpoints.state import all_of
from mopro_fast.checkpoints.weights import load_weights
from mopro_fast.config import RunConfig, TrainConfig
from mopro_fast.downstream import importing
from mopro_fast.downstream.export import export
from mopro_fast.errors import UserError
from mopro_fast.files import FEATURES, MARKER, locked, output, own_folder, replacing
from mopro_fast.training.run import RunFolder

HERS = {"config.json": "mine", "images.txt": "1 a/b.jpg\n", "log.jsonl": "1\n" * 99, "labels.pt": "mine"}
HERS |= {"eval.json": '{"mine": 1}', "clean.json": "[]", "manifest.json": "{}", "notes.txt": "mine"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return every_command.write_inputs(tmp_path_factory.mktemp("inputs"))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def status(capsys, *argv) -> tuple[int, list[str]]:
    """-> the exit status and the lines on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main([str(word) for word in argv])
    return ended.value.code, capsys.readouterr().err.splitlines()


# Folders.


@pytest.mark.parametrize("command", FOLDERS)
def test_a_folder_with_other_files_is_refused(command, inputs, tmp_path, capsys):
    for name, text in HERS.items():
        (tmp_path / name).write_text(text)
    for name in ("features", "checkpoints", "images", "predictions"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    before = snapshot(tmp_path)
    ended = status(capsys, *every_command.arguments(command, inputs, tmp_path))
    assert ended[0] == 2 and len(ended[1]) == 1 and "holds other files, such as" in ended[1][0]
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("command", FOLDERS)
def test_a_folder_of_another_command_is_refused_by_its_name(command, inputs, tmp_path, capsys):
    owner = "train" if command != "train" else "retrain"
    with own_folder(tmp_path, owner):
        (tmp_path / "log.jsonl").touch()
    before = snapshot(tmp_path)
    ended = status(capsys, *every_command.arguments(command, inputs, tmp_path))
    assert ended[0] == 2 and len(ended[1]) == 1 and f"belongs to `mopro-fast {owner}`" in ended[1][0]
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("command", FOLDERS)
def test_a_folder_that_another_process_writes_into_is_refused(command, inputs, tmp_path, capsys):
    with own_folder(tmp_path / "out", command):
        ended = status(capsys, *every_command.arguments(command, inputs, tmp_path / "out"))
    assert ended[0] == 2 and len(ended[1]) == 1 and "another process writes into" in ended[1][0]
    assert not (tmp_path / "out").exists()  # nothing was written


def test_a_folder_that_stays_empty_goes_again(tmp_path):
    with own_folder(tmp_path / "a/made", "eval"):
        assert json.loads((tmp_path / "a/made" / MARKER).read_text()) == {"command": "eval"}
    assert not (tmp_path / "a/made").exists()
    (tmp_path / "given").mkdir()
    with own_folder(tmp_path / "given", "eval"):
        pass
    assert list((tmp_path / "given").iterdir()) == []


def test_a_killed_process_leaves_a_folder_of_its_command(tmp_path):
    (tmp_path / MARKER).touch()  # killed at once
    (tmp_path / ".lock").touch()  # and so was an earlier version
    with own_folder(tmp_path, "eval"):
        (tmp_path / "x").touch()
    with own_folder(tmp_path, "eval"):
        pass
    with pytest.raises(UserError, match="belongs to `mopro-fast eval`"), own_folder(tmp_path, "probe"):
        pass


def test_a_users_file_of_the_mark_s_name_stays(tmp_path):
    (tmp_path / MARKER).write_text("mine")
    with pytest.raises(UserError, match=rf"holds other files, such as \{MARKER}"), own_folder(tmp_path, "eval"):
        pass
    assert (tmp_path / MARKER).read_text() == "mine"
    (tmp_path / "file").write_text("")
    (tmp_path / MARKER).unlink()
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / MARKER).symlink_to("../file")
    with pytest.raises(UserError, match="cannot write into"), own_folder(tmp_path / "link", "eval"):
        pass
    assert (tmp_path / "file").read_text() == ""


def test_what_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    for name, why in (("file", "is a file"), ("dangling", "is a link to nothing"), ("file/x", "Not a directory")):
        with pytest.raises(UserError, match=why), own_folder(tmp_path / name, "eval"):
            pass


def test_features_are_kept_by_several_at_a_time_and_by_no_other(tmp_path):
    folder = tmp_path / "features"
    with own_folder(folder, FEATURES), own_folder(folder, FEATURES):
        (folder / "x").touch()
    with pytest.raises(UserError, match="is where features are kept"), own_folder(folder, "train"):
        pass
    with own_folder(tmp_path / "out", "eval"):
        (tmp_path / "out/x").touch()
    with pytest.raises(UserError, match="belongs to `mopro-fast eval`"), own_folder(tmp_path / "out", FEATURES):
        pass


def test_without_locks_all_goes_on(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("mopro_fast.files.fcntl.flock", none)
    with own_folder(tmp_path / "out", "eval"), output(tmp_path / "out/x") as path, replacing(path) as file:
        file.write(b"x")
    assert (tmp_path / "out/x").read_bytes() == b"x"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [MARKER, "x"]


def _refused_on_ranks(rank: int, _ranks: int, out: Path) -> None:
    refused = distributed.on_rank0(lambda: own_folder(out, "eval"))
    with pytest.raises(UserError if rank == 0 else SystemExit) as ended, refused:
        pass
    assert rank == 0 or ended.value.code == 2


@pytest.mark.ranks
@pytest.mark.medium
def test_all_ranks_end_where_rank_0_refuses(tmp_path):
    (tmp_path / "mine").touch()
    on_ranks(2, _refused_on_ranks, tmp_path)


@pytest.mark.parametrize(
    ("command", "there"),
    [
        ("train", {"config.json": '{"data": {}, "optim": {}, "run": {}, "mopro": {}}', "log.jsonl": ""}),
        ("retrain", {"config.json": '{"data": {}, "optim": {}, "run": {}, "cleaned": "x"}', "log.jsonl": ""}),
        ("finetune", {"config.json": '{"data": {}, "optim": {}, "run": {}, "share": 1}', "log.jsonl": ""}),
        ("train", {"checkpoints/step_000000003.pt": ""}),
        ("clean", {"clean.json": '{"settings": {"threshold": 1, "weights": "", "data": ""}}'}),
        ("eval", {"eval.json": '{"checkpoint": "c", "sets": {}}'}),
        ("eval", {"predictions/val-0123456789abcdef.parts/x.npz": ""}),
        ("lowshot", {"lowshot.json": '{"checkpoint": "c", "k": {}}', "features/x": ""}),
        ("lowshot", {"features/drawn-0123456789abcdef.npy": ""}),
        ("probe", {"probe.json": '{"checkpoint": "c", "lambdas": {}}'}),
        ("probe", {".probe-0123456789abcdef.0.jsonl": ""}),
        ("pack", {"manifest.json": '{"format": "mopro_fast pack"}'}),
        ("pack", {".packing.json": ""}),
        ("demo", {"images/truth.csv": "path,given,true\n"}),
    ],
    ids=range(14),
)
def test_folders_of_earlier_versions_are_known(command, there, tmp_path):
    from mopro_fast import demo
    from mopro_fast.data import pack
    from mopro_fast.downstream import clean, features
    from mopro_fast.training import run

    for name, text in there.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)
    known = {"clean": clean._made_by, "pack": pack._made_by, "demo": demo.made_by}
    if command in ("train", "retrain", "finetune"):
        known[command] = lambda folder: run._made_by(folder, command)
    old = known.get(command, lambda folder: features._made_by(folder, command))
    with own_folder(tmp_path, command, old):
        pass
    with pytest.raises(UserError, match=f"belongs to `mopro-fast {command}`"), own_folder(tmp_path, "other"):
        pass


def test_a_pack_never_lies_among_the_images_it_is_made_of(inputs, tmp_path, capsys):
    shutil.copytree(inputs / "data/train", tmp_path / "data")
    (tmp_path / "link").symlink_to("data")
    before = snapshot(tmp_path / "data")
    for out in ("data", "data/n01", "link", "data/../link/n01", "data/n01/new", "link/n02/new"):
        ended = status(capsys, "pack", tmp_path / "data", tmp_path / out, "--workers", 1)
        assert ended[0] == 2 and len(ended[1]) == 1, out
        ended = status(capsys, "pack", inputs / "data/val", tmp_path / out, "--val", tmp_path / "data")
        assert ended[0] == 2 and len(ended[1]) == 1, out
    assert snapshot(tmp_path / "data") == before


# Files.


@pytest.mark.parametrize("command", FILES)
def test_a_file_that_exists_is_refused(command, inputs, tmp_path, capsys):
    (tmp_path / "mine").write_text('{"mine": 1}')
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("mine")
    (tmp_path / "dangling").symlink_to("nowhere")
    os.link(tmp_path / "mine", tmp_path / "hard")
    os.mkfifo(tmp_path / "fifo")
    before = sorted(p.name for p in tmp_path.iterdir())
    for name in ("mine", "link", "hard", "folder", "dangling", "fifo", "folder/../mine"):
        ended = status(capsys, *every_command.arguments(command, inputs, tmp_path / name))
        assert ended[0] == 2 and len(ended[1]) == 1 and name in ended[1][0], ended
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert (tmp_path / "mine").read_text() == '{"mine": 1}' and (tmp_path / "dangling").is_symlink()


@pytest.mark.parametrize("command", [name for name in FILES if name not in ("check", "bench")])
def test_an_output_is_never_the_input(command, inputs, capsys, tmp_path):
    (tmp_path / "link.pt").symlink_to(inputs / "c.pt")
    os.link(inputs / "c.pt", tmp_path / "hard.pt")
    before = snapshot(inputs)
    for out in (inputs / "c.pt", inputs / "data/../c.pt", tmp_path / "link.pt", tmp_path / "hard.pt"):
        ended = status(capsys, *every_command.arguments(command, inputs, out))
        assert ended[0] == 2 and len(ended[1]) == 1 and "exists already" in ended[1][0]
    assert snapshot(inputs) == before


@pytest.mark.parametrize("command", [name for name in FILES if name != "check"])
def test_a_file_that_another_process_writes_is_refused(command, inputs, tmp_path, capsys):
    with output(tmp_path / "out"):
        ended = status(capsys, *every_command.arguments(command, inputs, tmp_path / "out"))
    assert ended[0] == 2 and len(ended[1]) == 1 and "another process writes" in ended[1][0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["report", "check"])
def test_a_command_renews_its_own_product(command, inputs, tmp_path, capsys):
    argv = every_command.arguments(command, inputs, tmp_path / "out")
    assert status(capsys, *argv)[0] == 0
    before = (tmp_path / "out").read_bytes()
    assert status(capsys, *argv)[0] == 0
    assert (tmp_path / "out").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_a_benchmark_goes_over_its_unfinished_numbers_alone(inputs, tmp_path, capsys):
    argv = every_command.arguments("bench", inputs, tmp_path / "out")
    assert status(capsys, *argv)[0] == 0
    found = json.loads((tmp_path / "out").read_text())
    code, error = status(capsys, *argv)
    assert found["finished"] and code == 2 and "exists already" in error[-1]
    (tmp_path / "out").write_text(json.dumps(found | {"finished": False}))  # cut short
    assert status(capsys, *argv)[0] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_page_behind_a_link_is_renewed_where_it_is(inputs, tmp_path, capsys):
    assert status(capsys, *every_command.arguments("report", inputs, tmp_path / "page.html"))[0] == 0
    page = (tmp_path / "page.html").read_bytes()
    (tmp_path / "page.html").write_bytes(page.replace(b'<meta name="generator" content="mopro_fast report">\n', b""))
    (tmp_path / "link.html").symlink_to("page.html")  # of an earlier version
    assert status(capsys, *every_command.arguments("report", inputs, tmp_path / "link.html"))[0] == 0
    assert (tmp_path / "link.html").is_symlink() and (tmp_path / "page.html").read_bytes() == page


def test_a_check_s_files_are_its_own(inputs, tmp_path, capsys):
    argv = every_command.arguments("check", inputs, tmp_path / "i")
    (tmp_path / "i.partial").write_text("mine")
    ended = status(capsys, *argv)
    assert ended[0] == 2 and "no unfinished check" in ended[1][0] and (tmp_path / "i.partial").read_text() == "mine"
    (tmp_path / "i.partial").unlink()
    (tmp_path / "i.val").write_text("mine")  # the second split's, known before the first is read
    ended = status(capsys, *argv[:1], inputs / "data", *argv[2:])
    assert ended[0] == 2 and len(ended[1]) == 1 and "i.val is no index" in ended[1][0]
    assert [p.name for p in tmp_path.iterdir()] == ["i.val"]


def test_a_file_that_comes_meanwhile_stays(tmp_path):
    with pytest.raises(UserError, match="exists already"), replacing(tmp_path / "x", new=True) as file:
        file.write(b"ours")
        (tmp_path / "x").write_text("mine")
    assert (tmp_path / "x").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_a_second_writer_leaves_the_first_one_s_file_alone(tmp_path):
    with replacing(tmp_path / "x") as file:
        file.write(b"first")
        with pytest.raises(UserError, match="another process writes"), replacing(tmp_path / "x") as second:
            second.write(b"second")
    assert (tmp_path / "x").read_bytes() == b"first" and len(list(tmp_path.iterdir())) == 1


def test_a_lock_whose_file_another_process_removed_is_taken_anew(tmp_path, monkeypatch):
    flock, calls = __import__("fcntl").flock, []

    def removed_once(file, how):
        flock(file, how)
        if not calls:
            os.unlink(file.name)
        calls.append(how)

    monkeypatch.setattr("mopro_fast.files.fcntl.flock", removed_once)
    with locked(str(tmp_path / "x"), "busy"):
        assert (tmp_path / "x").exists() and len(calls) == 2


# Two processes.


@pytest.mark.ranks
@pytest.mark.medium
@pytest.mark.parametrize("command", ["clean", "pack", "export", "train"])
def test_of_two_at_once_one_works(command, inputs, tmp_path):
    assert two_writers.outcome(command, inputs, tmp_path) in ("refused", "in turn")


def test_import_writes_its_own_file_anew_and_no_others(tmp_path):
    trained = write_run(tmp_path)
    newest = str(all_of(trained / "checkpoints")[-1])
    export(load_weights(newest), tmp_path / "official.pt", "official")
    for source in ("official.pt", newest):
        assert importing.main([str(tmp_path / source), str(tmp_path / "out.pt")]) == 0
    before = Path(newest).read_bytes()
    shutil.copy(newest, tmp_path / "kept.pt")
    for source, out in (
        ("out.pt", "out.pt"),
        ("out.pt", "official.pt"),
        ("out.pt", "kept.pt"),
        ("out.pt", trained / "checkpoints/step_000000999.pt"),
    ):
        with pytest.raises(UserError, match=r"exists already|would lie among the checkpoints of a run"):
            importing.main([str(tmp_path / source), str(tmp_path / out)])
    assert Path(newest).read_bytes() == before == (tmp_path / "kept.pt").read_bytes()


def test_the_mark_alone_makes_no_run(tmp_path):
    """As `rm -rf RUN/*` leaves it, then used for other things."""
    out = tmp_path / "run"
    out.mkdir()
    (out / MARKER).write_text('{"command": "train"}\n')
    (out / "labels.pt").write_text("mine")
    with pytest.raises(UserError, match=r"holds other files, such as labels\.pt"):
        RunFolder(TrainConfig(run=RunConfig(out=str(out))))
    assert (out / "labels.pt").read_text() == "mine"
