"""``mopro-fast export CKPT OUT --format …``: a checkpoint in the formats of others."""

import json
import logging
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor, nn

from mopro_fast.checkpoints import capro
from mopro_fast.checkpoints.formats import (
    Weights,
    about,
    detectron2,
    official,
    official_capro,
    safetensors,
    strings,
    torchvision,
)
from mopro_fast.checkpoints.weights import build_encoder, load_weights
from mopro_fast.console import say, tell
from mopro_fast.downstream import capro_lists
from mopro_fast.errors import UserError
from mopro_fast.files import output, replacing
from mopro_fast.models.calibration import CALIBRATION
from mopro_fast.ops.colour import IMAGENET_MEAN, IMAGENET_STD


@dataclass
class Export:
    """Write a checkpoint in the format of another package. What it holds is the same to the last bit."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CKPT")]
    """A checkpoint of any format that this package reads, or a run's folder: its newest."""
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The file to write."""
    format: Literal["official", "capro", "torchvision", "timm", "safetensors", "detectron2", "onnx"]
    """official, capro: all of the model and its optimizer, for the scripts of salesforce/MoPro, of yuleiqin/capro;
    safetensors: all of the model; torchvision, timm: a ResNet's state dict (as safetensors where the file is called
    so); detectron2: a pickle of the backbone; onnx: normalised images to features and logits."""
    classifier: bool = True
    """torchvision, timm, onnx: with the classifier, if there is one."""
    pathlist: str | None = None
    """capro, with a table of anchors (anchors.parquet) as CKPT: CAPro's image_all_tfrecord.pathlist, for its training
    list, FILE@OFFSET and JSON per line."""


def main(argv: list[str]) -> int:
    o = tyro.cli(Export, args=argv, prog="mopro-fast export", config=(tyro.conf.FlagConversionOff,))
    if o.pathlist is not None:
        if o.format != "capro" or not o.checkpoint.endswith(".parquet"):
            raise UserError(
                "--pathlist is for a table of anchors: mopro-fast export anchors.parquet OUT --format capro"
            )
        with output(o.out) as out, replacing(out, new=True) as file:
            lines = capro_lists.write(o.checkpoint, file, o.pathlist)
        tell(f"{o.out}: {lines} images, a training list of CAPro's code")
        return 0
    with output(o.out) as out:
        weights = load_weights(o.checkpoint)
        export(weights, out, o.format, o.classifier)
    m = weights.model
    classes = "no classifier" if weights.num_classes is None else f"{weights.num_classes} classes"
    tell(f"{o.out}: {o.format}, {m.arch} of width {m.width:g}, {classes}")
    for note in notes(weights, o.format):
        say(f"note: {note}")
    return 0


def export(weights: Weights, out: str | Path, format: str, classifier: bool = True) -> None:
    """Write ``out``, whole or not at all."""
    with replacing(out, new=True) as file:
        if format == "official":
            torch.save(official(weights), file)
        elif format == "capro":
            torch.save(official_capro(weights), file)
        elif format in ("torchvision", "timm"):
            state = torchvision(weights, classifier)
            file.write(safetensors(state, {})) if str(out).endswith(".safetensors") else torch.save(state, file)
        elif format == "safetensors":
            file.write(safetensors(weights.state, about(weights)))
        elif format == "detectron2":
            pickle.dump(detectron2(weights), file)
        else:
            file.write(onnx(weights, classifier))


def notes(weights: Weights, format: str) -> Iterator[str]:
    """What the format's own loaders will not take of this model."""
    m = weights.model
    if m.stem == "small" and format not in ("safetensors", "onnx"):
        yield f"the small stem (3×3, no pooling) is not {format}'s: its own ResNet does not load this"
    if m.width != 1 and format in ("torchvision", "timm"):
        yield f"width {m.width:g} multiplies all of a block's channels: {format}'s own ResNets do not load this"
    if format == "official" and (lacks := [n for n in ("queue", "prototypes") if n not in weights.state]):
        yield f"{' and '.join(lacks)} are not in this checkpoint: the official train.py and noise_cleaning.py need them"

    if format == "capro" and (m.arch, m.stem) == ("resnet50", "imagenet") and m.width not in (1, 2, 4):
        yield f"width {m.width:g}: the official code of CAPro has 1, 2 and 4, and does not load this"
    if format == "capro" and m.arch != "resnet50":
        yield f"{m.arch}: the official code of CAPro has ResNet-50s, and does not load this"
    if format == "capro" and (lacks := capro.lacks(weights.state)):
        yield f"{', '.join(lacks)}: not in this checkpoint; the official train.py takes the rest, and these at random"
    if format == "official" and any(name.startswith(CALIBRATION) for name in weights.state):
        yield "calibration is not official: noise_cleaning.py decides without it; `mopro-fast clean` has it"


class _FeaturesAndLogits(nn.Module):
    def __init__(self, weights: Weights, classifier: bool) -> None:
        super().__init__()
        self.encoder, self.classifier = build_encoder(weights).eval(), classifier

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self.encoder.features(images)
        return (features, self.encoder.classifier(features)) if self.classifier else (features,)


def onnx(weights: Weights, classifier: bool) -> bytes:
    """images float32 [N, 3, H, W], normalised as ImageNet's, any N, H, W → features, logits."""
    try:
        import onnx as package
        import onnxscript  # noqa: F401
    except ImportError:
        raise UserError("--format onnx needs two packages: pip install onnx onnxscript") from None
    model = _FeaturesAndLogits(weights, classifier and weights.num_classes is not None)
    size = weights.image_size or 32
    with _quiet():
        program = torch.onnx.export(
            model,
            (torch.zeros(2, 3, size, size),),
            input_names=["images"],
            output_names=["features", "logits"][: 1 + model.classifier],
            dynamic_shapes={"images": {0: "N", 2: "H", 3: "W"}},
            dynamo=True,
            verbose=False,
        )
    written = program.model_proto
    sizes = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "image_size": size, "eval_resize": weights.eval_resize}
    package.helper.set_model_props(written, {k: json.dumps(v) for k, v in sizes.items()} | strings(about(weights)))
    return written.SerializeToString()


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of what it lacks and of Python's own deprecations."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
