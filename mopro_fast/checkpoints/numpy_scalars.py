"""What others keep beside weights: numbers of NumPy are read as Python's own, arrays and paths as nothing.

None of NumPy's functions is called.
"""

import struct
from typing import Any

_CODES = {"f2": "e", "f4": "f", "f8": "d", "b1": "?"}
_CODES |= {f"{kind}{2**n}": code for kind, codes in (("i", "bhiq"), ("u", "BHIQ")) for n, code in enumerate(codes)}


class _Type:
    """What stands in a file as numpy.dtype."""

    def __init__(self, code: Any = None, *_: Any) -> None:
        self.order, self.code = "<", _CODES.get(code) if type(code) is str else None

    def __setstate__(self, state: Any) -> None:
        self.order = ">" if type(state) is tuple and state[1:2] == (">",) else "<"


def _scalar(kind: Any, data: Any = None, *_: Any) -> float | int | bool | None:
    """None: not a number, such as a text."""
    if type(kind) is _Type and kind.code and type(data) is bytes and len(data) == struct.calcsize("<" + kind.code):
        return struct.unpack(kind.order + kind.code, data)[0]
    return None


class ArrayOrPath:
    """What stands in a file as an array or a path."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


_CORES = ("numpy.core.multiarray", "numpy._core.multiarray")
GLOBALS = [(_Type, "numpy.dtype"), *((_scalar, f"{core}.scalar") for core in _CORES)]
GLOBALS += [(ArrayOrPath, "numpy.ndarray"), *((ArrayOrPath, f"{core}._reconstruct") for core in _CORES)]
_PATHS = ("PosixPath", "_local.PosixPath", "WindowsPath", "PurePosixPath")
GLOBALS += [(ArrayOrPath, f"pathlib.{name}") for name in _PATHS]
"""For torch.serialization.safe_globals."""
