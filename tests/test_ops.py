"""The six ops: against plain float64 loops, gradients, checks, PyTorch's own op checks, backends."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from mopro_fast import ops
from mopro_fast.ops import backends

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
# Relative RMS against float64. float32: 1e-5 (a sum of up to 10^4 terms). Lower types: the inputs are rounded
# before both computations, so only the output's own rounding and the float32 arithmetic are left.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
OUTPUT_ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}
DTYPES = list(TOLERANCE)
# N, C or Q, D: empty batch, one row, sizes that divide nothing, more rows than bank
SHAPES = [(0, 7, 8), (1, 1, 4), (5, 33, 32), (17, 10, 128), (64, 257, 65)]


@pytest.fixture(autouse=True)
def nan_filled_memory():
    """Memory that an op forgets to write must not look like a result."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def unit_rows(n: int, d: int, seed: int, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, generator=g), dim=1).to(device, dtype)


def rms_error(actual, expected) -> float:
    actual, expected = actual.double().cpu(), expected.double().cpu()
    assert actual.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    assert actual.isfinite().all()
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-12))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.1, 1.0, 0.01])
@pytest.mark.parametrize("n, bank, d", SHAPES)
def test_info_nce(n, bank, d, temperature, dtype, device):
    q, k = unit_rows(n, d, 1, dtype, device).requires_grad_(), unit_rows(n, d, 2, dtype, device)
    queue = unit_rows(bank, d, 3, torch.float32, device)
    loss, hit = ops.info_nce(q, k, queue, temperature)
    weight = torch.linspace(0.5, 2, n, device=device)
    (loss * weight).sum().backward()

    q64 = q.detach().cpu().double().requires_grad_()
    k64, queue64 = k.cpu().double(), queue.cpu().double()
    logits = torch.cat([(q64 * k64).sum(1, keepdim=True), q64 @ queue64.T], 1) / temperature
    expected = F.cross_entropy(logits, torch.zeros(n, dtype=torch.int64), reduction="none")
    (expected * weight.cpu().double()).sum().backward()
    assert loss.dtype == torch.float32 and hit.dtype == torch.bool and q.grad.dtype == dtype
    assert rms_error(loss.detach(), expected.detach()) < TOLERANCE[dtype]
    assert rms_error(q.grad, q64.grad) < TOLERANCE[dtype] + OUTPUT_ROUNDING[dtype]
    margin = (logits[:, :1] - logits[:, 1:]).min(1).values if bank else torch.ones(n)
    sure = margin.abs() > 1e-4
    assert torch.equal(hit.cpu()[sure], (margin >= 0)[sure])


def test_info_nce_counts_a_tie_as_a_hit():
    q = k = torch.tensor([[1.0, 0.0]])
    assert ops.info_nce(q, k, torch.tensor([[1.0, 0.0]]), 0.1)[1].tolist() == [True]
    assert ops.info_nce(q, torch.tensor([[0.9, 0.0]]), torch.tensor([[1.0, 0.0]]), 0.1)[1].tolist() == [False]


def plain_correction(logits, q, prototypes, labels, alpha, threshold, temperature):
    """One row at a time, float64: -> new labels, kept, and how far each row is from changing either decision."""
    out, kept, margins = [], [], []
    classes = len(prototypes)
    for z, e, y in zip(logits.double(), q.double(), labels.tolist(), strict=True):
        t = alpha * z.softmax(0) + (1 - alpha) * (prototypes.double() @ e / temperature).softmax(0)
        best = int(t.argmax())
        sure = bool(t[best] > threshold)
        given = float(t[y]) if 0 <= y < classes else None
        out.append(best if sure else y)
        kept.append(sure or (given is not None and given > 1 / classes))
        top = t.sort(descending=True).values
        gaps = [abs(float(t[best]) - threshold), float(top[0] - top[1]) if classes > 1 else 1.0]
        margins.append(min(gaps + ([abs(given - 1 / classes)] if given is not None else [])))
    return torch.tensor(out), torch.tensor(kept), torch.tensor(margins)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha, threshold", [(0.5, 0.8), (0.0, 0.3), (1.0, 0.5), (0.5, 0.0)])
@pytest.mark.parametrize("classes", [2, 10, 257])
def test_correct_labels(classes, alpha, threshold, dtype, device):
    n, d = 200, 16
    g = torch.Generator().manual_seed(4)
    logits = (4 * torch.randn(n, classes, generator=g)).to(dtype)
    q, prototypes = unit_rows(n, d, 5, dtype), unit_rows(classes, d, 6)
    labels = torch.randint(-1, classes, (n,), generator=g)
    labels[:3] = torch.tensor([-1, classes, 2**40])  # none, and two that no kernel may follow
    new, kept = ops.correct_labels(
        logits.to(device), q.to(device), prototypes.to(device), labels.to(device),
        alpha=alpha, threshold=threshold, temperature=0.1,
    )  # fmt: skip
    want_new, want_kept, margin = plain_correction(logits, q, prototypes, labels, alpha, threshold, 0.1)
    sure = margin > 1e-5
    assert sure.float().mean() > 0.9
    assert torch.equal(new.cpu()[sure], want_new[sure]) and torch.equal(kept.cpu()[sure], want_kept[sure])


