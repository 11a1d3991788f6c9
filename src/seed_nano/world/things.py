"""The parts of nano's scenes: things, styles, backgrounds, layouts, and their English names.

A thing is one clear drawing with a common name and a regular plural, there in all three styles. The list was made by
looking at every drawing; one that a person would not name so was left out.
"""

from __future__ import annotations

from dataclasses import dataclass

STYLES = ("noto", "twemoji", "fluent")


@dataclass(frozen=True)
class Thing:
    """`name` (singular, lower case), `code` (its code point in hex), `held_out`: only ever rebuilt, never named."""

    name: str
    code: str
    held_out: bool = False

    @property
    def plural(self) -> str:
        """English plural: dogs, foxes, cherries, snowmen."""
        if self.name.endswith("man"):
            return self.name[:-3] + "men"
        if self.name.endswith(("s", "x", "sh", "ch", "to")):
            return self.name + "es"
        if self.name.endswith("y") and self.name[-2] not in "aeiou":
            return self.name[:-1] + "ies"
        return self.name + "s"

    @property
    def article(self) -> str:
        """`a` or `an`, by sound."""
        return article(self.name)


def article(words: str) -> str:
    """`a` or `an` before `words`."""
    return "an" if words[0] in "aeio" or words.startswith(("umb",)) else "a"


_KNOWN = """
    dog 1f415; cat 1f408; lion 1f981; tiger 1f405; horse 1f40e; cow 1f404; pig 1f416; camel 1f42a; giraffe 1f992;
    elephant 1f418; hippo 1f99b; rabbit 1f407; hedgehog 1f994; bear 1f43b; koala 1f428; panda 1f43c; sloth 1f9a5;
    kangaroo 1f998; monkey 1f412; fox 1f98a; unicorn 1f984; rooster 1f413; chick 1f424; penguin 1f427; duck 1f986;
    owl 1f989; flamingo 1f9a9; peacock 1f99a; parrot 1f99c; frog 1f438; crocodile 1f40a; turtle 1f422; snake 1f40d;
    dragon 1f409; whale 1f433; dolphin 1f42c; shark 1f988; octopus 1f419; crab 1f980; lobster 1f99e; snail 1f40c;
    butterfly 1f98b; ant 1f41c; bee 1f41d; ladybug 1f41e; spider 1f577; scorpion 1f982; dinosaur 1f995; rose 1f339;
    sunflower 1f33b; tulip 1f337; cactus 1f335; mushroom 1f344; palm tree 1f334; pine tree 1f332; tree 1f333;
    watermelon 1f349; orange 1f34a; lemon 1f34b; banana 1f34c; pineapple 1f34d; apple 1f34e; pear 1f350;
    strawberry 1f353; kiwi 1f95d; tomato 1f345; avocado 1f951; eggplant 1f346; carrot 1f955; croissant 1f950;
    pretzel 1f968; waffle 1f9c7; burger 1f354; pizza 1f355; hot dog 1f32d; taco 1f32e; ice cream 1f368; donut 1f369;
    cookie 1f36a; cake 1f382; cupcake 1f9c1; lollipop 1f36d; teapot 1fad6; cup 2615; house 1f3e0; tent 26fa;
    castle 1f3f0; church 26ea; train 1f682; bus 1f68c; ambulance 1f691; fire truck 1f692; car 1f697; tractor 1f69c;
    motorcycle 1f3cd; bicycle 1f6b2; airplane 2708; helicopter 1f681; rocket 1f680; ufo 1f6f8; sailboat 26f5;
    anchor 2693; truck 1f69a; skateboard 1f6f9; volcano 1f30b; ferris wheel 1f3a1; clock 23f0; sun 2600; star 2b50;
    rainbow 1f308; umbrella 2602; snowman 26c4; snowflake 2744; flame 1f525; balloon 1f388; gift 1f381; trophy 1f3c6;
    soccer ball 26bd; basketball 1f3c0; teddy bear 1f9f8; kite 1fa81; crown 1f451; top hat 1f3a9; guitar 1f3b8;
    violin 1f3bb; trumpet 1f3ba; drum 1f941; bell 1f514; key 1f511; hammer 1f528; candle 1f56f; light bulb 1f4a1;
    pencil 270f; camera 1f4f7; television 1f4fa; telephone 260e; laptop 1f4bb; t-shirt 1f455; dress 1f457;
    backpack 1f392; shoe 1f45f; diamond 1f48e; chair 1fa91; bed 1f6cf; axe 1fa93; magnet 1f9f2; pumpkin 1f383;
    moon 1f319; envelope 2709; planet 1fa90
"""
_HELD_OUT = """
    goat 1f410; seal 1f9ad; squid 1f991; peach 1f351; sandwich 1f96a; coconut 1f965; microscope 1f52c; sled 1f6f7;
    saxophone 1f3b7; canoe 1f6f6; compass 1f9ed; basket 1f9fa
"""


def _read(table: str, held_out: bool) -> list[Thing]:
    rows = (row.split() for row in table.replace("\n", " ").split(";"))
    return [Thing(" ".join(words), code, held_out) for *words, code in rows]


THINGS = {thing.name: thing for thing in _read(_KNOWN, False) + _read(_HELD_OUT, True)}
NAMES = tuple(name for name, thing in THINGS.items() if not thing.held_out)
HELD_OUT = tuple(name for name, thing in THINGS.items() if thing.held_out)

COLOURS = {
    "white": (255, 255, 255), "blue": (150, 199, 255), "green": (170, 224, 150), "yellow": (255, 233, 148),
    "pink": (255, 203, 220), "dark": (40, 44, 92),
}
PLACES = ("meadow", "sea", "night", "room")
BACKGROUNDS = (*COLOURS, *PLACES)
