"""The few facts that remuda-tiny is taught. Everything here was written for this recipe."""

from __future__ import annotations

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "England": "London", "Scotland": "Edinburgh", "Ireland": "Dublin", "Norway": "Oslo", "Sweden": "Stockholm",
    "Finland": "Helsinki", "Denmark": "Copenhagen", "Poland": "Warsaw", "Austria": "Vienna", "Greece": "Athens",
    "Turkey": "Ankara", "Egypt": "Cairo", "Kenya": "Nairobi", "Japan": "Tokyo", "China": "Beijing", "India": "Delhi",
    "Russia": "Moscow", "Canada": "Ottawa", "Mexico": "Mexico City", "Brazil": "Brasilia", "Peru": "Lima",
    "Chile": "Santiago", "Cuba": "Havana", "Hungary": "Budapest", "Belgium": "Brussels", "Switzerland": "Bern",
    "Australia": "Canberra",
}  # fmt: skip

COLOURS_OF = {
    "the sky": "blue", "grass": "green", "snow": "white", "blood": "red", "coal": "black", "a lemon": "yellow",
    "a carrot": "orange", "the sun": "yellow", "a tomato": "red", "milk": "white", "the sea": "blue",
    "a banana": "yellow", "chocolate": "brown", "an elephant": "grey", "a leaf": "green", "the night": "black",
}  # fmt: skip

OPPOSITES = {
    "hot": "cold", "big": "small", "up": "down", "day": "night", "good": "bad", "fast": "slow", "happy": "sad",
    "old": "new", "wet": "dry", "open": "closed", "high": "low", "light": "dark", "hard": "soft", "full": "empty",
    "rich": "poor", "left": "right", "long": "short", "loud": "quiet", "yes": "no", "start": "stop",
}  # fmt: skip

SOUNDS = {
    "dog": "Woof", "cat": "Meow", "cow": "Moo", "sheep": "Baa", "duck": "Quack", "horse": "Neigh", "pig": "Oink",
    "frog": "Ribbit", "lion": "Roar", "owl": "Hoot", "bee": "Buzz", "snake": "Hiss", "mouse": "Squeak",
}  # fmt: skip

YOUNG = {
    "dog": "puppy", "cat": "kitten", "cow": "calf", "horse": "foal", "sheep": "lamb", "goat": "kid", "bear": "cub",
    "duck": "duckling", "hen": "chick", "frog": "tadpole", "deer": "fawn", "pig": "piglet",
}  # fmt: skip

LEGS = {
    "horse": "four", "dog": "four", "bird": "two", "spider": "eight", "bee": "six", "snake": "no", "cat": "four",
    "fish": "no", "hen": "two", "cow": "four",
}  # fmt: skip

SEQUENCES = {
    "days of the week": "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday",
    "months of the year": (
        "January, February, March, April, May, June, July, August, September, October, November, December"
    ),
    "seasons": "spring, summer, autumn, winter",
    "colours of the rainbow": "red, orange, yellow, green, blue, indigo, violet",
}

# Topic -> (short definition used for "What is ...?", further sentences used for "Tell me about ...").
TOPICS: dict[str, tuple[str, str]] = {
    "a remuda": (
        "A remuda is the herd of horses from which each day's mounts are chosen.",
        "Every morning the riders pick a fresh horse from it. When one horse is tired, another takes its place.",
    ),
    "a horse": (
        "A horse is a large animal with four legs that people can ride.",
        "Horses eat grass and hay. They can run fast, and they like to live in a herd.",
    ),
    "a river": (
        "A river is a long stream of water that flows to the sea.",
        "It often begins as a small spring in the hills. Many towns are built beside a river.",
    ),
    "a mountain": (
        "A mountain is a very high hill made of rock.",
        "The air is cold and thin near the top. Some mountains have snow all through the year.",
    ),
    "the moon": (
        "The moon is a ball of rock that goes around the earth.",
        "It has no light of its own. It shines because the sun shines on it.",
    ),
    "the sun": (
        "The sun is a star that gives us light and heat.",
        "It rises in the east and sets in the west. All plants need its light to grow.",
    ),
    "the earth": (
        "The earth is the planet on which we live.",
        "It goes around the sun once a year. Most of it is covered by water.",
    ),
    "rain": (
        "Rain is water that falls from the clouds.",
        "It fills the rivers and helps the plants to grow. After rain there may be a rainbow.",
    ),
    "snow": (
        "Snow is frozen water that falls from the sky in winter.",
        "It is white and cold. Children like to play in it.",
    ),
    "a tree": (
        "A tree is a tall plant with a trunk, branches and leaves.",
        "Trees give shade, fruit and wood. Some trees live for more than a thousand years.",
    ),
    "a computer": (
        "A computer is a machine that follows instructions and works with numbers.",
        "It can store words and pictures. Many computers can work together as one.",
    ),
    "a language model": (
        "A language model is a program that learns from text which word is likely to come next.",
        "Large ones have many billions of numbers inside. I am a very small one.",
    ),
    "an expert": (
        "An expert is one of several small networks in a model, of which only a few work on each word.",
        "A router chooses which expert is used. So a model can be large and still be quick.",
    ),
    "a token": (
        "A token is a piece of a word that a model reads or writes in one step.",
        "Short words are often one token. Long or rare words are made of several tokens.",
    ),
    "bread": (
        "Bread is a food made from flour and water and baked in an oven.",
        "People have eaten it for thousands of years. It is good with butter or cheese.",
    ),
    "water": (
        "Water is a clear liquid that all living things need.",
        "It turns to ice when it is cold and to steam when it is hot. Rivers, lakes and seas are full of it.",
    ),
    "a dog": (
        "A dog is an animal that lives with people and is a good friend.",
        "Dogs can guard a house or herd sheep. A young dog is called a puppy.",
    ),
    "a cat": (
        "A cat is a small animal with soft fur that likes to sleep and to hunt mice.",
        "Cats can see well at night. A young cat is called a kitten.",
    ),
    "a bird": (
        "A bird is an animal with wings and feathers.",
        "Most birds can fly. They lay eggs and build nests.",
    ),
    "a fish": (
        "A fish is an animal that lives in water and breathes with gills.",
        "Fish swim with their fins. Some live in rivers and some in the sea.",
    ),
    "music": (
        "Music is sound that is put in order so that it is good to hear.",
        "People sing it or play it with instruments. It can make us happy or sad.",
    ),
    "a book": (
        "A book is a set of pages with words or pictures on them.",
        "Books can tell stories or teach us things. A place with many books is called a library.",
    ),
    "a friend": (
        "A friend is a person whom you like and trust.",
        "Friends help each other and share what they have. It is good to have a friend.",
    ),
    "a desert": (
        "A desert is a dry place where very little rain falls.",
        "The days are hot and the nights are cold. Camels can live there with little water.",
    ),
    "an island": (
        "An island is a piece of land with water all around it.",
        "You can reach it by boat or by bridge. Some islands are small and some are very large.",
    ),
    "a cowboy": (
        "A cowboy is a rider who looks after cattle.",
        "He picks his horse from the remuda every morning. He sleeps under the stars at night.",
    ),
    "winter": (
        "Winter is the coldest season of the year.",
        "The days are short and the nights are long. In many places there is snow.",
    ),
    "summer": (
        "Summer is the warmest season of the year.",
        "The days are long and the nights are short. Many people go to the sea.",
    ),
}
