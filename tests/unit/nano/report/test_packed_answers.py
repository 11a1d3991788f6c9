"""Report sections computed from the packed answers of the shipped systems equal their
report.json."""

from __future__ import annotations

import functools
import gzip
import json
from typing import Any

import pytest
import torch
from PIL import Image
from repository import ROOT

from seed_multimodal.evaluation.metrics import plain
from seed_nano.report.judge import Judge
from seed_nano.report.samples import Sizes, make_samples
from seed_nano.report.sections import Run, reconstruction, sections_of
from seed_nano.report.systems import System

SHIPPED = ROOT / "pretrained"
UNPACKED = {  # figures of images or answers that are not packed
    "codes": ...,
    "tokens": ...,
    "sizes": ...,
    "edit": {"unchanged_psnr"},
}


READ: dict[bytes, list[int]] = {}  # labels of images by their pixels


class PackedJudge(Judge):
    """Packed labels of packed images; other images are judged, each once."""

    def labels(self, images: Any) -> torch.Tensor:
        if not any("read" in image.info for image in images):
            new = {image.tobytes(): image for image in images if image.tobytes() not in READ}
            READ.update(zip(new, super().labels(list(new.values())).tolist(), strict=True))
            return torch.tensor([READ[image.tobytes()] for image in images])
        rows = self.config.labels.values()
        return torch.tensor(
            [
                [row.index(word) for row, word in zip(rows, image.info["read"], strict=True)]
                for image in images
            ]
        )


samples_of = functools.cache(make_samples)


class Packed(System):
    """A system that returns its packed answers; an image is (name of the answers, row)."""

    image_size = 64

    def __init__(self, answers: dict[str, Any], size: Any) -> None:
        self.answers = answers
        self.size = tuple(size)

    def encode(self, images: Any) -> list[Any]:
        return [("rebuilt", row) for row in range(len(images))]

    def decode(self, encoded: Any, ratio: str = "") -> list[Image.Image]:
        images = []
        for name, row in encoded:
            images.append(Image.new("RGB", self.size if ratio else (64, 64)))
            if name in self.answers:
                images[-1].info["read"] = self.answers["wide_drawn" if ratio else name][row]["read"]
        return images

    def draw(self, texts: Any, name: str = "drawn") -> list[Any]:
        return [
            (name, row) if answer["read"][0] else None
            for row, answer in enumerate(self.answers[name])
        ]

    def edit(self, encoded: Any, instructions: Any) -> list[Any]:
        return self.draw(instructions, "edits")

    def describe(self, encoded: Any) -> list[str]:
        return [answer["text"] for answer in self.answers["captions"]]

    def ask(self, encoded: Any, questions: Any) -> list[str]:
        assert [answer["question"] for answer in self.answers["questions"]] == questions
        return [answer["answer"] for answer in self.answers["questions"]]

    def detect(self, images: Any, phrases: Any) -> list[Any]:
        assert [answer["phrase"] for answer in self.answers["detection"]] == phrases
        return [answer["found"] for answer in self.answers["detection"]]


def rebuilt_labels(run: Run) -> dict[str, Any]:
    """The section `reconstruction` without figures of pixels and features."""
    scenes = run.samples.scenes[: run.sizes.gallery]
    return run.judge_images(run.system.decode(run.encoded[: len(scenes)]), scenes, "rebuilt")[1]


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("name", ["nano", "nano-x", "nano-lavit"])
def test_sections_of_packed_answers(name, split: str = "val"):
    # The published figures follow from the published answers.
    shipped = json.loads((SHIPPED / name / "report" / "report.json").read_text())
    answers = json.loads(
        gzip.decompress((SHIPPED / name / "report" / "answers.json.gz").read_bytes())
    )[split]
    expected = shipped["splits"][split]
    sizes = Sizes(**{key: shipped["settings"][key] for key in vars(Sizes())})
    system = Packed(answers, expected.get("wide_drawing", {}).get("size", (64, 64)))
    run = Run(
        system, PackedJudge.from_pretrained(SHIPPED / "nano" / "judge"), samples_of(split, sizes)
    )
    kind = {"nano": "seed_llama", "nano-x": "seed_x", "nano-lavit": "lavit"}[name]
    compared = 0
    for section in sections_of(kind, split):
        unpacked: Any = UNPACKED.get(section.__name__, set())
        if unpacked is ...:
            continue
        figures = json.loads(
            json.dumps(plain((rebuilt_labels if section is reconstruction else section)(run)))
        )
        for key in figures.keys() - unpacked:
            assert figures[key] == expected[section.__name__][key], (section.__name__, key)
            compared += 1
    assert compared >= 40
    for packed in {"rebuilt", "drawn", "captions", "questions", "edits"} & set(answers):
        assert json.loads(json.dumps(run.answers[packed])) == answers[packed]
