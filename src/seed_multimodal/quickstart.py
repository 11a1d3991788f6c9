"""The main job, once, to look at: pictures → 32 codes → pictures, captions, answers, drawings, an edit, a conversation.

    python -m seed_multimodal.quickstart --out outputs/quickstart

Leaves in the folder: `contact_sheet.png` (everything on one page), the single pictures, and `quickstart.json` (codes,
texts, seconds, versions). One drawing asks for a thing in a style in which no picture of it was trained on;
its label says so, after a check of the data set's own split.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seed_multimodal import __version__
from seed_multimodal.commands.common import add_common, load_system, save_picture, write_text
from seed_multimodal.config import project_root
from seed_multimodal.entry import add_quantization, run_program
from seed_multimodal.errors import DataError, GenerationError
from seed_multimodal.images.open import open_image
from seed_multimodal.images.sheet import Cell, Row, contact_sheet

if TYPE_CHECKING:
    from PIL import Image

PICTURES = {"cat.jpg": "What is this animal?", "fox.png": "What is the main colour?",
            "castle.png": "What is this?", "banana.png": "Which style is this drawn in?"}
HELD_OUT_PICTURES = ("banana.png",)  # nano was trained on this thing in other styles only
# Keys of the nano set: two of the training split, and one thing (dog face) held out in this style only.
DRAWINGS = ("fluent-1f34e", "noto-1f680", "twemoji-1f436")
HELD_OUT_REMARK = "this pair of thing and style was never trained on"
EDIT = ("fox.png", "Replace it with a hedgehog.")
CONVERSATION: tuple[tuple[str | None, str], ...] = (
    ("whale.png", "What is this?"), (None, "Make it in fluent style."),
    (None, "Now draw a twemoji drawing of a star."), (None, "What is the main colour?"))
STEPS = 2 + 2 * len(PICTURES) + len(DRAWINGS) + 1 + len(CONVERSATION)


@dataclass
class Run:
    """One run: the system, the output folder, the results, and the rows of the sheet."""

    system: Any
    out: Path
    seed: int
    result: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    failures: int = 0
    done: int = 0

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[list[str]]:
        """Time one step and print it with its results; a drawing that fails is reported and skipped."""
        start, said = time.perf_counter(), list[str]()
        try:
            yield said
        except GenerationError as error:
            self.failures += 1
            said.append(f"failed: {error}")
        self.seconds[name] = round(time.perf_counter() - start, 3)
        self.done += 1
        print(f"[{self.done:2d}/{STEPS}] {self.seconds[name]:6.2f} s  {name}: {'; '.join(said)}", flush=True)

    def save(self, image: Image.Image, name: str) -> str:
        """Save one picture in the folder; returns its file name."""
        return save_picture(image, self.out / name).name


def run_quickstart(system: Any, out: Path, images: Path, seed: int = 0) -> Run:
    """Run all steps with `system` (a `SeedLlama`) on the pictures in `images`; writes into `out`."""
    run = Run(system, out, seed)
    start = time.perf_counter()
    _pictures(run, images)
    run.rows.append(Row("drawn from words; edited", _drawings(run) + _edit(run, images)))
    _conversation(run, images)
    run.seconds["work"] = round(time.perf_counter() - start, 3)
    return run


def _pictures(run: Run, images: Path) -> None:
    """Codes, rebuilt picture, caption and an answer for each picture."""
    opened = {name: open_image(images / name) for name in PICTURES}
    with run.step("look: 32 codes each") as said:
        codes = run.system.tokenize(list(opened.values())).tolist()
        said.append(f"{len(codes)} pictures")
    with run.step("rebuild from the codes") as said:
        rebuilt = run.system.reconstruct(codes, seed=run.seed)
        said.append(f"{len(rebuilt)} pictures")
    found: list[dict[str, Any]] = []
    cells: list[Cell] = []
    for (name, image), row, again in zip(opened.items(), codes, rebuilt, strict=True):
        stem, question = Path(name).stem, PICTURES[name]
        caption = answer = ""
        with run.step(f"describe {name}") as said:
            caption = run.system.describe(image, seed=run.seed)
            said.append(caption)
        with run.step(f"ask about {name}") as said:
            answer = run.system.ask(image, question, seed=run.seed)
            said.append(f"{question} {answer}")
        found.append({"picture": run.save(image, f"{stem}.png"), "codes": row,
                      "rebuilt": run.save(again, f"{stem}_rebuilt.png"),
                      "description": caption, "question": question, "answer": answer,
                      "note": HELD_OUT_REMARK if name in HELD_OUT_PICTURES else ""})
        remark = "\n(never trained on)" if name in HELD_OUT_PICTURES else ""
        cells += [Cell(image, f"{name}: “{caption}”\n{question} {answer}{remark}"),
                  Cell(codes_picture(row), "its 32 codes"), Cell(again, "rebuilt from them")]
    run.rows.append(Row("looked at: a description, an answer, 32 codes, and the picture rebuilt from the codes", cells))
    run.result["pictures"] = found


def _drawings(run: Run) -> list[Cell]:
    """Pictures from words; the last is a concept × style pair that was never trained on, by the data set's splits."""
    cells, found = [], []
    for number, (words, remark) in enumerate(drawing_requests(), 1):
        image = None
        with run.step(f"draw “{words}”") as said:
            image = run.system.draw(words, seed=run.seed)
            said.append(remark or "drawn")
        file = run.save(image, f"drawing_{number}.png") if image is not None else None
        found.append({"text": words, "picture": file, "note": remark})
        cells.append(Cell(image, f"“{words}”" + (f" ({remark})" if remark else "")))
    run.result["drawings"] = found
    return cells


