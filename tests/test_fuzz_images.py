"""Thousands of damaged images through check, pack and an epoch: no process ends, none hangs, each file counts once.

MOPRO_FAST_FUZZ: a twentieth of the damaged files, a quarter of the files replaced after they were checked.
"""

import csv
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from epoch_of import BATCH
from fuzz_images import MUTATIONS, mutated, replaced, sources

from mopro_fast.data.decode import UNREADABLE, examine
from mopro_fast.data.index import FILE
from mopro_fast.data.shards import open_shards

COUNT = int(os.environ.get("MOPRO_FAST_FUZZ", 12))
FILES, REPLACED = 20 * COUNT, 4 * COUNT
MOST = 2048  # MB
WHOLE = 64  # files


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Class folders of whole and of damaged files, checked."""
    root = tmp_path_factory.mktemp("images")
    rng = random.Random(COUNT)
    for i in range(FILES + WHOLE):
        if i % 200 == 0:
            whole = sources(rng)
        data = rng.choice(whole)
        path = root / f"c{i % 3}" / f"{i:06}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data if i < WHOLE else mutated(rng, data, rng.choice(whole)))
    result = command("check", root, "--workers", 2)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    return root


def command(*words):
    words = [sys.executable, "-m", "mopro_fast", *map(str, words)]
    return subprocess.run(words, capture_output=True, text=True, timeout=60 + FILES)


def epoch_of(data, threads, checked=1):
    """What epoch_of.py prints; each image that is not left out was shown once, or another one in its place."""
    program = Path(__file__).with_name("epoch_of.py")
    words = [sys.executable, str(program), str(data), str(checked), str(threads)]
    result = subprocess.run(words, capture_output=True, text=True, timeout=60 + FILES)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout)
    steps = found["usable"] // BATCH
    assert len(found["shown"]) == steps * BATCH
    assert max(Counter(found["wanted"]).values()) == 1
    assert found["megabytes"] < MOST
    return found


def replace(path, offset, size, content):
    """Other bytes, and the time of change that it had."""
    before = os.stat(path)
    with open(path, "r+b") as file:
        file.seek(offset)
        assert file.write(content) == size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.__name__.strip("_"))
def test_every_mutation_damages(mutation):
    rng = random.Random(1)
    whole = [data for data in sources(rng) if len(data) > 64]
    changed = [bytes(mutation(rng, bytearray(data), rng.choice(whole))) != data for data in whole]
    assert sum(changed) > len(changed) / 3


@pytest.mark.medium
def test_check_and_pack_count_every_file(damaged, tmp_path):
    files = sorted(str(p.relative_to(damaged)) for p in damaged.glob("*/*"))
    rows = pq.read_table(damaged / FILE).to_pydict()
    assert sorted(rows["path"]) == files and len(files) == FILES + WHOLE
    readable = [path for path, verdict in zip(rows["path"], rows["verdict"], strict=True) if verdict != "unreadable"]
    assert len(readable) > WHOLE and len(readable) < len(files) - WHOLE / 4
    packs = [tmp_path / str(workers) for workers in (1, 4)]
    for out, workers in zip(packs, (1, 4), strict=True):
        result = command("pack", damaged, out, "--shard-images", 100, "--workers", workers)
        assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    one, four = ({p.name: p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()} for out in packs)
    assert one == four
    with (packs[0] / "skipped.csv").open() as file:
        reasons = {row["path"]: row["reason"] for row in csv.DictReader(file)}
    left_out = list(reasons)
    packed = open_shards(packs[0])
    assert [(path, reasons[path]) for path in readable if path in reasons] == []
    assert sorted([*packed.paths.tolist(), *left_out]) == files
    packed.close()


@pytest.mark.medium
@pytest.mark.parametrize("threads", [1, 4])
def test_an_epoch(damaged, threads):
    found = epoch_of(damaged, threads)
    assert found["lost"] == [] and found["usable"] + found["left out"] == FILES + WHOLE


@pytest.mark.medium
@pytest.mark.parametrize("threads", [1, 4])
def test_files_replaced_after_the_check(damaged, tmp_path, threads):
    data = tmp_path / "data"
    shutil.copytree(damaged, data)  # with the times of change, so the check holds
    rows = pq.read_table(data / FILE).to_pylist()
    rng = random.Random(threads)
    usable = [row["path"] for row in rows if row["verdict"] != "unreadable"]
    others = (data / usable[0]).read_bytes()
    broken, chosen = set(), rng.sample(usable, min(REPLACED, len(usable) - WHOLE // 2))
    for path in chosen:
        content = (data / path).read_bytes()
        new = replaced(rng, content, others)
        replace(data / path, 0, len(content), new)
        if examine(new).verdict == UNREADABLE:
            broken.add(path)
    found = epoch_of(data, threads)
    named = {path for path, _, _ in found["lost"]}
    shown = {rows[i]["path"] for i in found["wanted"]}
    assert broken & shown <= named <= set(chosen) and len(named) > len(chosen) / 3


@pytest.mark.medium
@pytest.mark.parametrize("threads", [1, 4])
def test_images_of_a_pack_replaced(damaged, tmp_path, threads):
    out = tmp_path / "pack"
    assert command("pack", damaged, out, "--shard-images", 100, "--workers", 2).returncode == 0
    packed, rng = open_shards(out), random.Random(threads)
    chosen = rng.sample(range(len(packed)), min(REPLACED, len(packed) - WHOLE // 2))
    others, changed = packed.read(0), set()
    for i in chosen:
        before = packed.read(i)
        new = replaced(rng, before, others)
        replace(packed.path(packed.shard[i]), int(packed.offset[i]), len(new), new)
        if new != before:
            changed.add(packed.paths[i])
    found = epoch_of(out, threads, checked=0)
    shown = {packed.paths[i] for i in found["wanted"]}
    assert {path for path, _, _ in found["lost"]} == changed & shown and len(changed) > len(chosen) / 2
    packed.close()
