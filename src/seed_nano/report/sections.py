"""The sections of a report: each measures one ability on one split and returns its numbers; the rows of sheets it shows
and the answers it packs go into the `Run`. A section's docstring is its definition in report.md.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from seed_multimodal.errors import counted
from seed_multimodal.evaluation.metrics import bootstrap, codebook_statistics
from seed_multimodal.images.boxes import draw_boxes
from seed_multimodal.images.sheet import Cell, Row
from seed_multimodal.language.tasks import answer_in
from seed_nano.report.judge import Judge
from seed_nano.report.metrics import majority_baseline, matched, same_answer
from seed_nano.report.samples import SEED, Samples
from seed_nano.report.scoring import (
    Drawn,
    Section,
    Words,
    all_words,
    as_told,
    box_rates,
    caption_words,
    confusions,
    every,
    grouped,
    likeness,
    picture_words,
    ratio,
    retrieval,
    right_labels,
    scene_words,
    score,
    unchanged_psnr,
)
from seed_nano.report.sizes import REPORTED, measure
from seed_nano.world.dialogues import examples_request, story_request
from seed_nano.world.records import detect_phrase
from seed_nano.world.scene import QUARTERS, Scene, boxes, empty_pictures, render
from seed_nano.world.splits import HELD_OUT_SPLITS, scene_at
from seed_nano.world.tasks import KINDS, VERDICT_END, ask
from seed_nano.world.things import BACKGROUNDS
from seed_nano.world.wide import ask_wide, describe_wide, read_wide, render_wide, wide_at
from seed_nano.world.words import describe, normalise, sentence, some

PREFIXES = (4, 8, 16)
BLIND = 3000  # training questions from which the most frequent answers are counted
SHORT, LONG = 96, 256  # tokens of an answer with at most one image, and of a story
EMPTY_DRAWS = 8  # selections of each empty scene, where the selector samples
COLUMNS = 10  # images in a row of a sheet
Seen = list[str | Image.Image]


class Run:
    """One split of one system while it is measured.

    Attributes:
        real, encoded: its images, and as the system reads them. images, drawn: what was drawn, for later sections.
        answers: for answers.json.gz. sheets: name -> rows.
    """

    def __init__(self, system: Any, judge: Judge, samples: Samples) -> None:
        self.system, self.judge, self.samples, self.sizes = system, judge, samples, samples.sizes
        self.scenes = samples.scenes[:self.sizes.scenes]
        self.real = self.render(samples.scenes)
        self.encoded = system.encode(self.real)
        self.images: dict[str, Drawn] = {}
        self.drawn: list[Any] = []
        self.answers: Section = {}
        self.sheets: dict[str, list[Row]] = {}

    def render(self, scenes: Iterable[Scene]) -> list[Image.Image]:
        """Images of scenes."""
        return [Image.fromarray(render(scene, self.system.image_size)) for scene in scenes]

    def read(self, name: str, images: Drawn, scenes: Iterable[Scene], key: str = "asked") -> list[Words]:
        """The words of drawn images by the judge, packed as the answers `name`; `scenes`: what was asked for."""
        found = picture_words(self.judge, images)
        self.answers[name] = [{key: describe(scene), "read": read} for scene, read in zip(scenes, found, strict=True)]
        return found

    def score(self, found: Sequence[Words], scenes: Sequence[Scene]) -> Section:
        """Shares of right labels, with the judge's share on the real images (`ceiling`)."""
        return {"n": len(scenes), **score(found, all_words(scenes)), "ceiling": self.ceiling(scenes)}

    def ceiling(self, scenes: Sequence[Scene]) -> Any:
        """The judge's share of real images with every label right."""
        return score(picture_words(self.judge, self.render(scenes)), all_words(scenes))["all"]

    def show(self, sheet: str, cells: Iterable[Cell | Image.Image | None], label: str | None = None) -> None:
        """Add a row to a sheet; the first of a split is labelled with its name."""
        rows = self.sheets.setdefault(sheet, [])
        rows.append(Row(("" if rows else self.samples.split) if label is None else label,
                        [cell if isinstance(cell, Cell) else Cell(cell) for cell in cells]))


