"""Memory for kernel tests: tensors inside a buffer of a sentinel, so that a write outside them shows."""

import torch

BAND = 64  # elements before and after
SENTINEL = 77.0


class Guarded:
    """``tensor`` holds ``values``; it begins ``offset`` elements past an aligned address."""

    def __init__(self, values: torch.Tensor, device: str, offset: int = 0) -> None:
        n = values.numel()
        self.buffer = torch.full((2 * BAND + offset + n,), SENTINEL, device=device).to(values.dtype)
        self.begin, self.end = BAND + offset, BAND + offset + n
        self.tensor = self.buffer[self.begin : self.end].view(values.shape)
        self.tensor.copy_(values)
        self.before = self.buffer.clone()

    def pointer(self) -> int:
        return self.tensor.data_ptr()

    def check(self, written: bool) -> None:
        """Nothing outside the tensor has changed, nor inside unless ``written``."""
        before, now = (x.clone() for x in (self.before, self.buffer))
        if written:
            before[self.begin : self.end] = now[self.begin : self.end] = 0
        assert torch.equal(bits(before), bits(now)), "wrote outside the tensor" if written else "wrote to an input"


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


def name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")
