"""What clients get of a resumable stream over gRPC, on whatever connections, and what it adds up to."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc

from cluster.rpc.channel import CLIENT_OPTIONS
from cluster.rpc.generated.remuda.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from cluster.rpc.inference_client import GenerateOptions, InferenceClient, Summary
from tests.failover.requests import PROMPT

NUM_TOKENS = 160
COME_BACK_S = 20.0
OnTokens = Callable[[int], None]
"""Called with the number of tokens so far, in the reader's thread."""


@dataclass
class Answer:
    """By choice; ``usage``: each that came, of the prompt and of all choices."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    text: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    usage: list[tuple[int, int]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.tokens.values()))

    def add(self, choice: int, text: str, token_ids: tuple[int, ...]) -> None:
        self.tokens.setdefault(choice, []).extend(token_ids)
        self.text[choice] = self.text.get(choice, "") + text


def by_command_line(target: str, on_tokens: OnTokens = lambda num_tokens: None) -> Answer:
    """One choice, as ``remuda generate`` reads it."""
    found = Answer()
    sampling = common_pb2.SamplingParams(ignore_eos=True)
    options = GenerateOptions(max_tokens=NUM_TOKENS, temperature=1.0, seed=7)
    with InferenceClient(target) as client:
        for part in client._stream(inference_pb2.GenerateRequest(text=PROMPT, sampling=sampling), options):
            if isinstance(part, Summary):
                found.usage.append((part.num_prompt_tokens, part.num_completion_tokens))
                found.reasons[0] = part.finish_reason
            else:
                found.add(0, part.text, part.token_ids)
                on_tokens(found.num_tokens)
    return found


def by_own_client(target: str, on_tokens: OnTokens = lambda num_tokens: None) -> Answer:
    """Two choices, by nothing but the protocol: it says where each choice is, and asks for the rest."""
    found, request_id = Answer(), ""
    sampling = common_pb2.SamplingParams(max_tokens=NUM_TOKENS, temperature=1.0, seed=11, ignore_eos=True)
    request = inference_pb2.GenerateRequest(text=PROMPT, sampling=sampling, n=2, resumable=True)
    deadline_s = time.monotonic() + COME_BACK_S
    with grpc.insecure_channel(target, options=CLIENT_OPTIONS) as channel:
        while True:
            try:
                for response in inference_pb2_grpc.InferenceStub(channel).Generate(request):
                    assert request_id in ("", response.request_id)
                    request_id = response.request_id
                    deadline_s = time.monotonic() + COME_BACK_S
                    _take(found, response)
                    if response.WhichOneof("event") == "delta":
                        on_tokens(found.num_tokens)
                return found
            except grpc.RpcError as error:
                assert error.code() == grpc.StatusCode.UNAVAILABLE and time.monotonic() < deadline_s, error
            request = inference_pb2.GenerateRequest(resume=_point(found, request_id))
            time.sleep(0.1)


def _take(found: Answer, response: inference_pb2.GenerateResponse) -> None:
    kind = response.WhichOneof("event")
    if kind == "started":
        assert not found.tokens, "it began once"
    elif kind == "delta":
        delta = response.delta
        assert delta.choice not in found.reasons, "something came after the end of a choice"
        assert delta.position == len(found.tokens.get(delta.choice, [])), "a gap or a repetition"
        found.add(delta.choice, delta.text, tuple(delta.token_ids))
    elif kind == "finished":
        assert response.finished.choice not in found.reasons
        found.reasons[response.finished.choice] = common_pb2.FinishReason.Name(response.finished.reason)
    else:
        found.usage.append((response.usage.num_prompt_tokens, response.usage.num_completion_tokens))


def _point(found: Answer, request_id: str) -> inference_pb2.ResumePoint:
    places = [
        inference_pb2.ChoicePosition(
            choice=choice,
            num_tokens=len(found.tokens[choice]),
            num_characters=len(found.text[choice]),
            finished=choice in found.reasons,
        )
        for choice in found.tokens
    ]
    return inference_pb2.ResumePoint(request_id=request_id, choices=places)


READERS: dict[str, Callable[[str, OnTokens], Answer]] = {
    "command line": by_command_line,
    "two choices": by_own_client,
}
