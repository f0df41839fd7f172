"""ops.collective_targets and ops.soft_neighbour_labels against loops over rows and keys."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from mopro_fast import ops
from mopro_fast.ops import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# N, Q, C, D: single ones, sizes that divide nothing, more classes than keys
SHAPES = [(1, 1, 1, 1), (3, 7, 5, 4), (5, 11, 29, 8), (17, 33, 2, 16)]
# Relative RMS against float64. A softmax takes over the absolute error of its scores (up to 10, so 1e-6 in float32).
# Operands of 16 bits are rounded by up to 2^-9 and 2^-12, the scores by some of that times 10.
TOLERANCE = {None: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


pytestmark = pytest.mark.usefixtures("nan_filled_memory")


def inputs(n, q, c, d, seed=0, dtype=torch.float32):
    """z, keys, aux_weight, prototypes; some keys are near to rows, some prototypes are zeros."""
    g = torch.Generator().manual_seed(seed)
    z, keys, weight, prototypes = (torch.randn(rows, d, generator=g) for rows in (n, q, c, c))
    keys[::3] += 2 * z[torch.arange(len(keys[::3])) % n]
    z, keys, prototypes = (F.normalize(x, dim=1) for x in (z, keys, prototypes))
    prototypes[1::4] = 0
    return [x.to(DEVICE, dtype) for x in (z, keys, weight, prototypes)]


def softmax(scores):
    shares = [math.exp(s - max(scores)) for s in scores]
    return [s / sum(shares) for s in shares]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def values_of(keys, aux_weight, prototypes, alpha, temperature):
    keys, aux_weight, prototypes = (x.double().tolist() for x in (keys, aux_weight, prototypes))
    found = []
    for k in keys:
        by_classifier = softmax([dot(w, k) for w in aux_weight])
        by_prototypes = softmax([dot(p, k) / temperature for p in prototypes])
        found.append([alpha * a + (1 - alpha) * b for a, b in zip(by_classifier, by_prototypes, strict=True)])
    return found


def mean_by_loops(z, keys, values, temperature, weights):
    found = []
    for row in z.double().tolist():
        total, mean = 0.0, [0.0] * len(values[0])
        for key, value in zip(keys.double().tolist(), values, strict=True):
            s = dot(row, key)
            u = min(max(s, 0.0), 1.0) + 1e-7 if weights == "linear" else math.exp(s / temperature)
            total += u
            mean = [m + u * v for m, v in zip(mean, value, strict=True)]
        found.append([m / total for m in mean])
    return torch.tensor(found, dtype=torch.float64)


def error(found, expected):
    assert found.shape == expected.shape and found.isfinite().all()
    return float((found.double().cpu() - expected).norm() / expected.norm())


@pytest.mark.parametrize("slice_values", [1, 40, 2**23])
@pytest.mark.parametrize("weights", ["linear", "softmax"])
@pytest.mark.parametrize("n, q, c, d", SHAPES)
def test_targets_are_those_of_the_loops(n, q, c, d, weights, slice_values, monkeypatch):
    monkeypatch.setattr(reference, "SLICE_VALUES", slice_values)
    z, keys, aux_weight, prototypes = given = inputs(n, q, c, d)
    for alpha, temperature in [(0.5, 0.1), (0.0, 0.3), (1.0, 0.1)]:
        settings = {"alpha": alpha, "temperature": temperature, "weights": weights}
        values = values_of(keys, aux_weight, prototypes, alpha, temperature)
        expected = mean_by_loops(z, keys, values, temperature, weights)
        for dtype, tolerance in TOLERANCE.items():
            found = ops.collective_targets(*given, **settings, dtype=dtype)
            assert found.dtype == torch.float32 and error(found, expected) < tolerance
            assert (found.sum(1) - 1).abs().max() < 1e-6 and found.min() >= 0
        exact = ops.collective_targets(*(x.double() for x in given), **settings)
        assert exact.dtype == torch.float64 and error(exact, expected) < 1e-13


@pytest.mark.parametrize("slice_values", [30, 2**23])
@pytest.mark.parametrize("weights", ["linear", "softmax"])
def test_labels_of_neighbours_are_those_of_the_loops(weights, slice_values, monkeypatch):
    monkeypatch.setattr(reference, "SLICE_VALUES", slice_values)
    for n, q, c, d in SHAPES:
        z, keys, _, _ = inputs(n, q, c, d)
        z = 1.5 * z  # so that some similarities are above 1
        values = torch.rand(q, c, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            z, keys, values = (x.to(dtype) for x in (z, keys, values))
            found = ops.soft_neighbour_labels(z, keys, values, temperature=0.2, weights=weights)
            expected = mean_by_loops(z, keys, values.double().tolist(), 0.2, weights)
            assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert error(found, expected) < TOLERANCE[None]


@pytest.mark.parametrize("weights", ["linear", "softmax"])
def test_targets_are_labels_of_neighbours_with_values_made_by_hand(weights):
    z, keys, aux_weight, prototypes = inputs(9, 50, 6, 16)
    values = 0.3 * (keys @ aux_weight.T).softmax(1) + 0.7 * (keys @ prototypes.T / 0.1).softmax(1)
    found = ops.collective_targets(
        z, keys, aux_weight, prototypes, alpha=0.3, temperature=0.1, weights=weights
    )  # fmt: skip
    by_hand = ops.soft_neighbour_labels(z, keys, values, temperature=0.1, weights=weights)
    torch.testing.assert_close(found, by_hand, rtol=1e-5, atol=1e-7)


def test_defaults_are_those_of_the_papers():
    z, keys, aux_weight, prototypes = inputs(4, 12, 6, 8)
    settings = {"alpha": 0.5, "temperature": 0.1}
    linear = ops.collective_targets(z, keys, aux_weight, prototypes, **settings, weights="linear")
    assert torch.equal(ops.collective_targets(z, keys, aux_weight, prototypes, **settings), linear)
    values = torch.eye(6, device=DEVICE).repeat(2, 1)
    expected = (z @ keys.T / 0.1).softmax(1) @ values  # PAWS, τ = 0.1
    torch.testing.assert_close(ops.soft_neighbour_labels(z, keys, values), expected)


def test_prototypes_of_zeros_say_nothing():
    z, keys, aux_weight, prototypes = inputs(5, 20, 7, 8)
    settings = {"alpha": 0.4, "temperature": 0.1}
    found = ops.collective_targets(z, keys, aux_weight, 0 * prototypes, **settings)
    by_classifier = ops.collective_targets(z, keys, aux_weight, prototypes, alpha=1.0, temperature=0.1)
    torch.testing.assert_close(found, 0.4 * by_classifier + 0.6 / 7)
    neither = ops.collective_targets(z, keys, 0 * aux_weight, 0 * prototypes, **settings)
    torch.testing.assert_close(neither, torch.full_like(neither, 1 / 7))


def test_rows_that_no_key_resembles_get_the_mean_of_all():
    z, keys, aux_weight, prototypes = inputs(2, 30, 5, 8)
    keys = keys - 2 * (keys @ z[0])[:, None].clamp(min=0) * z[0]  # on the other side of row 0
    assert (keys @ z[0]).max() < 1e-6
    values = torch.tensor(values_of(keys, aux_weight, prototypes, 0.5, 0.1), dtype=torch.float64)
    for dtype in (None, torch.bfloat16, torch.float16):  # 1e-7 is no number of float16, but near to one
        found = ops.collective_targets(
            z[:1], keys, aux_weight, prototypes, alpha=0.5, temperature=0.1, dtype=dtype
        )  # fmt: skip
        assert error(found[0], values.mean(0)) < max(2e-2, TOLERANCE[dtype])


def test_softmax_weights_need_no_unit_length():
    z, keys, _, _ = inputs(4, 9, 3, 8)
    z, keys = 50 * z, 30 * keys  # scores of up to 15,000
    values = torch.eye(9, device=DEVICE)
    found = ops.soft_neighbour_labels(z, keys, values, temperature=0.1)
    torch.testing.assert_close(found, (z.double() @ keys.double().T / 0.1).softmax(1).float(), rtol=1e-2, atol=1e-5)
    expected = values[(z @ keys.T).argmax(1)]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_what_is_no_number_stays_in_its_row():
    z, keys, aux_weight, prototypes = inputs(4, 9, 3, 8)
    z[2] = float("nan")
    for weights in ("linear", "softmax"):
        settings = {"alpha": 0.5, "temperature": 0.1, "weights": weights}
        found = ops.collective_targets(z, keys, aux_weight, prototypes, **settings)
        assert found.isfinite().all(1).tolist() == [True, True, False, True]


def test_no_rows():
    z, keys, aux_weight, prototypes = inputs(1, 9, 3, 8)
    for weights, dtype in itertools.product(("linear", "softmax"), TOLERANCE):
        settings = {"alpha": 0.5, "temperature": 0.1, "weights": weights, "dtype": dtype}
        assert ops.collective_targets(z[:0], keys, aux_weight, prototypes, **settings).shape == (0, 3)
        assert ops.soft_neighbour_labels(z[:0], keys, keys, weights=weights).shape == (0, 8)


def test_no_gradient_and_equal_bits():
    given = [x.requires_grad_() for x in inputs(40, 300, 30, 16)]
    settings = {"alpha": 0.5, "temperature": 0.1}
    for dtype in TOLERANCE:
        found, again = (ops.collective_targets(*given, **settings, dtype=dtype) for _ in range(2))
        assert torch.equal(found, again) and not found.requires_grad
    found, again = (ops.soft_neighbour_labels(given[0], given[1], given[1]) for _ in range(2))
    assert torch.equal(found, again) and not found.requires_grad


class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
    """The most values of a tensor that appears."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor) and not func.is_view:
                self.largest = max(self.largest, x.numel())
        return out


@pytest.mark.parametrize("n, q, c", [(3, 500, 40), (40, 500, 3)])
def test_nothing_as_large_as_the_queue_by_classes_or_rows_is_stored(n, q, c, monkeypatch):
    z, keys, aux_weight, prototypes = inputs(n, q, c, 2)
    values = torch.ones(q, c, device=DEVICE)
    for slice_values, most in ((1200, 1200), (2**23, q * max(n, c))):
        monkeypatch.setattr(reference, "SLICE_VALUES", slice_values)
        for dtype in (None, torch.bfloat16):
            with Sizes() as sizes:
                reference.collective_targets(z, keys, aux_weight, prototypes, 0.5, 0.1, "softmax", dtype)
            assert sizes.largest == most
        with Sizes() as sizes:
            reference.soft_neighbour_labels(z, keys, values, 0.1, "linear")
        assert sizes.largest <= most
