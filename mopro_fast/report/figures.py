"""The numbers of the report: thinned curves, the sample, similar prototypes."""

import base64
import itertools
import math
from bisect import bisect_left
from typing import Any

import numpy as np

from mopro_fast.data.order import place_in_class
from mopro_fast.labels import SHOWN, left, pieces, verdicts

SHARES = (0.15, 0.45, 0.4)  # of the sample
POINTS = 300  # per curve
CELLS = 128  # per side of the similarity map
_ROWS = 1 << 18  # of the images at a time


def thin(x: np.ndarray, y: np.ndarray, points: int = POINTS) -> dict[str, list]:
    """A curve of at most ``points`` points: means of neighbours, with the least and largest of what they stand for.

    Values that are not finite become None.
    """
    edges = np.linspace(0, len(x), min(len(x), points) + 1).astype(int)
    parts = [slice(a, b) for a, b in itertools.pairwise(edges)]
    curve = {"x": numbers([x[p].mean() for p in parts], 6), "y": numbers([y[p].mean() for p in parts])}
    if len(x) > points:
        curve |= {"low": numbers([y[p].min() for p in parts]), "high": numbers([y[p].max() for p in parts])}
    return curve


def numbers(values: Any, digits: int = 4) -> list[float | None]:
    """Plain floats of so many significant digits; None where not finite."""
    return [float(f"{v:.{digits}g}") if np.isfinite(v) else None for v in values]


def left_of_classes(entry: dict[str, Any]) -> dict[str, float]:
    """Of a log entry "classes": least, median and most, the shares of their images that classes have left; score."""
    try:
        images, winner = (np.array(entry[name], np.float64) for name in ("images", "winner"))
        score = np.array([np.nan if s is None else s for s in entry["score"]], np.float64)
        some, won = images > 0, winner > 0
        least, median, most = np.quantile(left(entry)[some] / images[some], [0, 0.5, 1]).tolist()
        return {
            "least": least,
            "median": median,
            "most": most,
            "score": float(np.average(score[won], weights=winner[won])),
        }
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError):  # an entry that is not whole
        return {"score": math.nan}


def sample(given: np.ndarray, new: np.ndarray, count: int, seed: int, only: np.ndarray | None = None) -> np.ndarray:
    """int64: at most ``count`` images, all verdicts, and in each the given classes in turn; sorted.

    Slots that a verdict cannot fill go to the others. only: classes that an image must have or get.
    """
    rng = np.random.default_rng(seed)
    verdict = verdicts(given, new)
    if only is not None:
        for part in pieces(len(verdict), _ROWS):
            verdict[part][~(np.isin(given[part], only) | np.isin(new[part], only))] = -1
    wanted = []
    for v in range(len(SHOWN)):
        rows = np.empty(np.count_nonzero(verdict == v), np.int32)
        end = 0
        for part in pieces(len(verdict), _ROWS):
            found = np.flatnonzero(verdict[part] == v)
            rows[end : end + len(found)] = found + part.start
            end += len(found)
        rng.shuffle(rows)
        wanted.append(_in_turn(rows, given, count))
    slots = [int(count * share) for share in SHARES]
    slots[1] += count - sum(slots)
    taken = [rows[:n] for rows, n in zip(wanted, slots, strict=True)]
    for v in (1, 2, 0):
        room = count - sum(map(len, taken))
        taken[v] = wanted[v][: len(taken[v]) + room]
    return np.sort(np.concatenate(taken)).astype(np.int64)


def _in_turn(rows: np.ndarray, given: np.ndarray, count: int) -> np.ndarray:
    """The first ``count`` of these rows where the given classes take turns, each in its own order."""
    lowest = int(given.min(initial=0))
    sizes, seen = np.zeros((2, int(given.max(initial=0)) + 1 - lowest), np.int64)

    def label(rows: np.ndarray) -> np.ndarray:
        return given[rows].astype(np.int64) - lowest

    for part in pieces(len(rows), _ROWS):
        sizes += np.bincount(label(rows[part]), minlength=len(sizes))
    turns = bisect_left(range(len(rows)), min(count, len(rows)), key=lambda turns: np.minimum(sizes, turns).sum())
    found, places = [rows[:0]], [np.empty(0, np.int64)]
    for part in pieces(len(rows), _ROWS):
        early = rows[part][seen[label(rows[part])] < turns]
        place = seen[label(early)] + place_in_class(label(early))
        found.append(early[place < turns])
        places.append(place[place < turns])
        seen += np.bincount(label(early), minlength=len(seen))
    return np.concatenate(found)[np.argsort(np.concatenate(places), kind="stable")][:count]


def similarity(prototypes: np.ndarray, cells: int = CELLS, pairs: int = 30) -> dict[str, Any]:
    """Cosines of the prototypes [C, D] that are not zero, similar classes side by side.

    ``order``: classes along both sides; ``edges``: where the map's rows begin in it, if C is above ``cells``: then a
    cell is the mean over its classes, without those of a prototype with itself. ``cosines``: base64 of int8 [rows,
    rows], 127 is 1. ``pairs``: the most similar [class, class, cosine].
    """
    from scipy.cluster.hierarchy import leaves_list, linkage

    norms = np.linalg.norm(prototypes, axis=1)
    usable = np.flatnonzero((norms > 0) & np.isfinite(norms))
    unit = prototypes[usable] / norms[usable, None]
    order = np.arange(len(usable))
    if len(usable) > 2:
        order = leaves_list(linkage(unit, "average", optimal_ordering=len(usable) <= 1000))
    unit, order = unit[order], usable[order]
    cosines = (unit @ unit.T).clip(-1, 1)

    n = len(order)
    edges = np.linspace(0, n, min(n, cells) + 1).astype(int)
    starts, sizes = edges[:-1], np.diff(edges)
    own = sizes * (sizes > 1)  # a prototype with itself counts only where it is alone
    sums = np.add.reduceat(np.add.reduceat(cosines, starts, 0), starts, 1) - np.diag(own) if n else cosines
    means = sums / np.maximum(np.outer(sizes, sizes) - np.diag(own), 1)

    upper = np.triu(np.ones((n, n), bool), 1)
    flat = np.where(upper, cosines, -2).ravel()
    top = np.argpartition(-flat, min(pairs, flat.size - 1))[:pairs] if n > 1 else np.empty(0, int)
    top = top[flat[top] > -2]
    top = top[np.argsort(-flat[top], kind="stable")]
    return {
        "order": order.tolist(),
        "edges": edges.tolist(),
        "cosines": base64.b64encode(np.rint(127 * means).astype(np.int8).tobytes()).decode(),
        "pairs": [[int(order[i // n]), int(order[i % n]), round(float(flat[i]), 3)] for i in top],
        "unused": len(prototypes) - n,
    }
