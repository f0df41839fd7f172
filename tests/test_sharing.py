"""What rank 0 computes reaches every rank; large arrays lie once on each machine."""

import os
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from processes import on_ranks, statuses_of

from mopro_fast import sharing
from mopro_fast.distributed import by_rank0
from mopro_fast.errors import UserError

MACHINE_OF = (0, 0, 1, 1)  # by rank


def value() -> dict:
    names = pa.array([b"name %d" % i for i in range(20_000)], pa.large_binary())
    return {"rows": np.arange(100_000), "few": np.arange(3), "names": names, "part": names[5:9], "none": None}


def work(rank: int, _ranks: int, folder: Path) -> None:
    """Machines are folders here: no rank can open a file of another machine."""
    own = folder / f"machine {MACHINE_OF[rank]}"
    own.mkdir(exist_ok=True)
    tempfile.tempdir, mapped = str(own), sharing._mapped
    sharing._machine = lambda: own.name
    sharing._mapped = lambda path, name: mapped(path, name) if Path(path).parent == own else None
    found, expected = by_rank0(lambda: value() if rank == 0 else 1 / 0), value()
    for name in ("rows", "few"):
        assert found[name].dtype == expected[name].dtype and np.array_equal(found[name], expected[name])
    assert found["names"].equals(expected["names"]) and found["part"].equals(expected["part"])
    assert found["none"] is None and not found["rows"].flags.writeable
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(own) in line]
    assert len(maps) == 1 and "(deleted)" in maps[0] and not os.listdir(own)
    assert by_rank0(lambda: "small") == "small" and by_rank0(lambda: np.arange(5)).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_rank_has_what_rank_0_has_and_a_machine_has_it_once(ranks, tmp_path):
    on_ranks(ranks, work, tmp_path)


def fails(rank: int, _ranks: int) -> None:
    def compute() -> None:
        raise UserError("no such data")

    try:
        by_rank0(compute)
    except UserError as error:
        raise SystemExit(7 if rank == 0 and str(error) == "no such data" else 1) from None


def test_where_rank_0_fails_the_others_end():
    assert statuses_of(1, fails) == [7]
    with pytest.raises(Exception, match=r"exit code 7|exit code 2"):
        on_ranks(2, fails)


def test_no_room_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"cannot write .*none.*: set TMPDIR to another folder"):
        sharing._write([b"x"])
