"""The shapes that are run in every layout: as many layers, heads and experts as eight ranks can divide; and the layouts
that are legal for them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path

import torch
import transformers

from engine.config import ParallelConfig
from engine.errors import LayoutError
from engine.model_config import ModelConfig, validate_layout
from tests.parity.architectures import GROUPED, LLAMA4, SCALED, SCOUT, Architecture, reference_of, rope
from tests.parity.reference import Reference

_DEGREES = (1, 2, 4, 8)
"""A gang has at most as many ranks as the largest."""
MANY_HOSTS = 3
_LAYERS = {"num_hidden_layers": 8}
_EXPERTS = {"num_local_experts": 8}

LAYOUT_MODELS: Mapping[str, Architecture] = {
    "llama3": Architecture(
        "Llama 3", transformers.LlamaConfig(**GROUPED | SCALED | _LAYERS | {"tie_word_embeddings": True}), ()
    ),
    "llama4-scout": Architecture(
        "Llama 4 Scout",
        transformers.Llama4TextConfig(**LLAMA4 | SCOUT | _LAYERS | _EXPERTS | {"interleave_moe_layer_step": 1}),
        (),
    ),
    "llama4-maverick": Architecture(
        "Llama 4 Maverick",
        transformers.Llama4TextConfig(
            **LLAMA4 | rope("default") | _LAYERS | _EXPERTS | {"interleave_moe_layer_step": 2, "use_qk_norm": False}
        ),
        (),
    ),
}


@dataclass(frozen=True)
class Case:
    """A model of LAYOUT_MODELS in one layout, its ranks divided among ``num_hosts``."""

    model: str
    parallel: ParallelConfig
    num_hosts: int

    def __str__(self) -> str:
        return f"{self.model}-{layout_name(self.parallel).replace(' ', '-')}-hosts{self.num_hosts}"

    @property
    def features(self) -> frozenset[tuple[str, object]]:
        values = {"model": self.model, "hosts": self.num_hosts}
        values |= {name: getattr(self.parallel, name) for name in ("pp", "dp", "tp", "ep")}
        return frozenset(values.items())


def layout_name(parallel: ParallelConfig) -> str:
    return f"pp{parallel.pp} dp{parallel.dp} tp{parallel.tp} ep{parallel.ep}"


def all_cases() -> list[Case]:
    """Every model in every legal layout of powers of two, on one host and, if it has several ranks, on several."""
    return [
        Case(name, parallel, num_hosts)
        for name, architecture in LAYOUT_MODELS.items()
        for parallel in _legal_layouts(ModelConfig.from_hf(_hf_config(architecture)))
        for num_hosts in ((1, MANY_HOSTS) if parallel.num_ranks > 1 else (1,))
    ]


def _hf_config(architecture: Architecture) -> dict[str, object]:
    config: dict[str, object] = architecture.config.to_dict()
    dense = isinstance(architecture.config, transformers.LlamaConfig)
    return config | {"architectures": ["LlamaForCausalLM" if dense else "Llama4ForCausalLM"]}


def _legal_layouts(model: ModelConfig) -> Iterator[ParallelConfig]:
    for pp, dp, tp, ep in product(_DEGREES, repeat=4):
        if pp * dp * tp <= max(_DEGREES) and ep <= dp * tp:
            parallel = ParallelConfig(tp=tp, pp=pp, dp=dp, ep=ep)
            try:
                validate_layout(model, parallel)
            except LayoutError:
                continue
            yield parallel


def pairwise(cases: Sequence[Case]) -> list[Case]:
    """Few of the cases in which every two features occur together that do in any; small gangs where there is a choice.

    Greedy, as AETG is (Cohen et al., IEEE TSE 23(7), 1997).
    """
    pairs = {case: {frozenset(pair) for pair in combinations(case.features, 2)} for case in cases}
    missing = set().union(*pairs.values())
    chosen = []
    while missing:
        best = max(cases, key=lambda case: (len(pairs[case] & missing) / (1 + case.parallel.num_ranks), str(case)))
        missing -= pairs[best]
        chosen.append(best)
    return chosen


def make_layout_reference(name: str, directory: Path) -> Reference:
    """A random checkpoint of LAYOUT_MODELS[name], and what transformers makes of it."""
    torch.manual_seed(len(name))
    return reference_of(LAYOUT_MODELS[name], directory)
