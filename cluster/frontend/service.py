"""The one path of every request, under HTTP and gRPC alike: check → encode → admit → run → events."""

import asyncio
import logging
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import replace

import msgspec
from opentelemetry.trace import Tracer

from cluster.errors import Cancelled, ModelNotFound, Unavailable, UnknownStream
from cluster.frontend.adapters import Adapters
from cluster.frontend.admission import Admission
from cluster.frontend.backend import Backend
from cluster.frontend.call_trace import CallTrace
from cluster.frontend.calls import Call, Event, Prompt, Started, TextPrompt, TimeLimits, Usage
from cluster.frontend.choice import Choice
from cluster.frontend.clock import Clock
from cluster.frontend.embedding import MAX_AT_ONCE, check_length
from cluster.frontend.encoding import PromptEncoder
from cluster.frontend.ending import COMPLETED, DEFECT, LEFT, Ending, ending_of
from cluster.frontend.fair_threads import FairThreads
from cluster.frontend.live_request import LiveRequest
from cluster.frontend.metrics import Metrics
from cluster.frontend.model_files import ModelFiles
from cluster.frontend.planned_choice import choice_of, echoed
from cluster.frontend.run import Planned, Run
from cluster.frontend.sampling import build_sampling, check_call, check_token_ids, max_tokens_of
from cluster.frontend.stored_call import FoundCall, StoredCall
from cluster.frontend.tools.grammar import TOKENS as TOOL_TOKENS
from cluster.identity.principal import Principal, acting_as, current_principal
from cluster.telemetry import names
from cluster.telemetry.tracing import NO_TRACER
from cluster.tenants.limiter import Stay, Visit
from cluster.tenants.record import UsageRecord, shown
from cluster.tenants.report import current_report
from cluster.tenants.tenancy import Tenancy
from engine.errors import RemudaError
from engine.request import Pooling, Request, SamplingParams

_NUM_WORK_THREADS = 2
"""For what clients ask beside what the encoder does: texts of token ids, echoed prompts, embeddings."""

_log = logging.getLogger(__name__)


def draw_seed() -> int:
    """A seed for a request that names none."""
    return secrets.randbits(63)


