"""Every setting of a run, as dataclasses, and the recipes: functions that give a whole TrainConfig.

The docstring under a field is its ``--help``. :meth:`TrainConfig.validate` refuses contradictory settings,
:func:`from_dict` unknown ones and values of other types, both those outside of ``LIMITS``, with a UserError.
"""

import contextlib
import dataclasses
import difflib
import json
import os
import shlex
import sys
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

try:
    from tyro.conf import arg
except ImportError:  # only the command line needs its parser

    def arg(name: str) -> None: ...


from mopro_fast.errors import UserError
from mopro_fast.files import MARKER, MOST_TEXT, home, read_regular

_INTERVALS = {
    "[0, 1]": "data.max_broken data.hw_decoder_load data.augment.flip data.augment.grayscale data.augment.brightness "
    "data.augment.contrast data.augment.saturation mopro.key_momentum mopro.proto_momentum mopro.alpha mopro.threshold "
    "capro.beta",
    "(0, 1]": "optim.decay share data.augment.scale data.augment.scale_k",
    "[0, 1)": "optim.momentum",
    "[0, 0.5]": "data.augment.hue",
    "[0.0001, 1000]": "mopro.temperature",
    "[0.015625, 16]": "model.width",  # from one channel in the first stage
    "[0, 1000]": "optim.weight_decay mixup",
    "[0, 1000000]": "optim.lr optim.encoder_lr mopro.w_inst mopro.w_proto capro.w_recn capro.colour_shift",
    "[0, 1000000000]": "data.shuffle_shards mopro.start_clean optim.milestones optim.warmup_epochs capro.init_proto "
    "capro.unfreeze_epoch capro.update_freq",
    "[0, 1048576]": "model.bn_group",
    "[0, 4096]": "data.threads",
    "[0, 9223372036854775808)": "run.seed",
    "[1, 1000000]": "data.num_classes data.keep_classes",
    "[1, 1000000000]": "optim.epochs",
    "[1, 1048576]": "optim.batch_size",
    "[1, 16384]": "data.eval_resize model.embed_dim",
    "[1, 16777216]": "mopro.queue_size",
    "[1, 8192]": "data.image_size",
    "[10, 1000000]": "run.timeout",
    "[1, inf)": "run.log_every run.checkpoint_every run.keep",
}
LIMITS = {name: interval for interval, names in _INTERVALS.items() for name in names.split()}
"""Where the numbers of every setting lie, those of re-training and fine-tuning included."""
PATHS = {f"data.{name}" for name in ("path", "root", "val", "extra_val", "holdout")}
PATHS |= {"run.out", "run.resume", "run.init", "capro.anchors", "cleaned", "list", "pathlist"}


@dataclass(frozen=True)
class AugmentConfig:
    """Strengths of the augmentations. A value out of range raises a UserError."""

    scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest area of a crop, as a fraction of the image."""
    scale_k: tuple[float, float] | None = None
    """view_k: smallest and largest area of its crop (default: --scale)."""
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
        for name, _, value in _settings(self, "data.augment."):
            _require_in_limits(name, flag(name), value)
        for name in ("scale", "scale_k"):
            low, high = getattr(self, name) or (0, 1)
            _require(low <= high, f"{flag(name)} {low} {high}: the smallest area comes first")


VIEW_K = frozenset(
    f"data.augment.{name}" for name in ("scale_k", "grayscale", "brightness", "contrast", "saturation", "hue")
)
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
    trust_index: bool = False
    """Take the files as they were when they were checked, without looking at their sizes and times: for storage that
    answers slowly. What is read is compared with its checksum all the same."""
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
    """θ: relabel when the pseudo-label's score exceeds it (CAPro: reaches it)."""
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
"""Settings that only MoPro and CAPro read."""


