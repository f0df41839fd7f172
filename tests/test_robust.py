"""No image ends a run, none is lost without a word: odd files, files that break meanwhile, kill -9."""

import csv
import json
import os
import subprocess
import sys
import tarfile
from collections import defaultdict
from pathlib import Path

import killed_run
import numpy as np
import pytest
import torch
from killed_run import Recorder, config
from PIL import Image
from processes import statuses_of

from mopro_fast.data.index import load_index
from mopro_fast.errors import UserError
from mopro_fast.training.tasks import task_of

if sys.platform != "linux":
    pytest.skip("DALI is for Linux", allow_module_level=True)

HERE = Path(__file__).parent
SHARED = Path(os.environ.get("MOPRO_FAST_SHARED", HERE.parent.parent / "shared"))
IMAGES, BATCH = 70, 8
STEPS = IMAGES // BATCH


@pytest.fixture
def photos(tmp_path) -> Path:
    """A list of 70 JPEGs of 4 classes."""
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        blocks = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        blocks.resize((60 + i, 50)).save(tmp_path / f"{i}.jpg")
    lines = "".join(f"{i}.jpg {i % 4}\n" for i in range(IMAGES))
    (tmp_path / "list.txt").write_text(lines)
    return tmp_path / "list.txt"


def packed(data: Path, out: Path, *options: str) -> Path:
    command = [sys.executable, "-m", "mopro_fast", "pack", str(data), str(out), *options]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return out


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def shown(out: Path) -> dict[tuple[int, int], list[int]]:
    """By (epoch, step), the ids of all ranks. What is shown again after an interruption must be the same."""
    steps: dict[tuple[int, int], list[int]] = defaultdict(list)
    for path in sorted(out.glob("shown.*")):
        of_rank: dict[tuple[int, int], list[int]] = {}
        for line in map(json.loads, path.read_text().splitlines()):
            position = line["epoch"], line["step"]
            assert of_rank.setdefault(position, line["ids"]) == line["ids"]
        for position, ids in of_rank.items():
            steps[position] += ids
    return steps


@pytest.fixture(scope="module")
def decode_cases(tmp_path_factory) -> Path:
    """A list of all 133 files."""
    tar = SHARED / "data/decode-cases/decode_cases.tar"
    if not tar.is_file():
        pytest.skip(f"{tar} is not there: set MOPRO_FAST_SHARED to the folder that holds data/decode-cases")
    folder = tmp_path_factory.mktemp("cases")
    with tarfile.open(tar) as archive:
        archive.extractall(folder, filter="data")
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert len(names) == 133
    (folder / "list.txt").write_text("".join(f"{name} {i % 4}\n" for i, name in enumerate(names)))
    return folder / "list.txt"


@pytest.mark.medium
@pytest.mark.parametrize("layout", [pytest.param("files", marks=pytest.mark.slow), "shards"])
def test_every_odd_file_is_trained_on_or_named(decode_cases, tmp_path, layout, capsys):
    data = decode_cases if layout == "files" else packed(decode_cases, tmp_path / "pack", "--size", "64")
    c = config(data, tmp_path / "out", epochs=3, batch_size=14)
    trainer = Recorder(task_of(c))
    assert trainer.run() == 0
    named = table(tmp_path / "out/left_out.csv") if layout == "files" else table(data / "skipped.csv")
    assert all(row["reason"] for row in named)
    assert len(named) == 7, named
    steps = shown(tmp_path / "out")
    for epoch in range(3):  # 126 images are 9 batches of 14
        ids = [i for (e, _), of_step in steps.items() if e == epoch for i in of_step]
        seen = {trainer.index.paths[i] for i in ids}
        assert len(ids) == len(seen) == 126
        assert len(seen | {row["path"] for row in named}) == 133
    labels = torch.load(tmp_path / "out/labels.pt", weights_only=True)
    assert int((labels == -2).sum()) == len(labels) - 126
    assert not (tmp_path / "out/replaced.csv").exists()
    if layout == "files":
        assert "train: 7 of them are left out: " in capsys.readouterr().err


@pytest.mark.medium
def test_files_that_break_while_an_epoch_runs_are_named_and_replaced(photos, tmp_path, capsys):
    out = tmp_path / "out"
    trainer = Recorder(task_of(config(photos, out)))
    order = [trainer.loader.rows(0, step) for step in range(STEPS)]
    cut, gone = (Path(trainer.index.full_path(order[-1][i])) for i in (2, 5))
    train_step = trainer._train_step

    def step(*batch):
        if trainer.global_step == 1:
            cut.write_bytes(cut.read_bytes()[:700])
            gone.unlink()
        train_step(*batch)

    trainer._train_step = step
    assert trainer.run() == 0
    rows = table(out / "replaced.csv")
    first = [row for row in rows if row["epoch"] == "0"]
    assert {row["path"] for row in rows} == {row["path"] for row in first} == {cut.name, gone.name}
    assert len(first) == 2 and {row["step"] for row in first} == {str(STEPS - 1)}
    assert "truncated" in first[0]["reason"] and first[1]["reason"] == "No such file or directory"
    said = capsys.readouterr().err
    assert said.count(f"cannot read {cut}") == said.count(f"cannot read {gone}") == 1
    epochs = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [e["replaced"] for e in epochs if e["split"] == "epoch"] == [2, len(rows) - 2]
    steps = shown(out)
    unseen = {int(cut.stem), int(gone.stem)}
    assert not unseen & {i for ids in steps.values() for i in ids}
    for epoch in (0, 1):
        ids = [i for (e, _), of_step in steps.items() if e == epoch for i in of_step]
        assert len(ids) == STEPS * BATCH and len(set(ids)) >= len(ids) - 1  # both may get the same substitute
    labels = torch.load(out / "labels.pt", weights_only=True)
    assert unseen <= set(torch.nonzero(labels == -2).flatten().tolist())
    assert Recorder(task_of(config(photos, out))).run() == 0  # with both files broken it is still the same run


