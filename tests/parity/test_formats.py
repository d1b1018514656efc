"""bfloat16 against transformers."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import transformers

from engine.config import Dtype
from engine.model_config import ModelConfig
from engine.models.registry import build_model
from engine.parallel.mesh import Mesh
from engine.weights.loader import load_weights
from tests.parity.architectures import PROMPT_LENGTHS
from tests.parity.reference import Reference
from tests.support.model_driver import ModelDriver, forced_logits


@pytest.mark.parametrize(
    "name", ["llama3.1", "llama4-scout", "llama4-maverick", "mistral", "mixtral", "qwen3", "qwen3-moe"]
)
@torch.no_grad()
def test_bfloat16_is_as_exact_as_transformers(reference: Callable[[str], Reference], name: str) -> None:
    """Distance from the float32 logits, against that of transformers in bfloat16 on the same text."""
    made = reference(name)
    expected = made.generated[-1]
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        made.directory, dtype=torch.bfloat16, attn_implementation="eager"
    )
    oracle_logits = oracle(torch.tensor([expected.token_ids[:-1]])).logits[0].float().numpy()
    model = build_model(ModelConfig.from_directory(made.directory), Mesh(), Dtype.BFLOAT16, torch.device("cpu"))
    load_weights(model, made.directory)
    logits = forced_logits(ModelDriver(model, Mesh(), torch.bfloat16), expected, PROMPT_LENGTHS[-1])
    ours, theirs = (float(np.abs(values - expected.logits).mean()) for values in (logits, oracle_logits))
    assert theirs < 0.3 * expected.logits.std(), "the oracle itself must mean something"
    assert ours <= 1.5 * theirs
