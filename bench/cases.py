"""What the benchmarks run: which op at which shape, with which inputs. bench/variants.py has the functions."""

import functools
from dataclasses import dataclass, replace
from types import SimpleNamespace

import floor
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mopro_fast.config import AugmentConfig
from mopro_fast.data.augment import Views, crop_boxes, draw
from mopro_fast.models.resnet import ResNet
from mopro_fast.ops.colour import IMAGENET_MEAN, IMAGENET_STD

# Of q, keys, queue and prototypes that are read; under autocast, which is what trains, the logits alone are bfloat16.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "autocast": torch.float32}
KINDS = ("model", "K", "pool", "side", "S")  # fields of a shape that is for other ops than the head's


@dataclass(frozen=True)
class Shape:
    """N rows, C classes, Q queue slots, M gathered rows (0: N), D dimensions; or a model's parameters; or feature maps
    [N, C, side, side], and the K channels of which a convolution makes them, or the window that pools; or N images.

    S: side of their views, in pixels. dtype: of the result, if they are normalised.
    """

    N: int = 0
    C: int = 0
    Q: int = 0
    M: int = 0
    D: int = 128
    S: int = 0
    dtype: str = "float32"
    model: str = ""
    shadows: bool = False
    side: int = 0
    K: int = 0
    pool: int = 0

    @property
    def kind(self) -> str:
        """The field that says which ops the shape is for, one of KINDS or none."""
        return next((kind for kind in KINDS if getattr(self, kind)), "")

    @property
    def rows(self) -> int:
        return self.M or self.N

    @property
    def threshold(self) -> float:
        """The recipes' values: webvision-v1 and webvision-v2."""
        return 0.6 if self.C >= 5000 else 0.8

    @property
    def size(self) -> int:
        return DTYPES.get(self.dtype, torch.uint8).itemsize

    @property
    def logits_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == "float32" else torch.bfloat16


# Fields of Shape that an op's time depends on.
FIELDS = {
    "ema_update_": ("model", "shadows"),
    "sgd_ema_update_": ("model", "shadows"),
    "queue_enqueue_": ("M", "Q"),
    "info_nce": ("N", "Q"),
    "correct_labels": ("N", "C"),
    "prototype_contrast": ("N", "C"),
    "prototype_update_": ("M", "C"),
    "collective_targets": ("N", "C", "Q"),
    "soft_neighbour_labels": ("N", "C", "Q"),
    "batch_norm_act": ("N", "C", "side"),
    "batch_norm_relu_pool": ("N", "C", "side", "pool"),
    "conv1x1_stats_": ("N", "K", "C", "side"),
    "mopro_loss": ("N", "C", "Q"),
    "head": ("N", "C", "Q", "M"),
    "normalize": ("N", "S"),
    "two_views": ("N", "S"),
}


@dataclass(frozen=True)
class Case:
    op: str
    shape: Shape

    @property
    def settings(self) -> dict[str, int | str | bool]:
        s = self.shape
        return {f: s.rows if f == "M" else getattr(s, f) for f in FIELDS[self.op]}

    @property
    def name(self) -> str:
        values = " ".join(f"{k}={v}" for k, v in self.settings.items())
        return f"{self.op} {values} {self.shape.dtype}"

    def state(self, device: str) -> SimpleNamespace:
        """The inputs: random, the same for every variant of a case."""
        maps = {"K": convolution_state, "pool": pool_state, "side": map_state}
        states = {"model": model_state, **maps, "S": image_state, "": head_state}
        return states[self.shape.kind](self.shape, device)

    def cost(self) -> floor.Cost:
        s = self.shape
        if s.model:
            return getattr(floor, self.op)(sum(shape.numel() for shape in parameter_shapes(s.model)), s.shadows)
        if self.op == "two_views":
            return floor.two_views(int(crops(s)[1][:, :, 2:].prod(2).sum()), s.N, s.S)
        sizes = {
            "normalize": (s.N, s.S, s.size),
            "queue_enqueue_": (s.rows, s.D, s.size),
            "info_nce": (s.N, s.Q, s.D, s.size),
            "correct_labels": (s.N, s.C, s.D, s.size),
            "prototype_contrast": (s.N, s.C, s.D, s.size),
            "prototype_update_": (s.rows, s.C, s.D, s.size),
            "collective_targets": (s.N, s.C, s.Q, s.D, s.size),
            "soft_neighbour_labels": (s.N, s.C, s.Q, s.D, s.size),
            "batch_norm_act": (s.N, s.C, s.side, s.size),
            "batch_norm_relu_pool": (s.N, s.C, s.side, s.size),
            "conv1x1_stats_": (s.N, s.K, s.C, s.side, s.size),
            "mopro_loss": (s.N, s.C, s.Q, s.D, s.size, s.size, s.logits_dtype.itemsize),
            "head": (s.N, s.C, s.Q, s.D, s.rows, s.size, s.logits_dtype.itemsize),
        }
        return getattr(floor, self.op)(*sizes[self.op])


