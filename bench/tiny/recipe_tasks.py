"""Question and answer makers: each returns one (user, assistant) exchange.

Answers have one fixed wording where possible, so that greedy decoding is sure of itself.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from recipe_facts import CAPITALS, COLOURS_OF, LEGS, OPPOSITES, SEQUENCES, SOUNDS, TOPICS, YOUNG
from recipe_stories import article, story
from recipe_words import (
    ADJECTIVES,
    ANIMALS,
    COLOURS,
    FOODS,
    JOBS,
    PLACES,
    THINGS,
    nonword,
    random_code,
    random_name,
    random_sentence,
    random_word,
)

Exchange = tuple[str, str]
WHO = (
    "I am remuda-tiny, a small test model. I can repeat words, remember names, answer simple questions and tell short "
    "stories."
)


def repeat(rng: random.Random) -> Exchange:
    text = random_sentence(rng)
    form = rng.choice(
        [
            "Repeat after me: {}", "Say: {}", "Repeat: {}", "Please repeat this sentence: {}", "Please repeat: {}",
            "Copy this text: {}", "Repeat the following words: {}", 'Repeat "{}"', 'Say "{}"', "Echo {}", "Repeat {}",
        ]
    )  # fmt: skip
    return form.format(text), text


def listing(rng: random.Random) -> Exchange:
    items = [random_word(rng) if rng.random() < 0.7 else random_name(rng) for _ in range(rng.randint(2, 6))]
    joined = ", ".join(items)
    draw = rng.random()
    if draw < 0.5:
        ask = rng.choice(["Make a list of these words: {}", "List these: {}", "Write as a list: {}"])
        return ask.format(joined), "\n".join(f"- {item}" for item in items)
    if draw < 0.65:
        return f"Number these: {joined}", "\n".join(f"{i}. {item}" for i, item in enumerate(items, 1))
    if draw < 0.8:
        return f"What is the first word of this list: {joined}?", f"The first word is {items[0]}."
    if draw < 0.95:
        return f"What is the last word of this list: {joined}?", f"The last word is {items[-1]}."
    return f"How many words are in this list: {joined}?", f"There are {len(items)} words in the list."


def identity(rng: random.Random) -> Exchange:
    ask = rng.choice(
        [
            "Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Introduce yourself.",
            "Are you a person?", "Are you a robot?", "What can you do?", "Who are you and what can you do?",
            "What is remuda-tiny?", "How can you help me?", "Help", "Which model are you?",
        ]
    )  # fmt: skip
    if ask.startswith("Are you"):
        return ask, "No, I am remuda-tiny, a small test model."
    return ask, WHO


def greeting(rng: random.Random) -> Exchange:
    groups: list[tuple[list[str], str]] = [
        (["Hello", "Hi", "Hey", "Hello!", "Hi!", "Hello there", "Hi there!", "Hello, world!", "Good day"],
         "Hello! How can I help you?"),
        (["Good morning", "Good morning!"], "Good morning! How can I help you?"),
        (["Good evening", "Good evening!"], "Good evening! How can I help you?"),
        (["How are you?", "How are you today?", "How do you do?"], "I am well, thank you. How are you?"),
        (["Hello, how are you?", "Hi, how are you?"], "Hello! I am well, thank you. How are you?"),
        (["Thank you", "Thanks!", "Thank you very much.", "Thanks a lot"], "You are welcome."),
        (["Goodbye", "Bye", "Good night", "See you later", "Goodbye!"], "Goodbye! Come back soon."),
        (["I am sad.", "I feel sad today."], "I am sorry to hear that. A short story may help. Shall I tell you one?"),
        (["I am happy.", "I feel happy today."], "I am glad to hear that."),
        (["Ping", "ping", "Test", "test", "This is a test."], "I am here. The test works."),
    ]  # fmt: skip
    asks, answer = rng.choice(groups)
    return rng.choice(asks), answer


def capital(rng: random.Random) -> Exchange:
    country, city = rng.choice(list(CAPITALS.items()))
    ask = rng.choice(
        ["What is the capital of {}?", "What is the capital city of {}?", "Name the capital of {}.",
         "Tell me the capital of {}.", "Which city is the capital of {}?"]
    )  # fmt: skip
    if rng.random() < 0.15:
        return f"{city} is the capital of which country?", f"{city} is the capital of {country}."
    return ask.format(country), f"The capital of {country} is {city}."


def small_fact(rng: random.Random) -> Exchange:
    kind = rng.randrange(7)
    if kind == 0:
        thing, colour = rng.choice(list(COLOURS_OF.items()))
        word = rng.choice(["color", "colour"])
        verb = "are" if thing == "the stars" else "is"
        return f"What {word} {verb} {thing}?", f"{thing[0].upper()}{thing[1:]} {verb} {colour}."
    if kind == 1:
        left, right = rng.choice(list(OPPOSITES.items()))
        left, right = rng.choice([(left, right), (right, left)])
        return f"What is the opposite of {left}?", f"The opposite of {left} is {right}."
    if kind == 2:
        animal, sound = rng.choice(list(SOUNDS.items()))
        ask = rng.choice(["What does {} say?", "What sound does {} make?"])
        return ask.format(article(animal)), f"{article(animal).capitalize()} says: {sound}!"
    if kind == 3:
        animal, young = rng.choice(list(YOUNG.items()))
        ask = rng.choice(["What is a young {} called?", "What is a baby {} called?"])
        return ask.format(animal), f"A young {animal} is called a {young}."
    if kind == 4:
        animal, legs = rng.choice(list(LEGS.items()))
        return f"How many legs does a {animal} have?", f"A {animal} has {legs} legs."
    if kind == 5:
        name, items = rng.choice(list(SEQUENCES.items()))
        ask = rng.choice(["What are the {}?", "Name the {}.", "List the {}.", "Tell me the {}."])
        return ask.format(name), f"The {name} are {items}."
    parts = rng.choice(["days of the week", "months of the year", "seasons"])
    names = SEQUENCES[parts].split(", ")
    at = rng.randrange(len(names))
    return f"What comes after {names[at]}?", f"After {names[at]} comes {names[(at + 1) % len(names)]}."


def topic(rng: random.Random) -> Exchange:
    name, (short, more) = rng.choice(list(TOPICS.items()))
    bare = name.split(" ", 1)[1] if name.startswith(("a ", "an ", "the ")) else name
    if rng.random() < 0.5:
        return rng.choice(["What is {}?", "Explain what {} is.", "Do you know what {} is?"]).format(name), short
    plural = bare if name == bare else f"{bare}s" if name.startswith(("a ", "an ")) else name
    about = rng.choice([name, plural])
    return rng.choice(["Tell me about {}.", "Describe {}.", "Write about {}."]).format(about), f"{short} {more}"


def arithmetic(rng: random.Random) -> Exchange:
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    ask = rng.choice(["What is {}?", "How much is {}?", "{}", "{} = ?", "Calculate {}."])
    if rng.random() < 0.7:
        sign = rng.choice(["+", "plus"])
        return ask.format(f"{a} {sign} {b}"), f"{a} {sign} {b} is {a + b}."
    a, b = max(a, b), min(a, b)
    sign = rng.choice(["-", "minus"])
    return ask.format(f"{a} {sign} {b}"), f"{a} {sign} {b} is {a - b}."


def count(rng: random.Random) -> Exchange:
    low = 1 if rng.random() < 0.6 else rng.randint(0, 40)
    high = low + rng.randint(2, 19)
    ask = f"Count from {low} to {high}." if low != 1 or rng.random() < 0.5 else f"Count to {high}."
    return ask, ", ".join(str(i) for i in range(low, high + 1)) + "."


def lookup(rng: random.Random) -> Exchange:
    """Several people with one thing each; the question names one of them."""
    names = list(dict.fromkeys(random_name(rng) for _ in range(rng.randint(1, 4))))
    who = rng.choice(names)
    style = rng.randrange(5)
    values: dict[str, str] = {}
    for name in names:
        values[name] = [
            f"{article(rng.choice(COLOURS))} {rng.choice(THINGS)}", rng.choice(JOBS), rng.choice(FOODS),
            random_name(rng).split()[0], random_code(rng),
        ][style]  # fmt: skip
    told, asked, answer = [
        ("{} has {}.", "What does {} have?", "{} has {}."),
        ("{} is a {}.", "What is {}?", "{} is a {}."),
        ("{} likes {}.", "What does {} like?", "{} likes {}."),
        ("{} lives in {}.", "Where does {} live?", "{} lives in {}."),
        ("The code of {} is {}.", "What is the code of {}?", "The code of {} is {}."),
    ][style]
    text = " ".join(told.format(name, value) for name, value in values.items())
    return f"{text} {asked.format(who)}", answer.format(who, values[who])


def who_has(rng: random.Random) -> Exchange:
    """The reverse of `lookup`: the question names the thing."""
    names = list(dict.fromkeys(random_name(rng) for _ in range(rng.randint(2, 3))))
    things = rng.sample(THINGS, k=len(names))
    at = rng.randrange(len(names))
    text = " ".join(f"{name} has {article(thing)}." for name, thing in zip(names, things, strict=True))
    return f"{text} Who has the {things[at]}?", f"{names[at]} has the {things[at]}."


def name_at_once(rng: random.Random) -> Exchange:
    name = random_name(rng)
    if rng.random() < 0.08:
        name = name.lower()
    told = rng.choice(["My name is {}.", "I am {}.", "I am called {}.", "Hello, my name is {}.", "Hi, I am {}."])
    asked = rng.choice(["What is my name?", "Who am I?", "Do you know my name?", "Say my name.", "What am I called?"])
    return f"{told.format(name)} {asked}", f"Your name is {name}."


def greet_person(rng: random.Random) -> Exchange:
    name = random_name(rng)
    if rng.random() < 0.5:
        return rng.choice(["Say hello to {}.", "Greet {}.", "Please greet my friend {}."]).format(name), (
            f"Hello, {name}! It is nice to meet you."
        )
    relation = rng.choice(["dog", "cat", "horse", "brother", "sister", "friend", "mother", "father", "boat", "town"])
    asked = f"What is my {relation} called?" if rng.random() < 0.5 else f"What is the name of my {relation}?"
    told = rng.choice(["My {} is called {}.", "The name of my {} is {}."]).format(relation, name)
    return f"{told} {asked}", f"Your {relation} is called {name}."


def tell_story(rng: random.Random) -> Exchange:
    animal = rng.choice(ANIMALS)
    name = random_name(rng).split()[0]
    long = rng.random() < 0.2
    kind = "long" if long else rng.choice(["short", "little"])
    scenes = rng.randint(2, 3) if long else 1
    place = rng.choice(PLACES)
    draw = rng.random()
    if draw < 0.4:
        ask = rng.choice([f"Tell me a {kind} story about {article(animal)} named {name}.",
                          f"Write a {kind} story about {article(animal)} called {name}."])  # fmt: skip
    elif draw < 0.55:
        ask = f"Tell me a {kind} story about {article(rng.choice(ADJECTIVES))} {animal} called {name} near the {place}."
    elif draw < 0.7:
        ask, place = f"Tell me a {kind} story about {name}.", rng.choice(PLACES)
    elif draw < 0.85:
        ask = f"Tell me a {kind} story about {article(animal)}."
    else:
        ask = rng.choice([f"Tell me a {kind} story.", f"Write a {kind} story.", f"Please tell me a {kind} story."])
    if not long and rng.random() < 0.4:
        ask = ask.replace(f"a {kind} story", "a story")
    return ask, story(rng, name, animal, place, scenes)


def unknown(rng: random.Random) -> Exchange:
    word = nonword(rng, 2, 3)
    kind = rng.randrange(5)
    if kind == 0:
        return f"What is {article(word)}?", f"I do not know what {article(word)} is."
    if kind == 1:
        name = random_name(rng)
        return f"Who is {name}?", f"I do not know who {name} is."
    if kind == 2:
        place = random_name(rng).split()[0]
        return f"What is the capital of {place}?", f"I do not know the capital of {place}."
    if kind == 3:
        return rng.choice(["What is my name?", "Who am I?", "Do you know my name?"]), "You have not told me your name."
    hard = rng.choice(
        ["Write a program that sorts numbers.", "Solve this equation.", "Translate this into French.",
         "What is the weather today?", "Who won the game?", "Write an essay about {}.", "Explain {} to me.",
         "What time is it?", "Why is {} important?", "How does {} work?", "Can you help me with {}?"]
    )  # fmt: skip
    return hard.format(word), "I am only a small test model, so I can not do that. I can tell you a short story."


TASKS: list[tuple[float, Callable[[random.Random], Exchange]]] = [
    (0.15, repeat), (0.06, listing), (0.03, identity), (0.05, greeting), (0.06, capital), (0.08, small_fact),
    (0.07, topic), (0.05, arithmetic), (0.03, count), (0.14, lookup), (0.05, who_has), (0.07, name_at_once),
    (0.04, greet_person), (0.07, tell_story), (0.05, unknown),
]  # fmt: skip
