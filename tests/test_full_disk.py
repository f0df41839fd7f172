"""A full or failing disk is one line and costs nothing that was saved before: the same command then goes on.

full_disk.py makes it fail. MOPRO_FAST_FUZZ=3 tries every kind of file that a command writes, at its first, its last and
one operation between; otherwise a few are drawn.
"""

import contextlib
import errno
import io
import json
import os
import random
import re
import shutil
import sys
from pathlib import Path

import every_command
import full_disk
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from full_disk import FLUSH, ROOM, Disk, Ended, Fault
from torch.utils._pytree import tree_map
from two_writers import contents

from mopro_fast import cli, files
from mopro_fast.checkpoints import state as checkpoints
from mopro_fast.errors import CannotWrite
from mopro_fast.files import append, replacing

if sys.platform != "linux":
    pytest.skip("LD_PRELOAD is Linux's", allow_module_level=True)
if full_disk.COMPILER is None:
    pytest.skip("no C compiler: set CC", allow_module_level=True)

EACH = int(os.environ.get("MOPRO_FAST_FUZZ", 0))  # operations of each kind of file
DRAWN = 2  # faults per command otherwise
KINDS = {ROOM: [(errno.ENOSPC, False), (errno.ENOSPC, True)], FLUSH: [(errno.EIO, False)]}
MORE = {"train": "--epochs 2 --checkpoint-every 2 --keep 2"}


@pytest.fixture(scope="module")
def disk(compiled, tmp_path_factory):
    disk = Disk(compiled, tmp_path_factory.mktemp("disk"))
    yield disk
    disk.close()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return every_command.write_inputs(tmp_path_factory.mktemp("inputs"))


class Case:
    """A command in a folder of its own; :meth:`run` begins anew, or goes on."""

    def __init__(self, disk: Disk, command: str, inputs: Path, work: Path) -> None:
        self.disk, self.inputs, self.work, self.out = disk, inputs, work, work / "out"
        shutil.copytree(inputs, work / "inputs")
        self.argv = every_command.arguments(command, work / "inputs", self.out) + MORE.get(command, "").split()

    def anew(self) -> None:
        shutil.rmtree(self.work)
        shutil.copytree(self.inputs, self.work / "inputs")

    def run(self, fault: Fault | None = None) -> Ended:
        return self.disk.run(self.argv, self.work, fault)

    def place(self, path: str) -> str:
        """The kind of file: its path without numbers and digests."""
        return re.sub(r"\b[0-9a-f]{16}\b|\d+", "#", path.removeprefix(str(self.work)).removesuffix(" (deleted)"))


def faults(case: Case, ended: Ended, drawn: random.Random) -> list[Fault]:
    by_place: dict[tuple[int, str], list[int]] = {}
    for kind in KINDS:
        for number, path in enumerate(path for k, path in ended.operations if k == kind):
            by_place.setdefault((kind, case.place(path)), []).append(number)
    found = []
    for (kind, _), numbers in by_place.items():
        if EACH:
            chosen = {numbers[round(i * (len(numbers) - 1) / max(1, EACH - 1))] for i in range(EACH)}
        else:
            chosen = {drawn.choice(numbers)}
        found += [Fault(kind, at, *how) for at in sorted(chosen) for how in KINDS[kind]]
    return found if EACH else drawn.sample(found, DRAWN)


def require_whole(folder: Path) -> None:
    """Every file that has its name is complete; none is left that has not."""
    for path in (p for p in folder.rglob("*") if p.is_file()):
        assert not re.search(r"\.(tmp|lock)$", path.name), path
        if path.name == ".mopro_fast" or path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.suffix == ".jsonl":
            assert all(map(json.loads, filter(None, path.read_text().split("\n")))), path
        elif path.suffix == ".pt" and path.parent.name == "checkpoints":
            checkpoints.load(path)
        elif path.suffix == ".npy":
            np.load(path)
        elif path.suffix == ".parquet":
            pq.read_table(path)
        elif path.suffix == ".partial":
            assert path.stat().st_size, path


def check(case: Case, fault: Fault, given: dict[str, bytes], expected: dict[str, bytes], same_bytes: bool) -> None:
    """given: the inputs. expected: the result without a fault."""
    ended = case.run(fault)
    assert "Traceback" not in ended.text and "Exception ignored" not in ended.text, ended.text
    if ended.status == 0:  # it had all that it needed
        assert ended.errors() == []
    else:
        assert ended.status == 2 and len(ended.errors()) == 1, (ended.status, ended.text)
        assert os.strerror(fault.code) in ended.errors()[0] and str(case.work) in ended.errors()[0]
        assert ("make room" if fault.code == errno.ENOSPC else "repaired") in ended.errors()[0]
    require_whole(case.work)
    now = contents(case.work / "inputs")
    assert {name: now[name] for name in given} == given
    if ended.status:
        again = case.run()
        assert again.status == 0, again.text
    found = contents(case.out)
    assert set(map(case.place, found)) == set(map(case.place, expected))
    for name in found.keys() & expected.keys() if same_bytes else ():
        assert found[name] == expected[name] or (name.endswith(".pt") and values(found[name]) == values(expected[name]))


