"""Weights from any file that holds a ResNet of this package, under this package's names.

Read are checkpoints of this package, of the official code (salesforce/MoPro) and of torchvision or timm, written by
torch.save or as safetensors. A file can hold wrong numbers, but nothing in it is ever executed.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mopro_fast.checkpoints import state as checkpoint
from mopro_fast.config import ModelConfig
from mopro_fast.errors import UserError
from mopro_fast.models.resnet import LAYERS, BasicBlock, Bottleneck, ResNet

Q, K = "encoder_q.", "encoder_k."
HEADS = ("classifier.", "fc1.", "fc2.")  # what files of others lack: the projection, or the classifier too


@dataclass
class Weights:
    """What a file holds; all tensors on the CPU, in float32 but for counters."""

    path: Path
    kind: Literal["mopro_fast", "official", "torchvision", "safetensors"]
    """torchvision: also timm's names, whatever the container; safetensors: this package's names in that format."""
    state: dict[str, Tensor]
    """encoder_q.* and, where present, encoder_k.*, queue [Q, D], queue_ptr int64 [1], prototypes [C, D]."""
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
    """torch.optim.SGD's state dict over the parameters of encoder_q, in their order."""
    config: dict[str, Any] | None
    """The config of the run, where the file has one."""
    keys_updated: bool
    """encoder_k has moved after encoder_q's last step; the official code moves it at the beginning of the next."""

    def encoder(self) -> dict[str, Tensor]:
        """The query encoder's tensors by ResNet's names."""
        return {name.removeprefix(Q): t for name, t in self.state.items() if name.startswith(Q)}


def load_weights(path: str | Path) -> Weights:
    """Read a file of any known kind, or the newest checkpoint of a run's folder.

    Raises a UserError if it is damaged or holds something else.
    """
    path = Path(path)
    if path.is_dir():
        saved = checkpoint.all_of(path / "checkpoints")
        if not saved:
            raise UserError(f"{path} is no run's folder: it has no checkpoints/step_*.pt")
        path = saved[-1]
    found = _read_safetensors(path) if _is_safetensors(path) else checkpoint.read(path)
    tensors, kind = _tensors(found, path)
    about = found.get("mopro_fast") or {}  # of files that this package exported
    config = found.get("config") or about.get("config")
    try:
        config = json.loads(config) if isinstance(config, str) else None
        state = _own_names(tensors, transposed_queue=kind == "official")
        model, num_classes = _architecture(state, path)
        _require_rest(state, model, num_classes, path)
        size, resize = _evaluation(config, model)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no checkpoint that this package knows: {type(error).__name__}: {error}") from None
    epoch = found.get("epoch")
    epoch = epoch if isinstance(epoch, int) else None
    optimizer = _optimizer(found.get("optimizer"), state)
    updated = about.get("keys_updated", kind != "official") in (True, "True")
    return Weights(path, kind, state, model, num_classes, epoch, size, resize, optimizer, config, updated)


def load_encoder(path: str | Path, device: torch.device) -> tuple[ResNet, Weights]:
    """The query encoder on ``device``, channels_last, in evaluation mode. Heads that the file lacks give zeros."""
    weights = load_weights(path)
    return build_encoder(weights).to(device, memory_format=torch.channels_last).eval(), weights


def build_encoder(weights: Weights) -> ResNet:
    """On the CPU, in training mode."""
    encoder = _empty(weights.model, weights.num_classes)
    state = weights.encoder()
    missing = {name: torch.zeros(t.shape) for name, t in encoder.state_dict().items() if name not in state}
    encoder.load_state_dict({name: t.clone() for name, t in state.items()} | missing, assign=True)
    return encoder


