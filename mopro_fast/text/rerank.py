"""k-reciprocal re-ranking (Zhong et al., CVPR 2017, arXiv 1701.08398) as CAPro's code does it.

Of a query and its gallery, n points with the query first, d_ij = ‖f_i - f_j‖² divided by its row's maximum:

    R(i, k) = {j in the first k + 1 of i : i in the first k + 1 of j}
    R*(i)   = R(i, 20) and every R(j, 10), j in R(i, 20), of which more than two thirds are in R(i, 20)
    V_i     = softmax of -d_ij over R*(i), then the mean of V over the first 6 of i
    result  = 0.7·(1 - s/(2 - s)) + 0.3·d,  s_g = Σ_j min(V_qj, V_gj)

A point's own place among its neighbours counts. Distances are float32 and ties keep the order of the points; all sums
are float64, so that the result does not depend on how the work is divided. The code's own arithmetic is float16.
"""

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
    return _Sparse(points).distances()


def rerank_small(points: Tensor) -> Tensor:
    """float32 [B, n - 1]: the same of B small problems at once, by n·n masks. points: float32 or float64 [B, n, E]."""
    points, n = points.double(), points.shape[1]
    squares = points.square().sum(-1)
    d = _distances(squares[:, :, None] + squares[:, None], points @ points.mT)
    d = d / _largest(d)
    place = d.argsort(stable=True, dim=-1).argsort(-1)
    reciprocal, half = ((near & near.mT).double() for near in (place <= K1, place <= HALF))
    common = reciprocal @ half.mT  # [i, j]: |R(i, 20) and R(j, 10)|
    taken = reciprocal * (3 * common > 2 * half.sum(-1)[:, None])
    v = torch.exp(-d.double()) * (reciprocal + taken @ half > 0)
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


class _Sparse:
    """Many points: lists of 21 neighbours, and of V only the columns in which the query's is not 0."""

    def __init__(self, points: Tensor) -> None:
        n, k = len(points), min(K1 + 1, len(points))
        self.points = points.double() if points.numel() < _HELD else points
        columns, nearest, largest = torch.arange(n, device=points.device), [], []
        for rows in columns.split(max(_BLOCK // n, 1)):
            d = self.squared(rows)
            largest.append(_largest(d))
            nearest.append(smallest(d / largest[-1], columns, k)[1])
        self.largest = torch.cat(largest)  # float32 [n, 1], of each row of the squared distances
        self.nearest = torch.cat(nearest)  # int64 [n, 21], ascending
        self.reciprocal = self._reciprocal(self.nearest)  # int64 [n, 21]: R(i, 20); -1: not in it
        self.half = self._reciprocal(self.nearest[:, : HALF + 1])  # int64 [n, 11]: R(i, 10)

    def squared(self, rows: Tensor) -> Tensor:
        """float32 [N, n]: ‖f_i - f_j‖² of these rows."""
        own = self.points[rows].double()
        squares = own.square().sum(-1)[:, None]
        parts = []
        for some in self.points.split(_COLUMNS):
            some = some.double()
            parts.append(_distances(some.square().sum(-1) + squares, own @ some.T))
        return torch.cat(parts, 1)

    def scaled(self, rows: Tensor) -> Tensor:
        """float32 [N, n]: d of these rows."""
        return self.squared(rows) / self.largest[rows]

    @staticmethod
    def _reciprocal(nearest: Tensor) -> Tensor:
        """int64 [n, k]: ``nearest`` with -1 for points that i is not among the nearest of."""
        rows = torch.arange(len(nearest), device=nearest.device)
        parts = [
            torch.where((nearest[nearest[some]] == some[:, None, None]).any(-1), nearest[some], -1)
            for some in rows.split(max(_BLOCK // nearest.shape[1] ** 2, 1))
        ]
        return torch.cat(parts)

    def v(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The members of R* of these rows, int64 [N, m], padded with -1; and V before the mean, float64, there 0."""
        own = self.reciprocal[rows]  # [N, 21]
        further = self._further(own)  # [N, 21, 11]
        common = (further[..., None] == own[:, None, None]).any(-1) & (further >= 0)
        taken = 3 * common.sum(-1) > 2 * (further >= 0).sum(-1)
        new = torch.where(taken[..., None] & ~common, further, -1).flatten(1).sort(-1, descending=True).values
        new = new[:, : int((new >= 0).sum(-1).max())]
        again = new[:, 1:] == new[:, :-1]
        new[:, 1:] = torch.where(again, -1, new[:, 1:])
        members = torch.cat((own, new), 1)
        d = self.scaled(rows).gather(1, members.clamp(min=0))
        v = torch.where(members >= 0, torch.exp(-d.double()), 0)
        return members, v / v.sum(-1, keepdim=True).clamp(min=1e-300)

    def _further(self, reciprocal: Tensor) -> Tensor:
        """int64 [N, 21, 11]: R(j, 10) of every j in these lists [N, 21]; -1: no point."""
        return torch.where(reciprocal[..., None] >= 0, self.half[reciprocal], -1)

    def distances(self) -> Tensor:
        n, device = len(self.points), self.points.device
        own = torch.zeros(n, dtype=torch.float64, device=device)
        members, v = self.v(self.nearest[0, :K2])
        own.index_add_(0, members[members >= 0], v[members >= 0] / min(K2, n))
        support = own.nonzero()[:, 0]
        place = torch.full((n,), -1, device=device)  # of a point among the support
        place[support] = torch.arange(len(support), device=device)
        entries = []  # row, place and value of V
        for rows in torch.arange(n, device=device).split(max(_BLOCK // max(n, (K1 + 1) ** 2 * (HALF + 1)), 1)):
            near = self.reciprocal[rows]
            meets = torch.cat((near, self._further(near).flatten(1)), 1)
            rows = rows[((meets >= 0) & (own[meets] > 0)).any(-1)]  # a few more than those whose V meets the query's
            if len(rows):
                members, v = self.v(rows)
                wanted = (members >= 0) & (place[members] >= 0)
                entries.append((rows[wanted.nonzero()[:, 0]], place[members[wanted]], v[wanted]))
        row, column, value = (torch.cat(x) for x in zip(*entries, strict=True))
        s = torch.zeros(n, dtype=torch.float64, device=device)
        width = max(_BLOCK // n, 16)
        for start in range(0, len(support), width):
            some = support[start : start + width]
            inside = (column >= start) & (column < start + width)
            dense = torch.zeros(n, len(some), dtype=torch.float64, device=device)
            dense[row[inside], column[inside] - start] = value[inside]
            mean = sum(dense[near] for near in self.nearest[:, :K2].T) / min(K2, n)
            s += torch.minimum(mean, own[some]).sum(-1)
        to_query = self.scaled(torch.zeros(1, dtype=torch.int64, device=device))[0]
        return _result(s[1:], to_query[1:])
