"""One rank's pipeline stage in a step: hidden states in, its layers, hidden states out."""

import torch

from engine.attention.backend import KvCacheView, StepAttention
from engine.batch import ForwardBatch
from engine.models.registry import Model
from engine.parallel.mesh import Mesh


def run_stage(
    model: Model, mesh: Mesh, batch: ForwardBatch, cache: KvCacheView, attention: StepAttention
) -> torch.Tensor:
    """Hidden states [T, hidden_size] after this stage; they have been handed on where another follows.

    Raises RankFailure where a neighbour is lost.
    """
    hidden = None
    if mesh.previous is not None:
        hidden = mesh.previous.receive((len(batch.token_ids), model.config.hidden_size), model.dtype)
    hidden = model.forward(batch, cache, attention, hidden)
    if mesh.next is not None:
        mesh.next.send(hidden)
    return hidden
