"""Which images are similar, by their features, and each text's mean over the texts of similar images.

Every image's k nearest by cosine, itself included, are re-ranked, ascending, and the first few stay, as in CAPro's
code. Cosines are sifted in float32 and decided in float64, ties by the row: the result does not depend on how the work
is divided. On a CPU it takes memory for a few numbers per image, however large the features are; a GPU with room holds
the features.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from mopro_fast.downstream import row_map
from mopro_fast.text.rerank import EQUAL, rerank_small, smallest

NEAREST, KEEP = 20, 5
_SPARE = 12  # candidates more than asked for, to be decided in float64
_ROWS = {"cpu": 1024, "cuda": 16384}  # images at a time
_CROWDED = 1024  # images decided in float64 at a time
_COLUMNS = 8192  # images that these are compared with at a time
_PRODUCTS = {"cpu": 1 << 21, "cuda": 1 << 26}  # numbers of candidates' features at a time
_ENTRIES = 1 << 15  # neighbours' vectors at a time, or a row's if it has more
_TINY = 2.0 * np.finfo(np.float32).tiny
_CLIP = 1e-3  # distances are clipped to [this, 1 - this]

Edge = Literal["distance", "similarity"]


def build(
    features: np.ndarray, path: Path, keep: int, nearest: int, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """-> neighbours int32 [n, keep], rows of the data, -1: none; their re-ranked distances float32, ascending.

    features: float32 [n, F], memory-mapped; an image whose features are not finite, or all 0, has no neighbours. path:
    where it is kept, NAME-KEY.npy; a call that was interrupted goes on from there. All ranks share the work.
    """
    scale = scales(features)
    usable = np.flatnonzero(scale)
    held, scale = _held(features, device), torch.from_numpy(scale).to(device)
    batches = [usable[i : i + _ROWS[device.type]] for i in range(0, len(usable), _ROWS[device.type])]

    @torch.inference_mode()
    def one(rows: np.ndarray) -> tuple[Tensor, Tensor]:
        found, distances = neighbours(held, scale, torch.from_numpy(rows).to(device), min(nearest, len(usable)))
        # The distances' bits; -1 stands for no neighbour, and its bits are a NaN.
        both = torch.full((2, len(rows), keep), -1, dtype=torch.int32)
        kept = min(keep, found.shape[1])
        both[0, :, :kept], both[1, :, :kept] = found[:, :kept], distances[:, :kept].view(torch.int32)
        return torch.from_numpy(rows), both.movedim(0, 1).flatten(1)

    def values(batches: list[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")  # TF32, which some containers ask for, would lose neighbours
        try:
            yield from row_map.in_order(one, ((rows,) for rows in batches), device)
        finally:
            torch.set_float32_matmul_precision(before)

    both = row_map.compute(path, len(features), 2 * keep, batches, values, dtype=np.int32, fill=-1)
    return both[:, :keep], both[:, keep:].view(np.float32)


def scales(features: np.ndarray) -> np.ndarray:
    """float64 [n]: 1/‖x‖, and 0 where x is not finite, is 0, or so small or large that float32 has no 1/‖x‖."""
    found = np.zeros(len(features))
    for first in range(0, len(features), _COLUMNS):
        norms = np.linalg.norm(features[first : first + _COLUMNS].astype(np.float64), axis=1)
        np.divide(1, norms, where=(norms > _TINY) & (norms < 1 / _TINY), out=found[first : first + _COLUMNS])
    return found


def _held(features: np.ndarray, device: torch.device) -> np.ndarray | Tensor:
    """In the GPU's memory where they take less than half of what is free there."""
    if device.type == "cuda" and 2 * features.nbytes < torch.cuda.mem_get_info(device)[0]:
        held = torch.empty(features.shape, device=device)
        for first in range(0, len(features), _COLUMNS):
            held[first : first + _COLUMNS] = torch.from_numpy(np.array(features[first : first + _COLUMNS]))
        return held
    return features


