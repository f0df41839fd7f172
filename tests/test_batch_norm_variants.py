"""ops.batch_norm_act with fork and signs: the bits that it gives without them; with one_launch (against float64 in
test_batch_norm_act.py): in any order of programs the same."""

import importlib
import itertools

import pytest
import torch
from test_batch_norm_act import EPS, MOMENTUM, SHAPES
from test_ops import BF16, DEVICE, F16, F32, ROUNDING, rms_error

from mopro_fast import ops
from mopro_fast.kernels import batch_norm_stats

batch_norm_act = importlib.import_module("mopro_fast.kernels.batch_norm_act")  # the name is the op's, too
pytestmark = pytest.mark.usefixtures("nan_filled_memory")
WHOLE_BYTES = [(4, 8, 3, 3, 2), (6, 24, 5, 7, 3), (3, 72, 2, 1, 0), (0, 8, 2, 2, 0)]


@pytest.fixture(params=["reference", "triton"])
def backend(request):
    with ops.use_backend(request.param):
        yield request.param


def maps(count, n, channels, height, width, dtype):
    g = torch.Generator().manual_seed(n + channels)
    made = (torch.randn(n, channels, height, width, generator=g).to(DEVICE, dtype) for _ in range(count))
    return [t.contiguous(memory_format=torch.channels_last) for t in made]


def parameters(channels):
    g = torch.Generator().manual_seed(channels)
    weight, bias, mean, var = (torch.randn(channels, generator=g).to(DEVICE) for _ in range(4))
    return [weight, bias, mean, var.abs()]


def run(shape, dtype, readers, **how):
    """-> output, gradients of x, weight, bias and residual, running statistics; each of the readers has a gradient."""
    *size, group = shape
    x, residual, *grads = maps(2 + readers, *size, dtype)
    weight, bias, mean, var = parameters(size[1])
    inputs = [t.requires_grad_() for t in (x, weight, bias, residual)]
    y = ops.batch_norm_act(x, weight, bias, mean, var, residual, group=group, momentum=MOMENTUM, eps=EPS, **how)
    handed = y[:readers] if how.get("fork") else [y.view_as(y) for _ in range(readers)]
    assert all(t.dtype == dtype and t.is_contiguous(memory_format=torch.channels_last) for t in handed)
    assert all(torch.equal(t, handed[0]) for t in handed)
    return [handed[0].detach(), *torch.autograd.grad(handed, inputs, grads), mean, var]


def same(found, expected, dtype):
    """The interpreter cuts bfloat16 off, where a GPU and PyTorch round."""
    for a, b in zip(found, expected, strict=True):
        if dtype == BF16 and DEVICE == "cpu":
            assert a.numel() == 0 or rms_error(a, b) < 3 * ROUNDING[BF16]
        else:
            assert torch.equal(a, b)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(
    "shape, signs", [*((s, False) for s in SHAPES), *((s, True) for s in WHOLE_BYTES + SHAPES[1:2])]
)
def test_a_forked_output_has_the_gradients_of_its_readers(shape, signs, dtype):
    """To the bit: their sum is rounded as autograd's addition rounds it."""
    for readers in (2, 1):
        same(run(shape, dtype, readers, fork=True, signs=signs), run(shape, dtype, readers), dtype)


@pytest.mark.medium
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("signs", [False, True])
@pytest.mark.parametrize("shape", [(2, 2048, 7, 7, 0), (20, 40, 13, 17, 10)])
def test_a_forked_output_of_many_tiles(shape, signs):
    same(run(shape, F16, 2, fork=True, signs=signs), run(shape, F16, 2), F16)


@pytest.mark.usefixtures("backend")
def test_only_the_other_reader_or_none():
    x, residual, dy = maps(3, 4, 8, 3, 3, F32)
    y, other = ops.batch_norm_act(x.requires_grad_(), *parameters(8), residual, group=2, fork=True)
    (found,) = torch.autograd.grad(other, x, dy, retain_graph=True)
    assert torch.equal(found, torch.autograd.grad(y, x, dy)[0])
    y, other = ops.batch_norm_act(x, *parameters(8), residual, group=2, fork=True)
    assert torch.autograd.grad((y.detach() + x).sum(), x)[0].eq(1).all()


class Unread(torch.autograd.Function):
    """A reader without a gradient to give."""

    @staticmethod
    def forward(_, x):
        return x.clone()

    @staticmethod
    def backward(*_):
        return None


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("op", ["batch_norm_act", "batch_norm_relu_pool"])
@pytest.mark.parametrize("fork", [False, True])
def test_readers_without_a_gradient(op, fork):
    x, residual = maps(2, 4, 8, 3, 3, F32)
    how = {"residual": residual} if op == "batch_norm_act" else {}
    y = getattr(ops, op)(x.requires_grad_(), *parameters(8), **how, fork=fork)
    read = sum(Unread.apply(t).sum() for t in (y if fork else [y]))
    (found,) = torch.autograd.grad(read + x.sum(), x)
    assert torch.equal(found, torch.ones_like(x))


@pytest.mark.usefixtures("backend")
def test_without_a_gradient_to_come_no_signs_are_written():
    x, residual = maps(2, 4, 8, 3, 3, F32)
    with torch.no_grad():
        y, other = ops.batch_norm_act(x, *parameters(8), residual, fork=True, signs=True)
    assert y is other and torch.equal(y, ops.batch_norm_act(x, *parameters(8), residual))


