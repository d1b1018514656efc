"""What one request has been given so far."""

from collections.abc import Sequence

from cluster.frontend.calls import Usage
from cluster.frontend.choice import Choice


class Meter:
    """Empty until ``begin``: a request that was refused has used nothing."""

    def __init__(self) -> None:
        self._prompt_lengths: Sequence[int] = ()
        self._choices: Sequence[Choice] = ()
        self._num_choices_each = 1

    def begin(self, prompt_lengths: Sequence[int], choices: Sequence[Choice]) -> None:
        """``choices``: of all prompts, equally many of each, prompt by prompt."""
        self._prompt_lengths = prompt_lengths
        self._choices = choices
        self._num_choices_each = len(choices) // len(prompt_lengths)

    @property
    def choices(self) -> Sequence[Choice]:
        """Those that it measures."""
        return self._choices

    def usage(self) -> Usage:
        """Prompts count once, whatever ``n``, and as soon as one of their choices has begun."""
        num_prompt_tokens = num_cached_tokens = 0
        for index, length in enumerate(self._prompt_lengths):
            first = index * self._num_choices_each
            choices = self._choices[first : first + self._num_choices_each]
            if any(choice.num_tokens or choice.finished is not None for choice in choices):
                num_prompt_tokens += length
                num_cached_tokens += choices[0].num_cached_tokens
        num_completion_tokens = sum(choice.num_tokens for choice in self._choices)
        return Usage(num_prompt_tokens, num_completion_tokens, num_cached_tokens)

    def num_tokens(self) -> int:
        """Of prompts and answers."""
        usage = self.usage()
        return usage.num_prompt_tokens + usage.num_completion_tokens
