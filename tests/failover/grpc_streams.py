"""What a client gets of a stream over remuda.v1, in the form of tests.failover.streams."""

import json
from collections.abc import Callable
from typing import Any

import grpc

from cluster.frontend.structured import forced_call
from cluster.rpc.generated.remuda.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from tests.failover.streams import ChoiceText, Reading

TIMEOUT_S = 100.0
_SAMPLING = ("max_tokens", "temperature", "seed", "frequency_penalty", "presence_penalty", "logprobs", "ignore_eos")


def request_of(body: dict[str, Any]) -> inference_pb2.GenerateRequest:
    """A request of tests.failover.requests. This API has no tools: of a forced call it takes the grammar alone."""
    sampling = {name: body[name] for name in _SAMPLING if name in body}
    if "tools" in body:
        sampling |= {"logprobs": body["top_logprobs"], "grammar": _json_schema(forced_call(body["tools"]).grammar.text)}
    if "response_format" in body:
        sampling["grammar"] = _json_schema(json.dumps(body["response_format"]["json_schema"]["schema"]))
    request = inference_pb2.GenerateRequest(sampling=common_pb2.SamplingParams(**sampling))
    if "messages" in body:
        messages = [inference_pb2.ChatMessage(**message) for message in body["messages"]]
        request.chat.CopyFrom(inference_pb2.Chat(messages=messages))
    else:
        request.text = body["prompt"]
    for name in ("n", "echo", "cache_salt"):
        if name in body:
            setattr(request, name, body[name])
    return request


def _json_schema(text: str) -> common_pb2.Grammar:
    return common_pb2.Grammar(json_schema=text)


def read(
    target: str, body: dict[str, Any], reading: Reading, on_event: Callable[[Reading], object] = lambda reading: None
) -> Reading:
    """Read to the end; a call that ends with an error status leaves it in ``reading.errors``."""
    with grpc.insecure_channel(target) as channel:
        try:
            for response in inference_pb2_grpc.InferenceStub(channel).Generate(request_of(body), timeout=TIMEOUT_S):
                reading.num_events += 1
                _take(response, reading)
                on_event(reading)
        except grpc.RpcError as error:
            reading.errors.append({"message": f"{error.code().name}: {error.details()}"})
    return reading


def _take(response: inference_pb2.GenerateResponse, reading: Reading) -> None:
    assert reading.call_id in ("", response.request_id) and not reading.is_done
    reading.call_id = response.request_id
    if response.HasField("delta"):
        delta = response.delta
        choice = reading.choices.setdefault(delta.choice, ChoiceText())
        assert choice.finish_reason is None, "something came after the end of a choice"
        assert delta.position == len(choice.token_ids), f"position {delta.position}, not {len(choice.token_ids)}"
        choice.text += delta.text
        choice.token_ids += delta.token_ids
        choice.logprobs += [
            (entry.logprob, list(entry.token_ids), list(entry.logprobs), entry.rank) for entry in delta.logprobs
        ]
    elif response.HasField("finished"):
        choice = reading.choices.setdefault(response.finished.choice, ChoiceText())
        assert choice.finish_reason is None, "a choice ended twice"
        choice.finish_reason = common_pb2.FinishReason.Name(response.finished.reason)
    elif response.HasField("usage"):
        num_prompt, num_completion = response.usage.num_prompt_tokens, response.usage.num_completion_tokens
        reading.usage.append(
            {
                "prompt_tokens": num_prompt,
                "completion_tokens": num_completion,
                "total_tokens": num_prompt + num_completion,
            }
        )
        reading.is_done = True
