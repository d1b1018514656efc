"""What a leader keeps of one request, for a reader that comes back."""

import pytest

from cluster.replica.attachment import Attachment
from cluster.replica.stream_history import StreamHistory
from cluster.rpc import convert
from engine.errors import RequestFailure
from engine.request import FinishReason, Output, TopLogprobs


def read(history: StreamHistory, position: int) -> Output:
    """All that there is from here on."""
    attachment = Attachment("f", 1)
    history.attach(attachment, 0, position)
    ((_, output, _),) = convert.frame_from_proto(attachment.next_frame(), {0: history.request_id})
    return output


def logprob(token_id: int) -> TopLogprobs:
    return TopLogprobs(-float(token_id), 1, [token_id], [-float(token_id)])


@pytest.mark.parametrize("has_logprobs", [False, True])
def test_tokens_that_were_generated_elsewhere_keep_their_positions(has_logprobs: bool) -> None:
    history = StreamHistory("r~1", given=[10, 11, 12], has_logprobs=has_logprobs)
    for token_id in (13, 14):
        if has_logprobs:
            history.add(Output("r~1", [token_id], logprobs=[logprob(token_id)]))
        else:
            history.add_token(token_id)
    history.add(Output("r~1", [], FinishReason.LENGTH))
    assert history.num_tokens == 5
    assert history.first_position == (3 if has_logprobs else 0)
    for position in range(history.first_position, 5):
        output = read(history, position)
        assert output.token_ids == [10, 11, 12, 13, 14][position:] and output.finish_reason is FinishReason.LENGTH
        assert output.logprobs == ([logprob(each) for each in output.token_ids] if has_logprobs else None)


def test_a_reader_gets_no_more_than_it_has_credit_for() -> None:
    history, attachment = StreamHistory("r"), Attachment("f", 1)
    history.attach(attachment, 0, window=3)
    history.add(Output("r", [1, 2]))
    history.add(Output("r", [3, 4, 5], FinishReason.LENGTH))

    def sent() -> list[int]:
        frames = convert.frame_from_proto(attachment.next_frame(), {0: "r"})
        return [token_id for _, output, _ in frames for token_id in output.token_ids]

    assert sent() == [1, 2, 3]
    history.credit(5)
    assert sent() == [4, 5]


def test_tokens_that_come_one_by_one_wait_for_credit_too() -> None:
    history, attachment = StreamHistory("r"), Attachment("f", 1)
    history.attach(attachment, 0, window=2)
    for token_id in (1, 2, 3):
        history.add_token(token_id)
    frames = convert.frame_from_proto(attachment.next_frame(), {0: "r"})
    assert [token_id for _, output, _ in frames for token_id in output.token_ids] == [1, 2]


@pytest.mark.parametrize("fails", [False, True])
def test_whoever_has_had_all_that_waited_reads_no_more(fails: bool) -> None:
    history, attachment = StreamHistory("r"), Attachment("f", 1)
    history.attach(attachment, 0, window=1)
    history.add(Output("r", [1, 2], None if fails else FinishReason.LENGTH))
    if fails:
        history.fail(RequestFailure("it broke"))
    assert history.has_reader and attachment.streams
    history.credit(2)
    assert not history.has_reader and not attachment.streams
