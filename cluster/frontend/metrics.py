"""Prometheus metrics: our own names, and the same values under the names that inference routers already scrape."""

import time
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.metrics_core import CounterMetricFamily
from prometheus_client.samples import Sample

from cluster.frontend.calls import Usage
from cluster.types import ReplicaInfo, ReplicaState
from engine.request import FinishReason
from engine.scheduler.expert_stats import ExpertStats
from engine.timeline import Waits

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FIRST_TOKEN_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
_NEXT_TOKEN_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5, 5)
_WHOLE_BUCKETS_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280)

_ALSO_AS = {
    "remuda_time_to_first_token_seconds": "vllm:time_to_first_token_seconds",
    "remuda_inter_token_latency_seconds": "vllm:inter_token_latency_seconds",
    "remuda_e2e_request_latency_seconds": "vllm:e2e_request_latency_seconds",
    "remuda_request_queue_time_seconds": "vllm:request_queue_time_seconds",
    "remuda_request_prefill_time_seconds": "vllm:request_prefill_time_seconds",
    "remuda_request_decode_time_seconds": "vllm:request_decode_time_seconds",
    "remuda_request_inference_time_seconds": "vllm:request_inference_time_seconds",
    "remuda_prompt_tokens": "vllm:prompt_tokens",
    "remuda_generation_tokens": "vllm:generation_tokens",
}


class Metrics:
    """Every label's values are bounded: none is taken from what a client wrote.

    Args:
        model: the served name, label ``model_name`` of everything.
        replicas: read at each scrape.
    """

    def __init__(self, model: str, replicas: Callable[[], Sequence[ReplicaInfo]]) -> None:
        registry = CollectorRegistry()
        self._registry = registry
        self._model = model
        self._replicas = replicas

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(name, text, ["model_name"], registry=registry, buckets=buckets).labels(model)

        self._first_token = histogram(
            "remuda_time_to_first_token_seconds", "From arrival to a choice's first token.", _FIRST_TOKEN_BUCKETS_S
        )
        self._next_token = histogram(
            "remuda_inter_token_latency_seconds", "Between tokens of one choice.", _NEXT_TOKEN_BUCKETS_S
        )
        self._decode = histogram(
            "remuda_request_decode_time_seconds", "From a choice's first token to its last.", _WHOLE_BUCKETS_S
        )
        self._queue = histogram(
            "remuda_request_queue_time_seconds", "Of a choice at its replica, before its first step.", _WHOLE_BUCKETS_S
        )
        self._prefill = histogram(
            "remuda_request_prefill_time_seconds", "From a choice's first step to its first token.", _WHOLE_BUCKETS_S
        )
        self._inference = histogram(
            "remuda_request_inference_time_seconds", "From a choice's first step to its last token.", _WHOLE_BUCKETS_S
        )
        self._whole = histogram(
            "remuda_e2e_request_latency_seconds", "From arrival to the end, however it ended.", _WHOLE_BUCKETS_S
        )
        self._requests = Counter(
            "remuda_requests", "Requests by how they ended.", ["model_name", "outcome"], registry=registry
        )
        self._choices = Counter(
            "remuda_choices", "Choices by finish reason.", ["model_name", "finished_reason"], registry=registry
        )
        self._prompt_tokens = Counter("remuda_prompt_tokens", "Prompt tokens.", ["model_name"], registry=registry)
        self._cached_tokens = Counter(
            "remuda_cached_prompt_tokens", "Prompt tokens from the prefix cache.", ["model_name"], registry=registry
        )
        self._generated = Counter("remuda_generation_tokens", "Generated tokens.", ["model_name"], registry=registry)
        self._http = Counter(
            "remuda_http_responses", "HTTP responses by route and status.", ["route", "status"], registry=registry
        )
        self.num_generated_tokens = 0
        """As they come; ``remuda_generation_tokens`` counts those of requests that ended well."""
        self._live = Gauge("remuda_live_requests", "Requests in the front end.", ["model_name"], registry=registry)
        registry.register(_ReplicaGauges(model, replicas))

    @property
    def registry(self) -> CollectorRegistry:
        """For others' metrics, to be shown beside these."""
        return self._registry

    def watch_adapters(self, used: Callable[[], tuple[set[str], set[str]]]) -> None:
        """``used``: adapters of running and of waiting requests, read at each scrape."""
        self._registry.register(_AdapterInfo(self._replicas, used))

    def first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)

    def next_tokens(self, seconds: float, num_tokens: int) -> None:
        """``num_tokens`` that came together, so long after the ones before them."""
        self._next_token.observe(seconds / num_tokens)

    def generated(self, num_tokens: int) -> None:
        """``num_tokens`` of one choice have come."""
        self.num_generated_tokens += num_tokens

    def begun(self, waits: Waits) -> None:
        """One choice has its first token."""
        self._queue.observe(waits.queue_s)
        self._prefill.observe(waits.prefill_s)

    def decoded(self, seconds: float, waits: Waits | None) -> None:
        """One choice, from its first token to its end; before that it had waited so long."""
        self._decode.observe(seconds)
        if waits is not None:
            self._inference.observe(waits.prefill_s + seconds)

    def ended(self, outcome: str, seconds: float) -> None:
        """One request; ``outcome`` is ``completed``, ``cancelled``, ``internal`` or a class of the error tree."""
        self._requests.labels(self._model, outcome).inc()
        self._whole.observe(seconds)

    def used(self, usage: Usage, reasons: Sequence[FinishReason]) -> None:
        """One completed request's tokens and its choices' finish reasons."""
        self._prompt_tokens.labels(self._model).inc(usage.num_prompt_tokens)
        self._cached_tokens.labels(self._model).inc(usage.num_cached_tokens)
        self._generated.labels(self._model).inc(usage.num_completion_tokens)
        for reason in reasons:
            self._choices.labels(self._model, reason.value).inc()

    def http_response(self, route: str, status: int) -> None:
        """``route`` is the route's pattern, or ``other``."""
        self._http.labels(route, str(status)).inc()

    def watch_live(self, num_live: Callable[[], int]) -> None:
        """Where the number of live requests is to be read."""
        self._live.labels(self._model).set_function(num_live)

    def render(self) -> bytes:
        """The text that /metrics answers with."""
        return generate_latest(_WithOtherNames(self._registry))


