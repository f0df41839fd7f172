"""csrc/queue_enqueue.cu against a plain loop: on the CPU through tests/host_cuda.py, and on a GPU if there is one."""

import pytest
import torch
from guarded import Guarded, bits, name

from mopro_fast import ops

BLOCKS, WARPS = 132 * 8, 8  # of csrc/queue_enqueue.cu
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def check(kernels, slots, rows, dim, start=0, key=F32, queue=F32, shadow=None, offsets=(0, 0, 0), placed=True):
    """-> the new queue. `placed`: this cursor is one the kernel promises to follow."""
    generator = torch.Generator().manual_seed(rows + dim)
    device = kernels.device
    keys = Guarded(torch.randn(rows, dim, generator=generator).to(key), device, offsets[0])
    bank = Guarded(torch.randn(slots, dim, generator=generator).to(queue), device, offsets[1])
    low = Guarded(torch.zeros(slots, dim, dtype=shadow or BF16), device, offsets[2])
    cursor = Guarded(torch.tensor([start]), device)
    expected, expected_low = bank.tensor.clone(), low.tensor.clone()
    for i in range(rows):
        expected[(start + i) % slots] = keys.tensor[i].to(queue)
        expected_low[(start + i) % slots] = keys.tensor[i].to(low.tensor.dtype)

    kernels.module.queue_enqueue(
        bank.pointer(), name(queue), low.pointer() if shadow else 0, name(shadow), cursor.pointer(),
        keys.pointer(), name(key), slots, rows, dim, kernels.stream,
    )  # fmt: skip

    keys.check(written=False)
    bank.check(written=True)
    low.check(written=shadow is not None)
    cursor.check(written=True)
    if placed:
        assert torch.equal(bits(bank.tensor), bits(expected))
        assert not shadow or torch.equal(bits(low.tensor), bits(expected_low))
        assert cursor.tensor.tolist() == [(start + rows) % slots if rows else start]
    return bank.tensor


@pytest.mark.parametrize("shadow", [None, BF16, F16])
@pytest.mark.parametrize("queue", [F32, BF16, F16])
@pytest.mark.parametrize("key", [F32, BF16, F16])
def test_types(kernels, key, queue, shadow):
    check(kernels, 21, 18, 36, 9, key, queue, shadow)
    check(kernels, 21, 18, 33, 9, key, queue, shadow)


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 8, 33, 65, 127, 128, 129, 132, 512, 700])
def test_widths(kernels, dim):
    check(kernels, 19, 11, dim, 13, shadow=BF16)


@pytest.mark.parametrize("rows", range(8))
def test_wraps_round_at_every_position(kernels, rows):
    for start in range(7):
        check(kernels, 7, min(rows, 7), 5, start, shadow=F16)


@pytest.mark.parametrize("start", [-1, -7, -8, -100, 7, 8, 10**6, 2**39 - 1, -(2**39), -(2**39) + 1])
def test_any_cursor_is_taken_modulo_the_queue(kernels, start):
    check(kernels, 7, 3, 8, start)
    check(kernels, 40, 33, 8, start)  # more than one block


@pytest.mark.parametrize("start", [2**39, -(2**39) - 1, 2**41 - 1, 2**62, -(2**62), 2**63 - 1, -(2**63)])
def test_a_cursor_from_nowhere_stays_within_the_queue(kernels, start):
    check(kernels, 40, 33, 8, start, placed=False)


@pytest.mark.parametrize("offsets", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (2, 2, 2), (0, 2, 0), (0, 0, 2)])
@pytest.mark.parametrize("key", [F32, BF16])
def test_misaligned(kernels, key, offsets):
    check(kernels, 20, 17, 64, 5, key, F32, BF16, offsets)


@pytest.mark.parametrize("rows", [1, WARPS - 1, WARPS, WARPS + 1, 255, BLOCKS * WARPS, BLOCKS * WARPS + 9])
def test_many_blocks(kernels, rows):
    check(kernels, rows + 5, rows, 4, 8, shadow=BF16)
    check(kernels, rows, rows, 4, rows - 1)  # the whole queue


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_the_order_of_blocks_and_threads_does_not_matter(host_cuda, kernels, order):
    if kernels.device == "cuda":
        pytest.skip("a GPU has an order of its own")
    host_cuda.order(order)
    check(kernels, 300, 290, 33, 299, shadow=BF16)


def test_launches(host_cuda, kernels):
    before = host_cuda.launches()
    check(kernels, 9, 0, 4, 5)
    assert host_cuda.launches() == before
    if kernels.device == "cpu":
        check(kernels, 8192, 2048, 4, 8000)
        assert host_cuda.launches() == before + 1


@pytest.mark.usefixtures("cuda_on_host")
@pytest.mark.parametrize("shadow", [None, BF16])
def test_through_the_op(shadow):
    """Non-contiguous and strided arguments; the same as the reference, bit for bit."""
    results = []
    for backend in ("cuda", "reference"):
        g = torch.Generator().manual_seed(0)
        queue = torch.randn(6, 10, generator=g).T  # [10, 6], columns first
        low = torch.zeros(10, 12, dtype=shadow)[:, ::2] if shadow else None
        cursor = torch.tensor([7])
        keys = torch.randn(8, 6, generator=g).bfloat16()[::2]
        with ops.use_backend(backend):
            ops.queue_enqueue_(queue, cursor, keys, low)
            ops.queue_enqueue_(queue, cursor, keys.float(), low)
        results.append([queue, cursor, *([low] if shadow else [])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][1].tolist() == [5]


def test_a_shadow_must_fit():
    queue, cursor, keys = torch.zeros(4, 2), torch.tensor([0]), torch.zeros(1, 2)
    with pytest.raises(ValueError, match=r"shadow must have shape \[4, 2\], got \[3, 2\]"):
        ops.queue_enqueue_(queue, cursor, keys, torch.zeros(3, 2, dtype=BF16))
    with pytest.raises(ValueError, match="shadow must be bfloat16 or float16, got float32"):
        ops.queue_enqueue_(queue, cursor, keys, queue.clone())


def test_wrong_calls(host_cuda):
    def call(slots=4, rows=2, dim=3, key="float32", shadow=0, shadow_dtype=None):
        host_cuda.queue_enqueue(16, "float32", shadow, shadow_dtype, 16, 16, key, slots, rows, dim, 0)

    for sizes in ({"rows": 5}, {"rows": -1}, {"dim": -1}):
        with pytest.raises(ValueError, match="do not fit in 4 slots"):
            call(**sizes)
    with pytest.raises(ValueError, match="not float64"):
        call(key="float64")
    for shadow, dtype in ((16, None), (0, "bfloat16")):
        with pytest.raises(ValueError, match="shadow and shadow_dtype go together"):
            call(shadow=shadow, shadow_dtype=dtype)
    with pytest.raises(ValueError, match="shadow must be bfloat16 or float16"):
        call(shadow=16, shadow_dtype="float32")


@pytest.mark.gpu
def test_captured_in_a_graph():
    queue, cursor = torch.zeros(8, 4, device="cuda"), torch.tensor([5], device="cuda")
    keys = torch.ones(3, 4, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with ops.use_backend("cuda"):
        ops.queue_enqueue_(queue, cursor, keys)
        with torch.cuda.graph(graph):
            ops.queue_enqueue_(queue, cursor, keys)
    for i in range(2, 6):
        keys.fill_(i)
        graph.replay()
    assert cursor.tolist() == [(5 + 3 * 5) % 8]
    assert queue[:, 0].tolist() == [4, 5, 5, 5, 3, 3, 4, 4]
