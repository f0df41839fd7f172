"""A model of CAPro with the state dict of a training's, small, and its official form."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mopro_fast.config import TrainConfig
from mopro_fast.models.build import build

THEIRS = {  # ours: the official code's
    "encoder_q.fc1": "projection.0",
    "encoder_q.fc2": "projection.2",
    "reconstruction.0": "projection_back.0",
    "reconstruction.2": "projection_back.2",
    "encoder_q.classifier.weight": "classifier.fc.weight",
    "auxiliary.weight": "classifier_projection.fc.weight",
}


def trained_state(config: TrainConfig, seed: int = 0) -> dict[str, Tensor]:
    """As after some training: no two tensors alike."""
    torch.manual_seed(seed)
    state = build(config).state_dict()
    for name, t in state.items():
        if name.endswith("running_var"):
            t.uniform_(0.5, 2)
        elif name == "prototypes":
            t.copy_(F.normalize(torch.randn_like(t), dim=1))
        elif t.is_floating_point() and name not in ("queue", "encoder_q.classifier.bias"):
            t.add_(torch.randn_like(t) / 1000)
    return state


def write(path: Path, config: TrainConfig, seed: int = 0, sure: float = 1) -> Path:
    """A checkpoint of this package; sure: times the classifier's weights."""
    state = trained_state(config, seed)
    state["encoder_q.classifier.weight"] *= sure
    torch.save({"model": state, "config": config.to_json(), "epoch": 3}, path)
    return path


def official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict that CAPro's train.py saves, in the order of its model."""
    found = {"queue": state["queue"].T.contiguous(), "queue_ptr": state["queue_ptr"], "prototypes": state["prototypes"]}
    classes, dim = state["prototypes"].shape
    found |= {f"prototypes_{name}": torch.rand(classes) for name in ("visited", "density", "distance")}
    heads = ("encoder_q.classifier", "encoder_q.fc")
    found |= {n: t for n, t in state.items() if n.startswith("encoder_") and not n.startswith(heads)}
    for ours, theirs in THEIRS.items():
        if theirs == "classifier.fc.weight":
            found |= {"relation.fc1.weight": torch.rand(128, 2 * dim), "relation.fc2.weight": torch.rand(1, 128)}
        found |= {n.replace(ours, theirs): t for n, t in state.items() if n.startswith(ours)}
    return {f"module.{name}": t.clone() for name, t in found.items()}
