"""Measure a system's answers to requests as people type them.

    python -m seed_nano.report.requests --model pretrained/nano --wrong

The requests of `requests.yaml` (`--everyday`: of `everyday.yaml`) are sent one by one to `chat`,
with their picture or earlier turns. *kind*: an image, a text or a refusal, as expected. *right*:
the kind, and the judge sees in the image what the request names (things, numbers, and relation,
place, style and background where it says them) and nothing that it excludes, or the text holds the
expected words. *silent*: neither right nor a refusal, and no note says that it may be wrong.

LaVIT answers single messages, and draws when it is forced to: it gets the requests without earlier
turns, those for an image with `images="forced"`, and no refusals, stories or small talk.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from PIL import Image

from seed_multimodal.cli.common import add_flags, load_system, program_parser
from seed_multimodal.disk import JsonObject
from seed_multimodal.entry import DONE, add_device, run_program
from seed_multimodal.language.answer import Answer, ImagePart
from seed_multimodal.pipelines.base import MultimodalSystem
from seed_nano.report.chat import CONCURRENT, SIDE
from seed_nano.report.judge import Judge, find_judge
from seed_nano.report.scoring import LabelNames, image_labels
from seed_nano.report.write import table
from seed_nano.world.scene import scene_image
from seed_nano.world.targets import ARRANGEMENTS, NOTHING, label_names
from seed_nano.world.typed import EVERYDAY, REQUESTS
from seed_nano.world.words import Labels, parse_caption, scene_of

REFUSAL = re.compile(r"\b(?:cannot|can't|no picture|do not know|there (?:is|are) no)\b", re.I)


@dataclass(frozen=True)
class Request:
    """A request with what is expected; see the head of `requests.yaml`."""

    category: str
    asked: str
    picture: str = ""
    before: Sequence[str | Sequence[str]] = ()
    image: str = ""
    without: Sequence[str] = ()
    text: Sequence[str] | None = None
    refusal: bool = False
    images: int = 1

    @property
    def kind(self) -> str:
        """The kind of answer expected."""
        if self.refusal:
            return "refusal"
        return "image" if self.image else "text"

    def messages(self, side: int) -> list[JsonObject]:
        """The conversation; `side`: of its images in pixels."""

        def part(text: str) -> str | Image.Image:
            if text.startswith("<"):
                return scene_image(scene_of(text[1:-1]), side)
            return text

        messages: list[JsonObject] = []
        for index, turn in enumerate(self.before):
            content = [turn] if isinstance(turn, str) else turn
            role = ("user", "assistant")[index % 2]
            messages.append({"role": role, "content": [part(text) for text in content]})
        shown = [part(f"<{self.picture}>")] if self.picture else []
        return [*messages, {"role": "user", "content": [*shown, self.asked]}]


@dataclass(frozen=True)
class Score:
    """An answer with its scores."""

    request: Request
    answer: str
    kind: bool
    right: bool
    silent: bool


def read_requests(file: Path = REQUESTS) -> list[Request]:
    """All requests, by category."""
    rows = []
    for category, entries in yaml.safe_load(file.read_text(encoding="utf-8")).items():
        rows += [Request(category, **entry) for entry in entries]
    return rows


def is_for(request: Request, system: MultimodalSystem) -> bool:
    """Whether a system can be sent a request."""
    if system.abilities.converses:
        return True
    if request.before or request.images > 1 or request.refusal:
        return False
    return bool(request.image or request.picture)


def measure(
    system: MultimodalSystem, judge: Judge, requests: Sequence[Request] | None = None
) -> list[Score]:
    """The scores of all requests (None: of the list) that are for the system."""
    side = system.config.image_size or SIDE
    chosen = [request for request in requests or read_requests() if is_for(request, system)]
    only_forced = not system.abilities.converses

    def answer(request: Request) -> Answer:
        images = "forced" if only_forced and request.image else "auto"
        reply: Answer = system.chat(request.messages(side), images=images)
        return reply

    # The engine batches the requests of several threads.
    with ThreadPoolExecutor(CONCURRENT) as pool:
        answers = list(pool.map(answer, chosen))
    return [score(request, reply, judge) for request, reply in zip(chosen, answers, strict=True)]


def score(request: Request, answer: Answer, judge: Judge) -> Score:
    """Kind and content of an answer."""
    images = [part.image for part in answer.parts if isinstance(part, ImagePart)]
    text = answer.text
    # 1. The kind: a text that says why not is a refusal.
    if images:
        kind = "image"
    else:
        kind = "refusal" if REFUSAL.search(text) else "text"
    is_kind = kind == request.kind
    # 2. What the image shows, or the text says.
    shown = image_labels(judge, images)
    right = is_kind
    if is_kind and kind == "image":
        right = _shows(request, shown)
    elif is_kind and kind == "text":
        right = all(re.search(word, text.lower()) for word in request.text or ())
    listed = " ".join(f"<{' '.join(str(name) for name in labels)}>" for labels in shown)
    # 3. What the user is told; how his words were read does not tell that the answer is wrong.
    notes = [note for note in answer.notes if not re.fullmatch(r"Read [^.]*\.", note)]
    is_silent = not right and kind != "refusal" and not notes
    return Score(request, f"{text} {listed}".strip(), is_kind, right, is_silent)


def _shows(request: Request, shown: Sequence[LabelNames]) -> bool:
    """Whether the images of an answer show what a request names."""
    wanted = parse_caption(request.image)
    assert wanted is not None, request.image
    if not set(request.without).isdisjoint(chain.from_iterable(shown)):
        return False
    if request.images == 1:
        return len(shown) == 1 and is_shown(wanted, shown[0])
    # A story: all its things, and nothing else.
    named = {name for labels in shown for name in labels[:2]} - {NOTHING}
    return len(shown) >= request.images and named == set(wanted.things)


def is_shown(wanted: Labels, shown: LabelNames) -> bool:
    """Whether the labels of an image have everything that a caption says."""
    first, second, style, background, arrangement = shown
    layout, counts = ARRANGEMENTS[arrangement or ""]
    things = [name for name in (first, second) if name != NOTHING]
    n_each = dict(zip(things, counts or (1,) * len(things), strict=True))
    if n_each != dict(zip(wanted.things, wanted.counts, strict=True)):
        return False
    if wanted.style and wanted.style != style:
        return False
    if wanted.background and wanted.background != background:
        return False
    if wanted.layout in (None, "many", "two kinds"):  # the numbers are compared above
        return True
    return layout == wanted.layout and label_names(wanted)["first"] == first


def rows_of(scores: Sequence[Score]) -> list[tuple[str, ...]]:
    """The table's rows: each category, then all."""
    categories = dict.fromkeys(score.request.category for score in scores)
    rows: list[tuple[str, ...]] = []
    for category in (*categories, "all requests"):
        chosen = [row for row in scores if category in (row.request.category, "all requests")]
        kind = fmean(row.kind for row in chosen)
        right = fmean(row.right for row in chosen)
        silent = fmean(row.silent for row in chosen)
        rows.append((category, f"{kind:.3f}", f"{right:.3f}", f"{silent:.3f}", str(len(chosen))))
    return rows