def neighbours(features: np.ndarray | Tensor, scale: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest of these rows, re-ranked, ascending; -> int32 and float32 [N, k], on the CPU.

    features: float32 [n, F]. scale: float64 [n], as from :func:`scales`, on the device that does the work. rows: int64
    [N] there.
    """
    usable = int((scale > 0).sum())
    candidates = min(k + _SPARE, usable)
    cosines, places = _sift(features, scale, rows, candidates, torch.float32)
    found, distances = _decide(features, scale, rows, places, k)
    # Where more candidates than were kept may belong to the k, as of images that are there many times
    unsure = 2.0**-22 * features.shape[1] ** 0.5
    crowded = (cosines[:, -1] >= cosines[:, k - 1] - unsure) & (candidates < usable)
    for at in crowded.nonzero()[:, 0].split(_CROWDED):
        _, places = _sift(features, scale, rows[at], k, torch.float64)
        found[at.cpu()], distances[at.cpu()] = _decide(features, scale, rows[at], places, k)
    return found, distances


def _taken(features: np.ndarray | Tensor, scale: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Unit rows; 0 where they are unusable. rows: int64 of any shape."""
    if isinstance(features, Tensor):
        x = features[rows]
    else:
        x = torch.from_numpy(features[rows.cpu().numpy()]).to(rows.device)
    some = scale[rows, None].to(dtype)
    return torch.where(some > 0, x.to(dtype) * some, 0)


def _sift(
    features: np.ndarray | Tensor, scale: Tensor, rows: Tensor, k: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The k greatest cosines of these rows and where they are, [N, k]. In float64 ties go to the lowest row."""
    own = _taken(features, scale, rows, dtype)
    best = own.new_full((len(rows), k), -2), torch.full((len(rows), k), 0x7FFFFFFF, device=rows.device)
    for columns in torch.arange(len(features), device=rows.device).split(_COLUMNS):
        cosines = own @ _taken(features, scale, columns, dtype).T
        cosines.masked_fill_(scale[columns] == 0, -2)
        if dtype == torch.float64:
            best = _nearest(torch.cat((best[0], cosines), 1), torch.cat((best[1], columns.expand(cosines.shape)), 1), k)
        else:
            some, at = cosines.topk(min(k, len(columns)))
            some, at = torch.cat((best[0], some), 1), torch.cat((best[1], columns[at]), 1)
            cosines, order = some.topk(k)
            best = cosines, at.gather(1, order)
    return best


def _nearest(cosines: Tensor, columns: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k greatest of each row in float32's precision, of equal ones the lowest column; cosines: float64 [N, m]."""
    distances = 1 - cosines
    distances, columns = smallest(torch.where(distances > EQUAL, distances, 0).float(), columns, k)
    return 1 - distances.double(), columns


def _decide(
    features: np.ndarray | Tensor, scale: Tensor, rows: Tensor, places: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """The k nearest among the candidates at ``places`` [N, m], re-ranked; int32 and float32 [N, k], on the CPU."""
    size = max(_PRODUCTS[rows.device.type] // (places.shape[1] * features.shape[1]), 1)
    parts = [
        _decided(features, scale, some, at, k) for some, at in zip(rows.split(size), places.split(size), strict=True)
    ]
    return tuple(torch.cat(x).cpu() for x in zip(*parts, strict=True))


def _decided(
    features: np.ndarray | Tensor, scale: Tensor, rows: Tensor, places: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    own = _taken(features, scale, rows, torch.float64)
    others = _taken(features, scale, places, torch.float64)
    cosines = (others @ own[:, :, None])[..., 0]
    m = torch.arange(places.shape[1], device=places.device)
    order = places.argsort(1)  # ties among candidates go to the lowest row
    at = order.gather(1, _nearest(cosines.gather(1, order), m, k)[1])
    found, others = places.gather(1, at), others.take_along_dim(at[..., None], 1)
    distances = rerank_small(torch.cat((own[:, None], others), 1))
    distances, order = distances.sort(stable=True, dim=1)
    return found.gather(1, order).int(), distances.clamp(_CLIP, 1 - _CLIP)


@dataclass(eq=False)
class Smoothing:
    """Each row's mean over its neighbours' vectors, itself left out: A ← max(A, Aᵀ), rows to sum 1, ŝ = A·s."""

    starts: np.ndarray
    """int64 [n + 1]: where each row's entries begin."""
    columns: np.ndarray
    """int32, of every entry."""
    weights: np.ndarray
    """float32, of every entry, before the rows are divided by their sums."""

    @classmethod
    def of(cls, neighbours: np.ndarray, distances: np.ndarray, edge: Edge) -> "Smoothing":
        """neighbours, distances: as from :func:`build`. edge: what an entry weighs."""
        n, keep = neighbours.shape
        i, j = np.arange(n, dtype=np.int64).repeat(keep), neighbours.ravel().astype(np.int64)
        weights = distances.ravel() if edge == "distance" else 1 - distances.ravel()
        there = (j >= 0) & (i != j)
        i, j, weights = i[there], j[there], weights[there]
        keys = np.concatenate((i * n + j, j * n + i))
        order = keys.argsort(kind="stable")
        keys, weights = keys[order], np.concatenate((weights, weights))[order]
        first = np.flatnonzero(np.diff(keys, prepend=-1))
        i, j = np.divmod(keys[first], n)
        greatest = np.maximum.reduceat(weights, first) if len(first) else weights
        return cls(np.searchsorted(i, np.arange(n + 1)), j.astype(np.int32), greatest)

    def mean(self, vectors: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """float32 [len(rows), E]; 0 of a row without neighbours. vectors: [n, E] of a float type."""
        found = np.zeros((len(rows), vectors.shape[1]), np.float32)
        counts = (self.starts[rows + 1] - self.starts[rows]).cumsum()
        first = 0
        while first < len(rows):
            done = counts[first - 1] if first else 0
            end = max(int(np.searchsorted(counts, done + _ENTRIES, side="right")), first + 1)
            some = rows[first:end]
            begin, count = self.starts[some], self.starts[some + 1] - self.starts[some]
            ends = np.append(0, count.cumsum())
            entries = np.arange(ends[-1]) + (begin - ends[:-1]).repeat(count)
            own = csr_matrix(
                (self.weights[entries].astype(np.float64), np.arange(ends[-1]), ends), (len(some), ends[-1])
            )
            sums = np.asarray(own.sum(1))
            means = own @ vectors[self.columns[entries]].astype(np.float64)
            np.divide(means, sums, where=sums > 0, out=found[first:end], casting="same_kind")
            first = end
        return found
