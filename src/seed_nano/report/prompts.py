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
class Atom:
    """One thing that a prompt says, as a question with its answer; `skill`: of GenEval 2."""

    skill: str
    question: str
    answer: str


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
        """The line of `geneval2_data.jsonl`."""
        atoms: list[Atom] = []
        for item in self.include:
            name, count = item["class"], item["count"]
            atoms.append(Atom("object", _question("yesno", noun_phrase(1, name)), "Yes"))
            number = NUMBERS.get(count, "one")
            atoms.append(Atom("count", _question("count", plural(name)), number))
        if "color" in self.include[0]:
            atoms.append(Atom("attribute", _question("style"), self.include[0]["color"]))
        return {
            "prompt": self.text,
            "atom_count": len(atoms),
            "vqa_list": [[atom.question, atom.answer] for atom in atoms],
            "skills": [atom.skill for atom in atoms],
        }


def _question(kind: str, thing: str = "") -> str:
    """Nano's first wording of a question."""
    wording: str = VOCABULARY["questions"][kind][0]
    return wording.format(thing)


def make_prompt(tag: str, rng: random.Random) -> NanoPrompt:
    """A prompt of one of `KINDS`."""
    first, second = rng.sample(NAMES, 2)
    style = rng.choice(STYLES)
    if tag == "single_object":
        return NanoPrompt(tag, noun_phrase(1, first), [{"class": first, "count": 1}])
    if tag == "colors":
        thing = {"class": first, "count": 1, "color": style}
        return NanoPrompt(tag, noun_phrase(1, first, style), [thing])
    if tag == "counting":
        count = rng.choice((2, 3, 4))
        more = {"class": first, "count": count + 1}
        counted = {"class": first, "count": count}
        return NanoPrompt(tag, noun_phrase(count, first), [counted], [more])
    if tag == "position":
        relation = rng.choice(tuple(RELATIONS))
        text = f"{noun_phrase(1, first)} {relation} {noun_phrase(1, second)}"
        target = {"class": second, "count": 1}
        thing = {"class": first, "count": 1, "position": [relation, 0]}
        return NanoPrompt(tag, text, [target, thing])

    # Two things, of which the text gives the style in one of the kinds.
    counts = rng.choice(TWO_KINDS)
    adjective = style if tag == "color_attr" else ""
    text = f"{noun_phrase(counts[0], first, adjective)} and {noun_phrase(counts[1], second)}"
    colour = {"color": style} if adjective else {}
    things = [
        {"class": name, "count": count, **colour}
        for name, count in zip((first, second), counts, strict=True)
    ]
    return NanoPrompt(tag, text, things)


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
    """The rows of a scene in DPG-Bench's file: things, then their numbers, style and background."""
    # Questions with the question that each depends on; 0: none.
    questions: list[tuple[int, str, str]] = []
    for name, count in zip(scene.things, scene.counts, strict=True):
        questions.append((0, "entity - whole", f"Is there {article(name)} {name} in the picture?"))
        parent = len(questions)
        noun = plural(name) if count > 1 else name
        counted = f"Is there {NUMBERS.get(count, 'one')} {noun} in the picture?"
        questions.append((parent, "other - count", counted))
    rows: list[tuple[str, ...]] = []
    caption = describe(scene)
    for number, (parent, category, question) in enumerate(questions, 1):
        broad, _, detailed = category.partition(" - ")
        rows.append(
            (
                item,
                caption,
                "",
                str(number),
                str(parent),
                broad,
                detailed,
                f"{category} ({question})",
                question,
            )
        )
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
    metadata = [json.dumps(prompt.metadata()) for prompt in prompts]
    questions = [json.dumps(prompt.questions()) for prompt in prompts]
    with writing(out, ConfigError):
        replace_text(out / "evaluation_metadata.jsonl", "\n".join(metadata) + "\n")
        replace_text(out / "geneval2_data.jsonl", "\n".join(questions) + "\n")
        replace_text(out / "dpg_bench.csv", table.getvalue())
    print(f"Wrote {len(prompts)} prompts to {out}.")
    return DONE


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m seed_nano.report.prompts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/nano_prompts"))
    parser.add_argument("--seed", type=bounded_int(0), default=0)
    return run_program(parser, write_prompts, arguments, "prompts")


if __name__ == "__main__":
    raise SystemExit(main())
