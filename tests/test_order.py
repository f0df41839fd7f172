"""Orders in pieces equal those of whole columns, from which runs of earlier versions go on."""

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from mopro_fast.config import DataConfig
from mopro_fast.data import inputs
from mopro_fast.data.index import Index
from mopro_fast.data.order import balancing_repeats, epoch_order, place_in_class, substitutes
from mopro_fast.data.paths import Paths

N = 1000
NONE = np.empty(0, np.int64)
SOME = np.arange(0, N, 7)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    for module in ("labels", "data.order"):
        monkeypatch.setattr(f"mopro_fast.{module}.PIECE", 64)


def stub(images: int = N, left_out: np.ndarray = NONE, per_shard: int | None = None) -> Index:
    """What epoch_order reads of an index."""
    shard = None if per_shard is None else (np.arange(images) // per_shard).astype(np.int32)
    own = {"labels": np.random.default_rng(0).geometric(0.2, images) - 1, "shards": shard, "shard_of": shard}
    usable = np.delete(np.arange(images, dtype=np.int32), left_out)
    own |= {"left_out": left_out, "held_out": NONE, "usable": usable, "__len__": lambda _: images}
    return type("Stub", (), own)()


def drawn(rng: np.random.Generator, repeats: np.ndarray) -> np.ndarray:
    ends, places = repeats.cumsum(), np.empty(0, np.int64)
    while len(places) < len(ends):
        places = np.concatenate([places, rng.integers(ends[-1], size=len(ends))])
        places = places[np.sort(np.unique(places, return_index=True)[1])]
    return np.searchsorted(ends, places[: len(ends)], side="right")


def repeats_of(labels: np.ndarray) -> np.ndarray:
    _, inverse, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    shares = (1 / sizes) ** 0.5
    shares = shares / shares.sum()
    return (10 * shares / shares.min()).astype(np.int64)[inverse]


@pytest.mark.parametrize("repeated", ["no", "classes", "once"])
@pytest.mark.parametrize("per_shard", [None, 3, 90])
@pytest.mark.parametrize("left_out", [NONE, SOME], ids=["all", "some"])
def test_an_order_is_that_of_whole_columns(left_out, per_shard, repeated):
    index, repeats, given = stub(left_out=left_out, per_shard=per_shard), None, None
    rows = index.usable
    if repeated == "classes":
        repeats, given = repeats_of(index.labels[rows]), balancing_repeats(index.labels, rows)
        assert np.array_equal(given[rows], repeats) and not given[left_out].any()
    if repeated == "once":  # many rounds
        repeats, given = np.ones(len(rows), int), np.isin(np.arange(N), rows).astype(np.int32)
    for epoch in range(3):
        rng = np.random.default_rng((0, 5, epoch))
        expected = rows[rng.permutation(len(rows)) if repeats is None else drawn(rng, repeats)]
        if per_shard is not None:
            group = rng.permutation(index.shard_of.max() + 1)[index.shard_of] // 4
            expected = expected[np.argsort(group[expected], kind="stable")]
        order = epoch_order(index, 5, epoch, 4, given)
        assert np.array_equal(order, expected) and order.dtype == np.int32


def test_memory_is_a_few_bytes_an_image(monkeypatch):
    for module in ("labels", "data.order"):
        monkeypatch.setattr(f"mopro_fast.{module}.PIECE", 1 << 12)  # 64 would take long
    index = stub(images := 1 << 19, per_shard=1000)
    index.labels = np.zeros(images, np.int64)
    repeats = balancing_repeats(index.labels, index.usable)
    few = np.where(np.arange(images) % 10, 0, repeats)
    index.labels = None
    for shuffle_shards, given, most in ((0, None, 4), (8, None, 8), (0, repeats, 8), (0, few, 12)):  # 10: 25 bits
        tracemalloc.start()
        epoch_order(index, 0, 0, shuffle_shards, given)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < (most + 1) * images


@pytest.mark.parametrize("labels", [(-1, 9), (0, 1), (-(1 << 62), 1 << 62)], ids=["few", "one", "any"])
def test_the_place_in_a_class_is_counted(labels):
    labels = np.random.default_rng(0).integers(*labels, 300)
    assert place_in_class(labels).tolist() == [(labels[:i] == labels[i]).sum() for i in range(300)]
    assert not len(place_in_class(labels[:0]))


@pytest.mark.parametrize("shown", [40, 48, 56], ids=["less", "all", "again"])
def test_substitutes_are_those_of_the_rows_that_are_shown(shown):
    order = np.random.default_rng(1).permutation(48).astype(np.int32)
    filled = np.resize(order, max(48, shown))
    rng = np.random.default_rng((2, 3, 4, 5))
    expected = [*rng.permutation(filled[shown:]), *filled[rng.integers(len(filled), size=20)]]
    assert substitutes(order, shown, 3, 4, 5).tolist() == expected


def labelled(names: list[str], left_out: np.ndarray = NONE) -> Index:
    labels = np.random.default_rng(2).integers(-1, 9, len(names))
    return Index("/data", Paths(names), labels, None, "list", left_out=left_out)


@pytest.mark.parametrize("left_out", [NONE, SOME], ids=["all", "some"])
def test_the_images_that_a_share_holds_out_stay_the_same(left_out):
    index = labelled([f"{i}.jpg" for i in range(N)], left_out)
    order = np.random.default_rng(4).permutation(N)
    order = order[index.labels[order] >= 0]
    of_class = index.labels[order]
    place = np.array([(of_class[:i] == label).sum() for i, label in enumerate(of_class)])
    expected = np.sort(order[place < np.rint(0.2 * np.bincount(of_class))[of_class]])
    trained, judged = inputs.hold_out(index, DataConfig(path="/data", num_classes=9, holdout="0.2"))
    assert np.array_equal(trained.held_out, expected) and trained.left_out is left_out
    assert np.array_equal(judged.left_out, np.union1d(np.delete(np.arange(N), expected), left_out))


def test_each_row_of_a_trusted_image_is_held_out(tmp_path):
    index = labelled([f"{i % 300}.jpg" for i in range(N)])
    (tmp_path / "trusted.txt").write_text("/data/299.jpg 5\n3.jpg 1\n3.jpg 1\n")
    options = SimpleNamespace(holdout=str(tmp_path / "trusted.txt"), num_classes=9, held_out_share=lambda: None)
    trained, judged = inputs.hold_out(index, options)
    assert trained.held_out.tolist() == [3, 299, 303, 599, 603, 899, 903]
    assert judged.labels[trained.held_out].tolist() == [1, 5, 1, 5, 1, 5, 1] and trained.labels is index.labels
