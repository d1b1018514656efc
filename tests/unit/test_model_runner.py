"""A rank's step, with a model small enough to see through."""

import pytest

from engine.attention.registry import attention_backend
from engine.errors import ProtocolViolation
from engine.executor.kv_cache import copy_blocks
from engine.executor.model_runner import is_out_of_memory
from engine.executor.warm_up import run_largest_steps
from engine.messages import BatchPlan, ScheduledRequest, StepPlan
from engine.parallel.mesh import Mesh
from tests.support.counting_model import CPU, HUGE_TOKEN, NAN_TOKEN, admit, make_runner, plan, tokens


def test_slots_become_tensors() -> None:
    runner, model, _ = make_runner()
    result = runner.execute(plan(0, admit(2, [7, 8, 9, 10, 11], 3), admit(0, [20, 21], 10)))
    assert (result.epoch, result.step, result.rank, tokens(result)) == (0, 0, 0, {2: 12, 0: 22})
    assert result.duration_us > 0
    batch = model.batches[0]
    assert batch.token_ids.tolist() == [7, 8, 9, 10, 11, 20, 21]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert (batch.query_lens, batch.kv_lens) == ((5, 2), (5, 2))
    assert [table.tolist() for table in batch.block_tables] == [[[3, 4], [10, 0]], [[5, 6], [11, 0]]]
    assert [m.tolist() for m in batch.slot_mapping] == [[12, 13, 14, 15, 16, 40, 41], [20, 21, 22, 23, 24, 44, 45]]
    assert batch.logits_rows.tolist() == [4, 6]


def test_a_token_comes_by_value_or_by_reference() -> None:
    for share in (ScheduledRequest(0, 2, 1, [6], [], True), ScheduledRequest(0, 2, 1, [], [], True, 0)):
        runner, model, _ = make_runner()
        assert tokens(runner.execute(plan(0, admit(0, [4, 5], 1)))) == {0: 6}
        assert tokens(runner.execute(plan(1, scheduled=[share]))) == {0: 7}
        assert model.batches[1].token_ids.tolist() == [6] and model.batches[1].positions.tolist() == [2]


def test_an_idle_step_computes_nothing() -> None:
    runner, model, _ = make_runner()
    result = runner.execute(StepPlan(0, 0, [BatchPlan([], [], [])]))
    assert (result.all_sampled, model.batches) == ([], [])


def test_a_plan_out_of_order_is_refused() -> None:
    runner, _, _ = make_runner()
    with pytest.raises(ProtocolViolation, match="step 0 was due"):
        runner.execute(StepPlan(0, 1, [BatchPlan([], [], [])]))


def test_nan_fails_its_request_alone() -> None:
    runner, _, _ = make_runner()
    result = runner.execute(plan(0, admit(0, [1, NAN_TOKEN], 1), admit(1, [1, 2], 10)))
    assert tokens(result) == {1: 3}
    assert [(error.slot, "position 2" in error.message) for error in result.errors] == [(0, True)]
    # A plan that was in flight already still refers to both samples.
    shares = [ScheduledRequest(0, 2, 1, [], [], True, 0), ScheduledRequest(1, 2, 1, [], [], True, 0)]
    assert tokens(runner.execute(plan(1, scheduled=shares)))[1] == 4


def test_running_out_of_memory_fails_the_step_s_requests_not_the_rank() -> None:
    runner, _, _ = make_runner()
    result = runner.execute(plan(0, admit(0, [1, HUGE_TOKEN], 1), admit(1, [1, 2], 10)))
    assert result.all_sampled == [] and {error.slot for error in result.errors} == {0, 1}
    assert all("out of memory" in error.message for error in result.errors)
    new, share = admit(0, [5, 6], 1)
    after = StepPlan(0, 1, [BatchPlan([0, 1], [new], [share])])
    assert tokens(runner.execute(after)) == {0: 7}


def test_other_errors_are_not_taken_for_lack_of_memory() -> None:
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_prompt_logprobs_come_chunk_by_chunk(cut: int) -> None:
    runner, _, _ = make_runner()
    prompt = [4, 5, 6, 100, 101, 30]
    new, share = admit(0, prompt, 1, prompt_logprobs=1)
    first = ScheduledRequest(0, 0, cut, [], share.new_block_ids, False)
    second = ScheduledRequest(0, cut, len(prompt) - cut, [], [], True)
    results = [runner.execute(plan(0, (new, first))), runner.execute(plan(1, scheduled=[second]))]
    entries = {}
    for result in results:
        for found in result.prompt_logprobs:
            assert found.slot == 0
            entries.update({found.start + i: entry for i, entry in enumerate(found.logprobs)})
    # The model expects each token to be the one before plus one; positions 3 and 5 are not.
    assert {position: entry.rank == 1 for position, entry in entries.items()} == {
        1: True,
        2: True,
        3: False,
        4: True,
        5: False,
    }
    assert [entries[position].token_ids for position in range(1, 6)] == [[5], [6], [7], [101], [102]]
    assert tokens(results[1]) == {0: 31}


def test_prompt_logprobs_of_a_long_prompt_take_bounded_memory() -> None:
    runner, model, _ = make_runner()
    prompt = [i % 200 for i in range(70)] * 2
    (new, share) = admit(0, prompt, 1, prompt_logprobs=0)
    share = ScheduledRequest(0, 0, len(prompt), [], [list(range(1, 36)), [40] * 35], True)
    result = runner.execute(plan(0, (new, share)))
    assert len(result.prompt_logprobs[0].logprobs) == len(prompt) - 1
    assert max(model.logits_rows) <= 128 and sum(model.logits_rows) == len(prompt)


def test_blocks_are_copied_before_the_step_and_from_what_was_before() -> None:
    runner, _, cache = make_runner()
    for index, tensor in enumerate((*cache.key_cache, *cache.value_cache)):
        for block in range(4):
            tensor[block] = 10 * index + block
    runner.execute(StepPlan(0, 0, [BatchPlan([], [], [], [(1, 2), (2, 3)])]))
    for index, tensor in enumerate((*cache.key_cache, *cache.value_cache)):
        assert [float(tensor[block].mean()) for block in range(4)] == [10 * index + b for b in (0, 1, 1, 2)]
    copy_blocks(cache, [])


def test_warm_up_computes_the_largest_steps_and_leaves_no_trace() -> None:
    _, model, cache = make_runner()
    run_largest_steps(
        model,
        Mesh(),
        cache,
        max_num_seqs=3,
        max_num_batched_tokens=50,
        max_model_len=20,
        attention=attention_backend(),
        device=CPU,
    )
    assert [(batch.query_lens, batch.kv_lens) for batch in model.batches] == [
        ((20, 20, 10), (20, 20, 10)),
        ((1, 1, 1), (20, 20, 20)),
    ]
    assert all(not tensor.any() for tensor in (*cache.key_cache, *cache.value_cache))
