"""Check that a built nano set leaks nothing from its held-out splits into train.

Run: `python -m seed_multimodal.data.nano check data/nano64` (exit code 1 and one line per problem when it leaks).
Checked: files are the manifest's; families and labels of val and test_concept are absent from train, in records,
captions, tags, questions, instructions and conversations; a test_combo style of a family is absent from train while its
labels are there in another style; no train record, edit or conversation touches a held-out picture; no two splits hold
a pixel-equal picture, nor (within a style) a nearly equal one.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from seed_multimodal.data.nano.conversations import ASKS_DRAWING
from seed_multimodal.data.nano.edits import INSTRUCTIONS
from seed_multimodal.data.nano.grammar import with_article
from seed_multimodal.data.nano.load import NanoSet, load_nano
from seed_multimodal.data.nano.near import near_pairs
from seed_multimodal.data.nano.types import STYLE_NAMES, NanoRecord
from seed_multimodal.data.nano.words import QUESTIONS, captions
from seed_multimodal.disk import sha256_of
from seed_multimodal.errors import DataError

UNSEEN = ("val", "test_concept")
_MOST_SHOWN = 20


def check_folder(folder: str | Path) -> list[str]:
    """Problems of a built folder, one sentence each; empty when it is sound. Raises DataError when unreadable."""
    nano = load_nano(folder)
    return [*_files(nano), *check_set(nano)]


def check_set(nano: NanoSet) -> list[str]:
    """Problems of a loaded set, one sentence each."""
    return [*_records(nano), *_combos(nano), *_words(nano), *_links(nano), *_pixels(nano)]


def _files(nano: NanoSet) -> Iterator[str]:
    for name, wanted in nano.manifest["files"].items():
        if sha256_of(nano.folder / name) != wanted["sha256"]:
            yield f"{name}: its sha256 is not the manifest's."
    for split, wanted in nano.manifest.get("counts", {}).get("pictures", {}).items():
        if len(nano.split(split)) != wanted:
            yield f"manifest.json: counts {wanted} pictures in {split}, there are {len(nano.split(split))}."


def _records(nano: NanoSet) -> Iterator[str]:
    """Families and labels stay on one side; only train and test_combo share them."""
    for name in ("family", "label"):
        sides: dict[str, set[str]] = defaultdict(set)
        for record in nano.records:
            sides[getattr(record, name)].add(record.split)
        for value, splits in sides.items():
            if len(splits) > 1 and not splits <= {"train", "test_combo"}:
                yield f"{name} {value!r} is in {' and '.join(sorted(splits))}."


def _combos(nano: NanoSet) -> Iterator[str]:
    train = [r for r in nano.records if r.split == "train"]
    pairs, labels = {(r.family, r.style) for r in train}, {r.label for r in train}
    for record in nano.records:
        if record.split == "test_combo":
            if (record.family, record.style) in pairs:
                yield f"{record.key}: its family is in train in the same style."
            if record.label not in labels:
                yield f"{record.key}: its label {record.label!r} is not in train in any style."


def held_out_phrases(nano: NanoSet) -> set[str]:
    """Every text that would name an unseen family, in each of the set's own wordings."""
    phrases: set[str] = set()
    tones = {record.tone for record in nano.records}
    for label in {record.label for record in nano.records if record.split in UNSEEN}:
        thing = with_article(label)
        phrases |= {label, thing}
        phrases |= {text.format(thing=thing) for text in (*QUESTIONS["yesno"], *INSTRUCTIONS["swap"])}
        for style, tone in product(STYLE_NAMES, tones):
            made = captions(style, label, "", [], tone)[:4]
            phrases.update(made, (text.format(caption=made[0]) for text in ASKS_DRAWING))
    return phrases


def _words(nano: NanoSet) -> Iterator[str]:
    held = held_out_phrases(nano)

    def bad(text: str) -> bool:
        # "label, subgroup" and "label: tag, tag" captions are looked at part by part.
        return text in held or any(part in held for part in text.replace(": ", ", ").split(", "))

    for record in nano.records:
        if record.split != "train":
            continue
        texts = [*record.captions, *record.tags, *(t for qa in record.qa for t in (qa.question, qa.answer))]
        for text in texts:
            if bad(text):
                yield f"{record.key}: its words name a held-out thing: {text!r}."
    for edit in nano.edits:
        if edit.split == "train" and edit.instruction in held:
            yield f"edit {edit.source} -> {edit.target}: names a held-out thing: {edit.instruction!r}."
    for number, conversation in enumerate(nano.conversations, 1):
        if conversation.split == "train":
            for message in conversation.messages:
                for part in message["content"]:
                    if isinstance(part, str) and part in held:
                        yield f"conversation {number}: names a held-out thing: {part!r}."


def _links(nano: NanoSet) -> Iterator[str]:
    """Every picture an edit or conversation touches is of its split; test_combo may also show train pictures."""
    split_of = {record.key: record.split for record in nano.records}

    def fits(key: str, split: str) -> bool:
        return split_of[key] == split or (split == "test_combo" and split_of[key] == "train")

    for edit in nano.edits:
        if split_of[edit.target] != edit.split or not fits(edit.source, edit.split):
            yield (f"edit {edit.source} ({split_of[edit.source]}) -> {edit.target} ({split_of[edit.target]}) "
                   f"is in {edit.split}.")
    for number, conversation in enumerate(nano.conversations, 1):
        wrong = [key for key in conversation.keys if not fits(key, conversation.split)]
        for key in wrong:
            yield f"conversation {number} of {conversation.split} shows {key}, which is in {split_of[key]}."
        if not any(split_of[key] == conversation.split for key in conversation.keys):
            yield f"conversation {number} of {conversation.split} shows no picture of its split."


def _pixels(nano: NanoSet) -> Iterator[str]:
    images = nano.images()
    seen: dict[bytes, NanoRecord] = {}
    for record, image in zip(nano.records, images, strict=True):
        digest = hashlib.sha256(image.tobytes()).digest()
        other = seen.setdefault(digest, record)
        if other.split != record.split:
            yield f"{record.key} ({record.split}) is pixel-equal to {other.key} ({other.split})."
    for i, j in near_pairs(list(images)):
        first, second = nano.records[i], nano.records[j]
        apart = {first.split, second.split}
        across = apart <= {"train", "test_combo"} and first.style != second.style
        if len(apart) > 1 and not across and images[i].tobytes() != images[j].tobytes():
            yield f"{second.key} ({second.split}) looks the same as {first.key} ({first.split})."


def report(problems: list[str]) -> None:
    """Raise DataError with the problems (the first 20 and how many more), if there are any."""
    if problems:
        more = len(problems) - _MOST_SHOWN
        lines = problems[:_MOST_SHOWN] + ([f"and {more} more"] if more > 0 else [])
        raise DataError("the set leaks or is damaged:\n  " + "\n  ".join(lines))
