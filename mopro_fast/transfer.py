"""Arrays as tensors, on the host or a device."""

import numpy as np
import torch


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Without waiting for the device."""
    tensor = tensor_of(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def tensor_of(array: np.ndarray) -> torch.Tensor:
    """Of the same memory, unless that is mapped and cannot be written, as of an index: then of a copy."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())
