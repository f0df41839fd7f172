"""The key encoder on a stream of its own: what waits for what, on streams that only take notes, and bits on a GPU."""

import contextlib
import copy
import pickle

import pytest
import torch
from small_step import CLASSES, ROWS, SIZE, extra, run_steps, small_method, train_step
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mopro_fast.models import side_stream
from mopro_fast.models.method import Method
from mopro_fast.models.speedups import turn_on

METHODS = ["mopro", "capro"]


class Stream:
    def __init__(self, name: str, notes: "Notes") -> None:
        self.name, self.notes = name, notes

    def wait_stream(self, other: "Stream") -> None:
        self.notes.events.append(f"{self.name} waits for {other.name}")
        self.notes.unseen[self.name] -= self.notes.written[other.name]


class Notes(TorchDispatchMode):
    """The current stream of every operator; raises where one touches what another stream has written unawaited."""

    def __init__(self, monkeypatch) -> None:
        super().__init__()
        self.events: list[str] = []
        self.main, self.side = Stream("main", self), Stream("side", self)
        self.current = self.main
        self.written: dict[str, set[int]] = {"main": set(), "side": set()}
        self.unseen: dict[str, set[int]] = {"main": set(), "side": set()}  # by another stream, without a wait
        self.recorded: dict[str, list[torch.Tensor]] = {"main": [], "side": []}
        self._kept: list[torch.Tensor] = []  # so that no address comes twice
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, s: self.recorded[s.name].append(x))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self._on)
        monkeypatch.setattr(side_stream, "_stream", lambda _device: self.side)

    @contextlib.contextmanager
    def _on(self, stream: Stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        here, other = (self.main, self.side) if self.current is self.main else (self.side, self.main)
        found = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        for x in found:
            assert x.untyped_storage()._cdata not in self.unseen[here.name], f"{func} on {here.name} does not wait"
        out = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self._kept += made
        storages = {x.untyped_storage()._cdata for x in made} - {x.untyped_storage()._cdata for x in found}
        self.written[here.name] |= storages
        self.unseen[other.name] |= storages
        if self.events[-1:] != [here.name]:
            self.events.append(here.name)
        return out


def views_of_step() -> torch.Tensor:
    return torch.randint(256, (2, ROWS, SIZE, SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def step_of(model: Method) -> torch.Tensor:
    out = model(*views_of_step().unbind(), torch.arange(ROWS) % CLASSES, 2, *extra(model, torch.arange(ROWS), 3))
    out.loss.backward()
    return torch.stack([out.loss.detach(), *(p.grad.float().sum() for p in model.parameters() if p.grad is not None)])


@pytest.mark.parametrize("kind", METHODS)
def test_what_waits_for_what(kind, monkeypatch) -> None:
    model, other = small_method(kind), small_method(kind)
    want = step_of(other)
    model.key_stream, gradients = True, []
    model.key.register_forward_hook(lambda *_: gradients.append(torch.is_grad_enabled()))
    with monkeypatch.context() as patched, Notes(patched) as notes:
        got = step_of(model)
    assert gradients == [False]
    assert torch.equal(got, want)
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    # The loader's views come first (unbind), the query encoder between the two waits.
    assert notes.events == ["main", "side waits for main", "side", "main", "main waits for side", "main"]
    shapes = [(ROWS, SIZE, SIZE, 3), (ROWS, 3)] if kind == "capro" else [(ROWS, SIZE, SIZE, 3)]
    assert [x.shape for x in notes.recorded["side"]] == shapes
    assert torch.equal(notes.recorded["side"][0], views_of_step()[1])
    (k,) = notes.recorded["main"]
    assert k.shape[0] == ROWS and k.untyped_storage()._cdata in notes.written["side"]


@pytest.mark.parametrize("deaf", ["main", "side"])
def test_what_does_not_wait_is_noticed(deaf, monkeypatch) -> None:
    model, wait = small_method("mopro"), Stream.wait_stream
    model.key_stream = True
    monkeypatch.setattr(Stream, "wait_stream", lambda self, other: None if self.name == deaf else wait(self, other))
    with Notes(monkeypatch), pytest.raises(AssertionError, match=f"on {deaf} does not wait"):
        step_of(model)


@pytest.mark.parametrize("kind", METHODS)
def test_on_a_cpu_nothing_changes(kind, monkeypatch) -> None:
    def refuse(*_):
        raise AssertionError("a CUDA stream on a CPU")

    model, order = small_method(kind), []
    want = step_of(small_method(kind))
    model.key_stream = True
    for name in ("query", "key"):
        getattr(model, name).register_forward_hook(lambda *_, name=name: order.append(name))
    monkeypatch.setattr(torch.cuda, "current_stream", refuse)
    assert torch.equal(step_of(model), want) and order == ["query", "key"]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_method_that_has_used_it_is_copied_and_pickled(device) -> None:
    model = small_method("mopro").to(device)
    model.key_stream = True
    g = torch.randint(256, (2, ROWS, SIZE, SIZE, 3), dtype=torch.uint8, device=device)
    model(*g.unbind(), torch.zeros(ROWS, dtype=torch.int64, device=device), 0, torch.arange(ROWS, device=device))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.key_stream and other.state_dict().keys() == small_method("mopro").state_dict().keys()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("graphed", [True, False])
@pytest.mark.parametrize("one_launch", [True, False])
def test_it_changes_no_bit(kind, graphed, one_launch, monkeypatch) -> None:
    """Nor where both streams have BatchNorms that count their programs."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    states = []
    for on in (True, False):
        with torch.cuda.stream(torch.cuda.Stream()):
            model = small_method(kind).cuda()
            model.key_stream = on
            turn_on(model, *["one-launch-norms"] * one_launch)
            step = train_step(model, device="cuda", cuda_graph=graphed)
            losses = run_steps(step, 6)
            states.append([*losses, *model.state_dict().values(), step.sums, step.assigned])
            torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