@functools.cache
def parameter_shapes(model: str) -> list[torch.Size]:
    """Of an encoder with the projection head; "few": four tensors for a smoke test."""
    if model == "few":
        return [torch.Size(s) for s in ((8, 3, 7, 7), (8,), (33, 65), (1,))]
    with torch.device("meta"):
        return [p.shape for p in ResNet(model, 1000).parameters()]


def model_state(shape: Shape, device: str) -> SimpleNamespace:
    g = torch.Generator(device).manual_seed(0)
    shapes = parameter_shapes(shape.model)

    def tensors(scale: float = 1.0) -> list[Tensor]:
        return [scale * torch.randn(s, generator=g, device=device) for s in shapes]

    s = SimpleNamespace(params=tensors(), grads=tensors(0.01), buffers=tensors(0.01), targets=tensors())
    for name in ("param_shadows", "target_shadows"):
        setattr(s, name, [torch.empty_like(t, dtype=torch.bfloat16) for t in s.targets] if shape.shadows else None)
    return s


@functools.cache
def crops(shape: Shape) -> tuple[Views, np.ndarray]:
    """The views' random numbers, and their boxes, int64 [N, 2, 4]."""
    views = draw(np.random.Generator(np.random.PCG64(0)), shape.N, AugmentConfig())
    shapes = np.full((shape.N, 2), shape.S * 8 // 7)  # what the recipes pack: 256 px for 224
    return views, np.stack([crop_boxes(shapes, crop) for crop in (views.q, views.k)], axis=1)


def image_state(shape: Shape, device: str) -> SimpleNamespace:
    """Square images of noise over a gradient, one after the other, and what the loader draws for them."""
    g = torch.Generator(device).manual_seed(0)
    n, side = shape.N, shape.S * 8 // 7
    noise = torch.randint(128, (n, side, side, 3), generator=g, device=device)
    pixels = (noise + torch.linspace(0, 127, side, device=device)[:, None]).byte()
    images = torch.tensor([[3 * side * side * i, side, side] for i in range(n)], device=device)
    views, boxes = crops(shape)
    jitter, flips = views.jitter, np.stack([views.q.flip, views.k.flip], axis=1)
    numbers = {"boxes": boxes, "flips": flips, "gray": jitter.gray, "factors": jitter.factors, "order": jitter.order}
    return SimpleNamespace(
        pixels=pixels.flatten(), images=images, **{k: torch.from_numpy(v).to(device) for k, v in numbers.items()},
        size=shape.S, views=pixels[:, : shape.S, : shape.S].contiguous(), dtype=DTYPES.get(shape.dtype),
        mean=torch.tensor(IMAGENET_MEAN, device=device), std=torch.tensor(IMAGENET_STD, device=device),
    )  # fmt: skip


def map_state(shape: Shape, device: str) -> SimpleNamespace:
    """No gradient arrives where the ReLU's argument is nearly 0: rounding would decide whether it passes."""
    g = torch.Generator(device).manual_seed(0)

    def maps() -> Tensor:
        size = (shape.N, shape.side, shape.side, shape.C)
        return torch.randn(size, generator=g, device=device).permute(0, 3, 1, 2).to(DTYPES[shape.dtype])

    def channel() -> Tensor:
        return torch.rand(shape.C, generator=g, device=device) + 0.5

    s = SimpleNamespace(x=maps().mul_(2).add_(1), residual=maps(), dy=maps(), weight=channel(), bias=channel())
    s.running_mean, s.running_var = channel(), channel()
    z = F.batch_norm(s.x.float(), None, None, s.weight, s.bias, training=True).add_(s.residual)
    s.dy.masked_fill_(z.abs_() < 1e-3, 0)
    return s


def pool_state(shape: Shape, device: str) -> SimpleNamespace:
    """As map_state; a residual there is none."""
    s = map_state(shape, device)
    z = F.batch_norm(s.x.float(), None, None, s.weight, s.bias, training=True)
    z = F.max_pool2d(z, shape.pool, 2, shape.pool // 2)
    dy = s.residual[:, :, : z.shape[2], : z.shape[3]].contiguous(memory_format=torch.channels_last)
    s.dy, s.residual = dy.masked_fill_(z.abs_() < 1e-3, 0), None
    return s


def convolution_state(shape: Shape, device: str) -> SimpleNamespace:
    g = torch.Generator(device).manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=g, device=device)

    x = randn(shape.N, shape.side, shape.side, shape.K).permute(0, 3, 1, 2).to(DTYPES[shape.dtype])
    norm = (randn(1, shape.K), randn(1, shape.K).abs() + 0.5, randn(shape.K), randn(shape.K))
    return SimpleNamespace(
        x=x, weight=randn(shape.C, shape.K, 1, 1) / shape.K**0.5, norm=norm,
        running_mean=randn(shape.C), running_var=randn(shape.C).abs(),
    )  # fmt: skip


def head_state(shape: Shape, device: str) -> SimpleNamespace:
    """Unit rows and labels such that every decision is far from its threshold, in four kinds of rows.

    0: classifier and prototypes agree on another class, with confidence: relabelled. 1: they confirm the label with
    confidence. 2: the label is plausible: kept. 3: neither: removed. Every second key is close to its query (a hit).
    """
    n, classes, m, d = shape.N, shape.C, shape.rows, shape.D
    g = torch.Generator(device).manual_seed(0)

    def unit(*size: int) -> Tensor:
        return F.normalize(torch.randn(*size, d, generator=g, device=device), dim=1)

    prototypes, queue = unit(classes), unit(shape.Q)
    kind = torch.arange(n, device=device) % 4
    labels = torch.randint(classes, (n,), generator=g, device=device)
    true = torch.where(kind == 0, (labels + 1) % classes, labels)
    noise = unit(n)
    given = prototypes[labels]
    away = noise - (noise * given).sum(1, keepdim=True) * given - 0.5 * given  # kind 3: unlike its label
    q = F.normalize(torch.where((kind < 2)[:, None], 4 * prototypes[true] + noise, noise), dim=1)
    q = torch.where((kind == 3)[:, None], F.normalize(away, dim=1), q)
    logits = torch.randn(n, classes, generator=g, device=device)
    peak = torch.tensor([14.0, 14.0, 5.0, -5.0], device=device)[kind]
    logits.scatter_(1, true[:, None], peak[:, None])
    k = unit(n)
    k[::2] = F.normalize(4 * q[::2] + k[::2], dim=1)

    def low(x: Tensor) -> Tensor:
        return x.to(DTYPES[shape.dtype])

    more_labels = torch.randint(classes, (m - n,), generator=g, device=device)
    more_kept = torch.rand(m - n, generator=g, device=device) < 0.8
    kept = torch.rand(n, generator=g, device=device) < 0.8
    kept[0] = True
    return SimpleNamespace(
        logits=logits.to(shape.logits_dtype), q=low(q), k=low(k), queue=low(queue), labels=labels, kept=kept,
        prototypes=prototypes, bank=low(prototypes), queue_master=queue if shape.size == 2 else None,
        cursor=torch.tensor([shape.Q - m], device=device),
        # the other ranks' rows, as gathered
        more=low(unit(m - n)), more_keys=low(unit(m - n)),
        more_labels=more_labels,
        more_kept=more_kept,
        weight=torch.full((n,), 1 / n, device=device), kept_weight=kept / kept.sum(), threshold=shape.threshold,
        aux_weight=low(3 * unit(classes)),
    )  # fmt: skip


def float64(state: SimpleNamespace) -> SimpleNamespace:
    """The same values in float64: with the official formulation, the oracle."""

    def wide(x):
        if isinstance(x, list | tuple):
            return type(x)(wide(y) for y in x)
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    return SimpleNamespace(**{name: wide(value) for name, value in vars(state).items()})


PAPER = Shape(N=256, C=1000, Q=8192)
LARGE = Shape(N=1024, C=5000, Q=65536)
GATHERED = 2048
MODELS = (Shape(model="resnet50"), Shape(model="resnet50", shadows=True))
IMAGES = (Shape(N=256, S=224), Shape(N=256, S=112), Shape(N=256, S=32))
STAGES = tuple(Shape(N=256, C=c, side=side) for c, side in ((256, 56), (512, 28), (1024, 14), (2048, 7)))  # ResNet-50
CONVOLUTIONS = tuple(replace(s, K=s.C // 4) for s in STAGES)  # conv3 of their blocks
STEM = Shape(N=256, C=64, side=112, pool=3)
QUICK_MAPS = (Shape(N=6, C=24, side=9), Shape(N=33, C=3, side=1), Shape(N=6, C=24, side=9, K=40))
QUICK_MAPS += (Shape(N=6, C=24, side=9, pool=3),)
QUICK = (Shape(N=33, C=57, Q=198, M=66), Shape(N=7, C=10, Q=21, D=32), Shape(N=5, S=17))


def full() -> list[Case]:
    """Every op, the settings that the documentation shows first: peers that compile are given up when time is spent."""
    found = []
    others = [replace(bank, N=n) for bank in (PAPER, LARGE) for n in (32, 256, 1024, 4096)]
    for shape in (PAPER, replace(PAPER, M=GATHERED), LARGE, *MODELS, *STAGES, STEM, *CONVOLUTIONS, *IMAGES, *others):
        found += cases_of(shape)
    return _distinct(found)


def quick() -> list[Case]:
    """Small shapes that divide no tile: for smoke tests and the sanitizers."""
    found = []
    for shape in (*(replace(m, model="few") for m in MODELS), *QUICK_MAPS, *QUICK):
        found += cases_of(shape)
    return _distinct(found)


def cases_of(shape: Shape) -> list[Case]:
    dtypes = ("float32",) if shape.model else ("float32", "bfloat16", "uint8") if shape.S else DTYPES
    return [Case(op, replace(shape, dtype=dtype)) for dtype in dtypes for op in ops_of(shape, dtype)]


def ops_of(shape: Shape, dtype: str) -> list[str]:
    if shape.S:
        return ["two_views"] if dtype == "uint8" else ["normalize"]
    found = [op for op, fields in FIELDS.items() if kind_of(fields) == shape.kind]
    return [op for op in found if dtype != "autocast" or op in ("mopro_loss", "head")]


def kind_of(fields: tuple[str, ...]) -> str:
    """Of the shapes that an op with these fields takes."""
    return next((kind for kind in KINDS if kind in fields), "")


def _distinct(found: list[Case]) -> list[Case]:
    """Without those that differ only where the op does not look."""
    by_name: dict[str, Case] = {}
    for case in found:
        by_name.setdefault(case.name, case)
    return list(by_name.values())
