"""Descriptions of each code point: label, group, subgroup, tags, tone and gender, from emojibase (Unicode CLDR).

Labels become plain lower-case ASCII English ("flag: France" -> "flag of france"), since answers are short
lower-case phrases and the smallest model has a small vocabulary.
"""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seed_multimodal.data.nano.packages import plain_code, read_member
from seed_multimodal.data.nano.render import COLOURS
from seed_multimodal.data.nano.types import STYLE_NAMES

TONES = {1: "light", 2: "medium-light", 3: "medium", 4: "medium-dark", 5: "dark"}

# emojibase's own messages are interface words ("with tongue"); these read well behind a label and as an answer.
SUBGROUPS = {
    "face-smiling": "smiling face", "face-affection": "affectionate face", "face-tongue": "face with tongue",
    "face-hand": "face with hands", "face-neutral-skeptical": "neutral face", "face-sleepy": "sleepy face",
    "face-unwell": "unwell face", "face-hat": "face with hat", "face-glasses": "face with glasses",
    "face-concerned": "concerned face", "face-negative": "negative face", "face-costume": "costume face",
    "cat-face": "cat face", "monkey-face": "monkey face", "heart": "heart", "emotion": "emotion",
    "hand-fingers-open": "open hand", "hand-fingers-partial": "hand sign", "hand-single-finger": "pointing finger",
    "hand-fingers-closed": "closed hand", "hands": "hands", "hand-prop": "hand with object",
    "body-parts": "body part", "person": "person", "person-gesture": "gesture", "person-role": "role or career",
    "person-fantasy": "fantasy person", "person-activity": "activity of a person", "person-sport": "sport of a person",
    "person-resting": "resting person", "family": "family", "person-symbol": "people symbol",
    "animal-mammal": "mammal", "animal-bird": "bird", "animal-amphibian": "amphibian", "animal-reptile": "reptile",
    "animal-marine": "sea animal", "animal-bug": "bug", "plant-flower": "flower", "plant-other": "plant",
    "food-fruit": "fruit", "food-vegetable": "vegetable", "food-prepared": "prepared food", "food-asian": "asian food",
    "food-marine": "seafood", "food-sweet": "sweet", "drink": "drink", "dishware": "dishware", "place-map": "map",
    "place-geographic": "landscape", "place-building": "building", "place-religious": "religious building",
    "place-other": "place", "transport-ground": "ground transport", "transport-water": "water transport",
    "transport-air": "air transport", "hotel": "hotel", "time": "time", "sky-weather": "sky and weather",
    "event": "event", "award-medal": "award", "sport": "sport", "game": "game", "arts-crafts": "arts and crafts",
    "clothing": "clothing", "sound": "sound", "music": "music", "musical-instrument": "musical instrument",
    "phone": "phone", "computer": "computer", "light-video": "light and video", "book-paper": "book and paper",
    "money": "money", "mail": "mail", "writing": "writing", "office": "office supply", "lock": "lock or key",
    "tool": "tool", "science": "science equipment", "medical": "medical item", "household": "household item",
    "other-object": "other object", "transport-sign": "transport sign", "warning": "warning sign", "arrow": "arrow",
    "religion": "religious symbol", "zodiac": "zodiac sign", "av-symbol": "media symbol", "gender": "gender sign",
    "math": "math symbol", "punctuation": "punctuation", "currency": "currency", "other-symbol": "other symbol",
    "keycap": "keycap", "alphanum": "letter or word symbol", "geometric": "shape", "flag": "other flag",
    "country-flag": "country flag", "subdivision-flag": "region flag", "letter": "letter",
}
GROUPS = {
    "smileys-emotion": "smileys and emotion", "people-body": "people and body", "animals-nature": "animals and nature",
    "food-drink": "food and drink", "travel-places": "travel and places", "activities": "activities",
    "objects": "objects", "symbols": "symbols", "flags": "flags",
}
# Words that train uses as answers: a family labelled with one of them cannot be held out as never named.
COMMON_WORDS = frozenset({*SUBGROUPS.values(), *GROUPS.values(), *COLOURS, *STYLE_NAMES.values(), *TONES.values()})


@dataclass(frozen=True)
class Concept:
    """One code point sequence and its words. `family_code` is the code with tone and gender folded away."""

    code: str
    label: str
    group: str
    subgroup: str
    tags: tuple[str, ...]
    tone: str | None
    gender: str | None
    base: str
    order: int

    @property
    def family_code(self) -> str:
        """See `fold_code`."""
        return fold_code(self.code)


