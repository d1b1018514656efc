"""Whether a gang computes what its checkpoint should give, tried through the real engine before it serves.

Where the checkpoint has a golden file (engine.weights.golden) that was recorded in the same format, on the same kind of
device and in a layout that computes the same, its prompts are continued greedily and compared; else a smoke test asks
for finite logits, and for the same tokens twice.
"""

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.errors import SelfTestFailed
from cluster.replica.events import ReplicaPlan
from engine.config import Dtype, LoadFormat
from engine.engine import Engine
from engine.model_config import ModelConfig
from engine.request import MAX_LOGPROBS, Output, Request, SamplingParams
from engine.weights.golden import TOLERANCES, Golden, GoldenPrompt, GoldenStep, fault_of, golden_path, num_equal
from engine.weights.identity import checkpoint_identity

_log = logging.getLogger(__name__)

NUM_TOKENS = 8
NUM_TOP = 8
"""Recorded at each position."""
_SMOKE_PROMPT_LENGTH = 16
_REMEDY = (
    "the replica does not become ready; check the files with remuda verify, the device with remuda doctor, and record "
    "anew with remuda verify --golden if the change is meant"
)


@dataclass(frozen=True)
class _Line:
    """A prompt, and how much of its continuation is given."""

    prompt: GoldenPrompt
    num_forced: int = 0


