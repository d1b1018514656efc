"""Word lists and random names: the raw material of the text recipe.

Random names are built from syllables so that the model must learn to copy what the prompt says instead of remembering
a list of names. `HELD_OUT_NAMES` never appear in training text; tests use them.
"""

from __future__ import annotations

import random

HELD_OUT_NAMES = frozenset(
    "Zora Quillon Brimsey Tavoli Hespera Oduya Marnix Xanthe Wilhemo Pernilla Kazimir Yolanthe Drubek Fennimor".split()
)

COMMON_NAMES = (
    "Anna Ben Clara David Emma Frank Grace Henry Iris Jack Kate Leo Maria Noah Olga Paul Rosa Sam Tina Victor Wanda "
    "Adam Bella Carl Dora Eric Fiona George Hannah Ivan Julia Karl Lucy Mark Nina Oscar Petra Quentin Ruth Simon Tara "
    "Ursula Vera Walter Yusuf Zoe Amir Bruno Chen Diego Elena Farid Gita Hugo Ines Jorge Keiko Lars Mei Nadia Omar "
    "Priya Rafael Sofia Tomas Uma Viktor Wei Yara Alice Bob Carol Daniel Eva Tom Lily Max Mia Peter Sarah Jane John"
).split()

ONSETS = (
    "b c d f g h j k l m n p r s t v w z br cr dr fr gr pr tr bl cl fl gl pl sl sh ch th st sk sp sn sw tw qu y x kn"
).split()
VOWELS = "a e i o u a e i o ai ea ee ie oa oo ou au y".split()
CODAS = ["", "", "", "", "n", "r", "l", "s", "t", "m", "k", "d", "ck", "nd", "sh", "x", "th", "rn", "ll", "st", "p"]

ANIMALS = (
    "horse dog cat fox bear owl mouse rabbit goat cow sheep duck frog wolf lion tiger pony donkey bird fish bee crow "
    "deer pig hen snake turtle whale monkey elephant camel swan"
).split()
COLOURS = "red blue green yellow black white brown grey orange purple pink silver golden".split()
THINGS = (
    "hat cup book lamp boat box key coat ball drum bell basket kite rope chair spoon stone map ring wagon saddle "
    "blanket clock broom bucket ladder shoe window table bag apple pear flute candle mirror"
).split()
PLACES = (
    "forest valley village river hill farm garden town castle lake island desert market mountain meadow harbour barn "
    "school city beach"
).split()
ADJECTIVES = (
    "small big old young happy brave clever quiet kind tired shy proud hungry lazy quick gentle funny lonely strong "
    "curious"
).split()
FOODS = "bread soup cheese apples rice cake milk honey corn beans fish eggs carrots berries tea nuts plums".split()
JOBS = "baker farmer teacher sailor doctor painter miller tailor rider singer builder gardener pilot nurse cook".split()
VERBS_PAST = (
    "walked ran looked jumped waited worked sang laughed danced slept rested smiled listened played climbed".split()
)
PLAIN_WORDS = (
    "the sun river runs over green stones and we wait here until morning comes with bright light while old friends "
    "sing near our house every summer evening after rain falls on quiet roads where horses drink cold water under tall "
    "trees my sister keeps seven white birds in her room they like to eat corn from a wooden box nobody knows what is "
    "inside this letter please open it now today tomorrow never always again maybe soon far away time people"
).split()


def syllable(rng: random.Random) -> str:
    simple = rng.random() < 0.7
    onset = rng.choice("bcdfghjklmnprstvwz") if simple else rng.choice(ONSETS)
    return onset + rng.choice("aeiouaeio" if simple else VOWELS) + (rng.choice(CODAS) if rng.random() < 0.6 else "")


def nonword(rng: random.Random, low: int = 1, high: int = 3) -> str:
    """A made-up lower-case word of `low` to `high` syllables."""
    return "".join(syllable(rng) for _ in range(rng.randint(low, high)))


def random_name(rng: random.Random) -> str:
    """A person's name: usually made up, sometimes common, sometimes with a family name."""
    while True:
        draw = rng.random()
        name = rng.choice(COMMON_NAMES) if draw < 0.2 else nonword(rng, 1, 3).capitalize()
        if draw < 0.5 and rng.random() < 0.5:
            name = nonword(rng, 2, 2).capitalize() + rng.choice(["", "a", "o", "e", "us", "in"])
        if draw > 0.93:
            name += " " + nonword(rng, 1, 2).capitalize()
        if not HELD_OUT_NAMES & set(name.split()):
            return name


def random_code(rng: random.Random) -> str:
    """A short number or mixed code such as 4821 or KX-70."""
    if rng.random() < 0.6:
        return str(rng.randint(10, 99999))
    letters = "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(rng.randint(1, 3)))
    return f"{letters}{rng.choice(['-', ''])}{rng.randint(1, 999)}"


def random_word(rng: random.Random) -> str:
    """Any single word: a list word, a plain word or a made-up one."""
    draw = rng.random()
    if draw < 0.35:
        return rng.choice(THINGS + ANIMALS + COLOURS + FOODS)
    if draw < 0.6:
        return rng.choice(PLAIN_WORDS)
    return nonword(rng)


def random_sentence(rng: random.Random) -> str:
    """A sentence to repeat: half sensible, half a row of random words."""
    draw = rng.random()
    if draw < 0.3:
        words = [random_word(rng) for _ in range(rng.randint(2, 9))]
    elif draw < 0.5:
        start = rng.randrange(len(PLAIN_WORDS) - 8)
        words = PLAIN_WORDS[start : start + rng.randint(3, 8)]
    elif draw < 0.75:
        words = f"{random_name(rng)} has a {rng.choice(COLOURS)} {rng.choice(THINGS)}".split()
    else:
        animal, place = rng.choice(ANIMALS), rng.choice(PLACES)
        words = f"the {rng.choice(ADJECTIVES)} {animal} {rng.choice(VERBS_PAST)} to the {place}".split()
    text = " ".join(words)
    if rng.random() < 0.75:
        text = text[0].upper() + text[1:]
    return text + rng.choice(["", ".", ".", "!"])
