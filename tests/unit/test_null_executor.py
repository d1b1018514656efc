"""The executor without a model is a full one: an engine on it serves to the end."""

from engine.config import CacheConfig, KvGroupConfig, SchedulerConfig
from engine.engine import Engine
from engine.executor.null import NullExecutor
from engine.request import FinishReason, Request, SamplingParams


def test_an_engine_runs_on_it() -> None:
    executor = NullExecutor(token_id=7)
    engine = Engine(
        executor=executor,
        kv_groups=(KvGroupConfig((0,)),),
        vocab_size=100,
        scheduler_config=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=16, max_model_len=64, depth=2),
        cache_config=CacheConfig(block_size=4, num_blocks=40),
    )
    for name in range(6):
        engine.add(Request(str(name), list(range(1, 20)), 19, SamplingParams(max_tokens=5)))
    tokens: dict[str, list[int]] = {}
    finished = []
    while engine.has_work:
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
            finished += [output.finish_reason] if output.finish_reason else []
    assert tokens == {str(name): [7] * 5 for name in range(6)}
    assert finished == [FinishReason.LENGTH] * 6
    executor.close()
