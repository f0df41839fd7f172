"""ops.batch_norm_relu_pool on both backends against float64 and against the ops that it joins."""

import importlib
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from test_batch_norm_act import EPS, MOMENTUM, TOLERANCE, plain
from test_ops import BF16, DEVICE, F16, F32, ROUNDING, rms_error

from mopro_fast import ops
from mopro_fast.models.resnet import ResNet

# N, C, H, W, group: a window at every border, one line, one column, several blocks of a line, channels, groups, no rows
SHAPES = [
    (4, 3, 1, 2, 2), (6, 5, 2, 1, 0), (4, 2, 3, 3, 2), (3, 3, 4, 5, 0), (2, 7, 5, 4, 1), (4, 3, 6, 6, 2),
    (2, 3, 3, 37, 1), (2, 65, 9, 3, 0), (0, 3, 2, 2, 0), (0, 3, 3, 2, 2),
]  # fmt: skip

pytestmark = pytest.mark.usefixtures("nan_filled_memory")


@pytest.fixture(params=["reference", "triton"])
def backend(request):
    with ops.use_backend(request.param):
        yield request.param


def inputs(n, channels, height, width, dtype, seed=0):
    """-> x, dy, [weight (of both signs), bias], [running mean, variance]"""
    g = torch.Generator().manual_seed(seed + n + channels)
    x = 3 * torch.randn(n, channels, height, width, generator=g) + 2
    dy = torch.randn(n, channels, (height + 1) // 2, (width + 1) // 2, generator=g)
    x, dy = (t.to(DEVICE, dtype, memory_format=torch.channels_last) for t in (x, dy))
    parameters, running = torch.randn(2, 2, channels, generator=g).to(DEVICE)
    return x, dy, list(parameters), [running[0], running[1].abs()]


def pooled(x):
    return F.max_pool2d(x, 3, 2, 1) if x.numel() else x[:, :, ::2, ::2]


def check(n, channels, height, width, group, dtype, lay_out=lambda x: x):
    x, dy, parameters, running = inputs(n, channels, height, width, dtype)
    x, dy = lay_out(x), lay_out(dy)
    exact = [t.double().requires_grad_() for t in (x, *parameters)]
    z, want, *want_running = plain(*exact, *(t.double() for t in running), None, True, group)
    want = pooled(want)
    dy = torch.where(pooled(z).abs() < 1e-3, 0, dy)  # no rounding may decide on which side of the ReLU a maximum is
    want_grads = torch.autograd.grad(want, exact, dy.double())

    mine = [t.requires_grad_() for t in (x, *parameters)]
    y = ops.batch_norm_relu_pool(*mine, *running, group=group, momentum=MOMENTUM, eps=EPS)
    grads = torch.autograd.grad(y, mine, dy)
    assert y.dtype == dtype and y.shape == want.shape and y.is_contiguous(memory_format=torch.channels_last)
    assert rms_error(y.detach(), want.detach()) < TOLERANCE + ROUNDING[dtype]
    assert all(rms_error(a, b) < TOLERANCE for a, b in zip(running, want_running, strict=True))
    assert grads[0].dtype == dtype and grads[0].is_contiguous(memory_format=torch.channels_last)
    assert rms_error(grads[0], want_grads[0]) < TOLERANCE + ROUNDING[dtype]
    for grad, wanted in zip(grads[1:], want_grads[1:], strict=True):
        assert grad.dtype == F32 and rms_error(grad, wanted) < TOLERANCE


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("shape", SHAPES)
def test_batch_norm_relu_pool(shape, dtype):
    check(*shape, dtype)


@pytest.mark.medium
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("n, group", [(5, 0), (4, 2)])
@pytest.mark.parametrize("height", [13, 14])
def test_splits_of_many_lines(height, n, group, monkeypatch):
    """A split begins in the middle of an image, forward's elsewhere than backward's, and walks into the next image."""
    for name in ("batch_norm_relu_pool", "batch_norm_stats"):
        module = importlib.import_module(f"mopro_fast.kernels.{name}")  # the package has ops of some of these names
        monkeypatch.setattr(module, "programs", lambda _: 1)
    check(n, 5, height, 17, group, F32)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("lay_out", [torch.Tensor.contiguous, lambda x: torch.cat([x, x], 3)[:, :, :, ::2]])
def test_other_strides_become_channels_last(lay_out):
    check(6, 5, 4, 6, 3, F32, lay_out)


def run(function, x, dy, parameters, running, group):
    x, *parameters = (t.clone().requires_grad_() for t in (x, *parameters))
    running = [t.clone() for t in running]
    y = function(x, *parameters, *running, group=group)
    return [y.detach(), *torch.autograd.grad(y, (x, *parameters), dy), *running]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_the_same_bits_as_the_ops_that_it_joins(dtype):
    x, dy, parameters, running = inputs(6, 17, 9, 20, dtype)
    x = x.mul(4).round().div(4)  # equal values in most windows
    mine = run(ops.batch_norm_relu_pool, x, dy, parameters, running, 3)
    theirs = run(lambda *a, **k: F.max_pool2d(ops.batch_norm_act(*a, **k), 3, 2, 1), x, dy, parameters, running, 3)
    assert torch.equal(mine[0], theirs[0])
    assert torch.equal(mine[4], theirs[4]) and torch.equal(mine[5], theirs[5])
    if dtype == F32:  # in 16 bits a gradient is rounded between the two, and outputs are equal whose x are not
        for a, b in zip(mine[1:4], theirs[1:4], strict=True):
            assert rms_error(a, b) < TOLERANCE


@pytest.mark.usefixtures("backend")
def test_of_equal_values_the_first_counts():
    """Window (1, 1) of each image has its largest x at two places."""
    pairs = [(first, second) for first in range(9) for second in range(first + 1, 9)]
    x = torch.zeros(len(pairs), 1, 5, 5, device=DEVICE)
    for image, pair in zip(x, pairs, strict=True):
        for place in pair:
            image[0, 1 + place // 3, 1 + place % 3] = 1
    y, x_max, indices = keep(x, [torch.ones(1, device=DEVICE), torch.zeros(1, device=DEVICE)])
    assert (y[:, 0, 1, 1] > 0).all() and (x_max[:, 0, 1, 1] == 1).all()
    assert indices[:, 0, 1, 1].tolist() == [first for first, _ in pairs]


def keep(x, parameters, keep=True):
    stats = torch.ops.mopro_fast.batch_norm_stats_(x, *torch.ones(2, x.shape[1], device=DEVICE), 0.1, EPS, 0)
    return torch.ops.mopro_fast.batch_norm_relu_pool(x, *stats, *parameters, keep)


@pytest.mark.usefixtures("backend")
def test_what_is_kept_is_where_the_maximum_is():
    x, _, parameters, _ = inputs(3, 8, 7, 10, BF16)
    y, x_max, indices = keep(x, parameters)
    assert indices.dtype == torch.uint8 and x_max.dtype == BF16
    for t in (x_max, indices):
        assert t.shape == y.shape and t.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(indices == 9, y <= 0) and 0.02 < (indices == 9).float().mean() < 0.6
    padded = F.pad(x, (1, 2, 1, 2))
    for i, place in torch.cartesian_prod(torch.arange(y.numel()), torch.arange(9)).tolist():
        n, channel, h, w = (int(k) for k in torch.unravel_index(torch.tensor(i), y.shape))
        if indices[n, channel, h, w] == place:
            assert padded[n, channel, 2 * h + place // 3, 2 * w + place % 3] == x_max[n, channel, h, w]
    alone, *nothing = keep(x, parameters, keep=False)
    assert torch.equal(alone, y) and all(t.numel() == 0 for t in nothing)


@pytest.mark.usefixtures("backend")
def test_without_a_gradient_to_come_nothing_is_kept():
    x, _, parameters, running = inputs(4, 3, 4, 4, F32)
    seen = []

    class Calls(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "pool" in str(func):
                seen.append(args[-1])
            return func(*args, **(kwargs or {}))

    with Calls():
        ops.batch_norm_relu_pool(x, *parameters, *running)
        parameters[0].requires_grad_()
        ops.batch_norm_relu_pool(x, *parameters, *running)
        with torch.no_grad():
            ops.batch_norm_relu_pool(x, *parameters, *running)
    assert seen == [False, True, False]
    y, _, _ = keep(x, parameters, keep=False)
    with pytest.raises(RuntimeError, match="no gradient where it was called with keep=False"):
        y.sum().backward()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_second_gradient_is_added(dtype):
    x, dy, parameters, _ = inputs(4, 20, 9, 11, dtype)
    dy2 = torch.randn(dy.shape, generator=torch.Generator().manual_seed(8)).to(DEVICE, dtype)  # contiguous
    stats = torch.ops.mopro_fast.batch_norm_stats_(x, *torch.ones(2, 20, device=DEVICE), 0.1, EPS, 2)
    _, x_max, indices = torch.ops.mopro_fast.batch_norm_relu_pool(x, *stats, *parameters, True)

    def backward(dy, dy2):
        return torch.ops.mopro_fast.batch_norm_relu_pool_backward(dy, dy2, x, x_max, indices, *stats, *parameters)

    found, wanted = backward(dy, dy2), backward(dy + dy2, None)  # rounded both; the interpreter cuts bfloat16 off
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b) or (dtype == BF16 and DEVICE == "cpu" and rms_error(a, b) < 3 * ROUNDING[BF16])
    assert not torch.equal(found[0], backward(dy, None)[0])


@pytest.mark.usefixtures("backend")
def test_a_forked_output_has_the_gradients_of_its_readers():
    x, dy, parameters, running = inputs(4, 20, 9, 11, F32)
    found = []
    for fork in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, *parameters)]
        y = ops.batch_norm_relu_pool(*leaves, *(t.clone() for t in running), group=2, fork=fork, one_launch=fork)
        y, other = y if fork else (y, y)
        both = torch.autograd.grad((y + 0.5 * other).mul(dy).sum(), leaves, retain_graph=True)
        found.append([y.detach(), *both, *torch.autograd.grad(other, leaves, dy)])
    for a, b in zip(*found, strict=True):
        assert rms_error(a, b) < TOLERANCE
    with torch.no_grad():
        y, other = ops.batch_norm_relu_pool(x, *parameters, *running, fork=True)
    assert y is other


@pytest.mark.usefixtures("backend")
@pytest.mark.filterwarnings("ignore:invalid value")  # the interpreter's
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_what_is_no_number_is_not_hidden(value):
    x, dy, parameters, running = inputs(4, 2, 5, 6, F32)
    x[3, 1, 2, 2] = float(value)
    y, dx, dweight, dbias, *_ = run(ops.batch_norm_relu_pool, x, dy, parameters, running, 2)
    for t in (y, dx):
        assert t[2:, 1].isnan().all() and not t[:2].isnan().any() and not t[:, 0].isnan().any()
    assert dweight.isnan().tolist() == [False, True] and not dbias.isnan().any()


@pytest.mark.medium
@pytest.mark.usefixtures("backend")
def test_the_same_bits_twice_and_the_same_as_compiled():
    torch.use_deterministic_algorithms(False)
    given = (*inputs(6, 20, 9, 9, F32), 3)
    compiled = torch.compile(ops.batch_norm_relu_pool, fullgraph=True, backend="aot_eager")
    results = run(ops.batch_norm_relu_pool, *given), run(ops.batch_norm_relu_pool, *given), run(compiled, *given)
    for a, b, c in zip(*results, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_gradcheck():
    g = torch.Generator().manual_seed(4)
    x = torch.randn(4, 3, 4, 3, generator=g).double().requires_grad_()
    weight, bias = (torch.tensor(t, dtype=torch.float64).requires_grad_() for t in ([0.5, 2, -1], [0.3, 0.1, 1]))

    def function(x, weight, bias):
        return ops.batch_norm_relu_pool(x, weight, bias, *torch.zeros(2, 3, dtype=torch.float64), group=2)

    assert torch.autograd.gradcheck(function, (x, weight, bias))


MISTAKES = {
    "x must have shape [N, C, H, W], got [4, 3]": {"x": torch.zeros(4, 3)},
    "weight must have shape [3], got [4]": {"weight": torch.zeros(4)},
    "bias must be float32, got bfloat16": {"bias": torch.zeros(3).bfloat16()},
    "running_mean must be on cpu, got meta": {"running_mean": torch.zeros(3, device="meta")},
    "group must divide the 4 rows of x, got 3": {"group": 3},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_named(message):
    names = ("weight", "bias", "running_mean", "running_var")
    right = {"x": torch.zeros(4, 3, 2, 2), **{name: torch.zeros(3) for name in names}}
    with pytest.raises(ValueError) as caught:
        ops.batch_norm_relu_pool(**(right | MISTAKES[message]))
    assert str(caught.value) == message


def encoder(stem, fused_stem, norms="auto"):
    torch.manual_seed(0)
    model = ResNet("resnet18", 5, 8, width=0.125, stem=stem, bn_group=2).to(DEVICE, memory_format=torch.channels_last)
    model.fused_stem, model.bn1.fused = fused_stem, norms
    return model.double()


@pytest.mark.medium
def test_the_encoder_pools_in_its_norm_where_that_is_asked_for():
    x = torch.randn(4, 3, 32, 38, generator=torch.Generator().manual_seed(1)).to(DEVICE).double()
    found = []
    with mock.patch.object(ops, "batch_norm_relu_pool", side_effect=ops.batch_norm_relu_pool) as calls:
        for model in (encoder("imagenet", False, "on"), encoder("imagenet", True, "on")):
            features = model.features(x)
            features.square().sum().backward()
            found.append(
                [features.detach(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
            )
        assert calls.call_count == 1
        for model in (encoder("small", True, "on"), encoder("imagenet", True), encoder("imagenet", True, "on").eval()):
            with ops.use_backend("reference"):
                model.features(x)
        with pytest.raises(ValueError, match="not a multiple of bn_group=2"):
            encoder("imagenet", True, "on").features(x[:3])
        assert calls.call_count == 1
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    """2.2e9 elements in two groups: the second begins beyond 2³¹ / 2, and its end lies beyond 2³¹."""
    n, channels, side = 700, 64, 222
    x = torch.empty(n, channels, side, side, dtype=BF16, device=DEVICE, memory_format=torch.channels_last)
    x.normal_(generator=torch.Generator(DEVICE).manual_seed(0))
    ones = torch.ones(channels, device=DEVICE)
    weight, bias = (ones.clone().requires_grad_() for _ in range(2))
    x.requires_grad_()
    y = ops.batch_norm_relu_pool(x, weight, bias, ones.clone(), ones.clone(), group=n // 2)
    (dx,) = torch.autograd.grad(y.float().sum(), x)
    half = x.detach()[n // 2 :].float()
    last = (x.detach()[-1].double() - half.mean((0, 2, 3))[:, None, None]) / half.var((0, 2, 3)).sqrt()[:, None, None]
    assert rms_error(y[-1].detach(), F.max_pool2d((last + 1).relu(), 3, 2, 1)) < 2 * ROUNDING[BF16]
    assert dx[-1].isfinite().all() and dx[-1].abs().sum() > 0
