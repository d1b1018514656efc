"""What penalties know of a history, against counting it anew; and that an old token is looked at once."""

from collections import Counter
from typing import Any

import numpy as np

from engine.executor.seen_tokens import SeenTokens


class Watched(list[int]):
    """Counts the tokens that somebody takes out."""

    num_taken = 0

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        self.num_taken += len(found) if isinstance(index, slice) else 1
        return found


def test_a_growing_history_is_counted_as_a_whole_one_and_each_token_is_taken_once() -> None:
    random = np.random.default_rng(0)
    history = Watched(random.integers(0, 50, 1000).tolist())
    seen = SeenTokens()
    for num_new in (0, 1, 0, 3, 1, 40):
        history += random.integers(0, 80, num_new).tolist()
        seen.feed(history, 1000)
        output = Counter(list(history)[1000:])
        expected = {token_id: output[token_id] for token_id in set(history)}
        assert len(seen.token_ids) == len(expected)
        assert dict(zip(seen.token_ids.tolist(), seen.counts.tolist(), strict=True)) == expected
    assert history.num_taken == len(history)


def test_a_request_that_comes_back_with_what_it_had_generated() -> None:
    seen = SeenTokens()
    seen.feed([5, 5, 9, 7, 9, 9], 2)
    assert (seen.token_ids.tolist(), seen.counts.tolist()) == ([5, 9, 7], [0, 3, 1])
