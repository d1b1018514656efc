"""What /metrics says, read by Prometheus's own parser."""

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.frontend.tokenizer import Tokenizer
from engine.errors import Overloaded
from engine.request import AdapterInfo, FinishReason, Output, Request
from engine.timeline import Waits
from tests.frontend.scripted import replica_info, says
from tests.frontend.servers import Served, served


async def scraped(one: Served) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    response = await one.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def value(samples: dict[Any, float], name: str, **labels: str) -> float:
    return samples[(name, tuple(sorted(labels.items())))]


async def test_requests_are_counted_under_both_names(tiny: Tokenizer) -> None:
    async with served(says([300, 301, 302], stop_token_id=2036, num_cached_tokens=2)) as one:
        prompt = tiny.encode("Hello")
        await one.http.post("/v1/completions", json={"prompt": "Hello"})
        await one.http.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 2})
        await one.http.post("/v1/completions", json={"prompt": "Hello", "top_p": 5})
        await one.http.get("/no/such/path/by/a/client")
        samples = await scraped(one)
        for prefix in ("remuda_", "vllm:"):
            assert value(samples, f"{prefix}time_to_first_token_seconds_count", model_name="m") == 2
            assert value(samples, f"{prefix}inter_token_latency_seconds_count", model_name="m") == 3 + 1
            assert value(samples, f"{prefix}request_decode_time_seconds_count", model_name="m") == 2
            assert value(samples, f"{prefix}e2e_request_latency_seconds_count", model_name="m") == 3
            assert value(samples, f"{prefix}prompt_tokens_total", model_name="m") == 2 * len(prompt)
            assert value(samples, f"{prefix}generation_tokens_total", model_name="m") == 4 + 2
        assert value(samples, "remuda_cached_prompt_tokens_total", model_name="m") == 4
        assert value(samples, "remuda_requests_total", model_name="m", outcome="completed") == 2
        assert value(samples, "remuda_requests_total", model_name="m", outcome="InvalidRequest") == 1
        assert value(samples, "remuda_choices_total", model_name="m", finished_reason="stop") == 1
        assert value(samples, "remuda_choices_total", model_name="m", finished_reason="length") == 1
        assert value(samples, "remuda_http_responses_total", route="/v1/completions", status="200") == 2
        assert value(samples, "remuda_http_responses_total", route="/v1/completions", status="400") == 1
        assert value(samples, "remuda_http_responses_total", route="other", status="404") == 1
        assert value(samples, "remuda_live_requests", model_name="m") == 0


async def test_replicas_gauges_are_those_routers_scrape() -> None:
    async with served(says([300])) as one:
        one.backend.infos = [
            replica_info(id="a", num_running=3, num_waiting=2, kv_cache_usage=0.25, num_steps=7),
            replica_info(id="b", num_running=1, num_waiting=0, kv_cache_usage=0.5),
        ]
        samples = await scraped(one)
        for prefix in ("remuda_", "vllm:"):
            assert value(samples, f"{prefix}num_requests_running", model_name="m") == 4
            assert value(samples, f"{prefix}num_requests_waiting", model_name="m") == 2
            assert value(samples, f"{prefix}kv_cache_usage_perc", model_name="m") == 0.5
            assert value(samples, f"{prefix}cache_config_info", block_size="16", num_gpu_blocks="64") == 1
        assert value(samples, "remuda_replicas", model_name="m", state="ready") == 2
        assert value(samples, "remuda_replicas", model_name="m", state="failed") == 0
        assert value(samples, "remuda_steps_total", model_name="m", replica="a") == 7


async def test_adapters_that_requests_run_with_or_wait_for_are_shown() -> None:
    begins, goes_on = asyncio.Event(), asyncio.Event()

    async def script(request: Request) -> AsyncGenerator[Output, None]:
        if request.adapter == "tone":
            yield Output(request.request_id, [300])
            begins.set()
        await goes_on.wait()
        yield Output(request.request_id, [301], FinishReason.LENGTH)

    async with served(script) as one:
        one.backend.infos = [replica_info(adapters=(AdapterInfo("tone", "/t"), AdapterInfo("law", "/l")), max_loras=4)]
        bodies = [{"prompt": "Hello", "model": model, "max_tokens": 2} for model in ("tone", "law", "m")]
        asked = [asyncio.create_task(one.http.post("/v1/completions", json=body)) for body in bodies]
        await begins.wait()
        await one.backend.until(lambda: len(one.backend.requests) == 3)
        labels = {"max_lora": "4", "running_lora_adapters": "tone", "waiting_lora_adapters": "law"}
        assert value(await scraped(one), "vllm:lora_requests_info", **labels) == pytest.approx(time.time(), abs=60)
        goes_on.set()
        assert [response.status_code for response in await asyncio.gather(*asked)] == [200] * 3
        labels |= {"running_lora_adapters": "", "waiting_lora_adapters": ""}
        assert value(await scraped(one), "vllm:lora_requests_info", **labels) > 0


async def test_all_names_that_routers_read_are_there() -> None:
    """Those of the Gateway API inference extension's protocol for model servers."""
    async with served(says([300])) as one:
        response = await one.http.get("/metrics")
    kinds = {family.name: family.type for family in text_string_to_metric_families(response.text)}
    histograms = ["time_to_first_token", "inter_token_latency", "e2e_request_latency"]
    histograms += [f"request_{phase}_time" for phase in ("queue", "prefill", "decode", "inference")]
    gauges = ["num_requests_waiting", "num_requests_running", "kv_cache_usage_perc", "cache_config_info"]
    expected = {f"vllm:{name}_seconds": "histogram" for name in histograms}
    expected |= {f"vllm:{name}": "gauge" for name in (*gauges, "lora_requests_info")}
    assert expected.items() <= kinds.items()


async def test_no_label_holds_what_a_client_wrote() -> None:
    async def script(request: Request) -> AsyncGenerator[Output, None]:
        raise Overloaded("full")
        yield

    async with served(script) as one:
        await one.http.post("/v1/chat/completions", json={"model": "evil", "messages": [{"role": "u", "content": "x"}]})
        await one.http.get("/v1/models/evil")
        await one.http.get("/evil")
        text = (await one.http.get("/metrics")).text
        assert "evil" not in text


async def test_where_a_choice_waited_is_shown_once() -> None:
    async def script(request: Request) -> AsyncGenerator[Output, None]:
        yield Output(request.request_id, [], waits=Waits(2.0, 0.5))
        yield Output(request.request_id, [300])
        # A replica that took over had it wait too.
        yield Output(request.request_id, [301], FinishReason.LENGTH, waits=Waits(40.0, 40.0))

    async with served(script) as one:
        await one.http.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 2})
        samples = await scraped(one)
        for prefix in ("remuda_", "vllm:"):
            for phase, seconds in (("queue", 2.0), ("prefill", 0.5)):
                assert value(samples, f"{prefix}request_{phase}_time_seconds_sum", model_name="m") == seconds
                assert value(samples, f"{prefix}request_{phase}_time_seconds_count", model_name="m") == 1
            assert value(samples, f"{prefix}request_inference_time_seconds_sum", model_name="m") >= 0.5
            assert value(samples, f"{prefix}request_inference_time_seconds_count", model_name="m") == 1
