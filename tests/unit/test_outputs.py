"""A step's outputs as two lists and the rest, and as the sequence that they stand for."""

from engine.outputs import Outputs
from engine.request import FinishReason, Output, TopLogprobs

TOKEN = Output("a", [5])
END = Output("b", [6], FinishReason.STOP, 6)
SCORED = Output("c", [7], logprobs=[TopLogprobs(-1.0, 1, [], [])])
BEGUN = Output("d", [])


def test_only_single_tokens_are_packed() -> None:
    outputs = Outputs()
    for output in (END, TOKEN, SCORED, BEGUN, Output("e", [8])):
        outputs.append(output)
    assert (outputs.request_ids, outputs.token_ids) == (["a", "e"], [5, 8])
    assert outputs.others == [END, SCORED, BEGUN]
    assert list(outputs) == [TOKEN, Output("e", [8]), END, SCORED, BEGUN]
    assert len(outputs) == 5 and outputs[1] == Output("e", [8]) and outputs[-1] == BEGUN


def test_it_equals_what_it_stands_for() -> None:
    outputs = Outputs([END])
    outputs.append(TOKEN)
    assert outputs == [TOKEN, END] and outputs != [END, TOKEN] and outputs != [TOKEN]
    assert not Outputs() and Outputs([END]) == (END,)


def test_what_ends_a_request_comes_behind_its_token() -> None:
    first, more = Outputs(), Outputs([Output("a", [], FinishReason.ABORT)])
    first.append(TOKEN)
    more.append(Output("z", [9]))
    first.take(more)
    assert first == [TOKEN, Output("z", [9]), Output("a", [], FinishReason.ABORT)]