# ---- codes


def codes(run: Run) -> Section:
    """Use of the codebook by the codes of all images."""
    rows, entries = list(map(run.system.codes_of, run.encoded)), run.system.codebook_size
    if len(set(map(len, rows))) > 1:
        found = codebook_statistics(np.concatenate(rows)[:, None], entries)
        return {"sequences": len(rows), "distinct": len(set(map(tuple, rows))),
                **{name: found[name] for name in ("codebook", "used", "usage", "perplexity")}}
    return codebook_statistics(np.array(rows), entries)


def tokens(run: Run) -> Section:
    """Tokens of an image by the number of things in it (mean, standard deviation over images). *fullest*: the most
    things; *empty share*: tokens of backgrounds without things over those of the fullest scenes. *cosine*: loss of the
    decoded features, 1 − cosine to the vision encoder's, mean over patches; *blind*: the same of the mean image."""
    counts = np.array([len(one.codes) for one in run.encoded])
    things = np.array([sum(scene.counts) for scene in run.samples.scenes])
    empty, repeats = empty_pictures(run.system.image_size), EMPTY_DRAWS if run.system.samples else 1
    bare = run.system.encode([Image.fromarray(one) for _ in range(repeats) for one in empty])
    for label, shown in (("no thing", bare[:len(empty)]), (None, run.encoded[:COLUMNS])):
        run.show("kept", [Cell(one.dimmed(), counted(len(one.codes), "token")) for one in shown], label)
        run.answers["kept" if label is None else "kept_empty"] = [len(one.codes) for one in shown]
    without = np.array([len(one.codes) for one in bare])
    near, blind = run.system.losses(run.encoded)
    amounts = {"0": (without, list(BACKGROUNDS) * repeats),
               **{str(number): (counts[things == number], None) for number in sorted(set(things.tolist()))}}
    return {"n": len(counts), "patches": run.system.patches, "cosine": bootstrap(near), "blind": bootstrap(blind),
            "mean": bootstrap(counts), "fullest": int(things.max()),
            "things": {name: {"mean": bootstrap(values, groups), "spread": round(float(np.std(values)), 3)}
                       for name, (values, groups) in amounts.items()},
            "empty_share": ratio(without.reshape(repeats, -1).mean(0), counts[things == things.max()])}


# ---- images


def reconstruction(run: Run) -> Section:
    """Images drawn from their own codes or features. *r1*: the original is the nearest of the gallery's real images, by
    the judge's features. *psnr things*: over the pixels of things."""
    scenes = run.samples.scenes[:run.sizes.gallery]
    made = run.images["rebuilt"] = run.system.decode(run.encoded[:len(scenes)])
    found = run.read("rebuilt", made, scenes)
    run.show("reconstructions", run.real[:COLUMNS])
    run.show("reconstructions", made[:COLUMNS], "rebuilt")
    return {**run.score(found, scenes), "r1": bootstrap(retrieval(run.judge, made, run.real)), **likeness(made, scenes),
            "gallery": len(run.real), "confused": confusions(found, all_words(scenes))}


def ladder(run: Run) -> Section:
    """What each step loses: the VAE alone, and images drawn from the true embedding."""
    scenes = run.samples.scenes[:run.sizes.rungs]
    found: Section = {"n": len(scenes)}
    for name in ("vae", "embedding"):
        made = getattr(run.system, f"through_{name}")(run.real[:len(scenes)])
        if made is not None:
            found[name] = {**score(picture_words(run.judge, made), all_words(scenes)), **likeness(made, scenes)}
            run.show("ladder", made[:COLUMNS], f"{run.samples.split}: {name}")
    return {**found, "ceiling": run.ceiling(scenes)}


