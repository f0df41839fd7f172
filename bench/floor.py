"""The least an op must do: bytes through device memory (each input read once, each output written once) and flops.

N rows, D dimensions, Q queue slots, C classes, M gathered rows. `size` is the bytes per element of q, keys, queue,
their gradients, the prototypes that are read and, unless `logits_size` says otherwise, the logits; prototypes that are
updated, per-row losses and optimizer state are float32, labels int64, flags one byte. A product of [a, D] by [D, b]
counts 2·a·b·D flops. Only products are counted, and once: float32 inputs need three tf32 products for float32's
accuracy, but the floor takes one.
"""

from typing import NamedTuple


class Cost(NamedTuple):
    bytes: int
    flops: int


def floor_us(cost: Cost, bytes_per_s: float, flop_per_s: float) -> float:
    """No version runs faster than this, in microseconds."""
    return 1e6 * max(cost.bytes / bytes_per_s, cost.flops / flop_per_s)


def ema_update_(elements: int, shadows: bool) -> Cost:
    """Read target and source, write the target; with shadows, write a 16-bit copy."""
    return Cost(elements * (12 + 2 * shadows), 0)


def sgd_ema_update_(elements: int, shadows: bool) -> Cost:
    """Read parameter, gradient, buffer and target, write all but the gradient; with shadows, two 16-bit copies."""
    return Cost(elements * (28 + 4 * shadows), 0)


def queue_enqueue_(m: int, d: int, size: int) -> Cost:
    """Read the keys, write them."""
    return Cost(2 * m * d * size, 0)


def info_nce(n: int, q: int, d: int, size: int) -> Cost:
    """Read q, k, queue; write loss, hit and the gradient. Two products: the scores and the softmax-weighted mean."""
    return Cost((3 * n * d + q * d) * size + 5 * n, 4 * n * q * d)


def correct_labels(n: int, c: int, d: int, size: int) -> Cost:
    """Read logits, q, prototypes, labels; write labels and kept. One product: the scores."""
    return Cost((n * c + n * d + c * d) * size + 17 * n, 2 * n * c * d)


def prototype_contrast(n: int, c: int, d: int, size: int) -> Cost:
    """Read q, prototypes, labels, kept; write loss and the gradient. Two products, as in info_nce."""
    return Cost((2 * n * d + c * d) * size + 13 * n, 4 * n * c * d)


def prototype_update_(m: int, c: int, d: int, size: int) -> Cost:
    """Read the rows, labels, kept and every prototype; write those that a row changes, at most one per row."""
    return Cost(m * d * size + 9 * m + 4 * d * (c + min(m, c)), 0)


def mopro_loss(n: int, c: int, q: int, d: int, size: int, prototype_size: int, logits_size: int) -> Cost:
    """Read logits, q, k, queue, prototypes, labels; write both gradients, loss and metrics.

    Four products: scores and softmax-weighted mean of the queue, and of the prototypes.
    """
    rows = 2 * n * c * logits_size + (3 * n * d + q * d) * size + 8 * n
    return Cost(rows + c * d * prototype_size + 32, 4 * n * (q + c) * d)


def sgd_update_(elements: int) -> Cost:
    """Read parameter, buffer and a 16-bit gradient, write the first two and a 16-bit copy."""
    return Cost(elements * 20, 0)


def linear(n: int, inputs: int, outputs: int, size: int, into: bool) -> Cost:
    """Forward: read x and weight, write y. Backward: read dy and x, write dw; ``into`` x: read weight, write dx."""
    moved = (4 if into else 3) * inputs * outputs - (0 if into else inputs * outputs)
    return Cost((moved + n * (2 + into) * inputs + 2 * n * outputs) * size, (4 + 2 * into) * n * inputs * outputs)


def cross_entropies(n: int, c: int, size: int) -> Cost:
    """Forward: read logits, float32 targets, labels, kept. Backward: the same again, write the logits' gradient."""
    return Cost(n * c * (3 * size + 8) + 18 * n, 0)


def squared_error(n: int, f: int, size: int) -> Cost:
    """Forward: read both, kept. Backward: the same again, write the gradient of one."""
    return Cost(5 * n * f * size + 2 * n, 0)


def collective_targets(n: int, c: int, q: int, d: int, size: int) -> Cost:
    """Read z, the queue and both classifiers; write the targets.

    Products: keys by both classifiers, rows by keys, weights by labels.
    """
    return Cost((n * d + q * d + 2 * c * d) * size + 4 * n * c, 2 * q * (2 * c * d + n * d + n * c))


def soft_neighbour_labels(n: int, c: int, q: int, d: int, size: int) -> Cost:
    """Read z, keys and values; write the labels. Two products: rows by keys, weights by labels."""
    return Cost((n * d + q * d + q * c) * size + 4 * n * c, 2 * n * q * (d + c))


def batch_norm_act(n: int, c: int, side: int, size: int) -> Cost:
    """Forward and backward, [N, C, side, side]: x, residual, y, and their gradients; per channel four vectors read, two
    of them written too, and two gradients.

    What does not stay on the chip between two passes is read again, which is not counted: x three times, y and dy once.
    """
    return Cost(6 * n * c * side**2 * size + 32 * c, 0)


def batch_norm_relu_pool(n: int, c: int, side: int, size: int) -> Cost:
    """Forward and backward: x, its gradient, the pooled y and its gradient; vectors as in batch_norm_act.

    x is read twice again, and what is kept of each window written and read: not counted.
    """
    return Cost(2 * n * c * (side**2 + ((side + 1) // 2) ** 2) * size + 32 * c, 0)


def conv1x1_stats_(n: int, k: int, c: int, side: int, size: int) -> Cost:
    """Read x, weight and four vectors of the norm; write y and its statistics, read and write the running ones."""
    positions = n * side**2
    return Cost((positions * (k + c) + k * c) * size + 16 * k + 24 * c, 2 * positions * k * c)


def head(n: int, c: int, q: int, d: int, m: int, size: int, logits_size: int) -> Cost:
    """correct_labels, mopro_loss forward and backward, then the queue and the prototypes with M gathered rows.

    A fused step would read logits, q, k, labels and the prototypes once, so what is read again is left out; correction
    writes labels and kept. With 16-bit rows the queue has a float32 master beside it.
    """
    enqueue = m * d * (size + (4 if size == 2 else 0)) + (m - n) * d * size
    update = (m - n) * (d * size + 9) + 4 * d * min(m, c)
    loss = mopro_loss(n, c, q, d, size, 4, logits_size)
    return Cost(loss.bytes + 9 * n + enqueue + update, loss.flops)


def normalize(n: int, s: int, size: int) -> Cost:
    """Read N images of S by S pixels, 3 bytes each; write as many values of `size` bytes."""
    return Cost(3 * n * s * s * (1 + size), 0)


def two_views(cropped: int, n: int, s: int) -> Cost:
    """Read the pixels inside of all crops, write two views of S by S pixels for each of the N images."""
    return Cost(3 * cropped + 6 * n * s * s, 0)
