"""bench/scale.py: its data are what they say they are, its processes end, and the table says what was found."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mopro_fast.config import AugmentConfig
from mopro_fast.data.check import check, default_path
from mopro_fast.data.decode import UNREADABLE
from mopro_fast.data.index import load_index
from mopro_fast.data.pipeline import TrainLoader
from mopro_fast.data.shards import open_shards, verify_pack

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import scale
import scale_data
import tables

HERE = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}


@pytest.mark.medium
def test_what_is_known_of_raw_data_is_what_a_check_finds(tmp_path):
    path = scale_data.write_raw(tmp_path, 300, 7, HERE, files=100)
    index = load_index(path, "train", num_classes=7)
    assert len(index) == len({*index.paths}) == 300
    np.testing.assert_array_equal(index.labels, scale_data.labels(300, 7))

    found = check(index, workers=1, progress=False)
    assert found.read == 300 and (found.verdict == UNREADABLE).sum() == 300 // scale_data.BROKEN
    of_check = Path(default_path(index))
    table, kept = pq.read_table(of_check), of_check.read_bytes()
    of_check.unlink()
    scale_data.write_known(tmp_path, 300, 7, HERE, files=100)
    assert pq.read_table(of_check).equals(table, check_metadata=True) and of_check.read_bytes() == kept
    assert check(index, workers=1, progress=False).read == 0


@pytest.mark.medium
def test_a_pack_of_links_is_whole(tmp_path):
    pack = scale_data.write_pack(tmp_path, 300, 7, HERE, images=100)
    assert verify_pack(str(pack), 1) == []
    shards = open_shards(pack)
    assert len(shards) == len({*shards.paths}) == len({*shards.id}) == 300 and len(shards.names) == 3
    for i in (0, 150, 299):
        assert zlib.crc32(shards.read(i)) == shards.crc32[i]
    index, cpu = load_index(pack, "train", num_classes=7), torch.device("cpu")
    options = {"batch_size": 8, "rank": 0, "world_size": 1, "seed": 0, "image_size": 16, "threads": 1}
    with contextlib.closing(TrainLoader(index, augment=AugmentConfig(), device=cpu, **options)) as loader:
        batch = next(iter(loader.epoch(0)))
    np.testing.assert_array_equal(batch.labels, scale_data.labels(300, 7)[batch.ids])


def python(code: str) -> scale.Process:
    return scale.Process([sys.executable, "-c", code], HERE)


TAKE = "x = bytearray(b'1') * (64 << 20); import time; time.sleep(3)"  # longer than another one needs to start


@pytest.mark.medium
def test_memory_is_the_peak_of_one_and_the_sum_of_all(tmp_path):
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {TAKE!r}])"
    found = scale.watched([python(TAKE), python(child)], 60, tmp_path / "log")
    assert found["seconds"] > 0.4 and 64 < found["peak_mb"] < 110 and 128 < found["pss_mb"] < 220


@pytest.mark.medium
@pytest.mark.parametrize("name", ["clean", "labels", "order"])
def test_a_part_of_a_command_is_called_alone(name, tmp_path):
    data = scale_data.write_raw(tmp_path / "raw", 300, 7, {}, files=100)
    scale_data.write_scores(tmp_path / "scores.npy", 300, 7)
    for part in dict.fromkeys(["clean", name]):  # what it writes is what others read
        words = [sys.executable, scale.HERE / "scale_drivers.py", part, data, "7", tmp_path]
        run = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=True, cwd=tmp_path)
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["seconds"] > 0 and found["peak_mb"] > 10 and len(found["sha256"]) == 64


def test_a_process_ends_at_its_step_its_limit_or_its_error(tmp_path):
    log, mark = tmp_path / "log", tmp_path / "mark"
    endless = python(f"import time\nwhile True: open({str(mark)!r}, 'a').write('.'); time.sleep(0.01)")
    began = time.monotonic()
    found = scale.watched([endless], 60, log, lambda: mark.exists() and len(mark.read_text()), 3, end=signal.SIGTERM)
    assert 0 < found["seconds"] < time.monotonic() - began and "failed" not in found and found["rss_anon_mb"] > 1
    found = scale.watched([endless], 0.2, log)
    assert found["seconds"] is None and found["failed"] == "more than 0 s"
    (size,) = {len(mark.read_text()) for _ in range(3) if not time.sleep(0.1)}  # it writes no more
    found = scale.watched([python("raise SystemExit('no such thing')")], 60, log, lambda: 0)
    assert size and found["failed"] == "no such thing"


def test_pages_that_were_dropped_are_counted(tmp_path):
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    with open(tmp_path / "file", "rb") as file:
        assert scale.resident(file.fileno(), 1 << 20) == 1 << 20
    total, left = scale.drop([tmp_path])
    assert total == 1 << 20 and 0 <= left <= total


def test_the_table_has_before_after_and_what_is_not_linear():
    def row(stage, size, tree, seconds, **more):
        own = {"commit": tree[0], "seconds": seconds, "peak_mb": 2000.0 * (seconds or 0), "pss_mb": 1.0}
        return {"stage": stage, "size": size, "tree": tree} | own | more

    rows = [
        row("raw-resumed", 10**6, "before", 90.4, rss_anon_mb=500.0),
        row("raw-resumed", 10**6, "after", 3.0, rss_anon_mb=250.0),
        row("raw-resumed", 10**7, "before", None, failed="no memory is left"),
        row("raw-resumed", 10**7, "after", 24.0, rss_anon_mb=250.0),
        row("ranks", 10**7, "after", 9.0, over_imports_mb=4321.0),
        row("order", 10**6, "before", 0.5, sha256="a"),
        row("order", 10**6, "after", 0.05, sha256="a"),
        row("pack-cold", 10**6, "after", None, skipped="3 of 4 MB stay in the page cache"),
    ]
    settings = {"ranks": 8, "files": 4000, "shard": 10_000, "memory_gb": 24, "file_system": "ext4"}
    conditions = {"cpu": "a CPU", "torch": "2"}
    result = {"settings": settings, "conditions": conditions, "rows": rows}
    lines = tables.scale(result).splitlines()
    assert "| raw files: first step of a resumed run | 90 → 3.0 | no memory is left → 24 | **8.0** |" in lines
    assert (
        "| raw files: first step of a resumed run | 181 (0.50) → 6.0 (0.25) | no memory is left → 48 (0.25) |" in lines
    )
    assert "| pack: first step of a new run of 8 ranks: the machine | – | 4.3 |" in lines
    assert "| `retrain`: an epoch's order | 0.50 → 0.05 | – | – |" in lines
    assert "What both wrote has the same bytes." in lines[-1] and "commits b → a," in lines[-1]
    rows[-2]["sha256"] = "b"
    assert "**Other bytes than before: `retrain`: an epoch's order.**" in tables.scale(result)
