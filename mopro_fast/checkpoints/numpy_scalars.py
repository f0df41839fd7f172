"""Numbers of NumPy in files of torch.save: read as Python's own, by none of NumPy's functions."""

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


GLOBALS = [(_Type, "numpy.dtype"), *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core"))]
"""For torch.serialization.safe_globals."""
