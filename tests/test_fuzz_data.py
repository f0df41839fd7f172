"""Damaged and hand-made lists, manifests, records and tables are read, or refused in one line; nothing else raises.

MOPRO_FAST_FUZZ: inputs of each kind (default: a few).
"""

import gzip
import hashlib
import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzz_data import flipped, odd_json, odd_table
from odd_images import encoded, picture

from mopro_fast.data.anchors import read_anchors
from mopro_fast.data.begun import begun, write_images
from mopro_fast.data.check import check, load_splits
from mopro_fast.data.index import load_index, recognise, val_layout
from mopro_fast.data.pack import Pack, pack
from mopro_fast.data.shards import open_shards, verify_pack
from mopro_fast.downstream.clean import _SCHEMA as CLEANED
from mopro_fast.downstream.retrain import Retrain, with_cleaned_labels
from mopro_fast.errors import UserError
from mopro_fast.report.images import read_table

COUNT = int(os.environ.get("MOPRO_FAST_FUZZ", 12))
CLASSES = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for label in range(CLASSES):
        (root / f"c{label}").mkdir()
        for i in range(4):
            (root / f"c{label}" / f"{i}.jpg").write_bytes(encoded(picture(16, 16, seed=i)))
    (root / "list.txt").write_text("".join(f"c{label}/{i}.jpg {label}\n" for label in range(CLASSES) for i in range(4)))
    return root


def each(kind):
    """Generators of random numbers, one for each input."""
    name = kind.replace(" ", "-")
    return [pytest.param(np.random.default_rng([seed, len(kind)]), id=f"{name}-{seed}") for seed in range(COUNT)]


def survives(function, *args, **kwargs):
    """function's result, or None after a UserError of one line."""
    try:
        return function(*args, **kwargs)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
        return None


@pytest.mark.parametrize("rng", each("lists"))
def test_lists(data, tmp_path, rng):
    (tmp_path / "l.txt").write_bytes(flipped((data / "list.txt").read_bytes(), rng))
    for missing in (True, False):
        index = survives(load_index, tmp_path / "l.txt", "train", num_classes=CLASSES, root=data, missing=missing)
        if index is not None:
            assert len(index) == len(index.paths) > 0 and index.labels.max() < CLASSES
            assert len(index.rows_of(index.paths)) == len(index)


