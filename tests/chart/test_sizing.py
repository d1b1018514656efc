"""The chart takes the values that `remuda plan` made it, and none that would need more than that answer had."""

import math

import helm_python
import pytest

from cluster.plan.report import as_object
from engine.executor.defaults import default_limits
from tests.chart.presets import QUESTIONS, Question, report_of
from tests.chart.rendering import PRESETS, Values, at, merged, preset, render

ONE_HOST: Values = {"parallel": {"pipeline": 1}, "engine": {"hosts": 1}}

REFUSED: list[tuple[str, Values, list[str]]] = [
    (
        "405b-bf16",
        ONE_HOST,
        ["parallel.pipeline = 1 (sized for 2)", "engine.hosts = 1 (sized for 2)", "Llama-3.1-405B on 2x8xH100-80"],
    ),
    ("405b-bf16", at("engine.device", "cpu"), ['engine.device = "cpu" (sized for "cuda")']),
    ("405b-fp8", at("model.path", "Llama-3.1-405B"), ['model.path = "Llama-3.1-405B"', "set sizing.model.path"]),
    ("405b-fp8", at("model.dtype", "float32"), ["model.dtype"]),
    ("70b", at("model.quantization", "int8"), ['model.quantization = "int8"']),
    ("maverick-fp8", at("model.maxLen", 1048576), ["model.maxLen = 1048576 (sized for 131072)"]),
    ("70b", at("model.maxNumSeqs", 512), ["model.maxNumSeqs = 512 (sized for 256)"]),
    ("70b", at("model.extraArgs", ["--max-num-batched-tokens=65536"]), ["model.extraArgs", "65536"]),
    ("scout", at("model.extraArgs", ["--enable-eplb", "--num-redundant-experts=4"]), ["model.extraArgs"]),
    ("scout", at("parallel.expert", 2), ["parallel.expert = 2 (sized for 4)"]),
    ("scout", at("engine.gpuMemoryUtilization", 0.5), ["engine.gpuMemoryUtilization = 0.5 (sized for 0.9)"]),
    ("cpu-demo", at("engine.kvCacheMemory", "2GiB"), ["engine.kvCacheMemory"]),
    ("cpu-demo", at("engine.resources.memory", "512Mi"), ["engine.resources.memory = 512Mi"]),
]

TAKEN: list[tuple[str, Values]] = [
    ("405b-bf16", at("model.path", "shared/meta/Llama-3.1-405B")),
    ("405b-bf16", {"model": {"path": "llama"}, "sizing": {"model": {"path": "llama"}}}),
    ("405b-bf16", at("model.dtype", "bfloat16")),
    ("405b-bf16", at("engine.gpuMemoryUtilization", 0.95)),
    ("maverick-fp8", at("model.maxLen", 65536)),
    ("maverick-fp8", at("model.maxLen", "auto")),
    ("70b", at("model.maxNumSeqs", 64)),
    (
        "70b",
        {"model": {"extraArgs": ["--guided-decoding-backend=xgrammar"]}, "engine": {"mode": "kuberay", "replicas": 3}},
    ),
    ("cpu-demo", {"engine": {"kvCacheMemory": "64MiB", "resources": {"memory": "4Gi"}}}),
]


@pytest.mark.parametrize(("name", "values", "words"), REFUSED, ids=lambda one: one if isinstance(one, str) else "")
def test_what_was_not_sized_is_refused_by_name(name: str, values: Values, words: list[str]) -> None:
    with pytest.raises(helm_python.HelmRenderError) as raised:
        render(merged(preset(name), values))
    message = str(raised.value)
    assert all(word in message for word in [*words, "remuda plan --format helm", "sizing to null"]), message


@pytest.mark.parametrize(("name", "values"), TAKEN, ids=lambda one: one if isinstance(one, str) else "")
def test_what_takes_no_more_is_taken(name: str, values: Values) -> None:
    assert render(merged(preset(name), values))


def test_what_plan_refuses_is_refused_until_the_block_is_dropped() -> None:
    assert not report_of(Question("Llama-3.1-405B", "8xH100-80")).plan.fits
    values = merged(preset("405b-bf16"), ONE_HOST)
    with pytest.raises(helm_python.HelmRenderError, match="sizing"):
        render(values)
    assert render(merged(values, {"sizing": None}))


@pytest.mark.parametrize("name", PRESETS)
def test_the_bytes_are_plans(name: str) -> None:
    answer, written = as_object(report_of(QUESTIONS[name])), preset(name)["sizing"]
    assert written["availableBytes"] == sum(rank["budget_bytes"] for rank in answer["ranks"])
    parts = ("weight_bytes", "activation_bytes", "buffer_bytes")
    beside = sum(rank[part] for rank in answer["ranks"] for part in parts) + sum(
        sum(rank["bounded"].values()) for rank in answer["ranks"]
    )
    one_request = written["neededBytes"] - beside
    assert 0 < one_request <= sum(rank["kv_cache_bytes"] for rank in answer["ranks"])
    assert written["neededBytes"] <= written["availableBytes"]
    if name.startswith("405b"):
        # Full attention: a block for every 16 tokens, and one that is never handed out.
        blocks = math.ceil((answer["max_model_len"] - 1) / 16) + 1
        assert one_request == blocks * sum(rank["kv_block_bytes"] for rank in answer["ranks"])


@pytest.mark.parametrize(("name", "device"), [("70b", "cuda"), ("cpu-demo", "cpu")])
def test_no_number_of_requests_is_the_devices_default(name: str, device: str) -> None:
    default = default_limits(device).max_num_seqs
    assert preset(name)["sizing"]["model"]["maxNumSeqs"] == default
    fewer = merged(preset(name), at("sizing.model.maxNumSeqs", default - 1))
    with pytest.raises(helm_python.HelmRenderError, match=rf"model\.maxNumSeqs = 0 \(sized for {default - 1}\)"):
        render(fewer)
    assert render(merged(fewer, at("model.maxNumSeqs", default - 1)))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (at("sizing.gpus", "8xH100-80"), "neededBytes"),
        (at("sizing.neededBytes", 1), "gpus"),
        (merged(preset("70b"), at("sizing.model.length", 1)), "length"),
        (merged(preset("70b"), at("sizing.parallel", {"tensor": 0})), "tensor"),
    ],
)
def test_the_schema_takes_the_whole_block_or_none(values: Values, words: str) -> None:
    with pytest.raises(helm_python.HelmValuesError) as raised:
        render(values)
    assert "/sizing" in str(raised.value) and words in str(raised.value)