def prefix(run: Run) -> Section:
    """Images drawn from their first codes only."""
    scenes = run.samples.scenes[:run.sizes.rungs]
    found: Section = {"n": len(scenes)}
    for first in (*PREFIXES, len(run.encoded[0])):
        made = (run.images["rebuilt"][:len(scenes)] if first == len(run.encoded[0]) else
                run.system.decode(run.encoded[:len(scenes)], first=first))
        found[str(first)] = score(picture_words(run.judge, made), all_words(scenes))
        if run.samples.split == "val":
            run.show("progressive", made[:COLUMNS], f"first {first} codes")
    return found


def drawing(run: Run) -> Section:
    """Images drawn from descriptions."""
    run.drawn = run.system.draw(list(map(describe, run.scenes)))
    made = run.system.paint(run.drawn)
    found = run.read("drawn", made, run.scenes)
    run.show("drawings", [Cell(image, asked=describe(scene)) for image, scene in
                          list(zip(made, run.scenes, strict=True))[:COLUMNS]])
    return {**run.score(found, run.scenes), "without_picture": made.count(None),
            "confused": confusions(found, all_words(run.scenes))}


def wide_drawing(run: Run) -> Section:
    """The same codes drawn in 3:2: the scene stretched, judged when resized to the square, as are the real images of
    the ceiling."""
    side = run.system.image_size
    made = run.system.paint(run.drawn, ratio="3:2")
    size = next((image.size for image in made if image is not None), (side, side))

    def square(images: Drawn) -> list[Image.Image | None]:
        return [image and image.resize((side, side), Image.Resampling.BICUBIC) for image in images]

    found = run.read("wide_drawn", square(made), run.scenes)
    run.show("wide_drawings", [Cell(image, asked=describe(scene), wide=2) for image, scene in
                               list(zip(made, run.scenes, strict=True))[:6]])
    real = square([image.resize(size, Image.Resampling.BICUBIC) for image in run.real[:len(run.scenes)]])
    return {"n": len(run.scenes), **score(found, all_words(run.scenes)), "without_picture": made.count(None),
            "size": size, "ceiling": score(picture_words(run.judge, real), all_words(run.scenes))["all"]}


def conditioned(run: Run) -> Section:
    """Targets of edits drawn from their features, with the image before the edit as condition."""
    scenes = [edit.target for _, edit in run.samples.edits]
    before, targets = run.render(scene for scene, _ in run.samples.edits), run.render(scenes)
    made = run.system.rebuild(targets, before)
    run.show("conditioned", [cell for row in list(zip(before, made, targets, strict=True))[:3] for cell in row])
    return {**run.score(picture_words(run.judge, made), scenes), **likeness(made, scenes),
            "unchanged_psnr": unchanged_psnr(made, before, targets)}


def edit(run: Run) -> Section:
    """Images after an instruction: the labels of the exact target. *stayed*: labels that the instruction leaves are
    right; *unchanged*: the labels are those of the image before. *unchanged psnr*: against the image before, over the
    pixels that are equal in it and in the target."""
    edits = run.samples.edits
    sources, scenes = [scene for scene, _ in edits], [edit.target for _, edit in edits]
    before, targets = run.render(sources), run.render(scenes)
    made = run.system.paint(run.system.edit(run.system.encode(before),
                                            [sentence(edit.instruction) for _, edit in edits]))
    found = run.read("edits", made, scenes, "target")
    for row, (scene, one) in zip(run.answers["edits"], edits, strict=True):
        row |= {"before": describe(scene), "instruction": one.instruction}
    right, stays = (right_labels(one, all_words(scenes)) for one in (found, all_words(sources)))
    for start in (0, 3):
        run.show("edits", [cell for (_, edit), given, result, target in list(
            zip(edits, before, made, targets, strict=True))[start:start + 3] for cell in (
                Cell(given, "given"), Cell(result, asked=edit.instruction, arrow=True), Cell(target, "target"))])
    return {**run.score(found, scenes), "stayed": bootstrap(every(right | ~stays)),
            "unchanged": bootstrap(every(right_labels(found, all_words(sources)))),
            "without_picture": made.count(None), "unchanged_psnr": unchanged_psnr(made, before, targets),
            "kinds": grouped(every(right), [edit.kind for _, edit in edits], range(len(edits)))}


