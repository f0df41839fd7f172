"""What one rank needs of the others. Every function works unchanged with a single process."""

import contextlib
import datetime
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from mopro_fast import console, peers, sharing, signals
from mopro_fast.errors import UserError, first_line
from mopro_fast.transfer import to_device

TIMEOUT = 600.0  # seconds; see start()
_group_timeout = datetime.timedelta(minutes=30)  # of collectives: peers.py knows sooner, and better
_PATIENCE = 20.0  # seconds before ranks that do not come are spoken of
_STEP = 10.0  # seconds that a signal waits for the end of a step at least

_by_rank0 = False  # whether it is computing for the others

T = TypeVar("T")


def world() -> tuple[int, int]:
    """-> (rank, number of ranks)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def say(text: str) -> None:
    """A line on the terminal, once for all ranks; also before they have met."""
    if (dist.get_rank() if dist.is_initialized() else number("RANK", 0)) == 0:
        console.say(text)


def alone() -> bool:
    """Whether there are no other ranks to talk to."""
    return world()[1] == 1


def number(name: str, otherwise: int, least: int = 0, most: int | None = None) -> int:
    """The whole number that torchrun or a scheduler has put into the environment."""
    text = os.environ.get(name, "")
    if not text.strip():
        return otherwise
    value = int(text) if re.fullmatch(r"\s*[+-]?\d{1,12}\s*", text, re.ASCII) else None
    if value is None or value < least or (most is not None and value > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise UserError(
            f"the environment has {name}={text!r}, no whole number {bounds}: start with torchrun, or unset {name}"
        )
    return value


def start(device: str, deterministic: bool | None = None, timeout: float = TIMEOUT) -> torch.device:
    """Join torchrun's process group, if there is one, and return this rank's device.

    device: "auto" (the GPU of this local rank if CUDA is there), "cpu" or "cuda".
    deterministic: True: only cuDNN kernels that repeat bit for bit; False: the fastest; None: as it is.
    timeout: seconds after which a rank that does not come, or does not go on, ends the others.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device {device!r} is unknown: choose auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda was asked for but PyTorch sees no GPU: `mopro-fast env` says more, or use cpu")
    cuda = device != "cpu" and torch.cuda.is_available()
    local_rank = number("LOCAL_RANK", 0)
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
    if dist.is_initialized():
        peers.resume(timeout)
    elif _ranks_of_environment():
        _join("nccl" if cuda else "gloo", place if cuda else None, timeout)
    return place


def _ranks_of_environment() -> bool:
    """Whether the environment names a process group to join."""
    ranks = number("WORLD_SIZE", 1, least=1)
    rank = number("RANK", 0)
    if rank >= ranks:
        raise UserError(f"the environment has RANK={rank} of WORLD_SIZE={ranks}: ranks count from 0 to {ranks - 1}")
    number("MASTER_PORT", 0, most=65535)
    missing = [name for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing and ranks > 1:
        raise UserError(f"the environment has WORLD_SIZE={ranks} but no {missing[0]}: start with torchrun, or set it")
    return not missing


def _join(backend: str, device: torch.device | None, timeout: float) -> None:
    """Meet the other ranks. A UserError where they do not come within ``timeout`` seconds."""
    global _group_timeout
    _group_timeout = max(_group_timeout, datetime.timedelta(seconds=2 * timeout))
    rank, ranks = number("RANK", 0), number("WORLD_SIZE", 1)
    host, port = os.environ["MASTER_ADDR"], number("MASTER_PORT", 0)
    meeting = f"the {ranks} ranks cannot meet at {host}:{port} (MASTER_ADDR, MASTER_PORT)"
    remedy = "is rank 0 there?" if rank else "start as many as WORLD_SIZE says"
    note = threading.Timer(_PATIENCE, say, [f"waiting for {ranks} ranks to meet at {host}:{port}"])
    note.daemon = True
    note.start()
    try:
        if rank != 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            _reach(host, port, timeout)  # TCPStore prints pages while it tries
        store, _, _ = next(rendezvous("env://", timeout=datetime.timedelta(seconds=timeout)))
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("mopro_fast", store),
            rank=rank,
            world_size=ranks,
            timeout=_group_timeout,
            device_id=device,
        )
        why = (
            peers.start(rank, ranks, host, timeout, from_rank0, lambda why: gather_lists([why])) if ranks > 1 else None
        )
    except OSError as error:
        raise UserError(f"{meeting}: {first_line(error)}: {remedy}") from None
    except (RuntimeError, ValueError) as error:
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"port {port} is in use on {host}: choose another MASTER_PORT (torchrun --master-port)"
            ) from None
        raise UserError(f"{meeting}: {first_line(error)}: {remedy}") from None
    finally:
        note.cancel()
    if why:
        say(f"ranks cannot watch each other ({why}): where one ends the others may wait for it")


