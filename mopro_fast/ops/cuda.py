"""The CUDA backend: hands raw pointers and the current stream to the compiled extension ``mopro_fast._C``."""

import torch
from torch import Tensor

from mopro_fast import _C


def ema_update_(targets: list[Tensor], sources: list[Tensor], momentum: float, shadows: list[Tensor]) -> None:
    groups: dict[tuple, list[int]] = {}  # the kernel takes one source and one shadow type per call
    for i, source in enumerate(sources):
        groups.setdefault((source.dtype, shadows[i].dtype if shadows else None), []).append(i)
    for (source_dtype, shadow_dtype), rows in groups.items():
        t = [targets[i] for i in rows]
        # The kernel walks memory in order: target, source and shadow must share one dense layout.
        for x in t:
            _require_dense(x)
        s = [_laid_out_as(sources[i], targets[i]) for i in rows]
        for i in rows:
            if shadows and shadows[i].stride() != targets[i].stride():
                raise ValueError(f"shadows[{i}] must have the strides of its target, got {shadows[i].stride()}")
        with torch.cuda.device(t[0].device):
            _C.ema_update(
                [x.data_ptr() for x in t],
                [x.data_ptr() for x in s],
                [shadows[i].data_ptr() for i in rows] if shadows else [],
                [x.numel() for x in t],
                _name(source_dtype),
                _name(shadow_dtype) if shadows else None,
                momentum,
                torch.cuda.current_stream().cuda_stream,
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _require_dense(x: Tensor) -> None:
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    if x.numel() and extent != x.numel():
        raise ValueError(f"targets must be dense in memory, got shape {list(x.shape)} with strides {x.stride()}")


def _laid_out_as(source: Tensor, target: Tensor) -> Tensor:
    if source.stride() == target.stride():
        return source
    return torch.empty_like(target, dtype=source.dtype).copy_(source)
