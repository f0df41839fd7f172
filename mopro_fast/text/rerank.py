"""k-reciprocal re-ranking (Zhong et al., CVPR 2017, arXiv 1701.08398) as CAPro's code does it.

Of a query and its gallery, n points with the query first, d_ij = ‖f_i - f_j‖² divided by its row's maximum:

    R(i, k) = {j in the first k + 1 of i : i in the first k + 1 of j}
    R*(i)   = R(i, 20) and every R(j, 10), j in R(i, 20), of which more than two thirds are in R(i, 20)
    V_i     = softmax of -d_ij over R*(i), then the mean of V over the first 6 of i
    result  = 0.7·(1 - s/(2 - s)) + 0.3·d,  s_g = Σ_j min(V_qj, V_gj)

A point's own place among its neighbours counts. Distances are float32 and ties keep the order of the points; all sums
are float64, so that the result does not depend on how the work is divided. The code's own arithmetic is float16.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

K1, HALF, K2, WEIGHT = 20, 10, 6, 0.3  # k1, round(k1/2), k2, λ
EQUAL = 1e-12  # ‖a - b‖² / (‖a‖² + ‖b‖²) that float64's rounding explains
_DENSE = 64  # points up to which [n, n] masks are the fastest
_BLOCK = 1 << 22  # distances at a time
_HELD = 1 << 25  # numbers of points up to which all are kept in float64
_COLUMNS = 1 << 14  # points taken to float64 at a time


def rerank(points: Tensor) -> Tensor:
    """float32 [n - 1]: the distance of the first point to each other one. points: float32 or float64 [n, E]."""
    if len(points) <= _DENSE:
        return rerank_small(points[None])[0]
    return _Sparse.of(points).distances()


def rerank_small(points: Tensor) -> Tensor:
    """float32 [B, n - 1]: the same of B small problems at once, by n·n masks. points: float32 or float64 [B, n, E]."""
    points, n = points.double(), points.shape[1]
    squares = points.square().sum(-1)
    d = _distances(squares[:, :, None] + squares[:, None], points @ points.mT)
    d = d / _largest(d)
    place = d.argsort(stable=True, dim=-1).argsort(-1)
    first, half = place <= K1, place <= HALF
    first, half = (first & first.mT).double(), (half & half.mT).double()
    common = first @ half.mT  # [i, j]: |R(i, 20) and R(j, 10)|
    taken = first * (3 * common > 2 * half.sum(-1)[:, None])
    v = torch.exp(-d.double()) * (first + taken @ half > 0)
    v = v / v.sum(-1, keepdim=True).clamp(min=1e-300)
    v = (place < K2).double() @ v / min(K2, n)
    return _result(torch.minimum(v[:, :1], v[:, 1:]).sum(-1), d[:, 0, 1:])


def _result(s: Tensor, d: Tensor) -> Tensor:
    s = torch.where(1 - s > EQUAL, s, 1)  # of equal points, exactly
    return ((1 - WEIGHT) * (1 - s / (2 - s)) + WEIGHT * d.double()).float()


def _distances(squares: Tensor, products: Tensor) -> Tensor:
    """float32, at least 0. squares: ‖a‖² + ‖b‖². Equal points are at 0, without the rounding that a row's maximum
    would make large where all points are equal."""
    d = squares.sub(products, alpha=2)
    return torch.where(d > EQUAL * squares, d, 0).float()


def _largest(d: Tensor) -> Tensor:
    largest = d.amax(-1, keepdim=True)
    return torch.where(largest > 0, largest, 1)


def smallest(values: Tensor, columns: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest of each row, ascending, of equal ones the lowest column; -> float32 and int64 [N, k].

    values: float32 [N, m], at least 0. columns: int64 [m] or [N, m], their numbers, below 2³¹.
    """
    keys = (values.view(torch.int32).long() << 32 | columns).topk(k, -1, largest=False).values
    return (keys >> 32).int().view(torch.float32), keys & 0x7FFFFFFF