def composed(run: Run) -> Section:
    """Drawn from two images at a time, without words: only shown, as there is no right answer."""
    rows = range(0, min(8, len(run.real) - 1), 2)
    made = run.system.paint(run.system.edit([run.encoded[row] for row in rows], [run.encoded[row + 1] for row in rows]))
    run.show("composed", [cell for row, image in zip(rows, made, strict=True) for cell in (
        run.real[row], run.real[row + 1], Cell(image, arrow=True))])
    return {"n": len(rows), "without_picture": made.count(None)}


# ---- text


def caption(run: Run) -> Section:
    """Descriptions of images; a caption must name every label. *exact*: the very sentence."""
    texts = run.system.describe(run.encoded[:len(run.scenes)])
    run.answers["captions"] = [{"scene": describe(scene), "text": text}
                               for scene, text in zip(run.scenes, texts, strict=True)]
    return {"n": len(texts), **score(list(map(caption_words, texts)), all_words(run.scenes)), "exact": bootstrap(
        [normalise(text) == describe(scene) for scene, text in zip(run.scenes, texts, strict=True)])}


def qa(run: Run) -> Section:
    """Short answers, exact match (case, articles and punctuation ignored), by kind of question. *blind*: always the
    most frequent training answer to the kind. Intervals resample scenes."""
    rows, asked = [row for row, _ in run.samples.questions], [question for _, question in run.samples.questions]
    texts = run.system.ask([run.encoded[row] for row in rows], [question.question for question in asked])
    run.answers["questions"] = [
        {"scene": describe(run.samples.scenes[row]), "question": one.question, "answer": text, "truth": one.answer}
        for row, one, text in zip(rows, asked, texts, strict=True)]
    hits = [same_answer(text, one.answer) for text, one in zip(texts, asked, strict=True)]
    seen = [ask(scene_at(SEED, index), KINDS[index % len(KINDS)], random.Random(index)) for index in range(BLIND)]
    kinds = [one.kind for one in asked]
    blind = majority_baseline([(one.kind, one.answer) for one in seen if one],
                              [(one.kind, one.answer) for one in asked])
    return {"n": len(asked), "all": bootstrap(hits, rows), "blind": bootstrap(blind, rows),
            "kinds": grouped(hits, kinds, rows), "blind_kinds": grouped(blind, kinds, rows)}


def sizes(run: Run) -> Section:
    """The same scenes drawn at several sizes (pixels a side). A box of one of two things is right if every box of the
    named thing is found, and none is too many."""
    scenes = run.samples.scenes[:run.sizes.rungs]
    return {str(size): {name: bootstrap(hits) for name, hits in measure(run.system, scenes, size).items()}
            for size in REPORTED}


# ---- boxes


def detection(run: Run) -> Section:
    """All boxes of a named thing; a box is found if one overlaps it by half or more (intersection over union)."""
    names = [random.Random(f"{SEED} detect {row}").choice(scene.things) for row, scene in enumerate(run.scenes)]
    return _detect(run, "detection", run.real[:len(run.scenes)], names, list(map(boxes, run.scenes)), True)


