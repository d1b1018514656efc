"""remuda-tiny in an engine of this process, asked for structured answers."""

from pathlib import Path
from typing import Any

from cluster.frontend.model_files import read_model_files
from cluster.frontend.tokenizer import Tokenizer
from engine.config import Dtype, GrammarBackend, SchedulerConfig
from engine.engine import Engine
from engine.executor.in_process import InProcessExecutor
from engine.executor.worker_config import WorkerConfig
from engine.model_config import ModelConfig, kv_groups
from engine.request import FinishReason, Grammar, GrammarKind, Output, Request, SamplingParams

TINY = Path(__file__).parents[2] / "engine" / "assets" / "remuda-tiny"
FILES = read_model_files(TINY)
TOKENIZER = Tokenizer(FILES)
PROMPT = TOKENIZER.encode("The herd came down")


def regex(text: str) -> Grammar:
    return Grammar(GrammarKind.REGEX, text)


def request(name: str, grammar: Grammar | None, **options: Any) -> Request:
    values: dict[str, Any] = {"max_tokens": 300, "seed": 1, "stop_token_ids": FILES.eos_ids, "grammar": grammar}
    return Request(name, PROMPT, len(PROMPT), SamplingParams(**values | options))


class Bed:
    """An engine and its executor; ``close`` at the end."""

    def __init__(
        self,
        checkpoint: Path = TINY,
        depth: int = 2,
        kv_cache_memory_bytes: int = 4 * 2**20,
        grammar_backend: GrammarBackend = GrammarBackend.LLGUIDANCE,
    ) -> None:
        config = WorkerConfig(
            rank=0,
            channel_address="",
            secret="",
            model=str(checkpoint),
            dtype=Dtype.FLOAT32,
            max_num_seqs=8,
            max_num_batched_tokens=64,
            block_size=4,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            depth=depth,
            guided_decoding_backend=grammar_backend,
        )
        self.executor = InProcessExecutor(config)
        model = ModelConfig.from_directory(config.model)
        self.engine = Engine(
            executor=self.executor,
            kv_groups=kv_groups(model),
            vocab_size=model.vocab_size,
            scheduler_config=SchedulerConfig(8, 64, self.executor.ready.max_model_len, depth=depth),
            cache_config=self.executor.ready.cache,
        )

    def close(self) -> None:
        self.executor.close()

    def run(self, *requests: Request) -> dict[str, list[Output]]:
        outputs: dict[str, list[Output]] = {request.request_id: [] for request in requests}
        for asked in requests:
            self.engine.add(asked)
        while self.engine.has_work:
            for output in self.engine.step():
                outputs[output.request_id].append(output)
            self.engine.check_integrity()
        return outputs

    def texts(self, *requests: Request) -> dict[str, str]:
        """Of requests that must all end by themselves."""
        texts = {}
        for name, outputs in self.run(*requests).items():
            assert outputs[-1].error is None
            assert outputs[-1].finish_reason is FinishReason.STOP, TOKENIZER.decode(ids_of(outputs))
            texts[name] = text_of(outputs)
        return texts


def ids_of(outputs: list[Output]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


def text_of(outputs: list[Output]) -> str:
    """Without a stop token."""
    token_ids = ids_of(outputs)
    return TOKENIZER.decode(token_ids[:-1] if outputs[-1].stop_token_id is not None else token_ids)
