"""What one rank needs of the others. Every function works unchanged with a single process."""

import contextlib
import datetime
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mopro_fast import console
from mopro_fast.errors import UserError
from mopro_fast.transfer import to_device

T = TypeVar("T")


def world() -> tuple[int, int]:
    """-> (rank, number of ranks)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def say(text: str) -> None:
    """A line on the terminal, once for all ranks; also before they have met."""
    if (dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))) == 0:
        console.say(text)


def alone() -> bool:
    """Whether there are no other ranks to talk to."""
    return world()[1] == 1


def start(device: str, deterministic: bool | None = None) -> torch.device:
    """Join torchrun's process group, if there is one, and return this rank's device.

    device: "auto" (the GPU of this local rank if CUDA is there), "cpu" or "cuda".
    deterministic: True: only cuDNN kernels that repeat bit for bit; False: the fastest; None: as it is.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device {device!r} is unknown: choose auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda was asked for but PyTorch sees no GPU: `mopro-fast env` says more, or use cpu")
    cuda = device != "cpu" and torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if cuda and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank} has no GPU of its own ({torch.cuda.device_count()} visible): "
            "lower --nproc-per-node or set --device cpu"
        )
    place = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(place)
        torch.cuda.set_stream(torch.cuda.Stream())  # all work's stream: the default one cannot be captured in a graph
    if cuda and deterministic is not None:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = not deterministic, deterministic
    if {"WORLD_SIZE", "RANK", "MASTER_ADDR"} <= os.environ.keys() and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", device_id=place if cuda else None)
    return place


def leave() -> None:
    """Leave the process group, if there is one. Not after an error: other ranks may wait in a collective."""
    if dist.is_initialized():
        dist.destroy_process_group()


