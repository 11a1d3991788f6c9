"""Sections of a report: each measures one ability on one split and returns its numbers; sheet rows
and answers are added to the `Run`. A section's docstring is its definition in report.md; `TABLE`
lists its systems and splits.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image

from seed_multimodal.errors import pluralize
from seed_multimodal.evaluation.metrics import bootstrap, codebook_statistics
from seed_multimodal.evaluation.vqa import vqa_answer
from seed_multimodal.images.sheet import Cell, Row, draw_boxes
from seed_nano.report import scoring
from seed_nano.report.judge import Judge
from seed_nano.report.samples import SEED, Samples
from seed_nano.report.scoring import OptionalImages, Section, image_labels, score, true_labels
from seed_nano.world.records import detect_phrase
from seed_nano.world.scene import Scene, boxes, empty_images, render
from seed_nano.world.splits import HELD_OUT_SPLITS, scene_at
from seed_nano.world.tasks import KINDS, ask
from seed_nano.world.things import BACKGROUNDS
from seed_nano.world.words import describe, normalise, sentence

SIZES = (64, 128, 256, 400)  # sides in pixels of the scenes of `sizes`
BLIND = 3000  # training questions for the most frequent answers
EMPTY_DRAWS = 8  # samples of the token selector for each empty scene
COLUMNS = 10  # images per sheet row


class Run:
    """State of the evaluation of one split of one system.

    Attributes:
        side: of its images in pixels; real, encoded: its images, original and encoded; drawn: by
            `drawing`.
        answers: for answers.json.gz. sheets: name -> rows.
    """

    def __init__(self, system: Any, judge: Judge, samples: Samples, side: int = 0) -> None:
        self.system = system
        self.judge = judge
        self.samples = samples
        self.sizes = samples.sizes
        self.side = side or system.image_size
        self.scenes = samples.scenes[: self.sizes.scenes]
        self.real = self.render(samples.scenes)
        self.encoded = system.encode(self.real)
        self.drawings: list[Any] = []
        self.answers: Section = {}
        self.sheets: dict[str, list[Row]] = {}

    def render(self, scenes: Iterable[Scene]) -> list[Image.Image]:
        """Images of scenes."""
        return [Image.fromarray(render(scene, self.side)) for scene in scenes]

    def judge_images(
        self, images: OptionalImages, scenes: Sequence[Scene], name: str = ""
    ) -> tuple[list[scoring.LabelNames], Section]:
        """The judge's labels of drawn images (stored as answers `name`), and their accuracy;
        `scenes`: the targets."""
        labels = image_labels(self.judge, images)
        if name:
            self.answers[name] = [
                {"asked": describe(scene), "read": label_row}
                for scene, label_row in zip(scenes, labels, strict=True)
            ]
        accuracy = score(labels, true_labels(scenes))
        return labels, {"n": len(scenes), **accuracy, "ceiling": self.ceiling(scenes)}

    def ceiling(self, scenes: Sequence[Scene], real: OptionalImages = ()) -> Any:
        """The judge's accuracy over all labels of real images."""
        labels = image_labels(self.judge, real or self.render(scenes))
        return score(labels, true_labels(scenes))["all"]

    def show(
        self, sheet: str, cells: Iterable[Cell | Image.Image | None], label: str | None = None
    ) -> None:
        """Add a row to a sheet; the first of a split is labelled with its name."""
        rows = self.sheets.setdefault(sheet, [])
        if label is None:
            label = "" if rows else self.samples.split
        rows.append(Row(label, [cell if isinstance(cell, Cell) else Cell(cell) for cell in cells]))

    def show_drawings(self, sheet: str, images: OptionalImages) -> None:
        """Add a row of the first drawings of `scenes`, each below its prompt."""
        cells = []
        for image, scene in zip(images[:COLUMNS], self.scenes, strict=False):
            cells.append(Cell(image, prompt=describe(scene)))
        self.show(sheet, cells)


# ---- codes


def codes(run: Run) -> Section:
    """Use of the codebook by the codes of all images."""
    rows = [getattr(image, "codes", image) for image in run.encoded]
    entries = run.system.codebook_size
    if len(set(map(len, rows))) == 1:
        return codebook_statistics(np.array(rows), entries)
    statistics = codebook_statistics(np.concatenate(rows)[:, None], entries)
    return {
        "sequences": len(rows),
        "distinct": len(set(map(tuple, rows))),
        **{name: statistics[name] for name in ("codebook", "used", "usage", "perplexity")},
    }


