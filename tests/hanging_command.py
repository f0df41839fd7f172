"""The command line on storage that hangs: python hanging_command.py READS WHERE ARGUMENT...

After READS images every read waits for good; then the word "hangs" is written to stdout. WHERE: "read", or "library" for
a wait of the main thread that no signal handler of Python's ends, or "check": a worker process's.
"""

import ctypes
import sys
import threading
from itertools import count

from mopro_fast import cli
from mopro_fast.data import reader, waiting
from mopro_fast.data.index import Index

FOREVER = threading.Event()


def hang(reads: int, where: str) -> None:
    read, numbers = Index.read_with_state, count()

    def hanging(index, row):
        number = next(numbers)
        if number >= reads:
            if number == reads:
                print("hangs", flush=True)
            FOREVER.wait()
        return read(index, row)

    Index.read_with_state = hanging
    if where == "library":
        results = reader.results_of
        libc = ctypes.CDLL(None)

        def stuck(tasks, names):
            if any(not task.done() for task in tasks) and next(numbers) > reads:
                while True:
                    libc.sleep(1)  # Python's handlers run after it, and cannot end it
            return results(tasks, names)

        reader.results_of = stuck


if __name__ == "__main__":
    waiting.FIRST = 1.0
    hang(int(sys.argv[1]), sys.argv[2])
    cli.main(sys.argv[3:])
