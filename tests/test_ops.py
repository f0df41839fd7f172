"""The ops on every backend: against plain float64 loops, gradients, checks, PyTorch's own op checks, backends.

Without a GPU the triton backend runs in Triton's interpreter and the cuda backend on the host (tests/host_cuda.py).
"""

import importlib
import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mopro_fast import kernels, ops
from mopro_fast.kernels import similarity
from mopro_fast.ops import backends, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Relative RMS against float64. Inputs are rounded to their type before both computations, so what is left is
# float32 arithmetic (1e-5: sums of up to 10^4 terms), the rounding of results, and in Triton's kernels, where both
# operands are of one 16-bit type, the rounding of the softmax to that type before it multiplies the bank.
# A softmax takes over the absolute error of its scores, q·k/T of up to |q|·|k|/T: of a score of 100 (T = 0.01) float32
# holds 4e-6, three tf32 products and the GPU's exp2 (2 ulp) leave a few times that. Hence the tolerance grows with 1/T.
TOLERANCE = 1e-5
# Triton's interpreter cuts float32 off to bfloat16, a GPU rounds.
ROUNDING = {F32: 0.0, BF16: 2**-8 if DEVICE == "cuda" else 2**-7, F16: 2**-11}
TYPES = [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32)]  # of q and k, of the bank
# N, C or Q, D: empty batch, one row, sizes that divide nothing, more rows than bank
SHAPES = [(0, 7, 8), (1, 1, 4), (5, 33, 32), (17, 10, 128), (40, 130, 65)]
SHAPES += [pytest.param(64, 257, 65, marks=pytest.mark.slow)]
# Several splits of several tiles, several blocks of rows, the widest embeddings, one beyond them
LARGE_SHAPES = [(33, 1100, 16), (65, 70, 256), (3, 2000, 128), (18, 130, 512), (2, 70, 768)]


pytestmark = pytest.mark.usefixtures("nan_filled_memory")


OPS_ON_BACKENDS = [(op, b) for b in backends.MODULES for op in backends.IMPLEMENTED[b]]


def on_backends(op: str):
    """Run the test on every backend that has `op`; an argument `backend` of the test is its name."""
    names = [b for b in backends.MODULES if op in backends.IMPLEMENTED[b]]
    each = pytest.mark.parametrize("backend", names, indirect=True)
    return lambda test: pytest.mark.usefixtures("backend")(each(test))


@pytest.fixture
def backend(request):
    if request.param == "cuda" and DEVICE == "cpu":
        request.getfixturevalue("cuda_on_host")
    with ops.use_backend(request.param):
        yield request.param


def unit_rows(n: int, d: int, seed: int, dtype=F32, device=DEVICE):
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, generator=g), dim=1).to(device, dtype)


def copied(x):
    if isinstance(x, torch.Tensor):
        return x.detach().clone()
    return [copied(y) for y in x] if isinstance(x, list) else x


def tensors(values) -> list[torch.Tensor]:
    out = []
    for v in values if isinstance(values, list | tuple) else [values]:
        out += tensors(v) if isinstance(v, list | tuple) else [v] if isinstance(v, torch.Tensor) else []
    return out


def rms_error(actual, expected, smallest: float = 1e-12) -> float:
    """Relative to the expected size, or to `smallest` where that is nearly nothing."""
    actual, expected = actual.double().cpu(), expected.double().cpu()
    assert actual.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    assert actual.isfinite().all()
    return float((actual - expected).norm() / expected.norm().clamp(min=smallest))


def score_tolerance(largest: float) -> float:
    """largest: score that there can be; at the method's T = 0.1 it is 10."""
    return TOLERANCE * max(1.0, largest / 10)


def gradient_tolerance(backend: str, q_type: torch.dtype, bank_type: torch.dtype, largest: float = 10) -> float:
    softmax = ROUNDING[bank_type] if backend == "triton" and q_type == bank_type else 0.0
    return score_tolerance(largest) + ROUNDING[q_type] + softmax


def check_info_nce(backend, n, bank, d, temperature, types, length=1.0):
    q_type, bank_type = types
    q, k = (length * unit_rows(n, d, seed, q_type) for seed in (1, 2))
    queue = unit_rows(bank, d, 3, bank_type)
    q.requires_grad_()
    loss, hit = ops.info_nce(q, k, queue, temperature)
    weight = torch.linspace(0.5, 2, n, device=DEVICE)
    (loss * weight).sum().backward()

    q64 = q.detach().cpu().double().requires_grad_()
    k64, queue64 = k.cpu().double(), queue.cpu().double()
    logits = torch.cat([(q64 * k64).sum(1, keepdim=True), q64 @ queue64.T], 1) / temperature
    expected = F.cross_entropy(logits, torch.zeros(n, dtype=torch.int64), reduction="none")
    (expected * weight.cpu().double()).sum().backward()
    assert loss.dtype == F32 and hit.dtype == torch.bool and q.grad.dtype == q_type
    # Where the bank is nearly empty the softmax is all but certain, and loss and gradient cancel to almost nothing.
    largest = length**2 / temperature
    assert rms_error(loss.detach(), expected.detach(), smallest=0.1) < score_tolerance(largest)
    assert rms_error(q.grad, q64.grad, smallest=0.1 / temperature) < gradient_tolerance(backend, *types, largest)
    margin = (logits[:, :1] - logits[:, 1:]).min(1).values if bank else torch.ones(n)
    sure = margin.abs() > 1e-4
    assert torch.equal(hit.cpu()[sure], (margin >= 0)[sure])


@on_backends("info_nce")
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("temperature", [0.1, 1.0, 0.01])
@pytest.mark.parametrize("n, bank, d", SHAPES)
def test_info_nce(n, bank, d, temperature, types, backend):
    check_info_nce(backend, n, bank, d, temperature, types)


@on_backends("info_nce")
@pytest.mark.parametrize("types", [(F32, F32), (BF16, BF16)])
@pytest.mark.parametrize("n, bank, d", [*LARGE_SHAPES, (4, 0, 8)])
def test_info_nce_over_many_splits(n, bank, d, types, backend):
    check_info_nce(backend, n, bank, d, 0.1, types)


@on_backends("info_nce")
@pytest.mark.parametrize("length", [1e-3, 30.0])
def test_info_nce_of_vectors_that_are_not_of_unit_length(length, backend):
    check_info_nce(backend, 9, 300, 16, 0.05, (F32, F32), length)