def initialise(model: torch.nn.Module, path: str | Path) -> None:
    """Initialise ``model`` from a file of any known format: its query encoder must fit; the rest if it does.

    A key encoder that the file lacks (cross-entropy) starts as a copy of the query encoder, as always. A head that it
    lacks (torchvision's have no projection) keeps its fresh weights.
    """
    own, weights = model.state_dict(), load_weights(path).state
    query = {name: w for name, w in weights.items() if name.startswith(Q)}
    for name, w in own.items():
        if name.startswith(tuple(Q + head for head in HEADS)):
            query.setdefault(name, w)
    for name, w in query.items():
        weights.setdefault(name.replace(Q, K, 1), w)
    check_fits({name: w for name, w in own.items() if name.startswith(Q)}, query, path)
    fitting = {name: w for name, w in weights.items() if name in own and own[name].shape == w.shape}
    model.load_state_dict(own | fitting)


def check_fits(own: dict[str, torch.Tensor], weights: dict[str, torch.Tensor], path: str | Path) -> None:
    """Raise a UserError that names the first tensor of another shape."""
    for name in own | weights:
        have, want = (tuple(d[name].shape) if name in d else None for d in (weights, own))
        if have != want:
            raise UserError(
                f"the checkpoint {path} is of another architecture: {name} is {_shape(have)} there and "
                f"{_shape(want)} in this run; set --arch, --width, --stem, --num-classes, --embed-dim as it was trained"
            )


def digest(tensors: dict[str, Tensor]) -> str:
    """sha256 over names and contents."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(name.encode() + b"\0")
        sha.update(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def _empty(model: ModelConfig, num_classes: int | None) -> ResNet:
    """Without memory: on the meta device."""
    with torch.device("meta"):
        return ResNet(model.arch, num_classes or 1, model.embed_dim, model.width, model.stem, model.bn_group)


def _is_safetensors(path: Path) -> bool:
    """A header's length in 8 bytes, then its JSON."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(9)
    return path.suffix == ".safetensors" or (start[8:] == b"{" and int.from_bytes(start[:8], "little") < 100 << 20)


