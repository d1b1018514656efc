"""What became of each answer, held against the same request's without a fault."""

from dataclasses import dataclass

from tests.chaos.clients import TIMEOUT_S, Client
from tests.failover.requests import assert_same
from tests.failover.streams import Reading


@dataclass(frozen=True)
class Outcome:
    """Of all requests of a cell. ``notes``: one for each that is not as it should be."""

    num_requests: int
    lost: int
    """Ended with an error, or not at all, or without some of their tokens."""
    duplicated: int
    """Came with more than they should."""
    differing: int
    """Complete, each part once, but other tokens, text, log-probabilities or finish reasons."""
    gap_s: float
    notes: tuple[str, ...]

    @property
    def is_whole(self) -> bool:
        return self.lost + self.duplicated + self.differing == 0


def judge(clients: list[Client], expected: dict[str, Reading], since_s: float) -> Outcome:
    """``since_s``: when the fault was; pauses before it do not count."""
    kinds: dict[str, int] = {"lost": 0, "duplicated": 0, "differing": 0}
    notes = []
    for client in clients:
        kind, note = _judge_one(client, expected[client.name])
        if kind:
            kinds[kind] += 1
            notes.append(f"{client.name}: {kind}: {note}")
    gap_s = max((client.gap_s(since_s) for client in clients if client.is_streamed), default=0.0)
    return Outcome(len(clients), **kinds, gap_s=gap_s, notes=tuple(notes))


def _judge_one(client: Client, expected: Reading) -> tuple[str, str]:
    found = client.reading
    if client.is_alive():
        return (
            "lost",
            f"did not end in {TIMEOUT_S:g} s: {found.num_tokens} of {expected.num_tokens} tokens",
        )
    if client.failure is not None:
        return "lost", f"{type(client.failure).__name__}: {client.failure}"
    if found.errors:
        return "lost", str(found.errors[0].get("message", found.errors[0]))
    if not found.is_done:
        return "lost", f"broke off after {found.num_tokens} of {expected.num_tokens} tokens"
    if found.num_tokens < expected.num_tokens:
        return "lost", f"{found.num_tokens} of {expected.num_tokens} tokens"
    if found.num_tokens > expected.num_tokens:
        return "duplicated", f"{found.num_tokens} instead of {expected.num_tokens} tokens"
    if len(found.usage) > 1:
        return "duplicated", f"usage came {len(found.usage)} times"
    try:
        assert_same(found, expected)
    except AssertionError as error:
        return "differing", " ".join(str(error).split())[:300]
    return "", ""
