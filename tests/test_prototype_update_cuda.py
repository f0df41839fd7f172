"""csrc/prototype_update.cu against the loop: on the CPU through tests/host_cuda.py, and on a GPU if there is one."""

import pytest
import torch
import torch.nn.functional as F
from guarded import Guarded, bits, name

from mopro_fast import ops

CLASSES, AHEAD, COLUMNS, STAGE = 8, 4, 128, 8192  # of csrc/prototype_update.cu: where its paths change
BATCH = 8 * CLASSES * 32  # rows that its warps stage at once
JUNK = [-1, -2, 2**31, 2**32, 2**40, -(2**62), 2**63 - 1, -(2**63)]  # no label may be followed that is no class
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def loop(prototypes, features, labels, kept, momentum):
    """Float64, rounded to float32 where the kernel rounds: -> before the last step, after it, classes with a row."""
    m = float(torch.tensor(momentum))
    rest = float(torch.tensor(1.0) - torch.tensor(momentum))
    c, seen = prototypes.double(), torch.zeros(len(prototypes), dtype=torch.bool)
    for row in (labels >= 0).logical_and(labels < len(c)).logical_and(kept).nonzero()[:, 0].tolist():
        y = int(labels[row])
        product = (rest * features[row].double()).float().double()
        c[y] = (m * c[y] + product).float().double()
        seen[y] = True
    return c, c / c.norm(dim=1, keepdim=True).clamp(min=1e-12), seen


def check(kernels, prototypes, features, labels, kept=None, momentum=0.9, offsets=(0, 0), dtype=F32):
    """-> the new prototypes."""
    used = torch.ones(len(labels), dtype=torch.bool) if kept is None else kept
    features = features.to(dtype)
    _, expected, seen = loop(prototypes, features, labels, used, momentum)
    used = used & (labels >= 0) & (labels < len(prototypes))
    features = torch.where(used[:, None], features, float("nan"))  # what does not count must not be read
    bank = Guarded(prototypes, kernels.device, offsets[0])
    rows = Guarded(features, kernels.device, offsets[1])
    given = Guarded(labels, kernels.device)
    flags = Guarded((torch.ones(len(labels)) if kept is None else kept).to(torch.uint8), kernels.device)

    kernels.module.prototype_update(
        bank.pointer(), rows.pointer(), name(dtype), given.pointer(), 0 if kept is None else flags.pointer(),
        *prototypes.shape[:1], *features.shape, momentum, kernels.stream,
    )  # fmt: skip

    for guarded in (rows, given, flags):
        guarded.check(written=False)
    bank.check(written=True)
    got = bank.tensor.cpu()
    # Rounding of the norm's sum, its root and the division: far less than a row out of order or left out.
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-12, equal_nan=True)
    unit = ~seen & ((prototypes.double().norm(dim=1) - 1).abs() < 3e-7)
    assert torch.equal(bits(got[unit]), bits(prototypes[unit])), "classes without a row that are unit rows stay"
    return got


def unit_rows(n, d, generator):
    return F.normalize(torch.randn(n, d, generator=generator), dim=1)


def random_case(classes, rows, dim, seed=0, junk=0.3, kept_share=0.7):
    g = torch.Generator().manual_seed(seed)
    prototypes, features = unit_rows(classes, dim, g), unit_rows(rows, dim, g)
    prototypes[::3] = 0
    labels = torch.randint(max(classes, 1), (rows,), generator=g)
    wrong = torch.tensor([classes, classes + 1, *JUNK])[torch.randint(10, (rows,), generator=g)]
    labels = torch.where(torch.rand(rows, generator=g) < junk, wrong, labels)
    kept = None if kept_share is None else torch.rand(rows, generator=g) < kept_share
    return prototypes, features, labels, kept


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("dim", [1, 2, 8, 33, 65, 127, COLUMNS, COLUMNS + 1, 132, 2 * COLUMNS, 512, 700])
def test_widths(kernels, dim, dtype):
    check(kernels, *random_case(11, 70, dim), dtype=dtype)


