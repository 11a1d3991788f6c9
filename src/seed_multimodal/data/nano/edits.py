"""Edit pairs: the same thing in another style, another person or tone, or another thing in the same style.

Both pictures are of one split. In test_combo the target is held out and the source may be a train picture,
because it is only given; no train pair touches a held-out picture.
"""

from __future__ import annotations

from collections import defaultdict

from seed_multimodal.data.nano.concepts import fold_label
from seed_multimodal.data.nano.families import choose
from seed_multimodal.data.nano.grammar import with_article
from seed_multimodal.data.nano.types import STYLE_NAMES, Edit, NanoRecord

RESPONSE = "Here it is."

INSTRUCTIONS = {
    "style": ("Make it in {style} style.", "Redraw this in {style} style.", "Turn this into a {style} drawing.",
              "Change the style to {style}.", "Show the same thing in {style} style."),
    "person": ("Make it {person}.", "Change the person to {person}.", "Show {person} instead."),
    "swap": ("Draw {thing} instead.", "Replace it with {thing}.", "Now show {thing} in the same style."),
    "tone": ("Change the skin tone to {tone}.", "Give it {tone} skin tone."),
}
PEOPLE = {"man": "a man", "woman": "a woman", "person": "a person"}


def allowed(source: NanoRecord, target: NanoRecord) -> bool:
    """Whether a pair may be made at all: one split, or a train picture given for a held-out combination."""
    return source.split == target.split or (target.split == "test_combo" and source.split == "train")


def make_edits(records: list[NanoRecord]) -> list[Edit]:
    """All edit pairs of the records, ordered by source and target."""
    same_code, same_shape, same_kind = defaultdict(list), defaultdict(list), defaultdict(list)
    for record in records:
        same_code[record.code].append(record)
        same_kind[record.style, record.subgroup].append(record)
        if record.gender:
            same_shape[record.style, record.family, record.tone, fold_label(record.label)].append(record)
    found: list[Edit] = []
    for members in same_code.values():
        found += [_edit("style", a, b, style=STYLE_NAMES[b.style]) for a in members for b in members
                  if a.style != b.style and allowed(a, b)]
    for members in same_shape.values():
        genders = [member.gender for member in members]
        found += [_edit("person", a, b, person=PEOPLE[b.gender or ""]) for a in members for b in members
                  if a.gender != b.gender and allowed(a, b) and genders.count(b.gender) == 1]
    found += _tone_edits(records)
    for members in same_kind.values():
        for source in members:
            others = [m for m in members if m.label != source.label and allowed(source, m)]
            # Every held-out combination is a target; otherwise a picture gets one partner of its own split.
            own = [m for m in others if m.split == source.split]
            if own:
                target = choose(own, "swap", source.key)
                found.append(_edit("swap", source, target, thing=with_article(target.label)))
    return sorted(found, key=lambda edit: (edit.source, edit.target, edit.kind))


def _tone_edits(records: list[NanoRecord]) -> list[Edit]:
    """Pairs of one label and style in two skin tones (only builds with all tones have them)."""
    toned = defaultdict(list)
    for record in records:
        if record.tone and " and " not in record.tone:
            toned[record.style, record.label].append(record)
    found = []
    for members in toned.values():
        for source in members:
            others = [m for m in members if m.tone != source.tone and allowed(source, m)]
            found += [_edit("tone", source, target, tone=target.tone or "") for target in others]
    return found


def _edit(kind: str, source: NanoRecord, target: NanoRecord, **words: str) -> Edit:
    text = choose(list(INSTRUCTIONS[kind]), "edit", kind, source.key, target.key)
    return Edit(source.key, target.key, text.format(**words), RESPONSE, kind, target.split)
