"""Short stories from a small grammar. Names, animals, things and places in a story are copied through it."""

from __future__ import annotations

import random

from recipe_words import ADJECTIVES, ANIMALS, COLOURS, FOODS, PLACES, THINGS, random_name


def article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _openings(rng: random.Random, name: str, animal: str, place: str) -> list[str]:
    adjective = rng.choice(ADJECTIVES)
    return [
        f"Once upon a time there was {article(adjective)} {animal} named {name}.",
        f"{name} lived near the {place} and had many friends.",
    ]


def _search(rng: random.Random, name: str, animal: str, place: str) -> list[str]:
    colour, thing = rng.choice(COLOURS), rng.choice(THINGS)
    other, helper = random_name(rng), rng.choice(ANIMALS)
    return [
        f"One day {name} lost {article(colour)} {thing} in the {place}.",
        f"{name} looked behind every tree but could not find the {thing}.",
        f'Then {article(helper)} named {other} came by and asked, "Why are you sad?"',
        f'"I have lost my {colour} {thing}," said {name}.',
        f'"I will help you," said {other}.',
        f"They looked together, and soon they found the {thing} under a stone.",
        f"{name} thanked {other}, and they were friends from that day on.",
    ]


def _meal(rng: random.Random, name: str, animal: str, place: str) -> list[str]:
    food = rng.choice(FOODS)
    other = random_name(rng)
    return [
        f"One morning {name} was hungry and went to the {place} to look for {food}.",
        f"There {name} met {other}, who had some {food} in a basket.",
        f'"May I have some {food}?" asked {name}.',
        f'"Yes, let us share it," said {other}.',
        f"So {name} and {other} sat down and ate the {food} together.",
        "It was the best meal of the whole year.",
    ]


def _journey(rng: random.Random, name: str, animal: str, place: str) -> list[str]:
    goal = rng.choice([p for p in PLACES if p != place])
    colour, thing = rng.choice(COLOURS), rng.choice(THINGS)
    return [
        f"{name} wanted to see the {goal}, which was far away.",
        f"So one day the {animal} took {article(colour)} {thing} and walked all day and all night.",
        "The way was long, and it began to rain.",
        f"But {name} did not give up.",
        f"At last {name} came to the {goal} and saw the sun rise over it.",
        f'"Now I know why I came," said {name}, and put the {thing} down.',
    ]


def _night(rng: random.Random, name: str, animal: str, place: str) -> list[str]:
    other = random_name(rng)
    return [
        f"One night {name} heard a strange sound near the {place}.",
        f"{name} was afraid, but went out to look.",
        f"It was only {other}, who had lost the way home.",
        f'"Come in and get warm," said {name}.',
        f"{other} slept by the fire, and in the morning the two walked home together.",
    ]


def story(rng: random.Random, name: str, animal: str, place: str | None = None, scenes: int = 1) -> str:
    """A story of `scenes` scenes (each about 80 tokens) about an animal with the given name."""
    home = place or rng.choice(PLACES)
    lines = _openings(rng, name, animal, home)
    for scene in rng.sample([_search, _meal, _journey, _night], k=min(scenes, 4)):
        lines += scene(rng, name, animal, home)
    lines.append(rng.choice([f"And {name} was happy.", "And that is the end of the story.", "They were all happy."]))
    return " ".join(lines)
