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

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from seed_multimodal.errors import pluralize
from seed_multimodal.evaluation.metrics import Estimate, bootstrap, codebook_statistics
from seed_multimodal.evaluation.vqa import vqa_answer
from seed_multimodal.images.sheet import Cell, Row, draw_boxes
from seed_multimodal.pipelines.run import GeneratedAnswer
from seed_nano.report import scoring
from seed_nano.report.judge import Judge
from seed_nano.report.samples import SEED, Samples
from seed_nano.report.scoring import OptionalImages, Section, image_labels, score, true_labels
from seed_nano.report.systems import EncodedImage, System, dimmed_images, feature_losses
from seed_nano.world.records import detect_phrase
from seed_nano.world.scene import Scene, boxes, empty_images, scene_image
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

    def __init__(self, system: System, judge: Judge, samples: Samples, side: int = 0) -> None:
        self.system = system
        self.judge = judge
        self.samples = samples
        self.sizes = samples.sizes
        self.side = side or system.image_size
        self.scenes = samples.scenes[: self.sizes.scenes]
        self.real = self.render(samples.scenes)
        self.encoded = system.encode(self.real)
        self.drawings: list[GeneratedAnswer | None] = []
        self.answers: Section = {}
        self.sheets: dict[str, list[Row]] = {}

    def render(self, scenes: Iterable[Scene]) -> list[Image.Image]:
        """Images of scenes."""
        return [scene_image(scene, self.side) for scene in scenes]

    def record(self, name: str, **columns: Sequence[object]) -> None:
        """Store answers: a field for each column."""
        rows = zip(*columns.values(), strict=True)
        self.answers[name] = [dict(zip(columns, row, strict=True)) for row in rows]

    def image_scores(
        self, images: OptionalImages, scenes: Sequence[Scene], name: str, real: OptionalImages = ()
    ) -> Section:
        """Accuracy of the judge's labels of drawn images, which are stored as answers `name`.

        scenes: the targets; real: their images, whose accuracy is the ceiling.
        """
        read = image_labels(self.judge, images)
        self.record(name, asked=list(map(describe, scenes)), read=read)
        return self.accuracy(read, scenes, real)

    def accuracy(
        self, read: Sequence[scoring.LabelNames], scenes: Sequence[Scene], real: OptionalImages = ()
    ) -> Section:
        """Of labels that the judge has read; and its ceiling, as of `image_scores`."""
        truth = true_labels(scenes)
        ceiling = score(image_labels(self.judge, real or self.render(scenes)), truth)
        return {"n": len(scenes), **score(read, truth), "ceiling": ceiling["all"]}

    def show(self, sheet: str, cells: Iterable[Cell], label: str | None = None) -> None:
        """Add a row to a sheet; the first of a split is labelled with its name."""
        rows = self.sheets.setdefault(sheet, [])
        if label is None:
            label = "" if rows else self.samples.split
        rows.append(Row(label, list(cells)))

    def show_drawings(self, sheet: str, images: OptionalImages) -> None:
        """Add a row of the first drawings of `scenes`, each below its prompt."""
        cells = []
        for image, scene in zip(images[:COLUMNS], self.scenes, strict=False):
            cells.append(Cell(image, prompt=describe(scene)))
        self.show(sheet, cells)


# ---- codes


def codes(run: Run) -> Section:
    """Use of the codebook by the codes of all images."""
    rows = [image.codes for image in run.encoded]
    entries = run.system.codec.codebook_size
    if len(set(map(len, rows))) == 1:
        return codebook_statistics(np.array(rows), entries)
    statistics = codebook_statistics(np.concatenate(rows)[:, None], entries)
    return {
        "sequences": len(rows),
        "distinct": len(set(map(tuple, rows))),
        "image_bits": round(statistics["image_bits"] * float(np.mean(list(map(len, rows)))), 3),
        **{name: statistics[name] for name in ("codebook", "used", "usage", "perplexity")},
    }


