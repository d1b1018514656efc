"""Perplexity as the served model has it: by the engine, from its log-probabilities of the prompt."""

from __future__ import annotations

import math
from pathlib import Path

from tiny_data import Document

from engine.config import SchedulerConfig
from engine.engine import Engine
from engine.executor.in_process import InProcessExecutor
from engine.executor.worker_config import WorkerConfig
from engine.model_config import ModelConfig, kv_groups
from engine.request import Request, SamplingParams


def served_perplexity(
    directory: Path, quantization: str | None, held_out: dict[str, list[Document]]
) -> dict[str, float]:
    """Of each kind's documents, weighted as they say. Activations are in the checkpoint's own format."""
    model = ModelConfig.from_directory(directory, quantization)
    config = WorkerConfig(
        rank=0,
        channel_address="",
        secret="",
        model=str(directory),
        dtype=model.dtype,
        quantization=quantization,
        max_num_seqs=8,
        max_num_batched_tokens=512,
    )
    executor = InProcessExecutor(config)
    try:
        engine = Engine(
            executor=executor,
            kv_groups=kv_groups(model),
            vocab_size=model.vocab_size,
            scheduler_config=SchedulerConfig(
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_model_len=executor.ready.max_model_len,
            ),
            cache_config=executor.ready.cache,
        )
        return {kind: _perplexity(engine, documents) for kind, documents in held_out.items()}
    finally:
        executor.close()


def _perplexity(engine: Engine, documents: list[Document]) -> float:
    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    for number, document in enumerate(documents):
        engine.add(Request(str(number), document.ids, len(document.ids), sampling))
    found: dict[str, list[float]] = {str(number): [] for number in range(len(documents))}
    while engine.has_work:
        for output in engine.step():
            for entry in output.prompt_logprobs or ():
                found[output.request_id].append(0.0 if entry is None else entry.logprob)
    total = weight = 0.0
    for number, document in enumerate(documents):
        logprobs = found[str(number)]
        assert len(logprobs) == len(document.ids)
        total -= sum(w * logprob for w, logprob in zip(document.weights[1:], logprobs[1:], strict=True))
        weight += sum(document.weights[1:])
    return math.exp(total / weight)
