"""Label correction and out-of-distribution removal (MoPro section 3.3, equations 6 and 7; with anchors, CAPro)."""

import torch
from torch import Tensor

from mopro_fast.ops import backends, checks

backends.define(
    "correct_labels(Tensor logits, Tensor q, Tensor prototypes, Tensor labels, float alpha, float threshold, "
    "float temperature, Tensor? anchors=None, bool inclusive=False) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=lambda logits, q, prototypes, labels, *_: tuple(
        torch.empty_like(labels, dtype=dtype) for dtype in (torch.int64, torch.bool, torch.int64, torch.float32)
    ),
)


def correct_labels(
    logits: Tensor,
    q: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    *,
    alpha: float,
    threshold: float,
    temperature: float,
    anchors: Tensor | None = None,
    inclusive: bool = False,
    with_winner: bool = False,
) -> tuple[Tensor, ...]:
    """Mix the classifier's and the prototypes' opinion and decide about every label.

    ``t = alpha·softmax(logits) + (1−alpha)·softmax(q·prototypesᵀ/temperature)``; a row whose largest t exceeds
    ``threshold`` takes that class (ties: the lowest); a row is kept if it is so relabelled or if its given label
    has ``t > 1/C``. Rows with a score that is not finite are neither kept nor relabelled.

    logits:     [N, C] of the classifier.
    q:          [N, D] embeddings of unit length.
    prototypes: [C, D].
    labels:     int64 [N]; −1 (or anything outside [0, C)) means none: never kept by it, may be relabelled.
    alpha, threshold in [0, 1]; temperature above 0.
    anchors:    bool [N], or None: an anchor with a label in [0, C) and finite scores keeps this label, whatever they
                say; any other anchor is as the other rows.
    inclusive:  whether to compare with ≥ (CAPro), not with > (MoPro): a t of exactly 1/C, or of ``threshold``, will do.

    Returns (labels int64 [N], kept bool [N]); with_winner adds (winner int64 [N], score float32 [N]), the class of the
    largest t and this t, −1 and 0 where a score is not finite. No gradient. Raises ValueError for a wrong argument.
    """
    n, _ = checks.embeddings(q, "prototypes", prototypes)
    checks.tensor("logits", logits, (n, len(prototypes)), checks.FLOATS, q.device)
    checks.labels_and_kept(labels, None, n, q.device)
    if anchors is not None:
        checks.tensor("anchors", anchors, (n,), (torch.bool,), q.device)
    checks.unit_interval("alpha", alpha)
    checks.unit_interval("threshold", threshold)
    checks.positive("temperature", temperature)
    with torch.no_grad():
        found = torch.ops.mopro_fast.correct_labels(
            logits, q, prototypes, labels, alpha, threshold, temperature, anchors, inclusive
        )
    return found if with_winner else found[:2]
