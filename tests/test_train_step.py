"""The trainer's step: 16-bit weights, one CUDA graph, and nothing that waits for the device."""

import contextlib
import copy

import pytest
import torch
from small_step import CLASSES, PHASES, ROWS, SGD, SIZE, extra, run_steps, small_method, small_model, train_step
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mopro_fast.data.pipeline import Batch
from mopro_fast.errors import UserError
from mopro_fast.models.speedups import turn_on
from mopro_fast.ops import backends


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_weights_kept_in_bf16_change_no_bit(device, monkeypatch) -> None:
    """The optimizer's copies are what autocast's casts would give, in both encoders, and so are the gradients."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    states = []
    for kept in (True, False):
        model = small_model().to(device)
        step = train_step(model, device=device, precision="bf16", bf16_weights=kept)
        losses = run_steps(step, 2)
        states.append([*losses, *model.state_dict().values()])
        if kept:
            assert (
                step.query.conv1.weight.dtype == torch.bfloat16 and step.query.bn1.weight is model.encoder_q.bn1.weight
            )
            for p, low in zip(model.encoder_q.parameters(), step.query.parameters(), strict=True):
                assert torch.equal(p.to(low.dtype), low)
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@pytest.mark.parametrize("kind", ["mopro", "capro"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_half_keys(kind, device, monkeypatch) -> None:
    """The query encoder's copies are bfloat16, the key encoder's float16; the step is the one that casts."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    states = []
    for kept in (True, False):
        model = turn_on(small_method(kind).to(device), "half-keys")
        step = train_step(model, device=device, precision="bf16", bf16_weights=kept)
        seen, casts = [], []
        step.key.conv1.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].dtype))
        step.key.conv1.register_forward_hook(lambda *args, casts=casts: casts.append(args[2].dtype))
        losses = run_steps(step, 2)
        assert {*seen, *casts} == {torch.float16} and len(seen) == len(casts) > 0
        states.append([*losses, *model.state_dict().values()])
        if kept:
            for encoder, computing, dtype in (
                (model.encoder_q, getattr(step.query, "encoder", step.query), torch.bfloat16),
                (model.encoder_k, step.key, torch.float16),
            ):
                assert computing.conv1.weight.dtype == dtype and computing.bn1.weight is encoder.bn1.weight
                for p, low in zip(encoder.parameters(), computing.parameters(), strict=True):
                    assert torch.equal(p.to(low.dtype), low)
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@pytest.mark.parametrize("half", [True, False])
def test_the_queue_has_the_keys_of_their_type(half) -> None:
    """float32 unit vectors; written out: autocast's casts of the masters, in one of the two types."""
    model = small_model()
    if half:
        turn_on(model, "half-keys")
    step, views, key = train_step(model, precision="bf16"), [], copy.deepcopy(model.encoder_k)
    step.key.register_forward_pre_hook(lambda _, inputs: views.append(inputs[0].float()))
    batch = Batch(*torch.randint(256, (2, ROWS, SIZE, SIZE, 3), dtype=torch.uint8), *[torch.arange(ROWS) % CLASSES] * 2)
    step(batch, torch.arange(ROWS), 0, 0, SGD["lr"])
    with torch.no_grad(), torch.autocast("cpu", torch.float16 if half else torch.bfloat16):
        _, k = key(views[0].contiguous(memory_format=torch.channels_last))
    assert model.queue.dtype == k.dtype == torch.float32 and torch.equal(model.queue[:ROWS], k)
    torch.testing.assert_close(k.norm(dim=1), torch.ones(ROWS))


def test_half_keys_that_overflow_end_the_run() -> None:
    """65504 is float16's largest; what is beyond is infinite, and normalised again not a number."""
    model = turn_on(small_model(), "half-keys")
    with torch.no_grad():
        model.encoder_k.bn1.weight.fill_(7e4)
    step = train_step(model, precision="bf16")
    run_steps(step, 1)
    with pytest.raises(UserError, match="the loss is not finite at epoch 1, step 1"):
        step.require_finite(0, 3, lambda: "")


