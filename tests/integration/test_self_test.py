"""A replica that does not compute what its checkpoint should give does not become ready."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from cluster.cli.golden import record
from cluster.config import Device, ServeConfig
from cluster.control.preflight import preflight
from cluster.errors import SelfTestFailed
from cluster.replica.self_test import SelfTest
from engine.config import Dtype, SchedulerConfig
from engine.engine import Engine
from engine.executor.in_process import InProcessExecutor
from engine.executor.worker_config import WorkerConfig
from engine.model_config import ModelConfig, kv_groups
from engine.weights.golden import TOLERANCES, GoldenPrompt, GoldenStep, read_golden
from tests.support.served import free_port, run_remuda

TINY = Path(__file__).parents[2] / "engine" / "assets" / "remuda-tiny"
Weights = dict[str, torch.Tensor]


def zero_a_projection(weights: Weights) -> None:
    weights["model.layers.3.self_attn.o_proj.weight"].zero_()


def swap_two_experts(weights: Weights) -> None:
    for name in ("gate_up_proj", "down_proj"):
        experts = weights[f"model.layers.3.feed_forward.experts.{name}"]
        experts[[0, 1]] = experts[[1, 0]]


def inflate_the_last_norm(weights: Weights) -> None:
    weights["model.norm.weight"].fill_(3e38)


def copy_of_tiny(directory: Path, change: Callable[[Weights], None] | None = None) -> Path:
    copy = Path(shutil.copytree(TINY, directory / "model"))
    if change is not None:
        weights = load_file(copy / "model.safetensors")
        change(weights)
        save_file(weights, copy / "model.safetensors", {"format": "pt"})
    return copy


def dense_model(directory: Path) -> Path:
    """Random weights, and remuda-tiny's tokenizer."""
    copy = copy_of_tiny(directory)
    for name in ("model.safetensors", "remuda-golden.json"):
        (copy / name).unlink()
    config = transformers.LlamaConfig(
        vocab_size=ModelConfig.from_directory(TINY).vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.2,
        eos_token_id=None,
    )
    torch.manual_seed(1)
    config.dtype = torch.bfloat16
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(copy)
    return copy


def change_one_byte(checkpoint: Path) -> None:
    """Of the last norm's first weight: the one with its sign."""
    path = checkpoint / "model.safetensors"
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    begin, _ = json.loads(content[8 : 8 + length])["model.norm.weight"]["data_offsets"]
    content[8 + length + begin + 1] ^= 0x80
    path.write_bytes(content)


def config_of(checkpoint: Path, dtype: Dtype, tp: int = 1) -> ServeConfig:
    return ServeConfig(model=str(checkpoint), dtype=dtype.value, device=Device.CPU, tensor_parallel_size=tp)


@contextmanager
def under_test(checkpoint: Path, dtype: Dtype = Dtype.BFLOAT16) -> Iterator[tuple[SelfTest, Engine]]:
    model = ModelConfig.from_directory(checkpoint)
    executor = InProcessExecutor(
        WorkerConfig(
            rank=0,
            channel_address="",
            secret="",
            model=str(checkpoint),
            dtype=dtype,
            max_num_seqs=8,
            max_num_batched_tokens=64,
            kv_cache_memory_bytes=2**24,
        )
    )
    ready = executor.ready
    engine = Engine(
        executor=executor,
        kv_groups=kv_groups(model),
        vocab_size=model.vocab_size,
        scheduler_config=SchedulerConfig(8, 64, ready.max_model_len),
        cache_config=ready.cache,
    )
    plan = preflight(config_of(checkpoint, dtype)).launch.replica
    try:
        yield SelfTest(plan, checkpoint, model, ready.max_model_len), engine
        assert engine.stats().num_blocks_used == 0
        engine.check_integrity()
    finally:
        executor.close()


def test_the_embedded_model_is_what_was_recorded() -> None:
    with under_test(TINY) as (test, engine):
        assert test.run(engine, read_golden(TINY)) == "4 golden prompts reproduced"


@pytest.mark.parametrize("fault", [zero_a_projection, swap_two_experts])
def test_a_wrong_weight_is_found_and_named(tmp_path: Path, fault: Callable[[Weights], None]) -> None:
    checkpoint = copy_of_tiny(tmp_path, fault)
    with under_test(checkpoint) as (test, engine):
        with pytest.raises(SelfTestFailed, match=r"prompt \d \(.*\), position \d+: expected .* found"):
            test.run(engine, read_golden(checkpoint))
        assert test.run(engine, None) == "smoke test passed"


