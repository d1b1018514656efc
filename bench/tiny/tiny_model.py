"""remuda-tiny's shape (transformers' own Llama 4) and a training-only sparse forward of its MoE layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from tiny_tokenizer import BOS, END_OF_TEXT, EOT, MAX_LENGTH, PAD, SPECIAL_TOKENS, VOCAB_SIZE
from torch import Tensor
from transformers import Llama4ForCausalLM, Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe


def special_id(token: str) -> int:
    return VOCAB_SIZE - len(SPECIAL_TOKENS) + SPECIAL_TOKENS.index(token)


def tiny_config() -> Llama4TextConfig:
    """7.6 M parameters: 8 layers, every 2nd with 4 experts and a shared one, every 4th without RoPE and unchunked."""
    return Llama4TextConfig(
        architectures=["Llama4ForCausalLM"],
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=256,
        intermediate_size_mlp=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        num_local_experts=4,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        attention_chunk_size=128,
        attn_temperature_tuning=True,
        floor_scale=128,
        attn_scale=0.1,
        use_qk_norm=True,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=special_id(BOS),
        eos_token_id=[special_id(END_OF_TEXT), special_id(EOT)],
        pad_token_id=special_id(PAD),
    )


def new_model(seed: int) -> Llama4ForCausalLM:
    torch.manual_seed(seed)
    return Llama4ForCausalLM(tiny_config())


@dataclass
class RouterRecord:
    """What the routers of one forward pass did, in layer order."""

    logits: list[Tensor] = field(default_factory=list)  # each (tokens, experts)
    choices: list[Tensor] = field(default_factory=list)  # each (tokens,)

    def balance_loss(self, keep: Tensor) -> Tensor:
        """Switch Transformer's load-balance loss (arXiv 2101.03961, eq. 4) over the tokens where `keep`; 1 is even."""
        losses = []
        for logits, choice in zip(self.logits, self.choices, strict=True):
            num_experts = logits.shape[1]
            share = F.one_hot(choice[keep], num_experts).float().mean(0)
            losses.append(num_experts * (share * logits[keep].softmax(-1).mean(0)).sum())
        return torch.stack(losses).mean()


def _sparse_forward(moe: Llama4TextMoe, record: RouterRecord, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The same function as transformers' Llama4TextMoe (top-1), computing each token's one expert only."""
    flat = hidden.reshape(-1, moe.hidden_dim)
    logits = F.linear(flat, moe.router.weight)
    top, choice = logits.max(dim=-1)
    order = choice.argsort()
    counts = torch.bincount(choice, minlength=moe.num_experts).tolist()
    scaled = (flat * top.sigmoid().unsqueeze(-1))[order]
    outputs = []
    for expert, rows in enumerate(torch.split(scaled, counts)):
        gate, up = (rows @ moe.experts.gate_up_proj[expert]).chunk(2, dim=-1)
        outputs.append((up * moe.experts.act_fn(gate)) @ moe.experts.down_proj[expert])
    routed = torch.cat(outputs)[order.argsort()]
    record.logits.append(logits)
    record.choices.append(choice.detach())
    return moe.shared_expert(flat) + routed, logits


@contextmanager
def sparse_experts(model: Llama4ForCausalLM) -> Iterator[RouterRecord]:
    """Within this context the model's MoE layers run sparsely and leave their routing in the record."""
    record = RouterRecord()
    layers = [m for m in model.modules() if isinstance(m, Llama4TextMoe)]
    for layer in layers:
        # An attribute of the instance hides the class's method until it is deleted again.
        vars(layer)["forward"] = partial(_sparse_forward, layer, record)
    try:
        yield record
    finally:
        for layer in layers:
            del vars(layer)["forward"]
