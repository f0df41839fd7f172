"""ops.conv1x1_stats_ on both backends against float64, and the bottleneck that uses it against the plain one."""

import copy
from unittest import mock

import pytest
import torch
from test_ops import BF16, DEVICE, F16, F32, ROUNDING, rms_error

from mopro_fast import ops
from mopro_fast.kernels import conv1x1_stats
from mopro_fast.models.resnet import Bottleneck, ResNet

# Relative RMS against float64: sums of up to 100 products in float32; statistics are those of y as stored.
TOLERANCE = 2e-6
EPS, MOMENTUM = 1e-5, 0.3
# N, Cin, Cout, H, W, group: sizes that divide no tile, several blocks of either channels, no rows; then weights that
# stay (of one, 128 and 256 input channels only without a norm), and others, a chunk of them not full
SHAPES = [
    (4, 1, 1, 3, 3, 0), (2, 3, 5, 7, 7, 0), (6, 16, 65, 7, 7, 3), (3, 70, 130, 9, 5, 0), (64, 33, 16, 1, 1, 32),
    (0, 3, 5, 2, 2, 0), (4, 64, 272, 9, 9, 2), (2, 128, 48, 9, 9, 0), (4, 256, 64, 5, 5, 2), (4, 80, 144, 9, 7, 2),
]  # fmt: skip


pytestmark = pytest.mark.usefixtures("nan_filled_memory")


@pytest.fixture(params=["reference", "triton"])
def backend(request):
    with ops.use_backend(request.param):
        yield request.param


