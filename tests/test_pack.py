"""`mopro-fast pack`: complete, upright, decodable shards; the same bytes however often it is interrupted."""

import csv
import dataclasses
import gzip
import hashlib
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from odd_images import decode_cases, encoded, odd_images, oriented, picture
from PIL import Image
from test_check import command, run, snapshot  # noqa: F401

from mopro_fast.config import AugmentConfig
from mopro_fast.data import pack as module
from mopro_fast.data import shards
from mopro_fast.data.cache import DeviceTrainLoader
from mopro_fast.data.decode import UNREADABLE, decode, examine
from mopro_fast.data.index import load_index
from mopro_fast.data.pipeline import TrainLoader
from mopro_fast.data.reader import Broken, Verified
from mopro_fast.data.shards import open_shards
from mopro_fast.errors import UserError
from mopro_fast.files import MARKER


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Class folders with a train and a val split: photographs, and every odd image in train."""
    root = tmp_path_factory.mktemp("data")
    odd = list(odd_images().items())
    for split, count in (("train", 30), ("val", 12)):
        for label, name in enumerate(("cat", "dog", "owl")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = picture(100 + 7 * i % 60, 150, seed=i)
                (root / split / name / f"{i:03}.jpg").write_bytes(encoded(pixels, quality=92))
            for file, (content, _) in odd[label::3] if split == "train" else ():
                (root / split / name / f"z{file}").write_bytes(content)
    return root


@pytest.fixture(scope="module")
def packed(data, tmp_path_factory):
    """`data` at 64 px, 20 images per shard."""
    out = tmp_path_factory.mktemp("packed") / "out"
    assert command("pack", data, out, "--size", 64, "--shard-images", 20, "--workers", 2).returncode == 0
    return out


def sources(data, split):
    """(path, label) in the order of the index."""
    names = sorted(p.name for p in (data / split).iterdir())
    return [(f"{name}/{p.name}", i) for i, name in enumerate(names) for p in sorted((data / split / name).iterdir())]


def test_every_image_is_there_or_named(data, packed):
    with (packed / "skipped.csv").open(newline="") as file:
        skipped = list(csv.DictReader(file))
    names = {".".join(p.name.split(".")[1:]) for p in packed.iterdir() if p.is_file() and p.name != MARKER}
    assert names == {"json", "csv", "parquet", "tar", "idx"} and [p.name for p in packed.glob(".*")] == [MARKER]
    listed = sources(data, "train")
    bad = [
        i for i, (path, _) in enumerate(listed) if examine((data / "train" / path).read_bytes()).verdict == UNREADABLE
    ]
    assert [int(row["id"]) for row in skipped] == bad and len(bad) == 7
    for row in skipped:
        assert (row["path"], int(row["label"])) == listed[int(row["id"])] and row["reason"] and row["split"] == "train"
    for split in ("train", "val"):
        files = sources(data, split)
        images = open_shards(packed, split)
        expected = set(range(len(files))) - (set(bad) if split == "train" else set())
        assert set(images.id.tolist()) == expected and len(images) == len(expected)
        assert [(p, y) for p, y in zip(images.paths, images.label, strict=True)] == [files[i] for i in images.id]
        assert images.classes == ["cat", "dog", "owl"]
        assert images.shard.max() + 1 == len(images.names) == -(-len(files) // 20)
        same = 0
        for i in range(len(images)):
            found = examine(images.read(i))
            assert found.verdict == 0
            original = decode((data / split / images.paths[i]).read_bytes())
            height, width = original.shape[:2]
            short = min(height, width)
            if short > 64:
                height, width = 64 * height // short, 64 * width // short
            assert (found.height, found.width) == (height, width), images.paths[i]
            resized = Image.fromarray(original).resize((width, height), Image.Resampling.BILINEAR)
            same += abs(decode(images.read(i)).astype(int) - np.asarray(resized)).mean() < 4
        assert same >= len(images) - 2  # the 1-bit image, which JPEG suits ill
    order = open_shards(packed).id
    assert (
        sorted(order.tolist()) != order.tolist() and len(set(open_shards(packed).label[:20].tolist())) == 3
    )  # shuffled
    assert open_shards(packed, "val").id.tolist() == list(range(36))


@pytest.mark.parametrize("kind", [TrainLoader, DeviceTrainLoader])
def test_a_whole_epoch_of_shards_on_any_number_of_ranks(packed, kind):
    """Images of five shards, mixed among two at a time; some are left out. Each is real once, with the same pixels."""
    index = load_index(packed, "train", num_classes=3)
    index = dataclasses.replace(index, left_out=index.ids[::3])
    options = dict(image_size=16, device=torch.device("cpu"), threads=2, seed=1, augment=AugmentConfig())

    def shown(ranks):
        found = {}
        for rank in range(ranks):
            size = 16 // ranks
            loader = kind(index, batch_size=size, rank=rank, world_size=ranks, shuffle_shards=2, whole=True, **options)
            for step, batch in enumerate(loader.epoch(4)):
                first = (step * ranks + rank) * size
                real = max(0, min(size, len(index.usable) - first))
                rows = batch.ids[:real].tolist()
                assert not found.keys() & set(rows) and (index.labels[batch.ids] == batch.labels.numpy()).all()
                found |= dict(zip(rows, zip(batch.view_q, batch.view_k, strict=True), strict=False))
            assert not loader.lost
            loader.close()
        return found

    one, two = shown(1), shown(2)
    assert sorted(one) == sorted(two) == index.usable.tolist() and len(one) % 16
    assert all(torch.equal(a, b) for row in one for a, b in zip(one[row], two[row], strict=True))


def test_the_package_webdataset_reads_every_member(packed):
    pytest.importorskip("webdataset", reason="pip install webdataset")
    code = """
