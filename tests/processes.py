"""Run a function on several gloo ranks of this machine, or in this process when one rank is enough.

The processes are forks of a server that has imported the trainer, and nothing else, once: each would take three seconds
for that, more than most tests. PyTorch runs nothing in the server, so no thread of it is lost in a fork.
"""

import os
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

FORKS = mp.get_context("forkserver")
FORKS.set_forkserver_preload(["torch._dynamo", "mopro_fast.training.loop"])


def on_ranks(ranks: int, function: Callable, *args) -> None:
    """Call ``function(rank, ranks, *args)`` on each rank; an exception on any of them is raised here."""
    if ranks == 1:
        function(0, 1, *args)
        return
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = f"file://{Path(folder) / 'rendezvous'}"
        mp.start_processes(_member, (ranks, rendezvous, function, args), nprocs=ranks, start_method="forkserver")


def _member(rank: int, ranks: int, rendezvous: str, function: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=ranks)
    try:
        function(rank, ranks, *args)
    finally:
        if dist.is_initialized():  # a command ends it by itself
            dist.destroy_process_group()


def start(environment: Mapping[str, str], function: Callable, *args) -> BaseProcess:
    """Begin ``function(*args)`` in a process of its own, with this added to its environment and one thread."""
    process = FORKS.Process(target=_alone, args=(dict(environment), function, args))
    process.start()
    return process


def _alone(environment: dict[str, str], function: Callable, args: tuple) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    function(*args)