@dataclass
class CAProConfig:
    """What CAPro adds to MoPro's settings, which hold for it as well (symbols as in its paper)."""

    anchors: str = ""
    """anchors.parquet, or its folder: which images of --data have texts that match their class (docs/data.md). The
    prototypes start from them, and label correction leaves them alone. Needed where --init-proto is an epoch."""
    init_proto: int | Literal["never"] = "never"
    """Epoch (0-based) at whose start the prototypes are computed from the anchors; the prototypical loss counts from
    the next one on. never: the vanilla stage, without prototypes and label correction."""
    unfreeze_epoch: int | Literal["never"] = 0
    """First epoch (0-based) in which the encoder is trained, not only the heads. never: as the published code runs."""
    beta: float = 0.1
    """Weight of the bootstrapped targets against the labels."""
    w_recn: float = 1.0
    """Weight of the reconstruction loss."""
    soft_label: Literal[0, 1, 2, 3, 4, 6, 7, 8, 9, 10] = 7
    """What the labels are mixed with (the code's --use_soft_label). For the auxiliary classifier: 7 collective
    bootstrapping, the method; 10 its own prediction; 0 nothing. Ablations, for the classifier: 1 its own prediction,
    2 uniform, 3 and 4 SCC, 6 the prototypes', 8 the auxiliary classifier's, 9 collective bootstrapping."""
    bootstrap_weights: Literal["linear", "softmax"] = "linear"
    """How collective bootstrapping weighs a key by its cosine c: linear: max(c, 0), as in the code; softmax: exp(c/T),
    which is sharper. Not in the paper."""
    update_freq: int = 1
    """The prototypes move in epochs that this divides (above 1 a CUDA graph is captured in each of them); 0: each epoch
    begins with new ones from the anchors."""
    colour_shift: float = 0.1
    """Both views: standard deviation of the lighting noise, a shift of all colours along ImageNet's principal
    components (AlexNet's PCA augmentation)."""
    row_weights: bool = False
    """Weigh each step's losses by the mean of its rows' weights, the column "weight" of --anchors."""


CAPRO = frozenset(f"capro.{name}" for name in CAProConfig.__annotations__)
"""Settings that only CAPro reads."""


