"""A rank's own check before it allocates anything: whoever started it may not know this device's memory."""

import psutil
import torch

from engine.config import Dtype
from engine.errors import DoesNotFit
from engine.model_config import ModelConfig
from engine.parallel.mesh import Mesh
from engine.weights.ledger import shard_bytes


def check_memory(config: ModelConfig, mesh: Mesh, dtype: Dtype, device: torch.device, utilization: float) -> None:
    """``utilization``: share of a GPU's memory that the rank may use.

    Raises DoesNotFit where the weights alone are more than it may use and others have left.
    """
    refuse_too_large(shard_bytes(config, mesh.config, mesh.rank, dtype).total, _room(device, utilization), mesh.rank)


def refuse_too_large(weight_bytes: int, room_bytes: int, rank: int) -> None:
    """Raises DoesNotFit."""
    if weight_bytes > room_bytes:
        raise DoesNotFit(
            f"rank {rank} lacks {weight_bytes - room_bytes:,} bytes: its weights are {weight_bytes:,} and its device "
            f"has room for {room_bytes:,}; remuda plan finds a layout that fits"
        )


def _room(device: torch.device, utilization: float) -> int:
    if device.type != "cuda":
        available: int = psutil.virtual_memory().available
        return available
    free, total = torch.cuda.mem_get_info(device)
    return min(free, int(utilization * total))
