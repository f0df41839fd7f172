"""csrc/ema_update.cu against float64: on the CPU through tests/host_cuda.py, and on a GPU if there is one."""

import pytest
import torch

CHUNK, TENSORS = 8192, 512  # of csrc/ema_update.cu: where its paths change
SIZES = [0, 1, 3, 4, 5, 127, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 2]
GUARD = 64
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MOMENTA = [0.0, 0.5, 0.999, 1.0]


class Extension:
    def __init__(self, module, device):
        self.module, self.device = module, device

    def ema_update(self, targets, sources, shadows, momentum):
        self.module.ema_update(
            [t.data_ptr() for t in targets],
            [s.data_ptr() for s in sources],
            [w.data_ptr() for w in shadows],
            [t.numel() for t in targets],
            str(sources[0].dtype).removeprefix("torch."),
            str(shadows[0].dtype).removeprefix("torch.") if shadows else None,
            momentum,
            torch.cuda.current_stream().cuda_stream if self.device == "cuda" else 0,
        )


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def extension(request, capfd):
    if request.param == "cuda":
        from mopro_fast import _C as module
    else:
        module = request.getfixturevalue("host_cuda")
    yield Extension(module, request.param)
    assert "runtime error" not in capfd.readouterr().err  # the sanitizer of tests/host_cuda.py


def make(sizes, dtype, device, generator, offset=0):
    """Random tensors inside one buffer of -7, a guard band and `offset` elements before each."""
    step = [GUARD + -(-n // GUARD) * GUARD for n in sizes]
    buffer = torch.full((sum(step) + 2 * GUARD,), -7.0, dtype=dtype, device=device)
    tensors, begin = [], GUARD
    for n, width in zip(sizes, step, strict=True):
        tensors.append(buffer[begin + offset : begin + offset + n])
        tensors[-1].copy_(torch.randn(n, generator=generator))
        begin += width
    return buffer, tensors


def check(extension, sizes, source_dtype, shadow_dtype, momentum, offsets=(0, 0, 0)):
    generator = torch.Generator().manual_seed(0)
    device = extension.device
    target_buffer, targets = make(sizes, torch.float32, device, generator, offsets[0])
    source_buffer, sources = make(sizes, source_dtype, device, generator, offsets[1])
    shadow_buffer, shadows = make(sizes, shadow_dtype or torch.float32, device, generator, offsets[2])
    before = [t.double() for t in targets]
    source_before = source_buffer.clone()

    extension.ema_update(targets, sources, shadows if shadow_dtype else [], momentum)

    for old, source, target, shadow in zip(before, sources, targets, shadows, strict=True):
        expected = momentum * old + (1 - momentum) * source.double()
        # Half an ulp each for m, the product and the sum.
        assert torch.all((target - expected).abs() <= 1.5 * 2**-24 * (old.abs() + source.double().abs()))
        if momentum in (0, 1):
            assert torch.equal(target.double(), old if momentum else source.double())
        if shadow_dtype:
            assert torch.equal(shadow, target.to(shadow_dtype))
            shadow.fill_(-7)
        target.fill_(-7)
    assert torch.equal(source_buffer, source_before)
    assert torch.all(target_buffer == -7), "wrote outside the targets"
    if shadow_dtype:
        assert torch.all(shadow_buffer == -7), "wrote outside the shadows"


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("shadow_dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("source_dtype", DTYPES)
def test_against_float64(extension, source_dtype, shadow_dtype, momentum):
    check(extension, SIZES, source_dtype, shadow_dtype, momentum)


@pytest.mark.parametrize("offsets", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 2, 0), (1, 1, 1), (2, 3, 1)])
@pytest.mark.parametrize("source_dtype", DTYPES)
def test_misaligned(extension, source_dtype, offsets):
    check(extension, SIZES, source_dtype, torch.bfloat16, 0.999, offsets)


@pytest.mark.parametrize("count", [1, 2, TENSORS - 1, TENSORS, TENSORS + 1, 2 * TENSORS + 90])
def test_many_tensors(extension, count):
    check(extension, [i % 23 for i in range(count)], torch.float32, torch.bfloat16, 0.5)


def test_launches(host_cuda):
    def launches(sizes):
        before = host_cuda.launches()
        check(Extension(host_cuda, "cpu"), sizes, torch.float32, None, 0.999)
        return host_cuda.launches() - before

    host_cuda.ema_update([], [], [], [], "float32", None, 0.5, 0)
    assert launches([0, 0]) == 0
    assert launches([64] * 165) == 1  # ResNet-50 with its projection head
    assert launches([1, 0] * TENSORS) == 1
    assert launches([1] * (TENSORS + 1)) == 2


def test_same_bits_twice(extension):
    results = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(0)
        _, targets = make(SIZES, torch.float32, extension.device, generator)
        _, sources = make(SIZES, torch.bfloat16, extension.device, generator)
        for _ in range(3):
            extension.ema_update(targets, sources, [], 0.999)
        results.append(torch.cat(targets))
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shadow_rounding(extension, dtype):
    """Ties, subnormals, overflow, infinities and NaN round as PyTorch rounds them."""
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    finite = values[values.isfinite()].sort().values
    between = (finite[1:].double() + finite[:-1].double()).div(2).float()
    source = torch.cat([values, between, torch.tensor([65519.9, 65520, 1e6, 3e38, 1e-9])])
    source = source.to(extension.device)
    target, shadow = torch.zeros_like(source), torch.zeros_like(source, dtype=dtype)
    extension.ema_update([target], [source], [shadow], 0.0)
    torch.testing.assert_close(target, source, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(shadow, source.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_wrong_calls(host_cuda):
    with pytest.raises(ValueError, match="2 targets, 1 sources"):
        host_cuda.ema_update([0, 0], [0], [], [0, 0], "float32", None, 0.5, 0)
    with pytest.raises(ValueError, match="1 targets, 1 sources, 0 shadows"):
        host_cuda.ema_update([0], [0], [], [0], "float32", "bfloat16", 0.5, 0)
    with pytest.raises(ValueError, match="not float64"):
        host_cuda.ema_update([0], [0], [], [0], "float64", None, 0.5, 0)
    with pytest.raises(ValueError, match="shadows must be"):
        host_cuda.ema_update([0], [0], [0], [0], "float32", "float32", 0.5, 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a launch succeeds here")
def test_refused_launch_is_an_error():
    module = pytest.importorskip("mopro_fast._C", reason="the CUDA extension is not built")
    with pytest.raises(RuntimeError, match=r"ema_update: .+"):
        module.ema_update([16], [16], [], [1], "float32", None, 0.5, 0)
