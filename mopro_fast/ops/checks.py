"""Argument checks shared by the ops: each raises a ``ValueError`` that names the argument and what was given."""

import numbers

import torch
from torch import Tensor

LOW = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensor(
    name: str, value: Tensor, shape: tuple[int | str, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    """Refuse ``value`` unless it is a tensor of this shape (a letter is any size), dtype and device."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")
    fits = value.dim() == len(shape) and all(
        isinstance(want, str) or have == want for want, have in zip(shape, value.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(str(s) for s in shape)
        raise ValueError(f"{name} must have shape [{wanted}], got {list(value.shape)}")
    if value.dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{name} must be {wanted}, got {str(value.dtype).removeprefix('torch.')}")
    if value.device != device:
        raise ValueError(f"{name} must be on {device}, got {value.device}")


def same_length(lists: dict[str, list]) -> None:
    """Refuse what is no list, and lists of which one is not as long as the first."""
    for name, values in lists.items():
        if not isinstance(values, list | tuple):
            raise ValueError(f"{name} must be a list of tensors, got {type(values).__name__}")
    (first, wanted), *others = lists.items()
    for name, values in others:
        if len(values) != len(wanted):
            one = first.removesuffix("s")
            raise ValueError(f"{name} must hold {len(wanted)} tensors, one per {one}, got {len(values)}")


def tensor_lists(lists: dict[str, tuple[list[Tensor], tuple[torch.dtype, ...]]]) -> torch.device | None:
    """Refuse lists (name: tensors, dtypes) unless they agree in length and, tensor by tensor, in shape and device.

    Returns the device; None if the lists are empty.
    """
    same_length({name: tensors for name, (tensors, _) in lists.items()})
    first, (leaders, _) = next(iter(lists.items()))
    if not leaders:
        return None
    device = device_of(f"{first}[0]", leaders[0])
    shapes = [leader.shape if isinstance(leader, Tensor) else () for leader in leaders]
    for name, (tensors, dtypes) in lists.items():
        fits = all(isinstance(t, Tensor) and t.device == device and t.dtype in dtypes for t in tensors)
        if not fits or [t.shape for t in tensors] != shapes:  # one by one takes five times as long
            for i, t in enumerate(tensors):
                tensor(f"{name}[{i}]", t, tuple(shapes[i]), dtypes, device)
    return device


def number(name: str, value: float) -> None:
    """Refuse what is no plain number: a tensor would get no gradient, and reading it would wait for the device."""
    if isinstance(value, Tensor) or not isinstance(value, numbers.Real | torch.SymFloat | torch.SymInt):
        raise ValueError(f"{name} must be a plain number, got {type(value).__name__}")


def unit_interval(name: str, value: float) -> None:
    number(name, value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")


def positive(name: str, value: float) -> None:
    number(name, value)
    if not 0.0 < value < float("inf"):
        raise ValueError(f"{name} must be a finite number above 0, got {value}")


def embeddings(q: Tensor, bank_name: str, bank: Tensor) -> tuple[int, int]:
    """Check q [N, D] against a bank (queue or prototypes) [rows, D]; -> (N, D)."""
    tensor("q", q, ("N", "D"), FLOATS, device_of("q", q))
    n, d = q.shape
    tensor(bank_name, bank, ("Q" if bank_name == "queue" else "C", d), FLOATS, q.device)
    if d == 0:
        raise ValueError("q must have at least one column, got shape [N, 0]")
    if bank_name == "prototypes":
        some_classes(bank)
    return n, d


def some_classes(prototypes: Tensor) -> None:
    if len(prototypes) == 0:
        raise ValueError("prototypes must have at least one row, got 0")


def labels_and_kept(labels: Tensor, kept: Tensor | None, n: int, device: torch.device) -> None:
    tensor("labels", labels, (n,), (torch.int64,), device)
    if kept is not None:
        tensor("kept", kept, (n,), (torch.bool,), device)


def device_of(name: str, value: Tensor) -> torch.device:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")
    return value.device