import json, sys, webdataset
samples = webdataset.WebDataset(sys.argv[1:], shardshuffle=False).decode("pil").to_tuple("jpg;png;webp;bmp", "cls")
print(json.dumps([(min(image.size), label) for image, label in samples]))
"""
    for split in ("train", "val"):
        urls = sorted(map(str, packed.glob(f"{split}-*.tar")))
        command = [sys.executable, "-W", "ignore", "-c", code, *urls]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        assert [label for _, label in found] == open_shards(packed, split).label.tolist()
        assert all(side <= 64 for side, _ in found)


def test_shards_are_webdataset_with_dalis_index(packed, tmp_path):
    tars = sorted(packed.glob("*.tar"))
    images = {split: open_shards(packed, split) for split in ("train", "val")}
    for path in tars:
        split, number = path.stem.split("-")
        rows = np.flatnonzero(images[split].shard == int(number))
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in members} == {(0, 0, 0, "", 0o644)}
            for i, (image, label) in zip(rows, zip(members[::2], members[1::2], strict=True), strict=True):
                assert Path(image.name).stem == Path(label.name).stem == f"{images[split].id[i]:09d}"
                assert tar.extractfile(image).read() == images[split].read(i)
                assert int(tar.extractfile(label).read()) == images[split].label[i] and label.name.endswith(".cls")
        if tool := shutil.which("wds2idx", path=os.path.dirname(sys.executable)):
            subprocess.run([tool, path, tmp_path / "idx"], stdout=subprocess.DEVNULL, check=True)
            assert (tmp_path / "idx").read_bytes() == path.with_suffix(".idx").read_bytes()


def test_dali_reads_them(packed):
    dali = pytest.importorskip("nvidia.dali")
    tars = sorted(map(str, packed.glob("train-*.tar")))
    images = open_shards(packed)
    pipeline = dali.Pipeline(batch_size=len(images), num_threads=2, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        data, label = dali.fn.readers.webdataset(
            paths=tars, index_paths=[t[:-3] + "idx" for t in tars], ext=["jpg;png;bmp;webp", "cls"]
        )
        pixels = dali.fn.decoders.image(data, device="cpu", output_type=dali.types.RGB)
        pipeline.set_outputs(pixels, label)
    pipeline.build()
    pixels, label = pipeline.run()
    for i in range(len(images)):
        assert int(bytes(np.array(label[i]))) == images.label[i]
        assert abs(np.array(pixels[i]).astype(int) - decode(images.read(i))).max() <= 1


def test_manifest(packed):
    manifest = json.loads((packed / "manifest.json").read_text())
    assert manifest["options"] == {"size": 64, "quality": 90, "shard_images": 20}
    for content in manifest["splits"].values():
        for shard in content["shards"]:
            content = (packed / shard["name"]).read_bytes()
            assert (len(content), hashlib.sha256(content).hexdigest()) == (shard["bytes"], shard["sha256"])
    assert sum(s["images"] for s in manifest["splits"]["train"]["shards"]) == manifest["splits"]["train"]["images"]


def test_upright_and_of_the_right_brightness():
    for orientation in range(1, 9):
        for size in (0, 40, 256):
            data = shards.packed(oriented(orientation), size, 90)
            pixels = decode(data)
            if size:  # upright for readers that ignore EXIF, too
                assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
            expected = Image.fromarray(picture()).resize(pixels.shape[1::-1], Image.Resampling.BILINEAR)
            assert abs(pixels.astype(int) - np.asarray(expected)).mean() < 4, (orientation, size)
    gray = np.asarray(Image.fromarray(picture()).convert("L"))
    for name in ("16bit.png", "16bit.tif", "gray.png", "gray.jpg"):
        for size in (0, 40, 256):
            pixels = decode(shards.packed(odd_images()[name][0], size, 90)).astype(float)
            assert abs(pixels.mean() - gray.mean()) < 1.5 and abs(pixels.std() - gray.std()) < 2, (name, size)


def test_original_bytes(data, tmp_path, run):  # noqa: F811
    status, *_ = run("pack", data, tmp_path / "out", "--size", 0, "--workers", 2)
    assert status == 0
    images = open_shards(tmp_path / "out")
    kept = 0
    for i in range(len(images)):
        original = (data / "train" / images.paths[i]).read_bytes()
        assert np.array_equal(decode(images.read(i)), decode(original))
        if examine(original).verdict == 0:
            assert images.read(i) == original
            kept += 1
    assert kept == 90 + sum(verdict == 0 for _, verdict in odd_images().values())


def test_small_images_stay_as_they_are():
    for name in ("plain.jpg", "palette.png", "lossless.webp"):
        content = odd_images()[name][0]
        assert shards.packed(content, 60, 50) is content
        assert len(shards.packed(content, 59, 50)) < len(content)
    large = encoded(picture(300, 400))
    assert len(shards.packed(large, 200, 50)) < len(shards.packed(large, 200, 90))


@pytest.mark.medium
def test_bytes_do_not_depend_on_workers_or_interruptions(data, packed, tmp_path):
    expected = snapshot(packed)
    arguments = ("pack", data, tmp_path / "out", "--size", 64, "--shard-images", 20, "--workers")
    for workers, item in ((2, 45), (3, 60)):  # of 20 images in a shard: some are whole, some begun
        assert command(*arguments, workers, stop=("SIGKILL", item)).returncode == -signal.SIGKILL
    (tmp_path / "out/.train-000000.tar.1234.tmp").touch()  # as of a worker that was killed
    assert not (tmp_path / "out/manifest.json").exists()
    with pytest.raises(UserError, match="to its end"):
        open_shards(tmp_path / "out")
    finished = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.tar")}
    recorded = {p.name.partition(".")[0] for p in (tmp_path / "out/records").glob("*.gz") if not p.name.startswith(".")}
    assert recorded
    assert command(*arguments, 1).returncode == 0
    assert snapshot(tmp_path / "out") == expected
    for name, time in finished.items():  # what was finished was not written again
        assert (tmp_path / "out" / name).stat().st_mtime_ns == time or Path(name).stem not in recorded


@pytest.mark.medium
def test_changed_shards_are_found_and_repaired(data, packed, tmp_path, run):  # noqa: F811
    out = tmp_path / "out"
    shutil.copytree(packed, out)
    expected = snapshot(out)
    arguments = ("pack", data, out, "--size", 64, "--shard-images", 20, "--workers", 2)
    assert run("check", out)[0] == 0
    times = {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    status, text, _ = run(*arguments)
    assert status == 0 and "all was there already" in text
    assert times == {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")} and snapshot(out) == expected
    # A flipped bit, a cut shard, a missing index.
    content = bytearray(expected["train-000001.tar"])
    content[len(content) // 2] ^= 1
    (out / "train-000001.tar").write_bytes(content)
    status, text, _ = run("check", out, "--workers", 1)
    assert status == 1 and "train-000001.tar: altered" in text and "1 files" in text
    (out / "train-000002.tar").write_bytes(expected["train-000002.tar"][:-2000])
    with pytest.raises(UserError, match=r"train-000002\.tar has .* bytes, its manifest says"):
        open_shards(out)
    assert len(open_shards(out, "val")) == 36
    (out / "val-000000.idx").unlink()
    assert run(*arguments)[0] == 0
    assert snapshot(out) == expected
    rewritten = {name for name, time in times.items() if (out / name).stat().st_mtime_ns != time}
    assert rewritten == {"train-000001.tar", "train-000002.tar", "val-000000.tar"}
    (out / "train.parquet").write_bytes(expected["train.parquet"][:-1])
    with pytest.raises(UserError, match=r"train\.parquet is not as it was made"):
        open_shards(out)


def test_a_file_whose_reading_ends_the_process_is_not_as_it_was_made(packed, monkeypatch):
    def ended(_function, tasks, _workers):
        yield tasks[0], shards.processes.Crashed(-11)
        yield tasks[1], shards.processes.Done()

    monkeypatch.setattr(shards.processes, "run", ended)
    assert shards.verify_pack(str(packed), 1) == [f"{packed}/train-000000.tar: signal 11"]


def test_a_changed_image_changes_its_shard_alone(tmp_path, run):  # noqa: F811
    folder = tmp_path / "data/class"
    folder.mkdir(parents=True)
    for i in range(9):
        (folder / f"{i}.jpg").write_bytes(encoded(picture(seed=i)))
    arguments = ("pack", tmp_path / "data", tmp_path / "out", "--shard-images", 3, "--workers", 1)
    assert run(*arguments)[0] == 0
    before = snapshot(tmp_path / "out")
    (folder / "4.jpg").write_bytes(encoded(picture(70, 90)))
    assert run(*arguments)[0] == 0
    images = open_shards(tmp_path / "out")
    shard = images.names[int(images.shard[images.id == 4][0])]
    after = snapshot(tmp_path / "out")
    assert [name for name in before if name.endswith(".tar") and before[name] != after[name]] == [shard]
    assert decode(images.read(int(np.flatnonzero(images.id == 4)[0]))).shape == (70, 90, 3)


def test_reading_reports_what_is_gone(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "out")
    images = open_shards(tmp_path / "out")
    os.truncate(tmp_path / "out" / images.names[0], 2000)
    last = int(np.flatnonzero(images.shard == 0)[-1])
    with pytest.raises(OSError, match=r"train-000000\.tar ends before image"):
        images.read(last)
    images.close()
    (tmp_path / "out" / images.names[1]).unlink()
    with pytest.raises(OSError):
        images.read(last + 1)


@pytest.mark.medium
def test_a_pack_without_checksums_is_read_and_gets_them(data, packed, tmp_path):
    """Versions before had none: its images are examined when they are first read."""
    old = tmp_path / "old"
    shutil.copytree(packed, old)
    as_before(old)
    images = load_index(old, "train", num_classes=3)
    assert images.shards.crc32 is None
    zeroed = 4
    with open(images.shards.path(images.shards.shard[zeroed]), "r+b") as tar:
        tar.seek(images.shards.offset[zeroed])
        tar.write(bytes(images.shards.size[zeroed]))
    verified = Verified(images, 2)
    for row in range(10):
        if row == zeroed:
            with pytest.raises(Broken, match="not an image"):
                verified.read_clean(row)
        else:
            assert verified.read_clean(row) == images.read(row)
    verified.close()
    images.shards.close()
    shutil.copytree(packed, tmp_path / "again")
    as_before(tmp_path / "again")
    before = snapshot(packed)
    assert command("pack", data, tmp_path / "again", "--size", 64, "--shard-images", 20).returncode == 0
    after = snapshot(tmp_path / "again")
    assert [name for name in before if before[name] != after.get(name) and not name.startswith(".mopro")] == []


@pytest.mark.parametrize("new", ["another image", "a bit"])
def test_other_bytes_in_a_pack_are_damage(packed, tmp_path, new):
    """Whatever they are: also a whole image, which would be shown under another one's label."""
    shutil.copytree(packed, tmp_path / "out")
    images = load_index(tmp_path / "out", "train", num_classes=3)
    verified, shards_ = Verified(images, 1), images.shards
    sizes = shards_.size[:20]
    row, other = int(sizes.argmax()), int(sizes.argmin())
    before = images.read(row)
    changed = bytes([before[0], before[1] ^ 1]) if new == "a bit" else images.read(other)
    with open(shards_.path(shards_.shard[row]), "r+b") as tar:
        tar.seek(shards_.offset[row])
        tar.write(changed)
    for _ in range(2):
        with pytest.raises(Broken, match="not those that were packed"):
            verified.read_clean(row)
    assert verified.read_clean(other) == images.read(other)
    with open(shards_.path(shards_.shard[row]), "r+b") as tar:
        tar.seek(shards_.offset[row])
        tar.write(before)
    assert verified.read_clean(row) == before  # the storage is whole again
    shards_.close()