class SelfTest:
    """Args:
    model, max_model_len: as served.
    """

    def __init__(self, plan: ReplicaPlan, checkpoint: Path, model: ModelConfig, max_model_len: int) -> None:
        self._plan = plan
        self._checkpoint = checkpoint
        self._model = model
        self._max_model_len = max_model_len
        self._ids = (f"self-test-{number}" for number in itertools.count())

    def run(self, engine: Engine, golden: Golden | None) -> str:
        """Returns what was done, in words. ``engine`` has nothing else to do.

        Raises SelfTestFailed, and what the engine raises (nothing of the test is left in it then).
        """
        prompts = [] if golden is None else self._usable(golden)
        if golden is None or not prompts:
            self._smoke(engine)
            return "smoke test passed"
        tolerance = TOLERANCES[golden.dtype]
        self._check(engine, prompts, tolerance, self._describe(golden))
        return f"{len(prompts)} golden prompts reproduced"

    def record(self, engine: Engine, prompts: Sequence[tuple[str, list[int]]]) -> Golden:
        """``prompts``: texts and their tokens. Raises as ``run`` does."""
        empty = [GoldenPrompt(text, token_ids, []) for text, token_ids in prompts]
        found = self._continue(engine, [_Line(prompt) for prompt in empty], NUM_TOKENS)
        return Golden(
            checkpoint=checkpoint_identity(self._checkpoint),
            dtype=Dtype(self._plan.dtype),
            quantization=self._plan.quantization,
            device=self._plan.device,
            layout=self._layout(),
            prompts=[
                GoldenPrompt(prompt.text, prompt.token_ids, [GoldenStep(s.token_id, s.top[:NUM_TOP]) for s in steps])
                for prompt, steps in zip(empty, found, strict=True)
            ],
        )

    def _layout(self) -> dict[str, int]:
        plan = self._plan
        return {
            "tp": plan.tensor_parallel_size,
            "pp": plan.pipeline_parallel_size,
            "dp": plan.data_parallel_size,
            "ep": plan.expert_parallel_size,
        }

    def _usable(self, golden: Golden) -> list[GoldenPrompt]:
        path = golden_path(self._checkpoint)
        if self._plan.load_format == LoadFormat.DUMMY:
            return []
        here = self._plan.dtype, self._plan.quantization, self._plan.device
        if (golden.dtype.value, golden.quantization, golden.device) != here or not self._computes_the_same(golden):
            _log.warning("%s was recorded in another format, device or layout: a smoke test instead", path)
            return []
        prompts = [p for p in golden.prompts if len(p.token_ids) + len(p.steps) <= self._max_model_len]
        if len(prompts) < len(golden.prompts):
            _log.warning("%d prompts of %s are too long here", len(golden.prompts) - len(prompts), path)
        ids = (i for p in prompts for i in (*p.token_ids, *p.continuation))
        if any(token_id >= self._model.vocab_size for token_id in ids):
            raise SelfTestFailed(f"{path} names tokens that this model does not have; {_REMEDY}")
        return prompts

    def _computes_the_same(self, golden: Golden) -> bool:
        """In layouts that sum in another order, up to TOLERANCES. In bfloat16 a router that is undecided may send a
        token to other experts for that, which no tolerance covers; what is quantized is rounded by parts."""
        if golden.layout == self._layout():
            return True
        return self._model.quantization is None and (golden.dtype is Dtype.FLOAT32 or not self._model.num_experts)

    def _describe(self, golden: Golden) -> str:
        layout = " ".join(f"{name}={degree}" for name, degree in golden.layout.items())
        text = f"{golden_path(self._checkpoint)}, recorded in {golden.dtype} on {golden.device}, {layout}"
        if golden.checkpoint != checkpoint_identity(self._checkpoint):
            text += ", of files that were not the present ones"
        return text

    def _smoke(self, engine: Engine) -> None:
        num_tokens = min(NUM_TOKENS, self._max_model_len - 1)
        length = min(_SMOKE_PROMPT_LENGTH, self._max_model_len - num_tokens)
        # Any tokens: this asks not for sense, but for numbers.
        prompt = GoldenPrompt("", [(7919 * i + 13) % self._model.vocab_size for i in range(length)], [])
        steps = self._continue(engine, [_Line(prompt)], num_tokens)[0]
        for position, step in enumerate(steps):
            if fault := fault_of(step, step, 0.0):
                raise SelfTestFailed(f"smoke test: position {length + position}: {fault}; {_REMEDY}")
        recorded = GoldenPrompt("", prompt.token_ids, steps)
        self._check(engine, [recorded], TOLERANCES[Dtype(self._plan.dtype)], "the same prompt the first time")

    def _check(self, engine: Engine, prompts: Sequence[GoldenPrompt], tolerance: float, source: str) -> None:
        """Where another token was chosen of two that are about equally likely, goes on with the recorded one."""
        # The engine spreads them evenly, so every attention replica gets one of each.
        due = [_Line(prompt) for prompt in prompts for _ in range(self._plan.data_parallel_size)]
        while due:
            found = self._continue(engine, due, 0)
            following = []
            for line, steps in zip(due, found, strict=True):
                prompt, begin = line.prompt, line.num_forced
                expected = prompt.steps[begin:]
                num_comparable = num_equal(prompt.continuation[begin:], [step.token_id for step in steps]) + 1
                pairs = zip(expected[:num_comparable], steps, strict=False)
                for index, (ours, theirs) in enumerate(pairs, begin):
                    if fault := fault_of(ours, theirs, tolerance):
                        number = next(number for number, other in enumerate(prompts, 1) if other is prompt)
                        position = len(prompt.token_ids) + index
                        raise SelfTestFailed(
                            f"self-test: prompt {number} ({prompt.text!r}), position {position}: {fault} "
                            f"({source}; tolerance {tolerance:g}); {_REMEDY}"
                        )
                if begin + num_comparable < len(prompt.steps):
                    following.append(replace(line, num_forced=begin + num_comparable))
            due = following

    def _continue(self, engine: Engine, lines: Sequence[_Line], num_tokens: int) -> list[list[GoldenStep]]:
        """Continues each by ``num_tokens``; 0: as far as was recorded."""
        requests = [self._request(line, num_tokens) for line in lines]
        found = _run(engine, requests)
        return [found[request.request_id] for request in requests]

    def _request(self, line: _Line, num_tokens: int) -> Request:
        prompt = line.prompt
        request_id = next(self._ids)
        return Request(
            request_id,
            [*prompt.token_ids, *prompt.continuation[: line.num_forced]],
            len(prompt.token_ids),
            SamplingParams(num_tokens or len(prompt.steps), temperature=0.0, logprobs=MAX_LOGPROBS),
            cache_salt=request_id,  # so that it is computed, and not remembered
        )


def _run(engine: Engine, requests: Sequence[Request]) -> dict[str, list[GoldenStep]]:
    """To their ends. Raises SelfTestFailed, and what the engine raises."""
    found: dict[str, list[GoldenStep]] = {request.request_id: [] for request in requests}
    try:
        for request in requests:
            engine.add(request)
        while engine.has_work:
            for output in engine.step():
                if output.request_id in found:
                    found[output.request_id] += _steps_of(output)
    except Exception:
        for request in requests:
            engine.abort(request.request_id)
        raise
    return found


def _steps_of(output: Output) -> list[GoldenStep]:
    if output.error:
        raise SelfTestFailed(f"self-test: {output.error}; {_REMEDY}")
    logprobs = output.logprobs or []
    return [
        GoldenStep(token_id, list(zip(top.token_ids, top.logprobs, strict=True)))
        for token_id, top in zip(output.token_ids, logprobs, strict=True)
    ]