def tokens(run: Run) -> Section:
    """Tokens of an image by the number of things in it (mean, standard deviation over images).
    *fullest*: the most things; *empty share*: tokens of backgrounds without things over those of
    the fullest scenes. *cosine*: loss of the decoded features, 1 − cosine to the vision encoder's,
    mean over patches; *blind*: the same of the mean image."""
    # 1. Tokens of the scenes and of empty backgrounds, with several samples of the token selector.
    counts = _token_counts(run.encoded)
    things = np.array([sum(scene.counts) for scene in run.samples.scenes])
    empty = [Image.fromarray(image) for image in empty_images(run.side)]
    repeats = EMPTY_DRAWS if run.system.samples else 1
    encoded_empty = run.system.encode(empty * repeats)
    without = _token_counts(encoded_empty)

    # 2. Examples; empty scenes are the same for each split.
    run.answers["kept"] = counts[:COLUMNS].tolist()
    run.answers["kept_empty"] = without[: len(empty)].tolist()
    run.show("kept", map(_token_cell, run.encoded[:COLUMNS]))
    if run.samples.split == HELD_OUT_SPLITS[0]:
        run.show("kept", map(_token_cell, encoded_empty[: len(empty)]), "no thing")

    # 3. Means by number of things. Empty scenes have 0; their intervals resample backgrounds.
    near, blind = run.system.losses(run.encoded)
    spreads = {"0": _mean_and_spread(without, list(BACKGROUNDS) * repeats)}
    for n_things in sorted(set(things.tolist())):
        spreads[str(n_things)] = _mean_and_spread(counts[things == n_things])
    return {
        "n": len(counts),
        "patches": run.system.patches,
        "cosine": bootstrap(near),
        "blind": bootstrap(blind),
        "mean": bootstrap(counts),
        "fullest": int(things.max()),
        "things": spreads,
        "empty_share": scoring.ratio(
            without.reshape(repeats, -1).mean(0), counts[things == things.max()]
        ),
    }


def _token_counts(images: Sequence[Any]) -> Any:
    return np.array([len(image.codes) for image in images])


def _token_cell(image: Any) -> Cell:
    return Cell(image.dimmed(), pluralize(len(image.codes), "token"))


def _mean_and_spread(counts: Any, groups: Sequence[str] | None = None) -> Section:
    return {"mean": bootstrap(counts, groups), "spread": round(float(np.std(counts)), 3)}


# ---- images


def reconstruction(run: Run) -> Section:
    """Images drawn from their own codes or features. *R@1*: the original is the nearest of the
    gallery's real images, by the judge's features. *PSNR of things*: over their pixels."""
    scenes = run.samples.scenes[: run.sizes.gallery]
    rebuilt = run.system.decode(run.encoded[: len(scenes)])
    run.show("reconstructions", run.real[:COLUMNS])
    run.show("reconstructions", rebuilt[:COLUMNS], "rebuilt")
    return {
        **run.judge_images(rebuilt, scenes, "rebuilt")[1],
        **scoring.similarity(rebuilt, scenes),
        "gallery": len(run.real),
        "r1": bootstrap(scoring.retrieval(run.judge, rebuilt, run.real)),
    }


def drawing(run: Run) -> Section:
    """Images drawn from descriptions."""
    run.drawings = run.system.draw(list(map(describe, run.scenes)))
    images = run.system.decode_complete(run.drawings)
    run.show_drawings("drawings", images)
    return {**run.judge_images(images, run.scenes, "drawn")[1], "without_image": images.count(None)}


def wide_drawing(run: Run) -> Section:
    """The same codes drawn in 3:2: the scene stretched, judged when resized to the square, as are
    the real images of the ceiling."""
    images = run.system.decode_complete(run.drawings, ratio="3:2")
    side = run.side
    size = next((image.size for image in images if image is not None), (side, side))

    # The judge sees square images only.
    def square(images: OptionalImages) -> list[Image.Image | None]:
        return [image and image.resize((side, side), Image.Resampling.BICUBIC) for image in images]

    # Real images lose as much by the two changes of size.
    real = run.real[: len(run.scenes)]
    stretched = [image.resize(size, Image.Resampling.BICUBIC) for image in real]
    run.show_drawings("wide_drawings", images)
    return {
        **run.judge_images(square(images), run.scenes, "wide_drawn")[1],
        "without_image": images.count(None),
        "size": size,
        "ceiling": run.ceiling(run.scenes, square(stretched)),
    }