def test_what_is_not_finite_fails_the_smoke_test(tmp_path: Path) -> None:
    checkpoint = copy_of_tiny(tmp_path, inflate_the_last_norm)
    with (
        under_test(checkpoint) as (test, engine),
        pytest.raises(SelfTestFailed, match="position 16 are NaN or infinite; the replica does not become ready"),
    ):
        test.run(engine, None)


@pytest.mark.parametrize("changes", [{"quantization": "int4"}, {"layout": {"tp": 2, "pp": 1, "dp": 1, "ep": 1}}])
def test_what_was_recorded_under_other_conditions_is_not_compared(changes: dict[str, object]) -> None:
    golden = read_golden(TINY)
    assert golden is not None
    with under_test(TINY) as (test, engine):
        before = engine.stats().num_steps
        assert test.run(engine, msgspec.structs.replace(golden, **changes)) == "smoke test passed"
        assert engine.stats().num_steps - before <= 2 * (1 + 8)


def test_in_float32_a_record_of_another_layout_is_met(tmp_path: Path) -> None:
    checkpoint = copy_of_tiny(tmp_path)
    record(config_of(checkpoint, Dtype.FLOAT32, tp=2))
    golden = read_golden(checkpoint)
    assert golden is not None and golden.layout["tp"] == 2
    with under_test(checkpoint, Dtype.FLOAT32) as (test, engine):
        assert test.run(engine, golden) == "4 golden prompts reproduced"


def test_in_bfloat16_a_record_of_another_layout_of_a_dense_model_is_met(tmp_path: Path) -> None:
    """And a wrong weight is found by it."""
    checkpoint = dense_model(tmp_path)
    record(config_of(checkpoint, Dtype.BFLOAT16, tp=2))
    golden = read_golden(checkpoint)
    assert golden is not None and (golden.layout["tp"], golden.dtype) == (2, Dtype.BFLOAT16)
    with under_test(checkpoint) as (test, engine):
        assert test.run(engine, golden) == "4 golden prompts reproduced"
    weights = load_file(checkpoint / "model.safetensors")
    zero_a_projection(weights)
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    with under_test(checkpoint) as (test, engine), pytest.raises(SelfTestFailed, match="expected .* found"):
        test.run(engine, golden)


def test_a_near_tie_is_followed_as_it_was_recorded() -> None:
    """The recorded token is the second best of two that are about as likely; what follows it is compared, too."""
    golden = read_golden(TINY)
    assert golden is not None
    gaps = {
        (step.top[0][1] - step.top[1][1], number, position)
        for number, prompt in enumerate(golden.prompts)
        for position, step in enumerate(prompt.steps)
    }
    gap, number, position = min(gaps)
    assert gap < 2 * TOLERANCES[Dtype.BFLOAT16]
    prompt = golden.prompts[number]
    before = [*prompt.token_ids, *prompt.continuation[:position]]
    tie = GoldenStep(prompt.steps[position].top[1][0], prompt.steps[position].top)
    with under_test(TINY) as (test, engine):
        after = test.record(engine, [("after", [*before, tie.token_id])]).prompts[0].steps
        wanted = GoldenPrompt("tie", before, [tie, *after])
        test.run(engine, msgspec.structs.replace(golden, prompts=[wanted]))
        wrong = GoldenStep(after[-1].token_id, [(after[-1].token_id, -9.0)])
        wanted = GoldenPrompt("tie", before, [tie, *after[:-1], wrong])
        place = len(before) + len(after)
        with pytest.raises(SelfTestFailed, match=rf"\('tie'\), position {place}: expected log-probability -9"):
            test.run(engine, msgspec.structs.replace(golden, prompts=[wanted]))


def test_serve_refuses_one_wrong_byte(tmp_path: Path) -> None:
    """Real processes; there is no manifest, so that only the self-test can find it."""
    checkpoint = copy_of_tiny(tmp_path)
    change_one_byte(checkpoint)
    ports = ("--port", str(free_port()), "--grpc-port", str(free_port()))
    result = run_remuda("serve", str(checkpoint), "--device", "cpu", "--dtype", "bfloat16", *ports)
    assert result.returncode == 1, result.stderr
    assert re.search(r"self-test: prompt \d \(.*\), position \d+: expected log-probability", result.stderr)
    assert "the replica does not become ready" in result.stderr
    assert "of files that were not the present ones" in result.stderr
