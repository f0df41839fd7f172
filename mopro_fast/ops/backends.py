"""Registers the ops with PyTorch and chooses, per op and device, which backend runs.

``MOPRO_FAST_BACKEND=auto|reference|triton|cuda`` sets the choice for the process, :func:`use_backend` for a
block. ``auto`` takes the first backend of ``PREFERENCE`` that has the op and can run, and logs its choice once. An
explicit backend that cannot run here raises; an op that it does not have goes as under ``auto``.
"""

import contextlib
import functools
import importlib
import importlib.util
import json
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from mopro_fast import installed
from mopro_fast.errors import UserError

log = logging.getLogger("mopro_fast")
library = torch.library.Library("mopro_fast", "DEF")

OPS = (
    "ema_update_",
    "sgd_ema_update_",
    "queue_enqueue_",
    "info_nce",
    "correct_labels",
    "mopro_loss",
    "mopro_loss_backward",
    "prototype_contrast",
    "prototype_update_",
    "collective_targets",
    "soft_neighbour_labels",
    "two_views",
    "normalize",
    "batch_norm_stats_",
    "batch_norm_act",
    "batch_norm_act_backward",
    "batch_norm_relu_pool",
    "batch_norm_relu_pool_backward",
    "conv1x1_stats_",
)
PREFERENCE = ("cuda", "triton", "reference")
# Where each backend's implementations live, and which ops it has. Modules are imported on first use.
MODULES = {"reference": "mopro_fast.ops.reference", "cuda": "mopro_fast.ops.cuda", "triton": "mopro_fast.kernels"}
CUDA = ("ema_update_", "sgd_ema_update_", "queue_enqueue_", "prototype_update_")
PLAIN = ("collective_targets", "soft_neighbour_labels")  # no kernel: docs/kernels.md counts why
TRITON = tuple(op for op in OPS if op not in CUDA + PLAIN)
IMPLEMENTED = {"reference": OPS, "cuda": CUDA, "triton": TRITON}

_choice = os.environ.get("MOPRO_FAST_BACKEND", "auto")


def define(
    schema: str, fake: Callable[..., Any], backward: Callable | None = None, setup: Callable | None = None
) -> None:
    """Define ``mopro_fast::<schema>`` for CPU and CUDA, with its fake kernel and, if given, its gradient."""
    name = schema.partition("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("cpu", "cuda"):
        library.impl(name, functools.partial(_run, name, device), device.upper())
    torch.library.register_fake(f"mopro_fast::{name}", fake, lib=library)
    if backward is not None:
        once = once_differentiable(backward)
        torch.library.register_autograd(f"mopro_fast::{name}", once, setup_context=setup, lib=library)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops called inside the block on backend ``name`` ("auto", "reference", "triton" or "cuda").

    Raises ``ValueError`` for an unknown name; an op that the backend cannot run raises ``RuntimeError``.
    """
    global _choice
    before, _choice = _choice, _known(name)
    try:
        yield
    finally:
        _choice = before


def describe() -> dict[str, dict[str, str]]:
    """Which backend each op would use: ``{op: {"cpu": name, "cuda": name}}``, or why an explicit choice fails."""

    def backend(op: str, device: str) -> str:
        try:
            return choose(op, device, _known(_choice))
        except (RuntimeError, ValueError) as error:
            return f"error: {error}"

    return {op: {device: backend(op, device) for device in ("cpu", "cuda")} for op in OPS}


def require(device: str) -> None:
    """Raise a UserError now if MOPRO_FAST_BACKEND cannot be honoured for every op on this device."""
    for op in OPS:
        try:
            choose(op, device, _known(_choice))
        except (RuntimeError, ValueError) as error:
            raise UserError(f"MOPRO_FAST_BACKEND={_choice}: {error}") from None


def choose(op: str, device: str, choice: str) -> str:
    """The backend that runs ``op`` on tensors of ``device`` ("cpu" or "cuda") under ``choice``."""
    if choice != "auto":
        if reason := unavailable(choice, device):
            raise RuntimeError(f"the {choice} backend was asked for but cannot run {op}: {reason}")
        if op in IMPLEMENTED[choice]:
            return choice
    # On CPU tensors triton would mean its interpreter: a debugging tool, never what auto should pick.
    candidates = PREFERENCE if device == "cuda" else ("reference",)
    return next(b for b in candidates if op in IMPLEMENTED[b] and unavailable(b, device) is None)


def unavailable(backend: str, device: str) -> str | None:
    """Why ``backend`` cannot run on tensors of ``device``; None if it can."""
    if backend == "cuda":
        if device != "cuda":
            return "it takes CUDA tensors only"
        return _missing_extension()
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "it takes CPU tensors only under TRITON_INTERPRET=1"
        if device == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
            return "its kernels want a GPU of compute capability 8.0 or newer"
    return None


@functools.cache
def _missing_extension() -> str | None:
    try:
        importlib.import_module("mopro_fast._C")
    except ImportError as error:
        return f"the compiled extension is not there ({error}); `mopro-fast env` says why"
    if torch.cuda.is_available():
        archs = json.loads(installed.BUILD_INFO.read_text())["archs"]
        capability = "{}.{}".format(*torch.cuda.get_device_capability())
        if not installed.covers(archs, capability):
            return (
                f"it was built for {', '.join(archs)}, not for this GPU's {capability}: install mopro_fast again here"
            )
    return None


def _known(name: str) -> str:
    if name != "auto" and name not in MODULES:
        raise ValueError(f"unknown backend {name!r}: choose auto, reference, triton or cuda")
    return name


@functools.cache
def _implementation(op: str, device: str, choice: str) -> Callable[..., Any]:
    backend = choose(op, device, _known(choice))
    log.info("%s on %s tensors runs on the %s backend", op, device, backend)
    return getattr(importlib.import_module(MODULES[backend]), op)


def is_fused(op: str, device: str) -> bool:
    """Whether another backend than the reference would run ``op`` on tensors of this device now."""
    return _implementation(op, device, _choice).__module__ != MODULES["reference"]


# What torch.compiler.assume_constant_result does, which would import the compiler: a second more at every start.
is_fused._dynamo_marked_constant = True


def _run(op: str, device: str, *args: Any) -> Any:
    choice = _choice
    if any(isinstance(a, torch.Tensor) and a.dtype == torch.float64 for a in args):
        if choice not in ("auto", "reference") and op in IMPLEMENTED[_known(choice)]:
            raise RuntimeError(f"the {choice} backend was asked for but cannot run {op}: it has no float64")
        choice = "reference"
    first = args[0] if isinstance(args[0], torch.Tensor) else args[0][0]
    current = torch.cuda.device(first.device) if device == "cuda" else contextlib.nullcontext()
    with current, torch.autocast(device, enabled=False):  # the arithmetic type is the op's own affair
        return _implementation(op, device, choice)(*args)
