"""The task of classifier re-training (retrain.py) and fine-tuning (finetune.py): supervised, from a checkpoint.

Mixup depends on (seed, step) alone, so that an interrupted and resumed run ends with the same bits.
"""

import dataclasses
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from mopro_fast import distributed
from mopro_fast.checkpoints.formats import Weights, digest
from mopro_fast.checkpoints.weights import build_encoder, load_weights
from mopro_fast.config import VIEW_K, AugmentConfig, DataConfig, OptimConfig, RunConfig, Settings
from mopro_fast.data.batches import Batch
from mopro_fast.data.index import Index
from mopro_fast.data.order import balancing_repeats
from mopro_fast.errors import UserError
from mopro_fast.models.classifier import Classifier
from mopro_fast.training.command import run
from mopro_fast.training.task import Task
from mopro_fast.transfer import to_device

MIXUP = 3  # first word of the generators' seeds; data/ has 0 to 2
# The augmentations of view_q: what only view_k has keeps its value and is no option.
_TYPES = typing.get_type_hints(AugmentConfig)
_HIDDEN = [(name, tyro.conf.Suppress[_TYPES[name]]) for name in _TYPES if f"data.augment.{name}" in VIEW_K]
OneView = dataclasses.make_dataclass("OneView", _HIDDEN, bases=(AugmentConfig,), frozen=True)


@dataclass
class SupervisedData(DataConfig):
    """Where the images are and how they are read."""

    augment: OneView = field(default_factory=OneView)
    """The view's augmentations."""


@dataclass
class SupervisedOptim(OptimConfig):
    """SGD and its schedule."""

    encoder_lr: float | None = None
    """Constant learning rate of the encoder (default: it follows --lr and its schedule)."""


@dataclass
class SupervisedRun(RunConfig):
    """Where and how to run. Nothing here except seed, precision and deterministic changes the result."""

    init: tyro.conf.Suppress[None] = None  # the command's first argument


@dataclass
class SupervisedConfig(Settings):
    """What re-training and fine-tuning have in common."""

    data: SupervisedData = field(default_factory=SupervisedData)
    optim: SupervisedOptim = field(default_factory=SupervisedOptim)
    run: SupervisedRun = field(default_factory=SupervisedRun)
    freeze: bool = True
    """Train the classifier alone; the encoder stays in evaluation mode (see --moving-statistics)."""
    new_classifier: bool = False
    """Begin with fresh classifier weights (always where the checkpoint's has another number of classes)."""
    resample: bool = False
    """Show an image more often the rarer its class is: classes in proportion to the square root of their size."""
    mixup: float = 0.0
    """Mix pairs of images with a share from Beta(this, this), and their losses; 0: do not."""
    mixup_beside: bool = False
    """With --mixup: show the images as they are, too, in a pass before, and add up the losses of both passes."""
    moving_statistics: bool = False
    """With --freeze True: BatchNorm normalises by the batch all the same, and its running statistics move on."""
    train_bias: bool = True
    """Train the classifier's bias; False: it stays what it is."""

    def validate(self, ranks: int = 1) -> None:
        super().validate(ranks)
        if self.freeze and self.optim.encoder_lr is not None:
            raise UserError("--encoder-lr has no effect on a frozen encoder: set --freeze False as well")
        if self.moving_statistics and not self.freeze:
            raise UserError("--moving-statistics True has no effect with --freeze False, whose statistics move anyway")
        if self.freeze and self.run.recompute:
            raise UserError("--recompute has no effect on a frozen encoder, which keeps nothing: leave it out")


