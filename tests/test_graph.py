"""A step replayed is the eager step: a CUDA graph's part is taken by a tape of the operators, which needs no GPU.

Like a graph, the tape does not compute while it captures, and replays the same operators on the same memory: whatever
Python read on the host stays as it was at the capture.
"""

import contextlib
import gc
import weakref
from unittest import mock

import pytest
import torch
from small_step import ROWS, SIZE, extra, run_steps, small_method, small_model, train_step
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mopro_fast.benchmark import timing
from mopro_fast.data.pipeline import Batch
from mopro_fast.training.graph import Graphed


def tensors(tree) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


class Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators, self.replays = [], 0
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for x in tensors((args, kwargs)):
            storage = x.untyped_storage()
            self._before.setdefault(storage._cdata, (storage, storage.clone()))
        out = func(*args, **kwargs)
        given = {x.untyped_storage()._cdata for x in tensors((args, kwargs))}
        self.operators.append((func, args, kwargs, out, given))
        return out

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        for storage, before in self._before.values():
            storage.copy_(before)
        self._before.clear()

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
            for func, args, kwargs, out, given in self.operators:
                for old, new in zip(tensors(out), tensors(func(*args, **kwargs)), strict=True):
                    if old.untyped_storage()._cdata not in given:  # its own memory: no view, not changed in place
                        old.copy_(new)


@pytest.fixture
def tapes(monkeypatch) -> list[Tape]:
    made: list[Tape] = []

    def new() -> Tape:
        made.append(Tape())
        return made[-1]

    @contextlib.contextmanager
    def capture(tape, **_):
        with tape:
            yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", new)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    return made


def another_batch() -> tuple[Batch, torch.Tensor]:
    views = torch.randint(256, (2, ROWS, SIZE, SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(99))
    return Batch(*views.unbind(), torch.zeros(ROWS, dtype=torch.int64), torch.arange(ROWS)), torch.arange(ROWS)


@pytest.mark.medium
@pytest.mark.parametrize("kind", ["mopro", "capro"])
@pytest.mark.parametrize("precision, bf16_weights", [("fp32", True), ("bf16", True), ("bf16", False)])
def test_replayed_through_all_phases_it_is_the_eager_step(tapes, precision: str, bf16_weights: bool, kind: str) -> None:
    states = []
    for graphed in (False, True):
        step = train_step(small_method(kind), precision=precision, bf16_weights=bf16_weights)
        if graphed:
            step.optimizer.param_groups[0]["lr"] = torch.zeros(1)
            step._call = Graphed(step._run, 2)
        losses, (batch, place) = run_steps(step, 5), another_batch()
        losses.append(step(batch, extra(step.model, place, 15), 2, 15, 0.05).loss.clone())
        states.append([*losses, *step.model.state_dict().values(), step.sums, step.assigned])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    step._graphed = True
    step.close()
    assert step._call._graph is None
    assert [tape.replays for tape in tapes] == [3, 3, 4]  # one per phase, after two eager steps in each


@pytest.mark.parametrize("kind", ["ce", "finetune", "retrain"])
def test_the_other_methods_are_replayed_too(tapes, kind: str) -> None:
    """With two groups of parameters, mixup, and a learning rate that changes."""
    states = []
    for graphed in (False, True):
        step = train_step(small_method(kind), precision="bf16")
        if graphed:
            for group in step.optimizer.param_groups:
                group["lr"] = torch.zeros(1)
            step._call = Graphed(step._run, 2)
        losses = run_steps(step, 2)
        states.append([*losses, *step.model.state_dict().values(), step.sums, step.assigned])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    assert [tape.replays for tape in tapes] == [4]


@pytest.mark.usefixtures("tapes")
def test_a_loss_that_is_not_finite_is_noted_with_its_step() -> None:
    step = train_step(small_model())
    step._call = Graphed(step._run, 1)
    batch, place = another_batch()
    for i in range(6):
        if i == 4:
            with torch.no_grad():
                step.model.encoder_q.fc2.bias.fill_(float("nan"))
        step(batch, place, 0, i, 0.0)
        assert step.bad_step.tolist() == [-1 if i < 4 else 4]


def test_another_key_is_captured_anew_and_frees_the_graph(tapes) -> None:
    calls = []

    def function(key, x, nothing):
        calls.append(key)
        assert nothing is None
        return x * 2 + key

    graphed = Graphed(function, warm_up=2)
    for i, key in enumerate([0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0]):
        assert graphed(key, torch.full((2,), float(i)), None).tolist() == [2 * i + key] * 2
    assert calls == [0] * 3 + [1] * 3 + [0] * 3
    assert [tape.replays for tape in tapes] == [2, 2, 1]
    latest = weakref.ref(tapes.pop())
    graphed.free()
    assert latest() is None
    assert [graphed(0, torch.ones(2), None).tolist() for _ in range(3)] == [[2, 2]] * 3 and len(tapes) == 3
    with pytest.raises(RuntimeError):
        graphed(0, torch.zeros(3), None)  # another shape than the captured one


class Garbage:
    def __init__(self) -> None:
        self.itself = self


@pytest.mark.usefixtures("tapes")
@pytest.mark.parametrize("was_on", [True, False])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("capture, warm_up", [(lambda f: Graphed(f, 0)(0), 0), (timing.capture, 3)])
def test_no_garbage_is_collected_during_a_capture(capture, warm_up, fails, was_on, monkeypatch) -> None:
    for name in ("Stream", "stream", "current_stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    calls = []

    def function(*_):
        calls.append((gc.isenabled(), garbage() is None))
        if fails and len(calls) > warm_up:
            raise RuntimeError("not captured")

    if not was_on:
        gc.disable()
    try:
        garbage = weakref.ref(Garbage())
        with pytest.raises(RuntimeError, match="not captured") if fails else contextlib.nullcontext():
            capture(function)
        assert gc.isenabled() == was_on
    finally:
        gc.enable()
    assert [on for on, _ in calls] == [was_on] * warm_up + [False]
    assert calls[-1] == (False, True)  # what there was is gone