def edit(run: Run) -> Section:
    """Images after an instruction: the labels of the exact target. *stayed*: labels that the
    instruction leaves are right; *unchanged*: the labels are those of the image before. *PSNR of
    what is unchanged*: against the image before, over the pixels that are equal in it and in the
    target."""
    # 1. Edit the encoded images.
    edits = run.samples.edits
    sources = [scene for scene, _ in edits]
    scenes = [edit.target for _, edit in edits]
    before = run.render(sources)
    targets = run.render(scenes)
    instructions = [sentence(edit.instruction) for _, edit in edits]
    edited = run.system.edit(run.system.encode(before), instructions)
    results = run.system.decode_complete(edited)
    # 2. Read the labels of the results.
    labels, shares = run.judge_images(results, scenes)
    run.answers["edits"] = [
        {
            "before": describe(scene),
            "instruction": edit.instruction,
            "target": describe(edit.target),
            "read": read,
        }
        for (scene, edit), read in zip(edits, labels, strict=True)
    ]
    # 3. Labels that are right, and labels that the instruction leaves as they were.
    right = scoring.label_matches(labels, true_labels(scenes))
    stays = scoring.label_matches(true_labels(sources), true_labels(scenes))

    # 4. Two sheet rows of three edits each.
    cells: list[Cell] = []
    for (_, edit), source, result, target in zip(edits, before, results, targets, strict=True):
        cells.append(Cell(source, "given"))
        cells.append(Cell(result, prompt=edit.instruction))
        cells.append(Cell(target, "target"))
    run.show("edits", cells[:9])
    run.show("edits", cells[9:18])
    unchanged = scoring.label_matches(labels, true_labels(sources))
    kinds = [edit.kind for _, edit in edits]
    return {
        **shares,
        "stayed": bootstrap(np.all(right | ~stays, axis=1)),
        "unchanged": bootstrap(np.all(unchanged, axis=1)),
        "without_image": results.count(None),
        "unchanged_psnr": scoring.unchanged_psnr(results, before, targets),
        "kinds": scoring.means_by_kind(np.all(right, axis=1), kinds, range(len(edits))),
    }


# ---- text


def caption(run: Run) -> Section:
    """Descriptions of images; a caption must name every label. *exact*: the very sentence."""
    texts = run.system.describe(run.encoded[: len(run.scenes)])
    run.answers["captions"] = [
        {"scene": describe(scene), "text": text}
        for scene, text in zip(run.scenes, texts, strict=True)
    ]
    exact = [normalise(answer["text"]) == answer["scene"] for answer in run.answers["captions"]]
    return {
        "n": len(texts),
        **score(list(map(scoring.caption_labels, texts)), true_labels(run.scenes)),
        "exact": bootstrap(exact),
    }


def qa(run: Run) -> Section:
    """Short answers, exact match (case, articles and punctuation ignored), by kind of question.
    *blind*: always the most frequent training answer to the kind. Intervals resample scenes."""
    rows = [row for row, _ in run.samples.questions]
    questions = [question for _, question in run.samples.questions]
    # 1. Ask each question about its scene.
    texts = run.system.ask(
        [run.encoded[row] for row in rows], [question.question for question in questions]
    )
    run.answers["questions"] = [
        {
            "scene": describe(run.samples.scenes[row]),
            "question": question.question,
            "answer": text,
            "truth": question.answer,
        }
        for row, question, text in zip(rows, questions, texts, strict=True)
    ]
    # 2. Exact matches of the system and of the blind baseline.
    kinds = [question.kind for question in questions]
    truths = [question.answer for question in questions]
    guesses = [most_frequent()[kind] for kind in kinds]
    hits = list(map(scoring.same_answer, texts, truths))
    blind = list(map(scoring.same_answer, guesses, truths))
    return {
        "n": len(questions),
        "all": bootstrap(hits, rows),
        "blind": bootstrap(blind, rows),
        "kinds": scoring.means_by_kind(hits, kinds, rows),
        "blind_kinds": scoring.means_by_kind(blind, kinds, rows),
    }


@cache
def most_frequent() -> dict[str, str]:
    """The most frequent answer to each kind of training question."""
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for index in range(BLIND):
        question = ask(scene_at(SEED, index), KINDS[index % len(KINDS)], random.Random(index))
        if question is not None:
            answers[question.kind][vqa_answer(question.answer)] += 1
    return {kind: counter.most_common(1)[0][0] for kind, counter in answers.items()}


# ---- boxes, sizes


