"""What compilers make, kept under all that decides it: sources, options, versions. Processes share the folder."""

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from filelock import FileLock

CORES = len(os.sched_getaffinity(0))


def kept(folder: Path, name: str, decides: Iterable[str | bytes | Path], make: Callable[[Path], None]) -> Path:
    """The path of the file that `make(path)` writes; where the folder has one made of the same, make is not called.

    A path in `decides` stands for its bytes. Of several processes one makes the file, the others wait for it.
    """
    key = hashlib.sha256()
    for part in decides:
        part = part.read_bytes() if isinstance(part, Path) else part.encode() if isinstance(part, str) else part
        key.update(len(part).to_bytes(8, "little") + part)
    stem, suffix = os.path.splitext(name)
    output = folder / f"{stem}.{key.hexdigest()[:24]}{suffix}"
    if not output.exists():
        lock = output.with_name(output.name + ".lock")
        with FileLock(lock):
            if not output.exists():
                partial = output.with_name(f"{output.name}.{os.getpid()}")
                try:
                    make(partial)
                    partial.replace(output)
                finally:
                    partial.unlink(missing_ok=True)
            lock.unlink(missing_ok=True)  # whoever waits for it or comes later finds the file
    return output