class _AdapterInfo:
    """As routers read it that send requests where their adapter runs already."""

    def __init__(
        self, replicas: Callable[[], Sequence[ReplicaInfo]], used: Callable[[], tuple[set[str], set[str]]]
    ) -> None:
        self._replicas = replicas
        self._used = used

    def collect(self) -> Iterator[Metric]:
        running, waiting = self._used()
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters of running and of waiting requests; the value is the time.",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        most = max((info.max_loras for info in self._replicas()), default=0)
        info.add_metric([str(most), ",".join(sorted(running)), ",".join(sorted(waiting))], time.time())
        yield info


class _ReplicaGauges:
    """What the replicas last said of themselves."""

    def __init__(self, model: str, replicas: Callable[[], Sequence[ReplicaInfo]]) -> None:
        self._model = model
        self._replicas = replicas

    def collect(self) -> Iterator[Metric]:
        infos = list(self._replicas())
        for name, text, attribute in (
            ("num_requests_running", "Requests that run in the engine.", "num_running"),
            ("num_requests_waiting", "Requests that wait in the engine.", "num_waiting"),
        ):
            total = sum(getattr(info, attribute) for info in infos)
            for prefix in ("remuda_", "vllm:"):
                yield self._gauge(prefix + name, text, total)
        usage = max((info.kv_cache_usage for info in infos), default=0.0)
        for prefix in ("remuda_", "vllm:"):
            yield self._gauge(prefix + "kv_cache_usage_perc", "Fullest replica's KV cache, 0 to 1.", usage)
        for prefix in ("remuda_", "vllm:"):
            config = GaugeMetricFamily(
                prefix + "cache_config_info", "KV cache of each replica.", labels=["block_size", "num_gpu_blocks"]
            )
            for sizes in sorted({(str(info.block_size), str(info.num_blocks)) for info in infos}):
                config.add_metric(list(sizes), 1)
            yield config
        states = GaugeMetricFamily("remuda_replicas", "Replicas by state.", labels=["model_name", "state"])
        for state in ReplicaState:
            states.add_metric([self._model, state.value], sum(info.state is state for info in infos))
        yield states
        steps = CounterMetricFamily("remuda_steps", "Steps of each replica.", labels=["model_name", "replica"])
        for info in infos:
            steps.add_metric([self._model, info.id], info.num_steps)
        yield steps
        text = "Bytes of each rank's weights when it loaded them, by source: peers (ranks that had them) or disk."
        weights = GaugeMetricFamily(
            "remuda_loaded_weight_bytes", text, labels=["model_name", "replica", "rank", "source"]
        )
        for info in infos:
            for rank in info.ranks:
                labels = [self._model, info.id, str(rank.rank)]
                weights.add_metric([*labels, "peers"], rank.weight_bytes_from_peers)
                weights.add_metric([*labels, "disk"], rank.weight_bytes_from_disk)
        yield weights
        yield from self._experts([(info.id, info.experts) for info in infos if info.experts is not None])

    def _experts(self, replicas: list[tuple[str, ExpertStats]]) -> Iterator[Metric]:
        """Of mixtures whose experts are on several ranks."""
        labels = ["model_name", "replica"]
        text = "Busiest expert-parallel ranks' (token, expert) pairs divided by the mean, lately."
        gauge = GaugeMetricFamily("remuda_expert_imbalance", text, labels=labels)
        text = "(Token, expert) pairs of each expert-parallel rank."
        pairs = CounterMetricFamily("remuda_expert_pairs", text, labels=[*labels, "ep_rank"])
        moves = CounterMetricFamily("remuda_expert_moves", "Changes of a layer's expert table.", labels=labels)
        text = "Changes of a layer's expert table that were given up."
        failed = CounterMetricFamily("remuda_failed_expert_moves", text, labels=labels)
        for replica, experts in replicas:
            gauge.add_metric([self._model, replica], experts.imbalance)
            for ep_rank, count in enumerate(experts.rank_pairs):
                pairs.add_metric([self._model, replica, str(ep_rank)], count)
            moves.add_metric([self._model, replica], experts.num_moves)
            failed.add_metric([self._model, replica], experts.num_failed_moves)
        if replicas:
            yield from (gauge, pairs, moves, failed)

    def _gauge(self, name: str, text: str, value: float) -> GaugeMetricFamily:
        gauge = GaugeMetricFamily(name, text, labels=["model_name"])
        gauge.add_metric([self._model], value)
        return gauge


class _WithOtherNames(CollectorRegistry):
    """A registry's metrics, each of ``_ALSO_AS`` a second time under its other name: observed once, shown twice."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__()
        self._source = registry

    def collect(self) -> Iterator[Metric]:
        for metric in self._source.collect():
            yield metric
            if (other := _ALSO_AS.get(metric.name)) is not None:
                yield _renamed(metric, other)


def _renamed(metric: Metric, name: str) -> Metric:
    copy = Metric(name, metric.documentation, metric.type)
    copy.samples = [Sample(name + sample.name.removeprefix(metric.name), *sample[1:]) for sample in metric.samples]
    return copy
