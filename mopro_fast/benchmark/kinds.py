"""What a step's kernels are for, told by their names as a profiler gives them."""

import re
from collections.abc import Iterable

# (kind, regular expression that its names hold); the first that fits counts. Triton's names stand alone, csrc's after
# their namespace, so that PyTorch's of the same words are not among them.
OURS = (
    ("our BatchNorm, finish", r"^batch_norm_\w*finish"),
    ("our BatchNorm, statistics", r"^batch_norm_stats_"),
    ("our BatchNorm, forward", r"^batch_norm_act_fwd"),
    ("our BatchNorm, backward sums", r"^batch_norm_act_bwd_sums"),
    ("our BatchNorm, backward", r"^batch_norm_act_bwd"),
    ("our BatchNorm with pooling", r"^batch_norm_relu_pool_"),
    ("our 1×1 convolution", r"^conv1x1_stats_"),
    ("our losses and labels", r"^(similarity|info_nce|correct_labels|prototype_contrast|mopro_loss)_"),
    ("our queue and prototypes", r"mopro_fast::.*\b(queue_enqueue|prototype_update)_kernel"),
    ("our SGD and EMA", r"mopro_fast::.*\b(sgd_)?ema_update_kernel"),
    ("our views", r"^(normalize|two_views)_"),
)
KINDS = (
    *OURS,
    ("torch.compile", r"^triton_"),
    ("communication", r"nccl"),
    ("pooling", r"pool"),
    ("BatchNorm", r"batch_?norm|bn_[fb]w|welford"),
    ("convolution", r"[fb]prop|[dw]grad|implicit|cudnn|conv(?!ert)|nchwToNhwc|nhwcToNchw"),
    ("matrix product", r"gem[mv]|cublas|nvjet|splitK|cutlass"),
    ("copy", r"^Mem(cpy|set)|copy_kernel"),
    ("reduction", r"reduce|softmax|nll_loss"),
    ("sorting and indexing", r"sort|radix|scan|topk|(?<!with_)index|gather|scatter"),
    ("elementwise", r"elementwise|multi_tensor|CatArray"),
)
ELSE = "else"


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), ELSE)


def by_kind(kernels: Iterable[tuple[str, float]]) -> dict[str, dict[str, float]]:
    """From names and microseconds to launches and ms of every kind that there is, in the table's order."""
    found = {kind: {"launches": 0, "ms": 0.0} for kind in (*dict(KINDS), ELSE)}
    for name, us in kernels:
        kind = found[kind_of(name)]
        kind["launches"] += 1
        kind["ms"] += us / 1e3
    return {kind: sums for kind, sums in found.items() if sums["launches"]}