class Service:
    """Args:
    name: the model, as clients ask for it.
    files: its small files.
    encoder: its tokenizer, on threads.
    backend: the replicas.
    admission: the bound on live work.
    metrics: counters and latencies.
    clock: for deadlines and latencies.
    limits: bounds of every request's own.
    draw_seed: seeds for requests that name none.
    adapters: LoRA adapters that clients can name as models; None: those that the replicas have, unchangeable.
    tenancy: what callers may do, and what they used; None: everybody everything.
    tracer: for the spans of calls.
    pooling: what embeddings are made of.
    """

    def __init__(
        self,
        name: str,
        files: ModelFiles,
        encoder: PromptEncoder,
        backend: Backend,
        admission: Admission,
        metrics: Metrics,
        clock: Clock,
        limits: TimeLimits = TimeLimits(),
        draw_seed: Callable[[], int] = draw_seed,
        adapters: Adapters | None = None,
        tenancy: Tenancy | None = None,
        tracer: Tracer = NO_TRACER,
        pooling: Pooling = Pooling.LAST,
    ) -> None:
        self.name = name
        self.created_unix_s = int(time.time())
        self.encoder = encoder
        self.work = FairThreads(_NUM_WORK_THREADS, "client-work")
        self.tokenizer = encoder.tokenizer
        self._tool_token_ids = encoder.tokenizer.control_tokens(TOOL_TOKENS)
        self.backend = backend
        self.adapters = adapters or Adapters(name, backend)
        self.tenancy = tenancy or Tenancy()
        self.licence = files.licence
        self.admission = admission
        self._files = files
        # The tokenizer's own end token counts too: some checkpoints name the end of a turn only there.
        named_ends = self.tokenizer.control_tokens([files.named_tokens.get("eos_token", "")])
        self._eos_ids = tuple(dict.fromkeys([*files.eos_ids, *named_ends]))
        self._metrics = metrics
        self._clock = clock
        self._limits = limits
        self._pooling = pooling
        self._draw_seed = draw_seed
        self._tracer = tracer
        self._live: set[LiveRequest] = set()
        metrics.watch_adapters(self._used_adapters)

    @property
    def files(self) -> ModelFiles:
        return self._files

    def model_names(self) -> list[str]:
        """The model and its adapters, as far as the caller may use them."""
        names = (self.name, *(info.name for info in self.adapters.loaded()))
        principal = current_principal()
        return [name for name in names if self.tenancy.may_use(principal, name)]

    def check_model(self, model: str) -> None:
        """The empty name is the base model's.

        Raises:
            ModelNotFound: neither a model nor an adapter that is served.
            PermissionDenied: the caller may not use it.
            Unavailable: no replica is ready, and it may be an adapter of theirs.
        """
        if model not in ("", self.name) and not self.adapters.has(model):
            if not any(info.state.takes_requests for info in self.backend.replicas()):
                raise Unavailable("no replica is ready; try again shortly")
            names = ", ".join(map(repr, self.model_names()))
            raise ModelNotFound(f"the model {model!r} does not exist here; this server has {names}")
        self.tenancy.check_model(current_principal(), model or self.name)

    @property
    def num_generated_tokens(self) -> int:
        """Since it started, as they come."""
        return self._metrics.num_generated_tokens

    @property
    def max_model_len(self) -> int:
        """Tokens of one request that every replica can hold. Raises Unavailable while none takes requests."""
        lengths = [info.max_model_len for info in self.backend.replicas() if info.state.takes_requests]
        if not lengths:
            raise Unavailable("no replica is ready; try again shortly")
        return min(lengths)

    async def tokenize(self, prompt: Prompt, model: str = "") -> list[int]:
        """It may be longer than the context, but not so long that it surely is.

        Raises:
            ModelNotFound: of another name.
            InvalidRequest: a prompt that is none, or much too long.
            Unavailable: no replica is ready, or the server drains.
            Overloaded: there is no room now, or the tenant's limits are reached.
        """
        self.check_model(model)
        async with self._let_in():
            if isinstance(prompt, TextPrompt) and not prompt.text and not prompt.add_special_tokens:
                return []
            return await self.encoder.encode(prompt, self.max_model_len)

    async def detokenize(self, token_ids: Sequence[int], model: str = "") -> str:
        """The text of a whole sequence, control tokens shown. Raises as ``tokenize`` does."""
        self.check_model(model)
        check_token_ids(token_ids, self.encoder.vocab_size, "tokens")
        async with self._let_in():
            return await self.work.run(self.tokenizer.decode, token_ids, with_special=True)

    @asynccontextmanager
    async def _let_in(self) -> AsyncIterator[None]:
        """While the tokenizer alone works for a client: as a request of its tenant and as one sequence, but with no
        tokens of the minute's. Raises Draining, Overloaded."""
        principal = current_principal()
        visit = Visit(f"tokenizer-{uuid.uuid4().hex}", current_report(), num_used=lambda: 0)
        async with self.tenancy.stay(principal, visit):
            with self.admission.admitted(1, principal.tenant):
                yield

    def _used_adapters(self) -> tuple[set[str], set[str]]:
        """Those that requests run with, and those that requests wait for."""
        with_adapter = [live for live in self._live if live.adapter]
        running = {live.adapter for live in with_adapter if live.has_begun}
        return running, {live.adapter for live in with_adapter if not live.has_begun}

    def end(self, call_id: str, error: RemudaError) -> bool:
        """A request ends with this error, and nobody can come back for it. False where it does not run."""
        found = [live for live in self._live if live.call_id == call_id]
        for live in found:
            live.fail(error)
        return bool(found)

    def end_all(self, error: RemudaError) -> None:
        """Every request that runs ends with this error."""
        for live in self._live:
            live.fail(error)

    def generate(
        self, call: Call, failed: asyncio.Event | None = None, stored: StoredCall | None = None
    ) -> AsyncGenerator[Event, None]:
        """Started, then every choice's events, then Usage. Ends once: with Usage, by raising, or by being closed.

        Closing it (or cancelling the task that reads it) stops the request's work. ``failed`` is set as soon as the
        request has failed, so that whoever hands the events on can bound how long a client may take over the rest.
        With ``stored`` the client may come back: closing it then leaves the request to the leaders for a grace time.

        Raises:
            RemudaError: everything in the tables of engine.errors and cluster.errors that a request can meet.
        """
        run = Run(failed, stored)
        if stored is not None:
            run = replace(run, stored=msgspec.structs.replace(stored, tenant=run.principal.tenant))
        return self._counted(call, run)

    def resume(self, call: Call, found: FoundCall, failed: asyncio.Event | None = None) -> AsyncGenerator[Event, None]:
        """The events of a request that runs already, as ``generate`` gives them, from the first on (cursor.Remainder
        leaves out what its reader had)."""
        return self._counted(call, Run(failed, found.stored, found.holders))

    async def find(self, call_id: str) -> FoundCall:
        """A request that its client came back for. Raises UnknownStream, also to other tenants."""
        found = await self.backend.find(call_id)
        if found.stored.tenant not in ("", current_principal().tenant):
            raise UnknownStream(f"nobody has request {call_id!r} (any more); ask anew")
        return found

    async def cancel(self, call_id: str) -> None:
        """End a request whose client could come back for it, whoever reads it now. Raises as ``find`` does."""
        found = await self.find(call_id)
        for live in [live for live in self._live if live.call_id == call_id]:
            live.fail(Cancelled("the request was cancelled"))
        self.backend.abandon(found)

    async def _counted(self, call: Call, run: Run) -> AsyncGenerator[Event, None]:
        arrived_s = self._clock.now_s()
        run.audited.call_begins()
        ending = LEFT
        traced = CallTrace(self._tracer, call, shown(call.model or self.name), run.context, run.began)
        try:
            with acting_as(run.principal):
                self.check_model(call.model)
            traced.found(call.model or self.name)
            check_call(call)
            async with AsyncExitStack() as stack:
                with traced.part(names.ADMISSION):
                    visit = self.tenancy.stay(run.principal, run.visit(call.request_id))
                    stay = await stack.enter_async_context(visit)
                events = self._events(call, arrived_s, run, stay, traced)
                await stack.enter_async_context(aclosing(events))
                async for event in events:
                    if isinstance(event, Usage):
                        ending = COMPLETED
                    yield event
        except RemudaError as error:
            ending = ending_of(error)
            raise
        except Exception:
            ending = DEFECT
            raise
        finally:
            duration_s = self._clock.now_s() - arrived_s
            self._metrics.ended(ending.outcome, duration_s)
            usage = run.meter.usage()
            traced.ended(ending.outcome, ending.status, usage, run.meter.choices, arrived_s)
            self._account(call, run, usage, ending, duration_s, traced.trace_id)

    def _account(self, call: Call, run: Run, usage: Usage, ending: Ending, duration_s: float, trace_id: str) -> None:
        record = UsageRecord(
            time_unix_s=time.time(),
            request_id=call.request_id,
            tenant=shown(run.principal.tenant),
            key_id=shown(run.principal.key_id),
            model=shown(call.model or self.name),
            outcome=ending.outcome,
            status=ending.status,
            num_prompt_tokens=usage.num_prompt_tokens,
            num_cached_tokens=usage.num_cached_tokens,
            num_completion_tokens=usage.num_completion_tokens,
            duration_s=duration_s,
            trace_id=trace_id,
        )
        if _log.isEnabledFor(logging.INFO):
            _log.info("a call of the model has ended", extra={"call": msgspec.structs.asdict(record)})
        run.audited.call_ended(record)
        self.tenancy.ended(
            record,
            may_return=run.stored is not None and ending.may_return,
            is_taken_over=ending.is_taken_over,
            came_back=run.comes_back,
        )

    async def _events(
        self, call: Call, arrived_s: float, run: Run, stay: Stay, traced: CallTrace
    ) -> AsyncGenerator[Event, None]:
        num_sequences = len(call.prompts) * call.n
        num_at_once = min(num_sequences, MAX_AT_ONCE) if call.embeds else num_sequences
        with self.admission.admitted(num_at_once, run.principal.tenant):
            with traced.part(names.TOKENIZE):
                if (structured := call.options.structured) is not None:
                    await self.encoder.check_structured(structured)
                planned = [await self._plan(prompt, call) for prompt in call.prompts]
            if run.comes_back:
                planned = run.as_decided(planned)
            num_prompt_tokens = sum(len(plan.token_ids) for plan in planned)
            max_new_tokens = sum(plan.sampling.max_tokens for plan in planned) * call.n
            with traced.part(names.TOKEN_BUDGET):
                await stay.reserve(num_prompt_tokens, max_new_tokens, call.options.max_tokens is not None)
            requests, choices = await self._sequences(call, planned, run.principal, traced)
            run.meter.begin([len(plan.token_ids) for plan in planned], choices)
            yield Started(call.model or self.name, [plan.token_ids for plan in planned])
            limits = call.limits.within(self._limits)
            if run.comes_back:
                # It began to run long ago.
                arrived_s -= max(0.0, time.time() - run.created_unix_s)
                limits = TimeLimits(total_s=limits.total_s)
            keeps = run.keeps(planned, len(requests), traced.header)
            open_stream = run.opener(self.backend, requests, keeps)
            live = LiveRequest(
                requests,
                choices,
                open_stream,
                limits,
                self._clock,
                arrived_s,
                self._metrics,
                run.failed,
                keeps,
                num_at_once,
            )
            self._live.add(live)
            try:
                async with aclosing(live.events()) as events:
                    async for event in events:
                        yield event
            finally:
                self._live.discard(live)
            usage = run.meter.usage()
            self._metrics.used(usage, [choice.finished.reason for choice in choices if choice.finished])
            yield usage

    async def _sequences(
        self, call: Call, planned: list[Planned], principal: Principal, traced: CallTrace
    ) -> tuple[list[Request], list[Choice]]:
        """What every choice asks of the engine, and what takes its answer."""
        adapter = call.model if call.model != self.name else ""
        tenant = self.tenancy.engine_tenant(principal)
        priority = call.priority if principal.priority is None else principal.priority
        headers = traced.headers(len(planned) * call.n)
        requests: list[Request] = []
        choices: list[Choice] = []
        table = self.tokenizer.bytes
        for plan in planned:
            # In a thread: a long prompt has many tokens to look at.
            echo = await self.work.run(echoed, plan, table) if call.echo else None
            for number in range(call.n):
                index = len(choices)
                sampling = msgspec.structs.replace(plan.sampling, choice=number)
                requests.append(
                    Request(
                        f"{call.request_id}.{index}",
                        plan.token_ids,
                        len(plan.token_ids),
                        sampling,
                        priority,
                        adapter,
                        self.tenancy.cache_salt(principal, call.cache_salt),
                        tenant,
                        next(headers),
                    )
                )
                choices.append(choice_of(index, plan, call, echo, table, self._tool_token_ids))
        return requests, choices

    async def _plan(self, prompt: Prompt, call: Call) -> Planned:
        max_model_len = self.max_model_len
        token_ids = await self.encoder.encode(prompt, max_model_len, truncates=call.truncates)
        if call.embeds:
            check_length(token_ids, max_model_len)
            return Planned(prompt, token_ids, SamplingParams(max_tokens=0, pooling=self._pooling))
        options = call.options
        is_infill = isinstance(prompt, TextPrompt) and bool(prompt.suffix)
        ends = [*self._eos_ids, *(self.encoder.infilling.end_ids if is_infill else ())]
        sampling = build_sampling(
            options,
            max_tokens_of(call, len(token_ids), max_model_len),
            self._draw_seed() if options.seed is None else options.seed,
            ends,
            self._files.sampling_defaults,
            self.encoder.vocab_size,
        )
        return Planned(prompt, token_ids, sampling)
