"""Switching off any one behaviour loses parity with transformers, so the parity tests would notice its absence."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from engine.config import Dtype
from engine.errors import CheckpointError
from engine.model_config import ModelConfig
from engine.models.registry import build_model
from engine.parallel.mesh import Mesh
from engine.weights.loader import load_weights
from tests.parity.architectures import ARCHITECTURES, PROMPT_LENGTHS
from tests.parity.mutations import MUTATIONS, Mutation
from tests.parity.reference import Reference
from tests.support.model_driver import ModelDriver, forced_logits

TOLERANCE = 1e-4


def largest_difference(made: Reference, config: ModelConfig) -> float:
    """Of the longest prompt's logits, and its continuation's, from the oracle's."""
    model = build_model(config, Mesh(), Dtype.FLOAT32, torch.device("cpu"))
    load_weights(model, made.directory)
    expected = made.generated[-1]
    logits = forced_logits(ModelDriver(model, Mesh(), torch.float32), expected, PROMPT_LENGTHS[-1])
    assert np.isfinite(logits).all()
    return float(np.abs(logits - expected.logits).max())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_unchanged(reference: Callable[[str], Reference], name: str) -> None:
    made = reference(name)
    assert largest_difference(made, ModelConfig.from_directory(made.directory)) <= TOLERANCE


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.behaviour)
def test_mutated(reference: Callable[[str], Reference], mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    made = reference(mutation.architecture)
    mutation.patch(monkeypatch)
    config = mutation.change(ModelConfig.from_directory(made.directory))
    if mutation.is_refused:
        with pytest.raises(CheckpointError, match=r"config\.json"):
            largest_difference(made, config)
    else:
        assert largest_difference(made, config) > 10 * TOLERANCE