def wide(run: Run) -> Section:
    """Scenes of 128 pixels a side, a thing in each quarter or none: every thing at its place in a description (*all*),
    *quarters*, *questions*, boxes (*f1*); read in several views, and, *one*, in one view of 64 pixels."""
    number = run.sizes.rungs
    scenes = [wide_at(SEED, row, run.samples.split) for row in range(number)]
    images = [Image.fromarray(render_wide(scene)) for scene in scenes]
    asked = [ask_wide(scene, random.Random(f"{SEED} {row}")) for row, scene in enumerate(scenes)]
    names = [random.Random(f"{SEED} wide {row}").choice(scene.there) for row, scene in enumerate(scenes)]
    found: Section = {"n": number}
    for kind, views in (("", True), ("one_", False)):
        texts = run.system.say(images, [run.system.inner.tasks.describe] * number, views)
        said = run.system.say(images, [question for question, _ in asked], views)
        places = [read_wide(text) for text in texts]
        right = [[read.get(quarter, "") == name for quarter, name in zip(QUARTERS, scene.things, strict=True)]
                 for read, scene in zip(places, scenes, strict=True)]
        boxed = _detect(run, f"{kind}wide_detection", images, names, list(map(boxes, scenes)), views)
        found |= {f"{kind}all": bootstrap([all(row) for row in right]),
                  f"{kind}quarters": bootstrap(np.array(right, float).mean(1)),
                  f"{kind}questions": bootstrap([same_answer(one, answer) for one, (_, answer) in
                                                 zip(said, asked, strict=True)]),
                  f"{kind}f1": boxed["f1"]}
        run.answers[f"{kind}wide"] = [{"scene": describe_wide(scene), "text": text}
                                      for scene, text in zip(scenes, texts, strict=True)]
    run.show("wide", [Cell(image, answer["text"], wide=2) for image, answer in
                      zip(images[:5], run.answers["wide"], strict=False)])
    return found


def _detect(run: Run, name: str, images: Sequence[Image.Image], things: Sequence[str], there: Sequence[Any],
            views: bool) -> Section:
    wanted = [[box for one, box in row if one == thing] for thing, row in zip(things, there, strict=True)]
    phrases = [detect_phrase(thing, row) for thing, row in zip(things, there, strict=True)]
    found = run.system.detect(images, phrases, views)
    shares = [[tuple(value / image.size[side % 2] for side, value in enumerate(box)) for box in row]
              for image, row in zip(images, found, strict=True)]
    hits = [matched(one, other) for one, other in zip(shares, wanted, strict=True)]
    run.answers[name] = [{"phrase": phrase, "found": row} for phrase, row in zip(phrases, found, strict=True)]
    if views:
        run.show("detections", [Cell(draw_boxes(image, row, width=1), asked=phrase) for image, row, phrase in
                                list(zip(images, found, phrases, strict=True))[:COLUMNS]])
    return {"n": len(images), **box_rates(hits, list(map(len, shares)), list(map(len, wanted)))}


# ---- conversations


def conversation(run: Run) -> Section:
    """Turns of conversations: words exact, and every label of the image right, after the true earlier turns (*turns*)
    or the system's *own*. Nothing is forced: whether to draw is the system's choice."""
    talks = run.samples.conversations
    encoded = _encoded(run, [part for talk in talks for message in talk for part in message.content])
    found: Section = {"n": len(talks)}
    for name, own in (("turns", False), ("own", True)):
        answers = _talk(run, talks, encoded, own)
        turns = [(row, answer, message.content) for row, (talk, said) in enumerate(zip(talks, answers, strict=True))
                 for message, answer in zip(talk[1::2], said, strict=True)]
        right = np.array([_same(run, answer, wanted) for _, answer, wanted in turns])
        drawn = np.array([any(isinstance(part, Scene) for part in wanted) for _, _, wanted in turns])
        rows = np.array([row for row, _, _ in turns])
        for part, chosen in (("", drawn | True), ("_words", ~drawn), ("_pictures", drawn)):
            found[name + part] = bootstrap(right[chosen], rows[chosen].tolist())
        run.answers[f"conversations_{name}"] = [list(map(_plain, said)) for said in answers]
    for talk, said in list(zip(talks, answers, strict=True))[:4]:
        cells: list[Cell] = []
        for message, answer in zip(talk[::2], said, strict=True):
            cells += map(Cell, run.render(part for part in message.content if isinstance(part, Scene)))
            cells.append(Cell(next((part for part in answer if not isinstance(part, str)), None), _text(answer),
                              _text(message.content)))
        run.show("conversations", cells)
    return {**found, "ceiling": run.ceiling([part for talk in talks for message in talk[1::2]
                                             for part in message.content if isinstance(part, Scene)])}


