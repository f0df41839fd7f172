"""What rank 0 computes reaches every rank; large arrays lie once on each machine."""

import os
import tempfile
from pathlib import Path

import killed_run
import numpy as np
import pyarrow as pa
import pytest
import torch.distributed as dist
from odd_images import encoded, picture
from processes import on_ranks

from mopro_fast import sharing
from mopro_fast.distributed import by_rank0
from mopro_fast.errors import UserError
from mopro_fast.training.loop import Trainer
from mopro_fast.training.tasks import task_of

MACHINE_OF = (0, 0, 1, 1)  # by rank


def value() -> dict:
    names = pa.array([b"name %d" % i for i in range(20_000)], pa.large_binary())
    return {"rows": np.arange(100_000), "few": np.arange(3), "names": names, "part": names[5:9], "none": None}


def work(rank: int, _ranks: int, folder: Path) -> None:
    """Machines are folders here: no rank can open a file of another machine."""
    own = folder / f"machine {MACHINE_OF[rank]}"
    own.mkdir(exist_ok=True)
    sharing._PIECE = 100_000
    tempfile.tempdir, mapped = str(own), sharing._mapped
    sharing._machine = lambda: own.name
    sharing._mapped = lambda path, name: mapped(path, name) if Path(path).parent == own else 1 / 0
    found, expected = by_rank0(lambda: value() if rank == 0 else 1 / 0), value()
    for name in ("rows", "few"):
        assert found[name].dtype == expected[name].dtype and np.array_equal(found[name], expected[name])
    assert found["names"].equals(expected["names"]) and found["part"].equals(expected["part"])
    assert found["none"] is None and not found["rows"].flags.writeable
    dist.barrier()  # rank 0 removes the file after the others have it
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(own) in line]
    assert len(maps) == 1 and "(deleted)" in maps[0] and not os.listdir(own)
    assert by_rank0(lambda: "small") == "small" and by_rank0(lambda: np.arange(5)).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_rank_has_what_rank_0_has_and_a_machine_has_it_once(ranks, tmp_path):
    on_ranks(ranks, work, tmp_path)


def fails(rank: int, _ranks: int, folder: Path, why: str) -> None:
    """Rank 0 fails; writes down what each rank raises."""

    def compute() -> np.ndarray:
        if why == "computing":
            raise UserError("no such data")
        tempfile.tempdir = str(folder / "none")
        return np.arange(100_000)

    try:
        by_rank0(compute)
    except BaseException as error:
        (folder / str(rank)).write_text(f"{type(error).__name__} {error}")


@pytest.mark.parametrize("why", ["computing", "writing"])
def test_where_rank_0_fails_the_others_end(why, tmp_path):
    on_ranks(2, fails, tmp_path, why)
    said = (tmp_path / "0").read_text()
    assert (tmp_path / "1").read_text() == "SystemExit 2"
    if why == "writing":
        assert said.startswith("UserError cannot write") and said.endswith("or set TMPDIR to another folder")
    else:
        assert said == "UserError no such data"


def no_copy(rank: int, _ranks: int, folder: Path) -> None:
    """Rank 1 is on another machine, where nothing can be written."""
    sharing._machine = lambda: str(rank)
    tempfile.tempdir = str(folder if rank == 0 else folder / "none")
    with pytest.raises(UserError, match=r"cannot write .*none, which ranks share"):
        by_rank0(lambda: np.arange(100_000))
    dist.barrier()
    assert not os.listdir(folder)


def test_where_a_machine_can_write_no_copy_all_say_so(tmp_path):
    on_ranks(2, no_copy, tmp_path)


def trains(_rank: int, _ranks: int, data: Path, out: Path) -> None:
    """All arrays of the index are mapped, and so read-only."""
    sharing.LEAST = 0
    config = killed_run.config(data, out, epochs=2)
    config.data.holdout = "0.2"
    assert Trainer(task_of(config)).run() == 0


def test_a_training_writes_into_nothing_that_is_shared(tmp_path):
    for i in range(40):
        path = tmp_path / f"data/{i % 4}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(16, 16, seed=i)) if i != 7 else b"no image")
    on_ranks(2, trains, tmp_path / "data", tmp_path / "out")
    assert (tmp_path / "out/labels.pt").is_file() and not list(Path(tempfile.gettempdir()).glob("mopro_fast-*"))
