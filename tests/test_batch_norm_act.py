"""ops.batch_norm_act on both backends against float64, and the encoder that uses it against the plain one."""

import copy
import importlib
from unittest import mock

import pytest
import torch
from test_ops import BF16, DEVICE, F16, F32, ROUNDING, rms_error
from torch.utils._python_dispatch import TorchDispatchMode

from mopro_fast import ops
from mopro_fast.kernels import batch_norm_stats
from mopro_fast.models.resnet import GroupedBatchNorm2d, ResNet

# Relative RMS against float64 of float32 arithmetic; results in 16 bits add their rounding.
TOLERANCE = 2e-6
# N, C, H, W, group: one channel, one pixel, sizes that divide no tile, groups, no rows
SHAPES = [
    (4, 1, 3, 3, 2), (6, 3, 7, 7, 2), (5, 65, 1, 1, 0), (64, 3, 1, 1, 32), (33, 16, 7, 7, 0), (0, 3, 2, 2, 0),
    (0, 3, 2, 2, 2),
]  # fmt: skip
LARGE = [((64, 64, 3, 5, 32), F32, True), ((2, 2048, 7, 7, 0), BF16, True), ((16, 2048, 1, 1, 8), F32, False)]
EPS, MOMENTUM = 1e-5, 0.3

batch_norm_act = importlib.import_module("mopro_fast.kernels.batch_norm_act")  # the name is the op's, too
pytestmark = pytest.mark.usefixtures("nan_filled_memory")


@pytest.fixture(params=["reference", "triton", "one-launch"])
def backend(request, monkeypatch):
    """one-launch: Triton's, where no finishing kernel may run and every count is 0 again in the end."""
    if request.param == "one-launch":
        plain = ops.batch_norm_act
        monkeypatch.setattr(ops, "batch_norm_act", lambda *args, **how: plain(*args, **how, one_launch=True))
        monkeypatch.setattr(batch_norm_stats, "batch_norm_stats_finish_kernel", None)
        monkeypatch.setattr(batch_norm_act, "batch_norm_act_bwd_finish_kernel", None)
    with ops.use_backend("triton" if request.param == "one-launch" else request.param):
        yield request.param
    assert all(not counts.any() for counts in batch_norm_stats._ARRIVALS.values())


def plain(x, weight, bias, running_mean, running_var, residual, relu, group):
    """-> output before the ReLU, output, new running statistics; a group at a time."""
    parts, means, variances = [], [], []
    for rows in x.split(group or max(1, len(x))) if len(x) else []:
        mean, var = rows.mean((0, 2, 3)), rows.var((0, 2, 3), correction=0)
        parts.append((rows - mean[:, None, None]) / (var + EPS).sqrt()[:, None, None])
        means.append(mean.detach())
        variances.append(rows.detach().var((0, 2, 3)))
    z = (torch.cat(parts) if parts else x) * weight[:, None, None] + bias[:, None, None]
    z = z if residual is None else z + residual
    if parts:
        running_mean = (1 - MOMENTUM) * running_mean + MOMENTUM * torch.stack(means).mean(0)
        running_var = (1 - MOMENTUM) * running_var + MOMENTUM * torch.stack(variances).mean(0)
    return z, z.relu() if relu else z, running_mean, running_var


