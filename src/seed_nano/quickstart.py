"""Show on one sheet what nano does: tokenize, describe, ask, draw, edit, chat, tell a story.

Writes `contact_sheet.png`, the single images and `quickstart.json` (codes and texts).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from seed_multimodal import __version__
from seed_multimodal.cli.common import add_common, add_flags, load_system
from seed_multimodal.disk import JsonObject, replace_text, writable_folder, writing
from seed_multimodal.entry import DONE, run_program
from seed_multimodal.errors import ConfigError
from seed_multimodal.images.io import save_image
from seed_multimodal.images.sheet import PAPER, Cell, Row, contact_sheet
from seed_multimodal.language.answer import Answer, ImagePart
from seed_multimodal.pipelines.base import MultimodalSystem
from seed_multimodal.pipelines.world import Familiarity
from seed_multimodal.weights.find import locate_system
from seed_nano.world.scene import scene_image
from seed_nano.world.words import scene_of

# Chosen by looking; the scenes to look at are not in nano's training data.
QUESTIONS_BY_CAPTION = {
    "a fluent fox left of a snowman in a meadow": "Where is the snowman?",
    "two twemoji crabs on the sea": "How many crabs are there?",
    "a large noto planet at night": "What is the background?",
    "a noto rabbit above a crown in a room": "What is at the bottom?",
}
DRAW_CAPTIONS = (
    "three noto frogs in a meadow",
    "three twemoji balloons on a blue background",
    "a twemoji penguin above a pizza on a blue background",
    "a large fluent rocket at night",
    "two noto pandas on a pink background",
    "a large twemoji crab on a yellow background",
)
EDIT_CAPTION = "a small twemoji car on the left in a meadow"
GROW_CAPTIONS = (
    "a noto snowman left of a cake in a room",
    "a noto balloon left of a duck on a pink background",
)
COUNTS = (2, 4, 8, 16, 32)  # codes
EDITS = (
    "Move the car to the right.",
    "Add a house at the left.",
    "Swap the car and the house.",
    "Put it at night.",
    "Make it fluent.",
)
CHAT = (
    "Please draw a small noto dinosaur in the middle in a meadow.",
    "What is the background?",
    "Make the dinosaur bigger.",
    "Please draw a noto sailboat left of a dolphin on the sea.",
    "Now the first picture again, but put it at night.",
)
STORY = "Tell a story about a noto fox and a penguin in four pictures."


def image_cells(answer: Answer) -> list[Cell]:
    """The images of an answer, with the text before each."""
    cells: list[Cell] = []
    text = ""
    for part in answer.parts:
        if isinstance(part, str):
            text = f"{text} {part}".strip()
        elif isinstance(part, ImagePart) and part.image is not None:
            cells.append(Cell(part.image, text))
            text = ""
    return cells


def code_strip(
    codes: Sequence[int], section: int, *, columns: int = 4, cell: int = 12, gap: int = 2
) -> Image.Image:
    """One image's codes as coloured cells, `columns` per line.

    section: codes of a section of the codebook, within which a code's index gives its colour.
    """
    # 1. An empty page; there is no gap after the last cell.
    rows = math.ceil(len(codes) / columns)
    step = cell + gap
    width = min(columns, len(codes)) * step - gap
    strip = Image.new("RGB", (width, rows * step - gap), PAPER)
    draw = ImageDraw.Draw(strip)

    # 2. Cells. Neighbouring codes are a golden ratio apart in hue, and differ in lightness.
    for position, code in enumerate(codes):
        x = position % columns * step
        y = position // columns * step
        hue = code % section * 222.492235949 % 360
        lightness = (48, 62, 76)[code % section % 3]
        colour = f"hsl({hue}, 65%, {lightness}%)"
        draw.rectangle((x, y, x + cell - 1, y + cell - 1), fill=colour)
    return strip


def run_quickstart(system: MultimodalSystem, seed: int = 0) -> tuple[list[Row], JsonObject]:
    """The rows of the sheet, and codes."""
    codec: Any = system.images
    size = system.config.image_size

    # 1. Scenes, their codes, descriptions, answers and reconstructions.
    looks: list[Cell] = []
    images = [scene_image(scene_of(caption), size) for caption in QUESTIONS_BY_CAPTION]
    codes = [row.tolist() for row in system.tokenize(images)]
    rebuilt = system.reconstruct(codes, seed=seed)
    questions = QUESTIONS_BY_CAPTION.values()
    for original, question, row, again in zip(images, questions, codes, rebuilt, strict=True):
        looks.append(Cell(original, system.ask(original, question, seed=seed), question))
        caption = system.describe(original, seed=seed)
        looks.append(Cell(code_strip(row, codec.section), f"“{caption}”"))
        looks.append(Cell(again, "rebuilt"))

    # 2. Drawings, and successive edits.
    drawings = []
    for caption in DRAW_CAPTIONS:
        drawings.append(Cell(system.draw(caption, seed=seed), "", caption))
    edits = [Cell(scene_image(scene_of(EDIT_CAPTION), size))]
    for request in EDITS:
        edits.append(Cell(system.edit(edits[-1].image, request, seed=seed), "", request))

    # 3. A conversation: answers stay in it, with images as codes. A story.
    messages: list[JsonObject] = []
    turns: list[Cell] = []
    for request in CHAT:
        messages.append({"role": "user", "content": [request]})
        answer = system.chat(messages, seed=seed)
        messages.append({"role": "assistant", "content": answer})
        cells = image_cells(answer) or [Cell(turns[-1].image if turns else None, answer.text)]
        cells[-1].prompt = request
        turns += cells
    # Sampled: nano's likeliest story stays where it began.
    story_request: JsonObject = {"role": "user", "content": [STORY]}
    story = system.chat([story_request], seed=seed, max_new_tokens=300, temperature=1.0)

    # 4. Reconstructions from growing prefixes of the codes, and their descriptions.
    growing = [scene_image(scene_of(caption), size) for caption in GROW_CAPTIONS]
    growing_codes = [row.tolist() for row in system.tokenize(growing)]
    grown: list[Cell] = []
    codec.familiarity = Familiarity()  # images of few codes are meant to be strange
    for original, row in zip(growing, growing_codes, strict=True):
        grown.append(Cell(original, "the image"))
        steps = system.reconstruct([row] * len(COUNTS), seed, codes=COUNTS)
        captions = system.describe(steps, seed=seed)
        for count, step, caption in zip(COUNTS, steps, captions, strict=True):
            grown.append(Cell(step, f"“{caption}”", f"{count} codes"))
    return [
        Row(
            "Look\nAn image becomes 32 codes. From them the model describes it and answers "
            "questions, and the decoder reconstructs it.",
            looks,
        ),
        Row("Draw\nText-to-image.", drawings),
        Row("Edit\nSuccessive edits; the rest of the image stays.", edits),
        Row("Talk\nA conversation that refers to earlier images.", turns),
        Row(f"Tell\n“{STORY}” Text and images in one answer.", image_cells(story)),
        Row(
            "Grow\nReconstructions from the first codes, and how the model describes them: first "
            "the background and where things are, then what they are.",
            grown,
        ),
    ], {"codes": codes, "grown_codes": growing_codes}


def find(seed_x: MultimodalSystem, seed: int) -> Row:
    """Detection and an edit by a SEED-X."""
    image = scene_image(scene_of(DRAW_CAPTIONS[1]))
    boxed = seed_x.detect(image, "the balloons", seed=seed).drawn(width=1)
    changed = seed_x.edit(image, EDITS[3], seed=seed)
    return Row(
        "Find\nnano-x, a tiny SEED-X, answers with boxes, and edits conditioned on the image, so "
        "that the rest stays in place.",
        [
            Cell(image),
            Cell(boxed, "", "Where are the balloons?"),
            Cell(changed, "", EDITS[3]),
        ],
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="quickstart", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", default=Path("outputs/quickstart"), type=Path, metavar="FOLDER")
    add_common(parser)
    add_flags(parser, "language model")
    return run_program(parser, _main, argv)


def _main(args: argparse.Namespace) -> int:
    writable_folder(args.out, ConfigError)
    rows, texts = run_quickstart(load_system(args), args.seed)
    if args.model == "nano" and locate_system("nano-x"):
        rows.append(find(load_system(args, name="nano-x", log=None), args.seed))
    # Single images, named by the row, and their texts.
    for row in rows:
        name = row.label.split()[0].lower()
        texts[name] = [{"request": cell.prompt, "answer": cell.caption} for cell in row.cells]
        for index, cell in enumerate(row.cells, 1):
            if cell.image:
                save_image(cell.image, args.out / f"{name}_{index}.png")
    with writing(args.out, ConfigError):
        replace_text(args.out / "quickstart.json", json.dumps(texts, indent=1, ensure_ascii=False))
    # The sheet itself.
    title = (
        "An image as 32 tokens of a language model: "
        f"SEED Multimodal {__version__} with {Path(args.model).name}"
    )
    save_image(
        contact_sheet(rows, title, cell=150, columns=6, max_lines=16),
        args.out / "contact_sheet.png",
    )
    print(
        f"Look at {args.out / 'contact_sheet.png'}; "
        f"codes and texts are in {args.out / 'quickstart.json'}."
    )
    return DONE


if __name__ == "__main__":
    sys.exit(main())
