"""Layers as single native calls: the same tokens and the same bits as layer by layer, alone and in a gang."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.config import Dtype, LoadFormat, SchedulerConfig
from engine.engine import Engine
from engine.executor.channel_executor import ChannelExecutor
from engine.executor.in_process import InProcessExecutor
from engine.executor.process_gang import ProcessGang
from engine.executor.worker_config import WorkerConfig
from engine.kernels.decoder_layer import has_decoder_layer
from engine.layers import native_decoder
from engine.layers.decoder import DecoderModel
from engine.model_config import ModelConfig, kv_groups
from engine.request import Request, SamplingParams

pytestmark = pytest.mark.skipif(not has_decoder_layer(), reason="needs a CPU with AMX and the native library")

PROMPT_LENGTHS = (1, 5, 33, 90, 17)
NUM_NEW = 6
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 20}
LLAMA4: dict[str, Any] = LLAMA | {
    "architectures": ["Llama4ForCausalLM"],
    "model_type": "llama4_text",
    "intermediate_size": 96,
    "intermediate_size_mlp": 192,
    "num_hidden_layers": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 2,
    "moe_layers": [1, 3],
    "no_rope_layers": [1, 1, 1, 0],
    "attention_chunk_size": 32,
    "attn_temperature_tuning": True,
    "floor_scale": 8,
    "attn_scale": 0.1,
    "use_qk_norm": True,
    "rope_scaling": None,
}
"""Dense layers and mixtures; chunked attention with norms after rotation in pairs, and scaled queries without one."""
LLAMA4_WIDE = LLAMA4 | {"intermediate_size": 128}
MIXTRAL = LLAMA | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "intermediate_size": 64,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
}
"""No shared expert; scores multiply the outputs of two experts."""

Answers = list[tuple[list[int], list[float]]]
"""By request its tokens and their log-probabilities."""


def directory_of(config: dict[str, Any], folder: Path) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def worker(model: str, tp: int, quantization: str | None, load_format: LoadFormat = LoadFormat.DUMMY) -> WorkerConfig:
    return WorkerConfig(
        rank=0,
        channel_address="",
        secret="",
        model=model,
        tp=tp,
        dtype=Dtype.BFLOAT16,
        load_format=load_format,
        quantization=quantization,
        max_num_seqs=8,
        max_num_batched_tokens=40,
        block_size=16,
        kv_cache_memory_bytes=2**22,
    )


def serve(executor: ChannelExecutor, cache: object, model: str, max_model_len: int) -> Answers:
    """All prompts at once, so that chunks of some are computed beside tokens of others."""
    config = ModelConfig.from_directory(model)
    engine = Engine(
        executor=executor,
        kv_groups=kv_groups(config),
        vocab_size=config.vocab_size,
        scheduler_config=SchedulerConfig(8, 40, max_model_len),
        cache_config=cache,  # type: ignore[arg-type]
    )
    generator = random.Random(1)
    for index, length in enumerate(PROMPT_LENGTHS):
        prompt = [generator.randrange(512) for _ in range(length)]
        sampling = SamplingParams(NUM_NEW, temperature=0.0, logprobs=0)
        engine.add(Request(str(index), prompt, length, sampling))
    answers: Answers = [([], []) for _ in PROMPT_LENGTHS]
    while engine.has_work:
        for output in engine.step():
            tokens, logprobs = answers[int(output.request_id)]
            tokens += output.token_ids
            logprobs += [entry.logprob for entry in output.logprobs or []]
    return answers


def alone(model: str, quantization: str | None, load_format: LoadFormat = LoadFormat.DUMMY) -> Answers:
    executor = InProcessExecutor(worker(model, 1, quantization, load_format))
    try:
        return serve(executor, executor.ready.cache, model, executor.ready.max_model_len)
    finally:
        executor.close()


@pytest.fixture
def native_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Of each, whether it was the whole layer."""
    calls: list[bool] = []
    run = native_decoder.NativeStep.run

    def counted(
        self: native_decoder.NativeStep, layer: native_decoder.NativeDecoderLayer, *arguments: object
    ) -> torch.Tensor:
        calls.append(layer.is_whole)
        return run(self, layer, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(native_decoder.NativeStep, "run", counted)
    yield calls


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize(
    "config",
    [LLAMA, MISTRAL, LLAMA4, LLAMA4_WIDE, MIXTRAL],
    ids=["llama", "mistral", "llama4", "llama4-wide", "mixtral"],
)
def test_bits_are_those_of_layer_by_layer(
    config: dict[str, Any],
    quantization: str | None,
    tmp_path: Path,
    native_calls: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = directory_of(config, tmp_path)
    native = alone(model, quantization)
    assert len(native_calls) > 3 * NUM_NEW
    # int8 experts are grouped where their width is a multiple of 64.
    has_narrow_experts = config["architectures"] == ["Llama4ForCausalLM"] and config["intermediate_size"] % 64
    assert all(native_calls) == (quantization is None or not has_narrow_experts)
    monkeypatch.setattr(DecoderModel, "_native_step", lambda *arguments: None)
    native_calls.clear()
    assert alone(model, quantization) == native
    assert not native_calls


def test_what_the_native_layer_lacks_is_computed_layer_by_layer(tmp_path: Path, native_calls: list[bool]) -> None:
    config = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    assert len(alone(directory_of(config, tmp_path), None)) == len(PROMPT_LENGTHS)
    assert not native_calls


def test_ranks_add_up_their_parts(tmp_path: Path) -> None:
    config = LlamaConfig(
        **{name: value for name, value in LLAMA.items() if name not in ("architectures", "model_type")}
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    model = str(tmp_path)
    expected = alone(model, None, LoadFormat.SAFETENSORS)
    gang = ProcessGang(worker(model, 2, None, LoadFormat.SAFETENSORS))
    try:
        found = serve(gang, gang.ready.cache, model, gang.ready.max_model_len)
    finally:
        gang.close()
    for (_, logprobs), (_, other_logprobs) in zip(expected, found, strict=True):
        # Later ones may belong to other tokens: in bfloat16 two may be nearly equal.
        assert logprobs[0] == pytest.approx(other_logprobs[0], abs=0.02)