@on_backends("info_nce")
@pytest.mark.parametrize("half", [BF16, F16])
def test_info_nce_is_as_exact_as_pytorch_in_half_precision(half):
    q, k, queue = unit_rows(64, 128, 1, half), unit_rows(64, 128, 2, half), unit_rows(500, 128, 3, half)
    results = []
    for dtype in (half, torch.float64):
        x = q.detach().to(dtype).requires_grad_()
        logits = torch.cat([(x * k.to(dtype)).sum(1, keepdim=True), x @ queue.to(dtype).T], 1) / 0.1
        loss = F.cross_entropy(logits, torch.zeros(64, dtype=torch.int64, device=DEVICE), reduction="none")
        loss.sum().backward()
        results.append((loss.detach(), x.grad))
    q.requires_grad_()
    loss, _ = ops.info_nce(q, k, queue, 0.1)
    loss.sum().backward()
    for ours, theirs, exact in zip((loss.detach(), q.grad), *results, strict=True):
        assert rms_error(ours, exact) <= 2 * rms_error(theirs, exact)


@on_backends("info_nce")
def test_info_nce_counts_a_tie_as_a_hit():
    q, k, far = (torch.tensor([x], device=DEVICE) for x in ([1.0, 0.0], [1.0, 0.0], [0.9, 0.0]))
    assert ops.info_nce(q, k, k, 0.1)[1].tolist() == [True]
    assert ops.info_nce(q, far, k, 0.1)[1].tolist() == [False]


@on_backends("info_nce")
def test_info_nce_of_scores_that_are_no_numbers():
    q, queue = unit_rows(4, 8, 1), unit_rows(40, 8, 2)
    q[1] = float("nan")
    loss, hit = ops.info_nce(q, unit_rows(4, 8, 3), queue, 0.1)
    assert loss.isfinite().tolist() == [True, False, True, True] and not hit[1]
    queue[37] = float("nan")
    loss, hit = ops.info_nce(q, q, queue, 0.1)
    assert not loss.isfinite().any() and not hit.any()


def plain_correction(logits, q, prototypes, labels, alpha, threshold, temperature):
    """One row at a time, float64: -> new labels, kept, the winner and its score, and how far each row is from changing
    any decision."""
    out, kept, winner, score, margins = [], [], [], [], []
    classes = len(prototypes)
    for z, e, y in zip(logits.double(), q.double(), labels.tolist(), strict=True):
        t = alpha * z.softmax(0) + (1 - alpha) * (prototypes.double() @ e / temperature).softmax(0)
        best = int(t.argmax())
        sure = bool(t[best] > threshold)
        given = float(t[y]) if 0 <= y < classes else None
        out.append(best if sure else y)
        kept.append(sure or (given is not None and given > 1 / classes))
        winner.append(best)
        score.append(float(t[best]))
        top = t.sort(descending=True).values
        gaps = [abs(float(t[best]) - threshold), float(top[0] - top[1]) if classes > 1 else 1.0]
        margins.append(min(gaps + ([abs(given - 1 / classes)] if given is not None else [])))
    return tuple(map(torch.tensor, (out, kept, winner, score, margins)))


def check_correct_labels(n, classes, d, alpha, threshold, types):
    q_type, bank_type = types
    g = torch.Generator().manual_seed(4)
    logits = (4 * torch.randn(n, classes, generator=g)).to(q_type)
    q, prototypes = unit_rows(n, d, 5, q_type, "cpu"), unit_rows(classes, d, 6, bank_type, "cpu")
    labels = torch.randint(-1, classes, (n,), generator=g)
    labels[:4] = torch.tensor([-1, classes, 2**40, -(2**62)])  # none, and three that no kernel may follow
    *found, score = ops.correct_labels(
        logits.to(DEVICE), q.to(DEVICE), prototypes.to(DEVICE), labels.to(DEVICE),
        alpha=alpha, threshold=threshold, temperature=0.1, with_winner=True,
    )  # fmt: skip
    *expected, want_score, margin = plain_correction(logits, q, prototypes, labels, alpha, threshold, 0.1)
    sure = margin > 1e-5
    assert sure.float().mean() > 0.7
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got.cpu()[sure], want[sure])
    assert score.dtype == F32 and rms_error(score.cpu(), want_score) < TOLERANCE


@on_backends("correct_labels")
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("alpha, threshold", [(0.5, 0.8), (0.0, 0.3), (1.0, 0.5), (0.5, 0.0)])
@pytest.mark.parametrize("classes", [2, 10, 257])
def test_correct_labels(classes, alpha, threshold, types):
    check_correct_labels(200 if classes < 257 else 70, classes, 16, alpha, threshold, types)


@pytest.mark.medium
@on_backends("correct_labels")
@pytest.mark.parametrize("types", [(F32, F32), (BF16, BF16)])
@pytest.mark.parametrize("n, classes, d", [*LARGE_SHAPES[1:], (6, 6000, 16)])
def test_correct_labels_over_many_splits(n, classes, d, types):
    check_correct_labels(max(n, 6), classes, d, 0.5, 0.2, types)


@on_backends("correct_labels")
@pytest.mark.parametrize("types", [(F32, F32), (BF16, BF16)])
def test_correct_labels_traps(types):
    d, classes = 16, 800  # in the interpreter nine splits of three tiles; the last kernel reads them in two goes
    q, prototypes = torch.zeros(8, d, dtype=types[0]), torch.zeros(classes, d, dtype=types[1])
    logits = torch.zeros(8, classes, dtype=types[0])
    logits[0, [100, 101, 180, 790]] = 99.0
    logits[1, 3] = float("nan")
    logits[2, 101] = 99.0
    logits[4, 5], logits[4, 6] = float("inf"), 1.0
    logits[5, 1:] = float("-inf")
    q[6] = float("inf")
    logits[7] = float("-inf")
    labels = torch.tensor([2, 1, -1, 1, 5, 0, 4, 6])
    settings = {"alpha": 1.0, "threshold": 0.2, "temperature": 0.1}
    new, kept, winner, score = ops.correct_labels(
        *(x.to(DEVICE) for x in (logits, q, prototypes, labels)), **settings, with_winner=True
    )
    # a tie: the lowest class; NaN: left alone; none given: relabelled; all classes alike: 1/C is not above 1/C; +inf:
    # not finite; −inf is a probability of 0, but not for all classes; the prototypes' scores are not finite
    assert new.tolist() == [100, 1, 101, 1, 5, 0, 4, 6]
    assert kept.tolist() == [True, False, True, False, False, True, False, False]
    assert winner.tolist() == [100, -1, 101, 0, -1, 0, -1, -1]  # −1: a score is not finite
    assert score.tolist() == pytest.approx([0.25, 0, 1, 1 / 800, 0, 1, 0, 0], rel=1e-5)
    assert labels.tolist() == [2, 1, -1, 1, 5, 0, 4, 6]


