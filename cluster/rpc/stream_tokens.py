"""Tokens of a frame whose streams got nothing else."""

from typing import NamedTuple, Self


class StreamTokens(NamedTuple):
    """Stream ``streams[i]``, each once, got ``num_tokens[i]`` of ``token_ids``, one stream's behind the other's."""

    streams: list[int]
    num_tokens: list[int]
    token_ids: list[int]

    @classmethod
    def grouped(cls, streams: list[int], token_ids: list[int]) -> Self:
        """Of single tokens and their streams, in the order in which they came."""
        by_stream: dict[int, list[int]] = {}
        for stream, token_id in zip(streams, token_ids, strict=True):
            by_stream.setdefault(stream, []).append(token_id)
        return cls(
            list(by_stream),
            [len(each) for each in by_stream.values()],
            [token_id for each in by_stream.values() for token_id in each],
        )
