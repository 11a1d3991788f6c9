"""What a text says about an image, by phrases of a system's training data, and what contradicts it.

phrases.contradictions(["a dog and a cat"], "A dog and two cats at night.")  # ["cat 2, not 1"]
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import groupby
from operator import itemgetter

BACKGROUND, STYLE = "background", "style"  # tables of attributes
# Of requests: what they remove; put in place of what they name, or of "it"; and how they speak of
# any background.
_REMOVES = re.compile(r"\b(?:remove|delete|erase|rid of|take away)\b", re.I)
_REPLACES = re.compile(r"\b(?:replace|exchange|turn|change|make|become|into)\b", re.I)
_UNNAMED = re.compile(r"\b(?:it|them|this|that|these|those|everything|all|both|one)\b", re.I)
_BACKGROUNDS = {BACKGROUND, "scene", "place", "colour", "color"}
# Before a phrase.
_NOT = re.compile(
    r"(?<=\bnot )|(?<=n't )|(?<=\banywhere but )|(?<=\beverywhere but )"
    r"|(?<=\bnot be )|(?<=n't be )|(?<=\banywhere but be )|(?<=\beverywhere but be )"
)
# Before a thing of which there should be more.
_ADDS = re.compile(r"\b(?:add|another|more) (?:(?:an?|one|two|three|some|another|more|\d++) )*+")
_WORDS = re.compile(r"[a-z]+")

ByValue = Mapping[str, Sequence[str]]  # a value → the phrases that mean it


def any_of(phrases: Collection[str]) -> str:
    """A pattern of some phrases, of which the longest one matches; none matches nothing.

    Phrases share their beginnings, so that the number of phrases hardly changes the time.
    """
    branches: list[str] = []
    for letter, group in groupby(sorted(filter(None, phrases)), itemgetter(0)):
        branches.append(re.escape(letter) + any_of([phrase[1:] for phrase in group]))
    may_end = "?" if "" in phrases else ""
    return f"(?:{'|'.join(branches) or '(?!)'}){may_end}"


class Phrases:
    """Phrases by what they mean.

    tables: values of `things` (the first phrase is of one, others are of several), `numbers` ("0":
    "no", "without"), `relations` (left of), `opposites` (phrases of a relation with its two things
    exchanged), and of attributes of a whole image under any other name (style, background).
    """

    def __init__(self, tables: Mapping[str, ByValue]) -> None:
        self.meanings: dict[str, tuple[str, str]] = {}  # a phrase → its table and value
        for table, values in tables.items():
            for value, phrases in values.items():
                self.meanings |= dict.fromkeys(phrases, (table, value))
        self.single = {phrases[0] for phrases in tables.get("things", {}).values()}
        self.backgrounds = tables.get(BACKGROUND, {})
        # The longest phrase matches: a hot dog is no dog.
        self.pattern = re.compile(rf"(?<!\w){any_of(self.meanings)}(?!\w)")

    def read(self, text: str) -> tuple[list[str], dict[str, str]]:
        """The things that a text names, and its facts: the number of each thing, the relation of
        two, and attributes; "" if it says different ones. "not background": which it excludes."""
        things: list[str] = []
        facts: dict[str, str] = {}
        number = ""  # since the last thing
        relation: tuple[str, str] | None = None  # behind the first thing
        text = " ".join(text.lower().split())
        for match in self.pattern.finditer(text):
            phrase = match[0]
            table, value = self.meanings[phrase]
            if table == "numbers":
                number = value
            elif table in ("relations", "opposites"):
                relation = (table, value) if len(things) == 1 else None
            elif table != "things" and _NOT.match(text, match.start()):
                facts[f"not {table}"] = value
            elif table != "things":
                facts[table] = value if facts.get(table, value) == value else ""
            else:
                is_one = phrase in self.single and number != "0"
                facts[value] = "" if value in facts else "1" if is_one else number
                things.append(value)
                number = ""
        if relation and len(things) == 2:
            first, second = things if relation[0] == "relations" else things[::-1]
            facts["relation"] = f"{first} {relation[1]} {second}"
        return [thing for thing in dict.fromkeys(things) if facts[thing] != "0"], facts

    def asked_backgrounds(self, request: str) -> list[str]:
        """Backgrounds of which a request has a word that is of no other one's phrases."""
        counts = Counter[str]()
        for phrases in self.backgrounds.values():
            counts.update({word for phrase in phrases for word in phrase.split()})
        asked = {word for word in _WORDS.findall(request.lower()) if counts[word] == 1}
        return [
            value
            for value, phrases in self.backgrounds.items()
            if asked & {word for phrase in phrases for word in phrase.split()}
        ]

    def added_things(self, request: str) -> list[str]:
        """Things of which a request asks for more."""
        text = " ".join(request.lower().split())
        added: list[str] = []
        for before in _ADDS.finditer(text):
            match = self.pattern.match(text, before.end())
            table, thing = self.meanings[match[0]] if match else ("", "")
            if table == "things":
                added.append(thing)
        return added

    def contradictions(self, requests: Sequence[str], description: str) -> list[str]:
        """What a description says otherwise than the first of some texts that names a thing."""
        # 1. The request. Without a known thing in it there is nothing to compare.
        readings = [self.read(request) for request in requests]
        naming = [reading for reading in readings if reading[0]]
        if not naming:
            return []
        asked, asked_facts = naming[0]
        shown, shown_facts = self.read(description)

        # 2. Things that are missing, and others instead.
        missing = [thing for thing in asked if thing not in shown]
        added = [thing for thing in shown if thing not in asked]
        differences = [f"no {thing}" for thing in missing] + [f"also {thing}" for thing in added]
        if differences:
            asked_facts.pop("relation", None)  # it is one of other things

        # 3. Numbers, relation and attributes that both say.
        for name, asked_value in asked_facts.items():
            shown_value = shown_facts.get(name)
            is_said = asked_value and shown_value and name not in added
            if is_said and asked_value != shown_value:
                differences.append(f"{name} {shown_value}, not {asked_value}")
            excluded = name.removeprefix("not ")
            if excluded != name and shown_facts.get(excluded) == asked_value:
                differences.append(f"{excluded} {asked_value}, which is excluded")
        return differences

    def unasked_changes(self, before: str, request: str, after: str) -> list[str]:
        """What an edit does not show as asked, by descriptions of its images.

        Things that are named, but in neither; new, but not named; gone, but neither named nor
        replaced; to be removed or added, but as many as before. Another number, relation, style or
        background.
        """
        # 1. Things. One may be replaced by another that is named.
        old, old_facts = self.read(before)
        named, asked_facts = self.read(request)
        new, new_facts = self.read(after)
        differences = [f"no {thing}" for thing in named if thing not in (*old, *new)]
        removes = _REMOVES.search(request) is not None
        replaces = _REPLACES.search(request) and any(thing not in old for thing in named)
        may_go = [*named] if removes or replaces else []
        if _UNNAMED.search(request) and (removes or replaces):
            may_go += old
        gone = [thing for thing in old if thing not in (*may_go, *new)]
        differences += [f"no {thing}" for thing in gone]
        if removes:
            kept = [thing for thing in named if thing in old and thing in new]
            kept = [thing for thing in kept if old_facts[thing] == new_facts[thing]]
            differences += [f"still {thing}" for thing in kept]
        for thing in self.added_things(request):
            before_it, after_it = old_facts.get(thing), new_facts.get(thing)
            if before_it and after_it and int(after_it) <= int(before_it):
                differences.append(f"not more {thing}")
        differences += [f"also {thing}" for thing in new if thing not in (*old, *named)]

        # 2. Numbers of several, and the relation.
        for name in ("relation", *named):
            asked = asked_facts.get(name, "")
            shown = new_facts.get(name, "")
            if asked not in ("", "0", "1") and shown not in ("", asked):
                differences.append(f"{name} {shown}, not {asked}")

        # 3. The style, which is the same unless the request speaks of it.
        was, now = old_facts.get(STYLE), new_facts.get(STYLE)
        is_unasked = STYLE not in asked_facts and STYLE not in request.lower()
        if was and now and was != now and is_unasked:
            differences.append(f"{STYLE} {now}, not {was}")

        # 4. The background.
        was = old_facts.get(BACKGROUND)
        now = new_facts.get(BACKGROUND)
        backgrounds = self.asked_backgrounds(request)
        if now and backgrounds and now not in backgrounds:
            differences.append(f"{BACKGROUND} {now}, not {backgrounds[0]}")
        is_unasked = not backgrounds and not _BACKGROUNDS & {*_WORDS.findall(request.lower())}
        if was and now and was != now and is_unasked:
            differences.append(f"{BACKGROUND} {now}, not {was}")
        return differences