def tokens(run: Run) -> Section:
    """Tokens of an image by the number of things in it (mean, standard deviation over images).
    *fullest*: the most things; *empty share*: tokens of backgrounds without things over those of
    the fullest scenes. *cosine*: loss of the decoded features, 1 − cosine to the vision encoder's,
    mean over patches; *blind*: the same of the mean image."""
    codec = run.system.codec
    # 1. Tokens of the scenes and of empty backgrounds, with several samples of the token selector.
    counts = _token_counts(run.encoded)
    things = np.array([sum(scene.counts) for scene in run.samples.scenes])
    empty = [Image.fromarray(image) for image in empty_images(run.side)]
    repeats = EMPTY_DRAWS if codec.selection == "draw" else 1
    encoded_empty = run.system.encode(empty * repeats)
    without = _token_counts(encoded_empty)

    # 2. Examples; empty scenes are the same for each split.
    run.answers["kept"] = counts[:COLUMNS].tolist()
    run.answers["kept_empty"] = without[: len(empty)].tolist()

    def show(encoded: Sequence[EncodedImage], label: str | None = None) -> None:
        cells = []
        for image, row in zip(dimmed_images(codec, encoded), encoded, strict=True):
            cells.append(Cell(image, pluralize(len(row.codes), "token")))
        run.show("kept", cells, label)

    show(run.encoded[:COLUMNS])
    if run.samples.split == HELD_OUT_SPLITS[0]:
        show(encoded_empty[: len(empty)], "no thing")

    # 3. Means by number of things. Empty scenes have 0; their intervals resample backgrounds.
    near, blind = feature_losses(codec, run.encoded, run.system.batch)
    spreads = {"0": _mean_and_spread(without, list(BACKGROUNDS) * repeats)}
    for n_things in sorted(set(things.tolist())):
        spreads[str(n_things)] = _mean_and_spread(counts[things == n_things])
    fullest = things.max()
    return {
        "n": len(counts),
        "patches": codec.codes_per_image,
        "cosine": bootstrap(near),
        "blind": bootstrap(blind),
        "mean": bootstrap(counts),
        "fullest": int(fullest),
        "things": spreads,
        "empty_share": scoring.ratio(
            without.reshape(repeats, -1).mean(0), counts[things == fullest]
        ),
    }


def _token_counts(images: Sequence[EncodedImage]) -> np.ndarray:
    return np.array([len(image.codes) for image in images])


def _mean_and_spread(counts: ArrayLike, groups: Sequence[str] | None = None) -> Section:
    return {"mean": bootstrap(counts, groups), "spread": round(float(np.std(counts)), 3)}


# ---- images


def reconstruction(run: Run) -> Section:
    """Images drawn from their own codes or features. *R@1*: the original is the nearest of the
    gallery's real images, by the judge's features. *PSNR of things*: over their pixels."""
    scenes = run.samples.scenes[: run.sizes.gallery]
    rebuilt = run.system.rebuild(run.encoded[: len(scenes)])
    run.show("reconstructions", map(Cell, run.real[:COLUMNS]))
    run.show("reconstructions", map(Cell, rebuilt[:COLUMNS]), "rebuilt")
    return {
        **run.image_scores(rebuilt, scenes, "rebuilt"),
        **scoring.similarity(rebuilt, scenes),
        "gallery": len(run.real),
        "r1": bootstrap(scoring.retrieval(run.judge, rebuilt, run.real)),
    }


def drawing(run: Run) -> Section:
    """Images drawn from descriptions."""
    run.drawings = run.system.draw(list(map(describe, run.scenes)))
    images = run.system.decode(run.drawings)
    run.show_drawings("drawings", images)
    accuracy = run.image_scores(images, run.scenes, "drawn")
    return {**accuracy, "without_image": images.count(None)}


def wide_drawing(run: Run) -> Section:
    """The same codes drawn in 3:2: the scene stretched, judged when resized to the square, as are
    the real images of the ceiling."""
    images = run.system.decode(run.drawings, ratio="3:2")
    square = (run.side, run.side)
    size = next((image.size for image in images if image is not None), square)

    def resized(images: OptionalImages, size: tuple[int, int]) -> OptionalImages:
        return [image and image.resize(size, Image.Resampling.BICUBIC) for image in images]

    # Real images lose as much by the two changes of size.
    real = resized(resized(run.real[: len(run.scenes)], size), square)
    run.show_drawings("wide_drawings", images)
    accuracy = run.image_scores(resized(images, square), run.scenes, "wide_drawn", real)
    return {**accuracy, "without_image": images.count(None), "size": size}


def edit(run: Run) -> Section:
    """Images after an instruction: the labels of the exact target. *stayed*: labels that the
    instruction leaves are right; *unchanged*: the labels are those of the image before. *PSNR of
    what is unchanged*: against the image before, over the pixels that are equal in it and in the
    target."""
    # 1. Edit the encoded images.
    edits = [edit for _, edit in run.samples.edits]
    sources = [scene for scene, _ in run.samples.edits]
    scenes = [edit.target for edit in edits]
    before = run.render(sources)
    targets = run.render(scenes)
    instructions = [sentence(edit.instruction) for edit in edits]
    results = run.system.decode(run.system.edit(run.system.encode(before), instructions))
    # 2. Read the labels of the results.
    read = image_labels(run.judge, results)
    run.record(
        "edits",
        before=list(map(describe, sources)),
        instruction=[edit.instruction for edit in edits],
        target=list(map(describe, scenes)),
        read=read,
    )
    # 3. Labels that are right, and labels that the instruction leaves as they were.
    truth = true_labels(scenes)
    old = true_labels(sources)
    right = scoring.label_matches(read, truth)
    stays = scoring.label_matches(old, truth)

    # 4. Two sheet rows of three edits each.
    cells: list[Cell] = []
    for edit, source, result, target in zip(edits, before, results, targets, strict=True):
        cells.append(Cell(source, "given"))
        cells.append(Cell(result, prompt=edit.instruction))
        cells.append(Cell(target, "target"))
    run.show("edits", cells[:9])
    run.show("edits", cells[9:18])
    return {
        **run.accuracy(read, scenes),
        "stayed": bootstrap(np.all(right | ~stays, axis=1)),
        "unchanged": bootstrap(np.all(scoring.label_matches(read, old), axis=1)),
        "without_image": results.count(None),
        "unchanged_psnr": scoring.unchanged_psnr(results, before, targets),
        "kinds": scoring.means_by_kind(
            np.all(right, axis=1), [edit.kind for edit in edits], range(len(edits))
        ),
    }