class SupervisedTask(Task):
    """Trains on from ``weights``."""

    config: SupervisedConfig

    def __init__(self, config: SupervisedConfig, weights: Weights) -> None:
        super().__init__(config)
        self.weights, self.initial = weights, digest(weights.state)
        self.other_classes = False
        """Whether the data's classes are called otherwise than the checkpoint's."""

    def shown(self, index: Index) -> tuple[Index, np.ndarray | None]:
        """The images with a label."""
        trained, own = self.weights.classes, index.classes
        self.other_classes = None not in (trained, own) and trained != own

        def chosen() -> tuple[np.ndarray, np.ndarray | None]:
            left_out = np.union1d(index.left_out, np.flatnonzero(index.labels < 0))
            usable = dataclasses.replace(index, left_out=left_out).usable
            return left_out, balancing_repeats(index.labels, usable) if self.config.resample else None

        left_out, repeats = distributed.by_rank0(chosen)
        return dataclasses.replace(index, left_out=left_out), repeats

    def build(self) -> Classifier:
        """The checkpoint's encoder, its classifier anew if asked for or if the classes are others."""
        c, weights = self.config, self.weights
        encoder, classes = build_encoder(weights), c.data.num_classes
        encoder.recompute = c.run.recompute
        if c.new_classifier or weights.num_classes != classes or self.other_classes:
            if not c.new_classifier:
                theirs = "other" if weights.num_classes == classes else weights.num_classes or "no"
                distributed.say(f"a new classifier: {weights.path} has {theirs} classes")
            encoder.classifier = nn.Linear(encoder.feature_dim, classes)
            generator = torch.Generator().manual_seed(c.run.seed)
            nn.init.normal_(encoder.classifier.weight, std=0.01, generator=generator)
            nn.init.zeros_(encoder.classifier.bias)
        return Classifier(
            encoder,
            c.freeze,
            moving_statistics=c.moving_statistics,
            train_bias=c.train_bias,
            mixup_beside=c.mixup_beside,
        )

    def batches(self, batches: Iterable[Batch], global_step: int) -> Iterator[tuple[Batch, tuple[Tensor, ...]]]:
        """With mixup the same shares and partners on every rank."""
        mixup, seed = self.config.mixup, self.config.run.seed
        for step, batch in enumerate(batches, global_step):
            if not mixup:
                yield batch, ()
                continue
            rng, device = np.random.default_rng((MIXUP, seed, step)), batch.labels.device
            share = rng.beta(mixup, mixup)
            partner = rng.permutation(len(batch.labels))
            yield batch, (to_device(np.array([share, 1 - share], np.float32), device), to_device(partner, device))

    def learning_rates(self, epoch: int, step: int, steps: int) -> list[float]:
        (lr,), o = super().learning_rates(epoch, step, steps), self.config.optim
        return [lr] if self.config.freeze else [lr, lr if o.encoder_lr is None else o.encoder_lr]


def main(
    argv: list[str],
    command: str,
    default_of: Callable[[Weights | None], SupervisedConfig],
    task: type[SupervisedTask],
) -> int:
    """Run ``mopro-fast COMMAND CKPT options``; default_of: the settings for a checkpoint, or for none."""
    if not argv or argv[0].startswith("-"):
        if argv and argv[0] not in ("-h", "--help"):
            raise UserError(f"the checkpoint comes first: mopro-fast {command} CKPT {argv[0]} …")
        weights, given, rest = None, "CKPT", ["--help"]
        default = default_of(None)
    else:
        weights, given, rest = load_weights(argv[0]), argv[0], argv[1:]
        default = default_of(weights)
        words = {word.partition("=")[0].replace("_", "-") for word in rest}
        if weights.image_size is None and not words & {"--image-size", "-h", "--help"}:
            raise UserError(f"{given} does not say for which images it is: set --image-size")
        data = default.data  # with the checkpoint's classes and image sizes as defaults
        data.num_classes = weights.num_classes or data.num_classes
        data.image_size = weights.image_size or data.image_size
        data.eval_resize = weights.eval_resize
        if command == "retrain":  # on the data of the training
            data.keep_classes = (weights.config or {}).get("data", {}).get("keep_classes")
    config = tyro.cli(
        type(default),
        args=rest,
        default=default,
        prog=f"mopro-fast {command} {given}",
        description=type(default).__doc__,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
    )
    return run(task(config, weights))
