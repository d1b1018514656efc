"""Whether a model is to think before it answers, for templates that ask for it."""

from collections.abc import Mapping


def thinking_variables(think: bool | str | None) -> Mapping[str, object]:
    """Variables of Qwen3's templates and their like. None leaves it to the template; a word is how hard to think."""
    if think is None:
        return {}
    if isinstance(think, bool):
        return {"enable_thinking": think}
    return {"enable_thinking": True, "reasoning_effort": think}
