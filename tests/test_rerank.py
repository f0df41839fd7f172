"""Re-ranking, the graph and its smoothing: against the formulas as loops, and against what CAPro's code gave."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mopro_fast.downstream.capro_lists import nearest
from mopro_fast.text import graph, rerank
from mopro_fast.text.rerank import _Sparse, rerank_small

CPU = torch.device("cpu")
RECORD = Path(__file__).parents[2] / "shared/data/capro-record/record.pt"


def by_loops(points: np.ndarray) -> np.ndarray:
    """Section 2.4 of the contract: float64, a set at a time."""
    n = len(points)
    d = ((points[:, None] - points[None]) ** 2).sum(-1).astype(np.float32)
    d[d < 1e-10] = 0
    d = d / np.where(d.max(1) > 0, d.max(1), 1)[:, None]
    order = d.argsort(1, kind="stable")

    def near(i: int, k: int) -> set[int]:
        return {int(j) for j in order[i, : k + 1] if i in order[j, : k + 1]}

    v = np.zeros((n, n))
    for i in range(n):
        first = near(i, 20)
        members = set(first)
        for j in first:
            if 3 * len(near(j, 10) & first) > 2 * len(near(j, 10)):
                members |= near(j, 10)
        members = sorted(members)
        v[i, members] = np.exp(-d[i, members].astype(np.float64))
        v[i] /= v[i].sum() or 1
    v = np.stack([v[order[i, :6]].mean(0) for i in range(n)])
    s = np.minimum(v[0], v[1:]).sum(1)
    return 0.7 * (1 - s / (2 - s)) + 0.3 * d[0, 1:]


def clusters(n: int, width: int = 8, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    points = rng.standard_normal((max(n // 12, 2), width))[rng.integers(max(n // 12, 2), size=n)]
    return torch.from_numpy(points + 0.5 * rng.standard_normal((n, width)))


@pytest.mark.parametrize("n", [2, 3, 7, 21, 22, 40, 150])
def test_it_is_the_formulas(n, monkeypatch):
    points = clusters(n)
    points[50:95] = points[n // 2]  # more equal ones than neighbours
    expected = by_loops(points.numpy())
    np.testing.assert_allclose(rerank_small(points[None])[0], expected, atol=1e-6)
    np.testing.assert_allclose(_Sparse(points).distances(), expected, atol=1e-6)
    whole = rerank.rerank(points)
    monkeypatch.setattr(rerank, "_DENSE", 0)
    of_float32 = rerank_small(points.float()[None])[0]
    for block, columns, held in ((1, 7, 0), (300, 1000, 0), (1 << 30, 1 << 30, 1 << 30)):
        monkeypatch.setattr(rerank, "_BLOCK", block)
        monkeypatch.setattr(rerank, "_COLUMNS", columns)
        monkeypatch.setattr(rerank, "_HELD", held)
        assert torch.equal(rerank.rerank(points), whole)
        torch.testing.assert_close(rerank.rerank(points.float()), of_float32, rtol=0, atol=1e-6)


@pytest.mark.parametrize("n", [2, 30, 90])
def test_equal_points_are_at_0_and_others_as_if_each_were_there_once(n):
    assert not rerank.rerank(torch.full((n, 5), 0.3)).any()
    twice = clusters(n)[torch.arange(n) // 2]
    small, sparse = rerank_small(twice[None])[0], _Sparse(twice).distances()
    assert torch.equal(small, sparse)
    assert torch.equal(small[1::2][: n // 2 - 1], small[2::2][: n // 2 - 1])


def test_of_equal_values_the_lowest_column_comes_first():
    values = torch.tensor([[0.5, 0.0, 0.5, 0.25, 0.0]])
    found, columns = rerank.smallest(values, torch.tensor([9, 4, 3, 7, 2]), 4)
    assert columns.tolist() == [[2, 4, 7, 3]] and found.tolist() == [[0.0, 0.0, 0.25, 0.5]]


def neighbours_by_loops(features: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    x = features.astype(np.float64) / np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    order = (1 - x @ x.T).round(7).argsort(1, kind="stable")[:, :k]
    found, distances = np.empty_like(order), np.empty(order.shape)
    for i, own in enumerate(order):
        d = by_loops(np.concatenate((x[i : i + 1], x[own])))
        at = d.astype(np.float32).argsort(kind="stable")
        found[i], distances[i] = own[at], d[at].clip(1e-3, 1 - 1e-3)
    return found, distances


@pytest.mark.parametrize("n", [6, 20, 90])
def test_the_graph_is_the_formulas(n, tmp_path):
    features = clusters(n, 16, seed=1).float().numpy()
    found, distances = graph.build(features, tmp_path / "g-1.npy", min(5, n), 20, CPU)
    expected, of_these = neighbours_by_loops(features, min(20, n))
    np.testing.assert_allclose(distances, of_these[:, :5], atol=1e-6)
    np.testing.assert_array_equal(found, expected[:, :5])


def test_the_graph_does_not_depend_on_how_the_work_is_divided(tmp_path, monkeypatch):
    features = clusters(700, 24).float().numpy()
    features[100:160] = features[7]  # more equal ones than are looked at: ties go to the lowest rows
    features[300:340] = features[8] * 2
    features[5], features[6, 3], features[400:440] = 0, np.nan, 1e-41
    found, distances = graph.build(features, tmp_path / "a-1.npy", 5, 20, CPU)
    assert found[120].tolist() == found[7].tolist() == [7, 100, 101, 102, 103]
    assert (found[5] == -1).all() and np.isnan(distances[6]).all()
    assert not np.isin(found, (5, 6, *range(400, 440))).any()
    for rows, columns, products, threads in ((37, 50, 1, 1), (700, 8192, 1 << 16, 2), (64, 333, 1 << 21, 2)):
        monkeypatch.setitem(graph._ROWS, "cpu", rows)
        monkeypatch.setattr(graph, "_COLUMNS", columns)
        monkeypatch.setitem(graph._PRODUCTS, "cpu", products)
        monkeypatch.setattr(graph, "_CROWDED", rows)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        graph.build(features, tmp_path / "b-1.npy", 5, 20, CPU)
        torch.set_num_threads(before)
        assert (tmp_path / "b-1.npy").read_bytes() == (tmp_path / "a-1.npy").read_bytes()
        (tmp_path / "b-1.npy").unlink()
    monkeypatch.setattr(graph, "_held", lambda features, device: torch.from_numpy(features).to(device))
    graph.build(features, tmp_path / "b-1.npy", 5, 20, CPU)
    assert (tmp_path / "b-1.npy").read_bytes() == (tmp_path / "a-1.npy").read_bytes()


@pytest.mark.parametrize("edge", ["distance", "similarity"])
def test_smoothing_is_the_formula(edge, monkeypatch):
    features, rng = clusters(80, 12).float().numpy(), np.random.default_rng(0)
    found, distances = neighbours_by_loops(features, 20)
    found, distances = found[:, :5].copy(), distances[:, :5].astype(np.float32)
    found[3], distances[3] = -1, np.nan
    found[found == 3] = -1
    texts = rng.standard_normal((80, 9)).astype(np.float32)
    a = np.zeros((80, 80))
    for i in range(80):
        for j, d in zip(found[i], distances[i], strict=True):
            if j >= 0 and j != i:
                a[i, j] = d if edge == "distance" else 1 - d
    a = np.maximum(a, a.T)
    expected = a @ texts / np.maximum(a.sum(1, keepdims=True), 1e-30)
    smoothing, rows = graph.Smoothing.of(found, distances, edge), np.array([0, 79, 3, 40, 3])
    monkeypatch.setattr(graph, "_ENTRIES", 7)
    np.testing.assert_allclose(smoothing.mean(texts, np.arange(80)), expected, atol=1e-6)
    np.testing.assert_array_equal(smoothing.mean(texts, rows), smoothing.mean(texts, np.arange(80))[rows])
    assert not smoothing.mean(texts, np.array([3])).any()


@pytest.mark.skipif(not RECORD.is_file(), reason="shared/data/capro-record is not there")
def test_what_the_published_code_gave():
    """Its graph was made in float16: weights differ by that, and near ties fall otherwise."""
    text = torch.load(RECORD, weights_only=True)["text"]
    _, labels, distances = zip(*text["anchors"]["lines"], strict=True)
    chosen = nearest(np.array(labels), np.array(distances), text["anchors"]["topk"])
    assert chosen.tolist() == list(text["anchors"]["anchor"])
    for case in text["rerank"]:
        points = torch.cat((case["class_text"][None], case["texts"]))
        points = points / points.norm(dim=1, keepdim=True)
        np.testing.assert_allclose(rerank_small(points[None])[0], case["float64"], atol=1e-5)
        np.testing.assert_allclose(_Sparse(points).distances(), case["float64"], atol=1e-5)
    theirs = text["graph"]
    found, weights = (np.stack([np.asarray(x) for x in theirs[name]]) for name in ("neighbours", "weights"))
    smoothed = graph.Smoothing.of(found, weights, "distance").mean(theirs["texts"].numpy(), np.arange(len(found)))
    np.testing.assert_allclose(smoothed, theirs["smoothed"], atol=1e-6)
    features = theirs["features"].numpy().astype(np.float32)
    scale = torch.from_numpy(graph.scales(features))
    ours, distances = graph.neighbours(features, scale, torch.arange(len(features)), 20)
    same = (ours[:, :5].numpy() == found).all(1)
    assert same.mean() >= 0.95
    np.testing.assert_allclose(distances[:, :5][same], weights[same], atol=0.01)


@pytest.mark.gpu
def test_a_gpu_finds_the_same_neighbours(tmp_path, monkeypatch):
    features = clusters(3000, 128).float().numpy()
    features[100:160] = features[7]
    found, distances = graph.build(features, tmp_path / "c-1.npy", 5, 20, CPU)
    for held in (True, False):
        if not held:
            monkeypatch.setattr(graph, "_held", lambda features, _device: features)
        ours, weights = graph.build(features, tmp_path / f"g{held}-1.npy", 5, 20, torch.device("cuda"))
        np.testing.assert_array_equal(ours, found)
        np.testing.assert_allclose(weights, distances, atol=1e-6)
    points = clusters(500).float()
    np.testing.assert_allclose(rerank.rerank(points.cuda()).cpu(), rerank.rerank(points), atol=1e-6)
