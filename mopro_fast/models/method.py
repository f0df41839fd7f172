"""What a training method is: a module whose ``forward`` is one of its steps, up to the loss."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mopro_fast import ops
from mopro_fast.models.resnet import ResNet
from mopro_fast.models.side_stream import on_side_stream


@dataclass
class StepOutput:
    """What one step gives back. Means are over this rank's rows; shares are over its N rows."""

    loss: Tensor
    """What is minimised, a float32 scalar."""
    metrics: dict[str, Tensor]
    """Detached scalars for the log, by the names in the method's METRICS."""
    labels: Tensor
    """int64 [N]: the labels after correction."""
    kept: Tensor
    """bool [N]: the rows that count as in-distribution, clean or corrected."""
    winner: Tensor | None = None
    """int64 [N]: the class that label correction prefers, −1: none; without label correction None."""
    score: Tensor | None = None
    """float32 [N]: what it gives this class, in [0, 1]."""


class Method(nn.Module):
    """One training method.

    A subclass has METRICS and ``forward(view_q, view_k, labels, epoch, *extra) -> StepOutput``:

    view_q, view_k: uint8 [N, H, W, 3]; view_k is None for tasks of one view.
    labels:         int64 [N], −1 where none is given.
    epoch:          0-based; on a GPU :meth:`phase` of it.
    extra:          the tensors that the task adds to a batch (training/task.py).

    It computes with ``self.query`` and ``self.key``. ``encoder_q`` is what is evaluated and exported.
    """

    METRICS: tuple[str, ...] = ("loss", "acc_cls")
    """Names of the means in the log."""
    key_momentum: float = 0.0
    """m of encoder_k's moving average."""
    correct: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]] | None = None
    """(logits, q, labels) → (labels, kept, winner, score) of :class:`StepOutput`, for images it is not trained on."""
    threshold: float = 1.0
    """Label correction is sure of a class whose score exceeds this."""
    inclusive: bool = False
    """Or reaches it."""
    key_stream: bool = False
    """On a GPU the key encoder's forward runs beside the query encoder's. Off: not measured yet."""
    image_channels: int = 3
    """Of what the encoders get: 3, or 4 with a fourth of zeros. Off: not measured on a GPU yet."""
    key_dtype: torch.dtype | None = None
    """What encoder_k, its input and its copies are in where the step computes in 16 bits; None: as the query."""

    def __init__(self, encoder_q: ResNet, encoder_k: ResNet | None = None) -> None:
        """encoder_k: follows encoder_q as its moving average, in the optimizer's pass."""
        super().__init__()
        self.encoder_q, self.encoder_k = encoder_q, encoder_k
        self.compute_with(encoder_q, encoder_k)

    def compute_with(self, query: nn.Module, key: nn.Module | None = None) -> None:
        """Let these compute for encoder_q and encoder_k: copies in 16 bits, compiled, data-parallel."""
        self.__dict__ |= {"query": query, "key": key}  # not registered: the state dict has the encoders alone

    def normalize(self, view: Tensor, shifts: Tensor | None = None) -> Tensor:
        """uint8 [N, H, W, 3] → what the encoders get."""
        return ops.normalize(view, shifts=shifts, channels=self.image_channels)

    def key_pass(self, compute: Callable[[], Tensor], *reads: Tensor) -> Callable[[], Tensor]:
        """-> the function that gives ``compute()``, which runs the key encoder on ``reads``, without a gradient.

        With key_stream the key pass is launched before the query pass. It records nothing for autograd, so that the
        host has launched it sooner, and an eager step's two streams overlap for longer.
        """

        def run() -> Tensor:
            with self.in_key_dtype(reads[0].device):
                return compute()

        return on_side_stream(run, *reads) if self.key_stream and reads[0].is_cuda else run

    def in_key_dtype(self, device: torch.device) -> contextlib.AbstractContextManager:
        """Without a gradient, and where autocast is on, in :attr:`key_dtype`: what the key's pass runs in."""
        contexts = contextlib.ExitStack()
        contexts.enter_context(torch.no_grad())
        if self.key_dtype is not None and torch.is_autocast_enabled(device.type):
            contexts.enter_context(torch.autocast(device.type, self.key_dtype))
        return contexts

    def judges(self) -> bool:
        """Whether it has all that :attr:`correct` needs."""
        return self.correct is not None

    def phase(self, epoch: int) -> int:  # noqa: ARG002
        """The first epoch whose steps do the same as this epoch's: a graph is captured for each."""
        return 0

    def set_frozen(self, epoch: int) -> bool:  # noqa: ARG002
        """Let the parameters that :meth:`trained` names and this epoch does not train require no gradient, and the
        others require it; -> whether that has changed."""
        return False

    def trained(self) -> list[list[nn.Parameter]]:
        """The parameters that are trained in any epoch, in groups with a learning rate each."""
        return [list(self.encoder_q.parameters())]

    def followers(self) -> list[nn.Parameter | None]:
        """Those of encoder_k, in the order of :meth:`trained`; None for a parameter that it does not have."""
        names, key = {p: name for name, p in self.encoder_q.named_parameters()}, dict(self.encoder_k.named_parameters())
        return [key.get(names.get(p)) for group in self.trained() for p in group]
