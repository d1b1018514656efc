"""A mixture whose router is ruled by the token: token t goes to expert t mod E, so that whoever chooses the tokens of a
prompt chooses the experts' loads."""

import random
from pathlib import Path

import torch
import transformers

NUM_EXPERTS = 16
HIDDEN, WIDTH, NUM_LAYERS = 512, 5120, 1
"""Wide, so that a step is little but experts."""
VOCAB_SIZE = 512
_STRENGTH = 20.0


def make_zipf_model(directory: Path, *, vocab_size: int = VOCAB_SIZE, width: int = WIDTH) -> None:
    """Mixtral's shape with one expert for each token. The first E numbers of a hidden state say which.

    ``vocab_size``: VOCAB_SIZE at least; prompts have none but its numbers.
    """
    torch.manual_seed(5)
    config = transformers.MixtralConfig(
        vocab_size=vocab_size,
        hidden_size=HIDDEN,
        intermediate_size=width,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=1,
        max_position_embeddings=2048,
        initializer_range=0.05,
    )
    model = transformers.MixtralForCausalLM(config).eval()
    with torch.no_grad():
        experts = torch.arange(vocab_size) % NUM_EXPERTS
        embedding = model.model.embed_tokens.weight
        embedding[:, :NUM_EXPERTS] = _STRENGTH * torch.nn.functional.one_hot(experts, NUM_EXPERTS)
        for layer in model.model.layers:
            gate = next(weight for name, weight in layer.named_parameters() if name.endswith("gate.weight"))
            gate.zero_()
            gate[:, :NUM_EXPERTS] = 10.0 * torch.eye(NUM_EXPERTS)
    model.save_pretrained(directory)


def prompt_for(loads: list[float], length: int, rng: random.Random) -> list[int]:
    """Tokens whose experts have these loads."""
    experts = rng.choices(range(NUM_EXPERTS), loads, k=length)
    return [rng.randrange(VOCAB_SIZE // NUM_EXPERTS) * NUM_EXPERTS + expert for expert in experts]


def zipf_loads() -> list[float]:
    """The busiest first, as a checkpoint may have them. With the exponent 1.3 the ranks' max ÷ mean is 2.2 while
    experts are in order; with 1 it is 2.0, and some runs are void."""
    return [(rank + 1) ** -1.3 for rank in range(NUM_EXPERTS)]