@pytest.mark.parametrize("classes", [1, 2, CLASSES - 1, CLASSES, CLASSES + 1, 2 * CLASSES, 2 * CLASSES + 1, 100])
def test_numbers_of_classes(kernels, classes):
    check(kernels, *random_case(classes, 150, 8))
    check(kernels, *random_case(classes, 40, 5, kept_share=None))


@pytest.mark.parametrize("rows", [0, 1, 2, 31, 32, 33, 63, 64, 65, 255, 256, 257, 1023, 1024, 1025, 1056])
def test_numbers_of_rows(kernels, rows):
    check(kernels, *random_case(9, rows, 4))
    check(kernels, *random_case(9, rows, 3, kept_share=None, junk=0))


@pytest.mark.parametrize("rows", [*range(1, 3 * AHEAD), 31, 32, 33, 36, 64, 100])
@pytest.mark.parametrize("which", [0, 5])
def test_all_rows_of_one_class(kernels, rows, which):
    g = torch.Generator().manual_seed(rows)
    labels = torch.full((rows,), which)
    for momentum in (0.9, 0.5):
        check(kernels, unit_rows(6, 12, g), unit_rows(rows, 12, g), labels, None, momentum)


@pytest.mark.parametrize("dim", [4, COLUMNS + 4])
@pytest.mark.parametrize("rows", [BATCH, BATCH + 1, BATCH + 33, STAGE - 1, STAGE, STAGE + 1, STAGE + 33, 2 * STAGE + 5])
def test_labels_are_staged_in_pieces(kernels, rows, dim):
    """Rows on both sides of every boundary, few in between."""
    g = torch.Generator().manual_seed(rows)
    labels = torch.full((rows,), -1)
    for edge in (0, 1024, BATCH, STAGE, 2 * STAGE, rows):
        for row in range(max(0, edge - 34), min(rows, edge + 34), 3):
            labels[row] = int(torch.randint(9, (1,), generator=g))
    labels[-1] = labels[0] = 8
    kept = torch.rand(rows, generator=g) < 0.8
    kept[-1] = kept[0] = True
    check(kernels, unit_rows(9, dim, g), unit_rows(rows, dim, g), labels, kept)


@pytest.mark.medium
@pytest.mark.parametrize("order", [0, 1, 2])
def test_one_class_is_slow_and_the_others_are_ready_for_the_next_piece(host_cuda, kernels, order):
    """They must not stage it before the slow one has read the end of this one."""
    g = torch.Generator().manual_seed(5)
    labels = torch.full((2 * STAGE,), -1)
    labels[:900] = 3
    labels[STAGE - 500 : STAGE : 7] = 3
    labels[STAGE::97] = 5
    host_cuda.order(order)
    check(kernels, unit_rows(8, 4, g), unit_rows(len(labels), 4, g), labels, None, 0.999)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.5, 0.99, 0.999, 1.0])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_momenta(kernels, momentum, dtype):
    check(kernels, *random_case(5, 60, 16), momentum, dtype=dtype)


@pytest.mark.parametrize("offsets", [(1, 0), (0, 1), (2, 0), (0, 2), (3, 3)])
@pytest.mark.parametrize("dim", [8, 200])
@pytest.mark.parametrize("dtype", [F32, F16])
def test_misaligned(kernels, dtype, dim, offsets):
    check(kernels, *random_case(10, 50, dim), offsets=offsets, dtype=dtype)


@pytest.mark.parametrize("junk", JUNK)
def test_labels_that_are_no_class(kernels, junk):
    case = random_case(10, 40, 8, junk=0)
    case[2][::2] = junk
    check(kernels, *case)