def as_before(pack):
    """What was written before images had checksums."""
    for path in (pack / "records").iterdir():
        record = json.loads(gzip.decompress(path.read_bytes()))
        record["rows"] = [row[:5] for row in record["rows"]]
        path.write_bytes(gzip.compress(json.dumps(record).encode(), mtime=0))
    manifest = json.loads((pack / "manifest.json").read_text())
    for split in manifest["splits"].values():
        path = pack / split["table"]["name"]
        pq.write_table(pq.read_table(path).drop_columns("crc32"), path)
        split["table"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (pack / "manifest.json").write_text(json.dumps(manifest))


def test_more_shards_than_files_kept_open(packed, monkeypatch):
    kept = shards._Open._kept
    monkeypatch.setattr(shards, "open_files", lambda: 2 * (kept + 3))
    sets = [open_shards(packed) for _ in range(3)]
    before = len(os.listdir("/proc/self/fd"))
    for i in range(0, len(sets[0]), 7):
        assert sets[0].read(i) == sets[1].read(i) == sets[2].read(i)
    assert len(os.listdir("/proc/self/fd")) == before + 3 and len(sets[0].names) > 3
    for one in sets:
        one.close()
    assert shards._Open._kept == kept and len(os.listdir("/proc/self/fd")) == before


def dying_writer(job):
    """As write_shard, but one image is more than the process can bear."""
    original = shards.packed

    def packed(data, size, quality):
        if data == DEADLY:
            os.kill(os.getpid(), signal.SIGSEGV)
        return original(data, size, quality)

    shards.packed = packed
    yield from shards.write_shard(job)


DEADLY = encoded(picture(33, 44))


@pytest.mark.medium
def test_an_image_that_kills_its_reader_is_left_out(tmp_path, monkeypatch, run):  # noqa: F811
    (tmp_path / "data/class").mkdir(parents=True)
    for i in range(6):
        (tmp_path / f"data/class/{i}.jpg").write_bytes(DEADLY if i in (1, 4) else encoded(picture()))
    monkeypatch.setattr(module, "write_shard", dying_writer)
    assert run("pack", tmp_path / "data", tmp_path / "out", "--workers", 1)[0] == 0
    assert sorted(open_shards(tmp_path / "out").id.tolist()) == [0, 2, 3, 5]
    assert (tmp_path / "out/skipped.csv").read_text().count(
        "cannot be read: it ends the process that tries (signal 11)"
    ) == 2


def test_list_files_with_validation_data(tmp_path, run):  # noqa: F811
    for i in range(4):
        (tmp_path / f"{i}.jpg").write_bytes(encoded(picture(seed=i)))
    (tmp_path / "train.txt").write_text("0.jpg 5\n1.jpg -1\ngone.jpg 3\n")
    (tmp_path / "val.txt").write_text("2.jpg 5\n3.jpg 0\n")
    assert run("pack", tmp_path / "train.txt", tmp_path / "out", "--val", tmp_path / "val.txt")[0] == 0
    train, val = open_shards(tmp_path / "out"), open_shards(tmp_path / "out", "val")
    assert dict(zip(train.id.tolist(), train.label.tolist(), strict=True)) == {0: 5, 1: -1} and train.classes is None
    assert val.label.tolist() == [5, 0] and val.paths.tolist() == ["2.jpg", "3.jpg"]
    assert "train,2,3,gone.jpg,cannot be read: No such file or directory" in (tmp_path / "out/skipped.csv").read_text()
    assert run("pack", tmp_path / "train.txt", tmp_path / "alone")[0] == 0
    with pytest.raises(UserError, match="no val images"):
        open_shards(tmp_path / "alone", "val")


def test_mistakes_end_in_one_line(data, packed, tmp_path, run):  # noqa: F811
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/photo.jpg").touch()
    (tmp_path / "bad/class").mkdir(parents=True)
    (tmp_path / "bad/class/empty.jpg").touch()
    before = snapshot(packed)
    for args, named in (
        ([tmp_path / "nowhere", tmp_path / "out"], ["no such file or folder", "nowhere"]),
        ([data, tmp_path / "file"], ["file is a file: name a folder"]),
        ([data, tmp_path / "file/out"], ["cannot write", "file/out"]),
        ([data, tmp_path / "full"], ["full holds other files, such as photo.jpg"]),
        ([data, tmp_path / "out", "--size", 3], ["--size must be 0 or from 16", "got 3"]),
        ([data, tmp_path / "out", "--quality", 0], ["--quality must be from 1 to 95"]),
        ([data, tmp_path / "out", "--workers", -2], ["--workers"]),
        ([data, packed, "--size", 128, "--shard-images", 20], ["--size 64, not 128"]),
        ([data, packed, "--size", 64, "--shard-images", 20, "--quality", 80], ["--quality 90, not 80"]),
        ([data, packed, "--size", 64], ["--shard-images 20, not 0"]),
        ([data / "val", packed, "--size", 64, "--shard-images", 20], ["of other data"]),
        ([packed, tmp_path / "out"], ["is a pack already"]),
        ([data, tmp_path / "out", "--val", packed], ["is a pack already"]),
        ([tmp_path / "bad", tmp_path / "none"], ["none of the images", "mopro-fast check"]),
    ):
        status, _, error = run("pack", *args)
        lines = [line for line in error.splitlines() if line and "images/s" not in line]
        assert status == 2 and len(lines) == 1 and all(text in lines[0] for text in named), error
    assert snapshot(packed) == before
    (tmp_path / "stop").mkdir()
    (tmp_path / "stop/manifest.json").write_text('{"format": "mopro_fast pack", "version": 99}')
    with pytest.raises(UserError, match="version 99"):
        open_shards(tmp_path / "stop")


@pytest.mark.medium
def test_a_full_disk_is_one_line_and_can_be_put_right(data, packed, tmp_path):
    command = [
        sys.executable,
        "-m",
        "mopro_fast",
        "pack",
        data,
        tmp_path / "out",
        "--size",
        "64",
        "--shard-images",
        "20",
    ]

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    result = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True)
    last = result.stderr.splitlines()[-1]
    assert result.returncode == 2 and re.search(r"error: cannot write .*/train-0000\d\d\.tar: File too", last)
    assert "Traceback" not in result.stderr and not list((tmp_path / "out").glob(".*.tmp"))
    for _ in range(2):
        assert subprocess.run(command, capture_output=True).returncode == 0
        assert snapshot(tmp_path / "out") == snapshot(packed)
        (tmp_path / "out/train-000001.tar").unlink()
        assert subprocess.run(command, preexec_fn=limit, capture_output=True).returncode == 2
        assert not (tmp_path / "out/manifest.json").exists()  # it would vouch for what is not there


