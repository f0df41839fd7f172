"""A part of a step on a CUDA stream of its own, beside what the current stream does meanwhile."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def on_side_stream(compute: Callable[[], Tensor], *reads: Tensor) -> Callable[[], Tensor]:
    """Begin ``compute()``; -> the function that lets the current stream wait for it and gives its result, once.

    reads: the tensors that it reads and that may be freed before the step ends. Inside a capture the two streams
    become branches of the graph. Elsewhere the allocator learns which tensors the other stream uses, too.
    """
    main, side = torch.cuda.current_stream(reads[0].device), _stream(reads[0].device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        result = compute()
    for x in reads:
        x.record_stream(side)

    def joined() -> Tensor:
        main.wait_stream(side)
        result.record_stream(main)
        return result

    return joined


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One per device, made when it is first needed; no method holds it, so methods can be copied and pickled."""
    return torch.cuda.Stream(device)
