"""Which tokens a request's prompt and output hold, and how often: what penalties need, kept from step to step."""

from array import array
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


class SeenTokens:
    """The prompt is looked at once and each generated token once, so a step costs no more as the history grows."""

    def __init__(self) -> None:
        self._num_fed = 0
        self._places: dict[int, int] = {}
        self._token_ids = array("q")
        self._counts = array("q")

    def feed(self, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        """``token_ids``: the history, of which what came before was fed before; prompt first."""
        if self._num_fed < num_prompt_tokens:
            distinct = np.unique(np.asarray(token_ids[:num_prompt_tokens], dtype=np.int64))
            self._token_ids.frombytes(distinct.tobytes())
            self._counts.frombytes(bytes(distinct.nbytes))
            self._places = {token_id: place for place, token_id in enumerate(distinct.tolist())}
            self._num_fed = num_prompt_tokens
        for token_id in token_ids[self._num_fed :]:
            place = self._places.setdefault(token_id, len(self._token_ids))
            if place == len(self._token_ids):
                self._token_ids.append(token_id)
                self._counts.append(0)
            self._counts[place] += 1
        self._num_fed = len(token_ids)

    @property
    def token_ids(self) -> npt.NDArray[np.int64]:
        """[n] distinct ids in prompt and output."""
        return np.array(self._token_ids, dtype=np.int64)

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """[n] how often each is in the output; 0: in the prompt only."""
        return np.array(self._counts, dtype=np.int64)