@pytest.mark.parametrize("dim", [8, 128, 700, 2048])
def test_classes_without_a_row(kernels, dim):
    g = torch.Generator().manual_seed(3)
    prototypes = unit_rows(12, dim, g)
    prototypes[1] *= 3
    prototypes[2] *= 1 + 4e-6
    prototypes[3] = 0
    prototypes[4] *= 1e-9
    prototypes[5] *= 1e-14  # shorter than 1e-12: divided by that
    prototypes[6, 0] = float("nan")
    prototypes[7] *= 1e-6
    none = torch.empty(0, dtype=torch.int64)
    got = check(kernels, prototypes, torch.empty(0, dim), none)
    assert not got[3].any()
    again = check(kernels, prototypes, torch.empty(9, dim), torch.full((9,), 12), torch.ones(9, dtype=torch.bool))
    assert torch.equal(bits(got), bits(again))
    assert torch.equal(bits(check(kernels, got, torch.empty(0, dim), none)[:5]), bits(got[:5]))  # then they stay


def test_zero_prototypes_take_their_first_rows(kernels):
    g = torch.Generator().manual_seed(4)
    features = unit_rows(2, 16, g)
    got = check(kernels, torch.zeros(3, 16), features, torch.tensor([0, 2]), None, 0.999)
    torch.testing.assert_close(got[[0, 2]], features)
    assert not got[1].any()


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_the_order_of_blocks_and_threads_does_not_matter(host_cuda, kernels, order):
    if kernels.device == "cuda":
        pytest.skip("a GPU has an order of its own")
    for case in (random_case(19, 300, 200), random_case(9, STAGE + 40, 132, junk=0.99)):
        expected = check(kernels, *case)
        host_cuda.order(order)
        assert torch.equal(bits(check(kernels, *case)), bits(expected))
        host_cuda.order(0)


def test_same_bits_twice(kernels):
    a, b = (check(kernels, *random_case(50, 400, 128), dtype=BF16) for _ in range(2))
    assert torch.equal(bits(a), bits(b))


def test_launches(host_cuda, kernels):
    before = host_cuda.launches()
    check(kernels, *random_case(0, 10, 8))
    assert host_cuda.launches() == before
    if kernels.device == "cpu":
        check(kernels, *random_case(100, 300, 8))
        assert host_cuda.launches() == before + 1


def test_wrong_calls(host_cuda):
    for sizes in ((-1, 1, 1), (1, -1, 1), (1, 1, -1)):
        with pytest.raises(ValueError, match=r"prototype_update: .* sizes"):
            host_cuda.prototype_update(16, 16, "float32", 16, 0, *sizes, 0.9, 0)
    with pytest.raises(ValueError, match="not float64"):
        host_cuda.prototype_update(16, 16, "float64", 16, 0, 1, 1, 1, 0.9, 0)


@pytest.mark.usefixtures("cuda_on_host")
@pytest.mark.parametrize("kept_share", [None, 0.5])
def test_through_the_op(kept_share):
    """Arguments that are not contiguous; as the reference."""
    prototypes, features, labels, kept = random_case(7, 60, 10, junk=0.2, kept_share=kept_share)
    results = []
    for backend in ("cuda", "reference"):
        columns_first = prototypes.T.contiguous().T
        strided = torch.zeros(60, 20)[:, ::2].copy_(features)
        apart = torch.zeros(60, 2, dtype=torch.int64)[:, 0].copy_(labels)
        flags = None if kept is None else torch.zeros(60, 3, dtype=torch.bool)[:, 1].copy_(kept)
        with ops.use_backend(backend):
            ops.prototype_update_(columns_first, strided, apart, flags, 0.9)
        results.append(columns_first)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_captured_in_a_graph():
    prototypes, features, labels, kept = (x.cuda() for x in random_case(100, 300, 128))
    replayed = prototypes.clone()
    graph = torch.cuda.CUDAGraph()
    with ops.use_backend("cuda"):
        ops.prototype_update_(prototypes.clone(), features, labels, kept, 0.9)  # loads the kernel
        with torch.cuda.graph(graph):
            ops.prototype_update_(replayed, features, labels, kept, 0.9)
        for _ in range(3):
            graph.replay()
            ops.prototype_update_(prototypes, features, labels, kept, 0.9)
    assert torch.equal(prototypes, replayed)
