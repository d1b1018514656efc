"""Computes texts of several adapters together. Ranks import it, so it knows neither transformers nor PEFT."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from engine.config import Dtype, ParallelConfig
from engine.model_config import ModelConfig
from engine.models.registry import build_model
from engine.parallel.distributed import init_distributed
from engine.parallel.mesh import Mesh
from engine.weights.adapter_loader import AdapterLoader
from engine.weights.loader import load_weights
from tests.support.model_driver import ModelDriver
from tests.support.rank_pool import RankContext


@dataclass(frozen=True)
class Adapted:
    """A base model's directory, its adapters', and for each of them (None: the base alone) the logits
    [tokens, vocabulary] of one text."""

    base: Path
    adapters: tuple[Path, Path]
    texts: dict[int | None, list[int]]
    logits: dict[int | None, np.ndarray] = field(repr=False)


_CHUNKS = {None: (9, 1, 16), 0: (1, 15, 1), 1: (12, 1, 8)}
"""How many tokens of each text are computed in each step."""


def mixed_logits(
    context: RankContext | None, made: Adapted, tp: int, ep: int, pp: int = 1, dp: int = 1
) -> dict[int | None, np.ndarray]:
    """Of all three texts, computed together, on tp rank 0 of the last stage. Of dp groups each leaves out one more."""
    mesh = Mesh()
    if context is not None:
        parallel = ParallelConfig(tp=tp, ep=ep, pp=pp, dp=dp)
        mesh = init_distributed(parallel, context.rank, context.store, torch.device("cpu"), timeout_s=30.0)
    model = build_model(ModelConfig.from_directory(made.base), mesh, Dtype.FLOAT32, torch.device("cpu"))
    load_weights(model, made.base)
    adapters = AdapterLoader(model, mesh)
    driver = ModelDriver(model, mesh, torch.float32)
    streams = {}
    # Not in the slots' order, and with a gap.
    for which, slot in ((None, -1), (0, 5), (1, 2)):
        streams[which] = driver.add(made.texts[which])
        streams[which].adapter = slot
        if which is not None:
            # A stage may have none of the layers that an adapter changes.
            assert adapters.load(slot, made.adapters[which], max_rank=64) > 0 or pp > 1
    streams = dict(list(streams.items())[mesh.dp_rank :])
    with torch.inference_mode():
        for step in range(3):
            driver.step([(stream, _CHUNKS[which][step]) for which, stream in streams.items()])
    if not driver.samples:
        return {}
    return {which: torch.cat(stream.logits).numpy() for which, stream in streams.items()}
