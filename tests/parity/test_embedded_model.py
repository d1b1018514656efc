"""The embedded, really trained model in the demonstration's layout, on real text, against transformers in float32."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from engine.config import Dtype
from tests.parity.architectures import continue_greedily
from tests.support.model_driver import run_rank
from tests.support.rank_pool import run_ranks

DIRECTORY = Path(__file__).parents[2] / "engine" / "assets" / "remuda-tiny"
NUM_NEW = 12
QUESTION = "My name is Alice and I keep horses in a small town. What is my name? "


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 2)])
def test_greedy_answers(tp: int, ep: int) -> None:
    """One prompt within a chunk of 128 positions, one over several."""
    torch.set_num_threads(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(DIRECTORY)
    texts = [QUESTION, QUESTION * 7]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    assert len(prompts[0]) < 128 < len(prompts[1]) < 400
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        DIRECTORY, dtype=torch.float32, attn_implementation="eager"
    )
    expected = [continue_greedily(oracle, prompt, NUM_NEW) for prompt in prompts]
    generated = run_ranks(run_rank, tp, str(DIRECTORY), tp, ep, Dtype.FLOAT32, prompts, NUM_NEW)[0]
    for ours in generated.values():
        for mine, theirs in zip(ours, expected, strict=True):
            assert mine.token_ids == theirs.token_ids
            np.testing.assert_allclose(mine.logits, theirs.logits, rtol=0, atol=1e-4 * max(1.0, theirs.logits.std()))