@dataclass
class OptimConfig:
    """SGD and its schedule."""

    epochs: int = 90
    """Passes over the data."""
    batch_size: int = 256
    """Rows per step over all ranks."""
    lr: float = 0.1
    """Learning rate at the start."""
    schedule: Literal["step", "cosine", "warmup-cosine"] = "step"
    """step: times --decay at every milestone; cosine: half a cosine down to 0; warmup-cosine: as in CAPro's code, half
    a cosine over the epochs after the warm-up, whose epochs rise linearly. All change between epochs."""
    milestones: tuple[int, ...] = (40, 80)
    """Epochs at which the step schedule lowers the learning rate."""
    decay: float = 0.1
    """Factor of the step schedule at every milestone."""
    warmup_epochs: float = 0
    """Epochs over which the learning rate rises linearly from 0, step by step (warmup-cosine: epoch by epoch)."""
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
    timeout: float = 600
    """Several ranks: seconds after which one that does not come, gives no sign of life, or keeps all others from going
    on ends the run. One step must be shorter, the first (with --compile True) included."""


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
        for name, default, value in _settings(self):
            _require_in_limits(name, flag(name), value)
            if name in PATHS:
                for path in value.values() if isinstance(value, dict) else (value,):
                    _require_path(flag(name), path, default)
        share = d.held_out_share()
        _require(share is None or 0 < share < 1, f"--holdout {d.holdout}: a share must lie between 0 and 1")
        if d.eval_resize is not None:
            _require(
                d.eval_resize >= d.image_size,
                f"--eval-resize must be at least --image-size {d.image_size}, got {d.eval_resize}",
            )
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
        for name in d.extra_val:
            fits = name.strip() and name.isprintable() and "/" not in name
            _require(fits, f"--extra-val {name!r}: the log cannot show this name")
        if o.schedule == "warmup-cosine":
            _require(
                o.warmup_epochs < o.epochs and o.warmup_epochs == int(o.warmup_epochs),
                f"--warmup-epochs {o.warmup_epochs} must be a whole number below --epochs {o.epochs} with "
                "--schedule warmup-cosine",
            )
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

    method: Literal["mopro", "capro", "ce"] = "mopro"
    """mopro; capro: MoPro with anchored prototypes and collective bootstrapping; or ce: plain cross-entropy on the
    given labels, through the same loop (the baseline)."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    mopro: MoProConfig = field(default_factory=MoProConfig)
    capro: CAProConfig = field(default_factory=CAProConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def validate(self, ranks: int = 1) -> None:
        super().validate(ranks)
        m, p, rows = self.model, self.mopro, self.optim.batch_size // ranks
        _require(m.bn_group != 1, "--bn-group 1: BatchNorm needs at least two rows; 0 takes all of a rank")
        _require(
            m.bn_group == 0 or rows % m.bn_group == 0,
            f"--bn-group {m.bn_group} does not divide the {rows} rows of a rank: choose a divisor, or 0 for all rows",
        )
        if self.method != "ce":
            _require(
                p.queue_size >= self.optim.batch_size,
                f"--queue-size {p.queue_size} is smaller than --batch-size {self.optim.batch_size}: "
                "one step's keys must fit",
            )
        if self.method == "mopro":
            _require(p.start_clean >= 1, "--start-clean must be at least 1: epoch 0 makes the first prototypes")
        if self.method == "capro":
            self._validate_capro()

    def _validate_capro(self) -> None:
        p, c = self.mopro, self.capro
        _require(not p.calibrate, "--calibrate True is MoPro's: set --calibrate False, CAPro has no calibration")
        _require(
            c.bootstrap_weights == "linear" or c.soft_label in (7, 9),
            f"--bootstrap-weights softmax has no effect with --soft-label {c.soft_label}",
        )
        _require(not c.row_weights or c.anchors, "--row-weights True needs --anchors with a column weight")
        _require(
            c.init_proto != "never" or c.row_weights or not c.anchors,
            "--anchors has no effect with --init-proto never: leave it out, or name the epoch",
        )
        for name in ("init_proto", "unfreeze_epoch"):
            epoch = getattr(c, name)
            _require(
                epoch == "never" or epoch < self.optim.epochs,
                f"{flag(name)} {epoch} is none of the {self.optim.epochs} epochs, which count from 0: lower it, or set "
                f"{flag(name)} never",
            )
        if c.init_proto != "never":
            _require(c.anchors, f"--init-proto {c.init_proto} needs --anchors: the prototypes are computed from them")
            _require(
                p.start_clean > c.init_proto,
                f"--start-clean {p.start_clean} must be above --init-proto {c.init_proto}: correction needs prototypes",
            )


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


def capro_webvision_vanilla() -> TrainConfig:
    """CAPro on WebVision 1.0, first stage: no prototypes."""
    return _capro(1000, epochs=120, warmup=10)


def capro_webvision() -> TrainConfig:
    """CAPro on WebVision 1.0, second stage: give --init (the first stage) and --anchors."""
    return _capro(1000, epochs=60, warmup=5, init_proto=5, start_clean=11)


def capro_google500_vanilla() -> TrainConfig:
    """CAPro on Google-500, first stage: no prototypes."""
    return _capro(500, epochs=120, warmup=10)


def capro_google500() -> TrainConfig:
    """CAPro on Google-500, second stage: give --init (the first stage) and --anchors."""
    return _capro(500, epochs=120, warmup=10, init_proto=10, start_clean=21)


def _capro(classes: int, epochs: int, warmup: int, init_proto: int | None = None, start_clean: int = 11) -> TrainConfig:
    """The official settings. Their --start_clean_epoch is one less: the last epoch that keeps all labels."""
    vanilla = init_proto is None
    return TrainConfig(
        method="capro",
        data=DataConfig(num_classes=classes, augment=AugmentConfig(scale=(0.8, 1.0), scale_k=(0.2, 1.0))),
        mopro=MoProConfig(threshold=0.6, start_clean=start_clean),
        capro=CAProConfig() if vanilla else CAProConfig(init_proto=init_proto, unfreeze_epoch=init_proto),
        optim=OptimConfig(epochs=epochs, schedule="warmup-cosine", warmup_epochs=warmup),
    )


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
    "capro-webvision-vanilla": capro_webvision_vanilla,
    "capro-webvision": capro_webvision,
    "capro-google500-vanilla": capro_google500_vanilla,
    "capro-google500": capro_google500,
    "small": small,
    "demo": demo,
}


def recipe(name: str) -> TrainConfig:
    """The recipe of this name, or the saved config if ``name`` is a .json file: in a run's folder, that run's.

    A run goes on where it lies, wherever it was when it began.
    """
    if name.endswith(".json"):
        config, folder = load(name), Path(name).parent
        if _in_run(folder):
            config.run.out = str(folder)
            if any((folder / "checkpoints").glob("step_*.pt")):
                config.run.resume = "auto"
        return config
    if name not in RECIPES:
        raise UserError(f"unknown recipe {name!r}{nearest(name, RECIPES)}")
    return RECIPES[name]()


def load(path: str | Path) -> TrainConfig:
    """Read a config.json as a run saves it. Paths that begin with ``~`` come with the home folder."""
    values = read(path)
    if "freeze" in values:
        raise UserError(f"{path} is no recipe for `mopro-fast train`: {_command_of(values, Path(path).parent)}")
    config = from_dict(TrainConfig, values, str(path))
    try:
        config.validate()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return config


def read(path: str | Path) -> dict[str, Any]:
    """The values of a config.json, whichever they are."""

    def settings(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = {}
        for name, value in pairs:
            if name in values:
                raise UserError(f"{path}: {_told(name)} is there twice: keep one")
            try:
                values[name] = home(value) if isinstance(value, str) else value
            except UserError as error:
                raise UserError(f"{path}: {_told(name)}: {error}") from None
        return values

    def no_number(text: str) -> None:
        raise UserError(f"{path}: {text} is no number that a setting can have")

    try:
        text = read_regular(path, MOST_TEXT)[0].decode("utf-8-sig")
        values = json.loads(text, object_pairs_hook=settings, parse_constant=no_number)
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        whys = {UnicodeDecodeError: "it is not UTF-8 text", RecursionError: "it is nested too deeply"}
        whys[ValueError] = "a number in it has too many digits"
        raise UserError(f"cannot read the config {path}: {whys.get(type(error), error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is no config: it must be an object of settings, got {_told(values)}")
    return values


def from_dict(cls: type, values: dict[str, Any], where: str, prefix: str = "") -> Any:
    """Build a config dataclass from plain values. A UserError names the first setting that is unknown or wrong.

    where: the file they come from. prefix: of the names, such as "data.".
    """
    if not isinstance(values, dict):
        raise UserError(f"{where}: {prefix[:-1] or 'a config'} must be an object of settings, got {_told(values)}")
    hints = typing.get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        dotted = prefix + name
        if name not in hints:
            raise UserError(f"{where}: unknown setting {_told(dotted)}{nearest(name[:80], hints)}")
        if dataclasses.is_dataclass(hints[name]):
            arguments[name] = from_dict(hints[name], value, where, f"{dotted}.")
            continue
        try:
            arguments[name] = _as(hints[name], value)
        except TypeError:
            raise UserError(f"{where}: {dotted} must be {_wanted(hints[name])}, got {_told(value)}") from None
        _require_in_limits(dotted, f"{where}: {dotted}", arguments[name])
    try:
        return cls(**arguments)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _as(hint: Any, value: Any) -> Any:
    """The value as a setting of this type has it; a TypeError where it is of another. Types of others' own pass."""
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        for option in inner:
            with contextlib.suppress(TypeError):
                return _as(option, value)
    elif kind is tuple:
        if isinstance(value, (list, tuple)):
            each = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
            if len(each) == len(value):
                return tuple(map(_as, each, value))
    elif kind is Literal:
        if any(value == choice and type(value) is type(choice) for choice in inner):
            return value
    elif kind is dict:
        if isinstance(value, dict):
            return {_as(inner[0], k): _as(inner[1], v) for k, v in value.items()}
    elif hint is float:
        if type(value) in (int, float) and abs(value) <= sys.float_info.max:
            return value
    elif type(value) is hint or hint not in _PLAIN:
        return value
    raise TypeError