def test_correct_labels_traps():
    q, prototypes = torch.zeros(4, 2), torch.zeros(3, 2)
    logits = torch.tensor([[9.0, 9.0, 0.0], [float("nan"), 1.0, 1.0], [9.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    labels = torch.tensor([2, 1, -1, 1])
    new, kept = ops.correct_labels(logits, q, prototypes, labels, alpha=1.0, threshold=0.4, temperature=0.1)
    assert new.tolist() == [0, 1, 0, 1]  # a tie takes the lowest class; not finite: left alone; none given: relabelled
    assert kept.tolist() == [True, False, True, False]  # 1/3 is not above 1/C
    assert labels.tolist() == [2, 1, -1, 1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kept_share", [None, 0.0, 0.5])
@pytest.mark.parametrize("n, classes, d", SHAPES)
def test_prototype_contrast(n, classes, d, kept_share, dtype, device):
    g = torch.Generator().manual_seed(7)
    q = unit_rows(n, d, 8, dtype, device).requires_grad_()
    prototypes = unit_rows(classes, d, 9)
    labels = torch.randint(-1, classes + 1, (n,), generator=g)
    kept = None if kept_share is None else torch.rand(n, generator=g) < kept_share
    loss = ops.prototype_contrast(
        q, prototypes.to(device), labels.to(device), None if kept is None else kept.to(device), 0.1
    )
    weight = torch.linspace(0.5, 2, n)
    (loss * weight.to(device)).sum().backward()

    q64 = q.detach().cpu().double().requires_grad_()
    use = (labels >= 0) & (labels < classes) & (True if kept is None else kept)
    per_row = F.cross_entropy(
        q64 @ prototypes.double().T / 0.1, torch.where(use, labels, -100), ignore_index=-100, reduction="none"
    )
    (per_row * weight.double()).sum().backward()
    assert loss.dtype == torch.float32 and q.grad.dtype == dtype
    assert rms_error(loss.detach(), per_row.detach()) < TOLERANCE[dtype]
    assert rms_error(q.grad, q64.grad) < TOLERANCE[dtype] + OUTPUT_ROUNDING[dtype]
    assert not loss.detach().cpu()[~use].any() and not q.grad.cpu()[~use].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("momentum", [0.999, 0.5, 0.0, 1.0])
@pytest.mark.parametrize("rows, classes, d", [(0, 3, 4), (1, 1, 8), (50, 4, 16), (300, 1000, 128), (257, 7, 33)])
def test_prototype_update_is_the_sequential_loop(rows, classes, d, momentum, device):
    g = torch.Generator().manual_seed(10)
    prototypes = unit_rows(classes, d, 11)
    prototypes[::3] = 0
    features = unit_rows(rows, d, 12)
    labels = torch.randint(-1, classes + 1, (rows,), generator=g)
    kept = torch.rand(rows, generator=g) < 0.7
    features[~kept] = float("nan")  # what is left out must not leak in
    expected = prototypes.double()
    for f, y, keep in zip(features.double(), labels.tolist(), kept.tolist(), strict=True):
        if keep and 0 <= y < classes:
            expected[y] = momentum * expected[y] + (1 - momentum) * f
    expected = F.normalize(expected, dim=1)
    got, again = (prototypes.to(device, copy=True) for _ in range(2))
    for p in (got, again):
        assert ops.prototype_update_(p, features.to(device), labels.to(device), kept.to(device), momentum) is None
    assert rms_error(got, expected) < 1e-6
    assert torch.equal(got, again)
    untouched = (prototypes == 0).all(1) & (expected == 0).all(1)
    assert not got.cpu()[untouched].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("slots, batches", [(8, [3, 3, 3, 8]), (5, [5, 1, 0, 4]), (1, [1, 1]), (64, [7] * 30)])
def test_queue_enqueue_wraps_round(slots, batches, device):
    queue = unit_rows(slots, 4, 13, device=device)
    expected, at = queue.tolist(), 0
    cursor = torch.zeros(1, dtype=torch.int64, device=device)
    for i, m in enumerate(batches):
        keys = unit_rows(m, 4, 20 + i, device=device)
        assert ops.queue_enqueue_(queue, cursor, keys) is None
        for row in keys.tolist():
            expected[at] = row
            at = (at + 1) % slots
        assert queue.tolist() == expected and cursor.tolist() == [at]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.999, 1.0])
def test_ema_update(momentum, dtype, device):
    shapes = [(), (1,), (0, 3), (7, 5), (64, 3, 7, 7), (2048,)]
    g = torch.Generator().manual_seed(14)
    targets = [torch.randn(s, generator=g).to(device) for s in shapes]
    sources = [torch.randn(s, generator=g).to(device, dtype).requires_grad_() for s in shapes]
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


def some_arguments(device="cpu"):
    q, k = unit_rows(6, 8, 1, device=device).requires_grad_(), unit_rows(6, 8, 2, device=device)
    bank, labels = unit_rows(11, 8, 3, device=device), torch.tensor([0, 3, -1, 10, 3, 11], device=device)
    kept = torch.tensor([True, True, True, False, True, True], device=device)
    logits = torch.randn(6, 11, generator=torch.Generator().manual_seed(5)).to(device)
    return {
        "info_nce": (q, k, bank, 0.1),
        "correct_labels": (logits, q.detach(), bank, labels, 0.5, 0.8, 0.1),
        "prototype_contrast": (q, bank, labels, kept, 0.1),
        "prototype_update_": (bank.clone(), k, labels, kept, 0.9),
        "queue_enqueue_": (bank.clone(), torch.tensor([9], device=device), k),
        "ema_update_": ([k.clone()], [bank[:6].clone()], 0.9, [k.bfloat16()]),
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", backends.OPS)
def test_opcheck(op, device):
    torch.use_deterministic_algorithms(False)
    torch.library.opcheck(getattr(torch.ops.mopro_fast, op).default, some_arguments(device)[op])


@pytest.mark.parametrize("device", DEVICES)
def test_a_whole_head_compiles_without_graph_breaks_and_repeats_bit_for_bit(device):
    def head(q, k, queue, cursor, prototypes, logits, labels, master):
        inst, hit = ops.info_nce(q, k, queue, 0.1)
        ops.queue_enqueue_(queue, cursor, k)
        labels, kept = ops.correct_labels(logits, q, prototypes, labels, alpha=0.5, threshold=0.3, temperature=0.1)
        proto = ops.prototype_contrast(q, prototypes, labels, kept, 0.1)
        ops.prototype_update_(prototypes, q, labels, kept, 0.9)
        ops.ema_update_([master], [prototypes], 0.9)
        return inst + proto, hit, labels, kept

    def run(function):
        q, k, bank, _ = some_arguments(device)["info_nce"]
        logits, _, prototypes, labels, *_ = some_arguments(device)["correct_labels"]
        state = [bank, torch.tensor([9], device=device), prototypes.clone(), torch.zeros_like(prototypes)]
        loss, *rest = function(q, k, *state[:2], state[2], logits, labels, state[3])
        loss.sum().backward()
        return [loss.detach(), *rest, q.grad, *state]

    torch.use_deterministic_algorithms(False)
    eager, again = run(head), run(head)
    compiled = run(torch.compile(head, fullgraph=True, backend="aot_eager"))
    for a, b, c in zip(eager, again, compiled, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


MISTAKES = {
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


def test_the_environment_variable_chooses_and_the_choice_is_logged_once():
    code = """
import logging, torch
logging.basicConfig(level=logging.INFO)
from mopro_fast import ops
for _ in range(2):
    ops.ema_update_([torch.zeros(2)], [torch.ones(2)], 0.5)
"""

    def run(choice):
        environment = {**os.environ, "MOPRO_FAST_BACKEND": choice}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    assert run("auto").stderr.count("ema_update_ on cpu tensors runs on the reference backend") == 1
    refused = run("cuda")
    assert refused.returncode != 0 and "it takes CUDA tensors only" in refused.stderr
    assert "unknown backend 'cud'" in run("cud").stderr


def test_every_backend_is_described():
    described = backends.describe()
    assert set(described) == set(backends.OPS)
    for op, device in itertools.product(backends.OPS, ("cpu", "cuda")):
        assert described[op][device] in backends.MODULES


@pytest.mark.gpu
@pytest.mark.parametrize("source_dtype", DTYPES)
def test_cuda_ema_equals_reference_and_is_captured_in_a_graph(source_dtype):
    shapes = [(1000,), (64, 3, 7, 7), (3,), (2048, 1000)]
    sources = [torch.randn(s, device="cuda").to(source_dtype) for s in shapes]
    start = [torch.randn(s, device="cuda") for s in shapes]
    results = {}
    for backend in ("reference", "cuda"):
        targets = [t.clone() for t in start]
        with ops.use_backend(backend):
            ops.ema_update_(targets, sources, 0.999)
        results[backend] = targets
    for a, b in zip(results["reference"], results["cuda"], strict=True):
        assert rms_error(b, a) < 1e-6
    targets = [t.clone() for t in start]
    graph = torch.cuda.CUDAGraph()
    with ops.use_backend("cuda"), torch.cuda.graph(graph):
        ops.ema_update_(targets, sources, 0.999)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(targets, results["cuda"], strict=True))