def values(checkpoint: bytes) -> str:
    """What it holds: which of its tensors share memory depends on whether the run was interrupted."""
    found = torch.load(io.BytesIO(checkpoint), weights_only=True)
    return repr(tree_map(lambda x: x.tolist() if isinstance(x, torch.Tensor) else x, found))


@pytest.mark.parametrize(
    "command",
    [pytest.param(name, marks=pytest.mark.medium) for name in ("train", "eval", "check", "pack", "report", "export")]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("retrain", "finetune", "clean", "lowshot", "probe")]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("import", "bench", "demo")],
)
def test_every_place_that_writes(command, disk, inputs, tmp_path):
    case = Case(disk, command, inputs, tmp_path / "work")
    plain = case.run()
    assert plain.status == 0, plain.text
    expected, given = contents(case.out), contents(inputs)
    for fault in faults(case, plain, random.Random(command)):
        case.anew()
        try:
            check(case, fault, given, expected, command != "bench")
        except AssertionError as error:
            of_kind = [path for kind, path in plain.operations if kind == fault.kind]
            raise AssertionError(f"{fault} at {of_kind[fault.at]}") from error


@pytest.mark.medium
@pytest.mark.parametrize("command", ["report", "check"])
def test_a_product_that_cannot_be_renewed_stays(command, disk, inputs, tmp_path):
    case = Case(disk, command, inputs, tmp_path / "work")
    assert case.run().status == 0
    before = case.out.read_bytes()
    shutil.copy(case.work / "inputs/data/val/n01/0.png", case.work / "inputs/data/train/n01/new.png")
    for fault in (Fault(ROOM, 0), Fault(ROOM, 2), Fault(FLUSH, 0, errno.EIO)):
        ended = case.run(fault)
        assert ended.status == 2 and len(ended.errors()) == 1, ended.text
        assert case.out.read_bytes() == before
        require_whole(case.work)


@pytest.mark.medium
def test_a_training_goes_on_without_tensorboard(disk, inputs, tmp_path):
    case = Case(disk, "train", inputs, tmp_path / "work")
    case.argv += ["--tensorboard", "True"]
    folder = case.out / "tensorboard"
    plain = disk.run(case.argv, folder)
    expected = (case.out / "log.jsonl").read_bytes()
    assert plain.status == 0 and len(plain.operations) > 4
    for at in (0, 1, sum(kind == ROOM for kind, _ in plain.operations) // 2):
        case.anew()
        ended = disk.run(case.argv, folder, Fault(ROOM, at))
        assert ended.status == 0 and ended.errors() == [], ended.text
        said = [line for line in ended.text.splitlines() if "No space left on device" in line]
        assert len(said) == 1 and said[0].endswith("the run goes on without it"), ended.text
        assert (case.out / "log.jsonl").read_bytes() == expected


def test_a_line_is_written_whole_or_not_at_all(tmp_path):
    class Full(io.FileIO):
        def write(self, data):
            if len(data) < 4:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data[: len(data) // 2])

    with Full(tmp_path / "x", "ab") as file:
        with pytest.raises(CannotWrite, match=r"/x: No space left on device: make room"):
            append(file, b"a long line\n")
        assert (tmp_path / "x").read_bytes() == b""
    with open(tmp_path / "x", "ab", buffering=0) as file:
        append(file, b"another\n")
    assert (tmp_path / "x").read_bytes() == b"another\n"


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EIO", "EFBIG"])
def test_whatever_a_library_says_the_reason_is_the_disk_s(code, tmp_path, monkeypatch):
    def write(self, _):
        self.failed = OSError(getattr(errno, code), os.strerror(getattr(errno, code)))
        raise self.failed

    (tmp_path / "x").write_text("before")
    monkeypatch.setattr(files._File, "write", write)
    for hidden in (False, True):
        with (
            pytest.raises(CannotWrite, match=f"/x: {os.strerror(getattr(errno, code))}: "),
            replacing(tmp_path / "x") as file,
        ):
            with contextlib.suppress(OSError):
                file.write(bytes(1 << 20))
            if hidden:
                raise RuntimeError("unexpected pos 704 vs 598")
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_text() == "before"


def test_another_file_s_fault_is_not_the_written_one_s(tmp_path):
    with pytest.raises(FileNotFoundError, match="other"), replacing(tmp_path / "x"):
        (tmp_path / "other").read_bytes()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device", "/cache/kernel"), ValueError("x")])
def test_what_nobody_expects(error, monkeypatch, capsys):
    """PyTorch and Triton write caches of their own."""

    def fails(_):
        raise error

    monkeypatch.setattr(cli, "_run", fails)
    with pytest.raises(SystemExit if isinstance(error, OSError) else ValueError):
        cli.main(["train"])
    said = capsys.readouterr().err
    assert isinstance(error, ValueError) or said == (
        "mopro-fast: error: /cache/kernel: No space left on device: make room there, then run the same command again\n"
    )
