"""The CUDA backend: hands raw pointers and the current stream to the compiled extension ``mopro_fast._C``.

Temporary copies may be freed as soon as a function returns: PyTorch reuses their memory in stream order. What a kernel
has written is marked as changed, so that autograd notices if a backward pass still wants the old values.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

try:
    from mopro_fast import _C
except ImportError:  # then backends.py never chooses this backend
    _C = None


def ema_update_(targets: list[Tensor], sources: list[Tensor], momentum: float, shadows: list[Tensor]) -> None:
    for (t, w), (s,) in _batches([targets, shadows], [sources]):
        _launch("ema_update", *_pointers(t, s, w), _numels(t), _dtype(s), _dtype(w), momentum)
    increment_version([*targets, *shadows])


def sgd_ema_update_(
    params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], targets: list[Tensor], lr: Tensor,
    momentum: float, weight_decay: float, nesterov: bool, ema_momentum: float,
    param_shadows: list[Tensor], target_shadows: list[Tensor],
) -> None:  # fmt: skip
    written = [params, buffers, targets, param_shadows, target_shadows]
    for (p, b, t, v, w), (g,) in _batches(written, [grads]):
        _launch(
            "sgd_ema_update", *_pointers(p, g, b, t, v, w), _numels(p), _dtype(g), _dtype(v), _dtype(w),
            lr.data_ptr(), momentum, weight_decay, nesterov, ema_momentum,
        )  # fmt: skip
    increment_version([x for tensors in written for x in tensors])


def prototype_update_(
    prototypes: Tensor, features: Tensor, labels: Tensor, kept: Tensor | None, momentum: float
) -> None:
    own = prototypes.contiguous()
    features, labels = features.contiguous(), labels.contiguous()
    kept = None if kept is None else kept.contiguous()
    _launch(
        "prototype_update", own.data_ptr(), features.data_ptr(), _dtype([features]), labels.data_ptr(),
        0 if kept is None else kept.data_ptr(), len(own), len(features), own.shape[1], momentum,
    )  # fmt: skip
    _copy_back([(prototypes, own)])
    increment_version([prototypes])


def queue_enqueue_(queue: Tensor, cursor: Tensor, keys: Tensor, shadow: Tensor | None = None) -> None:
    own, keys = queue.contiguous(), keys.contiguous()
    low = None if shadow is None else shadow.contiguous()
    _launch(
        "queue_enqueue", own.data_ptr(), _dtype([own]), 0 if low is None else low.data_ptr(),
        None if low is None else _dtype([low]), cursor.data_ptr(), keys.data_ptr(), _dtype([keys]),
        len(own), len(keys), own.shape[1],
    )  # fmt: skip
    _copy_back([(queue, own)] if low is None else [(queue, own), (shadow, low)])
    increment_version([queue, cursor] if shadow is None else [queue, cursor, shadow])


def _launch(name: str, *args) -> None:
    getattr(_C, name)(*args, torch.cuda.current_stream().cuda_stream)  # of the tensors' device: see backends.py


def _batches(
    written: list[list[Tensor]], read: list[list[Tensor]]
) -> Iterator[tuple[list[list[Tensor]], list[list[Tensor]]]]:
    """The lists, cut so that each has one dtype per batch, as the kernels take them, and each row of tensors one
    dense layout, as they walk memory in order. What had to be copied for that is copied back if it is written.
    A list may be empty, which means that there is no such tensor.
    """
    lists = [*written, *read]
    present = [i for i, tensors in enumerate(lists) if tensors]
    batches = [lists]
    if any(len({t.dtype for t in lists[i]}) > 1 for i in present):
        groups: dict[tuple, list[int]] = {}
        for row in range(len(written[0])):
            groups.setdefault(tuple(lists[i][row].dtype for i in present), []).append(row)
        batches = [[[x[row] for row in rows if x] for x in lists] for rows in groups.values()]
    for batch in batches:
        copies = []
        strides = [[t.stride() for t in batch[i]] for i in present]
        if any(other != strides[0] for other in strides[1:]) or not all(map(_dense, batch[present[0]])):
            copies = _lay_out(batch, present)
        yield batch[: len(written)], batch[len(written) :]
        _copy_back([(original, copy) for i, original, copy in copies if i < len(written)])


def _lay_out(batch: list[list[Tensor]], present: list[int]) -> list[tuple[int, Tensor, Tensor]]:
    """Replace tensors so that each row of the batch has one dense layout; -> (list, original, copy) of those."""
    copies = []
    for i in present:
        batch[i] = list(batch[i])
    for row in range(len(batch[present[0]])):
        first = batch[present[0]][row]
        wanted = first if _dense(first) else torch.empty_like(first)
        for i in present:
            original = batch[i][row]
            if _layout(original) != _layout(wanted):
                batch[i][row] = original.new_empty_strided(original.shape, wanted.stride()).copy_(original)
                copies.append((i, original, batch[i][row]))
    return copies


def _layout(x: Tensor) -> list[int]:
    """Its strides but those of single entries, which 1×1 convolutions have in every variety."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size != 1]


def _dense(x: Tensor) -> bool:
    """Does it fill one stretch of memory, in any order of dimensions?"""
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return True
    return torch.empty_like(x).stride() == x.stride()  # which keeps the strides of dense tensors only


def _copy_back(copies: list[tuple[Tensor, Tensor]]) -> None:
    for original, copy in copies:
        if copy.data_ptr() != original.data_ptr():
            original.copy_(copy)


def _pointers(*lists: list[Tensor]) -> list[list[int]]:
    return [[t.data_ptr() for t in tensors] for tensors in lists]


def _numels(tensors: list[Tensor]) -> list[int]:
    return [t.numel() for t in tensors]


def _dtype(tensors: list[Tensor]) -> str | None:
    return str(tensors[0].dtype).removeprefix("torch.") if tensors else None
