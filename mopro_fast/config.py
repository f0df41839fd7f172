"""Every setting of a run, as dataclasses, and the recipes: functions that give a whole TrainConfig.

The docstring under a field is its ``--help``. :meth:`TrainConfig.validate` refuses contradictory settings,
:func:`from_dict` unknown ones, both with a UserError.
"""

import dataclasses
import difflib
import json
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

try:
    from tyro.conf import arg
except ImportError:  # only the command line needs its parser

    def arg(name: str) -> None: ...


from mopro_fast.errors import UserError


@dataclass(frozen=True)
class AugmentConfig:
    """Strengths of the augmentations. A value out of range raises a UserError."""

    scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest area of a crop, as a fraction of the image."""
    flip: float = 0.5
    """Probability of a horizontal flip, in both views."""
    grayscale: float = 0.2
    """Probability that view_k loses its colours."""
    brightness: float = 0.4
    """view_k: brightness is multiplied by a factor of 1 ± this."""
    contrast: float = 0.4
    """view_k: contrast is multiplied by a factor of 1 ± this."""
    saturation: float = 0.4
    """view_k: saturation is multiplied by a factor of 1 ± this."""
    hue: float = 0.4
    """view_k: hue turns by up to ± this part of a full circle (at most 0.5)."""

    def __post_init__(self) -> None:
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise UserError(f"augment scale {low} {high}: give two numbers with 0 < smallest <= largest <= 1")
        highest = {"flip": 1, "grayscale": 1, "brightness": 1, "contrast": 1, "saturation": 1, "hue": 0.5}
        for name, limit in highest.items():
            value = getattr(self, name)
            if not 0 <= value <= limit:
                raise UserError(f"augment {name} must lie in [0, {limit}], got {value}")


VIEW_K = frozenset(f"data.augment.{name}" for name in ("grayscale", "brightness", "contrast", "saturation", "hue"))
"""Settings that only methods of two views read."""


@dataclass
class DataConfig:
    """Where the images are and how they are read."""

    path: Annotated[str, arg(name="data")] = ""
    """Training data: a WebVision folder, a list file ("path label" per line), class folders, or packed shards."""
    layout: Literal["auto", "webvision", "list", "folder", "shards"] = "auto"
    """Layout of the data; auto looks."""
    root: str | None = None
    """Folder that the paths of the list files of --data and --val start from (default: each list's own folder)."""
    val: str | None = None
    """Validation data in any of the layouts (default: the validation split that comes with the data, if any)."""
    extra_val: dict[str, str] = field(default_factory=dict)
    """Further sets to evaluate on, as name path pairs (e.g. imagenet /data/imagenet/val)."""
    holdout: str = ""
    """Training images that are kept out of the training to choose settings by: a share of each class, such as 0.05,
    evaluated against the labels they came with; or a list file ("path label" per line, paths as in --data) of images
    whose labels you trust. The log tells after each epoch with how many of these labels the model agrees."""
    num_classes: int = 1000
    """C. Labels outside [0, C) are refused; -1 means no label."""
    keep_classes: int | None = None
    """Use only the images with a label below this (webvision-mini: 50) of data that has more classes."""
    image_size: int = 224
    """Side of the training crops and of the validation crop, in pixels."""
    eval_resize: int | None = None
    """Shorter side before the validation's centre crop (default: image_size·256/224)."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """The two views' augmentations."""
    threads: int = 0
    """Decoding threads per rank (0: this machine's cores divided by its ranks)."""
    cache: Literal["no", "device"] = "no"
    """device: decode all images once and keep them, as uint8, in the device's memory; needs no DALI."""
    shuffle_shards: int = 16
    """Packed shards: images mix with those of this many shards (0: of all). Files are shuffled as one."""
    max_broken: float = 0.01
    """End the run when more than this share of the images so far (at least of 1,000) broke while it ran."""
    hw_decoder_load: float = 0.65
    """Share of the JPEGs that a GPU's own decoder takes, where it has one."""

    def held_out_share(self) -> float | None:
        """``holdout`` as a share of the images; None: it names a list of images whose labels are trusted."""
        try:
            return float(self.holdout)
        except ValueError:
            return None


@dataclass
class ModelConfig:
    """The encoder."""

    arch: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = "resnet50"
    """Architecture."""
    width: float = 1
    """Multiplies the channels of the four stages."""
    stem: Literal["imagenet", "small"] = "imagenet"
    """small: a 3×3 stride-1 stem without pooling, for images of 16 to 112 px."""
    embed_dim: int = 128
    """D, the size of the embedding."""
    bn_group: int = 0
    """Rows per BatchNorm group (0: all rows of a rank). The official runs have 32 or 64 rows per group."""


@dataclass
class MoProConfig:
    """The method (symbols as in the paper)."""

    queue_size: int = 8192
    """Q, keys kept as negatives."""
    key_momentum: float = 0.999
    """m of the key encoder's moving average."""
    proto_momentum: float = 0.999
    """m_p of the prototypes' moving average."""
    temperature: float = 0.1
    """T of both contrastive losses."""
    alpha: float = 0.5
    """Weight of the classifier against the prototypes in the pseudo-label."""
    threshold: float = 0.8
    """θ: relabel when the pseudo-label's score exceeds it."""
    start_clean: int = 11
    """First epoch (0-based) whose labels are corrected."""
    calibrate: bool = False
    """Let label correction be only as sure, and each class only as rare, as the labels that came with the images bear
    out, so that classes are lost less easily to labels of the model's own making. It needs some epochs before
    start_clean. θ then compares with the share of given labels that are met: with half of the labels wrong hardly any
    score exceeds 0.6. Not in the paper."""
    w_inst: float = 1.0
    """Weight of the instance contrastive loss."""
    w_proto: float = 1.0
    """Weight of the prototypical contrastive loss."""


MOPRO = frozenset(f"mopro.{name}" for name in MoProConfig.__annotations__)
"""Settings that only MoPro reads."""


@dataclass
class OptimConfig:
    """SGD and its schedule."""

    epochs: int = 90
    """Passes over the data."""
    batch_size: int = 256
    """Rows per step over all ranks."""
    lr: float = 0.1
    """Learning rate at the start."""
    schedule: Literal["step", "cosine"] = "step"
    """step: times --decay at every milestone; cosine: half a cosine down to 0. Both change between epochs."""
    milestones: tuple[int, ...] = (40, 80)
    """Epochs at which the step schedule lowers the learning rate."""
    decay: float = 0.1
    """Factor of the step schedule at every milestone."""
    warmup_epochs: float = 0
    """Epochs over which the learning rate rises linearly from 0, step by step."""
    scale_lr: bool = False
    """Multiply lr by batch_size/256."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 1e-4
    """Weight decay, on all parameters as in the official code."""
    nesterov: bool = False
    """Nesterov momentum."""
    sgd: Literal["fused", "torch", "apex"] = "fused"
    """fused: SGD and the momentum encoder's update in one pass. The others take several: PyTorch's SGD, or FusedSGD of
    NVIDIA's apex, which needs --cuda-graph False. Their checkpoints are interchangeable."""


@dataclass
class RunConfig:
    """Where and how to run. Nothing here changes the result except seed, precision and deterministic, compile by
    rounding, and bf16_weights on several ranks, whose gradients then travel as bf16."""

    out: str = ""
    """Folder for checkpoints, logs and the config."""
    seed: int = 0
    """Decides the initial weights, the order of the images and every augmentation."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU of each local rank if there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast type of the encoders; auto: bf16 on a GPU, fp32 on a CPU. Masters are always float32."""
    deterministic: bool = False
    """Only deterministic cuDNN kernels, so that runs on a GPU repeat bit for bit; slower."""
    recompute: bool = False
    """Activation checkpointing: keep only what goes into each residual block, compute the rest again when needed."""
    compile: bool = False
    """Run the encoders through torch.compile."""
    cuda_graph: bool = True
    """On a GPU: replay a step as one CUDA graph."""
    bf16_weights: bool = True
    """With bf16: the optimizer keeps bf16 copies of the weights, so that no step casts them."""
    log_every: int = 50
    """Steps between two log entries."""
    checkpoint_every: int = 2000
    """Steps between checkpoints inside an epoch (one is always written at an epoch's end)."""
    keep: int = 3
    """How many checkpoints stay on disk."""
    resume: str = "auto"
    """auto: continue from the newest checkpoint in out, if there is one; never: refuse; or a checkpoint's path."""
    init: str | None = None
    """Checkpoint to take the weights from, without its optimizer and position."""
    tensorboard: bool = True
    """Write TensorBoard events into out."""


class Settings:
    """What every command that trains has: ``data``, ``optim`` and ``run``. Its subclasses are dataclasses."""

    data: DataConfig
    optim: OptimConfig
    run: RunConfig

    def validate(self, ranks: int = 1) -> None:
        """Raise a UserError for the first setting that cannot be right, on this many ranks."""
        d, o, r = self.data, self.optim, self.run
        _require(d.path, "no training data given: set --data to a WebVision folder, a list file or class folders")
        _require(r.out, "no output folder given: set --out")
        _at_least(1, num_classes=d.num_classes, image_size=d.image_size, epochs=o.epochs, batch_size=o.batch_size)
        _at_least(1, log_every=r.log_every, keep=r.keep, checkpoint_every=r.checkpoint_every)
        _at_least(0, threads=d.threads, shuffle_shards=d.shuffle_shards, seed=r.seed)
        _at_least(0, lr=o.lr, weight_decay=o.weight_decay, warmup_epochs=o.warmup_epochs)
        _shares(max_broken=d.max_broken, hw_decoder_load=d.hw_decoder_load)
        share = d.held_out_share()
        _require(share is None or 0 < share < 1, f"--holdout {d.holdout}: a share must lie between 0 and 1")
        if d.eval_resize is not None:
            _at_least(d.image_size, eval_resize=d.eval_resize)
        _require(0 <= o.momentum < 1, f"--momentum must lie in [0, 1), got {o.momentum}")
        _require(0 < o.decay <= 1, f"--decay must lie in (0, 1], got {o.decay}")
        _require(
            o.batch_size % ranks == 0,
            f"--batch-size {o.batch_size} cannot be divided among {ranks} ranks: choose a multiple of {ranks}",
        )
        _require(
            o.batch_size > ranks, f"--batch-size {o.batch_size} leaves one row per rank: BatchNorm needs at least two"
        )
        _require(
            d.keep_classes is None or d.keep_classes == d.num_classes,
            f"--keep-classes {d.keep_classes} contradicts --num-classes {d.num_classes}: they must be equal",
        )
        taken = {"train", "epoch", "val", "speed", "holdout", "classes", "alarm"} & d.extra_val.keys()
        _require(not taken, f"--extra-val {' '.join(taken)}: the log uses this name itself, choose another")
        _require(not (o.nesterov and o.momentum == 0), "--nesterov needs --momentum above 0")
        _require(
            o.sgd != "apex" or not r.cuda_graph,
            "--sgd apex takes its learning rate from the host, which a CUDA graph cannot read: set --cuda-graph False",
        )
        _require(
            not (r.compile and r.recompute),
            "--compile True: torch.compile cannot take the activation checkpointing of --recompute True: choose one",
        )

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), indent=2)


