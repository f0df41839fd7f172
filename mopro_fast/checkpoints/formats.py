"""The formats of others, into this package's names and out of them.

Read are checkpoints of this package, of the official code (salesforce/MoPro), of CAPro's (capro.py) and of torchvision,
timm and what else holds a ResNet by torchvision's names (foreign.py), written by torch.save or as safetensors. Written
are those of this package, of both official codes and of torchvision, and detectron2's.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mopro_fast import __version__, ops
from mopro_fast.checkpoints import capro, foreign
from mopro_fast.checkpoints.fields import is_dense, is_finite
from mopro_fast.checkpoints.state import RunState, checked, is_ours
from mopro_fast.checkpoints.state import read as read_torch
from mopro_fast.config import ModelConfig, MoProConfig, TrainConfig
from mopro_fast.errors import UserError, require_resources
from mopro_fast.files import open_regular
from mopro_fast.models.calibration import CALIBRATION

Q, K = "encoder_q.", "encoder_k."
_SGD = {name for name in torch.optim.SGD([torch.zeros(1)], 0.1).param_groups[0] if name != "params"}
HEADS = ("classifier.", "fc1.", "fc2.")  # what files of others lack: the projection, or the classifier too


@dataclass
class Weights:
    """What a file holds; all tensors on the CPU, in float32 but for counters."""

    path: Path
    kind: Literal["mopro_fast", "official", "capro", "torchvision", "safetensors"]
    """capro: of CAPro's official code; torchvision: also timm's names, whatever the container; safetensors: this
    package's names in that format."""
    state: dict[str, Tensor]
    """encoder_q.* and, where present, encoder_k.*, queue [Q, D], queue_ptr int64 [1], prototypes [C, D]; of CAPro
    reconstruction.* and auxiliary.weight [C, D], and an encoder_k.* without heads."""
    model: ModelConfig
    """arch, width, stem and embed_dim as the tensors' shapes say."""
    num_classes: int | None
    """None: no classifier."""
    epoch: int | None
    """Epochs done."""
    image_size: int | None
    """Side of the validation crop, px; None: not known."""
    eval_resize: int | None
    """Shorter side before that crop."""
    optimizer: dict[str, Any] | None
    """torch.optim.SGD's state dict over the parameters that are trained, in their order: those of encoder_q; of CAPro
    without the classifier's bias, and then those of reconstruction and auxiliary."""
    config: dict[str, Any] | None
    """The config of the run, where the file has one."""
    keys_updated: bool
    """encoder_k has moved after encoder_q's last step; the official code moves it at the beginning of the next."""
    classes: list[str] | None = None
    """The names of the classes in the order of their labels, where the training data had them."""
    note: str = ""
    """What of the file's tensors was not taken."""

    @property
    def capro(self) -> bool:
        """Whether it is a model of CAPro's training."""
        return capro.AUXILIARY in self.state

    def encoder(self) -> dict[str, Tensor]:
        """The query encoder's tensors by ResNet's names."""
        return {name.removeprefix(Q): t for name, t in self.state.items() if name.startswith(Q)}


def digest(tensors: dict[str, Tensor]) -> str:
    """sha256 over names and contents."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(name.encode() + b"\0")
        sha.update(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], str, str]:
    """-> the file's entries, its tensors by this package's names or torchvision's, its kind (Weights.kind), and
    Weights.note.
    """
    in_safetensors = _is_safetensors(path)
    found = _read_safetensors(path) if in_safetensors else read_torch(path)
    if not in_safetensors and is_ours(found):
        found = vars(checked(found, path))
        return found, found["model"], "mopro_fast", ""
    tensors, note = foreign.tensors(found, path)
    if not any(name.startswith(Q) for name in tensors):
        return found, tensors, "torchvision", note
    if capro.is_theirs(tensors, path):
        return found, capro.own_names(tensors), "capro", note
    return found, tensors, "safetensors" if in_safetensors else "official", note


def _is_safetensors(path: Path) -> bool:
    """A header's length in 8 bytes, then its JSON."""
    try:
        with open_regular(path) as file:
            start = file.read(9)
    except OSError:  # read_torch says why
        return False
    return path.suffix == ".safetensors" or (start[8:] == b"{" and int.from_bytes(start[:8], "little") < 100 << 20)


