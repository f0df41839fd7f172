"""Supervised training from a checkpoint: classifier re-training (retrain.py) and fine-tuning (finetune.py).

The loop is training/loop.py's, with another step. A run is a function of its config and data here as well, so that an
interrupted and resumed run ends with the same bits: loader, mixup and schedule depend on (seed, epoch, step) alone.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from mopro_fast import __version__, distributed, ops
from mopro_fast.checkpoints import state as checkpoint
from mopro_fast.checkpoints.weights import Weights, build_encoder, digest, load_weights
from mopro_fast.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig, differences
from mopro_fast.data import inputs
from mopro_fast.data.index import Index
from mopro_fast.data.order import balancing_repeats
from mopro_fast.data.pipeline import Batch
from mopro_fast.distributed import gather_rows
from mopro_fast.errors import UserError
from mopro_fast.files import write_json
from mopro_fast.models.resnet import ResNet
from mopro_fast.ops import backends
from mopro_fast.training.evaluate import accuracy
from mopro_fast.training.log import RunLog
from mopro_fast.training.loop import FREE, Trainer
from mopro_fast.training.optim import learning_rate
from mopro_fast.training.step import uses_bf16

MIXUP = 3  # first word of the generators' seeds; data/ has 0 to 2
_SUMS = ("loss", "acc_cls", "steps")


@dataclass
class SupervisedOptim(OptimConfig):
    """SGD and its schedule."""

    decay: float = 0.1
    """Factor of the step schedule at every milestone (in place of 0.1)."""
    encoder_lr: float | None = None
    """Constant learning rate of the encoder (default: it follows --lr and its schedule)."""


@dataclass
class SupervisedRun(RunConfig):
    """Where and how to run. Nothing here except seed, precision and deterministic changes the result."""

    init: tyro.conf.Suppress[None] = None  # the command's first argument


@dataclass
class SupervisedConfig:
    """What re-training and fine-tuning have in common."""

    method: ClassVar[str] = "ce"  # of a TrainConfig: one view
    data: DataConfig = field(default_factory=DataConfig)
    optim: SupervisedOptim = field(default_factory=SupervisedOptim)
    run: SupervisedRun = field(default_factory=SupervisedRun)
    freeze: bool = True
    """Train the classifier alone; the encoder stays in evaluation mode."""
    new_classifier: bool = False
    """Begin with fresh classifier weights (always where the checkpoint's has another number of classes)."""
    resample: bool = False
    """Show an image more often the rarer its class is: classes in proportion to the square root of their size."""
    mixup: float = 0.0
    """Mix pairs of images with a share from Beta(this, this), and their losses; 0: do not."""

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    def validate(self, ranks: int = 1) -> None:
        TrainConfig("ce", self.data, ModelConfig(), optim=self.optim, run=self.run).validate(ranks)
        if self.mixup < 0:
            raise UserError(f"--mixup must be at least 0, got {self.mixup}")
        if not 0 < self.optim.decay <= 1:
            raise UserError(f"--decay must lie in (0, 1], got {self.optim.decay}")
        if self.freeze and self.optim.encoder_lr is not None:
            raise UserError("--encoder-lr has no effect on a frozen encoder: set --freeze False as well")


C = TypeVar("C", bound=SupervisedConfig)


def main(argv: list[str], command: str, default: C, narrow: Callable[[C, Index], Index]) -> int:
    """Run ``mopro-fast COMMAND CKPT options``; narrow(config, index) sets the labels, −1 for images not to show."""
    if not argv or argv[0].startswith("-"):
        if argv and argv[0] not in ("-h", "--help"):
            raise UserError(f"the checkpoint comes first: mopro-fast {command} CKPT {argv[0]} …")
        weights, given, rest = None, "CKPT", ["--help"]
    else:
        weights, given, rest = load_weights(argv[0]), argv[0], argv[1:]
        words = {word.partition("=")[0].replace("_", "-") for word in rest}
        if weights.image_size is None and not words & {"--image-size", "-h", "--help"}:
            raise UserError(f"{given} does not say for which images it is: set --image-size")
        _as_trained(default.data, weights)
        if command == "retrain":  # on the data of the training
            default.data.keep_classes = (weights.config or {}).get("data", {}).get("keep_classes")
    config = tyro.cli(
        type(default),
        args=rest,
        default=default,
        prog=f"mopro-fast {command} {given}",
        description=type(default).__doc__,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
    )
    received = Supervised(config, weights, narrow).run()
    if dist.is_initialized():
        dist.destroy_process_group()
    return 128 + received if received else 0


def _as_trained(data: DataConfig, weights: Weights) -> None:
    """The checkpoint's classes and image sizes as defaults."""
    data.num_classes = weights.num_classes or data.num_classes
    data.image_size = weights.image_size or data.image_size
    data.eval_resize = weights.eval_resize


class Classifier(nn.Module):
    """State dict: encoder_q.*, as every model of this package. The projection head is not trained."""

    def __init__(self, encoder_q: ResNet, freeze: bool) -> None:
        super().__init__()
        self.encoder_q, self.freeze = encoder_q, freeze
        encoder_q.requires_grad_(not freeze)
        encoder_q.classifier.requires_grad_(True)
        encoder_q.fc1.requires_grad_(False)
        encoder_q.fc2.requires_grad_(False)

    def train(self, mode: bool = True) -> "Classifier":
        super().train(mode)
        if self.freeze:
            self.encoder_q.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """float [N, 3, H, W] → logits [N, C]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze):
            features = self.encoder_q.features(images)
        return self.encoder_q.classifier(features)


class Supervised(Trainer):
    """Trains on from ``weights``. :meth:`run` returns 0 when finished, or the signal that stopped it."""

    def __init__(self, config: C, weights: Weights, narrow: Callable[[C, Index], Index]) -> None:
        self.config = config
        self.device = distributed.start(config.run.device)
        self.rank, self.ranks = distributed.world()
        config.validate(self.ranks)
        self.out = Path(config.run.out)
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"--out {self.out} is a file: name a folder")
        backends.require(self.device.type)
        self.bf16 = uses_bf16(config, self.device)
        torch.backends.cudnn.benchmark = not config.run.deterministic
        torch.backends.cudnn.deterministic = config.run.deterministic

        path, state = self._saved()
        sets = inputs.load(config, resumed=state is not None)
        sets["train"] = narrow(config, sets["train"])
        if state:
            self._require_same_run(path, state, weights, sets["train"])
        workers = inputs.threads(config.data)
        unreadable = {"train": state["left_out"].numpy()} if state else {}
        sets = {name: inputs.readable(index, name, workers, unreadable.get(name)) for name, index in sets.items()}
        index = sets.pop("train")
        self.unreadable = index.left_out
        left_out = np.union1d(index.left_out, np.flatnonzero(index.labels < 0))
        self.index = dataclasses.replace(index, left_out=left_out)
        repeats = balancing_repeats(index.labels[self.index.usable]) if config.resample else None
        inputs.require_rows(len(self.index.usable), config.optim.batch_size, index.source)
        self.loader = inputs.train_loader(config, self.index, self.device, repeats)
        self.steps = self.loader.steps_per_epoch
        self.eval_sets = sets
        self.eval_loaders = {name: inputs.eval_loader(config, index, self.device) for name, index in sets.items()}
        self.shuffle = lambda batches, _step: ((batch, None) for batch in batches)  # one view: nothing to exchange

        self.initial = digest(weights.state)
        self.model = Classifier(self._encoder(weights), config.freeze).train()
        self.model.to(self.device, memory_format=torch.channels_last)
        classifier = self.model.encoder_q.classifier
        rest = [p for n, p in self.model.named_parameters() if p.requires_grad and ".classifier." not in n]
        groups = [{"params": list(classifier.parameters())}, *([{"params": rest}] if rest else [])]
        o = config.optim
        self.optimizer = torch.optim.SGD(
            groups, o.lr, momentum=o.momentum, weight_decay=o.weight_decay, nesterov=o.nesterov
        )
        self.forward = (
            self.model
            if self.ranks == 1
            else distributed.data_parallel(self.model, torch.zeros(2, 3, 32, 32, device=self.device))
        )

        self.epoch = self.step = 0  # the next step to take
        self.sums = torch.zeros(
            2, len(_SUMS), dtype=torch.float64, device=self.device
        )  # since the last entry, this epoch
        self.replaced = [0, 0]  # images that could not be read any more: in this epoch, in the run
        log_bytes = self._restore(path, state) if state else 0
        if self.rank == 0:
            write_json(self.out / "config.json", dataclasses.asdict(config))
        self.log = RunLog(self.out, self.rank == 0, log_bytes, self.global_step, config.run.tensorboard)
        self.resources = (self.loader, *self.eval_loaders.values(), self.log)
        self.log.say(f"{len(self.index.usable)} of {len(self.index)} images are shown, {self.steps} steps per epoch")

    def _train_step(self, batch: Batch, _place: None = None) -> None:
        for group, lr in zip(self.optimizer.param_groups, self._rates(self.step), strict=True):
            group["lr"] = lr
        labels = batch.labels
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            images = ops.normalize(batch.view_q)
            if self.config.mixup:
                share, partner = self._mixup(len(labels))
                images = share * images + (1 - share) * images[partner]
            logits = self.forward(images).float()
        loss = F.cross_entropy(logits, labels)
        if self.config.mixup:
            loss = share * loss + (1 - share) * F.cross_entropy(logits, labels[partner])
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        hits = (logits.detach().argmax(1) == labels).double().mean()
        self.sums += torch.stack([loss.detach().double(), hits, torch.ones_like(hits)])

    def _mixup(self, rows: int) -> tuple[float, Tensor]:
        """-> the share of each image itself, and who is mixed in; the same on every rank."""
        rng = np.random.default_rng((MIXUP, self.config.run.seed, self.global_step))
        share = float(rng.beta(self.config.mixup, self.config.mixup))
        return share, torch.from_numpy(rng.permutation(rows)).to(self.device)

    def _rates(self, step: int) -> list[float]:
        """The learning rate of each group of parameters at this step."""
        o = self.config.optim
        passed = sum(self.epoch >= milestone for milestone in o.milestones) if o.schedule == "step" else 0
        lr = learning_rate(dataclasses.replace(o, milestones=()), self.epoch, step, self.steps) * o.decay**passed
        return [lr, lr if o.encoder_lr is None else o.encoder_lr][: len(self.optimizer.param_groups)]

    def _log_window(self) -> dict[str, float]:
        self._check_finite()
        self._note_replaced()
        values = {"lr": self._rates(self.step - 1)[0], **self._means(0)}
        self.log.entry("train", self.epoch, self.step, self.global_step, values)
        return values

    def _means(self, which: int) -> dict[str, float]:
        """Means over all ranks: which=0 since the last entry, 1 this epoch. Starts the sums anew."""
        *sums, steps = gather_rows(self.sums[which][None]).sum(0).tolist()
        self.sums[which] = 0
        return {name: total / steps for name, total in zip(_SUMS, sums, strict=False)}

    def _check_finite(self) -> None:
        if not bool(gather_rows(self.sums[None]).isfinite().all()):
            raise UserError(
                f"the loss is not finite in epoch {self.epoch + 1} by step {self.step}; last checkpoint: "
                f"{self._last_checkpoint()}; try a lower --lr"
            )

    def _end_epoch(self) -> None:
        self._save()  # evaluation may take longer than a scheduler waits between SIGTERM and SIGKILL
        values = {**self._means(1), "replaced": self.replaced[0]}
        self.log.entry("epoch", self.epoch, self.step, self.global_step, values)
        distributed.sync_buffers(self.model)
        for name, loader in self.eval_loaders.items():
            values = accuracy(self.model.encoder_q, loader, self.device, self.bf16)
            self.log.entry(name, self.epoch, self.step, self.global_step, values)
            self.log.say(
                f"epoch {self.epoch + 1}/{self.config.optim.epochs} {name}: "
                f"top-1 {values['top1']:.2f} % top-5 {values['top5']:.2f} % of {values['images']} images"
            )
        self.model.train()  # accuracy() leaves the encoder in training mode, a frozen one too
        self.epoch, self.step, self.replaced[0] = self.epoch + 1, 0, 0
        self._save()

    def _save(self) -> Path | None:
        self._check_finite()
        self._check_weights()
        self._note_replaced()
        state = {
            "version": __version__,
            "config": self.config.to_json(),
            "initial": self.initial,
            "data_digest": self.index.digest(),
            "left_out": torch.from_numpy(self.unreadable),
            "ranks": self.ranks,
            "epoch": self.epoch,
            "step": self.step,
            "log_bytes": self.log.bytes,
            "replaced": self.replaced,
            "sums": gather_rows(self.sums[None]).cpu(),  # [W, 2, 3]
        }
        if self.rank != 0:
            return None
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return checkpoint.save(self.out / "checkpoints", self.global_step, state, self.config.run.keep)

    def _encoder(self, weights: Weights) -> ResNet:
        """The checkpoint's, its classifier anew if asked for or if the classes are others."""
        encoder, classes = build_encoder(weights), self.config.data.num_classes
        if self.config.new_classifier or weights.num_classes != classes:
            if self.rank == 0 and not self.config.new_classifier:
                print(f"a new classifier: {weights.path} has {weights.num_classes or 'no'} classes", file=sys.stderr)
            encoder.classifier = nn.Linear(encoder.feature_dim, classes)
            nn.init.normal_(
                encoder.classifier.weight, std=0.01, generator=torch.Generator().manual_seed(self.config.run.seed)
            )
            nn.init.zeros_(encoder.classifier.bias)
        return encoder

    def _restore(self, path: Path, state: dict) -> int:
        """Take up an earlier run; -> the length its log.jsonl had."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.step, self.replaced = state["epoch"], state["step"], list(state["replaced"])
        same_ranks = state["ranks"] == self.ranks
        self.sums = (state["sums"][self.rank] if same_ranks else state["sums"].mean(0)).to(self.device)
        if self.rank == 0:
            note = "" if same_ranks else f" (saved by {state['ranks']} ranks, now {self.ranks}: not bit for bit)"
            print(f"resuming {path} at epoch {self.epoch + 1}, step {self.step}{note}", file=sys.stderr)
        return state["log_bytes"]

    def _require_same_run(self, path: Path, state: dict, weights: Weights, index: Index) -> None:
        theirs, ours = json.loads(state["config"]), json.loads(self.config.to_json())
        changed = [name for name in differences(theirs, ours) if name not in FREE | {"cleaned", "list"}]
        changed += ["checkpoint"] * (state.get("initial") != digest(weights.state))
        changed += ["data"] * (state["data_digest"] != index.digest())
        if changed:
            raise UserError(f"{path} is of a run with another {changed[0]}: set it as it was, or choose another --out")