def examples(run: Run) -> Section:
    """Two examples of a change, then an image to change in the same way."""
    given, scenes = [row for row, _ in run.samples.examples], [scene for _, scene in run.samples.examples]
    encoded = _encoded(run, [scene for row in given for scene in row])
    answers = _decoded(run, run.system.answer(
        [[("user", examples_request([encoded[scene] for scene in row]))] for row in given], SHORT))
    images = [[part for part in answer if not isinstance(part, str)] for answer in answers]
    made = [row[0] if len(row) == 1 else None for row in images]
    for row, image in list(zip(given, made, strict=True))[:6]:
        run.show("examples", [Cell(one, arrow=place % 2 == 1) for place, one in enumerate([*run.render(row), image])])
    found = run.read("examples", made, scenes, "wanted")
    return {**run.score(found, scenes), "without_picture": made.count(None)}


def story(run: Run) -> Section:
    """Stories of three or four frames from a request that leaves backgrounds open: a frame is right if its sentence is
    the story's and the image shows it, on the background that the system named."""
    stories = run.samples.stories
    requests = [story_request(some(1, pages[1][1].things[0], pages[0][1].style), some(1, pages[1][1].things[1]),
                              len(pages)) for pages in stories]
    answers = _decoded(run, run.system.answer([[("user", [text])] for text in requests], LONG))
    rows, words, frames = [], [], []
    for row, (pages, answer) in enumerate(zip(stories, answers, strict=True)):
        before = [("", ""), *zip(answer, answer, strict=True)]
        shown = [(text if isinstance(text, str) else "", part) for (text, _), part in zip(before, answer, strict=False)
                 if not isinstance(part, str)]
        read = picture_words(run.judge, [image for _, image in shown[:len(pages)]])
        for place, scene in enumerate(as_told(pages, [text for text, _ in shown])):
            rows.append(row)
            words.append(scene is not None)
            frames.append(scene is not None and place < len(read) and read[place] == scene_words(scene))
        if row < 3:
            run.show("stories", [Cell(image, asked=text, wide=2) for text, image in shown], requests[row])
    run.answers["stories"] = [{"request": text, "answer": _plain(answer)}
                              for text, answer in zip(requests, answers, strict=True)]
    return {"n": len(stories), "frames": bootstrap(frames, rows), "sentences": bootstrap(words, rows),
            "ceiling": run.ceiling([scene for pages in stories for _, scene in pages])}


def _talk(run: Run, talks: Sequence[Any], encoded: dict[Scene, Any], own: bool) -> list[list[Seen]]:
    """The answers of all turns; later turns follow the true answers, or the system's `own`."""
    histories: list[list[tuple[str, list[Any]]]] = [[] for _ in talks]
    answers: list[list[list[Any]]] = [[] for _ in talks]

    def parts(content: Sequence[Any]) -> list[Any]:
        return [encoded[part] if isinstance(part, Scene) else part for part in content]

    for place in range(0, max(map(len, talks)), 2):
        now = [row for row, talk in enumerate(talks) if place < len(talk)]
        for row in now:
            histories[row].append(("user", parts(talks[row][place].content)))
        for row, answer in zip(now, run.system.answer([histories[row] for row in now], SHORT), strict=True):
            answers[row].append(answer)
            true = parts(talks[row][place + 1].content)
            histories[row].append(("assistant", (answer or [""]) if own else true))
    flat = iter(_decoded(run, [answer for row in answers for answer in row]))
    return [[next(flat) for _ in row] for row in answers]


