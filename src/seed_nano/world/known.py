"""Words that nano's systems know, for their file of known words (`systems.domain`): names, ordinary English and numbers
up to four; and names for words that mean several of them.
"""

from __future__ import annotations

import json
from pathlib import Path

from seed_multimodal.disk import replace_text
from seed_nano.world.phrases import BACKGROUND_PHRASES, RELATIONS, WHERE_PHRASES
from seed_nano.world.things import COLOURS, NAMES, STYLES, THINGS

PLAIN = set("""
    0 1 2 3 4 able about above accurate accurately add after again all alone also always am an and another answer
    any are around as ask at away back background backgrounds be because become becomes been before behind below
    beside between big bigger both bottom briefly but by bye can can't capital center centre change clear color
    colour come comes concise consisting continue copy cost could counted create describe description did different
    do does doing don don't done draw drawing drawn each edit else english evening every few fine first following
    for four fourth france french from generate german get give given go goes going gone good goodbye got grass
    great had happen happy has have he heavy hello help her here hers hey hi his how i'd i'll i'm if image images in
    indoors inside instead into is it it's its itself joke just keep kind know knows languages large larger last
    left less let let's life like little location look looks lot made make many may me mean meaning middle might
    mind mine model more morning most move much must my name near need never new news next nice no nope not nothing
    now number of off often ok okay old on once one only or other our out over paint painted painting photo
    photograph phrase picture pictures place places please plus poem president problem provide put question
    questions quite really remove replace right robot same say scene scenes second see sentence several shall she
    ships short should show side single size sketch sky small smaller so some someone something somewhere sorry speak
    stars stay stays story style styles such sure swap take taken tell than thank thanks that that's the their them
    then there there's these they thing things think third this those three time to today together tomorrow too top
    try turn two under until up us use used very want was water way we weather welcome well were what what's when
    where which while who whose why will with without word words world would write yes yet you your yourself zero
""".split())
"""Ordinary English words, and those of requests, that name nothing to draw."""

EXAMPLES = {
    "animal": "cat, dog, horse", "pet": "cat, dog, rabbit", "bird": "owl, penguin, duck",
    "fish": "shark, whale, dolphin", "insect": "bee, ant, butterfly", "bug": "ladybug, bee, ant",
    "reptile": "turtle, snake, crocodile", "flower": "rose, tulip, sunflower", "plant": "cactus, tree, rose",
    "fruit": "apple, banana, lemon", "vegetable": "carrot, tomato, eggplant", "food": "pizza, burger, taco",
    "dessert": "cake, donut, cookie", "sweet": "lollipop, cupcake, cookie", "building": "house, castle, church",
    "vehicle": "car, bus, train", "plane": "airplane, helicopter, rocket", "ship": "sailboat", "boat": "sailboat",
    "instrument": "guitar, violin, drum", "toy": "teddy bear, kite, balloon", "tool": "hammer, axe, key",
    "ball": "soccer ball, basketball", "hat": "top hat, crown", "clothes": "dress, t-shirt, shoe",
    "furniture": "chair, bed", "fire": "flame", "computer": "laptop", "phone": "telephone", "mobile": "telephone",
    "tv": "television", "bike": "bicycle, motorcycle", "lorry": "truck", "kitten": "cat", "puppy": "dog",
    "bunny": "rabbit", "chicken": "rooster",
    **dict.fromkeys("five six seven eight nine ten eleven twelve dozen hundred".split(), "two, three, four"),
}
"""Names that nano knows in the place of a word that it does not."""


def write_known_words(file: Path) -> None:
    """Write the file of known words."""
    phrases = [phrase for table in (BACKGROUND_PHRASES, WHERE_PHRASES, RELATIONS) for some in table.values()
               for phrase in some]
    known = {"about": f"{len(NAMES)} things, up to four of each",
             "names": sorted({form for name in NAMES for form in (name, THINGS[name].plural)}),
             "words": sorted(PLAIN | {*COLOURS, *STYLES} | {word for phrase in phrases for word in phrase.split()}),
             "examples": {word: names.split(", ") for word, names in EXAMPLES.items()}}
    replace_text(file, json.dumps(known, ensure_ascii=False))