@dataclass
class TrainConfig(Settings):
    """One training run."""

    method: Literal["mopro", "ce"] = "mopro"
    """mopro, or ce: plain cross-entropy on the given labels, through the same loop (the baseline)."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    mopro: MoProConfig = field(default_factory=MoProConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def validate(self, ranks: int = 1) -> None:
        super().validate(ranks)
        m, p, rows = self.model, self.mopro, self.optim.batch_size // ranks
        _at_least(1, embed_dim=m.embed_dim, queue_size=p.queue_size)
        _at_least(0, bn_group=m.bn_group, w_inst=p.w_inst, w_proto=p.w_proto)
        _shares(key_momentum=p.key_momentum, proto_momentum=p.proto_momentum, alpha=p.alpha, threshold=p.threshold)
        _require(p.temperature > 0, f"--temperature must be above 0, got {p.temperature}")
        _require(m.width >= 1 / 64, f"--width must be at least 1/64, one channel in the first stage, got {m.width}")
        _require(m.bn_group != 1, "--bn-group 1: BatchNorm needs at least two rows; 0 takes all of a rank")
        _require(
            m.bn_group == 0 or rows % m.bn_group == 0,
            f"--bn-group {m.bn_group} does not divide the {rows} rows of a rank: choose a divisor, or 0 for all rows",
        )
        if self.method == "mopro":
            _require(
                p.queue_size >= self.optim.batch_size,
                f"--queue-size {p.queue_size} is smaller than --batch-size {self.optim.batch_size}: "
                "one step's keys must fit",
            )
            _require(p.start_clean >= 1, "--start-clean must be at least 1: epoch 0 makes the first prototypes")


def webvision_v1() -> TrainConfig:
    """WebVision 1.0, 1000 classes: the official settings."""
    return TrainConfig()


def webvision_v2() -> TrainConfig:
    """WebVision 2.0, 5000 classes: the official settings."""
    return TrainConfig(data=DataConfig(num_classes=5000), mopro=MoProConfig(threshold=0.6))


def webvision_mini() -> TrainConfig:
    """The first 50 classes of WebVision 1.0, taken from the full data set's folder."""
    return TrainConfig(data=DataConfig(num_classes=50, keep_classes=50))


