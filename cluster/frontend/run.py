"""One client's request as it is carried out: new, or one that its client came back for."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace

import msgspec

from cluster.frontend.backend import Backend
from cluster.frontend.calls import Prompt
from cluster.frontend.live_request import OpenStream
from cluster.frontend.stored_call import Holder, StoredCall
from cluster.replica.keep import Keep
from engine.request import Output, Request, SamplingParams


@dataclass(frozen=True)
class Planned:
    """One prompt, ready to run."""

    prompt: Prompt
    token_ids: list[int]
    sampling: SamplingParams


@dataclass(frozen=True)
class Run:
    """``failed``: set when the request fails. ``stored``: its client may come back. ``holders``: it has come back, and
    these leaders have the request's sequences; those that none has are computed again."""

    failed: asyncio.Event | None = None
    stored: StoredCall | None = None
    holders: dict[int, Holder] | None = None

    @property
    def created_unix_s(self) -> float:
        assert self.stored is not None
        return self.stored.created_unix_s

    def as_decided(self, planned: Sequence[Planned]) -> list[Planned]:
        """With the seeds and bounds of the first time."""
        assert self.stored is not None
        decided = zip(planned, self.stored.seeds, self.stored.max_tokens, strict=True)
        return [
            replace(plan, sampling=msgspec.structs.replace(plan.sampling, seed=seed, max_tokens=max_tokens))
            for plan, seed, max_tokens in decided
        ]

    def keeps(self, planned: Sequence[Planned], num_sequences: int) -> list[Keep]:
        """One per sequence, where the client may come back. The first says what was asked."""
        if self.stored is None:
            return []
        decided = msgspec.structs.replace(
            self.stored,
            seeds=[plan.sampling.seed for plan in planned],
            max_tokens=[plan.sampling.max_tokens for plan in planned],
        )
        return [Keep(decided.encode()), *(Keep() for _ in range(num_sequences - 1))]

    def opener(self, backend: Backend, requests: Sequence[Request], keeps: Sequence[Keep]) -> OpenStream:
        """How the sequences' outputs are read."""
        if not keeps:
            return backend.generate
        indices = {request.request_id: index for index, request in enumerate(requests)}
        holders = self.holders or {}

        def open_stream(request: Request) -> AsyncGenerator[Output, None]:
            index = indices[request.request_id]
            return backend.generate(request, keeps[index], holders.get(index))

        return open_stream
