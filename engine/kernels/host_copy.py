"""From the host's memory to a device's, without waiting for it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


def to_device(values: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """A copy of ``values``, or on CPU the same memory. A GPU reads it when its stream comes to it; the host goes on."""
    on_host = torch.from_numpy(values)
    # From pinned memory only does a copy run beside the host. torch gives it to nobody else before it has been read.
    return on_host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else on_host


def to_device_together(arrays: Sequence[npt.NDArray[np.int64]], device: torch.device) -> list[torch.Tensor]:
    """The same for several arrays of int64, in one copy: a decoding step's inputs are many and small."""
    if device.type != "cuda":
        return [torch.from_numpy(array) for array in arrays]
    flat = to_device(np.concatenate([array.ravel() for array in arrays]), device)
    parts = flat.split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]
