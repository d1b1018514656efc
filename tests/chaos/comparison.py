"""What became of each answer, held against the same request's without a fault."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.clients import TIMEOUT_S, Client, run_all
from tests.failover.requests import assert_same
from tests.failover.streams import Reading

NUM_ASKED = 8
_ASKED = {"prompt": "Once upon a time", "max_tokens": NUM_ASKED, "temperature": 0, "ignore_eos": True, "stream": False}


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


def judge_cut_off(clients: list[Client], expected: dict[str, Reading], since_s: float) -> Outcome:
    """Of requests that a fault ends for good: each is to get one error, and what came before it is to be the beginning
    of its answer without a fault."""
    lost, strays, notes = 0, {"duplicated": 0, "differing": 0}, []
    for client in clients:
        found, whole = client.reading, expected[client.name]
        lost += bool(found.errors) or client.failure is not None or found.num_tokens < whole.num_tokens
        if len(found.errors) != 1 or client.failure is not None or client.is_alive():
            notes.append(f"{client.name}: {client.failure or found.errors or 'no error'}")
        if kind := _how_it_strays(found, whole):
            strays[kind] += 1
            notes.append(f"{client.name}: {kind}")
    gap_s = max((client.gap_s(since_s) for client in clients), default=0.0)
    return Outcome(len(clients), lost, **strays, gap_s=gap_s, notes=tuple(notes))


def _how_it_strays(found: Reading, whole: Reading) -> str:
    """From the beginning of ``whole``; empty where it does not."""
    for index, choice in found.choices.items():
        due, token_ids = whole.choices[index], choice.token_ids
        if token_ids == due.token_ids[: len(token_ids)] and due.text.startswith(choice.text):
            continue
        pairs = zip(token_ids, due.token_ids, strict=False)
        place = next((at for at, (one, other) in enumerate(pairs) if one != other), len(due.token_ids))
        rest = token_ids[place:]
        is_repeated = any(rest == due.token_ids[at : at + len(rest)] for at in range(place))
        return "duplicated" if rest and is_repeated else "differing"
    return ""


def ask_once(urls: Sequence[str], network: Path | None, gap_s: float) -> Outcome:
    """Whether a cluster that has just become ready answers. ``gap_s``: how long that took."""
    (client,) = run_all({"after the start": _ASKED}, urls, network)
    num_tokens = client.reading.num_tokens
    wrong = client.failure or client.reading.errors
    lost, duplicated = bool(wrong) or num_tokens < NUM_ASKED, num_tokens > NUM_ASKED
    notes = (f"{client.name}: {wrong or f'{num_tokens} of {NUM_ASKED} tokens'}",) if lost or duplicated else ()
    return Outcome(1, int(lost), int(duplicated), 0, gap_s, notes)


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
