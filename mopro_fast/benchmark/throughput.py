"""What a training step takes: ours, ours with one thing switched off, the official code, plain supervised training.

Every variant is a factory from a case to the function that makes one step. All train the same architecture on the same
synthetic images, in an epoch whose labels are corrected. On a CPU they take turns, so that a machine whose speed drifts
drifts for all; on a GPU one is built at a time, for memory.
"""

import contextlib
import gc
import importlib.util
import itertools
import statistics
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import Module

from mopro_fast import ops
from mopro_fast.benchmark import kinds, official, timing
from mopro_fast.config import DataConfig, ModelConfig, MoProConfig, OptimConfig, RunConfig, TrainConfig
from mopro_fast.data.pipeline import Batch
from mopro_fast.errors import UserError
from mopro_fast.models import mopro as mopro_module
from mopro_fast.models.build import build, build_encoder
from mopro_fast.models.method import Method
from mopro_fast.models.mopro import MoPro, StepOutput
from mopro_fast.models.resnet import GroupedBatchNorm2d
from mopro_fast.models.speedups import SPEEDUPS, turn_on
from mopro_fast.training.step import Shuffle, TrainStep

OURS, OFFICIAL = "ours", "official, float32 NCHW"
OFFICIAL_FAST = {"cuda": "official, autocast + channels-last", "cpu": "official, channels-last"}
CLONE = "salesforce/MoPro, the clone given"
SUPERVISED, SUPERVISED_PLAIN = "supervised, this trainer", "supervised, plain PyTorch"
ENCODERS = "the two encoders alone"
ALL_SPEEDUPS = "all speed-ups"
PARTS = ("query forward", "key forward", "head", "communication", "backward", "optimizer and EMA")
_EPOCH = 2  # whose labels are corrected, with start_clean 2
_WARM_UP_STEPS = 6  # chosen, compiled, captured


@dataclass
class Case:
    """What is trained on."""

    batch: int
    classes: int
    image_size: int = 224
    arch: str = "resnet50"
    width: float = 1
    stem: str = "imagenet"
    queue_size: int = 8192
    bn_group: int = 0
    device: str = "cuda"

    def config(self, **run: Any) -> TrainConfig:
        return TrainConfig(
            data=DataConfig(path="synthetic", num_classes=self.classes, image_size=self.image_size),
            model=ModelConfig(arch=self.arch, width=self.width, stem=self.stem, bn_group=self.bn_group),
            mopro=MoProConfig(queue_size=max(self.queue_size, self.batch), start_clean=_EPOCH),
            optim=OptimConfig(batch_size=self.batch, lr=0.01),
            run=RunConfig(out="none", **run),
        )

    def images(self) -> Batch:
        """uint8 views, labels and ids on the device."""
        g = torch.Generator().manual_seed(0)
        shape = (self.batch, self.image_size, self.image_size, 3)
        q, k = (torch.randint(256, shape, dtype=torch.uint8, generator=g).to(self.device) for _ in range(2))
        labels = torch.randint(self.classes, (self.batch,), generator=g).to(self.device)
        return Batch(q, k, labels, torch.arange(self.batch, device=self.device))


def ours(case: Case, model: Callable[[TrainConfig], Any] = build, **run: Any) -> Callable[[], Any]:
    """TrainStep as the trainer calls it; ``call.step`` is it."""
    torch.manual_seed(0)
    config, device = case.config(**run), torch.device(case.device)
    built = model(config).to(device, memory_format=torch.channels_last).train()
    if isinstance(built, MoPro):  # as in the middle of a training: without prototypes nothing is corrected
        built.prototypes.copy_(torch.nn.functional.normalize(torch.randn_like(built.prototypes), dim=1))
    step = TrainStep(config, built, case.batch, device)
    batch, shuffle, counter = case.images(), Shuffle(0, case.batch), itertools.count(1)
    batch = batch if isinstance(built, MoPro) else batch._replace(view_k=None)

    def call() -> Tensor:
        count = next(counter)
        ((shuffled, place),) = shuffle([batch], count)
        return step(shuffled, place, _EPOCH, count, 0.01).loss

    call.step = step
    return call


class TwoEncoders(MoPro):
    """MoPro without what makes it MoPro: both forwards, a classification loss, the optimizer's pass over both."""

    def forward(self, view_q, view_k, labels, _epoch, _place, query=None, key=None) -> StepOutput:
        logits, q = (query or self.encoder_q)(ops.normalize(view_q))
        with torch.no_grad():
            (key or self.encoder_k)(ops.normalize(view_k))
        loss = torch.nn.functional.cross_entropy(logits.float(), labels) + 0.0 * q.sum()
        metrics = dict.fromkeys(self.METRICS, loss.detach())
        return StepOutput(loss, metrics, labels, labels >= 0)