@pytest.mark.usefixtures("backend")
def test_a_second_gradient_without_the_output_is_refused():
    x, dy = maps(2, 4, 8, 3, 3, F32)
    stats = torch.ones(2, 1, 8, device=DEVICE)
    with pytest.raises(ValueError, match=r"^dy2 needs y$"):
        torch.ops.mopro_fast.batch_norm_act_backward(dy, dy, x, None, *stats, *parameters(8)[:2], True)


@pytest.mark.usefixtures("backend")
def test_signs_are_a_bit_per_stored_value():
    """Also where float16 rounds a positive value to 0, and where it is no number."""
    x = torch.zeros(1, 16, 1, 3, dtype=F16, device=DEVICE)
    x[0, :, 0, 1] = 1
    x[0, 3, 0, 2], x[0, 9, 0, 2] = float("nan"), -1
    stats = [torch.full((1, 16), value, device=DEVICE) for value in (0.0, 1.0)]
    weight, bias = torch.ones(16, device=DEVICE), torch.full((16,), 1e-9, device=DEVICE)
    y, signs = torch.ops.mopro_fast.batch_norm_act(x, *stats, weight, bias, torch.zeros_like(x), True, True)
    assert y[0, 5, 0, 0] == 0 and y[0, 9, 0, 2] == 0 and y[0, 3, 0, 2].isnan()
    assert signs.tolist() == [[[[0, 0], [255, 255], [8, 0]]]]


@pytest.mark.parametrize("signs", [False, True])
def test_gradcheck_of_a_forked_output(signs):
    g = torch.Generator().manual_seed(4)
    x, residual = (torch.randn(4, 8, 2, 1, generator=g).double().requires_grad_() for _ in range(2))
    weight, bias = (torch.rand(8, generator=g).double().requires_grad_() for _ in range(2))

    def function(x, weight, bias, residual):
        running = torch.zeros(2, 8, dtype=torch.float64)
        return ops.batch_norm_act(x, weight, bias, *running, residual, group=2, fork=True, signs=signs)

    assert torch.autograd.gradcheck(function, (x, weight, bias, residual))


@pytest.mark.parametrize("how", [{"residual": None}, {"relu": False}])
def test_a_fork_without_residual_or_relu_is_refused(how):
    x = torch.zeros(4, 3, 2, 2)
    with pytest.raises(ValueError, match=r"^fork needs a residual and relu=True$"):
        ops.batch_norm_act(x, *torch.zeros(4, 3), **{"residual": x, **how}, fork=True)


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # by torch's own compiler
def test_a_forked_output_compiles():
    torch.use_deterministic_algorithms(False)
    x, residual = maps(2, 6, 24, 5, 7, F32)

    def function(x, residual, *rest):
        return ops.batch_norm_act(x, *rest, residual, group=3, fork=True, signs=True)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found = []
    for call in (function, compiled):
        a, b = (t.clone().requires_grad_() for t in (x, residual))
        y, other = call(a, b, *parameters(24))
        found.append([y, other, *torch.autograd.grad((y + 2 * other).square().sum(), (a, b))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.medium
@pytest.mark.skipif(DEVICE != "cpu", reason="the interpreter's programs come in the order that it is told")
def test_the_last_program_to_come_finishes_whichever_it_is(monkeypatch):
    """Every order of programs gives the same bits."""
    from triton.runtime import interpreter

    builder, found = interpreter.interpreter_builder, []
    set_grid_idx = builder.set_grid_idx
    with ops.use_backend("triton"):
        for order in (lambda x, n: x % n, lambda x, n: n - 1 - x, lambda x, n: (x * 7 + 3) % n if n % 7 else x):
            monkeypatch.setattr(
                builder,
                "set_grid_idx",
                lambda x, y, z, order=order: set_grid_idx(order(x, builder.grid_dim[0]), y, z),
            )
            found.append(run((20, 136, 13, 17, 10), F32, 2, fork=True, one_launch=True))
    for a, b in itertools.pairwise(found):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.skipif(DEVICE != "cpu", reason="the interpreter's kernels can be watched")
def test_one_program_of_a_channel_block_finishes(monkeypatch):
    finished = []
    for module, name in ((batch_norm_stats, "finish_stats_of"), (batch_norm_act, "finish_sums_of")):
        finish = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, f=finish, n=name: finished.append(n) or f(*args))
    with ops.use_backend("triton"):
        run((20, 72, 13, 17, 10), F32, 2, fork=True, one_launch=True)
    assert finished == 2 * ["finish_stats_of"] + 2 * ["finish_sums_of"]  # 72 channels are two blocks


def test_more_blocks_of_channels_than_counts_take_two_launches():
    assert batch_norm_stats.arrivals(torch.zeros(1), 64 * 1024) is not None
    assert batch_norm_stats.arrivals(torch.zeros(1), 64 * 1024 + 1) is None


def test_a_first_call_that_is_captured_takes_two_launches(monkeypatch):
    class Captured:
        is_cuda, device = True, torch.device("cuda", 0)

    monkeypatch.setattr(batch_norm_stats, "_ARRIVALS", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: type("Stream", (), {"cuda_stream": 5}))
    assert batch_norm_stats.arrivals(Captured(), 64) is None
    batch_norm_stats._ARRIVALS[Captured.device, 5] = counts = torch.zeros(1024)
    assert batch_norm_stats.arrivals(Captured(), 64) is counts
