"""Out of file handles never means that a file is missing, damaged or no image; shards never use them up."""

import contextlib
import os
import resource

import numpy as np
import pytest
import torch
from odd_images import encoded, picture

from mopro_fast import cli
from mopro_fast.checkpoints import state as checkpoints
from mopro_fast.config import AugmentConfig
from mopro_fast.data import cache, class_folders, pack, parts, shards
from mopro_fast.data.decode import examine_files
from mopro_fast.data.index import load_index
from mopro_fast.data.paths import Paths
from mopro_fast.data.reader import Reader
from mopro_fast.errors import UserError
from mopro_fast.files import ask_for_open_files, json_object, open_files

IMAGES = 6


@contextlib.contextmanager
def none_left():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images, their list, a pack of them, a checkpoint."""
    root = tmp_path_factory.mktemp("images")
    for i in range(IMAGES):
        (root / f"{i}.jpg").write_bytes(encoded(picture(20, 20, seed=i)))
    (root / "list.txt").write_text("".join(f"{i}.jpg {i % 2}\n" for i in range(IMAGES)))
    pack.pack({"train": index_of(root)}, pack.Pack(str(root / "list.txt"), str(root / "pack"), shard_images=2), 1)
    checkpoints.save(root, 0, checkpoints.RunState({}, {}), keep=1)
    return root


def index_of(folder, name="list.txt"):
    return load_index(folder / name, "train", num_classes=2)


def job(folder):
    names = Paths([f"{i}.jpg" for i in range(2)])
    labels, out = np.zeros(2, np.int64), str(folder / "pack")
    return shards.ShardJob(str(folder), out, "train-000000", np.arange(2), labels, names, 0, 90, {})


def device_loader(index):
    options = {"batch_size": 2, "rank": 0, "world_size": 1, "seed": 0, "image_size": 16, "augment": AugmentConfig()}
    return cache.DeviceTrainLoader(index, **options, device=torch.device("cpu"), threads=1)


WAYS = {
    "training": lambda index, _: Reader(index, 1).start(np.arange(2), lambda _: range(IMAGES))(),
    "device": lambda index, _: device_loader(index),
    "decoding": lambda index, _: list(cache.decoded(index, np.arange(2), 1, False)),
    "checking": lambda index, _: list(examine_files(index.root, ["0.jpg"])),
    "packing": lambda _, folder: shards._packed_file(job(folder), 0, "0.jpg"),
    "packed": lambda _, folder: list(shards.write_shard(job(folder))),
    "is_pack": lambda _, folder: shards.is_pack(folder / "pack"),
    "manifest": lambda _, folder: shards.read_manifest(folder / "pack"),
    "verifying": lambda _, folder: list(shards._verify(str(folder / "pack"), "train-000000.tar", "")),
    "folders": lambda _, folder: class_folders._looks_like_image(str(folder / "0.jpg")),
    "index": lambda _, folder: parts.read_table(str(folder / "pack/train.parquet")),
    "foreign": lambda _, folder: parts.is_foreign(str(folder / "pack/train.parquet"), True),
    "settings": lambda _, folder: json_object(folder / "pack/manifest.json"),
    "checkpoint": lambda _, folder: checkpoints.load(folder / "step_000000000.pt"),
}


@pytest.mark.parametrize("way", WAYS)
def test_out_of_handles_is_one_line(way, folder):
    index = index_of(folder)
    with none_left(), pytest.raises(UserError, match=r"Too many open files: .*ulimit -n"):
        WAYS[way](index, folder)


def test_a_command_out_of_handles_is_one_line(folder, capsys, monkeypatch):
    monkeypatch.setattr(cli, "ask_for_open_files", lambda: None)
    with none_left(), pytest.raises(SystemExit) as ended:
        cli.main(["check", str(folder / "pack")])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and "ulimit -n" in error


def test_a_process_asks_for_as_many_as_it_may_have():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, before[1]))
    try:
        ask_for_open_files()
        assert open_files() == resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 64
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_shards_beyond_the_bound_are_read_and_closed(folder, monkeypatch):
    index = index_of(folder, "pack")
    kept = shards._Open._kept
    monkeypatch.setattr(shards, "open_files", lambda: 2 * kept)  # none more
    before = len(os.listdir("/proc/self/fd"))
    assert [index.read(i) for i in range(IMAGES)] == [(folder / index.paths[i]).read_bytes() for i in range(IMAGES)]
    assert len(os.listdir("/proc/self/fd")) == before


def test_sets_that_nobody_uses_any_more_give_their_handles_back(folder):
    kept = shards._Open._kept
    index = index_of(folder, "pack")
    index.read(0)
    assert shards._Open._kept == kept + 1
    del index
    assert shards._Open._kept == kept