def read_concepts(archive: Path, *, all_tones: bool = False) -> dict[str, Concept]:
    """Concepts by code. Skin-tone and hair swatches are left out; toned forms only with `all_tones`."""
    entries = json.loads(read_member(archive, "package/en/data.json"))
    meta = json.loads(read_member(archive, "package/meta/groups.json"))
    concepts: dict[str, Concept] = {}
    for number, entry in enumerate(entries):
        group = meta["groups"].get(str(entry.get("group")), "symbols")
        subgroup = meta["subgroups"].get(str(entry.get("subgroup")), "letter")
        if group == "component":
            continue
        base = plain_code(entry["hexcode"])
        forms: list[tuple[dict[str, Any], str | None]] = [(entry, None)]
        if all_tones:
            forms += [(skin, _tone_words(skin["tone"])) for skin in entry.get("skins", ())]
        for form, tone in forms:
            code = plain_code(form["hexcode"])
            label = plain_label(entry["label"])
            concepts[code] = Concept(
                code=code, label=label, group=GROUPS[group], subgroup=SUBGROUPS.get(subgroup, subgroup),
                tags=tuple(tag for tag in dict.fromkeys(plain_text(t) for t in entry.get("tags", ())) if tag != label),
                tone=tone, gender=gender_of(label), base=base, order=entry.get("order", number),
            )
    return concepts


def _tone_words(tone: int | list[int]) -> str:
    return " and ".join(TONES[t] for t in (tone if isinstance(tone, list) else [tone]))


def plain_text(text: str) -> str:
    """Lower-case ASCII: accents dropped, typographic quotes made plain."""
    text = text.replace("\u2019", "'").replace("\u201c", "").replace("\u201d", "").replace("\u2013", "-")
    text = unicodedata.normalize("NFKD", text)
    return re.sub(r"\s+", " ", text.encode("ascii", "ignore").decode()).strip().lower()


def plain_label(label: str) -> str:
    """A CLDR label as an English phrase: `man: red hair` -> `man with red hair`, `flag: Chad` -> `flag of chad`."""
    text = plain_text(label)
    head, colon, tail = text.partition(": ")
    if not colon:
        return text
    if head == "flag":
        return f"flag of {tail}"
    if head == "keycap":
        return f"keycap {({'#': 'hash', '*': 'asterisk'}).get(tail, tail)}"
    if tail == "bald":
        return f"bald {head}"
    if head in ("man", "woman", "person"):
        return f"{head} with {tail}"
    if head in ("family", "kiss", "couple with heart"):
        parts = tail.split(", ")
        return f"{head} of {', '.join(parts[:-1])} and {parts[-1]}"
    return f"{head} {tail}"


def gender_of(label: str) -> str | None:
    """`man`, `woman` or `person` when the label names exactly one of them, else None."""
    words = set(re.findall(r"[a-z']+", label))
    found = [g for g, names in (
        ("man", {"man", "men", "merman"}), ("woman", {"woman", "women", "mermaid"}),
        ("person", {"person", "people", "merperson"}),
    ) if words & names]
    return found[0] if len(found) == 1 else None


_FOLD_POINT = {
    0x1F468: 0x1F9D1, 0x1F469: 0x1F9D1, 0x1F466: 0x1F9D2, 0x1F467: 0x1F9D2, 0x1F474: 0x1F9D3, 0x1F475: 0x1F9D3,
    0x1F934: 0x1FAC5, 0x1F478: 0x1FAC5, 0x1F936: 0x1F385, 0x1F57A: 0x1F483, 0x1F930: 0x1FAC3, 0x1FAC4: 0x1FAC3,
    0x1F46C: 0x1F46B, 0x1F46D: 0x1F46B,
}
_FOLD_WHOLE = {"1f9d1-200d-1f384": "1f385", "1f9d1-200d-1f91d-200d-1f9d1": "1f46b", "1faf1-200d-1faf2": "1f91d"}


def fold_code(code: str) -> str:
    """Code with skin tones dropped, man/woman made person, boy/girl child, gender signs and "facing right" dropped."""
    points = [_FOLD_POINT.get(p, p) for p in (int(x, 16) for x in code.split("-")) if not 0x1F3FB <= p <= 0x1F3FF]
    folded = "-".join(f"{p:x}" for p in points)
    folded = re.sub(r"-200d-(2640|2642|27a1)(?=-|$)", "", folded)
    return _FOLD_WHOLE.get(folded, folded)


_FOLD_WORDS = {"man", "woman", "person", "men", "women", "people", "adult", "facing", "right"}


def fold_label(label: str) -> str:
    """Label with gender words dropped, for uniting `man cook`, `woman cook` and `cook`; whole when nothing is left."""
    if label.startswith(("family", "kiss of", "couple with heart", "kiss")) and label != "kiss mark":
        return label.split(" of ")[0]
    if not set(label.split()) & (_FOLD_WORDS - {"facing", "right"}):
        return label
    return " ".join(word for word in label.split() if word not in _FOLD_WORDS) or "person"
