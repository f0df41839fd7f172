"""Weights from any file that holds a ResNet of this package: what model they are of, and whether they fit.

A file can hold wrong numbers, but nothing in it is ever executed. Formats: formats.py.
"""

import contextlib
import json
import os
from pathlib import Path

import torch
from torch import Tensor

from mopro_fast.checkpoints import capro, formats
from mopro_fast.checkpoints import state as checkpoint
from mopro_fast.checkpoints.fields import check_classes, is_count, require, settings
from mopro_fast.checkpoints.formats import HEADS, K, Q, Weights
from mopro_fast.config import ModelConfig
from mopro_fast.data.begun import begun
from mopro_fast.distributed import say
from mopro_fast.errors import UserError
from mopro_fast.models.calibration import BIAS, CALIBRATION, LOG_SCALE
from mopro_fast.models.resnet import LAYERS, BasicBlock, Bottleneck, ResNet

_LARGEST = 1 << 14  # px


def load_weights(path: str | Path) -> Weights:
    """Read a file of any known kind, or the newest checkpoint of a run's folder.

    Raises a UserError if it is damaged or holds something else.
    """
    path = Path(path)
    if not os.path.isdir(path):
        return _load(path)
    saved = checkpoint.all_of(path / "checkpoints")
    if not saved:
        raise UserError(f"{path} is no run's folder: it has no checkpoints/step_*.pt")
    try:
        return _load(saved[-1])
    except UserError as error:
        raise UserError(f"{error}; {_instead(saved[:-1])}") from None


def _instead(saved: list[Path]) -> str:
    for path in reversed(saved):
        with contextlib.suppress(UserError):
            return f"{_load(path).path} can be read: give it instead"
    return "no older checkpoint of the run can be read"


def _load(path: Path) -> Weights:
    found, tensors, kind, note = formats.read(path)
    about = found if kind == "mopro_fast" else found.get("mopro_fast", {})  # of files that this package exported
    require(isinstance(about, dict), path, "mopro_fast", about, "what `mopro-fast export` writes")
    theirs = kind in ("official", "capro")
    updated = about.get("keys_updated", not theirs)
    updated = str(updated) if isinstance(updated, bool) else updated
    require(isinstance(updated, str) and updated in ("True", "False"), path, "keys_updated", updated, "True or False")
    try:
        config, classes = about.get("config"), about.get("classes")
        if kind != "mopro_fast":
            config = None if config is None else settings(config, path)
            classes = None if classes is None else json.loads(classes)
        state = formats.own_names(tensors, transposed_queue=theirs)
        model, num_classes = _architecture(state, path)
        _require_rest(state, model, num_classes, path)
        size, resize = _evaluation(config, model)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, RecursionError) as error:
        why = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is no checkpoint that this package knows: {why}") from None
    check_classes(classes, num_classes, path)
    epoch = found.get("epoch")
    epoch = epoch if is_count(epoch) else None
    optimizer = formats.optimizer_of(found.get("optimizer"), state, kind)
    if note:
        say(f"note: {path}: {note}")
    if classes is None and kind == "mopro_fast" and path.parent.name == "checkpoints":  # of versions before
        noted = begun(path.parent.parent, found.get("data_digest"), num_classes or 0)
        classes = noted and noted.classes
    return Weights(
        path, kind, state, model, num_classes, epoch, size, resize, optimizer, config, updated == "True", classes, note
    )


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


def initialise(model: torch.nn.Module, path: str | Path, classes: list[str] | None = None) -> None:
    """Initialise ``model`` from a file of any known format: its query encoder must fit; the rest if it does.

    A key encoder that the file lacks (cross-entropy) starts as a copy of the query encoder, as always. A head that it
    lacks (torchvision's have no projection) keeps its fresh weights. CAPro's classifier takes no bias. classes: the
    names of the model's classes; what the file says of others, its classifiers and prototypes, is not taken.
    """
    own, loaded = model.state_dict(), load_weights(path)
    weights = loaded.state
    if None not in (classes, loaded.classes) and classes != loaded.classes:
        say(f"{path} has other classes: its classifier and prototypes are not taken")
        of_classes = (f"{Q}classifier.", f"{K}classifier.", "prototypes", CALIBRATION, capro.AUXILIARY)
        weights = {name: w for name, w in weights.items() if not name.startswith(of_classes)}
    query = {name: w for name, w in weights.items() if name.startswith(Q)}
    for name, w in own.items():
        if name.startswith(tuple(Q + head for head in HEADS)):
            query.setdefault(name, w)
    for name, w in query.items():
        weights.setdefault(name.replace(Q, K, 1), w)
    check_fits({name: w for name, w in own.items() if name.startswith(Q)}, query, path)
    if capro.AUXILIARY in own:
        if weights.get(capro.BIAS, torch.zeros(1)).any():
            say(f"note: {path}: its classifier's bias is not taken: CAPro's classifier has none")
        weights[capro.BIAS] = torch.zeros_like(own[capro.BIAS])
        if not model.has_prototypes():
            weights.pop("prototypes", None)
    fitting = {name: w for name, w in weights.items() if name in own and own[name].shape == w.shape}
    if "queue" not in fitting:
        fitting.pop("queue_ptr", None)
        if "queue" in own and "queue" in weights:
            theirs, ours = len(weights["queue"]), len(own["queue"])
            say(f"note: {path}: its queue of {theirs} keys is not taken, this one has {ours}")
    model.load_state_dict(own | fitting)