def check(n, channels, height, width, group, dtype, relu, with_residual, lay_out=lambda x: x):
    g = torch.Generator().manual_seed(n + channels)

    def maps(scale=1.0, shift=0.0):
        x = scale * torch.randn(n, channels, height, width, generator=g) + shift
        return lay_out(x.to(DEVICE, dtype, memory_format=torch.channels_last))

    x, residual, dy = maps(3, 2).requires_grad_(), maps().requires_grad_() if with_residual else None, maps()
    weight, bias, mean, var = (torch.randn(channels, generator=g).to(DEVICE) for _ in range(4))
    var = var.abs()
    inputs = [t for t in (x, weight.requires_grad_(), bias.requires_grad_(), residual) if t is not None]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    z, want, want_mean, want_var = plain(
        *wide[:3], mean.double(), var.double(), wide[3] if with_residual else None, relu, group
    )
    dy = torch.where(z.abs() < 1e-3, 0, dy)  # no rounding may decide on which side of the ReLU a value is
    want_grads = torch.autograd.grad(want, wide, dy.double())

    y = ops.batch_norm_act(x, weight, bias, mean, var, residual, relu=relu, group=group, momentum=MOMENTUM, eps=EPS)
    grads = torch.autograd.grad(y, inputs, dy)
    limit = TOLERANCE + ROUNDING[dtype]
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert rms_error(y.detach(), want.detach()) < limit
    assert rms_error(mean, want_mean) < TOLERANCE and rms_error(var, want_var) < TOLERANCE
    assert grads[0].dtype == dtype and rms_error(grads[0], want_grads[0]) < limit
    for grad, exact in zip(grads[1:3], want_grads[1:3], strict=True):
        assert grad.dtype == F32 and rms_error(grad, exact) < TOLERANCE
    if with_residual:
        assert torch.equal(grads[3], torch.where(z > 0, dy, 0) if relu else dy)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("relu, residual", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("shape", SHAPES)
def test_batch_norm_act(shape, dtype, relu, residual):
    check(*shape, dtype, relu, residual)


@pytest.mark.medium
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("shape, dtype, residual", LARGE)
def test_of_many_channels(shape, dtype, residual):
    check(*shape, dtype, True, residual)


@pytest.mark.medium
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("group", [0, 10])
def test_many_splits(group, monkeypatch):
    """Several tiles per split, then more splits than the second launch combines at a time."""
    check(20, 40, 13, 17, group, F32, True, True)
    monkeypatch.setattr(batch_norm_stats, "programs", lambda _: 200)
    check(20, 40, 13, 17, group, F32, True, False)


@pytest.mark.medium
@pytest.mark.usefixtures("backend")
def test_more_groups_than_are_combined_at_a_time():
    check(200, 5, 2, 1, 2, F32, True, True)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("lay_out", [torch.Tensor.contiguous, lambda x: torch.cat([x, x], 3)[:, :, :, ::2]])
def test_other_strides_become_channels_last(lay_out):
    check(6, 5, 4, 6, 3, F32, True, True, lay_out)


@pytest.mark.usefixtures("backend")
def test_parameters_and_statistics_of_any_stride():
    x = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    every_second = torch.linspace(0.5, 2, 24, device=DEVICE).view(4, 6)
    found = []
    for take in (lambda t: t[::2], lambda t: t[::2].clone()):
        weight, bias, mean, var = (take(t) for t in every_second.clone())
        found.append((ops.batch_norm_act(x, weight, bias, mean, var), mean, var))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_statistics_far_from_zero(backend):
    """E[x²] − E[x]² would be wrong by 6 % here."""
    x = 100 + 0.1 * torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    zeros = x[0, :, 0, 0] * 0
    _, rstd = torch.ops.mopro_fast.batch_norm_stats_(x, zeros, zeros.clone(), 0.1, 1e-12, 4, backend == "one-launch")
    exact = x.double().view(2, 4, 4, -1).transpose(1, 2).flatten(2).var(2, correction=0).rsqrt()
    assert rms_error(rstd, exact) < 1e-4


@pytest.mark.usefixtures("backend")
def test_what_is_no_number_is_not_hidden():
    x = torch.randn(4, 2, 3, 3, device=DEVICE)
    x[3, 1, 2, 2] = float("nan")
    y = ops.batch_norm_act(x, *torch.ones(4, 2, device=DEVICE), group=2)
    assert y[2:, 1].isnan().all() and int(y.isnan().sum()) == 18


@pytest.mark.medium
@pytest.mark.usefixtures("backend")
def test_the_same_bits_twice_and_the_same_as_compiled():
    torch.use_deterministic_algorithms(False)
    g = torch.Generator().manual_seed(3)
    start = [torch.randn(6, 20, 9, 9, generator=g).to(DEVICE) for _ in range(2)] + list(
        torch.rand(4, 20, generator=g).to(DEVICE)
    )

    def run(function):
        x, residual, *parameters = (t.clone().requires_grad_(i < 4) for i, t in enumerate(start))
        y = function(x, *parameters, residual, group=3)
        grads = torch.autograd.grad(y.square().sum(), (x, residual, *parameters[:2]))
        return [y.detach(), *grads, *parameters[2:]]

    compiled = torch.compile(ops.batch_norm_act, fullgraph=True, backend="aot_eager")
    for a, b, c in zip(run(ops.batch_norm_act), run(ops.batch_norm_act), run(compiled), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("relu", [True, False])
def test_gradcheck(relu):
    g = torch.Generator().manual_seed(4)
    x, residual = (torch.randn(4, 3, 2, 2, generator=g).double().requires_grad_() for _ in range(2))
    weight, bias = (torch.rand(3, generator=g).double().requires_grad_() for _ in range(2))

    def function(x, weight, bias, residual):
        running = torch.zeros(2, 3, dtype=torch.float64)
        return ops.batch_norm_act(x, weight, bias, *running, residual, relu=relu, group=2)

    assert torch.autograd.gradcheck(function, (x, weight, bias, residual))


MISTAKES = {
    "x must have shape [N, C, H, W], got [4, 3]": {"x": torch.zeros(4, 3)},
    "x must be float32 or bfloat16 or float16 or float64, got int64": {"x": torch.zeros(4, 3, 2, 2).long()},
    "weight must have shape [3], got [4]": {"weight": torch.zeros(4)},
    "bias must be float32, got bfloat16": {"bias": torch.zeros(3).bfloat16()},
    "running_mean must be on cpu, got meta": {"running_mean": torch.zeros(3, device="meta")},
    "running_var must be a tensor, got NoneType": {"running_var": None},
    "residual must have shape [4, 3, 2, 2], got [4, 3, 2, 1]": {"residual": torch.zeros(4, 3, 2, 1)},
    "residual must be float32, got bfloat16": {"residual": torch.zeros(4, 3, 2, 2).bfloat16()},
    "group must divide the 4 rows of x, got 3": {"group": 3},
    "group must be a whole number of at least 0, got -1": {"group": -1},
    "group must be a whole number of at least 0, got 2.0": {"group": 2.0},
    "momentum must lie in [0, 1], got 2": {"momentum": 2},
    "eps must be a finite number above 0, got 0": {"eps": 0},
    "x must have at least two values per channel and group, got shape [4, 3, 1, 1]": {
        "x": torch.zeros(4, 3, 1, 1),
        "group": 1,
    },
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_named(message):
    names = ("weight", "bias", "running_mean", "running_var")
    right = {"x": torch.zeros(4, 3, 2, 2), **{name: torch.zeros(3) for name in names}}
    with pytest.raises(ValueError) as caught:
        ops.batch_norm_act(**(right | MISTAKES[message]))
    assert str(caught.value) == message


def encoder_step(encoder, fused, x, autocast=False):
    encoder = copy.deepcopy(encoder)
    for m in encoder.modules():
        if isinstance(m, GroupedBatchNorm2d):
            m.fused = fused
    with torch.autocast(DEVICE, BF16, enabled=autocast):
        logits, q = encoder(x)
        (logits.square().mean() + q[:, 0].mean()).backward()
    grads = torch.cat([p.grad.flatten() for p in encoder.parameters()])
    return logits.detach(), q.detach(), grads, [b for b in encoder.buffers()]


def small_encoder(arch, bn_group):
    torch.manual_seed(0)
    return ResNet(arch, 5, 8, width=0.125, stem="small", bn_group=bn_group).to(
        DEVICE, memory_format=torch.channels_last
    )


def images():
    return torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)


@pytest.mark.parametrize("bn_group", [0, 4])
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_the_fused_encoder_is_the_plain_one(arch, bn_group):
    encoder = small_encoder(arch, bn_group).double()
    x = images().double()
    with mock.patch.object(ops, "batch_norm_act", side_effect=ops.batch_norm_act) as calls:
        plain_encoder = encoder_step(encoder, "off", x)
        assert not calls.called
        fused = encoder_step(encoder, "on", x)
        assert calls.call_count == sum(isinstance(m, GroupedBatchNorm2d) for m in encoder.modules())
    for a, b in zip(fused[:3], plain_encoder[:3], strict=True):
        assert rms_error(a, b) < 1e-10
    for a, b in zip(fused[3], plain_encoder[3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        assert a.dtype == b.dtype and (a.dtype != torch.int64 or a == 1)


@pytest.mark.medium
def test_the_kernels_give_the_plain_encoder_too():
    encoder = small_encoder("resnet18", 4)
    x = images()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        plain_encoder = encoder_step(encoder, "off", x)
        with ops.use_backend("triton"):
            fused = encoder_step(encoder, "auto", x)
    for a, b in zip(fused[:3], plain_encoder[:3], strict=True):
        assert rms_error(a, b) < 1e-4
    for a, b in zip(fused[3], plain_encoder[3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_bfloat16_activations_with_float32_parameters():
    encoder = small_encoder("resnet18", 4)
    x = images()
    fused, plain_encoder = (encoder_step(encoder, switch, x, autocast=True) for switch in ("on", "off"))
    exact = encoder_step(copy.deepcopy(encoder).double(), "off", x.double())
    assert fused[0].dtype == plain_encoder[0].dtype == BF16
    for ours, theirs, wanted in zip(fused[:3], plain_encoder[:3], exact[:3], strict=True):
        assert rms_error(ours, wanted) < max(2 * rms_error(theirs, wanted), 0.05)


def test_where_no_kernel_runs_the_plain_path_does():
    encoder = small_encoder("resnet18", 0)
    x = images()
    with mock.patch.object(ops, "batch_norm_act", side_effect=AssertionError):
        with ops.use_backend("reference"):
            encoder(x)
        encoder.eval()(x)
    with pytest.raises(ValueError, match="the batch of 8 rows is not a multiple of bn_group=3"):
        small_encoder("resnet18", 3)(x)


@pytest.mark.medium
def test_a_compiled_encoder_has_no_graph_break():
    torch.use_deterministic_algorithms(False)
    encoder = small_encoder("resnet18", 4)
    x = images()[:, :, :8, :8]
    copied = copy.deepcopy(encoder)
    compiled = torch.compile(copied, fullgraph=True, backend="aot_eager")
    # "auto" as it decides on a GPU
    with ops.use_backend("triton"), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                results = compiled(x), encoder(x)
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        for logits, q in results:
            (logits.square().mean() + q[:, 0].mean()).backward()
    for a, b in zip(copied.parameters(), encoder.parameters(), strict=True):
        assert rms_error(a.grad, b.grad) < 1e-4


class Writes(TorchDispatchMode):
    """The operators that write a tensor of so many values."""

    def __init__(self, values):
        super().__init__()
        self.values, self.found = values, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if out.numel() == self.values and not func.is_view:
            self.found.append(func)
        return out


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_the_pooled_gradient_is_written_once_and_as_the_activation_lies(layout, dtype):
    encoder, last = small_encoder("resnet18", 0).to(memory_format=layout), []
    encoder.layer4[-1].register_forward_hook(lambda *args: last.append(args[-1]))
    with torch.autocast(DEVICE, BF16, enabled=dtype == BF16):
        features = encoder.features(images().contiguous(memory_format=layout))
    (x,) = last
    assert x.dtype == dtype and x.is_contiguous(memory_format=layout)
    plain_features = x.mean((2, 3))
    assert torch.equal(features, plain_features)
    grad = torch.randn(features.shape, generator=torch.Generator().manual_seed(2)).to(features)
    with Writes(x.numel()) as writes:
        (found,) = torch.autograd.grad(features, x, grad)
    assert len(writes.found) == 1 and found.is_contiguous(memory_format=layout)
    (expected,) = torch.autograd.grad(plain_features, x, grad)
    torch.testing.assert_close(found, expected, rtol=ROUNDING[dtype], atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("how", [{}, {"fork": True, "signs": True, "one_launch": True}], ids=["plain", "forked"])
def test_offsets_beyond_32_bits(how):
    """2.2e9 elements in two groups: the second begins beyond 2³¹ / 2, and its end lies beyond 2³¹."""
    n, channels, side = 700, 64, 222
    x = torch.empty(n, channels, side, side, dtype=BF16, device=DEVICE, memory_format=torch.channels_last)
    x.normal_(generator=torch.Generator(DEVICE).manual_seed(0))
    ones = torch.ones(channels, device=DEVICE)
    weight, bias = (ones.clone().requires_grad_() for _ in range(2))
    x.requires_grad_()
    y = ops.batch_norm_act(x, weight, bias, ones.clone(), ones.clone(), x, group=n // 2, **how)
    outputs = y if how else (y,)
    (dx,) = torch.autograd.grad(outputs, x, [torch.ones_like(y) for y in outputs])
    y = outputs[0]
    last = x.detach()[-1].double()
    half = x.detach()[n // 2 :].float()
    z = (last - half.mean((0, 2, 3))[:, None, None]) / half.var((0, 2, 3)).sqrt()[:, None, None] + 1 + last
    assert rms_error(y[-1].detach(), z.relu()) < 2 * ROUNDING[BF16]
    assert dx[-1].isfinite().all() and dx[-1].abs().sum() > 0
