"""Captions, questions about named things and boxes on scenes drawn at several sizes.

    python -m seed_nano.report.sizes --model nano-x --number 60 --sizes 64,96,128,200,256,400 --seed 7

Scenes are of a split that nobody trains on; another seed gives others. Prints a table; --out writes it as JSON.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from seed_multimodal.disk import replace_text
from seed_multimodal.entry import DONE, add_device, run_program
from seed_multimodal.progress import Progress
from seed_nano.report.markdown import table
from seed_nano.report.metrics import matched, same_answer
from seed_nano.report.systems import load_system
from seed_nano.world.records import detect_phrase
from seed_nano.world.scene import Scene, boxes, render
from seed_nano.world.splits import check_split, scene_at
from seed_nano.world.tasks import SPOTS, Question, ask
from seed_nano.world.things import NAMES
from seed_nano.world.words import describe, normalise

MODULE = "seed_nano.report.sizes"
SIZES = (64, 96, 128, 200, 256, 400)
REPORTED = (64, 128, 256, 400)  # those of a report
ROWS = {"caption": "caption, every word right", "where": "where a thing is", "is_there": "is there a thing",
        "absent": "where a thing is that is not there", "box_alone": "box of the only thing",
        "box_of_two": "box of one of two things", "box_absent": "no box of a thing that is not there"}
Hits = dict[str, list[bool]]


def measure(system: Any, scenes: Sequence[Scene], size: int) -> Hits:
    """Which answers about the scenes, drawn at `size` pixels a side, are right, by what was asked (`ROWS`)."""
    images = [Image.fromarray(render(scene, size)) for scene in scenes]
    encoded = system.encode(images)
    hits: Hits = {"caption": [normalise(text) == describe(scene) for text, scene in
                              zip(system.describe(encoded), scenes, strict=True)]}
    asked = [(row, question) for row, scene in enumerate(scenes) for question in questions(scene)]
    answers = system.ask([encoded[row] for row, _ in asked], [question.question for _, question in asked])
    for (_, question), answer in zip(asked, answers, strict=True):
        name = {"yesno": "is_there"}.get(question.kind, question.kind)
        hits.setdefault(name, []).append(same_answer(answer, question.answer))
    return hits | (_boxes(system, scenes, images) if hasattr(system, "detect") else {})


def questions(scene: Scene) -> list[Question]:
    """Where each thing is that has a place of its own, where one is that is not there, and whether a thing is there."""
    shake = random.Random(f"sizes {scene}")
    found = [Question("where", f"Where is the {name}?", spot)
             for name, spot in zip(scene.things, SPOTS.get(scene.layout, ()), strict=False)]
    asked = [ask(scene, kind, shake) for kind in ("absent", "yesno")]
    return found + [question for question in asked if question is not None]


def _boxes(system: Any, scenes: Sequence[Scene], images: Sequence[Image.Image]) -> Hits:
    """Boxes of each thing (all found and none too many), and of one that is not there."""
    asked: list[tuple[int, str, str]] = []
    for row, scene in enumerate(scenes):
        kind = "box_alone" if len(scene.things) == 1 else "box_of_two"
        other = random.Random(f"sizes {scene}").choice([name for name in NAMES if name not in scene.things])
        asked += [*((row, name, kind) for name in scene.things), (row, other, "box_absent")]
    found = system.detect([images[row] for row, _, _ in asked],
                          [detect_phrase(name, boxes(scenes[row])) for row, name, _ in asked])
    hits: Hits = {}
    for (row, name, kind), made in zip(asked, found, strict=True):
        wanted = [box for one, box in boxes(scenes[row]) if one == name]
        shares = [[value / images[0].width for value in box] for box in made]
        hits.setdefault(kind, []).append(len(made) == len(wanted) == matched(shares, wanted))
    return hits


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description="Measure a small system on scenes of "
                                     "several sizes.")
    parser.add_argument("--model", default="nano", help="nano, nano-x, nano-lavit or a folder")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="sides in pixels")
    parser.add_argument("--number", type=int, default=60, help="scenes, the same at every size")
    parser.add_argument("--seed", type=int, default=7, help="of the scenes")
    parser.add_argument("--split", default="val")
    parser.add_argument("--out", type=Path, help="file for the numbers as JSON")
    add_device(parser)

    def work(options: argparse.Namespace) -> int:
        check_split(options.split)
        system = load_system(options.model, device=options.device, dtype=options.dtype)
        scenes = [scene_at(options.seed, number, options.split) for number in range(options.number)]
        sides = list(map(int, options.sizes.split(",")))
        found: dict[int, Hits] = {}
        with Progress("sizes", len(sides), "size", every=0) as bar:
            for size in sides:
                found[size] = measure(system, scenes, size)
                bar.update()
        rows = [(words, *(f"{sum(hits[name])} of {len(hits[name])}" for hits in found.values() if name in hits))
                for name, words in ROWS.items()]
        print(table(("", *(f"{size} px" for size in sides)), [row for row in rows if len(row) > 1]))
        if options.out:
            replace_text(options.out, json.dumps({str(size): {name: [sum(row), len(row)] for name, row in hits.items()}
                                                  for size, hits in found.items()}, indent=1))
        return DONE

    return run_program(parser, work, arguments, "sizes")


if __name__ == "__main__":
    raise SystemExit(main())