def anchored_rows():
    """Two classes; the classifier alone decides. Scores, labels and anchors of rows that anchors and ties decide."""
    nan, even = float("nan"), [0.0, 0.0]
    rows = [
        # logits, label, anchor
        ([0.0, 9.0], 0, True),  # the scores prefer 1
        ([0.0, 9.0], 0, False),
        ([0.0, 9.0], -1, True),  # an anchor without a label is as any other row
        ([0.0, 9.0], 2, True),
        ([0.0, 9.0], 2**40, True),
        ([nan, 9.0], 1, True),
        (even, 1, False),  # t is ½ = 1/C for both
        (even, 1, True),
        (even, -1, True),
        ([1.0, 0.0], 1, False),
    ]
    return rows


@on_backends("correct_labels")
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("inclusive", [True, False])
@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_correct_labels_of_anchors_and_ties(threshold, inclusive, given):
    logits, labels, anchors = (torch.tensor(x, device=DEVICE) for x in zip(*anchored_rows(), strict=True))
    n, zeros = len(labels), torch.zeros(len(labels), 4, device=DEVICE)
    new, kept, winner, score = ops.correct_labels(
        logits, zeros, zeros[:2], labels, alpha=1.0, threshold=threshold, temperature=0.1,
        anchors=anchors if given else None, inclusive=inclusive, with_winner=True,
    )  # fmt: skip
    tie = threshold == 0.5 and inclusive  # t = ½ reaches the threshold
    wanted = [
        (0, True) if given else (1, True),
        (1, True), (1, True), (1, True), (1, True),
        (1, False),
        (0, True) if tie else (1, inclusive),
        (1, True) if given else (0, True) if tie else (1, inclusive),
        (0, True) if tie else (-1, False),
        (0, True) if threshold == 0.5 else (1, False),
    ]  # fmt: skip
    assert list(zip(new.tolist(), kept.tolist(), strict=True)) == wanted
    assert winner.tolist() == [1] * 5 + [-1, 0, 0, 0, 0]  # what the scores prefer, whatever an anchor keeps
    assert score.tolist() == pytest.approx([0.99988] * 5 + [0, 0.5, 0.5, 0.5, 0.731], abs=1e-4) and n == 10


@on_backends("correct_labels")
@pytest.mark.parametrize("classes", [3, 7, 10, 81, 500, 1000])
def test_correct_labels_where_every_class_ties(classes):
    """t[y] is 1/C as float32 has it, which is not above 1/C."""
    zeros, labels = torch.zeros(3, 4, device=DEVICE), torch.tensor([0, classes - 1, classes], device=DEVICE)
    for inclusive in (False, True):
        _, kept = ops.correct_labels(
            torch.zeros(3, classes, device=DEVICE), zeros, zeros[:1].expand(classes, 4), labels,
            alpha=0.5, threshold=0.6, temperature=0.1, inclusive=inclusive,
        )  # fmt: skip
        assert kept.tolist() == [inclusive, inclusive, False]


@on_backends("correct_labels")
@pytest.mark.parametrize("types", [(F32, F32), (BF16, BF16)])
@pytest.mark.parametrize("inclusive", [True, False])
def test_correct_labels_with_anchors_equals_the_reference(inclusive, types):
    g = torch.Generator().manual_seed(14)
    n, classes = 150, 300
    logits = (4 * torch.randn(n, classes, generator=g)).to(DEVICE, types[0])
    q, prototypes = unit_rows(n, 16, 15, types[0]), unit_rows(classes, 16, 16, types[1])
    labels = torch.randint(-1, classes + 1, (n,), generator=g).to(DEVICE)
    anchors = (torch.rand(n, generator=g) < 0.5).to(DEVICE)
    settings = {"alpha": 0.5, "threshold": 0.2, "temperature": 0.1, "inclusive": inclusive, "with_winner": True}
    found = ops.correct_labels(logits, q, prototypes, labels, anchors=anchors, **settings)
    plain = ops.correct_labels(logits, q, prototypes, labels, **settings)
    *_, margin = plain_correction(*(x.cpu() for x in (logits, q, prototypes, labels)), 0.5, 0.2, 0.1)
    sure = (margin > 1e-5).to(DEVICE)
    held = anchors & (labels >= 0) & (labels < classes)
    with ops.use_backend("reference"):
        expected = ops.correct_labels(logits, q, prototypes, labels, anchors=anchors, **settings)
    for a, b in zip(found[:3], expected[:3], strict=True):
        assert torch.equal(a[sure | held], b[sure | held])
    assert sure.float().mean() > 0.7 and (held & (plain[0] != labels)).any() and (held & ~plain[1]).any()
    assert torch.equal(found[0][held], labels[held]) and found[1][held].all()
    for a, b in zip(found, plain, strict=True):
        assert torch.equal(a[~held], b[~held])
    assert torch.equal(found[2], plain[2]) and torch.equal(found[3], plain[3])


def check_prototype_contrast(backend, n, classes, d, kept_share, types):
    q_type, bank_type = types
    g = torch.Generator().manual_seed(7)
    q, prototypes = unit_rows(n, d, 8, q_type).requires_grad_(), unit_rows(classes, d, 9, bank_type)
    labels = torch.randint(-1, classes + 1, (n,), generator=g)
    if n > 4:
        labels[:2] = torch.tensor([2**40, -(2**62)])
    kept = None if kept_share is None else torch.rand(n, generator=g) < kept_share
    loss = ops.prototype_contrast(q, prototypes, labels.to(DEVICE), None if kept is None else kept.to(DEVICE), 0.1)
    weight = torch.linspace(0.5, 2, n)
    (loss * weight.to(DEVICE)).sum().backward()

    q64 = q.detach().cpu().double().requires_grad_()
    use = (labels >= 0) & (labels < classes) & (True if kept is None else kept)
    scores = q64 @ prototypes.cpu().double().T / 0.1
    per_row = F.cross_entropy(scores, torch.where(use, labels, -100), ignore_index=-100, reduction="none")
    (per_row * weight.double()).sum().backward()
    assert loss.dtype == F32 and q.grad.dtype == q_type
    assert rms_error(loss.detach(), per_row.detach(), smallest=0.1) < TOLERANCE
    assert rms_error(q.grad, q64.grad, smallest=1.0) < gradient_tolerance(backend, *types)
    assert not loss.detach().cpu()[~use].any() and not q.grad.cpu()[~use].any()


