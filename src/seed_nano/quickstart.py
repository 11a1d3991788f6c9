"""The main job, once, to look at: scenes looked at, rebuilt, described, asked about, drawn, edited, talked about, told.

    python -m seed_nano.quickstart --out outputs/quickstart

Leaves in the folder: `contact_sheet.png` and `contact_sheet_dark.png` (everything on one page), the single pictures,
and `quickstart.json` (codes, texts, seconds, versions). Where the sheet says that nano was never trained on something,
the data set's own rule (`seed_nano.world.splits.held_out`) said so in this run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from seed_multimodal import __version__
from seed_multimodal.commands.common import add_common, load_system, require_room, save_picture, write_text
from seed_multimodal.entry import add_quantization, run_program
from seed_multimodal.hub import locate_system
from seed_multimodal.images.code_strip import above_strip, code_strip
from seed_multimodal.images.sheet import DARK, LIGHT, Cell, Row, contact_sheet
from seed_multimodal.language.tasks import DEFAULT_TASKS
from seed_nano.sheet_run import Run
from seed_nano.world.dialogues import story_request
from seed_nano.world.records import detect_phrase
from seed_nano.world.scene import Scene, boxes
from seed_nano.world.splits import held_out
from seed_nano.world.tasks import Edit, ask, background_words, make_edit
from seed_nano.world.things import BACKGROUND_PHRASES
from seed_nano.world.words import describe, sentence, some

# What is looked at, with the kind of question that is asked; and what is drawn. Nano was trained on none of these.
LOOKED_AT = ((Scene("fluent", "meadow", "left of", ("fox", "snowman")), "where"),
             (Scene("twemoji", "sea", "many", ("crab",), (2,)), "count"),
             (Scene("noto", "night", "large", ("planet",)), "background"),
             (Scene("noto", "room", "above", ("rabbit", "crown")), "what"))
DRAWN = (Scene("fluent", "meadow", "left of", ("elephant", "penguin")),
         Scene("twemoji", "blue", "many", ("balloon",), (3,)), Scene("fluent", "sea", "large", ("horse",)),
         Scene("fluent", "room", "above", ("cat", "bus")),
         Scene("noto", "yellow", "two kinds", ("dog", "turtle"), (2, 1)),
         Scene("twemoji", "yellow", "large", ("butterfly",)))
EDITED = Scene("twemoji", "meadow", "left", ("car",))
EDITS = (("move", "right"), ("add", "house"), ("swap", ""), ("background", "night"), ("style", "fluent"))
TALKED_ABOUT = (Scene("noto", "meadow", "middle", ("dinosaur",)),
                Scene("noto", "sea", "left of", ("sailboat", "dolphin")))
TOLD = ("fox", "penguin")
FOUND = Scene("twemoji", "blue", "many", ("balloon",), (3,))  # by nano-x
GROWN, COUNTS = Scene("fluent", "meadow", "left of", ("tiger", "tree")), (4, 8, 16, 32)
OUT = "outputs/quickstart"
STEPS = 2 + 2 * len(LOOKED_AT) + len(DRAWN) + len(EDITS) + 5 + 1 + 1


def run_quickstart(system: Any, out: Path, seed: int = 0, seed_x: Any = None) -> Run:
    """Run all steps with `system` (a `SeedLlama`), and those with boxes with `seed_x` if there is one; writes into
    `out`."""
    run = Run(system, out, seed, steps=STEPS + 2 * (seed_x is not None))
    start = time.perf_counter()
    for part in (_looks, _draws, _edits, _talks, _tells, _grows):
        part(run)
    if seed_x is not None:
        _finds(run, seed_x)
    run.seconds["work"] = round(time.perf_counter() - start, 3)
    return run


def never_trained_on(scene: Scene) -> str:
    """What of a scene was held out of nano's training, in words; empty if it may have been trained on."""
    held = held_out(scene)
    found = [" with ".join(scene.things)] if "pairs" in held else ["this very scene"] if "val" in held else []
    for name, count in zip(scene.things, scene.counts, strict=True):
        alone = held_out(scene.but(layout="many" if count > 1 else "large", things=(name,), counts=(count,)))
        found += [words for split, words in (
            ("places", f"{name} {BACKGROUND_PHRASES[scene.background][0]}"), ("counts", some(count, name)),
            ("styles", f"{name} in {scene.style} style"), ("things", name)) if split in alone]
    return f"never trained on: {', '.join(found)}" if found else ""