# ---- text


def caption(run: Run) -> Section:
    """Descriptions of images; a caption must name every label. *exact*: the very sentence."""
    texts = run.system.describe(run.encoded[: len(run.scenes)])
    truth = list(map(describe, run.scenes))
    run.record("captions", scene=truth, text=texts)
    return {
        "n": len(texts),
        **score(list(map(scoring.caption_labels, texts)), true_labels(run.scenes)),
        "exact": bootstrap(np.array(list(map(normalise, texts))) == np.array(truth)),
    }


def qa(run: Run) -> Section:
    """Short answers, exact match (case, articles and punctuation ignored), by kind of question.
    *blind*: always the most frequent training answer to the kind. Intervals resample scenes."""
    # 1. Ask each question about its scene.
    rows = [row for row, _ in run.samples.questions]
    questions = [question.question for _, question in run.samples.questions]
    truths = [question.answer for _, question in run.samples.questions]
    kinds = [question.kind for _, question in run.samples.questions]
    texts = run.system.ask([run.encoded[row] for row in rows], questions)
    scenes = [describe(run.samples.scenes[row]) for row in rows]
    run.record("questions", scene=scenes, question=questions, answer=texts, truth=truths)

    # 2. Exact matches of the system and of the blind baseline.
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
    run.record("detection", phrase=phrases, found=detected)

    # 2. A sheet row of the first ones; match detected and true boxes, in shares of the side.
    cells = []
    hits = []
    for image, phrase, found, wanted in zip(images, phrases, detected, true_boxes, strict=True):
        cells.append(Cell(draw_boxes(image, found, width=1), prompt=phrase))
        hits.append(scoring.count_matches(np.array(found) / run.side, wanted))
    run.show("detections", cells[:COLUMNS])
    rates = scoring.box_rates(hits, list(map(len, detected)), list(map(len, true_boxes)))
    return {"n": len(images), **rates}


def sizes(run: Run) -> Section:
    """The same scenes drawn at several sizes (pixels a side): captions with every word right, short
    answers, boxes."""
    n_scenes = run.sizes.rungs
    # The first scenes and the questions about them.
    samples = replace(
        run.samples,
        sizes=replace(run.sizes, scenes=n_scenes),
        scenes=run.samples.scenes[:n_scenes],
        questions=[(row, question) for row, question in run.samples.questions if row < n_scenes],
    )
    figures: dict[str, dict[str, Estimate]] = {}
    for side in SIZES:
        of_size = Run(run.system, run.judge, samples, side)
        figures[str(side)] = {"caption": caption(of_size)["exact"], "qa": qa(of_size)["all"]}
        if run.system.inner.abilities.detects:
            figures[str(side)]["boxes"] = detection(of_size)["f1"]
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
AIMS: dict[str, dict[str, Sequence[float]]] = {
    "seed_llama": {
        "reconstruction.r1": (0.95, 0.95, 0.95, 0.95, 0.85, 0.80),
        "caption.all": (0.90, 0.85, 0.85, 0.80, 0.50),
        "qa.all": (0.95, 0.95, 0.95, 0.90, 0.75),
        "drawing.all": (0.90, 0.85, 0.85, 0.75, 0.50),
        "edit.all": (0.80, 0.75, 0.75, 0.65, 0.45),
        "codes.usage": (0.50,),
    },
    "seed_x": {
        "caption.all": (0.85,),
        "detection.f1": (0.85,),
        "detection.precision": (0.85,),
        "detection.recall": (0.85,),
        "drawing.all": (0.75,),
        "edit.all": (0.75,),
        "edit.unchanged_psnr": (25.0,),
    },
    "lavit": {
        "tokens.cosine": (0.2,),
        "tokens.empty_share": (0.5,),
        "caption.all": (0.85,),
        "drawing.all": (0.7,),
        "wide_drawing.all": (0.7,),
    },
}
"""System -> section.figure -> aim for each of `HELD_OUT_SPLITS`, as far as there is one."""
AT_MOST = ("tokens.cosine", "tokens.empty_share")


def sections_of(kind: str, split: str) -> list[Function]:
    """The sections of a split in the report of a kind of system."""
    return [section for section, kinds, splits in TABLE if kind in kinds and split in splits]
