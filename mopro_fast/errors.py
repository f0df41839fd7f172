"""The one exception whose message is meant for the person at the keyboard; what an OSError says about the machine."""

import errno
import os
from typing import Any

_REMEDIES = {
    errno.ENOSPC: "make room there, then run the same command again",
    errno.EDQUOT: "make room there or have the quota raised, then run the same command again",
    errno.EFBIG: "raise `ulimit -f`, or write to a file system that takes larger files",
    errno.EIO: "the disk or the way to it fails: have it repaired, then run the same command again",
    errno.EMFILE: "allow more open files: ulimit -n 4096",
    errno.ENFILE: "all programs together have too many files open: end some of them",
    errno.ENOMEM: "free memory: end other programs",
}
_OF_THE_PROCESS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class UserError(Exception):
    """A mistake in the input: one line that names the thing and says what to do.

    The command line prints it without a traceback and exits with status 2.
    """


class CannotWrite(UserError):
    """An OSError of writing. Nothing that was written before is touched."""

    def __init__(self, what: Any, error: OSError, otherwise: str = "name another place") -> None:
        """otherwise: what to do, where the error does not say."""
        self.strerror = first_line(error)
        super().__init__(f"cannot write {what}: {self.strerror}: {_REMEDIES.get(error.errno, otherwise)}")

    def __reduce__(self) -> tuple:
        return UserError, self.args  # from a worker process


class OutOfResources(UserError):
    """The process lacks handles or memory to open something, which says nothing about that."""


def require_resources(error: BaseException, name: Any) -> None:
    """Raise OutOfResources where opening or reading ``name`` failed for what the process lacks."""
    number = errno.ENOMEM if isinstance(error, MemoryError) else getattr(error, "errno", None)
    if number in _OF_THE_PROCESS:
        raise OutOfResources(f"cannot open {name}: {os.strerror(number)}: {_REMEDIES[number]}") from None


def of_the_machine(error: BaseException) -> UserError | None:
    """An exception that nobody has expected as a UserError, where the disk or the process lacks something.

    PyTorch and Triton write caches of their own, for one.
    """
    error = getattr(error, "inner_exception", error)  # of torch.compile
    if not isinstance(error, OSError) or error.errno not in _REMEDIES:
        return None
    where = "" if error.filename is None else f"{error.filename}: "
    return UserError(f"{where}{error.strerror}: {_REMEDIES[error.errno]}")


def first_line(error: BaseException) -> str:
    """What a library's exception says, short enough for the middle of a UserError."""
    said = getattr(error, "strerror", None) or str(error).partition("\n")[0].rstrip(":. ")
    return said[:200] or type(error).__name__