def _looks(run: Run) -> None:
    """Codes, rebuilt picture, caption and an answer for each scene."""
    pictures = [run.picture(scene) for scene, _ in LOOKED_AT]
    with run.step("look: 32 codes each") as said:
        codes = run.system.tokenize(pictures).tolist()
        said.append(f"{len(codes)} pictures")
    with run.step("rebuild from the codes") as said:
        rebuilt = run.system.reconstruct(codes, seed=run.seed)
        said.append(f"{len(rebuilt)} pictures")
    found, cells = list[dict[str, Any]](), list[Cell]()
    looked = zip(LOOKED_AT, pictures, codes, rebuilt, strict=True)
    for number, ((scene, kind), image, row, again) in enumerate(looked, 1):
        question = next(asked.question for n in itertools.count()
                        if (asked := ask(scene, kind, random.Random(n))) is not None)
        with run.step(f"describe picture {number}") as said:
            caption = run.system.describe(image, seed=run.seed)
            said.append(caption)
        with run.step(f"ask about picture {number}") as said:
            answer = run.system.ask(image, question, seed=run.seed)
            said.append(f"{question} {answer}")
        found.append({"picture": run.save(image, f"picture_{number}.png"), "scene": describe(scene), "codes": row,
                      "rebuilt": run.save(again, f"picture_{number}_rebuilt.png"), "description": caption,
                      "question": question, "answer": answer, "note": never_trained_on(scene)})
        cells += [Cell(image, answer, question), Cell(strip(run, row, columns=4), f"“{caption}”", arrow=True),
                  Cell(again, "rebuilt", arrow=True)]
    run.rows.append(Row("Look\nA picture becomes 32 codes. The model reads them: it describes and answers. And they "
                        "become a picture again.", cells))
    run.result["pictures"] = found


