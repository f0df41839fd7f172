"""The command line on storage that hangs: python hanging_command.py READS ARGUMENT...

After READS images every read waits for good, and the word "hangs" is written to stdout.
"""

import sys
import threading
from itertools import count

from mopro_fast import cli
from mopro_fast.data import waiting
from mopro_fast.data.index import Index

FOREVER = threading.Event()


def hang(reads: int) -> None:
    read, numbers = Index.read, count()

    def hanging(index, row):
        number = next(numbers)
        if number >= reads:
            if number == reads:
                print("hangs", flush=True)
            FOREVER.wait()
        return read(index, row)

    Index.read = hanging


if __name__ == "__main__":
    waiting.FIRST = 1.0
    hang(int(sys.argv[1]))
    cli.main(sys.argv[2:], own=True)
