"""The ops in plain PyTorch: the CPU path, the oracle of every kernel test and the benchmark's baseline.

No function here waits for the device: there is no ``.item()``, no boolean indexing, no data-dependent shape.
Arithmetic is float32 (float64 for float64 inputs) whatever the storage type.
"""

import contextlib
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mopro_fast.ops import colour
from mopro_fast.ops.two_views import largest_side

# Of a slice of a bank: at most so many label values, and scores. As float32 that is 34 MB, of which a few are alive at
# a time; a pass over it (16 µs at 4.3 TB/s) outweighs its launch; and the recipes' queues are one slice.
SLICE_VALUES = 2**23


def wide(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the type the arithmetic runs in."""
    return [t.to(wide_type(*tensors)) for t in tensors]


def wide_type(*tensors: Tensor) -> torch.dtype:
    """Float32, or float64 if any of the tensors is float64."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def ema_update_(targets: list[Tensor], sources: list[Tensor], momentum: float, shadows: list[Tensor]) -> None:
    if not targets:
        return
    torch._foreach_mul_(targets, momentum)
    torch._foreach_add_(targets, [s.to(torch.float32) for s in sources], alpha=1.0 - momentum)
    if shadows:
        torch._foreach_copy_(shadows, targets)


def sgd_ema_update_(
    params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], targets: list[Tensor], lr: Tensor,
    momentum: float, weight_decay: float, nesterov: bool, ema_momentum: float,
    param_shadows: list[Tensor], target_shadows: list[Tensor],
) -> None:  # fmt: skip
    d = torch._foreach_add([g.to(torch.float32) for g in grads], params, alpha=weight_decay)
    if momentum:
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, d)
        d = torch._foreach_add(d, buffers, alpha=momentum) if nesterov else buffers
    torch._foreach_add_(params, torch._foreach_mul(d, -lr[0]))
    if param_shadows:
        torch._foreach_copy_(param_shadows, params)
    ema_update_(targets, params, ema_momentum, target_shadows)


def queue_enqueue_(queue: Tensor, cursor: Tensor, keys: Tensor, shadow: Tensor | None = None) -> None:
    slots = (cursor + torch.arange(len(keys), device=queue.device)).remainder_(len(queue))
    queue.index_copy_(0, slots, keys.to(queue.dtype))
    if shadow is not None:
        shadow.index_copy_(0, slots, keys.to(shadow.dtype))
    cursor.add_(len(keys)).remainder_(len(queue))


def info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """-> loss [N], hit bool [N], d loss / d q [N, D] = (E − k)/T with E = softmax-weighted mean of k and queue."""
    q, k, queue = wide(q, k, queue)
    positive = (q * k).sum(1, keepdim=True)
    negative = q @ queue.T  # [N, Q]
    logits = torch.cat([positive, negative], dim=1) / temperature  # [N, 1 + Q]
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    expected = p[:, :1] * k + p[:, 1:] @ queue  # [N, D]
    hit = (positive >= negative).all(1)
    return -log_p[:, 0], hit, (expected - k) / temperature