def google500() -> TrainConfig:
    """Google-500: 500 classes of web images."""
    return TrainConfig(data=DataConfig(num_classes=500))


def small() -> TrainConfig:
    """Ten classes at 32 px with a ResNet-18 (CIFAR-like data).

    Labels are corrected after the same share of the epochs and with the same θ as in the calibrated runs of
    docs/choosing.md; nothing was tuned at this size.
    """
    return TrainConfig(
        data=DataConfig(num_classes=10, image_size=32, eval_resize=32),
        model=ModelConfig(arch="resnet18", stem="small"),
        mopro=MoProConfig(
            queue_size=4096, key_momentum=0.99, proto_momentum=0.99, start_clean=25, threshold=0.6, calibrate=True
        ),
        optim=OptimConfig(epochs=60, batch_size=256, lr=0.1, schedule="cosine", warmup_epochs=1, weight_decay=5e-4),
    )


def demo() -> TrainConfig:
    """The small run of ``mopro-fast demo``: digits of 16 px, minutes on two CPU cores."""
    return TrainConfig(
        # Digits have no mirror images, and a fifth of one is often no digit.
        data=DataConfig(
            num_classes=10, image_size=16, eval_resize=16, augment=AugmentConfig(scale=(0.5, 1.0), flip=0.0)
        ),
        model=ModelConfig(arch="resnet18", width=0.25, stem="small", embed_dim=64),
        mopro=MoProConfig(queue_size=512, key_momentum=0.99, proto_momentum=0.99, start_clean=10),
        optim=OptimConfig(epochs=30, batch_size=64, lr=0.05, schedule="cosine", warmup_epochs=1, weight_decay=5e-4),
        run=RunConfig(log_every=11),
    )