def check_fits(own: dict[str, Tensor], weights: dict[str, Tensor], path: str | Path) -> None:
    """Raise a UserError that names the first tensor of another shape."""
    ours = " there and {} in this run; set --arch, --width, --stem, --num-classes, --embed-dim as it was trained"
    _require_shapes(weights, own, f"the checkpoint {path} is of another architecture", ours)


def _empty(model: ModelConfig, num_classes: int | None) -> ResNet:
    """Without memory: on the meta device."""
    with torch.device("meta"):
        return ResNet(model.arch, num_classes or 1, model.embed_dim, model.width, model.stem, model.bn_group)


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
    _require_shapes(encoder, expected, f"{path} is not this package's {arch}", ", expected {}: save a plain ResNet")
    return model, num_classes


def _require_rest(state: dict[str, Tensor], model: ModelConfig, num_classes: int | None, path: Path) -> None:
    """The other tensors fit the query encoder; all numbers are finite."""
    rest = {name: t for name, t in state.items() if not name.startswith(Q)}
    expected = {}
    of_capro = capro.AUXILIARY in rest
    if any(name.startswith(K) for name in rest):
        query = {name.removeprefix(Q): t for name, t in state.items() if name.startswith(Q)}
        expected |= {K + name: t for name, t in query.items() if not (of_capro and name.startswith(HEADS))}
    if of_capro:
        features = _empty(model, num_classes).feature_dim
        layers = {"0": (2048, model.embed_dim), "2": (features, 2048)}
        expected |= {f"{capro.RECONSTRUCTION}{i}.weight": torch.empty(shape) for i, shape in layers.items()}
        expected |= {f"{capro.RECONSTRUCTION}{i}.bias": torch.empty(shape[0]) for i, shape in layers.items()}
        expected[capro.AUXILIARY] = torch.empty(num_classes or 0, model.embed_dim)
    if "queue" in rest:
        expected |= {"queue": rest["queue"].new_empty(len(rest["queue"]), model.embed_dim), "queue_ptr": torch.zeros(1)}
    if "prototypes" in rest:
        expected["prototypes"] = torch.empty(num_classes or 0, model.embed_dim)
    if LOG_SCALE in rest:
        expected |= {LOG_SCALE: torch.empty(2), BIAS: torch.empty(2, num_classes or 0)}
    _require_shapes(rest, expected, f"{path} does not fit together")
    if "queue" in rest and not 0 <= int(rest["queue_ptr"]) < len(rest["queue"]):
        raise UserError(f"{path}: queue_ptr {int(rest['queue_ptr'])} points outside the queue: a damaged file")
    for name, t in state.items():
        if not bool(t.isfinite().all()):
            raise UserError(f"{path}: {name} is not finite everywhere: a diverged training, or a damaged file")


def _require_shapes(
    have: dict[str, Tensor], want: dict[str, Tensor], message: str, expected: str = ", expected {}"
) -> None:
    for name in want | have:
        found, wanted = (_shape(d.get(name)) for d in (have, want))
        if found != wanted:
            raise UserError(f"{message}: {name} is {found}{expected.format(wanted)}")


def _evaluation(config: dict | None, model: ModelConfig) -> tuple[int | None, int | None]:
    """-> image_size, eval_resize."""
    data = (config or {}).get("data", {})
    size = data.get("image_size", 224 if model.stem == "imagenet" else None)
    resize = data.get("eval_resize") or (None if size is None else round(size * 256 / 224))
    if size is not None and not 0 < size <= resize <= _LARGEST:
        raise ValueError(f"it says image_size {size} and eval_resize {resize}")
    return size, resize


def _shape(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else "×".join(map(str, tensor.shape)) or "a scalar"