def _reach(host: str, port: int, timeout: float) -> None:
    """Wait until somebody listens there."""
    until = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, port), timeout=max(0.1, until - time.monotonic())).close()
            return
        except OSError:  # where a cluster starts, even rank 0's name and the way to it may come later
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


def leave() -> None:
    """Leave the process group, if there is one. Not after an error: other ranks may wait in a collective."""
    peers.stop()
    if dist.is_initialized():
        dist.destroy_process_group()


def new_group() -> dist.ProcessGroup:
    """A group of all ranks with a queue of its own."""
    return dist.new_group(timeout=_group_timeout)


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
    """What rank 0 computes (something picklable), on every rank. The others wait for as long as it takes.

    Large arrays in it are shared by a machine's ranks (sharing.py). Where rank 0 raises an exception the others end.
    Inside of ``compute`` it is rank 0's own call.
    """
    global _by_rank0
    if alone() or _by_rank0:
        return compute()
    group = _patient_group()
    packed = refused = None
    try:
        if world()[0] == 0:
            _by_rank0 = True
            try:
                packed = sharing.pack(compute())
            except Exception as error:
                refused = error
            finally:
                _by_rank0 = False
        if from_rank0(refused is not None, group):
            if refused is None:
                sys.exit(2)  # rank 0 says why
            raise refused
        value = sharing.unpack(packed, group)
    finally:
        if packed is not None:
            packed.remove()
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


@contextlib.contextmanager
def saving() -> Iterator[None]:
    """What rank 0 writes inside is finished first, whatever signal comes; the other ranks wait for it here."""
    if world()[0] == 0:
        with signals.saving():
            yield
        from_rank0(None)
        return
    yield
    with signals.saving():
        from_rank0(None)


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


class StopSignal(signals.Flag):
    """SIGTERM, SIGHUP and Ctrl-C as a flag that all ranks see at the same step.

    Each :meth:`poll` starts an all-reduce of the flag on a CPU group and reads the one started a step before: the
    device never waits for it, a rank only for one that is more than a step behind.
    """

    def __init__(self) -> None:
        super().__init__()
        self.group = None if alone() else dist.new_group(backend="gloo", timeout=_group_timeout)
        self.pending: tuple[dist.Work, Tensor] | None = None
        self.longest, self.polled = 0.0, time.monotonic()

    def __enter__(self) -> "StopSignal":
        super().__enter__()
        self._allow()
        peers.moved(training=True)
        return self

    def __exit__(self, *error) -> None:
        peers.moved(training=False)
        super().__exit__(*error)

    def again(self) -> None:
        if self.group is None:  # torchrun repeats the first itself
            super().again()

    def poll(self) -> int:
        """Call once a step on every rank; -> the signal's number on all ranks, 0 for none."""
        now = time.monotonic()
        self.longest, self.polled = max(self.longest, now - self.polled), now
        self._allow()
        peers.moved()
        seen = self.signal
        if self.group is not None:
            seen = 0
            if self.pending:
                work, flag = self.pending
                work.wait()
                seen = int(flag)
            flag = torch.tensor(self.signal)
            self.pending = (dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group, async_op=True), flag)
        self.ends_work |= bool(seen)
        return seen

    def _allow(self) -> None:
        """A step may have to end first; on several ranks two, and one that waits for images spoils them for all."""
        seconds = max(_STEP, 3 * self.longest)
        self.patience = 0 if self.group is None else seconds / 2
        signals.allow(seconds)