def detection(run: Run) -> Section:
    """All boxes of a named thing; a box is found if one overlaps it by half or more (intersection
    over union)."""
    # 1. Ask for one thing of each scene.
    images = run.real[: len(run.scenes)]
    phrases = []
    true_boxes = []
    for row, scene in enumerate(run.scenes):
        scene_boxes = boxes(scene)
        name = random.Random(f"{SEED} detect {row}").choice(scene.things)
        phrases.append(detect_phrase(name, scene_boxes))
        true_boxes.append([box for thing, box in scene_boxes if thing == name])
    detected = run.system.detect(images, phrases)

    # 2. Answers, and a sheet row of the first ones.
    run.answers["detection"] = [
        {"phrase": phrase, "found": found} for phrase, found in zip(phrases, detected, strict=True)
    ]
    cells = []
    for image, found, phrase in islice(zip(images, detected, phrases, strict=True), COLUMNS):
        cells.append(Cell(draw_boxes(image, found, width=1), prompt=phrase))
    run.show("detections", cells)

    # 3. Match detected and true boxes by overlap, in shares of the side.
    shares = [[[value / run.side for value in box] for box in found] for found in detected]
    hits = list(map(scoring.count_matches, shares, true_boxes))
    rates = scoring.box_rates(hits, list(map(len, shares)), list(map(len, true_boxes)))
    return {"n": len(images), **rates}


def sizes(run: Run) -> Section:
    """The same scenes drawn at several sizes (pixels a side): captions with every word right, short
    answers, boxes."""
    figures = Section()
    n_scenes = run.sizes.rungs
    # The first scenes and the questions about them.
    samples = replace(
        run.samples,
        sizes=replace(run.sizes, scenes=n_scenes),
        scenes=run.samples.scenes[:n_scenes],
        questions=[(row, question) for row, question in run.samples.questions if row < n_scenes],
    )
    for side in SIZES:
        run_at_size = Run(run.system, run.judge, samples, side)
        figures[str(side)] = {
            "caption": caption(run_at_size)["exact"],
            "qa": qa(run_at_size)["all"],
        }
        if hasattr(run.system, "detect"):
            figures[str(side)]["boxes"] = detection(run_at_size)["f1"]
    return figures


# ---- systems and splits of sections; targets

FIVE = HELD_OUT_SPLITS[:5]
"""All splits except `things`, which are only reconstructed."""
ALL = ("seed_llama", "seed_x", "lavit")
Function = Callable[[Run], Section]
TABLE: tuple[tuple[Function, Sequence[str], Sequence[str]], ...] = (
    (codes, ("seed_llama", "lavit"), HELD_OUT_SPLITS),
    (tokens, ("lavit",), HELD_OUT_SPLITS),
    (reconstruction, ALL, HELD_OUT_SPLITS),
    (drawing, ALL, FIVE),
    (wide_drawing, ("lavit",), FIVE),
    (caption, ALL, FIVE),
    (qa, ALL, FIVE),
    (edit, ALL, FIVE),
    (detection, ("seed_x",), FIVE),
    (sizes, ALL, ("val",)),
)
"""Section, systems, splits."""


def _five(*aims: float) -> dict[str, float]:
    return dict(zip(FIVE, aims, strict=True))


AIMS: dict[str, dict[str, dict[str, float]]] = {
    "seed_llama": {
        "reconstruction.r1": {**_five(0.95, 0.95, 0.95, 0.95, 0.85), "things": 0.80},
        "caption.all": _five(0.90, 0.85, 0.85, 0.80, 0.50),
        "qa.all": _five(0.95, 0.95, 0.95, 0.90, 0.75),
        "drawing.all": _five(0.90, 0.85, 0.85, 0.75, 0.50),
        "edit.all": _five(0.80, 0.75, 0.75, 0.65, 0.45),
        "codes.usage": {"val": 0.50},
    },
    "seed_x": {
        name: {"val": aim}
        for name, aim in {
            "caption.all": 0.85,
            "detection.f1": 0.85,
            "detection.precision": 0.85,
            "detection.recall": 0.85,
            "drawing.all": 0.75,
            "edit.all": 0.75,
            "edit.unchanged_psnr": 25.0,
        }.items()
    },
    "lavit": {
        name: {"val": aim}
        for name, aim in {
            "tokens.cosine": 0.2,
            "tokens.empty_share": 0.5,
            "caption.all": 0.85,
            "drawing.all": 0.7,
            "wide_drawing.all": 0.7,
        }.items()
    },
}
"""System -> section.figure -> split -> aim."""
AT_MOST = ("tokens.cosine", "tokens.empty_share")


def sections_of(kind: str, split: str) -> list[Function]:
    """The sections of a split in the report of a kind of system."""
    return [section for section, kinds, splits in TABLE if kind in kinds and split in splits]
