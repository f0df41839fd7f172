"""Argument checks shared by the ops: each raises a ``ValueError`` that names the argument and what was given."""

import torch
from torch import Tensor

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


def unit_interval(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")


def positive(name: str, value: float) -> None:
    if not 0.0 < value < float("inf"):
        raise ValueError(f"{name} must be a finite number above 0, got {value}")


def embeddings(q: Tensor, bank_name: str, bank: Tensor) -> tuple[int, int]:
    """Check q [N, D] against a bank (queue or prototypes) [rows, D]; -> (N, D)."""
    tensor("q", q, ("N", "D"), FLOATS, device_of("q", q))
    n, d = q.shape
    tensor(bank_name, bank, ("Q" if bank_name == "queue" else "C", d), FLOATS, q.device)
    return n, d


def labels_and_kept(labels: Tensor, kept: Tensor | None, n: int, device: torch.device) -> None:
    tensor("labels", labels, (n,), (torch.int64,), device)
    if kept is not None:
        tensor("kept", kept, (n,), (torch.bool,), device)


def device_of(name: str, value: Tensor) -> torch.device:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")
    return value.device
