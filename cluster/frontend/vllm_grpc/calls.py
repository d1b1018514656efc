"""Requests of vLLM's gRPC protocol as calls.

Most scalars there cannot be left out: proto3's zero stands for "not said".
"""

import uuid
from typing import Any

from cluster.errors import DeadlineExceeded
from cluster.frontend.calls import Call, Prompt, SamplingOptions, StructuredOutput, TextPrompt, TimeLimits, TokenPrompt
from cluster.frontend.embedding import embedding_call
from cluster.frontend.model_files import ModelFiles
from cluster.frontend.structured import structured_output
from cluster.rpc.generated.vllm import vllm_engine_pb2 as pb
from engine.errors import InvalidRequest

_MEDIA = ("mm_inputs", "media_refs")
_TRANSFER = ("kv_transfer_params", "kv_transfer_params_json")


def call_of(request: pb.GenerateRequest, time_remaining_s: float | None, max_model_len: int) -> Call:
    """Args:
        request: as it came.
        time_remaining_s: until the call's deadline.
        max_model_len: tokens; what a prompt may be cut to.

    Raises:
        InvalidRequest: something that is not served, or not what it should be.
        DeadlineExceeded: no time is left.
    """
    if time_remaining_s is not None and time_remaining_s <= 0:
        raise DeadlineExceeded("the call's deadline had passed when the call came")
    _refuse_what_is_not_served(request)
    params = request.sampling_params
    return Call(
        # A client's own name for a request may not be unique; what the engine sees is.
        request_id=f"{request.request_id[:64] or 'vllm'}-{uuid.uuid4().hex}",
        prompts=[_prompt(request, max_model_len)],
        options=_options(params),
        n=params.n or 1,
        stop=list(params.stop),
        # The prompt's log-probabilities come with its echo.
        echo=params.HasField("prompt_logprobs"),
        limits=TimeLimits(total_s=time_remaining_s),
    )


def embed_call_of(request: pb.EmbedRequest, time_remaining_s: float | None, files: ModelFiles) -> Call:
    """Raises as ``call_of`` does."""
    if time_remaining_s is not None and time_remaining_s <= 0:
        raise DeadlineExceeded("the call's deadline had passed when the call came")
    return embedding_call(
        f"{request.request_id[:64] or 'vllm'}-{uuid.uuid4().hex}",
        [TokenPrompt(list(request.tokenized.input_ids))],
        None,
        files,
        limits=TimeLimits(total_s=time_remaining_s),
    )


def _refuse_what_is_not_served(request: pb.GenerateRequest) -> None:
    given = {descriptor.name for descriptor, _ in request.ListFields()}
    for name in (*_MEDIA, "extra_mm_inputs", *_TRANSFER):
        if name in given:
            what = "transfers of KV caches" if name in _TRANSFER else "images and other media"
            raise InvalidRequest(f"{what} are not served; leave {name} out", name)
    if request.HasField("data_parallel_rank") and request.data_parallel_rank > 0:
        raise InvalidRequest("this server has data parallel rank 0 alone", "data_parallel_rank")


def _prompt(request: pb.GenerateRequest, max_model_len: int) -> Prompt:
    params = request.sampling_params
    cut = params.truncate_prompt_tokens if params.HasField("truncate_prompt_tokens") else None
    kind = request.WhichOneof("input")
    if kind == "text":
        if not request.text:
            raise InvalidRequest("text must not be empty", "text")
        if cut is not None:
            raise InvalidRequest("truncate_prompt_tokens needs token ids", "truncate_prompt_tokens")
        return TextPrompt(request.text)
    if kind == "tokenized":
        token_ids = list(request.tokenized.input_ids)
        if cut is not None:
            token_ids = token_ids[-(cut if cut > 0 else max_model_len - 1) :]
        return TokenPrompt(token_ids)
    raise InvalidRequest("give one of tokenized and text", "input")


def _options(params: pb.SamplingParams) -> SamplingOptions:
    logprobs = {
        name: getattr(params, name) if params.HasField(name) else None for name in ("logprobs", "prompt_logprobs")
    }
    return SamplingOptions(
        max_tokens=params.max_tokens if params.HasField("max_tokens") else None,
        min_tokens=params.min_tokens or None,
        temperature=params.temperature if params.HasField("temperature") else None,
        top_k=params.top_k or None,
        top_p=params.top_p or None,
        min_p=params.min_p or None,
        presence_penalty=params.presence_penalty or None,
        frequency_penalty=params.frequency_penalty or None,
        repetition_penalty=params.repetition_penalty or None,
        logit_bias=dict(params.logit_bias),
        seed=params.seed if params.HasField("seed") else None,
        stop_token_ids=tuple(params.stop_token_ids),
        ignore_eos=params.ignore_eos,
        logprobs=logprobs["logprobs"],
        prompt_logprobs=logprobs["prompt_logprobs"],
        structured=_structured(params),
    )


def _structured(params: pb.SamplingParams) -> StructuredOutput | None:
    kind = params.WhichOneof("constraint")
    if kind is None:
        return None
    if kind == "structural_tag":
        raise InvalidRequest("structural tags are not served", "structural_tag")
    names = {"json_schema": "json"}
    value: Any = list(params.choice.choices) if kind == "choice" else getattr(params, kind)
    return structured_output(None, {}, {names.get(kind, kind): value})