@pytest.mark.parametrize("kind", ["ce", "finetune", "retrain", "capro"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_other_methods_too(kind, device, monkeypatch) -> None:
    """In bf16, with copies and with casts; on a GPU replayed from a graph and not."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    states = []
    for kept, graphed in ((True, True), (False, True), (True, False)):
        model = small_method(kind).to(device)
        with torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else contextlib.nullcontext():
            step = train_step(model, device=device, precision="bf16", bf16_weights=kept, cuda_graph=graphed)
            states.append([*run_steps(step, 2), *model.state_dict().values(), step.sums, step.assigned])
    for other in states[1:]:
        assert all(torch.equal(a, b) for a, b in zip(states[0], other, strict=True))
    before = small_method(kind).state_dict()
    still = {name for name, t in model.state_dict().items() if torch.equal(t.cpu(), before[name])}
    assert ("encoder_q.conv1.weight" in still) == ("encoder_q.bn1.running_mean" in still) == (kind == "retrain")
    assert "encoder_q.classifier.weight" not in still


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_another_sgd_trains_the_same(device, monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    states = []
    for sgd in ("fused", "torch"):
        model = small_model().to(device)
        losses = run_steps(train_step(model, device=device, sgd=sgd, precision="fp32", cuda_graph=False), 1)
        states.append([*losses, *model.parameters()])
    for a, b in zip(*states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_are_gone_when_the_next_step_begins(precision) -> None:
    """Those of a CUDA graph that a new phase has dropped would keep the blocks they lie in from its memory's return."""
    step, left = train_step(small_model(), precision=precision), []

    def look(*_):
        left.extend(p.grad for p in (*step.query.parameters(), *step.model.parameters()))

    step.model.register_forward_pre_hook(look)
    run_steps(step, 1)
    assert len(left) >= 3 * 60 and all(grad is None for grad in left)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["mopro", "capro"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_replayed_from_a_graph_is_the_eager_step(precision, kind, monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    states = []
    for graphed in (True, False):
        with torch.cuda.stream(torch.cuda.Stream()):
            model = small_method(kind).cuda()
            step = train_step(model, device="cuda", precision=precision, cuda_graph=graphed)
            losses = run_steps(step, 6)
            states.append([*losses, *model.state_dict().values(), step.sums, step.assigned])
            torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@contextlib.contextmanager
def waiting_is_an_error():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["mopro", "capro"])
def test_no_step_waits_for_the_gpu(kind) -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        model = small_method(kind).cuda()
        step = train_step(model, device="cuda", cuda_graph=False)
        run_steps(step, 2)
        run_steps(step, 2, waiting_is_an_error)


WAITING_OPERATORS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique", "is_nonzero", "equal")
WAITING_METHODS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__iter__")


class NothingWaits(TorchDispatchMode):
    """Raises where a CUDA tensor would make the host wait: seen on a CPU, in operators and in methods."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        masked = name.startswith("index") and any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in leaves)
        if masked or name.startswith(WAITING_OPERATORS):
            raise AssertionError(f"{func} would wait for the device")
        if func.namespace == "mopro_fast":
            with self:  # the backend's operators are looked at too
                return backends._run(name, "cpu", *args)
        return func(*args, **(kwargs or {}))


class NoMethodWaits(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in WAITING_METHODS and getattr(func, "__objclass__", None) is not None:
            raise AssertionError(f"Tensor.{func.__name__} would wait for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["mopro", "capro"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_step_would_wait(precision, kind) -> None:
    model = small_method(kind)
    step = train_step(model, precision=precision)
    with NothingWaits(), NoMethodWaits():
        for i in range(6):
            step.begin_epoch(PHASES[i // 2])
            views = torch.zeros(2, ROWS, SIZE, SIZE, 3, dtype=torch.uint8)
            batch = Batch(*views.unbind(), torch.arange(ROWS) % (CLASSES + 1) - 1, torch.arange(ROWS))
            step(batch, extra(model, torch.arange(ROWS), i), PHASES[i // 2], i, SGD["lr"])


@pytest.mark.parametrize(
    "wait",
    [
        torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.nonzero, bool, int,
        lambda x: torch.arange(3)[x > 0], lambda x: torch.arange(3)[torch.ones(3) > x],
        lambda x: torch.masked_select(x, x > 0), lambda x: x.unique(),
    ],
)  # fmt: skip
def test_what_waits_is_noticed(wait) -> None:
    with NothingWaits(), NoMethodWaits(), pytest.raises(AssertionError, match="would wait"):
        wait(torch.ones(()))


def test_the_momentum_encoder_follows_by_name(monkeypatch) -> None:
    """Groups of parameters in another order: each of encoder_k's moves towards the one of its name."""
    models = []
    for grouped in (False, True):
        model = small_model()
        named = dict(model.encoder_q.named_parameters())
        groups = [[p for name, p in named.items() if ("bn" in name) == own] for own in (True, False)]
        if grouped:
            monkeypatch.setattr(model, "trained", lambda groups=groups: groups)
        losses = run_steps(train_step(model), 1)
        models.append([*losses, *model.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*models, strict=True))