@on_backends("prototype_contrast")
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("kept_share", [None, 0.0, 0.5])
@pytest.mark.parametrize("n, classes, d", SHAPES)
def test_prototype_contrast(n, classes, d, kept_share, types, backend):
    check_prototype_contrast(backend, n, classes, d, kept_share, types)


@on_backends("prototype_contrast")
@pytest.mark.parametrize("types", [(F32, F32), (BF16, BF16)])
@pytest.mark.parametrize("n, classes, d", LARGE_SHAPES)
def test_prototype_contrast_over_many_splits(n, classes, d, types, backend):
    check_prototype_contrast(backend, n, classes, d, 0.5, types)


def plain_mopro_loss(logits, q, k, queue, prototypes, labels, c):
    """Steps 3, 5 and 8 of the method as they are written, float64; -> loss and metrics."""
    inst_logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / c["temperature"]
    inst = F.cross_entropy(inst_logits, torch.zeros(len(q), dtype=torch.int64), reduction="none")
    s = q @ prototypes.T / c["temperature"]
    rows = [i for i in range(len(q)) if 0 <= labels[i] < len(prototypes)]
    cls = F.cross_entropy(logits[rows], labels[rows]) if rows else torch.zeros(())
    proto = F.cross_entropy(s[rows], labels[rows]) if rows and c["contrast"] else torch.zeros(())
    loss = cls + c["w_proto"] * proto + c["w_inst"] * inst.mean()
    right = float((logits.argmax(1) == labels)[rows].double().mean()) if rows else 0.0
    hit = float((inst_logits.argmax(1) == 0).double().mean())
    metrics = [float(x.detach()) for x in (loss, cls, proto, inst.mean())]
    return loss, [*metrics, right, hit, len(rows) / len(q)]


def check_mopro_loss(backend, n, classes, slots, d, contrast, types, logits_type=None):
    q_type, bank_type = types
    logits_type = logits_type or q_type
    c = {"temperature": 0.1, "w_proto": 0.7, "w_inst": 1.3, "contrast": contrast}
    g = torch.Generator().manual_seed(3)
    logits = (3 * torch.randn(n, classes, generator=g)).to(logits_type)
    q, k = unit_rows(n, d, 1, q_type, "cpu"), unit_rows(n, d, 2, q_type, "cpu")
    queue, prototypes = unit_rows(slots, d, 3, bank_type, "cpu"), unit_rows(classes, d, 4, bank_type, "cpu")
    labels = torch.randint(-1, classes, (n,), generator=g)
    kept = torch.rand(n, generator=g) < 0.8
    ours = [x.to(DEVICE, copy=True) for x in (logits, q, k, queue, prototypes, labels)]
    ours[0].requires_grad_(), ours[1].requires_grad_()
    if n % 2:
        out, labels = ops.mopro_loss(*ours, kept.to(DEVICE), **c), torch.where(kept, labels, -1)
    else:
        out = ops.mopro_loss(*ours, **c)
    (3 * out.loss).backward()

    logits, q, k, queue, prototypes = (x.double() for x in (logits, q, k, queue, prototypes))
    logits.requires_grad_(), q.requires_grad_()
    loss, metrics = plain_mopro_loss(logits, q, k, queue, prototypes, labels, c)
    (3 * loss).backward()
    assert out.loss.shape == () and torch.equal(out.metrics[0], out.loss)
    assert rms_error(out.metrics, torch.tensor(metrics)) < TOLERANCE
    wanted = logits.grad if logits.grad is not None else torch.zeros_like(logits)
    assert rms_error(ours[0].grad, wanted, smallest=0.1) < TOLERANCE + ROUNDING[logits_type]
    assert rms_error(ours[1].grad, q.grad, smallest=0.1) < gradient_tolerance(backend, *types)
    assert ours[0].grad.dtype == logits_type and ours[1].grad.dtype == q_type


@pytest.mark.medium
@on_backends("mopro_loss")
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("contrast", [True, False])
@pytest.mark.parametrize(
    "n, classes, slots, d",
    [(1, 2, 1, 4), (9, 10, 70, 32), (40, 130, 33, 128), pytest.param(40, 257, 33, 128, marks=pytest.mark.slow)],
)
def test_mopro_loss(n, classes, slots, d, contrast, types, backend):
    check_mopro_loss(backend, n, classes, slots, d, contrast, types)


@pytest.mark.medium
@on_backends("mopro_loss")
@pytest.mark.parametrize(
    "n, classes, slots, d, dtype",
    [
        (7, 1100, 5, 16, F32),
        (7, 1100, 5, 16, BF16),
        (9, 1025, 40, 300, F32),
        pytest.param(1100, 5, 6, 4, F32, marks=pytest.mark.slow),
    ],
)
def test_mopro_loss_over_many_classes_and_rows(n, classes, slots, d, dtype, backend):
    check_mopro_loss(backend, n, classes, slots, d, True, (dtype, dtype))


@on_backends("mopro_loss")
def test_mopro_loss_over_rows_that_are_not_added_at_once(backend, monkeypatch):
    module = importlib.import_module("mopro_fast.kernels.mopro_loss")
    monkeypatch.setattr(module, "SUM_ROWS", 16)
    check_mopro_loss(backend, 35, 5, 6, 4, True, (F32, F32))


@on_backends("mopro_loss")
def test_mopro_loss_under_autocast(backend):
    """As the trainer calls it: the classifier's logits in bfloat16, unit vectors and banks in float32."""
    check_mopro_loss(backend, 33, 70, 100, 128, True, (F32, F32), logits_type=BF16)