def plain_norms(model: Module) -> Module:
    """The model with PyTorch's BatchNorm, addition and ReLU in place of ops.batch_norm_act."""
    for m in model.modules():
        if isinstance(m, GroupedBatchNorm2d):
            m.fused = "off"
    return model


def built_plainly(config: TrainConfig) -> Module:
    return plain_norms(build(config))


def ordinary_encoder(case: Case) -> Module:
    """What others train: an encoder with nothing of ours, and all rows in one BatchNorm group."""
    return plain_norms(build_encoder(replace(case, bn_group=0).config())).to(case.device)


def sped_up(*names: str) -> Callable[[TrainConfig], Method]:
    """With these of models/speedups.py."""
    return lambda config: turn_on(build(config), *names)


def without_fused_ops(case: Case) -> Callable[[], Any]:
    with ops.use_backend("reference"):
        call = ours(case)
    return ops.use_backend("reference")(call)


def sgd_step(model: Module, o: OptimConfig, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A step of torch.optim.SGD on ``loss()``."""
    optimizer = torch.optim.SGD(model.parameters(), o.lr, momentum=o.momentum, weight_decay=o.weight_decay)

    def call() -> Tensor:
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        return value.detach()

    return call


def supervised_plain(case: Case) -> Callable[[], Any]:
    """As torchvision's reference trains: autocast on a GPU, channels-last, torch.optim.SGD, eager."""
    torch.manual_seed(0)
    encoder = ordinary_encoder(case).to(memory_format=torch.channels_last).train()
    batch = case.images()
    view = ops.normalize(batch.view_q)

    def loss() -> Tensor:
        with torch.autocast(case.device, torch.bfloat16, enabled=case.device == "cuda"):
            logits = encoder.classifier(encoder.features(view))
            return torch.nn.functional.cross_entropy(logits, batch.labels)

    return sgd_step(encoder, case.config().optim, loss)


def official_step(case: Case, fast: bool) -> Callable[[], Any]:
    torch.manual_seed(0)
    config = case.config()
    encoders = [ordinary_encoder(case) for _ in range(2)]
    autocast = fast and case.device == "cuda"
    step = official.Step(*encoders, config.mopro, config.optim, autocast=autocast, channels_last=fast)
    batch = case.images()
    views = [ops.normalize(view) for view in (batch.view_q, batch.view_k)]
    return lambda: step(*views, batch.labels)


def official_clone(case: Case, path: Path) -> Callable[[], Any]:
    """The model class of a clone of salesforce/MoPro, its own code from forward to prototypes; SGD as its train.py."""
    config, model_code, resnet_code = case.config(), _module(path, "model"), _module(path, "resnet")
    if (case.arch, case.stem, case.image_size) != ("resnet50", "imagenet", 224):
        raise UserError("--official: its model is a ResNet-50 for 224 px only: set --arch resnet50 --image-size 224")
    c = config.mopro
    args = SimpleNamespace(
        num_class=case.classes, low_dim=config.model.embed_dim, moco_queue=c.queue_size, moco_m=c.key_momentum,
        proto_m=c.proto_momentum, temperature=c.temperature, alpha=c.alpha, pseudo_th=c.threshold, gpu=0,
    )  # fmt: skip
    if not torch.distributed.is_initialized():  # it gathers among ranks even if there is one
        torch.distributed.init_process_group(
            "nccl" if case.device == "cuda" else "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
    torch.manual_seed(0)
    with _cpu_for_cuda(case.device):
        model = model_code.MoPro(resnet_code.resnet50, args, width=int(case.width)).to(case.device).train()
    criterion = torch.nn.CrossEntropyLoss()
    batch = case.images()
    view_q, view_k = (ops.normalize(view).contiguous() for view in (batch.view_q, batch.view_k))

    def loss() -> Tensor:
        with _cpu_for_cuda(case.device):
            out, target, logits, instance, proto = model(
                [view_q, batch.labels.clone(), view_k], args, is_proto=True, is_clean=True
            )
        return criterion(proto, target) + criterion(out, target) + criterion(logits, instance)

    return sgd_step(model, config.optim, loss)


def _module(path: Path, name: str) -> Any:
    file = path / f"{name}.py"
    if not file.is_file():
        raise UserError(f"--official {path}: no {name}.py there; name a clone of github.com/salesforce/MoPro")
    spec = importlib.util.spec_from_file_location(f"official_{name}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _cpu_for_cuda(device: str) -> contextlib.AbstractContextManager:
    """On a CPU the official code's .cuda() calls do nothing."""
    if device == "cuda":
        return contextlib.nullcontext()
    return mock.patch.object(torch.Tensor, "cuda", lambda self, *_, **__: self)


def variants(
    case: Case, clone: Path | None, everything: bool, named: bool = False
) -> dict[str, Callable[[Case], Callable[[], Any]]]:
    """By name, ours first; ``everything``: also those without one fusion, and supervised training; ``named``: also
    those that on a CPU, where nothing is fused, show no more than that they run."""
    made: dict[str, Callable[[Case], Callable[[], Any]]] = {
        OURS: ours,
        OFFICIAL: partial(official_step, fast=False),
        OFFICIAL_FAST[case.device]: partial(official_step, fast=True),
        ENCODERS: partial(ours, model=lambda c: TwoEncoders(build_encoder(c), build_encoder(c), c.mopro)),
    }
    if clone:
        made[CLONE] = partial(official_clone, path=clone)
    if everything:
        made[SUPERVISED] = partial(ours, model=lambda c: build(replace(c, method="ce")))
        made[SUPERVISED_PLAIN] = supervised_plain
        if case.device == "cuda":
            made |= {
                "ours, no CUDA graph": partial(ours, cuda_graph=False),
                "ours, BatchNorm in plain PyTorch": partial(ours, model=built_plainly),
                "ours, BatchNorm in plain PyTorch, encoders under torch.compile": partial(
                    ours, model=built_plainly, compile=True
                ),
                "ours, activations computed twice": partial(ours, recompute=True),
                "ours, weights cast in every step": partial(ours, bf16_weights=False),
                "ours, ops in plain PyTorch": without_fused_ops,
                "ours, float32": partial(ours, precision="fp32"),
            }
        if case.device == "cuda" or named:
            made |= with_speedups()
    return made


def with_speedups() -> dict[str, Callable[[Case], Callable[[], Any]]]:
    """By name: ours with each of models/speedups.py, and with all."""
    made = {of_speedup(name): partial(ours, model=sped_up(name)) for name in SPEEDUPS}
    return made | {of_speedup(ALL_SPEEDUPS): partial(ours, model=sped_up(*SPEEDUPS))}


def of_speedup(name: str) -> str:
    """The variant's name."""
    return f"ours, {name} on"


def measure(case: Case, made: dict[str, Callable], seconds: float) -> Iterator[tuple[str, dict]]:
    """Each variant when it is done: step_ms (p20, p50, p80), images_per_second, and on a GPU what timing.py counts.

    Of one that fails: why, as ``attempt`` says it.
    """
    if case.device == "cuda":
        broken = ""
        for name, factory in made.items():
            found = {"skipped": broken} if broken else attempt(_alone, factory, case, seconds)
            if "failed" in found and attempt(torch.cuda.synchronize):  # CUDA fails for good after an illegal access
                broken = f"CUDA is broken in this process since {name!r}"
            yield name, found
        return
    calls: dict[str, Callable[[], Any]] = {}
    times: dict[str, list[float]] = {}
    failed: dict[str, dict] = {}

    def begin(name: str) -> None:
        calls[name], times[name] = made[name](case), []
        calls[name]()

    def step(name: str) -> None:
        start = time.perf_counter()
        calls[name]()
        times[name].append(1e3 * (time.perf_counter() - start))

    def in_turn(act: Callable[[str], None]) -> None:
        for name in made:
            if name not in failed and (why := attempt(act, name)):
                failed[name] = why

    in_turn(begin)
    end = time.perf_counter() + seconds * len(made)
    in_turn(step)
    while time.perf_counter() < end and len(failed) < len(made):
        in_turn(step)
    for name in made:
        yield name, failed.get(name) or _summary(times[name], case.batch)


def attempt(measured: Callable[..., Any], *args: Any) -> Any:
    """What it returns, or {"skipped": why}, {"failed": why}: the others go on. A mistake of the user ends them all."""
    try:
        return measured(*args)
    except UserError:
        raise
    except torch.OutOfMemoryError:
        why = {"skipped": "out of memory"}
    except Exception as error:
        traceback.print_exc()
        why = {"failed": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
    with contextlib.suppress(Exception):  # after some errors CUDA refuses everything
        _free()  # here: the traceback, which holds what failed, is gone
    return why


def _alone(factory: Callable, case: Case, seconds: float) -> dict:
    _free()
    torch.cuda.reset_peak_memory_stats()
    call = factory(case)
    for _ in range(_WARM_UP_STEPS):
        call()
    result = _summary(_times(call, seconds), case.batch)
    result["memory_gb"] = torch.cuda.max_memory_reserved() / 1e9
    result |= {"launches": None, "kernels": {}, "host_launches": {}, "synchronisations": None}
    counted = attempt(_counts, call, case.device)
    return result | ({"not_counted": counted["failed"]} if "failed" in counted else counted)


def _counts(call: Callable[[], Any], device: str) -> dict:
    """What the profiler and PyTorch count of one step."""
    kernels = timing.kernels(call)
    return {
        "launches": len(kernels) or None,
        "kernels": kinds.by_kind(kernels),
        "host_launches": timing.host_launches(call),
        "synchronisations": timing.synchronisations(call, device),
    }


def _times(call: Callable[[], Any], seconds: float) -> list[float]:
    """Milliseconds per step, of five blocks of steps that the host enqueues without waiting."""

    def block(steps: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            call()
        torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start) / steps

    steps = max(1, min(50, int(1e3 * seconds / 5 / block(3))))
    return [block(steps) for _ in range(5)]


def _summary(times: list[float], batch: int) -> dict:
    step_ms = timing.quantiles(times)
    return {"step_ms": step_ms, "images_per_second": 1e3 * batch / step_ms["p50"]}


def on_images(case: Case, data: str, seconds: float) -> dict[str, float]:
    """Training from real files or shards: images_per_second, and the share of the time that waits for images."""
    from mopro_fast.data import inputs  # it needs packages that the rest of this file does not

    _free()
    config = case.config()
    config.data.path, config.run.device = data, case.device
    device = torch.device(case.device)
    index = inputs.readable(inputs.load(config)["train"], "train", inputs.threads(config.data))
    loader = inputs.train_loader(config, index, device, two_views=True)
    model = build(config).to(device, memory_format=torch.channels_last).train()
    step = TrainStep(config, model, len(index), device)
    batches = Shuffle(0, case.batch)((b for epoch in itertools.count() for b in loader.epoch(epoch)), 0)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for count in range(_WARM_UP_STEPS):
        step(*next(batches), _EPOCH, count, 0.01)
    synchronize()
    count, waited, began = 0, 0.0, time.perf_counter()
    while (asked := time.perf_counter()) - began < seconds:
        batch, place = next(batches)
        waited += time.perf_counter() - asked
        step(batch, place, _EPOCH, count, 0.01)
        count += 1
    synchronize()
    took = time.perf_counter() - began
    loader.close()
    return {"images_per_second": count * case.batch / took, "data_wait": waited / took}


def _free() -> None:
    """What an earlier variant has left: its graph's memory hangs on cycles of references."""
    gc.collect()
    torch.cuda.empty_cache()  # without CUDA nothing


def parts(case: Case, steps: int) -> dict[str, float]:
    """Milliseconds of each of PARTS in our eager step (median): marks are set around the modules from outside."""
    _free()
    call, cuda = ours(case, cuda_graph=False), case.device == "cuda"
    step, marks = call.step, []  # from each mark to the next belongs to the first one's name

    def mark(name: str) -> None:
        now = torch.cuda.Event(enable_timing=True) if cuda else time.perf_counter()
        if cuda:
            now.record()
        marks.append((name, now))

    step.query.register_forward_pre_hook(lambda *_: mark("query forward"))
    step.query.register_forward_hook(lambda *_: mark("rest"))
    step.key.register_forward_pre_hook(lambda *_: mark("key forward"))
    step.key.register_forward_hook(lambda *_: mark("head"))
    step.model.register_forward_hook(lambda *_: mark("backward"))
    gather, optimize = mopro_module.gather_together, step.optimizer.step

    def gathering(*tensors: Tensor) -> list[Tensor]:
        mark("communication")
        result = gather(*tensors)
        mark("head")
        return result

    def optimizing() -> None:
        mark("optimizer and EMA")
        optimize()
        mark("rest")

    found: list[Counter[str]] = []
    step.optimizer.step = optimizing
    with mock.patch.object(mopro_module, "gather_together", gathering):
        for _ in range(3 + steps):
            marks.clear()
            mark("rest")
            call()
            mark("end")
            if cuda:
                torch.cuda.synchronize()
            found.append(Counter())
            for (name, begin), (_, end) in itertools.pairwise(marks):
                found[-1][name] += begin.elapsed_time(end) if cuda else 1e3 * (end - begin)
    return {name: statistics.median(f[name] for f in found[3:]) for name in (*PARTS, "rest")}