_PLAIN = {int: "a whole number", str: "a string", bool: "true or false", types.NoneType: "null"}


def _wanted(hint: Any) -> str:
    """For messages: what a setting of this type takes."""
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return " or ".join(map(_wanted, inner))
    if kind is tuple:
        return f"a list{'' if inner[-1] is Ellipsis else f' of {len(inner)}'}, each {_wanted(inner[0])}"
    if kind is Literal:
        *most, last = map(str, inner)
        return f"{', '.join(most)} or {last}" if most else last
    if kind is dict:
        return "an object of strings"
    return _PLAIN.get(hint, "a finite number")


def _told(value: Any) -> str:
    """For messages: a value as a config.json has it, strings in single quotes."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, (list, tuple)) and any(isinstance(v, (dict, list, tuple)) for v in value):
        return "a list of lists or objects"
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=repr)
    return text if len(text) <= 80 else f"{text[:70]}…"


def _in_run(folder: Path) -> bool:
    """Whether this is the folder of a run."""
    traces = ("checkpoints", "log.jsonl", MARKER)
    return (folder / "config.json").exists() and any((folder / trace).exists() for trace in traces)


def _command_of(values: dict[str, Any], folder: Path) -> str:
    """How the run of re-training or fine-tuning with these settings goes on."""

    def word(part: str, name: str, otherwise: str) -> str:
        value = values.get(part)
        value = value.get(name) if isinstance(value, dict) else value
        return shlex.quote(value) if isinstance(value, str) and value and value.isprintable() else otherwise

    command = "retrain" if "cleaned" in values else "finetune"
    words = f"CKPT --cleaned {word('cleaned', '', 'TABLE')}" if command == "retrain" else "CKPT"
    out = shlex.quote(str(folder)) if _in_run(folder) else word("run", "out", "FOLDER")
    words += f" --data {word('data', 'path', 'DATA')} --out {out}"
    return f"`mopro-fast {command}` made it; its run goes on with its own command, mopro-fast {command} {words} …"


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
    return "--data" if name == "data.path" else "--" + name.rpartition(".")[2].replace("_", "-")


def _settings(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, default, value) of every setting."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from _settings(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, f.default, value


def _require(condition: object, message: str) -> None:
    if not condition:
        raise UserError(message)


def _require_in_limits(name: str, shown: str, value: Any) -> None:
    if name not in LIMITS or value is None:
        return
    interval = LIMITS[name]
    low, high = map(float, interval[1:-1].split(", "))
    for v in value if isinstance(value, (tuple, list)) else (value,):
        if isinstance(v, str):  # a choice, such as never
            continue
        inside = (low < v if interval[0] == "(" else low <= v) and (v < high if interval[-1] == ")" else v <= high)
        _require(inside, f"{shown} must lie in {interval}, got {_told(v)}")


def _require_path(shown: str, path: Any, default: Any) -> None:
    """A file can have this path. Only settings that are empty by themselves may be."""
    if path is None:
        return
    _require(path or default == "", f"{shown} is empty: name a path, or leave it out")
    try:
        parts = os.fsencode(path).split(b"/")
    except UnicodeError:
        parts = [b"\0"]
    _require(b"\0" not in b"/".join(parts), f"{shown} {_told(path)}: no file can have such a name")
    _require(
        max(map(len, parts)) <= 255 and sum(map(len, parts)) + len(parts) <= 4096,
        f"{shown} {_told(path)}: this path is longer than a file system takes",
    )