@dataclass(eq=False)
class _Sparse:
    """Many points: lists of 21 neighbours, and of V only the columns in which the query's is not 0."""

    points: Tensor  # [n, E]
    largest: Tensor  # float32 [n, 1], of each row of d
    to_query: Tensor  # float32 [n], d from the query
    first: Tensor  # int64 [n, 21], ascending
    near: Tensor  # int64 [n, 21]: R(i, 20); -1: not in it
    half: Tensor  # int64 [n, 11]: R(i, 10)

    @classmethod
    def of(cls, points: Tensor) -> "_Sparse":
        n, k = len(points), min(K1 + 1, len(points))
        points = points.double() if points.numel() < _HELD else points
        found = cls(points, points.new_ones(n, 1, dtype=torch.float32), *[torch.empty(0)] * 4)
        columns, first, largest = torch.arange(n, device=points.device), [], []
        for rows in columns.split(max(_BLOCK // n, 1)):
            d = found.scaled(rows)
            largest.append(_largest(d))
            first.append(smallest(d / largest[-1], columns, k)[1])
        found.largest, found.first = torch.cat(largest), torch.cat(first)
        found.to_query = found.scaled(columns[:1])[0]
        found.near, found.half = (found._reciprocal(found.first[:, : some + 1]) for some in (K1, HALF))
        return found

    def scaled(self, rows: Tensor) -> Tensor:
        """float32 [N, n]: d of these rows."""
        own = self.points[rows].double()
        squares = own.square().sum(-1)[:, None]
        parts = []
        for some in self.points.split(_COLUMNS):
            some = some.double()
            parts.append(_distances(some.square().sum(-1) + squares, own @ some.T))
        return torch.cat(parts, 1) / self.largest[rows]

    def _reciprocal(self, first: Tensor) -> Tensor:
        """int64 [n, k]: ``first`` with -1 for those that i is not among the first of."""
        rows = torch.arange(len(first), device=first.device)
        parts = [
            torch.where((first[first[some]] == some[:, None, None]).any(-1), first[some], -1)
            for some in rows.split(max(_BLOCK // first.shape[1] ** 2, 1))
        ]
        return torch.cat(parts)

    def v(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The members of R* of these rows, int64 [N, m], padded with -1; and V before the mean, float64, there 0."""
        near = self.near[rows]  # [N, 21]
        more = torch.where(near[..., None] >= 0, self.half[near], -1)  # [N, 21, 11]
        there = (more[..., None] == near[:, None, None]).any(-1) & (more >= 0)
        taken = 3 * there.sum(-1) > 2 * (more >= 0).sum(-1)
        more = torch.where(taken[..., None] & ~there, more, -1).flatten(1).sort(-1, descending=True).values
        more = more[:, : int((more >= 0).sum(-1).max())]
        again = more[:, 1:] == more[:, :-1]
        more[:, 1:] = torch.where(again, -1, more[:, 1:])
        members = torch.cat((near, more), 1)
        d = self.scaled(rows).gather(1, members.clamp(min=0))
        v = torch.where(members >= 0, torch.exp(-d.double()), 0)
        return members, v / v.sum(-1, keepdim=True).clamp(min=1e-300)

    def distances(self) -> Tensor:
        n, device = len(self.points), self.points.device
        own = torch.zeros(n, dtype=torch.float64, device=device)
        members, v = self.v(self.first[0, :K2])
        own.index_add_(0, members[members >= 0], v[members >= 0] / min(K2, n))
        support = own.nonzero()[:, 0]
        place = torch.full((n,), -1, device=device)  # of a point among the support
        place[support] = torch.arange(len(support), device=device)
        entries = []  # row, place and value of V
        for rows in torch.arange(n, device=device).split(max(_BLOCK // max(n, (K1 + 1) ** 2 * (HALF + 1)), 1)):
            reach = self.near[rows]
            further = torch.where(reach[..., None] >= 0, self.half[reach], -1).flatten(1)
            meets = torch.cat((reach, further), 1)
            rows = rows[((meets >= 0) & (own[meets] > 0)).any(-1)]  # a few more than those whose V meets the query's
            if len(rows):
                members, v = self.v(rows)
                wanted = (members >= 0) & (place[members] >= 0)
                entries.append((rows[wanted.nonzero()[:, 0]], place[members[wanted]], v[wanted]))
        row, column, value = (torch.cat(x) for x in zip(*entries, strict=True))
        s = torch.zeros(n, dtype=torch.float64, device=device)
        first = self.first[:, :K2]
        width = max(_BLOCK // n, 16)
        for start in range(0, len(support), width):
            some = support[start : start + width]
            inside = (column >= start) & (column < start + width)
            dense = torch.zeros(n, len(some), dtype=torch.float64, device=device)
            dense[row[inside], column[inside] - start] = value[inside]
            mean = sum(dense[first[:, i]] for i in range(first.shape[1])) / min(K2, n)
            s += torch.minimum(mean, own[some]).sum(-1)
        return _result(s[1:], self.to_query[1:])