@pytest.fixture(scope="module")
def packed(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "out"
    options = Pack(str(data), str(out), size=0, shard_images=5)
    pack(load_splits(str(data), "folder", None), options, 1)
    return out


@pytest.fixture
def copy(packed, tmp_path):
    return shutil.copytree(packed, tmp_path / "pack")


@pytest.mark.parametrize("rng", each("manifests"))
def test_manifests(copy, rng):
    (copy / "manifest.json").write_bytes(odd_json(json.loads((copy / "manifest.json").read_text()), rng))
    survives(recognise, str(copy))
    survives(val_layout, str(copy))
    survives(verify_pack, str(copy), 1)
    shards = survives(open_shards, copy)
    if shards is not None:
        assert all(shards.read(i) for i in range(len(shards)))


@pytest.mark.parametrize("rng", each("tables of packs"))
def test_tables_of_packs(copy, rng):
    """With a manifest that vouches for them."""
    content = odd_table(pq.read_table(copy / "train.parquet"), rng)
    (copy / "train.parquet").write_bytes(content)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["splits"]["train"]["table"]["sha256"] = hashlib.sha256(content).hexdigest()
    (copy / "manifest.json").write_text(json.dumps(manifest))
    index = survives(load_index, copy, "train", num_classes=CLASSES)
    if index is not None:
        assert all(isinstance(index.read(i), bytes) for i in range(len(index)))


@pytest.mark.parametrize("rng", each("records"))
def test_records(data, packed, copy, rng):
    """A pack that goes on among them makes what it would have made."""
    (copy / "manifest.json").unlink()
    for path in sorted((copy / "records").iterdir())[:2]:
        path.write_bytes(gzip.compress(odd_json(json.loads(gzip.decompress(path.read_bytes())), rng)))
    if rng.integers(3) == 0:
        (copy / ".packing.json").write_bytes(odd_json({"options": {"size": 0}, "data": {"train": "x"}}, rng))
    options = Pack(str(data), str(copy), size=0, shard_images=5)
    if survives(pack, load_splits(str(data), "folder", None), options, 1) is not None:
        assert (copy / "train.parquet").read_bytes() == (packed / "train.parquet").read_bytes()


@pytest.mark.parametrize("rng", each("indexes"))
def test_indexes(data, tmp_path, monkeypatch, rng):
    """A check that finds one reads what it cannot trust, and the result is as without it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    index = load_splits(str(data), "folder", None)["train"]
    path = tmp_path / "index.parquet"
    good = check(index, workers=1, progress=False, path=str(path))
    path.write_bytes(odd_table(pq.read_table(path), rng))
    (tmp_path / "index.parquet.partial").write_bytes(flipped(b'["c0/0.jpg", 1, 1, "JPEG", "ok", "", 1, 1]\n' * 3, rng))
    found = survives(check, index, workers=1, progress=False, path=str(path), required=False)
    assert found is not None and len(found.verdict) == len(index) == len(found.reason)
    assert np.array_equal(found.size, good.size)


@pytest.mark.parametrize("rng", each("images of runs"))
def test_images_of_runs(data, tmp_path, rng):
    index = load_index(data, "train", num_classes=CLASSES, layout="folder")
    write_images(index, tmp_path)
    (tmp_path / "images.parquet").write_bytes(odd_table(pq.read_table(tmp_path / "images.parquet"), rng))
    found = survives(begun, tmp_path, None, CLASSES)
    assert found is None or len(found.classes) > found.labels.max(initial=-1)
    assert survives(begun, tmp_path, index.digest(), CLASSES) is None or found.paths.equals(index.paths)


@pytest.mark.parametrize("rng", each("cleaned labels"))
def test_cleaned_labels(data, tmp_path, rng):
    index = load_index(data, "train", num_classes=CLASSES, layout="folder")
    columns = {f.name: np.zeros(len(index)) for f in CLEANED}
    columns |= {
        "path": index.paths.for_table(),
        "given": index.labels,
        "label": index.labels,
        "verdict": ["kept"] * len(index),
    }
    table = pa.table(columns)
    table = table.cast(pa.schema([CLEANED.field(name) for name in table.column_names]))
    (tmp_path / "cleaned.parquet").write_bytes(odd_table(table, rng))
    official = {"images": index.paths.tolist(), "labels": index.labels.tolist()}
    (tmp_path / "pseudo_label.json").write_bytes(odd_json(official, rng))
    for name in ("cleaned.parquet", "pseudo_label.json"):
        config = Retrain(cleaned=str(tmp_path / name))
        config.data.num_classes = CLASSES
        found = survives(with_cleaned_labels, config, index)
        if found is not None:
            assert found.labels.min() >= -1 and 0 <= found.labels.max() < CLASSES
    labels = survives(read_table, tmp_path / "cleaned.parquet")
    if labels is not None:
        found = survives(labels.table.rows, np.arange(len(labels.given)))
        assert found is None or len(found[0]) == len(found[1]) == len(labels.given)


@pytest.mark.parametrize("rng", each("anchors"))
def test_anchors(data, tmp_path, rng):
    index = load_index(data, "train", num_classes=CLASSES, layout="folder")
    table = {"path": index.paths.for_table(), "id": index.ids, "label": index.labels, "anchor": index.ids % 2}
    table = pa.table(table | {"weight": np.full(len(index), 1.5)})
    table = table.drop_columns(["path"] if rng.integers(2) else [])
    (tmp_path / "anchors.parquet").write_bytes(odd_table(table, rng))
    found = survives(read_anchors, str(tmp_path), index)
    if found is not None:
        assert found.mask.any() and (found.weights is None or np.isfinite(found.weights).all())
