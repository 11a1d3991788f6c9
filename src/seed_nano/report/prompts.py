"""Prompts in nano's words, in the formats of GenEval, GenEval 2 and DPG-Bench.

    python -m seed_nano.report.prompts --out outputs/nano_prompts

evaluation_metadata.jsonl    as many of each kind as GenEval has, 553 in all; colours are styles
geneval2_data.jsonl          the same prompts with questions and answers
dpg_bench.csv                captions of all labels, with questions that depend on each other
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from seed_multimodal.cli.common import program_parser
from seed_multimodal.disk import JsonObject, replace_text, writable_folder, writing
from seed_multimodal.entry import DONE, bounded_int, run_program
from seed_multimodal.errors import ConfigError
from seed_nano.world.scene import Scene
from seed_nano.world.splits import scenes
from seed_nano.world.things import (
    NAMES,
    NUMBERS,
    RELATIONS,
    STYLES,
    VOCABULARY,
    article,
    plural,
)
from seed_nano.world.words import describe, noun_phrase

# GenEval's kinds with their numbers of prompts.
KINDS = {
    "single_object": 80,
    "two_object": 99,
    "counting": 80,
    "colors": 94,
    "position": 100,
    "color_attr": 100,
}
TWO_KINDS = ((2, 1), (1, 2), (2, 2))  # numbers of two things that nano's scenes have
ITEMS = 100  # of DPG-Bench's file
DPG_COLUMNS = (
    "item_id",
    "text",
    "keywords",
    "proposition_id",
    "dependency",
    "category_broad",
    "category_detailed",
    "tuple",
    "question_natural_language",
)


@dataclass(frozen=True)
class NanoPrompt:
    """A prompt with GenEval's objects."""

    tag: str
    text: str
    include: Sequence[JsonObject]
    exclude: Sequence[JsonObject] = ()

    def metadata(self) -> JsonObject:
        """The line of `evaluation_metadata.jsonl`."""
        line: JsonObject = {"tag": self.tag, "include": list(self.include)}
        if self.exclude:
            line["exclude"] = list(self.exclude)
        return line | {"prompt": self.text}

    def questions(self) -> JsonObject:
        """The line of `geneval2_data.jsonl`: what the prompt says, as questions and answers."""
        skills: list[str] = []
        questions: list[list[str]] = []

        def add(skill: str, kind: str, thing: str, answer: str) -> None:
            wording: str = VOCABULARY["questions"][kind][0]
            skills.append(skill)
            questions.append([wording.format(thing), answer])

        # Is the thing there, how many, in which style?
        for item in self.include:
            name = item["class"]
            add("object", "yesno", noun_phrase(1, name), "Yes")
            add("count", "count", plural(name), NUMBERS.get(item["count"], "one"))
        if "color" in self.include[0]:
            add("attribute", "style", "", self.include[0]["color"])
        return {
            "prompt": self.text,
            "atom_count": len(skills),
            "vqa_list": questions,
            "skills": skills,
        }


def make_prompt(tag: str, rng: random.Random) -> NanoPrompt:
    """A prompt of one of `KINDS`."""
    first, second = rng.sample(NAMES, 2)
    style = rng.choice(STYLES)

    def objects(name: str, count: int = 1, **more: object) -> JsonObject:
        return {"class": name, "count": count, **more}

    if tag == "single_object":
        return NanoPrompt(tag, noun_phrase(1, first), [objects(first)])
    if tag == "colors":
        return NanoPrompt(tag, noun_phrase(1, first, style), [objects(first, color=style)])
    if tag == "counting":
        count = rng.choice((2, 3, 4))
        too_many = [objects(first, count + 1)]
        return NanoPrompt(tag, noun_phrase(count, first), [objects(first, count)], too_many)
    if tag == "position":
        relation = rng.choice(tuple(RELATIONS))
        text = f"{noun_phrase(1, first)} {relation} {noun_phrase(1, second)}"
        return NanoPrompt(tag, text, [objects(second), objects(first, position=[relation, 0])])

    # Two things, of which the text gives the style in one of the kinds.
    n_first, n_second = rng.choice(TWO_KINDS)
    adjective = style if tag == "color_attr" else ""
    text = f"{noun_phrase(n_first, first, adjective)} and {noun_phrase(n_second, second)}"
    colour = {"color": style} if adjective else {}
    return NanoPrompt(
        tag, text, [objects(first, n_first, **colour), objects(second, n_second, **colour)]
    )


def make_prompts(seed: int) -> list[NanoPrompt]:
    """All prompts, each once, in the order of `KINDS`."""
    rng = random.Random(seed)
    prompts: dict[str, NanoPrompt] = {}
    for tag, count in KINDS.items():
        n_before = len(prompts)
        while len(prompts) < n_before + count:
            prompt = make_prompt(tag, rng)
            prompts.setdefault(prompt.text, prompt)
    return list(prompts.values())


def dpg_rows(item: str, scene: Scene) -> list[tuple[str, ...]]:
    """The rows of a scene in DPG-Bench's file: each thing, then its number, which depends on it."""
    rows: list[tuple[str, ...]] = []

    def add(parent: int, broad: str, detailed: str, phrase: str) -> None:
        question = f"Is there {phrase} in the picture?"
        names = (broad, detailed, f"{broad} - {detailed} ({question})", question)
        rows.append((item, describe(scene), "", str(len(rows) + 1), str(parent), *names))

    for name, count in zip(scene.things, scene.counts, strict=True):
        add(0, "entity", "whole", f"{article(name)} {name}")
        noun = plural(name) if count > 1 else name
        add(len(rows), "other", "count", f"{NUMBERS.get(count, 'one')} {noun}")
    return rows


def write_prompts(options: argparse.Namespace) -> int:
    """The command."""
    out = writable_folder(options.out, ConfigError)
    prompts = make_prompts(options.seed)
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(DPG_COLUMNS)
    for index, scene in enumerate(scenes("val")[:ITEMS]):
        writer.writerows(dpg_rows(f"nano{index:04d}", scene))
    # One prompt a line.
    metadata = "".join(f"{json.dumps(prompt.metadata())}\n" for prompt in prompts)
    questions = "".join(f"{json.dumps(prompt.questions())}\n" for prompt in prompts)
    with writing(out, ConfigError):
        replace_text(out / "evaluation_metadata.jsonl", metadata)
        replace_text(out / "geneval2_data.jsonl", questions)
        replace_text(out / "dpg_bench.csv", table.getvalue())
    print(f"Wrote {len(prompts)} prompts to {out}.")
    return DONE


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = program_parser("python -m seed_nano.report.prompts", __doc__ or "")
    parser.add_argument("--out", type=Path, default=Path("outputs/nano_prompts"))
    parser.add_argument("--seed", type=bounded_int(0), default=0)
    return run_program(parser, write_prompts, arguments, "prompts")


if __name__ == "__main__":
    raise SystemExit(main())