@pytest.mark.medium
def test_interrupted_after_it_named_a_file_it_has_one_row_for_it(photos, tmp_path):
    c = config(photos, tmp_path / "out")
    trainer = Recorder(task_of(c))
    gone = Path(trainer.index.full_path(trainer.loader.rows(0, 3)[0]))
    gone.unlink()
    train_step = trainer._train_step

    def step(*given):
        if trainer.global_step == 5:  # after the log's entry, before the checkpoint
            raise MemoryError
        train_step(*given)

    trainer._train_step = step
    with pytest.raises(MemoryError):
        trainer.run()
    before = table(tmp_path / "out/replaced.csv")
    assert [(row["epoch"], row["step"], row["path"]) for row in before] == [("0", "3", gone.name)]
    assert Recorder(task_of(c)).run() == 0
    rows = table(tmp_path / "out/replaced.csv")
    assert rows[:1] == before and [row["epoch"] for row in rows].count("0") == 1


@pytest.mark.medium
def test_a_run_on_class_folders_goes_on_without_a_file_that_has_gone(photos, tmp_path):
    for i in range(IMAGES):
        (tmp_path / "classes" / str(i % 4)).mkdir(parents=True, exist_ok=True)
        (photos.parent / f"{i}.jpg").rename(tmp_path / "classes" / str(i % 4) / f"{i}.jpg")
    c = config(tmp_path / "classes", tmp_path / "out")
    trainer = Recorder(task_of(c))
    train_step = trainer._train_step

    def step(*batch):
        if trainer.global_step == 4:
            raise MemoryError
        train_step(*batch)

    trainer._train_step = step
    with pytest.raises(MemoryError):
        trainer.run()
    gone = Path(trainer.index.full_path(trainer.loader.rows(0, 6)[0]))
    gone.unlink()
    assert Recorder(task_of(c)).run() == 0
    rows = table(tmp_path / "out/replaced.csv")
    assert (rows[0]["epoch"], rows[0]["step"]) == ("0", "6")
    assert {row["path"] for row in rows} == {f"{gone.parent.name}/{gone.name}"}
    steps = shown(tmp_path / "out")
    assert len({i for (e, _), ids in steps.items() if e == 0 for i in ids}) == STEPS * BATCH


def test_too_many_broken_files_end_the_run_in_one_line(photos, tmp_path):
    c = config(photos, tmp_path / "out")
    c.data.max_broken = 0.002  # of 1,000
    trainer = Recorder(task_of(c))
    for row in trainer.loader.rows(0, 6)[:3]:
        Path(trainer.index.full_path(row)).write_text("no image")
    with pytest.raises(UserError, match=r"^3 of 1000 images could not be read any more, such as .* --max-broken"):
        trainer.run()


@pytest.mark.medium
@pytest.mark.parametrize(
    "layout, ranks",
    [
        ("files", 1),
        ("shards", 1),
        pytest.param("files", 2, marks=[pytest.mark.ranks, pytest.mark.slow]),
        pytest.param("shards", 2, marks=pytest.mark.ranks),
    ],
)
def test_killed_in_the_middle_of_an_epoch_each_image_is_shown_once(photos, tmp_path, layout, ranks):
    data, out = photos, tmp_path / "out"
    if layout == "shards":
        data = packed(photos, tmp_path / "pack", "--shard-images", "9")
    kill_at = STEPS + 5
    assert -9 in statuses_of(ranks, killed_run.main, data, out, kill_at)
    before = len((out / "shown.0").read_text().splitlines())
    assert statuses_of(ranks, killed_run.main, data, out) == [0] * ranks
    again = json.loads((out / "shown.0").read_text().splitlines()[before])
    assert (again["epoch"], again["step"]) == (1, 3)  # the latest checkpoint
    steps = shown(out)
    assert sorted(steps) == [(epoch, step) for epoch in (0, 1) for step in range(STEPS)]
    for epoch in (0, 1):
        ids = [i for step in range(STEPS) for i in steps[epoch, step]]
        assert len(ids) == len(set(ids)) == STEPS * BATCH


def test_order_of_shards_is_a_shuffle_of_shards_and_of_images_in_a_few(photos, tmp_path):
    from mopro_fast.data.order import epoch_order

    index = load_index(packed(photos, tmp_path / "pack", "--shard-images", "9"), "train", num_classes=4)
    assert index.shard_of.max() == 7
    orders = [epoch_order(index, 0, epoch, 2) for epoch in range(3)]
    for order in orders:
        assert sorted(order) == list(range(IMAGES))
        sizes = np.bincount(index.shard_of)
        first = 0
        while first < IMAGES:  # two shards at a time, mixed
            pair = set(index.shard_of[order[first : first + 5]]) | set(index.shard_of[order[first : first + 14]])
            n = sum(sizes[list(pair)])
            assert len(pair) == 2 and set(index.shard_of[order[first : first + n]]) == pair
            assert len(set(index.shard_of[order[first : first + 9]])) == 2
            first += n
    assert len({tuple(index.shard_of[order[:14]]) for order in orders}) == 3
    assert (epoch_order(index, 0, 1, 2) == orders[1]).all() and (epoch_order(index, 1, 1, 2) != orders[1]).any()
    assert (index.shard_of[epoch_order(index, 0, 0, 0)][:20] >= 0).all()
    spread = index.shard_of[epoch_order(index, 0, 0, 0)]
    assert len(set(spread[:20])) > 4  # 0: among all