def _read_safetensors(path: Path) -> dict[str, Any]:
    """-> {"state_dict", "mopro_fast", "epoch"}: as :func:`read_torch` gives for torch.save's format."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        require_resources(error, path)
        raise UserError(f"cannot read {path}: {str(error).partition(chr(10))[0]}; is it a whole file?") from None
    if about.get("sha256", digest(tensors)) != digest(tensors):
        raise UserError(f"{path} is damaged: its tensors do not match their checksum; copy it again")
    epoch = about.get("epoch", "")
    epoch = int(epoch) if epoch.isdecimal() and len(epoch) < 9 else None
    return {"state_dict": tensors, "mopro_fast": about, "epoch": epoch}


def own_names(tensors: dict[str, Tensor], transposed_queue: bool) -> dict[str, Tensor]:
    state = {}
    foreign = not any(name.startswith(Q) for name in tensors)
    for name, t in tensors.items():
        t = t.detach()
        if not is_dense(t):
            raise ValueError(f"{name} is not a dense tensor")
        if 0 in t.shape:
            raise ValueError(f"{name} is empty")
        if foreign:
            name = Q + ("classifier." + name[3:] if name.startswith("fc.") else name)
        if transposed_queue and name == "queue":
            t = t.T
        counter = name.endswith(("num_batches_tracked", "queue_ptr"))
        if t.is_floating_point() == counter or t.is_complex() or t.dtype == torch.bool:
            raise ValueError(f"{name} is of type {str(t.dtype).removeprefix('torch.')}")
        state[name] = (t.long() if counter else t.float()).contiguous()
    for name in [n for n in state if n.endswith(".running_mean")]:  # older PyTorch did not count
        state.setdefault(name.replace("running_mean", "num_batches_tracked"), torch.zeros((), dtype=torch.int64))
    return state


def optimizer_of(found: Any, state: dict[str, Tensor], kind: str) -> dict[str, Any] | None:
    """Weights.optimizer; None where the file has none that fits.

    In files of others more parameters may follow. Parameters are numbered, or, before PyTorch 1.6, named by their
    addresses: their order in the groups counts.
    """
    shapes = [state[name].shape for name in capro.trained(state)]
    try:
        found = capro.own_optimizer(found, state) if kind == "capro" else found
        groups = found["param_groups"]
        keys = [key for group in groups for key in group["params"]][: len(shapes)]
        buffers = [found["state"].get(key, {}).get("momentum_buffer") for key in keys]
        fits = len(keys) == len(shapes) and all(
            b is None or (b.shape == shape and is_finite(b)) for b, shape in zip(buffers, shapes, strict=True)
        )
        group = {name: value for name, value in groups[0].items() if name in _SGD and _is_plain(value)}
        fits = fits and isinstance(group["lr"], float | int)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return None
    if not fits:
        return None
    slots = {i: {"momentum_buffer": b.float()} for i, b in enumerate(buffers) if b is not None}
    return {"state": slots, "param_groups": [group | {"params": list(range(len(keys)))}]}


def _is_plain(value: Any) -> bool:
    return value is None or (type(value) in (bool, int, float) and math.isfinite(value))


def to_state(weights: Weights, config: TrainConfig) -> RunState:
    """A model that no run can go on from: it knows no data."""
    model = _updated(weights, config.mopro.key_momentum)
    return RunState(config.as_dict(), model, weights.optimizer, weights.epoch or 0, classes=weights.classes)


def _updated(weights: Weights, momentum: float) -> dict[str, Tensor]:
    """The tensors, the key encoder as the trainer leaves it: moved after the query encoder's last step."""
    state = dict(weights.state)
    names = [n for n in state if n.startswith(K) and not n.endswith(("running_mean", "running_var", "batches_tracked"))]
    if names and not weights.keys_updated:
        keys = [state[name].clone() for name in names]
        ops.ema_update_(keys, [state[name.replace(K, Q, 1)] for name in names], momentum)
        state |= dict(zip(names, keys, strict=True))
    return state


