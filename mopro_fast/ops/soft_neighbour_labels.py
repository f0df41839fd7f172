"""Labels by soft nearest neighbours: what a bank of labelled keys says of a row (PAWS, arXiv 2104.13963, section 3)."""

import torch
from torch import Tensor

from mopro_fast.ops import backends, checks

WEIGHTS = ("linear", "softmax")


def _fake(z: Tensor, keys: Tensor, values: Tensor, *_) -> Tensor:
    wide = torch.float64 if torch.float64 in (z.dtype, keys.dtype, values.dtype) else torch.float32
    return z.new_empty(len(z), values.shape[1], dtype=wide)


backends.define(
    "soft_neighbour_labels(Tensor z, Tensor keys, Tensor values, float temperature, str weights) -> Tensor", _fake
)


def soft_neighbour_labels(
    z: Tensor, keys: Tensor, values: Tensor, *, temperature: float = 0.1, weights: str = "softmax"
) -> Tensor:
    """The keys' values, averaged for each row of ``z`` with weights that grow with similarity.

    ``t_i = Σ_j u_ij·values_j / Σ_j u_ij``: a label distribution if every key's values are one. With softmax weights
    over a support set with known labels this is PAWS's soft nearest-neighbour classifier (Assran et al. 2021); over a
    queue with its past predictions, labels by agreement. :func:`collective_targets` is the same with values made from
    the keys (CAPro).

    z:           [N, D] embeddings; the weights are meant for rows of unit length, here and in keys.
    keys:        [Q, D], at least one.
    values:      [Q, C], a row per key: one-hot, smoothed or predicted labels, of a floating type.
    temperature: above 0; linear weights do not look at it.
    weights:     "softmax": u_ij = exp(z_i·k_j/temperature); "linear": u_ij = clamp(z_i·k_j, 0, 1) + 1e-7.

    Returns float32 [N, C] (float64 if an input is), in whose type all is computed. No gradient. NaN gives NaN: in z in
    its row, in keys in every row, in values in its column. Nothing of size N×Q is stored. Raises ValueError for a wrong
    argument.
    """
    check_neighbours(z, keys, temperature, weights)
    checks.tensor("values", values, (len(keys), "C"), checks.FLOATS, z.device)
    with torch.no_grad():
        return torch.ops.mopro_fast.soft_neighbour_labels(z, keys, values, temperature, weights)


def check_neighbours(z: Tensor, keys: Tensor, temperature: float, weights: str) -> None:
    checks.tensor("z", z, ("N", "D"), checks.FLOATS, checks.device_of("z", z))
    if z.shape[1] == 0:
        raise ValueError("z must have at least one column, got shape [N, 0]")
    checks.tensor("keys", keys, ("Q", z.shape[1]), checks.FLOATS, z.device)
    if len(keys) == 0:
        raise ValueError("keys must have at least one row, got 0")
    checks.positive("temperature", temperature)
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be {' or '.join(WEIGHTS)}, got {weights}")