def _edit(run: Run, images: Path) -> list[Cell]:
    name, instruction = EDIT
    source, changed = open_image(images / name), None
    with run.step(f"edit {name}") as said:
        changed = run.system.edit(source, instruction, seed=run.seed)
        said.append(instruction)
    file = run.save(changed, "edited.png") if changed is not None else None
    run.result["edit"] = {"source": name, "instruction": instruction, "picture": file}
    return [Cell(source, f"edit {name}: “{instruction}”"), Cell(changed, "edited")]


def _conversation(run: Run, images: Path) -> None:
    """Several turns; each answer stays in the conversation with its pictures, as codes."""
    messages: list[dict[str, Any]] = []
    cells: list[Cell] = []
    turns = []

    def note(words: str) -> None:
        if not cells:
            cells.append(Cell())
        cells[-1].caption += ("\n" if cells[-1].caption else "") + words

    for number, (picture, words) in enumerate(CONVERSATION, 1):
        shown = [open_image(images / picture)] if picture else []
        cells += [Cell(image) for image in shown]
        note(f"you: {words}")
        asked = {"role": "user", "content": [*shown, words]}
        parts: list[dict[str, Any]] = []
        with run.step(f"chat, turn {number}") as said:
            answer = run.system.chat([*messages, asked], seed=run.seed)
            for part in answer.parts:
                if hasattr(part, "text"):
                    parts.append({"text": part.text})
                    note(f"seed: {part.text}")
                elif getattr(part, "image", None) is not None:
                    file = run.save(part.image, f"chat_{number}_{len(parts)}.png")
                    parts.append({"picture": file, "codes": list(part.codes)})
                    cells.append(Cell(part.image))
            messages += [asked, {"role": "assistant", "content": answer}]
            said.append(f"{words} → {' '.join(p.get('text') or '[picture]' for p in parts)}")
        turns.append({"you": words, "shown": picture, "answer": parts})
    run.rows.append(Row("a conversation", cells))
    run.result["conversation"] = turns


def drawing_requests() -> list[tuple[str, str]]:
    """What to draw, and a remark where the data set confirms that the pair of thing and style was held out."""
    from seed_multimodal.data.nano import load_nano

    try:
        nano = load_nano()
    except DataError:  # installed without the data set: nothing to confirm it with
        return [(f"a {style} drawing of {thing}", "") for style, thing in
                (("fluent", "a red apple"), ("noto", "a rocket"), ("twemoji", "a dog face"))]
    records = [nano.records[nano.index[key]] for key in DRAWINGS if key in nano.index]
    if not any(record.split == "test_combo" for record in records):
        records.append(nano.records[nano.split("test_combo")[0]])
    return [(r.captions[0], HELD_OUT_REMARK if r.split == "test_combo" else "") for r in records]


def codes_picture(codes: Sequence[int]) -> Image.Image:
    """The codes as a small picture of numbers, four a line."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=17)
    lines = [" ".join(f"{code:4d}" for code in codes[i:i + 4]) for i in range(0, len(codes), 4)]
    page = Image.new("RGB", (192, 192), (250, 250, 252))
    draw = ImageDraw.Draw(page)
    for number, line in enumerate(lines):
        for column, word in enumerate(line.split()):
            right = 14 + 44 * (column + 1) - 10
            draw.text((right - font.getlength(word), 6 + number * 22.5), word, font=font, fill=(60, 60, 70))
    return page


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, write the sheet and the JSON; exit code 0, 1 if an answer lacked its picture, 2 if refused."""
    parser = argparse.ArgumentParser(prog="quickstart", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", default="outputs/quickstart", metavar="FOLDER")
    parser.add_argument("--images", metavar="FOLDER", help="default: images/ of the repository")
    add_common(parser, debug=False)
    add_quantization(parser)
    return run_program(parser, _main, argv)


def _main(args: argparse.Namespace) -> int:
    from seed_multimodal.evaluation.machine import circumstances, script_line

    start = time.perf_counter()
    images = Path(args.images) if args.images else project_root(Path(__file__).parent) / "images"
    out = Path(args.out)
    system = load_system(args)
    loaded = time.perf_counter() - start
    print(f"Loaded {args.model} in {loaded:.1f} s; results go to {out}/", flush=True)
    run = run_quickstart(system, out, images, args.seed)
    title = f"SEED Multimodal {__version__}: quickstart with {Path(args.model).name}"
    sheet = contact_sheet(run.rows, title, cell=160, columns=6, max_lines=16)
    save_picture(sheet, out / "contact_sheet.png")
    run.seconds = {"load": round(loaded, 3), **run.seconds, "total": round(time.perf_counter() - start, 3)}
    facts = circumstances(getattr(system, "device", "cpu"), script_line())
    facts["versions"] = {"seed_multimodal": __version__, **facts["versions"]}
    everything = {**run.result, "model": args.model, "seed": args.seed, "failures": run.failures,
                  "seconds": run.seconds, **facts}
    write_text(json.dumps(everything, indent=1, ensure_ascii=False), out / "quickstart.json")
    print(f"Done in {run.seconds['total']:.1f} s. Look at {out / 'contact_sheet.png'}; "
          f"codes, texts and seconds are in {out / 'quickstart.json'}.", flush=True)
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main())