def mixed_scores(
    logits: Tensor, q: Tensor, prototypes: Tensor, alpha: float, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """-> t = α·p + (1−α)·s, p = softmax(logits), s = softmax(q·prototypesᵀ/temperature), each [N, C]."""
    logits, q, prototypes = wide(logits, q, prototypes)
    classifier, prototype = logits.softmax(1), (q @ prototypes.T / temperature).softmax(1)
    return alpha * classifier + (1 - alpha) * prototype, classifier, prototype


def decide(
    t: Tensor, labels: Tensor, threshold: float, anchors: Tensor | None = None, inclusive: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rule of :func:`ops.correct_labels` for t [N, C] -> labels, kept, winner, score, each [N]."""
    classes, reaches = t.shape[1], torch.ge if inclusive else torch.gt
    finite = t.isfinite().all(1)
    labelled = (labels >= 0) & (labels < classes)
    given = t.gather(1, labels.clamp(0, classes - 1)[:, None])[:, 0]
    confirmed = labelled & reaches(given, 1 / classes)
    best, guess = t.max(1)  # ties: the lowest class
    sure = finite & reaches(best, threshold)
    if anchors is not None:
        anchors = anchors & labelled
        confirmed, sure = confirmed | anchors, sure & ~anchors
    winner, score = torch.where(finite, guess, -1), torch.where(finite, best, 0).float()
    return torch.where(sure, guess, labels), (finite & confirmed) | sure, winner, score


def correct_labels(
    logits: Tensor, q: Tensor, prototypes: Tensor, labels: Tensor, alpha: float, threshold: float, temperature: float,
    anchors: Tensor | None = None, inclusive: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return decide(mixed_scores(logits, q, prototypes, alpha, temperature)[0], labels, threshold, anchors, inclusive)


def prototype_contrast(
    q: Tensor, prototypes: Tensor, labels: Tensor, kept: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """-> loss [N], d loss / d q [N, D] = (E − c_y)/T; both 0 where the row is not kept."""
    q, prototypes = wide(q, prototypes)
    use, target = _used_rows(labels, kept, len(prototypes))
    log_p = (q @ prototypes.T / temperature).log_softmax(1)  # [N, C]
    loss = -log_p.gather(1, target[:, None])[:, 0]
    grad = (log_p.exp() @ prototypes - prototypes[target]) / temperature  # [N, D]
    return torch.where(use, loss, 0), torch.where(use[:, None], grad, 0)


def mopro_loss(
    logits: Tensor, q: Tensor, k: Tensor, queue: Tensor, prototypes: Tensor, labels: Tensor, kept: Tensor | None,
    temperature: float, w_proto: float, w_inst: float, contrast: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """-> loss, metrics; for the backward pass d inst/dq, d proto/dq, log Σ exp(logits), R [1]."""
    inst, inst_hit, inst_grad = info_nce(q, k, queue, temperature)
    kept, target = _used_rows(labels, kept, len(prototypes))
    (z,) = wide(logits)
    log_z, score = z.logsumexp(1), z.gather(1, target[:, None])[:, 0]
    cls = torch.where(kept, log_z - score, 0)
    hit = kept & (score >= z.amax(1))
    proto, proto_grad = torch.zeros_like(inst), torch.zeros_like(inst_grad)
    if contrast:
        proto, proto_grad = prototype_contrast(q, prototypes, labels, kept, temperature)
        proto_grad = proto_grad.to(inst_grad.dtype)

    rows = kept.sum().clamp(min=1).float()
    n = max(1, len(q))
    loss_cls, loss_proto, loss_inst = cls.sum() / rows, proto.sum() / rows, inst.sum() / n
    loss = loss_cls + w_proto * loss_proto + w_inst * loss_inst
    shares = (hit.sum() / rows, inst_hit.sum() / n, kept.sum() / n)
    metrics = torch.stack([m.float() for m in (loss, loss_cls, loss_proto, loss_inst, *shares)])
    return loss, metrics, inst_grad, proto_grad, log_z, rows[None]


def mopro_loss_backward(
    loss_grad: Tensor, logits: Tensor, labels: Tensor, kept: Tensor | None, inst_grad: Tensor, proto_grad: Tensor,
    log_z: Tensor, rows: Tensor, w_proto: float, w_inst: float, q_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> gradients of logits (softmax − one-hot)/R where kept, and of q, in their types."""
    (z,) = wide(logits)
    kept, target = _used_rows(labels, kept, z.shape[1])
    grad = (z - log_z[:, None]).exp()
    grad.scatter_(1, target[:, None], grad.gather(1, target[:, None]) - 1)
    logits_grad = torch.where(kept[:, None], grad * (loss_grad / rows), 0)
    q_grad = inst_grad * (w_inst * loss_grad / max(1, len(z))) + proto_grad * (w_proto * loss_grad / rows)
    return logits_grad.to(logits.dtype), q_grad.to(q_dtype)


def prototype_update_(
    prototypes: Tensor, features: Tensor, labels: Tensor, kept: Tensor | None, momentum: float
) -> None:
    """The n rows of a class, in order: c ← mⁿ·c + (1−m)·Σ m^(n−i)·q_i; then every row to unit length."""
    classes = len(prototypes)
    use, target = _used_rows(labels, kept, classes)
    target = torch.where(use, target, classes)  # row C collects what is not used
    # How many rows of its own class follow each row: its distance to the end of its run once sorted by class.
    by_class, order = target.sort(stable=True)
    run_end = torch.searchsorted(by_class, torch.arange(classes + 1, device=target.device), right=True)
    later = run_end[by_class] - 1 - torch.arange(len(target), device=target.device)
    weight = (1 - momentum) * torch.pow(momentum, later.to(prototypes.dtype))
    count = run_end.diff(prepend=run_end.new_zeros(1))[:classes]
    total = prototypes.new_zeros(classes + 1, prototypes.shape[1])
    rows = weight[:, None] * features[order].to(prototypes.dtype)
    if total.is_cuda:  # sorted, so its order of summation is fixed; index_add_ would use atomics there
        total.index_put_((by_class,), rows, accumulate=True)
    else:
        total.index_add_(0, by_class, rows)
    prototypes.mul_(torch.pow(momentum, count.to(prototypes.dtype))[:, None]).add_(total[:classes])
    prototypes.div_(prototypes.norm(dim=1, keepdim=True).clamp_(min=1e-12))


def collective_targets(
    z: Tensor, keys: Tensor, aux_weight: Tensor, prototypes: Tensor, alpha: float, temperature: float, weights: str,
    dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    """The values of a slice of keys are made when its turn comes: ten float32 passes over [Q, C] (docs/kernels.md)."""
    z, keys, aux_weight, prototypes = wide(z, keys, aux_weight, prototypes)
    prototypes, out = prototypes / temperature, z.dtype
    aux_weight, prototypes, keys = (x.to(dtype or out) for x in (aux_weight, prototypes, keys))

    def bank() -> Iterator[tuple[Tensor, Tensor]]:
        for k in keys.split(_slots(len(z), len(prototypes))):
            by_classifier = _product(k, aux_weight.T, out).softmax(1)
            by_prototypes = _product(k, prototypes.T, out).softmax(1)
            yield k, by_prototypes.lerp_(by_classifier, alpha)

    t = _neighbour_mean(z, bank(), len(prototypes), temperature, weights, dtype or out).clamp_(0, 1)
    return t.div_(t.sum(1, keepdim=True))


def soft_neighbour_labels(z: Tensor, keys: Tensor, values: Tensor, temperature: float, weights: str) -> Tensor:
    out, slots = wide_type(z, keys, values), _slots(len(z), values.shape[1])
    bank = ((k.to(out), v.to(out)) for k, v in zip(keys.split(slots), values.split(slots), strict=True))
    return _neighbour_mean(z.to(out), bank, values.shape[1], temperature, weights, out)


def _slots(rows: int, classes: int) -> int:
    return max(1, SLICE_VALUES // max(rows, classes, 1))


def _neighbour_mean(
    z: Tensor, bank: Iterable[tuple[Tensor, Tensor]], classes: int, temperature: float, weights: str, dtype: torch.dtype
) -> Tensor:
    """Σ_j u_ij v_j / Σ_j u_ij [N, C] over slices of a bank: keys [S, D] in ``dtype``, values [S, C].

    dtype: of the products' operands. The weights are summed as they are multiplied: rounded to it.
    """
    out, softmax = z.dtype, weights == "softmax"
    z = (z / temperature if softmax else z).to(dtype)
    labels, total = z.new_zeros(len(z), classes, dtype=out), z.new_zeros(len(z), 1, dtype=out)
    largest = torch.full_like(total, float("-inf")) if softmax else None
    for keys, values in bank:
        u = _product(z, keys.T, out)  # [N, S]
        if softmax:
            before, largest = largest, torch.maximum(largest, u.amax(1, keepdim=True))
            rescale = (before - largest).exp_()
            labels.mul_(rescale), total.mul_(rescale)
            u.sub_(largest).exp_()
        else:
            u.clamp_(0, 1).add_(1e-7)
        u = u.to(dtype)
        total.add_(u.sum(1, keepdim=True, dtype=out))
        labels.add_(_product(u, values.to(dtype), out))
    return labels.div_(total)


def _product(a: Tensor, b: Tensor, out: torch.dtype) -> Tensor:
    """a·b, both of one type, summed and stored in ``out``."""
    if a.dtype == out:
        return a @ b
    if a.is_cuda and out == torch.float32:
        return torch.mm(a, b, out_dtype=out)
    return a.to(out) @ b.to(out)


def _used_rows(labels: Tensor, kept: Tensor | None, classes: int) -> tuple[Tensor, Tensor]:
    """-> (row is kept and its label is a class, that label or a safe 0)."""
    use = (labels >= 0) & (labels < classes)
    if kept is not None:
        use = use & kept
    return use, torch.where(use, labels, 0)


def two_views(
    pixels: Tensor,
    images: Tensor,
    boxes: Tensor,
    flips: Tensor,
    gray: Tensor,
    factors: Tensor,
    order: Tensor,
    size: int,
) -> Tensor:
    """Every view as two matrix products of whole numbers, exact in float64, and one division.

    The only function here that waits for a CUDA device: what shapes its tensors is known on the host alone.
    """
    n, views = flips.shape
    out = pixels.new_zeros(views, n, size, size, 3)
    numbers = zip(images.tolist(), boxes.tolist(), flips.tolist(), strict=True)
    with _one_thread():
        for row, ((offset, height, width), row_boxes, row_flips) in enumerate(numbers):
            small = max(height, width) <= largest_side(size) and 3 * height * width < 2**31
            if not (small and min(height, width) > 0 and 0 <= offset <= len(pixels) - 3 * height * width):
                continue  # black
            image = pixels[offset : offset + 3 * height * width].view(height, width, 3)
            for view, (box, flip) in enumerate(zip(row_boxes, row_flips, strict=True)):
                _crop(out[view, row], image, box, flip)
    if views > 1 and n:
        out[1] = colour.color_jitter(out[1], colour.Jitter(*(x.cpu().numpy() for x in (gray, factors, order))))
    return out


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Operations of microseconds on a CPU: threads would wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _crop(out: Tensor, image: Tensor, box: list[int], flip: bool) -> None:
    (height, width, _), (top, left, box_height, box_width), size = image.shape, box, len(out)
    if not (0 <= top <= height - box_height < height and 0 <= left <= width - box_width < width):
        return  # black
    y_weights = _triangles(box_height, size, image.device)
    x_weights = _triangles(box_width, size, image.device)
    if flip:
        x_weights = x_weights.flip(0)
    part = image[top : top + box_height, left : left + box_width].double()
    lines = (y_weights @ part.flatten(1)).view(size, box_width, 3)
    sums = x_weights @ lines  # [S, S, 3]
    total = y_weights.sum(1)[:, None] * x_weights.sum(1)
    out.copy_((sums.float() / total.float()[:, :, None]).round_())


def _triangles(length: int, size: int, device: torch.device) -> Tensor:
    """float64 [size, length]: weights of an antialiased bilinear resize, in units of 1/(2·size) px."""
    centre = (2 * torch.arange(size, device=device) + 1) * length - size
    distance = (2 * size * torch.arange(length, device=device) - centre[:, None]).abs()
    return (2 * max(length, size) - distance).clamp(min=0).double()


def normalize(
    images: Tensor, flips: Tensor | None, dtype: torch.dtype, shifts: Tensor | None = None, channels: int = 3
) -> Tensor:
    if flips is not None:
        images = torch.where(flips[:, None, None, None], images.flip(2), images)
    out = colour.normalize(images, shifts).to(dtype)
    if channels == 3:
        return out
    return F.pad(out.permute(0, 2, 3, 1), (0, channels - 3)).permute(0, 3, 1, 2)


def batch_norm_stats_(
    x: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float, group: int,
    one_launch: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> mean, 1/√(var + eps) [groups, C]. Two passes: torch.var_mean takes 20 times as long on a CPU."""
    (x,) = wide(x)
    groups = len(x) // group if group else 1
    if not x.numel():
        return x.new_zeros(groups, x.shape[1]), x.new_full((groups, x.shape[1]), eps**-0.5)
    x = _by_group(x, groups)
    mean = x.mean(1)
    var = (x - mean[:, None]).square_().mean(1)
    unbiased = var * (x.shape[1] / max(1, x.shape[1] - 1))
    running_mean.lerp_(mean.mean(0), momentum)
    running_var.lerp_(unbiased.mean(0), momentum)
    return mean, (var + eps).rsqrt()


def batch_norm_act(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool,
    signs: bool = False, one_launch: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> y; a bit per value, 0 where y ≤ 0: uint8 [N, H, W, C/8], no elements unless wanted."""
    y = _affine(_by_group(wide(x)[0], len(mean)), mean, rstd, weight, bias)
    if residual is not None:
        y += _by_group(residual, len(mean))
    y = _from_groups(y.relu_() if relu else y, x)
    if not signs:
        return y, x.new_empty(0, dtype=torch.uint8)
    above = (~(y <= 0)).permute(0, 2, 3, 1).unflatten(3, (-1, 8))
    return y, (above * 2 ** torch.arange(8, device=x.device)).sum(4).to(torch.uint8)


def batch_norm_act_backward(
    dy: Tensor, dy2: Tensor | None, x: Tensor, y: Tensor | None, mean: Tensor, rstd: Tensor, weight: Tensor,
    bias: Tensor, relu: bool, one_launch: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y: or its signs. -> gradients of x, weight, bias; of the residual where y is given, else no elements."""
    if dy2 is not None and y is None:
        raise ValueError("dy2 needs y")
    groups, like = len(mean), x
    x, g = (_by_group(t, groups) for t in wide(x, dy if dy2 is None else dy + dy2))
    if y is not None:
        g = torch.where(_by_group(y if y.dtype != torch.uint8 else _unpacked(y), groups) <= 0, 0, g)
    elif relu:
        g = torch.where(_affine(x, mean, rstd, weight, bias) <= 0, 0, g)
    x_hat = (x - mean[:, None]).mul_(rstd[:, None])
    g_sum, gx_sum, positions = g.sum(1), (g * x_hat).sum(1), max(1, x.shape[1])  # [groups, C]
    dx = (g - g_sum[:, None] / positions).sub_(x_hat.mul_(gx_sum[:, None] / positions)).mul_((rstd * weight)[:, None])
    dresidual = like.new_empty(0) if y is None else _from_groups(g, like)
    return _from_groups(dx, like), gx_sum.sum(0), g_sum.sum(0), dresidual


def batch_norm_relu_pool(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, keep: bool,
    one_launch: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> y, the x at the maximum of each window and its place there (3·row + column; 9 where y is 0); keep: else both
    have no elements."""
    n, channels, height, width = x.shape
    down = (weight * rstd < 0).repeat_interleave(n // max(1, len(mean)), 0)[:, :, None, None]  # a larger x: a smaller y
    rising = torch.where(down, -x, x)
    if x.numel():
        x_max, at = F.max_pool2d(wide(rising)[0], 3, 2, 1, return_indices=True)
    else:
        x_max = rising.new_empty(n, channels, (height + 1) // 2, (width + 1) // 2)
        at = x_max.long()
    x_max = torch.where(down, -x_max, x_max).to(x.dtype).contiguous(memory_format=torch.channels_last)
    z = _affine(_by_group(wide(x_max)[0], len(mean)), mean, rstd, weight, bias)
    y = _from_groups(z.relu(), x_max)
    if not keep:
        return y, x.new_empty(0), x.new_empty(0, dtype=torch.uint8)
    top, left = (2 * torch.arange(size, device=x.device) - 1 for size in x_max.shape[2:])
    place = 3 * (at // max(1, width) - top[:, None]) + at % max(1, width) - left
    place = torch.where(_from_groups(z, z.new_empty(x_max.shape)) <= 0, 9, place).to(torch.uint8)
    return y, x_max, place.contiguous(memory_format=torch.channels_last)


def batch_norm_relu_pool_backward(
    dy: Tensor, dy2: Tensor | None, x: Tensor, x_max: Tensor, indices: Tensor, mean: Tensor, rstd: Tensor,
    weight: Tensor, bias: Tensor, one_launch: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dy2: a second gradient of y, or None. -> gradients of x, weight, bias."""
    (n, channels, height, width), (out_height, out_width) = x.shape, dy.shape[2:]
    (dy,) = wide(dy if dy2 is None else dy + dy2)
    g = dy.new_zeros(n, channels, 2 * out_height + 1, 2 * out_width + 1)  # of x with a border of 1
    for place in range(9):
        windows = g[:, :, place // 3 :: 2, place % 3 :: 2][:, :, :out_height, :out_width]
        windows += torch.where(indices == place, dy, 0)
    g = g[:, :, 1 : height + 1, 1 : width + 1]
    return batch_norm_act_backward(g, None, x, None, mean, rstd, weight, bias, False)[:3]


def conv1x1_stats_(
    x: Tensor, weight: Tensor, running_mean: Tensor, running_var: Tensor, norm: list[Tensor], momentum: float,
    eps: float, group: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> y in x's type, its mean and 1/√(var + eps) [groups, Cout]"""
    z = batch_norm_act(x, *norm, None, True)[0] if norm else x
    z, weight = wide(z, weight.to(x.dtype))
    y = F.linear(z.permute(0, 2, 3, 1), weight.flatten(1)).to(x.dtype).permute(0, 3, 1, 2)
    return y, *batch_norm_stats_(y, running_mean, running_var, momentum, eps, group)


def _by_group(x: Tensor, groups: int) -> Tensor:
    """[N, C, H, W] -> [groups, positions, C], without a copy where x is channels_last."""
    n, channels, height, width = x.shape
    return x.permute(0, 2, 3, 1).reshape(groups, n // max(1, groups) * height * width, channels)


def _unpacked(signs: Tensor) -> Tensor:
    """uint8 [N, H, W, C/8] -> [N, C, H, W], 0 or 1."""
    bits = signs[..., None].bitwise_right_shift(torch.arange(8, dtype=torch.uint8, device=signs.device)) & 1
    return bits.flatten(3).permute(0, 3, 1, 2)


def _from_groups(x: Tensor, like: Tensor) -> Tensor:
    n, channels, height, width = like.shape
    return x.view(n, height, width, channels).permute(0, 3, 1, 2).to(like.dtype)


def _affine(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.addcmul(bias, x - mean[:, None], (rstd * weight)[:, None])