@on_backends("mopro_loss")
def test_mopro_loss_traps():
    """No row kept, labels that no kernel may follow, scores that are no numbers, no rows at all."""
    queue, prototypes = unit_rows(9, 8, 1), unit_rows(5, 8, 2)

    def run(labels, logits):
        logits = logits.to(DEVICE).requires_grad_()
        q, k = unit_rows(len(labels), 8, 3).requires_grad_(), unit_rows(len(labels), 8, 4)
        labels = torch.tensor(labels, dtype=torch.int64, device=DEVICE)
        out = ops.mopro_loss(logits, q, k, queue, prototypes, labels, temperature=0.1)
        out.loss.backward()
        assert out.loss.isfinite() and out.metrics.isfinite().all()
        return out, logits.grad, q.grad

    out, logits_grad, q_grad = run([-1, 5, 2**40, -(2**62)], torch.zeros(4, 5))
    assert not logits_grad.any() and q_grad.isfinite().all() and q_grad.any()
    assert out.metrics[[1, 2, 4, 6]].tolist() == [0] * 4 and out.loss == out.metrics[3]
    out, logits_grad, _ = run([-1, 5, 2**40, 3], torch.zeros(4, 5))
    assert out.metrics[6] == 1 / 4
    assert logits_grad.any(1).tolist() == [False, False, False, True]
    nan = torch.zeros(2, 5)
    nan[0], nan[1, 2] = float("nan"), 9.0
    out, logits_grad, q_grad = run([-1, 2], nan)  # correct_labels keeps no such row
    assert out.metrics[6] == 1 / 2 and logits_grad.isfinite().all() and q_grad.isfinite().all()
    out, logits_grad, q_grad = run([], torch.zeros(0, 5))
    assert out.loss == 0 and not out.metrics.any() and logits_grad.shape == (0, 5) and q_grad.shape == (0, 8)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that appears beside `known` ones."""

    def __init__(self, *known):
        super().__init__()
        self.known, self.bytes = {x.data_ptr() for x in known}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor) and x.data_ptr() not in self.known:
                self.bytes = max(self.bytes, x.nbytes)
        return out


@pytest.mark.medium
def test_nothing_as_large_as_rows_by_bank_is_allocated():
    """Partial results are as many as programs run at a time, whatever N, Q and C are."""
    n, d, bank = 40, 4, 1500
    q, k, queue = unit_rows(n, d, 1), unit_rows(n, d, 2), unit_rows(bank, d, 3)
    logits, labels = torch.zeros(n, bank, device=DEVICE), torch.zeros(n, dtype=torch.int64, device=DEVICE)
    largest = {}
    for module in (kernels, reference):
        with Largest(logits, queue) as seen:
            module.info_nce(q, k, queue, 0.1)
            module.prototype_contrast(q, queue, labels, None, 0.1)
            module.correct_labels(logits, q, queue, labels, 0.5, 0.8, 0.1)
            module.mopro_loss(logits, q, k, queue, queue, labels, None, 0.1, 1.0, 1.0, True)
        largest[module] = seen.bytes
    programs = similarity.programs(torch.device(DEVICE))
    assert 0 < largest[kernels] <= 2 * 4 * programs * 64 * d
    assert largest[reference] >= 4 * n * bank  # this test can see such a tensor


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("op, backend", OPS_ON_BACKENDS, indirect=["backend"])
def test_autograd_notices_what_an_op_overwrites(op):
    torch.use_deterministic_algorithms(False)
    with ops.use_backend("reference"):
        arguments = [copied(x) for x in some_arguments()[op]]
    function = getattr(torch.ops.mopro_fast, op).default
    before = [[x._version for x in tensors(a)] for a in arguments]
    with torch.no_grad():
        function(*arguments)
    for argument, old, schema in zip(arguments, before, function._schema.arguments, strict=False):
        written = schema.alias_info is not None and schema.alias_info.is_write
        assert all((x._version > v) == written for x, v in zip(tensors(argument), old, strict=True)), schema.name


def test_gradcheck():
    wide = [
        x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in some_arguments()["mopro_loss"]
    ]
    logits, q, k, queue, prototypes, labels, kept = (x.detach() for x in wide[:7])

    def everything(logits, q):
        loss = ops.mopro_loss(logits, q, k, queue, prototypes, labels, kept, temperature=0.5).loss
        return loss, ops.info_nce(q, k, queue, 0.5)[0], ops.prototype_contrast(q, prototypes, labels, None, 0.5)

    assert torch.autograd.gradcheck(everything, (logits.requires_grad_(), q.requires_grad_()))


@on_backends("info_nce")
def test_gradients_are_of_first_order():
    q, k, weight = (
        unit_rows(3, 8, 1).requires_grad_(),
        unit_rows(3, 8, 2),
        torch.ones(3, device=DEVICE).requires_grad_(),
    )
    loss, _ = ops.info_nce(q, k, k, 0.1)
    (grad,) = torch.autograd.grad((loss * weight).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.medium
@on_backends("mopro_loss")
def test_the_same_bits_twice():
    def run():
        q, k, bank = unit_rows(40, 32, 1).requires_grad_(), unit_rows(40, 32, 2), unit_rows(150, 32, 3)
        logits = torch.randn(40, 150, generator=torch.Generator().manual_seed(5)).to(DEVICE).requires_grad_()
        labels = torch.arange(40, device=DEVICE)
        out = ops.mopro_loss(logits, q, k, bank, bank, labels, temperature=0.1)
        out.loss.backward()
        settings = {"alpha": 0.5, "threshold": 0.1, "temperature": 0.1}
        decided = ops.correct_labels(logits, q, bank, labels, **settings, with_winner=True)
        return [*out, logits.grad, q.grad, *decided, *ops.info_nce(q, k, bank, 0.1)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@on_backends("prototype_update_")
@pytest.mark.parametrize("momentum", [0.999, 0.5, 0.0, 1.0])
@pytest.mark.parametrize("rows, classes, d", [(0, 3, 4), (1, 1, 8), (50, 4, 16), (300, 1000, 128), (257, 7, 33)])
def test_prototype_update_is_the_sequential_loop(rows, classes, d, momentum):
    g = torch.Generator().manual_seed(10)
    prototypes, features = unit_rows(classes, d, 11, device="cpu"), unit_rows(rows, d, 12, device="cpu")
    prototypes[::3] = 0
    labels = torch.randint(-1, classes + 1, (rows,), generator=g)
    kept = torch.rand(rows, generator=g) < 0.7
    features[~kept] = float("nan")  # what is left out must not leak in
    expected = prototypes.double()
    for f, y, keep in zip(features.double(), labels.tolist(), kept.tolist(), strict=True):
        if keep and 0 <= y < classes:
            expected[y] = momentum * expected[y] + (1 - momentum) * f
    expected = F.normalize(expected, dim=1)
    got, again = (prototypes.to(DEVICE, copy=True) for _ in range(2))
    for p in (got, again):
        assert ops.prototype_update_(p, features.to(DEVICE), labels.to(DEVICE), kept.to(DEVICE), momentum) is None
    assert rms_error(got, expected) < 1e-6
    assert torch.equal(got, again)
    untouched = (prototypes == 0).all(1) & (expected == 0).all(1)
    assert not got.cpu()[untouched].any()


@on_backends("queue_enqueue_")
@pytest.mark.parametrize("slots, batches", [(8, [3, 3, 3, 8]), (5, [5, 1, 0, 4]), (1, [1, 1]), (64, [7] * 30)])
def test_queue_enqueue_wraps_round(slots, batches):
    queue = unit_rows(slots, 4, 13)
    expected, at = queue.tolist(), 0
    cursor = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    for i, m in enumerate(batches):
        keys = unit_rows(m, 4, 20 + i)
        assert ops.queue_enqueue_(queue, cursor, keys) is None
        for row in keys.tolist():
            expected[at] = row
            at = (at + 1) % slots
        assert queue.tolist() == expected and cursor.tolist() == [at]


@on_backends("ema_update_")
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.999, 1.0])
def test_ema_update(momentum, dtype):
    shapes = [(), (1,), (0, 3), (7, 5), (64, 3, 7, 7), (2048,)]
    g = torch.Generator().manual_seed(14)
    targets = [torch.randn(s, generator=g).to(DEVICE) for s in shapes]
    sources = [torch.randn(s, generator=g).to(DEVICE, dtype).requires_grad_() for s in shapes]
    for x in (targets, sources):
        x[4] = x[4].detach().to(memory_format=torch.channels_last)
    shadows = [torch.empty_like(t, dtype=torch.bfloat16) for t in targets]
    expected = [
        momentum * t.double() + (1 - momentum) * s.detach().double() for t, s in zip(targets, sources, strict=True)
    ]
    ops.ema_update_(targets, sources, momentum, shadows)
    for t, s, e in zip(targets, shadows, expected, strict=True):
        assert rms_error(t, e) < 1e-6
        assert torch.equal(s, t.to(torch.bfloat16))
    ops.ema_update_([], [], 0.5)


def some_arguments() -> dict[str, tuple]:
    q, k, bank = unit_rows(6, 8, 1).requires_grad_(), unit_rows(6, 8, 2), unit_rows(11, 8, 3)
    labels = torch.tensor([0, 3, -1, 10, 3, 11], device=DEVICE)
    kept = torch.tensor([True, True, True, False, True, True], device=DEVICE)
    logits = torch.randn(6, 11, generator=torch.Generator().manual_seed(5)).to(DEVICE).requires_grad_()
    cursor = torch.tensor([9], device=DEVICE)
    loss = (logits, q, k, bank, bank, labels, kept, 0.1, 1.0, 1.0, True)
    found = [x.detach() for x in torch.ops.mopro_fast.mopro_loss(*loss)]
    pixels = torch.arange(6 * 5 * 4 * 3, device=DEVICE).to(torch.uint8)
    images = torch.tensor([[60 * i, 5, 4] for i in range(6)], device=DEVICE)
    boxes = torch.tensor([[[0, 1, 5, 3], [2, 0, 2, 4]]] * 6, device=DEVICE)
    factors = torch.tensor([[1.3, 0.7, 1.2, 0.1]] * 6, device=DEVICE)
    order = torch.tensor([[3, 1, 0, 2]] * 6, device=DEVICE)
    flips = torch.stack([kept, ~kept], 1)
    maps = torch.randn(2, 4, 5, 3, 2, generator=torch.Generator().manual_seed(6)).to(DEVICE)
    x, residual = (m.contiguous(memory_format=torch.channels_last).requires_grad_() for m in maps)
    weight, bias = (logits.detach()[i, :5].clone().requires_grad_() for i in (0, 1))
    stats = [maps[i, :2, :, 0, 0].clone() for i in (0, 1)]
    channel = [t.detach() for t in (*stats, weight, bias)]
    return {
        "info_nce": (q, k, bank, 0.1),
        "correct_labels": (logits.detach(), q.detach(), bank, labels, 0.5, 0.8, 0.1, kept, True),
        "mopro_loss": loss,
        "mopro_loss_backward": (found[0], logits.detach(), labels, kept, *found[2:], 1.0, 1.0, F32),
        "prototype_contrast": (q, bank, labels, kept, 0.1),
        "prototype_update_": (bank.clone(), k, labels, kept, 0.9),
        "queue_enqueue_": (bank.clone(), cursor, k),
        "ema_update_": ([k.clone()], [bank[:6].clone()], 0.9, [k.bfloat16()]),
        "sgd_ema_update_": (
            [k.clone()], [bank[:6].bfloat16()], [k / 2], [k / 3], torch.full((1,), 0.1, device=DEVICE),
            0.9, 1e-4, True, 0.99, [k.bfloat16()], [k.bfloat16()],
        ),
        "collective_targets": (q.detach(), bank, k[[0, 3] * 5], k[[1, 2] * 5], 0.4, 0.1, "softmax", BF16),
        "soft_neighbour_labels": (q.detach(), bank, logits.detach().T.abs(), 0.1, "linear"),
        "two_views": (pixels, images, boxes, flips, kept, factors, order, 4),
        "normalize": (pixels.view(6, 5, 4, 3), kept, BF16, maps.flatten()[:18].view(6, 3).clone(), 4),
        "batch_norm_stats_": (x.detach(), bias.detach().clone(), weight.detach().abs(), 0.1, 1e-5, 2),
        "batch_norm_act": (x, *stats, weight, bias, residual, True),
        "batch_norm_act_backward": (residual.detach(), maps[0], x.detach(), maps[1], *channel, True),
        "batch_norm_relu_pool": (x, *stats, weight, bias, True),
        "batch_norm_relu_pool_backward": (
            maps[0, :, :, :2, :1], maps[1, :, :, :2, :1], x.detach(), maps[0, :, :, :2, :1],
            (torch.arange(40, device=DEVICE) % 10).byte().view(4, 5, 2, 1), *channel,
        ),
        "conv1x1_stats_": (
            x.detach(), torch.linspace(-1, 1, 35, device=DEVICE).view(7, 5, 1, 1), *torch.ones(2, 7, device=DEVICE),
            channel, 0.1, 1e-5, 2,
        ),
    }  # fmt: skip


@pytest.mark.medium
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("op, backend", OPS_ON_BACKENDS, indirect=["backend"])
def test_opcheck(op):
    torch.use_deterministic_algorithms(False)
    with ops.use_backend("reference"):
        arguments = some_arguments()
    torch.library.opcheck(getattr(torch.ops.mopro_fast, op).default, arguments[op])


def test_a_whole_step_compiles_without_graph_breaks_and_repeats_bit_for_bit():
    def step(q, k, queue, cursor, prototypes, logits, labels, master, buffer):
        inst, hit = ops.info_nce(q, k, queue, 0.1)
        soft = ops.collective_targets(q, queue, prototypes, prototypes, alpha=0.5, temperature=0.1, dtype=BF16)
        soft = soft + ops.soft_neighbour_labels(q, prototypes, queue)[:, :1]
        rule = {"alpha": 0.5, "threshold": 0.3, "temperature": 0.1, "inclusive": True}
        labels, kept = ops.correct_labels(logits, q, prototypes, labels, anchors=labels == 3, **rule)
        out = ops.mopro_loss(logits, q, k, queue, prototypes, labels, kept, temperature=0.1)
        ops.queue_enqueue_(queue, cursor, k)
        proto = ops.prototype_contrast(q, prototypes, labels, kept, 0.1)
        ops.prototype_update_(prototypes, q, labels, kept, 0.9)
        ops.ema_update_([master], [prototypes], 0.9)
        ops.sgd_ema_update_(
            [master],
            [prototypes],
            [buffer],
            [queue],
            lr=0.1,
            momentum=0.9,
            weight_decay=1e-4,
            nesterov=False,
            ema_momentum=0.9,
        )
        return out.loss + inst.sum() + proto.sum(), out.metrics, hit, labels, kept, soft

    def run(function):
        q, k, bank, _ = some_arguments()["info_nce"]
        logits, _, prototypes, labels, *_ = some_arguments()["correct_labels"]
        state = [
            bank,
            torch.tensor([9], device=DEVICE),
            prototypes.clone(),
            *torch.zeros(2, 11, 8, device=DEVICE).unbind(),
        ]
        loss, *rest = function(q, k, *state[:3], logits, labels, *state[3:])
        loss.backward()
        return [loss.detach(), *rest, q.grad, *state]

    torch.use_deterministic_algorithms(False)
    eager, again = run(step), run(step)
    compiled = run(torch.compile(step, fullgraph=True, backend="aot_eager"))
    for a, b, c in zip(eager, again, compiled, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def targets(**wrong):
    right = {"z": torch.zeros(2, 4), "keys": torch.zeros(3, 4)}
    right |= {"aux_weight": torch.zeros(6, 4), "prototypes": torch.zeros(6, 4), "alpha": 0.5, "temperature": 0.1}
    return ops.collective_targets(**right | wrong)


MISTAKES = {
    "temperature must be a plain number, got Parameter": lambda: ops.info_nce(
        *[torch.zeros(2, 4)] * 3, torch.nn.Parameter(torch.tensor(0.1))
    ),
    "targets must be a list of tensors, got generator": lambda: ops.ema_update_(
        torch.nn.Linear(2, 2).parameters(), [], 0.5
    ),
    "prototypes must have at least one row, got 0": lambda: ops.prototype_contrast(
        torch.zeros(2, 4), torch.zeros(0, 4), torch.zeros(2, dtype=torch.int64), None, 0.1
    ),
    "lr must be a finite number of at least 0, got nan": lambda: ops.sgd_ema_update_(
        *[[torch.zeros(2)]] * 4, lr=float("nan"), momentum=0.9, weight_decay=0, nesterov=False, ema_momentum=0.9
    ),
    "q must have shape [N, D], got [3]": lambda: ops.info_nce(torch.zeros(3), torch.zeros(3), torch.zeros(2, 3), 0.1),
    "queue must have shape [Q, 4], got [2, 5]": lambda: ops.info_nce(*[torch.zeros(2, 4)] * 2, torch.zeros(2, 5), 0.1),
    "k must be on cpu, got meta": lambda: ops.info_nce(
        torch.zeros(2, 4), torch.zeros(2, 4, device="meta"), torch.zeros(2, 4), 0.1
    ),
    "temperature must be a finite number above 0, got 0": lambda: ops.info_nce(*[torch.zeros(2, 4)] * 3, 0),
    "labels must be int64, got int32": lambda: ops.prototype_contrast(
        torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(2, dtype=torch.int32), None, 0.1
    ),
    "kept must have shape [2], got [3]": lambda: ops.prototype_update_(
        torch.zeros(3, 4), torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), torch.ones(3, dtype=torch.bool), 0.9
    ),
    "prototypes must be float32, got bfloat16": lambda: ops.prototype_update_(
        torch.zeros(3, 4).bfloat16(), torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), None, 0.9
    ),
    "momentum must lie in [0, 1], got 1.5": lambda: ops.ema_update_([torch.zeros(2)], [torch.zeros(2)], 1.5),
    "sources must hold 1 tensors, one per target, got 0": lambda: ops.ema_update_([torch.zeros(2)], [], 0.5),
    "sources[0] must have shape [2], got [3]": lambda: ops.ema_update_([torch.zeros(2)], [torch.zeros(3)], 0.5),
    "keys must have at most Q=2 rows, got 3": lambda: ops.queue_enqueue_(
        torch.zeros(2, 4), torch.zeros(1, dtype=torch.int64), torch.zeros(3, 4)
    ),
    "cursor must be int64, got float32": lambda: ops.queue_enqueue_(
        torch.zeros(2, 4), torch.zeros(1), torch.zeros(1, 4)
    ),
    "queue must be a tensor, got list": lambda: ops.queue_enqueue_([], torch.zeros(1), torch.zeros(1, 4)),
    "anchors must be bool, got int64": lambda: ops.correct_labels(
        torch.zeros(2, 3), torch.zeros(2, 8), torch.zeros(3, 8), torch.zeros(2, dtype=torch.int64),
        alpha=0.5, threshold=0.8, temperature=0.1, anchors=torch.zeros(2, dtype=torch.int64),
    ),
    "z must have at least one column, got shape [N, 0]": lambda: ops.soft_neighbour_labels(
        torch.zeros(2, 0), torch.zeros(3, 0), torch.zeros(3, 4)
    ),
    "keys must have at least one row, got 0": lambda: targets(keys=torch.zeros(0, 4)),
    "keys must have shape [Q, 4], got [3, 5]": lambda: targets(keys=torch.zeros(3, 5)),
    "keys must be on cpu, got meta": lambda: targets(keys=torch.zeros(3, 4, device="meta")),
    "values must have shape [3, C], got [2, 4]": lambda: ops.soft_neighbour_labels(
        torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(2, 4)
    ),
    "values must be float32 or bfloat16 or float16 or float64, got int64": lambda: ops.soft_neighbour_labels(
        torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.int64)
    ),
    "aux_weight must have shape [6, 4], got [5, 4]": lambda: targets(aux_weight=torch.zeros(5, 4)),
    "prototypes must have shape [C, 4], got [6, 5]": lambda: targets(prototypes=torch.zeros(6, 5)),
    "alpha must lie in [0, 1], got -0.5": lambda: targets(alpha=-0.5),
    "temperature must be a finite number above 0, got nan": lambda: targets(temperature=float("nan")),
    "weights must be linear or softmax, got cosine": lambda: targets(weights="cosine"),
    "dtype must be bfloat16, float16 or None, got torch.float64": lambda: targets(dtype=torch.float64),
    "logits must have shape [2, 3], got [2, 4]": lambda: ops.correct_labels(
        torch.zeros(2, 4), torch.zeros(2, 8), torch.zeros(3, 8), torch.zeros(2, dtype=torch.int64),
        alpha=0.5, threshold=0.8, temperature=0.1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_named(message):
    with pytest.raises(ValueError) as caught:
        MISTAKES[message]()
    assert str(caught.value) == message


def test_an_explicit_backend_that_cannot_run_raises():
    with ops.use_backend("reference"):
        ops.info_nce(*[unit_rows(2, 4, 1)] * 3, 0.1)
    with pytest.raises(ValueError, match="unknown backend 'tritn'"), ops.use_backend("tritn"):
        pass
    refused = pytest.raises(RuntimeError, match="cuda backend was asked for but cannot run ema_update_")
    with refused, ops.use_backend("cuda"):
        ops.ema_update_([torch.zeros(2)], [torch.zeros(2)], 0.5)
    ops.ema_update_([torch.zeros(2)], [torch.zeros(2)], 0.5)  # the choice ended with the block


def test_an_op_that_an_explicit_backend_does_not_have_goes_as_under_auto():
    with ops.use_backend("triton"):
        assert backends.choose("info_nce", DEVICE, "triton") == "triton"
        for op in ("prototype_update_", *backends.PLAIN):
            assert backends.choose(op, DEVICE, "triton") == backends.choose(op, DEVICE, "auto")
        assert torch.equal(targets(), torch.full((2, 6), 1 / 6))
        bank = unit_rows(3, 4, 1)
        ops.prototype_update_(bank, bank, torch.arange(3, device=DEVICE), None, 0.9)
    assert backends.describe()


@pytest.mark.medium
def test_the_environment_variable_chooses_and_the_choice_is_logged_once():
    code = """