def check(n, in_channels, channels, height, width, group, dtype, with_norm, weight_dtype=F32):
    g = torch.Generator().manual_seed(n + channels)
    groups = n // group if group else 1

    def randn(*shape):
        return torch.randn(*shape, generator=g).to(DEVICE)

    x = randn(n, in_channels, height, width).to(dtype, memory_format=torch.channels_last)
    weight = randn(channels, in_channels, 1, 1).to(weight_dtype) / in_channels**0.5
    norm = (randn(groups, in_channels), randn(groups, in_channels).abs() + 0.1, randn(in_channels), randn(in_channels))
    mean, var = randn(channels), randn(channels).abs()
    want_mean, want_var = mean.double(), var.double()

    z = x.double()
    if with_norm:
        of_row = [v.double().repeat_interleave(n // groups, 0)[:, :, None, None] for v in norm[:2]]
        scale, shift = (v.double()[:, None, None] for v in norm[2:])
        z = ((z - of_row[0]) * of_row[1] * scale + shift).relu()
    product = torch.einsum("nihw,oi->nohw", z, weight.to(dtype).double()[:, :, 0, 0])
    y, y_mean, y_rstd = ops.conv1x1_stats_(
        x, weight, mean, var, norm if with_norm else None, group=group, momentum=MOMENTUM, eps=EPS
    )
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert rms_error(y, product) < TOLERANCE + ROUNDING[dtype] * (2 if with_norm else 1)
    if not n:
        return
    stored = y.double().unflatten(0, (groups, -1)).transpose(1, 2).flatten(2)  # [groups, Cout, positions]
    exact = stored.mean(2), (stored.var(2, correction=0) + EPS).rsqrt()
    assert rms_error(y_mean, exact[0]) < TOLERANCE and rms_error(y_rstd, exact[1]) < TOLERANCE
    want_mean = (1 - MOMENTUM) * want_mean + MOMENTUM * exact[0].mean(0)
    want_var = (1 - MOMENTUM) * want_var + MOMENTUM * stored.var(2).mean(0)
    assert rms_error(mean, want_mean) < TOLERANCE and rms_error(var, want_var) < TOLERANCE


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("shape", SHAPES)
def test_conv1x1_stats(shape, dtype, with_norm):
    check(*shape, dtype, with_norm)


@pytest.mark.medium
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_many_tiles_in_a_split_and_many_splits(dtype, monkeypatch):
    check(12, 100, 20, 13, 11, 6, dtype, True, weight_dtype=dtype)
    monkeypatch.setattr(conv1x1_stats, "programs", lambda _: 1)
    for in_channels, channels in ((20, 70), (32, 160), (96, 32)):
        check(12, in_channels, channels, 13, 11, 6, dtype, True, weight_dtype=dtype)


@pytest.mark.parametrize("with_norm", [True, False])
def test_statistics_far_from_zero(with_norm):
    """Of several tiles: a sum of squares would cancel; and rows beyond the last are none."""
    with ops.use_backend("triton"):
        x = torch.randn(3, 16, 11, 11, generator=torch.Generator().manual_seed(6)).to(DEVICE) / 8 + 1000
        eye = torch.eye(16, device=DEVICE)[:, :, None, None]
        norm = (torch.zeros(1, 16), torch.ones(1, 16), torch.ones(16), torch.full((16,), 0.5)) if with_norm else None
        norm = norm and tuple(v.to(DEVICE) for v in norm)
        y, mean, rstd = ops.conv1x1_stats_(x, eye, *torch.zeros(2, 16, device=DEVICE), norm, eps=EPS)
    exact = y.double().transpose(0, 1).flatten(1)
    assert rms_error(mean[0], exact.mean(1)) < 2e-7
    assert rms_error(rstd[0], (exact.var(1, correction=0) + EPS).rsqrt()) < 1e-4


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("with_norm", [True, False])
def test_what_is_not_finite_arrives(with_norm):
    """float16 ends at 65504: the step is to stop at a loss that is not finite, not to go on with zeros."""
    x = torch.ones(2, 16, 3, 3, dtype=F16, device=DEVICE)
    x[0, 0, 0, 0], x[1, 3, 2, 2] = float("nan"), float("inf")
    norm = tuple(v.to(DEVICE) for v in (torch.zeros(1, 16), torch.ones(1, 16), torch.ones(16), torch.zeros(16)))
    weight = torch.eye(16, device=DEVICE)[:, :, None, None] * 60000 + 1
    y, mean, _ = ops.conv1x1_stats_(x, weight, *torch.zeros(2, 16, device=DEVICE), norm if with_norm else None)
    assert y[0, 0, 0, 0].isnan() and y[1, 3, 2, 2].isinf() and not mean[0, [0, 3]].isfinite().any()
    big = ops.conv1x1_stats_(x * 2, weight, *torch.zeros(2, 16, device=DEVICE), norm if with_norm else None)[0]
    assert big[1, 5, 0, 0].isinf()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_same_bits_twice_and_the_same_as_compiled(dtype):
    torch.use_deterministic_algorithms(False)
    g = torch.Generator().manual_seed(3)
    x, weight = torch.randn(6, 32, 9, 9, generator=g).to(DEVICE, dtype), torch.randn(48, 32, 1, 1, generator=g)
    weight = weight.to(DEVICE)
    norm = (*torch.rand(2, 2, 32, generator=g).to(DEVICE), *torch.rand(2, 32, generator=g).to(DEVICE))

    def run(function):
        running = torch.ones(2, 48, device=DEVICE).unbind()
        return [*function(x, weight, *running, norm, group=3), *running]

    compiled = torch.compile(ops.conv1x1_stats_, fullgraph=True, backend="aot_eager")
    for a, b, c in zip(run(ops.conv1x1_stats_), run(ops.conv1x1_stats_), run(compiled), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_mistakes_are_named():
    x, weight, running = torch.zeros(4, 3, 2, 2), torch.zeros(5, 3, 1, 1), torch.zeros(2, 5)
    with pytest.raises(ValueError, match=r"weight must have shape \[Cout, 3, 1, 1\], got \[5, 3, 3, 3\]"):
        ops.conv1x1_stats_(x, torch.zeros(5, 3, 3, 3), *running)
    with pytest.raises(ValueError, match=r"running_mean must have shape \[5\], got \[3\]"):
        ops.conv1x1_stats_(x, weight, *torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"norm's mean must have shape \[2, 3\], got \[1, 3\]"):
        ops.conv1x1_stats_(x, weight, *running, (torch.zeros(1, 3),) * 4, group=2)
    with pytest.raises(ValueError, match=r"get no gradient here: call conv1x1_stats_ under torch\.no_grad"):
        ops.conv1x1_stats_(x, weight.requires_grad_(), *running)


def run_encoder(encoder, x, fused_conv):
    encoder = copy.deepcopy(encoder)
    for m in encoder.modules():
        if isinstance(m, Bottleneck):
            m.fused_conv = fused_conv
    with torch.no_grad():
        return [*encoder(x), *encoder.buffers()]


@pytest.mark.parametrize("bn_group", [0, 4])
def test_the_bottleneck_without_a_gradient_is_the_plain_one(bn_group):
    torch.manual_seed(0)
    encoder = ResNet("resnet50", 5, 8, width=0.125, stem="small", bn_group=bn_group).to(DEVICE).double()
    x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double().to(DEVICE)
    with mock.patch.object(ops, "conv1x1_stats_", side_effect=ops.conv1x1_stats_) as calls:
        plain = run_encoder(encoder, x, False)
        assert not calls.called
        fused = run_encoder(encoder, x, True)
        assert calls.call_count == 32  # of 16 blocks
        for m in encoder.modules():
            m.fused_conv = True
        encoder(x)  # with a gradient
        encoder.eval()
        with torch.no_grad():
            encoder(x)
        assert calls.call_count == 32
    for a, b in zip(fused, plain, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_the_kernels_give_the_plain_bottleneck_too():
    torch.manual_seed(0)
    block = Bottleneck(32, 8, 1, None).to(DEVICE)
    x = torch.randn(8, 32, 9, 9).to(DEVICE)
    for m in (block.bn1, block.bn2, block.bn3):
        m.group = 4
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        plain = run_encoder(torch.nn.Sequential(block), x, False)
        with ops.use_backend("triton"):
            fused = run_encoder(torch.nn.Sequential(block), x, True)
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