def _read_safetensors(path: Path) -> dict[str, Any]:
    """-> {"state_dict", "mopro_fast", "epoch"}: as :func:`checkpoint.read` gives for torch.save's format."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {_line(error)}; is it a whole file?") from None
    if about.get("sha256", digest(tensors)) != digest(tensors):
        raise UserError(f"{path} is damaged: its tensors do not match their checksum; copy it again")
    epoch = about.get("epoch", "")
    return {"state_dict": tensors, "mopro_fast": about, "epoch": int(epoch) if epoch.isdigit() else None}


def _tensors(found: Any, path: Path) -> tuple[dict[str, Tensor], str]:
    """-> the state dict and what kind of file it comes from, judged by its names."""
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__}, not a checkpoint")
    ours = isinstance(found.get("model"), dict) and "config" in found
    tensors = found["model"] if ours else found.get("state_dict", found)
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise UserError(f"{path} is no checkpoint of this package, of the official code or of torchvision")
    tensors = {str(name).removeprefix("module."): t for name, t in tensors.items()}
    if ours:
        return tensors, "mopro_fast"
    if not any(name.startswith(Q) for name in tensors):
        return tensors, "torchvision"
    return tensors, "safetensors" if _is_safetensors(path) else "official"


def _own_names(tensors: dict[str, Tensor], transposed_queue: bool) -> dict[str, Tensor]:
    state = {}
    foreign = not any(name.startswith(Q) for name in tensors)
    for name, t in tensors.items():
        if t.layout != torch.strided or t.is_meta:
            raise ValueError(f"{name} is not a dense tensor")
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


def _architecture(state: dict[str, Tensor], path: Path) -> tuple[ModelConfig, int | None]:
    """The model whose query encoder has exactly these names and shapes."""
    encoder = {name.removeprefix(Q): t for name, t in state.items() if name.startswith(Q)}
    first, base = encoder.get("conv1.weight"), encoder.get("layer1.0.conv1.weight")
    if first is None or base is None or first.dim() != 4:
        raise UserError(f"{path} holds no ResNet: it has no conv1.weight and layer1.0.conv1.weight")
    depths = tuple(len({n.split(".")[1] for n in encoder if n.startswith(f"layer{i}.")}) for i in (1, 2, 3, 4))
    block = Bottleneck if "layer1.0.conv3.weight" in encoder else BasicBlock
    arch = next((name for name, layers in LAYERS.items() if layers == (block, depths)), None)
    if arch is None:
        known = ", ".join(LAYERS)
        raise UserError(f"{path} holds a ResNet of {depths} {block.__name__}s, none of {known}")
    width = base.shape[0] / 64
    heads = {name: encoder.get(name) for name in ("classifier.weight", "fc2.weight")}
    num_classes, dim = (t if t is None else t.shape[0] for t in heads.values())
    model = ModelConfig(
        arch=arch,
        width=int(width) if width == int(width) else width,
        stem="small" if first.shape[-1] == 3 else "imagenet",
        **({} if dim is None else {"embed_dim": dim}),
    )
    expected = _empty(model, num_classes).state_dict()
    absent = {name for name in expected if name.startswith(HEADS) and name not in encoder}
    expected = {name: t for name, t in expected.items() if name not in absent}
    _require_shapes(encoder, expected, f"{path} is not this package's {arch}")
    return model, num_classes


def _require_rest(state: dict[str, Tensor], model: ModelConfig, num_classes: int | None, path: Path) -> None:
    """The other tensors fit the query encoder; all numbers are finite."""
    rest = {name: t for name, t in state.items() if not name.startswith(Q)}
    expected = {}
    if any(name.startswith(K) for name in rest):
        expected |= {name.replace(Q, K, 1): t for name, t in state.items() if name.startswith(Q)}
    if "queue" in rest:
        expected |= {"queue": rest["queue"].new_empty(len(rest["queue"]), model.embed_dim), "queue_ptr": torch.zeros(1)}
    if "prototypes" in rest:
        expected["prototypes"] = torch.empty(num_classes or 0, model.embed_dim)
    _require_shapes(rest, expected, f"{path} does not fit together")
    if "queue" in rest and not 0 <= int(rest["queue_ptr"]) < len(rest["queue"]):
        raise UserError(f"{path}: queue_ptr {int(rest['queue_ptr'])} points outside the queue: a damaged file")
    for name, t in state.items():
        if not bool(t.isfinite().all()):
            raise UserError(f"{path}: {name} is not finite everywhere: a diverged training, or a damaged file")


def _require_shapes(have: dict[str, Tensor], want: dict[str, Tensor], message: str) -> None:
    for name in want | have:
        found, expected = (tuple(d[name].shape) if name in d else None for d in (have, want))
        if found != expected:
            raise UserError(f"{message}: {name} is {_shape(found)}, expected {_shape(expected)}")


def _evaluation(config: dict | None, model: ModelConfig) -> tuple[int | None, int | None]:
    """-> image_size, eval_resize."""
    data = (config or {}).get("data", {})
    size = data.get("image_size", 224 if model.stem == "imagenet" else None)
    resize = data.get("eval_resize") or (None if size is None else round(size * 256 / 224))
    if size is not None and not 0 < size <= resize:
        raise ValueError(f"it says image_size {size} and eval_resize {resize}")
    return size, resize


def _optimizer(found: Any, state: dict[str, Tensor]) -> dict[str, Any] | None:
    """SGD's state for encoder_q, whose parameters come first; None where the file has none that fits.

    Parameters are numbered, or, before PyTorch 1.6, named by their addresses: their order in the groups counts.
    """
    counters = ("running_mean", "running_var", "num_batches_tracked")
    shapes = [t.shape for name, t in state.items() if name.startswith(Q) and not name.endswith(counters)]
    try:
        groups = found["param_groups"]
        keys = [key for group in groups for key in group["params"]][: len(shapes)]
        buffers = [found["state"].get(key, {}).get("momentum_buffer") for key in keys]
        fits = len(keys) == len(shapes) and all(
            b is None or b.shape == shape for b, shape in zip(buffers, shapes, strict=True)
        )
        group = {name: value for name, value in groups[0].items() if name != "params"}
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return None
    if not fits:
        return None
    slots = {i: {"momentum_buffer": b.float()} for i, b in enumerate(buffers) if b is not None}
    return {"state": slots, "param_groups": [group | {"params": list(range(len(keys)))}]}


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else "×".join(map(str, shape)) or "a scalar"


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0]
