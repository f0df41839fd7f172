"""Collective bootstrapping: soft labels by agreement of similar keys (CAPro, Qin et al. 2023, arXiv 2310.09761)."""

import torch
from torch import Tensor

from mopro_fast.ops import backends, checks
from mopro_fast.ops.soft_neighbour_labels import check_neighbours


def _fake(z: Tensor, keys: Tensor, aux_weight: Tensor, prototypes: Tensor, *_) -> Tensor:
    types = (z.dtype, keys.dtype, aux_weight.dtype, prototypes.dtype)
    return z.new_empty(len(z), len(prototypes), dtype=torch.float64 if torch.float64 in types else torch.float32)


backends.define(
    "collective_targets(Tensor z, Tensor keys, Tensor aux_weight, Tensor prototypes, float alpha, float temperature, "
    "str weights, ScalarType? dtype) -> Tensor",
    _fake,
)


def collective_targets(
    z: Tensor,
    keys: Tensor,
    aux_weight: Tensor,
    prototypes: Tensor,
    *,
    alpha: float,
    temperature: float,
    weights: str = "linear",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The label distribution of the keys that resemble each row, as classifier and prototypes see the keys today.

    ``V_j = alpha·softmax(aux_weight·k_j) + (1−alpha)·softmax(prototypes·k_j/temperature)``, then as
    :func:`soft_neighbour_labels` with these values: ``t_i = Σ_j u_ij·V_j / Σ_j u_ij``, clamped to [0, 1] and divided by
    its sum. Where all prototypes are zeros, as before they start, the second half is 1/C throughout.

    z:           [N, D] embeddings of unit length.
    keys:        [Q, D], at least one: the queue. It needs no labels beside it.
    aux_weight:  [C, D] of the classifier on embeddings.
    prototypes:  [C, D], at least one.
    alpha in [0, 1]; temperature above 0.
    weights:     "linear": u_ij = clamp(z_i·k_j, 0, 1) + 1e-7, as CAPro's code; "softmax": exp(z_i·k_j/temperature).
    dtype:       bfloat16 or float16: what the operands of all matrix products are rounded to, which tensor cores then
                 multiply, with float32 sums; None: they are multiplied as float32.

    Returns float32 [N, C] (float64 if an input is). No gradient. Nothing of size Q×C or N×Q is stored. Raises
    ValueError for a wrong argument.
    """
    check_neighbours(z, keys, temperature, weights)
    checks.tensor("prototypes", prototypes, ("C", z.shape[1]), checks.FLOATS, z.device)
    checks.some_classes(prototypes)
    checks.tensor("aux_weight", aux_weight, tuple(prototypes.shape), checks.FLOATS, z.device)
    checks.unit_interval("alpha", alpha)
    if dtype not in (None, *checks.LOW):
        raise ValueError(f"dtype must be bfloat16, float16 or None, got {dtype}")
    with torch.no_grad():
        return torch.ops.mopro_fast.collective_targets(
            z, keys, aux_weight, prototypes, alpha, temperature, weights, dtype
        )
