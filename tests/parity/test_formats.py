"""bfloat16, and checkpoints in which the text model is nested, against transformers."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from engine.config import Dtype
from engine.model_config import ModelConfig
from engine.models.registry import build_model
from engine.parallel.mesh import Mesh
from engine.weights.loader import load_weights
from tests.parity.architectures import CONFIGS, PROMPT_LENGTHS, Reference, continue_greedily, prompts, randomize
from tests.support.model_driver import ModelDriver, forced_logits, run_model


@pytest.mark.parametrize("name", ["llama2", "llama3.1", "llama4-scout", "llama4-maverick"])
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


def test_text_model_within_a_vision_model(tmp_path: Path) -> None:
    """Llama4ForConditionalGeneration, as the hub's Llama 4 checkpoints are: the text part is served."""
    vision = transformers.Llama4VisionConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128, image_size=28, patch_size=14
    )
    config = transformers.Llama4Config(vision_config=vision, text_config=CONFIGS["llama4-scout"].to_dict())
    torch.manual_seed(3)
    oracle = transformers.Llama4ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    randomize(oracle)
    oracle.save_pretrained(tmp_path)
    parsed = ModelConfig.from_directory(tmp_path)
    assert parsed.architecture == "Llama4ForConditionalGeneration"
    expected = continue_greedily(oracle, prompts()[1])
    ours = run_model(parsed, str(tmp_path), Mesh(), Dtype.FLOAT32, [prompts()[1]], 14)["together"][0]
    assert ours.token_ids == expected.token_ids
    np.testing.assert_allclose(ours.logits, expected.logits, rtol=0, atol=1e-4)
