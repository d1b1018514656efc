"""What the clients of a run ask for, drawn from its seed."""

import random

from cluster.simulate.faults import Scenario
from cluster.simulate.record import Record
from cluster.simulate.vocabulary import NUM_PLAIN, STRUCTURES, VOCAB_SIZE, Structure, text_of
from engine.request import NO_TENANT, Request, SamplingParams, Tenant

LONGEST_PROMPT = 40
TENANTS = (NO_TENANT, Tenant("heavy", 2.0), Tenant("light"), Tenant("late", 1.0, 1))
"""Whose requests they are: so the schedulers' fairness is at work while things break."""


def draw_record(scenario: Scenario, number: int) -> Record:
    """Of the client with this number, which is the seed of its requests as well."""
    chance = random.Random(f"{scenario.seed} request {number}")
    length = chance.randint(1, LONGEST_PROMPT)
    prompt = [(position * 5 + chance.randrange(2)) % VOCAB_SIZE for position in range(length)]
    is_poison = scenario.has_poison and number == 0
    structure = chance.choice([None, None, None, *STRUCTURES[-1:], chance.choice(STRUCTURES[:-1])])
    requests = [
        Request(
            f"c{number}.{choice}",
            prompt,
            length,
            _sampling(scenario, chance, number, choice, structure),
            # What others computed before must not spare it its own end.
            cache_salt="poison" if is_poison else "",
            tenant=TENANTS[number % len(TENANTS)],
        )
        for choice in range(chance.choice([1, 1, 2, 4 if is_poison else 2]))
    ]
    stops = (text_of([chance.randrange(VOCAB_SIZE)]),) if structure is None and chance.random() < 0.3 else ()
    return Record(
        f"c{number}",
        requests,
        () if is_poison else stops,
        "" if structure is None else structure.tool,
        # Somewhere in the prompt or behind it, maybe where it never comes to.
        chance.randrange(length + 20) if is_poison else None,
    )


def _sampling(
    scenario: Scenario, chance: random.Random, number: int, choice: int, structure: Structure | None
) -> SamplingParams:
    ends = tuple(chance.sample(range(VOCAB_SIZE), 2))
    max_tokens = chance.randint(1, scenario.max_tokens)
    asks = random.Random(f"{scenario.seed} logprobs {number}")
    return SamplingParams(
        max_tokens,
        seed=number,
        choice=choice,
        stop_token_ids=ends if structure is None else tuple(range(NUM_PLAIN, VOCAB_SIZE)),
        logprobs=asks.choice([None, 0]),
        prompt_logprobs=asks.choice([None, None, 0]),
        grammar=None if structure is None else structure.grammar,
    )
