"""What every field of a checkpoint of this package must be: a damaged or edited file can hold anything there."""

import dataclasses
import json
import math
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mopro_fast.config import TrainConfig, from_dict
from mopro_fast.errors import UserError
from mopro_fast.labels import UNSEEN

_SGD = {"lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "differentiable"}
"""Of a group of parameters, what decides its numbers; all but lr, which the schedule sets, is as in the config."""


class Damaged(UserError):
    """A file that an older checkpoint can take the place of."""


def require(holds: object, path: str | Path, name: str, value: Any, expected: str) -> None:
    if not holds:
        raise Damaged(f"{path} is damaged: its {name} is {said(value)}, expected {expected}")


def said(value: Any) -> str:
    """For messages. A file's own classes are named, never asked."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {'×'.join(map(str, value.shape)) or 'scalar'}"
    if value is None or type(value) in (bool, float) or (type(value) is int and abs(value) < 1 << 63):
        return repr(value)
    if type(value) in (list, dict):
        return f"a {type(value).__name__} of {len(value)}"
    return ascii(value[:40]) if type(value) is str else f"of type {type(value).__name__}"


def is_dense(t: Any) -> bool:
    """A tensor whose numbers all lie in the file."""
    if not isinstance(t, Tensor) or t.layout != torch.strided or t.is_meta or t.is_quantized or t.requires_grad:
        return False
    return t.numel() * t.element_size() <= t.untyped_storage().nbytes()


def is_finite(t: Any) -> bool:
    return is_dense(t) and not t.is_complex() and bool(t.isfinite().all())


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _list(each: Callable[[Any], bool], length: int | None = None) -> Callable[[Any], bool]:
    return lambda v: type(v) is list and length in (None, len(v)) and all(map(each, v))


def _text(value: Any) -> bool:
    return type(value) is str


def _integers(dtype: torch.dtype, dims: int, lowest: int = 0) -> Callable[[Any], bool]:
    return lambda t: is_dense(t) and t.dtype == dtype and t.dim() == dims and bool((t >= lowest).all())


def _rows(t: Any) -> bool:
    return _integers(torch.int64, 1)(t) and bool((t.diff() > 0).all())


_WHOLE = "a whole number of at least 0"
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "epoch": (is_count, _WHOLE),
    "step": (is_count, _WHOLE),
    "initial": (_text, "a text"),
    "data_digest": (_text, "a text"),
    "left_out": (_rows, "int64 rows in ascending order"),
    "held_out": (_rows, "int64 rows in ascending order"),
    "held_out_labels": (_integers(torch.int64, 1), "int64 labels"),
    "ranks": (lambda v: is_count(v) and v > 0, "a whole number of at least 1"),
    "log_bytes": (is_count, _WHOLE),
    "replaced": (_list(is_count, 2), "a list of two whole numbers of at least 0"),
    "counts": (_list(is_count, 2), "a list of two whole numbers of at least 0"),
    "assigned": (_integers(torch.int32, 1, UNSEEN), f"int32 labels from {UNSEEN} on"),
    "winners": (
        lambda t: _rows(t) or (_integers(torch.int64, 2)(t) and t.shape[1] == 2),
        "int64 [C, 2] of at least 0",
    ),
    "agreement": (_list(lambda v: _number(v) and 0 <= v <= 100), "a list of percentages"),
    "imported": (lambda v: type(v) is bool, "True or False"),
    "version": (_text, "a text"),
}


def check(found: dict[str, Any], path: str | Path) -> None:
    """Raise Damaged for the first field that is not what RunState says; ``config`` is settings already."""
    for name, (holds, expected) in _FIELDS.items():
        if name in found:
            require(holds(found[name]), path, name, found[name], expected)
    model, ranks = found["model"], found.get("ranks", 1)
    require(isinstance(model, dict) and all(map(_text, model)), path, "model", model, "tensors by their names")
    for name, t in model.items():
        require(is_finite(t), path, f"model.{name}", t, "a dense tensor of finite numbers")
    for name in ("queue", "prototypes"):
        t = model.get(name)
        require(t is None or (t.dim() == 2 and t.is_floating_point()), path, f"model.{name}", t, "a float32 matrix")
    _check_optimizer(found.get("optimizer"), path)
    sums = found.get("sums", {})
    require(isinstance(sums, dict) and all(map(_text, sums)), path, "sums", sums, "tensors by their metrics' names")
    for name, t in sums.items():
        holds = is_dense(t) and t.dtype == torch.float64 and t.shape == (ranks, 2)
        require(holds, path, f"sums.{name}", t, f"float64 {ranks}×2")
    rows, labels = found.get("held_out", ()), found.get("held_out_labels", ())
    if "held_out" in found and "held_out_labels" in found:
        require(len(rows) == len(labels), path, "held_out_labels", labels, f"{len(rows)}, as many as held_out")
    images = len(found.get("assigned", ()))
    for name in ("left_out", "held_out") if images else ():
        holds = not len(found.get(name, ())) or int(found[name][-1]) < images
        require(holds, path, name, found.get(name), f"rows below {images}, the length of assigned")
    head = model.get("encoder_q.classifier.weight")
    count = len(head) if head is not None and head.dim() else None
    check_classes(found.get("classes"), count, path)
    for name in ("assigned", "held_out_labels") if count else ():
        t = found.get(name, ())
        require(not len(t) or int(t.max()) < count, path, name, t, f"labels below {count}")


def check_classes(names: Any, count: int | None, path: str | Path) -> None:
    """names: of the classes, or None."""
    holds = names is None or (_list(_text)(names) and count in (None, len(names)))
    require(holds, path, "classes", names, f"{count or ''} names, one for each class")


def _check_optimizer(state: Any, path: str | Path) -> None:
    if state is None:
        return
    groups = state.get("param_groups") if isinstance(state, dict) else None
    holds = _list(lambda g: isinstance(g, dict) and _list(is_count)(g.get("params")))(groups)
    require(holds and isinstance(state.get("state"), dict), path, "optimizer", state, "the state of SGD")
    for i, group in enumerate(groups):
        for name in _SGD & group.keys():
            value = group[name].item() if is_dense(group[name]) and group[name].numel() == 1 else group[name]
            holds = type(value) in (bool, int, float) and math.isfinite(value)
            require(holds, path, f"optimizer.param_groups.{i}.{name}", value, "a number")
    for key, slot in state["state"].items():
        require(is_count(key), path, "optimizer.state", key, "momentum buffers by their numbers")
        holds = isinstance(slot, dict) and slot.keys() == {"momentum_buffer"}
        require(holds, path, f"optimizer.state.{key}", slot, "a momentum_buffer")
        buffer = slot["momentum_buffer"]
        holds = buffer is None or is_finite(buffer)
        require(holds, path, f"optimizer.state.{key}.momentum_buffer", buffer, "a dense tensor of finite numbers")


def check_optimizer_fits(saved: dict[str, Any] | None, own: torch.optim.Optimizer, path: str | Path) -> None:
    """Raise Damaged where ``own`` cannot take this state, or would train with other settings from then on."""
    require(saved is not None, path, "optimizer", saved, "the state of SGD")
    sizes, had = ([len(g["params"]) for g in groups] for groups in (own.param_groups, saved["param_groups"]))
    require(sizes == had, path, "optimizer.param_groups", str(had), f"groups of {sizes} parameters")
    params = [p for group in own.param_groups for p in group["params"]]
    numbers = [key for group in saved["param_groups"] for key in group["params"]]
    require(numbers == [*range(len(params))], path, "optimizer.param_groups", "others", "parameters in their order")
    for i, (group, theirs) in enumerate(zip(own.param_groups, saved["param_groups"], strict=True)):
        for name in ("lr", "momentum", "weight_decay"):
            require(name in theirs, path, f"optimizer.param_groups.{i}.{name}", None, "a number")
        for name in sorted(_SGD & group.keys() & theirs.keys() - {"lr"}):
            name_of = f"optimizer.param_groups.{i}.{name}"
            require(float(theirs[name]) == float(group[name]), path, name_of, theirs[name], said(group[name]))
    slots = {key: slot["momentum_buffer"] for key, slot in saved["state"].items()}
    for key, buffer in slots.items():
        require(key < len(params), path, "optimizer.state", key, f"a number below {len(params)}")
        holds = buffer is None or (buffer.shape == params[key].shape and buffer.is_floating_point())
        require(holds, path, f"optimizer.state.{key}.momentum_buffer", buffer, said(params[key]))


def check_model_fits(saved: dict[str, Tensor], own: dict[str, Tensor], path: str | Path) -> None:
    """Raise Damaged for the first tensor that ``own`` cannot take."""
    for name in own | saved:
        t, mine = saved.get(name), own.get(name)
        require(mine is not None, path, f"model.{name}", t, "no such tensor")
        holds = t is not None and t.shape == mine.shape and t.is_floating_point() == mine.is_floating_point()
        require(holds and t.dtype != torch.bool, path, f"model.{name}", t, said(mine))


def settings(text: Any, path: str | Path) -> dict[str, Any]:
    """The config of a checkpoint: JSON whose settings have the types that they are declared with."""
    try:
        config = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        config = text
    require(isinstance(text, str) and isinstance(config, dict), path, "config", config, "settings as JSON")
    try:
        from_dict(TrainConfig, _known(TrainConfig, config), "config")
    except UserError as error:
        raise Damaged(f"{path} is damaged: its {error}") from None
    return config


def _known(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """Without what ``cls`` does not have: other commands and newer versions have more."""
    hints = typing.get_type_hints(cls)
    return {
        name: _known(hints[name], value) if dataclasses.is_dataclass(hints[name]) and isinstance(value, dict) else value
        for name, value in values.items()
        if name in hints
    }
