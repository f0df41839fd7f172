"""The ring buffer of past keys that serve as negatives (MoCo section 3.2)."""

import torch
from torch import Tensor

from mopro_fast.ops import backends, checks

backends.define(
    "queue_enqueue_(Tensor(a!) queue, Tensor(b!) cursor, Tensor keys, Tensor(c!)? shadow=None) -> ()",
    fake=lambda queue, cursor, keys, shadow=None: None,
)


def queue_enqueue_(queue: Tensor, cursor: Tensor, keys: Tensor, shadow: Tensor | None = None) -> None:
    """Write ``keys`` over the oldest rows of ``queue``, wrapping round at its end, and move ``cursor`` on.

    queue:  [Q, D], float32 or lower.
    cursor: int64 [1] on the same device, the row written next; stays on the device, no synchronisation.
    keys:   [M, D], any M ≤ Q (Q need not be a multiple of M).
    shadow: optional [Q, D], bfloat16 or float16: a low-precision copy of the queue that gets the same rows.

    Raises ValueError for a wrong shape, dtype or device, or more keys than the queue holds.
    """
    device = checks.device_of("queue", queue)
    checks.tensor("queue", queue, ("Q", "D"), checks.FLOATS, device)
    checks.tensor("cursor", cursor, (1,), (torch.int64,), device)
    checks.tensor("keys", keys, ("M", queue.shape[1]), checks.FLOATS, device)
    if shadow is not None:
        checks.tensor("shadow", shadow, tuple(queue.shape), checks.LOW, device)
    if len(keys) > len(queue):
        raise ValueError(f"keys must have at most Q={len(queue)} rows, got {len(keys)}")
    if len(keys) == 0:
        return
    with torch.no_grad():
        torch.ops.mopro_fast.queue_enqueue_(queue, cursor, keys, shadow)