@pytest.mark.medium
def test_all_decode_cases(tmp_path, run):  # noqa: F811
    files = decode_cases(tmp_path / "cases")
    (tmp_path / "list.txt").write_text("".join(f"{f.relative_to(tmp_path)} 0\n" for f in files), encoding="utf-8")
    status, text, _ = run("pack", tmp_path / "list.txt", tmp_path / "out", "--workers", 2)
    assert status == 0 and "126 images" in text and "7 images cannot be read" in text
    images = open_shards(tmp_path / "out")
    with (tmp_path / "out/skipped.csv").open(newline="") as file:
        skipped = {row["path"]: row["reason"] for row in csv.DictReader(file)}
    assert all(skipped.values()) and len(skipped) == 7
    assert skipped.keys() | set(images.paths) == {str(f.relative_to(tmp_path)) for f in files}
    by_name = {Path(p).name: decode(images.read(i)).astype(int) for i, p in enumerate(images.paths)}
    for i in range(2, 9):
        assert by_name[f"exif_orientation_{i}.jpg"].shape == by_name["exif_orientation_1.jpg"].shape
        assert abs(by_name[f"exif_orientation_{i}.jpg"] - by_name["exif_orientation_1.jpg"]).mean() < 4
    gray = by_name["gray.jpg"]
    for name in ("png_16bit_gray.png", "png_la.png"):  # the same photograph
        assert abs(by_name[name].mean() - gray.mean()) < 2 and abs(by_name[name].std() - gray.std()) < 3


def test_a_pipe_in_place_of_a_shard_is_not_waited_for(packed, tmp_path):
    copy = shutil.copytree(packed, tmp_path / "copy")
    images = open_shards(copy)
    (copy / images.names[0]).unlink()
    os.mkfifo(copy / images.names[0])
    with pytest.raises(OSError):
        images.read(0)
    images.close()
    with pytest.raises(UserError, match="has 0 bytes"):
        open_shards(copy)
