"""The format of CAPro's official code (yuleiqin/capro), single-label, into this package's names and out of them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mopro_fast.errors import UserError

AUXILIARY, RECONSTRUCTION = "auxiliary.weight", "reconstruction."
BIAS = "encoder_q.classifier.bias"  # zeros: CAPro's classifier has none
_HEADS = {  # theirs: ours, in the order in which their model registers them; the parts of relation are never used
    "projection.0.weight": "encoder_q.fc1.weight",
    "projection.0.bias": "encoder_q.fc1.bias",
    "projection.2.weight": "encoder_q.fc2.weight",
    "projection.2.bias": "encoder_q.fc2.bias",
    "projection_back.0.weight": "reconstruction.0.weight",
    "projection_back.0.bias": "reconstruction.0.bias",
    "projection_back.2.weight": "reconstruction.2.weight",
    "projection_back.2.bias": "reconstruction.2.bias",
    "relation.fc1.weight": None,
    "relation.fc2.weight": None,
    "classifier.fc.weight": "encoder_q.classifier.weight",
    "classifier_projection.fc.weight": AUXILIARY,
}
_UNUSED = ("relation.", "prototypes_")
_MARKS = ("projection.0.weight", "classifier.fc.weight", "classifier_projection.fc.weight")
_MULTI_LABEL = ("projection_class.", "classifier_projection.0.")
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_RELATION = 128  # hidden units


def is_theirs(tensors: dict[str, Any], path: Path) -> bool:
    """Raises a UserError for a multi-label model."""
    if any(name.startswith(_MULTI_LABEL) for name in tensors):
        raise UserError(
            f"{path} is a multi-label checkpoint of CAPro (NUS-WIDE), which is not supported yet: give a single-label "
            "one (WebVision, Google-500)"
        )
    return any(name in tensors for name in _MARKS)


def own_names(tensors: dict[str, Any]) -> dict[str, Any]:
    """The query encoder as a whole ResNet: its classifier gets a bias of zeros. The queue stays as it is."""
    heads = {ours: tensors[theirs] for theirs, ours in _HEADS.items() if ours and theirs in tensors}
    rest = {n: t for n, t in tensors.items() if n not in _HEADS and not n.startswith(_UNUSED)}
    weight = heads.get("encoder_q.classifier.weight")
    if isinstance(weight, Tensor) and weight.dim():
        heads[BIAS] = torch.zeros(len(weight))
    trunk = {n: t for n, t in rest.items() if n.startswith("encoder_q.")}
    names = ("classifier.weight", "classifier.bias", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    ours = {f"encoder_q.{n}": heads.pop(f"encoder_q.{n}") for n in names if f"encoder_q.{n}" in heads}
    return trunk | ours | rest | heads


def trained(state: dict[str, Tensor]) -> list[str]:
    """The names of the parameters that the optimizer has, in its order; state by this package's names."""
    names = [n for n in state if n.startswith("encoder_q.") and not n.endswith(_STATISTICS)]
    if AUXILIARY in state:
        names = [n for n in names if n != BIAS]
        names += [n for n in state if n.startswith(RECONSTRUCTION)] + [AUXILIARY]
    return names


def _layouts(state: dict[str, Tensor]) -> dict[str, list[str | None]]:
    """What the parameters of their optimizer are called here, None for those that never have a momentum.

    all: a run that trains the encoder from the start; unfrozen: from a later epoch on; frozen: the heads alone.
    """
    heads = list(_HEADS.values())
    trunk = [n for n in trained(state) if n.startswith("encoder_q.") and n not in heads]
    return {"all": trunk + [None] * len(trunk) + heads, "unfrozen": trunk + heads, "frozen": heads}


def own_optimizer(found: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Any]:
    """Their optimizer's state in the order of :func:`trained`. Raises a KeyError and the like for anything else."""
    keys = [key for group in found["param_groups"] for key in group["params"]]
    names = {len(names): names for names in _layouts(state).values()}[len(keys)]
    slots = {name: found["state"][key] for name, key in zip(names, keys, strict=True) if name and key in found["state"]}
    order = trained(state)
    return {
        "state": {i: slots[name] for i, name in enumerate(order) if name in slots},
        "param_groups": [found["param_groups"][0] | {"params": list(range(len(order)))}],
    }


def their_optimizer(own: dict[str, Any], state: dict[str, Tensor], unfreeze_epoch: int | str) -> dict[str, Any]:
    """As their train.py builds it for a run with this unfreeze_epoch."""
    slots = dict(zip(trained(state), (own["state"].get(i) for i in range(len(trained(state)))), strict=True))
    layouts = _layouts(state)
    moved = any(slots[name] for name in layouts["unfrozen"] if name and name not in _HEADS.values())
    names = layouts["all" if unfreeze_epoch == 0 else "unfrozen" if moved else "frozen"]
    group = own["param_groups"][0]
    group = group | {"lr": float(group["lr"]), "params": list(range(len(names)))}
    return {"state": {i: slots[n] for i, n in enumerate(names) if n and slots[n]}, "param_groups": [group]}


def their_names(state: dict[str, Tensor], temperature: float) -> dict[str, Tensor]:
    """The state dict of their model; what it has beside ours is neutral. Heads that ours lacks are left out."""
    found = {n: t for n, t in state.items() if n.startswith(("encoder_q.", "encoder_k.")) and not _is_head(n)}
    found |= {theirs: state[ours] for theirs, ours in _HEADS.items() if ours in state}
    if "queue" in state:
        found |= {"queue": state["queue"].T.contiguous(), "queue_ptr": state["queue_ptr"]}
    if "prototypes" in state:
        found["prototypes"] = state["prototypes"]
        zeros = torch.zeros(len(state["prototypes"]))
        found |= {"prototypes_visited": zeros, "prototypes_distance": zeros.clone()}
        found["prototypes_density"] = zeros + temperature
    if "encoder_q.fc2.weight" in state:
        dim = len(state["encoder_q.fc2.weight"])
        found |= {"relation.fc1.weight": torch.zeros(_RELATION, 2 * dim)}
        found |= {"relation.fc2.weight": torch.zeros(1, _RELATION)}
    return {f"module.{name}": t for name, t in found.items()}


def lacks(state: dict[str, Tensor]) -> list[str]:
    """What of their model is not there, by their names."""
    parts = {theirs.partition(".")[0]: ours for theirs, ours in _HEADS.items() if ours}
    parts |= {"encoder_k": "encoder_k.conv1.weight", "queue": "queue", "prototypes": "prototypes"}
    return [theirs for theirs, ours in parts.items() if ours not in state]


def _is_head(name: str) -> bool:
    return name.partition(".")[2].startswith(("classifier.", "fc1.", "fc2."))
