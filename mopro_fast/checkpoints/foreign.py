"""The ResNet in a file of others: which entry holds it, behind which prefix, and what beside it is not taken."""

from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor

from mopro_fast.errors import UserError

_WRAPPERS = ("state_dict", "model", "model_state_dict", "net")
_TRANSPARENT = {"module", "_orig_mod"}  # of DataParallel, torch.compile
_MARK = "layer1.0.conv1.weight"
_OF_RESNETS = ("conv", "bn", "layer", "fc", "classifier", "downsample", "stem", "attn", "norm")
_LEFT = "not taken: "
_DEEPEST = 8  # entries in entries
_NAMED = 6


def tensors(found: Any, path: Path) -> tuple[dict[str, Tensor], str]:
    """-> its tensors by the names of the official code or of torchvision (maybe with fc1 and fc2), and a note of what
    was not taken. Raises a UserError where it holds none, or several.
    """
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__}, not a checkpoint")
    holders, others = _holders(found, set())
    if not holders:
        entries = _some([ascii(name)[1:-1] if isinstance(name, str) else type(name).__name__ for name in found])
        raise UserError(
            f"{path} is no checkpoint of this package, of the official code or of torchvision: it holds no ResNet: "
            f"no tensor's name ends in {_MARK}; its entries are {entries or 'none'}"
        )
    if len(holders) > 1:
        raise UserError(f"{path} holds several ResNets, the entries {_some([*holders])}: save one of them alone")
    taken, note = _resnet(_plain_names(*holders.values(), path), path)
    left = [note.removeprefix(_LEFT)] * bool(note) + others
    return taken, f"{_LEFT}{', '.join(left)}" if left else ""


def _holders(found: dict, seen: set[int], depth: int = 0) -> tuple[dict[str, dict], list[str]]:
    """The dicts with a ResNet's names by where they are, and the places of those that are not taken.

    An entry that usually has the weights goes before others. seen: ids of the dicts that were looked into.
    """
    seen.add(id(found))
    if any(_prefix(name) is not None for name in found):
        return {"": found}, []
    inner: dict[str, dict] = {}
    left: list[str] = []
    for name, value in found.items():
        inside = isinstance(name, str) and isinstance(value, dict) and name != "optimizer"
        if inside and id(value) not in seen and depth < _DEEPEST:
            below, others = _holders(value, seen, depth + 1)
            inner |= {f"{name}.{place}".rstrip("."): holder for place, holder in below.items()}
            left += [f"{name}.{place}" for place in others]
    usual = {name: holder for name, holder in inner.items() if name.partition(".")[0] in _WRAPPERS}
    return usual or inner, left + [name for name in inner if usual and name not in usual]


def _prefix(name: Any) -> str | None:
    """What stands before a ResNet's names, if this is the one that tells."""
    before = name.removesuffix(_MARK) if isinstance(name, str) and name.endswith(_MARK) else None
    return before if before is not None and before[-1:] in ("", ".") else None


def _plain_names(state: dict, path: Path) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for name, value in state.items():
        short = ".".join(part for part in str(name).split(".") if part not in _TRANSPARENT)
        if short in plain:
            raise UserError(f"{path} holds two tensors {ascii(short)[1:-1]}, {name!a} is one: save one of them")
        plain[short] = value
    return plain


def _resnet(state: dict[str, Any], path: Path) -> tuple[dict[str, Tensor], str]:
    prefixes = [before for name in state if (before := _prefix(name)) is not None]
    query = [before for before in prefixes if "encoder_q" in before.split(".")]
    if len(query or prefixes) > 1:
        named = " and ".join(before or "no prefix" for before in (query or prefixes)[:_NAMED])
        raise UserError(f"{path} holds several ResNets, behind {named}: save one of them alone")
    (prefix,) = query or prefixes
    whole = prefix.removesuffix("encoder_q.")
    if whole == prefix or f"{prefix}fc.weight" in state or f"{prefix}fc.0.weight" in state:
        taken = _trunk(state, prefix)
    else:  # the official code's names
        taken = {name: name.removeprefix(whole) for name in state if name.startswith(whole)}
    for name in taken:
        if not isinstance(state[name], Tensor):
            raise UserError(
                f"{path} is no checkpoint of this package, of the official code or of torchvision: its entry "
                f"{ascii(name)[1:-1]} is of type {type(state[name]).__name__}, not a tensor"
            )
    left = [ascii(name)[1:-1] for name in state if name not in taken]
    of = Counter(name.partition(".")[0] for name in left)
    words = {name if of[top := name.partition(".")[0]] <= _NAMED else f"{top}.* ({of[top]})": None for name in left}
    return {short: state[name] for name, short in taken.items()}, f"{_LEFT}{_some([*words])}" if left else ""


def _trunk(state: dict[str, Any], prefix: str) -> dict[str, str]:
    """The names behind the prefix and what they are called here: fc is the classifier, of MoCo the projection."""
    taken = {name: name.removeprefix(prefix) for name in state if name.startswith(prefix)}
    if not prefix:  # heads of other trainings beside it
        taken = {name: short for name, short in taken.items() if short.startswith(_OF_RESNETS)}
    fc = {short: name for name, short in taken.items() if short.startswith("fc.")}
    moco = "encoder_q" in prefix.split(".")
    if moco or fc.keys() - {"fc.weight", "fc.bias"}:
        for name in fc.values():
            del taken[name]
        two = {f"fc.{i}.{kind}": f"fc{1 + i // 2}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
        if fc.keys() == two.keys() and _is_projection([state[fc[short]] for short in two]):
            taken |= {fc[short]: ours for short, ours in two.items()}
    elif prefix.endswith("backbone.") and not fc:  # mmpretrain's classifier lies beside its backbone
        head = {f"{prefix.removesuffix('backbone.')}head.fc.{kind}": f"fc.{kind}" for kind in ("weight", "bias")}
        if head.keys() <= state.keys():
            taken |= head
    return taken


def _is_projection(of: list[Any]) -> bool:
    """Two layers, F → 2048 → D, with their biases."""
    shapes = [tuple(t.shape) if isinstance(t, Tensor) else () for t in of]
    (first, bias, second, last), width = shapes, 2048
    return first[:1] == bias == (width,) and second[1:] == (width,) and second[:1] == last


def _some(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(name[:80] for name in names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
