"""Run a function on several gloo ranks of this machine, or in this process when one rank is enough."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(ranks: int, function: Callable, *args) -> None:
    """Call ``function(rank, ranks, *args)`` on each rank; an exception on any of them is raised here."""
    if ranks == 1:
        function(0, 1, *args)
        return
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = f"file://{Path(folder) / 'rendezvous'}"
        mp.start_processes(_member, (ranks, rendezvous, function, args), nprocs=ranks, start_method="spawn")


def _member(rank: int, ranks: int, rendezvous: str, function: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=ranks)
    try:
        function(rank, ranks, *args)
    finally:
        if dist.is_initialized():  # a command ends it by itself
            dist.destroy_process_group()
