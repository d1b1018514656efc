"""One client's request as it is carried out: new, or one that its client came back for."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace

import msgspec
from opentelemetry.context import Context

from cluster.frontend.backend import Backend
from cluster.frontend.calls import Prompt
from cluster.frontend.live_request import OpenStream
from cluster.frontend.meter import Meter
from cluster.frontend.stored_call import Holder, StoredCall
from cluster.identity.principal import Principal, current_principal
from cluster.replica.keep import Keep
from cluster.telemetry.propagation import current_context
from cluster.tenants.audit import Audited, current_audited
from cluster.tenants.limiter import Visit
from cluster.tenants.report import LimitReport, current_report
from engine.request import Output, Request, SamplingParams

_MAX_REPEATED_BYTES = 1 << 20
"""What all sequences of one request may say together."""


@dataclass(frozen=True)
class Planned:
    """One prompt, ready to run."""

    prompt: Prompt
    token_ids: list[int]
    sampling: SamplingParams


@dataclass(frozen=True)
class Run:
    """``failed``: set when the request fails. ``stored``: its client may come back. ``holders``: it has come back, and
    these leaders have the request's sequences; those that none has are computed again. ``principal``: who asks.
    ``report``: for what the response says of limits. ``audited``: for what the audit log says. ``meter``: of what it
    has been given. ``context``: the trace that it belongs to.
    """

    failed: asyncio.Event | None = None
    stored: StoredCall | None = None
    holders: dict[int, Holder] | None = None
    principal: Principal = field(default_factory=current_principal)
    report: LimitReport = field(default_factory=current_report)
    audited: Audited = field(default_factory=current_audited)
    meter: Meter = field(default_factory=Meter)
    context: Context = field(default_factory=current_context)

    def visit(self, request_id: str) -> Visit:
        """As the tenant's limits see it."""
        return Visit(
            request_id,
            self.report,
            self.meter.num_tokens,
            may_return=self.stored is not None,
            comes_back=self.comes_back,
        )

    @property
    def comes_back(self) -> bool:
        """Its client was here, or at another front end, before."""
        return self.holders is not None

    @property
    def created_unix_s(self) -> float:
        assert self.stored is not None
        return self.stored.created_unix_s

    @property
    def began(self) -> str:
        """``traceparent`` of the call that its client has come back for; empty where there is none."""
        return self.stored.trace if self.stored is not None and self.comes_back else ""

    def as_decided(self, planned: Sequence[Planned]) -> list[Planned]:
        """With the seeds and bounds of the first time."""
        assert self.stored is not None
        decided = zip(planned, self.stored.seeds, self.stored.max_tokens, strict=True)
        return [
            replace(plan, sampling=msgspec.structs.replace(plan.sampling, seed=seed, max_tokens=max_tokens))
            for plan, seed, max_tokens in decided
        ]

    def keeps(self, planned: Sequence[Planned], num_sequences: int, trace: str = "") -> list[Keep]:
        """One per sequence, where the client may come back. They say what was asked, and in which ``trace``: each, for
        any of them may be all that is left. Of huge ones only the first does."""
        if self.stored is None:
            return []
        decided = msgspec.structs.replace(
            self.stored,
            seeds=[plan.sampling.seed for plan in planned],
            max_tokens=[plan.sampling.max_tokens for plan in planned],
            trace=self.stored.trace or trace,
        )
        return keeps_of(decided.encode(), num_sequences)

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


def keeps_of(client_request: bytes, num_sequences: int) -> list[Keep]:
    """See ``Run.keeps``."""
    others = client_request if num_sequences * len(client_request) <= _MAX_REPEATED_BYTES else b""
    return [Keep(client_request), *(Keep(others) for _ in range(num_sequences - 1))]