def run(options: argparse.Namespace) -> int:
    """The command."""
    judge = Judge.from_pretrained(find_judge(options.model, options.judge))
    system: Any = load_system(options)
    requests = read_requests(EVERYDAY if options.everyday else REQUESTS)
    scores = measure(system, judge.to(system.images.device), requests)
    head = (f"{system.config.name}, as typed", "kind", "right", "silent", "n")
    print(table(head, rows_of(scores)))
    if options.wrong:
        for row in scores:
            if not row.right:
                expected = row.request.image or row.request.text or row.request.kind
                print(
                    f"{row.request.category}: {row.request.asked!r} -> {row.answer!r}; {expected}"
                    + "; silent" * row.silent
                )
    return DONE


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = program_parser("python -m seed_nano.report.requests", __doc__ or "")
    parser.add_argument("--model", default="pretrained/nano", help="folder of the system")
    parser.add_argument("--judge", help="folder of the judge (default: see the report)")
    parser.add_argument("--everyday", action="store_true", help="the list everyday.yaml")
    parser.add_argument("--wrong", action="store_true", help="also list the wrong answers")
    add_device(parser)
    add_flags(parser, "language model")
    return run_program(parser, run, arguments, "requests report")


if __name__ == "__main__":
    raise SystemExit(main())
