"""The momentum prototypes (MoPro equation 8)."""

import torch
from torch import Tensor

from mopro_fast.ops import backends, checks

backends.define(
    "prototype_update_(Tensor(a!) prototypes, Tensor features, Tensor labels, Tensor? kept, float momentum) -> ()",
    fake=lambda prototypes, features, labels, kept, momentum: None,
)


def prototype_update_(
    prototypes: Tensor, features: Tensor, labels: Tensor, kept: Tensor | None, momentum: float
) -> None:
    """For every kept row in order ``c_y ← momentum·c_y + (1−momentum)·q``; then all prototypes to unit length.

    The result is that of the sequential loop, not of a scatter-add: later rows of a class weigh more.
    A prototype that is zero and gets no row stays zero.

    prototypes: float32 [C, D], changed in place.
    features:   [M, D], the rows of all ranks in gather order.
    labels:     int64 [M]; rows whose label is outside [0, C) are left out.
    kept:       bool [M], or None for all rows.
    momentum:   in [0, 1].

    Raises ValueError for a wrong shape, dtype, device or momentum.
    """
    device = checks.device_of("prototypes", prototypes)
    checks.tensor("prototypes", prototypes, ("C", "D"), (torch.float32,), device)
    checks.tensor("features", features, ("M", prototypes.shape[1]), checks.FLOATS, device)
    checks.labels_and_kept(labels, kept, len(features), device)
    checks.unit_interval("momentum", momentum)
    with torch.no_grad():
        torch.ops.mopro_fast.prototype_update_(prototypes, features, labels, kept, momentum)
