"""``mopro-fast import FILE OUT [RECIPE …]``: a checkpoint of any known format as one of this package.

Without a recipe OUT holds the model, for ``--init`` and for every command that takes a checkpoint. With a recipe and
the options of a training, ``mopro-fast train`` with the same options and ``--resume OUT`` goes on from it.
"""

import dataclasses
import os
from pathlib import Path

import torch

from mopro_fast.checkpoints.formats import Weights, to_state
from mopro_fast.checkpoints.state import RunState, load, write
from mopro_fast.checkpoints.weights import check_fits, load_weights
from mopro_fast.config import MoProConfig, TrainConfig, capro_webvision_vanilla, from_dict
from mopro_fast.console import say, tell
from mopro_fast.data import inputs
from mopro_fast.downstream import capro_lists
from mopro_fast.errors import UserError
from mopro_fast.files import output, replacing
from mopro_fast.labels import UNSEEN
from mopro_fast.models.build import build
from mopro_fast.models.calibration import CALIBRATION
from mopro_fast.training import command
from mopro_fast.training.optim import build_optimizer

USAGE = """usage: mopro-fast import FILE OUT [RECIPE --data PATH …]

FILE: a checkpoint of the official code (salesforce/MoPro, yuleiqin/capro), of torchvision or timm, or safetensors.
OUT:  the checkpoint to write, for `mopro-fast train … --init OUT` and every other command: a new file, or one that
      this command wrote before.

With --pathlist image_all_tfrecord.pathlist FILE is a list of CAPro's code (FILE@OFFSET and JSON, or a label, per line)
and OUT a folder for list.txt, for --data and --val, and of a training list anchors.parquet; --anchors N per class (50).

To go on with an official training give a recipe and the options of `mopro-fast train` (all but --out), then run
`mopro-fast train` with the same recipe and options and --resume OUT."""


def main(argv: list[str]) -> int:
    if "-h" in argv or "--help" in argv or not argv:
        tell(USAGE)
        return 0
    if len(argv) < 2 or argv[0].startswith("-") or argv[1].startswith("-"):
        raise UserError("two files come first: mopro-fast import FILE OUT (more: mopro-fast import --help)")
    source, out, rest = argv[0], Path(argv[1]), argv[2:]
    if any(word.partition("=")[0] == "--pathlist" for word in rest):
        return capro_lists.main(argv)
    with output(out, lambda path: _is_import(path) and not os.path.samefile(path, source)) as path:
        weights = load_weights(source)
        config = command.parse(rest) if rest else config_of(weights)
        state = resumable(weights, config) if rest else to_state(weights, config)
        state.imported = True
        with replacing(path, new=not path.exists()) as file:
            write(file, state)
    m = weights.model
    done = "" if weights.epoch is None else f", {weights.epoch} epochs done"
    tell(f"{out}: {m.arch} of width {m.width:g}, {weights.num_classes or 'no'} classes{done}, from {weights.kind}")
    if rest and weights.optimizer is None:
        say("note: no SGD momentum in the file: it starts at zero")
    return 0


def _is_import(path: Path) -> bool:
    """Whether this command wrote the file: no training's checkpoint."""
    try:
        return load(path).imported
    except UserError:
        return False


def config_of(weights: Weights) -> TrainConfig:
    """The config that the file brings, or the official settings with what the tensors' shapes say."""
    if weights.config is not None and weights.config.keys() <= vars(TrainConfig()).keys():
        return from_dict(TrainConfig, weights.config, str(weights.path))
    config = capro_webvision_vanilla() if weights.capro else TrainConfig()
    config.model = weights.model
    config.data.num_classes, config.data.image_size = weights.num_classes or 1000, weights.image_size or 32
    config.mopro.queue_size = len(weights.state.get("queue", ())) or MoProConfig().queue_size
    return config


def resumable(weights: Weights, config: TrainConfig) -> RunState:
    """What the trainer saves at the end of an epoch."""
    config.run.out = config.run.out or "."
    config.validate()
    if weights.capro != (config.method == "capro") and "queue" in weights.state:
        method = "capro" if weights.capro else "mopro"
        raise UserError(f"{weights.path} is a checkpoint of --method {method}: give a recipe of it, or this option")
    with torch.device("meta"):
        model = build(config)
        optim = dataclasses.replace(config.optim, sgd="torch")  # apex's refuses the meta device; all save the same
        optimizer = build_optimizer(model.trained(), optim).state_dict()
    state = to_state(weights, config)
    for name, own in model.state_dict().items():
        if name.startswith(CALIBRATION):
            state.model.setdefault(name, torch.zeros(own.shape))  # it begins now
    check_fits(model.state_dict(), state.model, weights.path)
    sets = inputs.load(config)
    index = inputs.readable(sets["train"], "train", inputs.threads(config.data))
    if config.data.holdout:
        index, judged = inputs.hold_out(index, config.data)
        state.held_out_labels = torch.from_numpy(judged.labels[index.held_out])
    optimizer["state"] = weights.optimizer["state"] if weights.optimizer else {}
    state.optimizer, state.data_digest, state.left_out = optimizer, index.digest(), torch.from_numpy(index.left_out)
    state.held_out = torch.from_numpy(index.held_out)
    names = inputs.class_names(config, index)
    state.classes = names if names and len(names) == config.data.num_classes else None
    state.assigned = torch.full((len(index),), UNSEEN, dtype=torch.int32)
    return state