def gather_rows(x: Tensor) -> Tensor:
    """The same-sized x of all ranks, one below the other in rank order: [N, …] → [W·N, …]. No gradient."""
    x = x.detach().contiguous()
    if alone():
        return x
    out = x.new_empty(world()[1] * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(out, x)
    return out


def gather_together(*tensors: Tensor) -> list[Tensor]:
    """:func:`gather_rows` of several tensors with the same number of rows, in one collective."""
    tensors = tuple(x.detach().contiguous() for x in tensors)
    if alone():
        return list(tensors)
    packed = [x.flatten(1) if x.dim() > 1 else x[:, None] for x in tensors]
    packed = [x.view(torch.uint8) for x in packed]  # [N, bytes]
    parts = gather_rows(torch.cat(packed, 1)).split([x.shape[1] for x in packed], dim=1)
    return [part.contiguous().view(x.dtype).view(-1, *x.shape[1:]) for part, x in zip(parts, tensors, strict=True)]


def shuffle_order(seed: int, step: int, rows: int) -> np.ndarray:
    """The permutation of all ranks' rows for this step: a function of (seed, step), the same on every rank."""
    return np.random.default_rng([seed, step, 0x5B]).permutation(rows)


def start_exchange(x: Tensor, order: np.ndarray, group: dist.ProcessGroup | None = None) -> Callable[[], Tensor]:
    """Row i of the result, over all ranks, is row order[i] of the input: [N, …] → [N, …] by one all-to-all.

    The function returned waits for it and gives the result; other work can be done meanwhile.
    """
    rank, ranks = world()
    n = len(x)
    if alone():
        return lambda: x[to_device(order, x.device)]
    mine = order[rank * n : (rank + 1) * n]
    # Sent to rank d, in the order in which d's block of `order` names my rows.
    wanted = [block[block // n == rank] - rank * n for block in order.reshape(ranks, n)]
    sent = x[to_device(np.concatenate(wanted), x.device)]
    received = torch.empty_like(sent)
    counts = np.bincount(mine // n, minlength=ranks).tolist()
    work = dist.all_to_all_single(received, sent, counts, [len(w) for w in wanted], group=group, async_op=True)
    # Received rows come sorted by source rank, and in the wanted order within each.
    place = np.argsort(np.argsort(mine // n, kind="stable"), kind="stable")

    def result() -> Tensor:
        work.wait()
        return received[to_device(place, x.device)]

    return result


def data_parallel(module: nn.Module, example: Tensor) -> DistributedDataParallel:
    """The module with its gradients averaged over the ranks, the same bits in the first step as in any later one.

    DDP lays out its buckets anew after its first backward pass, and from three ranks on the layout decides the order
    of summation: the first step after a resume would differ from the uninterrupted one. So that pass is made here, on
    ``example``, in evaluation mode and on every rank.
    """
    devices = [example.device] if example.is_cuda else None
    wrapped = DistributedDataParallel(module, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)
    training = module.training
    wrapped.eval()
    outputs = wrapped(example)
    torch.stack([y.float().sum() for y in (outputs if isinstance(outputs, tuple) else (outputs,))]).sum().backward()
    module.zero_grad()
    wrapped.train(training)
    return wrapped


def from_rank0(value, group: dist.ProcessGroup | None = None):
    """Rank 0's value (any small picklable object) on every rank."""
    if alone():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


def by_rank0(compute: Callable[[], T]) -> T:
    """What rank 0 computes (something picklable), on every rank. The others wait for as long as it takes."""
    if alone():
        return compute()
    group = _patient_group()
    value = from_rank0(compute() if world()[0] == 0 else None, group)
    dist.destroy_process_group(group)
    return value


@contextlib.contextmanager
def on_rank0(made: Callable[[], contextlib.AbstractContextManager]) -> Iterator[None]:
    """The context that ``made`` makes, on rank 0 alone. Where that raises an exception the others end, too."""
    with contextlib.ExitStack() as stack:
        refused = None
        if world()[0] == 0:
            try:
                stack.enter_context(made())
            except Exception as error:
                refused = error
        if from_rank0(refused is not None):
            if refused is None:
                sys.exit(2)  # rank 0 says why
            raise refused
        yield


def gather_lists(mine: list, patient: bool = False) -> list:
    """The ranks' lists (of small picklable objects) joined, on every rank; patient: for as long as one needs."""
    if alone():
        return mine
    parts: list = [None] * world()[1]
    group = _patient_group() if patient else None
    dist.all_gather_object(parts, mine, group=group)
    if patient:
        dist.destroy_process_group(group)
    return [x for part in parts for x in part]


def _patient_group() -> dist.ProcessGroup:
    """Ranks meet in it however long one of them works alone."""
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(days=30))


def sync_buffers(module: nn.Module) -> None:
    """Give every rank rank 0's buffers (BatchNorm's running statistics, as in the official code; queue, prototypes)."""
    if alone():
        return
    buffers = list(module.buffers())
    for dtype in dict.fromkeys(b.dtype for b in buffers):  # in one broadcast each: ResNet-50 has 321 buffers
        same = [b for b in buffers if b.dtype == dtype]
        packed = torch.cat([b.flatten() for b in same])
        dist.broadcast(packed, src=0)
        for b, part in zip(same, packed.split([b.numel() for b in same]), strict=True):
            b.copy_(part.view_as(b))


class StopSignal:
    """SIGTERM and Ctrl-C as a flag that all ranks see at the same step.

    Each :meth:`poll` starts an all-reduce of the flag on a CPU group and reads the one started a step before: the
    device never waits for it, a rank only for one that is more than a step behind.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.group = None if alone() else dist.new_group(backend="gloo")
        self.pending: tuple[dist.Work, Tensor] | None = None

    def __enter__(self) -> "StopSignal":
        main = threading.current_thread() is threading.main_thread()  # others may not set handlers
        self.before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT) if main}
        return self

    def __exit__(self, *_) -> None:
        for s, handler in self.before.items():
            signal.signal(s, handler)

    def _note(self, number: int, _frame) -> None:
        if self.signal and self.group is None and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C ends a single process at once (torchrun repeats the first itself)
        self.signal = number

    def poll(self) -> int:
        """Call once a step on every rank; -> the signal's number on all ranks, 0 for none."""
        if self.group is None:
            return self.signal
        seen = 0
        if self.pending:
            work, flag = self.pending
            work.wait()
            seen = int(flag)
        flag = torch.tensor(self.signal)
        self.pending = (dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group, async_op=True), flag)
        return seen