def official(weights: Weights) -> dict[str, Any]:
    """What MoPro's official train.py saves, and an entry of ours that its scripts do not look at."""
    if weights.capro:
        raise UserError(f"{weights.path} is a model of CAPro, --format official is for MoPro's: set --format capro")
    state = {f"module.{name}": t for name, t in weights.state.items() if not name.startswith(CALIBRATION)}
    if "queue" in weights.state:
        state["module.queue"] = weights.state["queue"].T.contiguous()
    found = {"epoch": weights.epoch or 0, "arch": weights.model.arch, "state_dict": state}
    if weights.optimizer is not None:
        group = dict(weights.optimizer["param_groups"][0], lr=float(weights.optimizer["param_groups"][0]["lr"]))
        copies = 2 if any(name.startswith(K) for name in weights.state) else 1  # it has the key encoder's as well
        group["params"] = list(range(copies * len(group["params"])))
        found["optimizer"] = {"state": weights.optimizer["state"], "param_groups": [group]}
    return found | {"mopro_fast": about(weights)}


def official_capro(weights: Weights) -> dict[str, Any]:
    """What CAPro's train.py saves and loads, and an entry of ours that its scripts do not look at.

    Raises a UserError for a model that theirs cannot be.
    """
    bias = weights.state.get(capro.BIAS)
    if bias is not None and bias.any():
        raise UserError(
            f"{weights.path}: CAPro's classifier has no bias, this one's is not zero: give a checkpoint of CAPro's "
            "training, or another --format"
        )
    config = weights.config or {}
    temperature = config.get("mopro", {}).get("temperature", MoProConfig().temperature)
    widths = {1: "", 2: "x2", 4: "x4"}
    found = {
        "epoch": weights.epoch or 0,
        "arch": weights.model.arch + widths.get(weights.model.width, ""),
        "state_dict": capro.their_names(weights.state, temperature),
        "best_acc_web": [0.0, 0.0],
        "best_acc_imgnet": [0.0, 0.0],
        "epoch_best_web": -1,
        "epoch_best_imgnet": -1,
    }
    if weights.optimizer is not None and weights.capro:
        unfreeze = config.get("capro", {}).get("unfreeze_epoch", 0)
        found["optimizer"] = capro.their_optimizer(weights.optimizer, weights.state, unfreeze)
    return found | {"mopro_fast": about(weights)}


def torchvision(weights: Weights, classifier: bool) -> dict[str, Tensor]:
    """The state dict of a torchvision or timm ResNet; without a classifier for timm's num_classes=0."""
    state = {n: t for n, t in weights.encoder().items() if not n.startswith(("fc1.", "fc2."))}
    if not classifier:
        state = {n: t for n, t in state.items() if not n.startswith("classifier.")}
    return {n.replace("classifier.", "fc."): t for n, t in state.items()}


def detectron2(weights: Weights) -> dict[str, Any]:
    """The backbone as detectron2's MODEL.WEIGHTS takes it; docs/transfer.md has the settings."""
    names = {f"layer{i}": f"res{i + 1}" for i in (1, 2, 3, 4)}
    names |= {f"bn{i}": f"conv{i}.norm" for i in (1, 2, 3)}
    names |= {"downsample.0": "shortcut", "downsample.1": "shortcut.norm"}
    model = {}
    for name, t in torchvision(weights, classifier=False).items():
        name = name if name.startswith("layer") else f"stem.{name}"
        for old, new in names.items():
            name = name.replace(old, new)
        model[name] = t.numpy()
    return {"model": model, "__author__": "mopro_fast", "matching_heuristics": True}


def about(weights: Weights) -> dict[str, Any]:
    """What the other format has no place for; :func:`load_weights` reads it back."""
    about = {"version": __version__, "keys_updated": weights.keys_updated}
    if weights.config is not None:
        about["config"] = json.dumps(weights.config)
    if weights.classes is not None:
        about["classes"] = json.dumps(weights.classes)  # in ASCII, whatever the names hold
    return about | ({} if weights.epoch is None else {"epoch": weights.epoch})


def strings(about: dict[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in about.items()}


def safetensors(state: dict[str, Tensor], about: dict[str, Any]) -> bytes:
    from safetensors.torch import save

    return save(state, {"format": "pt", "sha256": digest(state), **strings(about)})