import logging, torch
logging.basicConfig(level=logging.INFO)
from mopro_fast import ops
for choice in ("auto", "auto", ops.backends._choice):
    with ops.use_backend(choice):
        ops.ema_update_([torch.zeros(2)], [torch.ones(2)], 0.5)
"""
    environment = {**os.environ, "MOPRO_FAST_BACKEND": "cuda"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ended.stderr.count("ema_update_ on cpu tensors runs on the reference backend") == 1
    assert ended.returncode != 0 and "it takes CUDA tensors only" in ended.stderr


def test_is_fused_is_marked_as_the_compiler_wants_it():
    def marked():
        return True

    torch.compiler.assume_constant_result(marked)
    assert vars(marked) and vars(marked).items() <= vars(backends.is_fused).items()


def test_a_backend_of_no_name_that_is_known(monkeypatch):
    monkeypatch.setattr(backends, "_choice", "cud")  # as MOPRO_FAST_BACKEND=cud sets it
    with pytest.raises(ValueError, match="unknown backend 'cud'"):
        ops.ema_update_([torch.zeros(2)], [torch.ones(2)], 0.5)


def test_every_backend_is_described():
    described = backends.describe()
    assert set(described) == set(backends.OPS)
    for op, device in itertools.product(backends.OPS, ("cpu", "cuda")):
        assert described[op][device] in backends.MODULES


@pytest.mark.gpu
def test_the_largest_banks_and_offsets_beyond_32_bits():
    q, queue = unit_rows(64, 128, 1, BF16), unit_rows(262144, 128, 2, BF16)
    loss, _ = ops.info_nce(q, q, queue, 0.1)
    exact = reference.info_nce(q.double(), q.double(), queue.double(), 0.1)
    assert rms_error(loss, exact[0]) < TOLERANCE
    n, classes = 100_000, 21_841  # 2.2e9 logits
    logits = torch.zeros(n, classes, dtype=BF16, device=DEVICE)
    logits[-50:] = 4 * torch.randn(50, classes, generator=torch.Generator().manual_seed(1)).to(DEVICE, BF16)
    q, prototypes = unit_rows(n, 32, 3, BF16), unit_rows(classes, 32, 4, BF16)
    labels = torch.arange(n, device=DEVICE) % classes
    settings = {"alpha": 0.5, "threshold": 0.1, "temperature": 0.1}
    found = ops.correct_labels(logits, q, prototypes, labels, **settings)
    *expected, _, _, margin = plain_correction(
        *(x.cpu() for x in (logits[-50:], q[-50:], prototypes, labels[-50:])), *settings.values()
    )
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a[-50:].cpu()[margin > 1e-5], b[margin > 1e-5])
    target = torch.zeros(2**31 + 5, device=DEVICE)
    source = torch.zeros_like(target, dtype=BF16)
    source[-7:] = 1
    ops.ema_update_([target], [source], 0.5)
    assert target[-9:].tolist() == [0, 0] + [0.5] * 7 and int(target.count_nonzero()) == 7


@pytest.mark.usefixtures("backend")
@pytest.mark.gpu
@pytest.mark.parametrize(
    "op, backend",
    [(op, b) for op, b in OPS_ON_BACKENDS if b != "reference" or op in backends.PLAIN],
    indirect=["backend"],
)
def test_captured_in_a_graph_without_a_synchronisation(op):
    torch.use_deterministic_algorithms(False)
    function = getattr(torch.ops.mopro_fast, op)
    with ops.use_backend("reference"):
        start = some_arguments()[op]
    eager = [copied(x) for x in start]
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = function(*eager)  # also the warm-up: Triton compiles here
    finally:
        torch.cuda.set_sync_debug_mode("default")
    captured = [copied(x) for x in start]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = function(*captured)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(tensors([eager, result]), tensors([captured, replayed]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("backend")
@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("op, backend", OPS_ON_BACKENDS, indirect=["backend"])
def test_tensors_of_another_gpu_than_the_current_one(op):
    torch.use_deterministic_algorithms(False)
    start = some_arguments()[op]
    on_first = [copied(x) for x in start]
    moved = [[y.to("cuda:1") for y in x] if isinstance(x, list) else x for x in on_first]
    moved = [x.detach().to("cuda:1") if isinstance(x, torch.Tensor) else copied(x) for x in moved]
    results = [getattr(torch.ops.mopro_fast, op)(*x) for x in (on_first, moved)]
    for a, b in zip(tensors([on_first, results[0]]), tensors([moved, results[1]]), strict=True):
        assert torch.equal(a, b.to(a.device))
