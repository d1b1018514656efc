"""The sampling rank's grammar matchers: which tokens each structured request may continue with.

A matcher is fed what its request has generated, as the rank knows it when a step begins. So it makes no difference
whether a token was sampled here, came with the plan, or was generated before a preemption or a failover.
"""

import functools
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.executor.grammar_matcher import DEFAULT_BACKEND, GrammarCompiler, GrammarMatcher, open_compiler
from engine.executor.sampling_row import GrammarMask
from engine.slot_table import ScheduledSlot, SlotState

StepMasks = dict[int, GrammarMask | str]
"""By slot: what may come next, or why the request cannot go on."""


@dataclass(slots=True)
class _Slot:
    """``num_fed``: generated tokens handed to the thread. The thread makes and owns ``matcher``; ``error`` stays."""

    state: SlotState
    num_fed: int = 0
    matcher: GrammarMatcher | None = None
    error: str = ""
    has_ended: bool = False


class GrammarMasks:
    """Works in a thread of its own, so that masks are computed while the model is.

    Args:
        checkpoint: a directory with tokenizer.json, or a GGUF file; read when the first grammar comes.
        vocab_size: columns of the logits.
        backend: a name of engine.executor.grammar_matcher.BACKENDS.
    """

    def __init__(self, checkpoint: Path, vocab_size: int, backend: str = DEFAULT_BACKEND) -> None:
        self._checkpoint = checkpoint
        self._backend = backend
        self._vocab_size = vocab_size
        self._slots: dict[int, _Slot] = {}

    def forget(self, slots: Iterable[int]) -> None:
        """They hold other requests, or none, from now on."""
        for slot in slots:
            self._slots.pop(slot, None)

    def begin(self, scheduled: Sequence[ScheduledSlot]) -> "Future[StepMasks] | None":
        """Begins with the masks of a step that the slot table has applied: of the slots that sample, while the others'
        grammars are compiled. None where no slot has a grammar."""
        work: list[tuple[ScheduledSlot, _Slot, list[int]]] = []
        for share in scheduled:
            if share.state.sampling.grammar is not None:
                entry = self._slots.setdefault(share.slot, _Slot(share.state))
                generated = share.state.token_ids[share.state.num_prompt_tokens + entry.num_fed :]
                entry.num_fed += len(generated)
                work.append((share, entry, generated))
        return self._thread.submit(self._masks, work) if work else None

    @functools.cached_property
    def _thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="grammar")

    @functools.cached_property
    def _compiler(self) -> GrammarCompiler:
        return open_compiler(self._backend, self._checkpoint)

    def _masks(self, work: list[tuple[ScheduledSlot, _Slot, list[int]]]) -> StepMasks:
        masks: StepMasks = {}
        for share, entry, generated in work:
            try:
                self._feed(entry, generated)
                if share.sample:
                    masks[share.slot] = self._mask(entry)
            except Exception as error:  # noqa: BLE001  whatever a grammar does ends its request, never the gang
                entry.error = entry.error or str(error) or type(error).__name__
                masks[share.slot] = f"the structured output cannot go on: {entry.error}"
        return masks

    def _feed(self, entry: _Slot, generated: list[int]) -> None:
        """Raises ValueError where the grammar does not allow them."""
        if entry.error:
            raise ValueError(entry.error)
        sampling = entry.state.sampling
        if entry.matcher is None:
            assert sampling.grammar is not None
            entry.matcher = self._compiler.matcher(sampling.grammar)
        for token_id in generated:
            # A plan in flight may go beyond the end; its token is thrown away.
            entry.has_ended = entry.has_ended or token_id in sampling.stop_token_ids
            if entry.has_ended:
                continue
            try:
                entry.matcher.accept(token_id)
            except ValueError as error:
                raise ValueError(f"after token {token_id}: {error}") from error

    def _mask(self, entry: _Slot) -> GrammarMask:
        """Raises ValueError where the grammar has become too complex, or allows nothing."""
        assert entry.matcher is not None
        if entry.has_ended:
            return GrammarMask(np.ones(self._vocab_size, dtype=np.bool_), only_ends=True)
        following = entry.matcher.allowed()[: self._vocab_size]
        allowed = np.zeros(self._vocab_size, dtype=np.bool_)
        allowed[: len(following)] = following
        ends = [token_id for token_id in entry.state.sampling.stop_token_ids if token_id < self._vocab_size]
        allowed[ends] = False
        only_ends = not allowed.any()
        if entry.matcher.may_end:
            allowed[ends] = True
        if only_ends and not allowed.any():
            raise ValueError("no token of this model can follow")
        return GrammarMask(allowed, only_ends)
