"""Run a function on several gloo ranks of this machine, or in this process when one rank is enough.

The processes are forks of a server that has imported the trainer, and nothing else, once: each would take three seconds
for that, more than most tests. PyTorch runs nothing in the server, so no thread of it is lost in a fork.
"""

import tempfile
from collections.abc import Callable

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
        arguments = (ranks, f"{folder}/rendezvous", function, args)
        mp.start_processes(_member, arguments, nprocs=ranks, start_method="forkserver")


def statuses_of(ranks: int, function: Callable, *args) -> list[int]:
    """The same, each rank in a process of its own even if alone; -> their exit statuses, the other ranks killed as soon
    as rank 0 has ended with another than 0."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, f"{folder}/rendezvous", function, args)
        processes = [FORKS.Process(target=_member, args=(rank, *arguments)) for rank in range(ranks)]
        for process in processes:
            process.start()
        processes[0].join()
        for process in processes[1:]:
            if processes[0].exitcode != 0:
                process.kill()
            process.join()
        return [process.exitcode for process in processes]


def _member(rank: int, ranks: int, rendezvous: str, function: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)
    try:
        function(rank, ranks, *args)
    finally:
        if dist.is_initialized():  # a command ends it by itself
            dist.destroy_process_group()
