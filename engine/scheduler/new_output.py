"""What a step's answer makes of its request: it goes on, or ends."""

from engine.messages import PooledState, SampledToken
from engine.request import FinishReason, Output, TopLogprobs
from engine.scheduler.request_state import RequestState


def output_of(state: RequestState, sampled: SampledToken, prompt_logprobs: list[TopLogprobs | None] | None) -> Output:
    """The output of a request that has got a token, the last in ``token_ids``. One that stops is in it too: the front
    end leaves it out of the text."""
    token_id = sampled.token_id
    sampling = state.sampling
    reason = None
    stop_token_id = None
    # The rank samples an early stop token only where the grammar leaves nothing else.
    is_late = sampling.grammar is not None or state.num_generated > sampling.min_tokens
    if is_late and token_id in sampling.stop_token_ids:
        reason = FinishReason.STOP
        stop_token_id = token_id
    elif len(state.token_ids) >= state.max_num_tokens:
        reason = FinishReason.LENGTH
    if prompt_logprobs is not None:
        state.num_prompt_logprobs += len(prompt_logprobs)
    logprobs = None if sampled.logprobs is None else [sampled.logprobs]
    num_cached = state.num_cached_tokens if reason is not None else 0
    return Output(state.request_id, [token_id], reason, stop_token_id, logprobs, prompt_logprobs, num_cached)


def embedding_of(state: RequestState, pooled: PooledState) -> Output:
    """The one output of a request that wanted its prompt's embedding, which ends it."""
    num_cached = state.num_cached_tokens
    return Output(state.request_id, [], FinishReason.STOP, num_cached_tokens=num_cached, pooled=pooled.values)
