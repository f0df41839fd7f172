"""mopro-fast as one of many ranks although it is alone: what a single GPU can tell of DDP and NCCL.

python -m torch.distributed.run --standalone --nproc-per-node 1 tests/one_rank.py train …
"""

import atexit
import sys
from collections import Counter

import torch.distributed as dist

from mopro_fast import cli, distributed

COLLECTIVES = ("all_gather_into_tensor", "all_reduce", "all_to_all_single", "broadcast")


def main() -> None:
    seen = Counter()

    def counted(name, function):
        def call(*args, **kwargs):
            seen[name] += 1
            return function(*args, **kwargs)

        return call

    distributed.alone = lambda: not dist.is_initialized()
    for name in COLLECTIVES:
        setattr(dist, name, counted(name, getattr(dist, name)))
    distributed.DistributedDataParallel = counted("DDP", distributed.DistributedDataParallel)
    atexit.register(lambda: print("one rank:", *(f"{name} {n}" for name, n in sorted(seen.items())), flush=True))
    cli.main(sys.argv[1:], own=True)


if __name__ == "__main__":
    main()
