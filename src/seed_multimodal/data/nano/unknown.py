"""Words that nano's world does not have, so that a system can say so instead of answering as if it knew.

    unknown_words("Draw a zebra.")    ["zebra"]
    unknown_note("Draw a zebra.")     "nano does not know 'zebra': it knows 150 things; nearest: …"
"""

from __future__ import annotations

import difflib
import re

from seed_multimodal.data.nano.phrases import BACKGROUND_PHRASES, RELATIONS, WHERE_PHRASES
from seed_multimodal.data.nano.things import COLOURS, NAMES, STYLES, THINGS

PLAIN = set("""
    able about above accurate accurately add after again all alone also always am an and another answer any are
    around as ask at away back background be because become becomes been before behind below beside between big
    bigger both bottom but by can can't center centre change clear color colour come comes concise consisting continue
    copy could counted create describe description did different do does doing don don't done dozen draw drawing
    drawn each edit eight else every few first five following for four fourth from generate get give given go goes
    gone good got grass had has have he hello her here hers hey hi his how i'd i'll i'm if image images in indoors
    inside instead into is it it's its itself just keep kind know large larger last left less let let's like
    little look looks make many may me mean middle might mine more most move much must my near need new next nine
    no nope not now number of off often ok okay on once one only or other our out over paint painting photo
    photograph phrase picture pictures place places please provide put question quite really remove replace right
    same say scene second see sentence seven several shall she short should show single six size sketch sky small
    smaller so some someone something somewhere stars stay stays story style styles such sure swap take tell ten
    than thank thanks that that's the their them then there there's these they thing things think third this those
    three to together too top try turn two under until up us use very want was water way we well were what what's
    when where which while who whose why will with without word words would write yes yet you your zero
""".split())
"""Ordinary English words, and those of requests, that name nothing to draw."""

_KNOWN = PLAIN | {*COLOURS, *STYLES} | {
    word for table in (BACKGROUND_PHRASES, WHERE_PHRASES, RELATIONS) for phrases in table.values()
    for phrase in phrases for word in phrase.split()}
_FORMS = sorted((form for name in NAMES for form in (name, THINGS[name].plural)), key=len, reverse=True)
_NAMED = re.compile(rf"(?<!\w)(?:{'|'.join(_FORMS)})(?!\w)")
# A word in any alphabet, not the end of `2nd`; or an emoji.
_WORD = re.compile(r"(?<!\w)[^\W\d]+(?:'[^\W\d]+)*|[\u2600-\u27bf\U0001f000-\U0001faff]")
_SHOWN = 40  # letters of a word in a sentence


def unknown_words(text: str) -> list[str]:
    """Words of a request that are neither nano's names nor ordinary English, in order, each once, in lower case. A part
    of a name (`palm`) is unknown, too."""
    plain = re.sub(r"'s\b|(?<=[dest])n't\b", "", text.lower().replace("\u2019", "'").replace("_", " "))
    words = dict.fromkeys(_WORD.findall(_NAMED.sub(" ", plain)))
    return [word for word in words if (len(word) > 1 or not word.isascii()) and word not in _KNOWN]


def unknown_note(text: str) -> str:
    """One sentence about words that nano does not know, with the things that look most like the first; or nothing."""
    unknown = [word if len(word) <= _SHOWN else f"{word[:_SHOWN]}…" for word in unknown_words(text)]
    if not unknown:
        return ""
    near = nearest_things(unknown[0])
    return (f"nano does not know {', '.join(map(repr, unknown[:3]))}: it knows {len(NAMES)} things"
            f"{'; nearest: ' + ', '.join(near) if near else ', by their English names'}.")


def nearest_things(word: str, number: int = 3) -> list[str]:
    """Names of nano's world that look most like a word it does not know; none of a word without a letter of theirs."""
    return difflib.get_close_matches(word.lower(), NAMES, number, 0.01)
