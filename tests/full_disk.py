"""Commands on a disk that is full, or fails, from a chosen operation on: full_disk.c makes it so.

A server, `python tests/full_disk.py`, has imported the trainer and runs each command in a fork of itself.
"""

import errno
import json
import mmap
import os
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from compiled import kept

HERE = Path(__file__).parent
COMPILER = shutil.which(os.environ.get("CC", "cc"))
ROOM, FLUSH = 1, 2
_STATE = "@lliii4096s"
_NOWHERE = -1


@dataclass
class Fault:
    kind: int
    """ROOM: whatever takes room fails. FLUSH: fsync and close."""
    at: int
    """From which operation of this kind on."""
    code: int = errno.ENOSPC
    halved: bool = False
    """Half of a write comes before the failure."""


@dataclass
class Ended:
    status: int
    text: str
    """stdout and stderr."""
    operations: list[tuple[int, str]]
    """Kind and path, all of them if there was no fault."""

    def errors(self) -> list[str]:
        return [line for line in self.text.splitlines() if line.startswith("mopro-fast: error: ")]


class Disk:
    """Runs commands; what they do below ``folder`` can fail."""

    def __init__(self, cache: Path, scratch: Path) -> None:
        source = HERE / "full_disk.c"
        version = subprocess.run([COMPILER, "--version"], check=True, capture_output=True).stdout
        flags = ["-O1", "-Wall", "-Wextra", "-shared", "-fPIC"]

        def make(output: Path) -> None:
            subprocess.run([COMPILER, *flags, source, "-o", output, "-ldl"], check=True)

        library = kept(cache, "full_disk.so", [source, version, *flags], make)
        self._scratch, self._log = scratch, scratch / "operations"
        self._log.touch()
        (scratch / "state").write_bytes(bytes(mmap.PAGESIZE * 2))
        with (scratch / "state").open("r+b") as file:
            self._state = mmap.mmap(file.fileno(), mmap.PAGESIZE * 2)
        self._set(Path("/nowhere"), None)
        env = os.environ | {"LD_PRELOAD": str(library), "FULL_DISK": str(scratch / "state")}
        env |= {"FULL_DISK_LOG": str(self._log), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, __file__]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def close(self) -> None:
        self._server.communicate()

    def run(self, argv: list[str], folder: Path, fault: Fault | None = None) -> Ended:
        self._log.write_text("")
        self._set(folder, fault)
        said = self._scratch / "said"
        self._server.stdin.write(json.dumps([argv, str(folder), str(said)]) + "\n")
        self._server.stdin.flush()
        status = int(self._server.stdout.readline())
        self._set(Path("/nowhere"), None)
        lines = [line.split(" ", 1) for line in self._log.read_text(errors="surrogateescape").splitlines()]
        return Ended(status, said.read_text(), [(int(kind), path) for kind, path in lines])

    def _set(self, folder: Path, fault: Fault | None) -> None:
        kinds, at = (ROOM | FLUSH, _NOWHERE) if fault is None else (fault.kind, fault.at)
        code, halved = (0, 0) if fault is None else (fault.code, int(fault.halved))
        self._state[: struct.calcsize(_STATE)] = struct.pack(_STATE, 0, at, kinds, code, halved, os.fsencode(folder))


def small_demo() -> None:
    """The demo with a few digits and one epoch, in this process."""
    import sklearn.datasets

    from mopro_fast import demo

    digits, config = sklearn.datasets.load_digits, demo.config

    def small(*given):
        found = config(*given)
        found.optim.epochs, found.optim.batch_size, found.model.width = 1, 32, 1 / 16
        return found

    sklearn.datasets.load_digits = lambda return_X_y: tuple(x[:150] for x in digits(return_X_y=return_X_y))
    demo.config, demo.TEST = small, 40


def serve() -> None:
    import nvidia.dali.plugin.pytorch  # noqa: F401
    import torch._dynamo

    import mopro_fast.training.loop  # noqa: F401
    from mopro_fast import cli

    replies = os.dup(1)
    for line in iter(sys.stdin.readline, ""):  # unlike the file itself it does not read ahead
        argv, folder, said = json.loads(line)
        child = os.fork()
        if not child:
            out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
            torch.set_num_threads(1)
            if argv[0] == "demo":
                small_demo()
            cli.main(argv, own=True)
            return
        os.write(replies, b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


if __name__ == "__main__":
    serve()