RECIPES = {
    "webvision-v1": webvision_v1,
    "webvision-v2": webvision_v2,
    "webvision-mini": webvision_mini,
    "google500": google500,
    "small": small,
    "demo": demo,
}


def recipe(name: str) -> TrainConfig:
    """The recipe of this name, or the saved config if ``name`` is a .json file."""
    if name.endswith(".json"):
        return load(name)
    if name not in RECIPES:
        raise UserError(f"unknown recipe {name!r}{nearest(name, RECIPES)}")
    return RECIPES[name]()


def load(path: str | Path) -> TrainConfig:
    """Read a config.json as a run saves it."""
    try:
        config = from_dict(TrainConfig, json.loads(Path(path).read_text()), str(path))
        config.validate()
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read the config {path}: {error}") from None
    return config


def from_dict(cls: type, values: dict[str, Any], where: str) -> Any:
    """Build a config dataclass from plain values; unknown names are refused."""
    hints = typing.get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        if name not in hints:
            raise UserError(f"{where}: unknown setting {name!r}{nearest(name, hints)}")
        if dataclasses.is_dataclass(hints[name]):
            value = from_dict(hints[name], value, f"{where}, {name}")
        elif isinstance(value, list):
            value = tuple(value)
        arguments[name] = value
    return cls(**arguments)


def nearest(name: str, names: typing.Iterable[str]) -> str:
    """The end of an error message: the nearest valid name, and all of them."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=1)
    return (f": did you mean {close[0]!r}?" if close else ":") + f" (choose from {', '.join(names)})"


def differences(a: dict, b: dict, prefix: str = "") -> list[str]:
    """The dotted names whose values differ between two configs as dicts."""
    found = []
    for name in {**a, **b}:
        left, right = a.get(name), b.get(name)
        if isinstance(left, dict) and isinstance(right, dict):
            found += differences(left, right, f"{prefix}{name}.")
        elif left != right:
            found.append(prefix + name)
    return found


def flag(name: str) -> str:
    """The command-line option of a setting."""
    return "--" + name.replace("_", "-")


def _require(condition: object, message: str) -> None:
    if not condition:
        raise UserError(message)


def _shares(**values: float) -> None:
    for name, value in values.items():
        _require(0 <= value <= 1, f"{flag(name)} must lie in [0, 1], got {value}")


def _at_least(least: float, **values: float) -> None:
    for name, value in values.items():
        _require(value >= least, f"{flag(name)} must be at least {least}, got {value}")
