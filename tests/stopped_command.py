"""The command line, stopped from inside at a given point: python stopped_command.py SIGNAL POINT ARGUMENT...

For commands that read files in worker processes (check, pack), POINT counts what the main process has got from these:
with SIGKILL it is gone there, with SIGINT its process group gets it, as from a terminal; workers are in others.
For train, POINT is the global step after which rank 0 sends SIGNAL to its parent, torchrun, and waits for its effect.
Stopping from outside would be a race, lost where other work keeps the cores busy.
"""

import os
import signal
import sys
import time
from itertools import count

from mopro_fast import cli


def stop_in_workers(number: int, point: int) -> None:
    from mopro_fast.data import workers

    run, items = workers.run, count(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it

    def stopped(*args):
        for item in run(*args):
            yield item
            if next(items) == point:
                os.kill(os.getpid(), number) if number == signal.SIGKILL else os.killpg(os.getpgrp(), number)

    workers.run = stopped


def stop_in_training(number: int, point: int) -> None:
    from mopro_fast.training.loop import Trainer

    step = Trainer._train_step

    def stopped(trainer, *batch):
        step(trainer, *batch)
        if trainer.rank == 0 and trainer.global_step == point:
            heeded = signal.getsignal(number).__self__  # distributed.StopSignal
            os.kill(os.getppid(), number)
            while not heeded.signal:
                time.sleep(0.01)

    Trainer._train_step = stopped


if __name__ == "__main__":
    stop = stop_in_training if sys.argv[3] == "train" else stop_in_workers
    stop(signal.Signals[sys.argv[1]], int(sys.argv[2]))
    cli.main(sys.argv[3:], own=True)