def _same(run: Run, answer: Seen, wanted: Sequence[str | Scene]) -> bool:
    """Whether texts are equal after normalisation, without verdicts, and images have all labels, part by part."""
    def final(text: str) -> str:
        return normalise(answer_in(text, VERDICT_END))

    return len(answer) == len(wanted) and all(
        (isinstance(part, str) and final(part) == final(true)) if isinstance(true, str) else
        (not isinstance(part, str) and picture_words(run.judge, [part]) == [scene_words(true)])
        for part, true in zip(answer, wanted, strict=True))


def _encoded(run: Run, parts: Sequence[Any]) -> dict[Scene, Any]:
    scenes = list(dict.fromkeys(part for part in parts if isinstance(part, Scene)))
    return dict(zip(scenes, run.system.encode(run.render(scenes)), strict=True))


def _decoded(run: Run, answers: Sequence[Sequence[Any]]) -> list[Seen]:
    images = iter(run.system.decode([part for row in answers for part in row if not isinstance(part, str)]))
    return [[part if isinstance(part, str) else next(images) for part in row] for row in answers]


def _text(parts: Iterable[Any]) -> str:
    return " ".join(part for part in parts if isinstance(part, str))


def _plain(answer: Seen) -> list[str]:
    return [part if isinstance(part, str) else "(picture)" for part in answer]


# ---- which sections of which system, on which splits; the aims

Function = Callable[[Run], Section]
_FIVE = HELD_OUT_SPLITS[:5]
SPLITS_OF: dict[Function, Sequence[str]] = {
    **dict.fromkeys((codes, tokens, reconstruction, ladder, prefix), HELD_OUT_SPLITS), sizes: ("val",),
    examples: ("val",), conversation: ("val", "pairs"), story: ("val", "pairs"),
    wide: ("val", "pairs", "places", "styles")}
"""The splits of a section; of others all but `things`, which are only rebuilt."""
Aims = dict[tuple[str, str], dict[str, float]]


def _val(**aims: float) -> Aims:
    return {(name.partition("__")[0], name.partition("__")[2]): {"val": aim} for name, aim in aims.items()}


def _five(*aims: float) -> dict[str, float]:
    return dict(zip(_FIVE, aims, strict=True))


REPORT: dict[str, tuple[tuple[Function, ...], Aims]] = {
    "seed_llama": ((codes, reconstruction, ladder, prefix, drawing, caption, qa, edit, sizes, conversation, examples,
                    story), {
        ("reconstruction", "r1"): {**_five(0.95, 0.95, 0.95, 0.95, 0.85), "things": 0.80},
        ("caption", "all"): _five(0.90, 0.85, 0.85, 0.80, 0.50), ("qa", "all"): _five(0.95, 0.95, 0.95, 0.90, 0.75),
        ("drawing", "all"): _five(0.90, 0.85, 0.85, 0.75, 0.50), ("edit", "all"): _five(0.80, 0.75, 0.75, 0.65, 0.45),
        ("conversation", "turns"): {"val": 0.85, "pairs": 0.80}, ("examples", "all"): {"val": 0.60},
        ("story", "frames"): {"val": 0.70, "pairs": 0.70}, ("codes", "usage"): {"val": 0.50}}),
    "seed_x": ((reconstruction, conditioned, drawing, caption, qa, edit, detection, sizes, wide), _val(
        caption__all=0.85, detection__f1=0.85, detection__precision=0.85, detection__recall=0.85, drawing__all=0.75,
        edit__all=0.75, edit__unchanged_psnr=25.0)),
    "lavit": ((codes, tokens, reconstruction, drawing, wide_drawing, caption, qa, edit, composed, sizes), _val(
        tokens__cosine=0.2, tokens__empty_share=0.5, caption__all=0.85, drawing__all=0.7, wide_drawing__all=0.7)),
}
AT_MOST = (("tokens", "cosine"), ("tokens", "empty_share"))


def sections_of(kind: str, split: str) -> list[Function]:
    """The sections of a split in the report of a kind of system."""
    return [one for one in REPORT[kind][0] if split in SPLITS_OF.get(one, _FIVE)]