def strip(run: Run, codes: Sequence[int], **how: Any) -> Image.Image:
    """The codes of a picture as coloured cells."""
    config = run.system.pictures.model.config
    return code_strip(codes, config.codebook_size // config.codebook_sections, **how)


def _draws(run: Run) -> None:
    cells, found = [], []
    for number, scene in enumerate(DRAWN, 1):
        words, note, image = describe(scene), never_trained_on(scene), None
        with run.step(f"draw “{words}”") as said:
            image = run.system.draw(words, seed=run.seed)
            said.append(note)
        file = run.save(image, f"drawing_{number}.png") if image else None
        found.append({"text": words, "picture": file, "note": note})
        cells.append(Cell(image, note, words))
    run.rows.append(Row("Draw\nPictures from words, of compositions that nano never saw in training.", cells))
    run.result["drawings"] = found


def edits() -> Iterator[Edit]:
    """Changes of one picture, each of what the one before it has made."""
    scene = EDITED
    for kind, value in EDITS:
        edit = next(edit for n in itertools.count()
                    if (edit := make_edit(scene, kind, random.Random(n), value)) is not None
                    and value in edit.instruction)
        yield edit
        scene = edit.target


def _edits(run: Run) -> None:
    image = run.picture(EDITED)
    cells = [Cell(image)]
    found = [{"picture": run.save(image, "edit_0.png"), "instruction": ""}]
    for number, edit in enumerate(edits(), 1):
        words, changed = sentence(edit.instruction), None
        with run.step(f"edit: {words}") as said:
            changed = image = run.system.edit(image, words, seed=run.seed)
            said.append("drawn")
        found.append({"picture": run.save(changed, f"edit_{number}.png") if changed else "", "instruction": words})
        cells.append(Cell(changed, "", words, arrow=True))
    run.rows.append(Row("Edit\nOne change after another; what is not named stays.", cells))
    run.result["edits"] = found


def conversation() -> list[str]:
    """What the user says: each turn refers to what was there before."""
    first, other = TALKED_ABOUT
    shake = random.Random(0)
    bigger = make_edit(first, "size", shake)
    asked = ask(first, "background", shake)
    assert bigger is not None and asked is not None
    return [DEFAULT_TASKS.draw_request(describe(first)), asked.question, sentence(bigger.instruction),
            DEFAULT_TASKS.draw_request(describe(other)),
            f"Now the first picture again, but {background_words('night', shake)}."]


def _talks(run: Run) -> None:
    """Several turns; each answer stays in the conversation with its pictures, as codes."""
    messages, turns, cells = list[dict[str, Any]](), list[dict[str, Any]](), list[Cell]()
    for number, words in enumerate(conversation(), 1):
        with run.step(f"chat, turn {number}") as said:
            asked = {"role": "user", "content": [words]}
            answer = run.system.chat([*messages, asked], seed=run.seed)
            messages += [asked, {"role": "assistant", "content": answer}]
            parts, made = shown_parts(run, answer, f"chat_{number}")
            for cell in made:
                cells.append(replace(cell, arrow=bool(cells)))
            if not made:  # an answer in words, about the picture shown last
                cells.append(Cell(cells[-1].image if cells else None, answer.text, arrow=bool(cells)))
            cells[-max(1, len(made))].asked = words
            said.append(f"{words} → {' '.join(part.get('text') or '[picture]' for part in parts)}")
            turns.append({"you": words, "answer": parts})
    run.rows.append(Row("Talk\nA conversation that refers back to its pictures.", cells))
    run.result["conversation"] = turns


def shown_parts(run: Run, answer: Any, name: str) -> tuple[list[dict[str, Any]], list[Cell]]:
    """The parts of an answer for JSON; and its pictures, saved as `NAME_K.png`, with the words before each."""
    parts, cells, words = list[dict[str, Any]](), list[Cell](), ""
    for part in answer.parts:
        if hasattr(part, "text"):
            parts.append({"text": part.text})
            words = f"{words} {part.text}".strip()
        elif getattr(part, "image", None) is not None:
            parts.append({"picture": run.save(part.image, f"{name}_{len(cells) + 1}.png"), "codes": list(part.codes)})
            cells.append(Cell(part.image, words, arrow=bool(cells)))
            words = ""
    return parts, cells


def _tells(run: Run) -> None:
    """A story: sentences and pictures in one answer."""
    hero, friend = TOLD
    request = story_request(some(1, hero, "noto"), some(1, friend), 3)
    with run.step(f"tell: {request}") as said:
        answer = run.system.chat([{"role": "user", "content": [request]}], seed=run.seed, max_new_tokens=300)
        parts, cells = shown_parts(run, answer, "story")
        said.append(str(answer))
    run.rows.append(Row(f"Tell\n“{request}” Words and pictures in one answer.", cells))
    run.result["story"] = {"you": request, "answer": parts}


def _grows(run: Run) -> None:
    """Progressive drawing: one picture after its first codes."""
    image = run.picture(GROWN)
    with run.step("rebuild from the first codes") as said:
        codes = run.system.tokenize(image)[0].tolist()
        ladder = run.system.reconstruct(codes, seed=run.seed, codes=COUNTS)
        said.append(f"after {', '.join(map(str, COUNTS))} of them")
    cells = [Cell(image, "the picture")]
    cells += [Cell(above_strip(step, strip(run, codes, first=count, columns=16)), "", f"{count} codes", arrow=True)
              for count, step in zip(COUNTS, ladder, strict=True)]
    run.rows.append(Row("Grow\nThe first codes say the most: a picture is there after a few of them.", cells))
    run.result["progressive"] = {"codes": codes, "scene": describe(GROWN), "pictures": {
        str(count): run.save(step, f"first_{count}_codes.png") for count, step in zip(COUNTS, ladder, strict=True)}}


def _finds(run: Run, seed_x: Any) -> None:
    """A thing found and a change made by a SEED-X."""
    image, phrase = run.picture(FOUND), detect_phrase(FOUND.things[0], boxes(FOUND))
    found, changed = None, None
    edit = make_edit(FOUND, "background", random.Random(0), "night")
    assert edit is not None
    words = sentence(edit.instruction)
    with run.step(f"find {phrase}") as said:
        found = seed_x.detect(image, phrase, seed=run.seed)
        said.append(str(found.boxes))
    with run.step(f"edit beside the picture: {words}") as said:
        changed = seed_x.edit(image, words, seed=run.seed)
        said.append("drawn")
    shown = found.drawn(width=1) if found is not None else None
    run.rows.append(Row("Find\nnano-x, a tiny SEED-X, answers with boxes, and edits with the picture at hand: what is "
                        "not named stays where it is.", [
                            Cell(image, never_trained_on(FOUND)),
                            Cell(shown, "", f"Where are {phrase}?", arrow=True), Cell(changed, "", words, arrow=True)]))
    run.result["found"] = {
        "picture": run.save(image, "find.png"), "phrase": phrase, "boxes": found.boxes if found is not None else [],
        "boxed": run.save(shown, "find_boxes.png") if shown else "", "instruction": words,
        "edited": run.save(changed, "find_edit.png") if changed else ""}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, write the sheet and the JSON; exit code 0, 1 if an answer lacked its picture, 2 if refused."""
    parser = argparse.ArgumentParser(prog="quickstart", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", default=OUT, metavar="FOLDER")
    add_common(parser, debug=False)
    add_quantization(parser)
    return run_program(parser, _main, argv)


def _main(args: argparse.Namespace) -> int:
    from seed_multimodal.evaluation.machine import circumstances, script_line

    start, out = time.perf_counter(), Path(args.out or OUT)
    require_room(out)
    system, seed_x = load_system(args), None
    if args.model == "nano" and locate_system("nano-x"):
        seed_x = load_system(argparse.Namespace(**{**vars(args), "model": "nano-x"}))
    loaded = time.perf_counter() - start
    print(f"Loaded {args.model} in {loaded:.1f} s; results go to {out}/", flush=True)
    run = run_quickstart(system, out, args.seed, seed_x)
    title = f"A picture is 32 words of a language model: SEED Multimodal {__version__} with {Path(args.model).name}"
    for name, theme in (("contact_sheet.png", LIGHT), ("contact_sheet_dark.png", DARK)):
        save_picture(contact_sheet(run.rows, title, cell=150, columns=6, max_lines=16, theme=theme), out / name)
    run.seconds = {"load": round(loaded, 3), **run.seconds, "total": round(time.perf_counter() - start, 3)}
    facts = circumstances(getattr(system, "device", "cpu"), script_line())
    facts["versions"] = {"seed_multimodal": __version__, **facts["versions"]}
    everything = {**run.result, "model": args.model, "seed": args.seed, "failures": run.failures,
                  "seconds": run.seconds, **facts}
    write_text(json.dumps(everything, indent=1, ensure_ascii=False), out / "quickstart.json")
    print(f"Done in {run.seconds['total']:.1f} s. Look at {out / 'contact_sheet.png'}; codes, texts and seconds are in "
          f"{out / 'quickstart.json'}.", flush=True)
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main())
