"""Sections on the packed answers of the shipped systems give the figures of their report.json."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from seed_multimodal.evaluation.metrics import plain
from seed_nano.report.judge import Judge
from seed_nano.report.samples import Sizes, make_samples
from seed_nano.report.sections import Run, sections_of
from seed_nano.report.systems import System

SHIPPED = Path(__file__).resolve().parents[4] / "pretrained"
UNPACKED = {  # figures that need images or answers that are not packed
    "codes": ..., "tokens": ..., "sizes": ..., "reconstruction": {"r1", "psnr", "psnr_things", "ssim"},
    "edit": {"unchanged_psnr"}}


READ: dict[bytes, list[int]] = {}


class PackedJudge(Judge):
    """Of a packed answer, what was read off its image; other images are read, each once."""

    def labels(self, images: Any) -> torch.Tensor:
        if not any("read" in one.info for one in images):
            new = {one.tobytes(): one for one in images if one.tobytes() not in READ}
            READ.update(zip(new, super().labels(list(new.values())).tolist(), strict=True))
            return torch.tensor([READ[one.tobytes()] for one in images])
        rows = self.config.labels.values()
        return torch.tensor([[row.index(word) for row, word in zip(rows, one.info["read"], strict=True)]
                             for one in images])


class Packed(System):
    """A system that repeats its packed answers; an image is (name of the answers, row)."""

    image_size = 64

    def __init__(self, answers: dict[str, Any], size: Any) -> None:
        self.answers, self.size = answers, tuple(size)

    def encode(self, images: Any) -> list[Any]:
        return [("rebuilt", row) for row in range(len(images))]

    def decode(self, encoded: Any, ratio: str = "") -> list[Image.Image]:
        made = []
        for name, row in encoded:
            made.append(Image.new("RGB", self.size if ratio else (64, 64)))
            if name in self.answers:
                made[-1].info["read"] = self.answers["wide_drawn" if ratio else name][row]["read"]
        return made

    def draw(self, texts: Any, name: str = "drawn") -> list[Any]:
        return [(name, row) if one["read"][0] else None for row, one in enumerate(self.answers[name])]

    def edit(self, encoded: Any, instructions: Any) -> list[Any]:
        return self.draw(instructions, "edits")

    def describe(self, encoded: Any) -> list[str]:
        return [one["text"] for one in self.answers["captions"]]

    def ask(self, encoded: Any, questions: Any) -> list[str]:
        assert [one["question"] for one in self.answers["questions"]] == questions
        return [one["answer"] for one in self.answers["questions"]]

    def detect(self, images: Any, phrases: Any) -> list[Any]:
        assert [one["phrase"] for one in self.answers["detection"]] == phrases
        return [one["found"] for one in self.answers["detection"]]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nano", "nano-x", "nano-lavit"])
def test_figures_of_packed_answers(name: str, split: str = "val") -> None:
    shipped = json.loads((SHIPPED / name / "report" / "report.json").read_text())
    answers = json.loads(gzip.decompress((SHIPPED / name / "report" / "answers.json.gz").read_bytes()))[split]
    wanted, sizes = shipped["splits"][split], Sizes(**{key: shipped["settings"][key] for key in vars(Sizes())})
    system = Packed(answers, wanted.get("wide_drawing", {}).get("size", (64, 64)))
    run = Run(system, PackedJudge.from_pretrained(SHIPPED / "nano" / "judge"), make_samples(split, sizes))
    kind = {"nano": "seed_llama", "nano-x": "seed_x", "nano-lavit": "lavit"}[name]
    compared = 0
    for section in sections_of(kind, split):
        left_out: Any = UNPACKED.get(section.__name__, set())
        if left_out is ...:
            continue
        found = json.loads(json.dumps(plain(section(run))))
        for key in found.keys() - left_out:
            assert found[key] == wanted[section.__name__][key], (section.__name__, key)
            compared += 1
    assert compared >= 40
    for packed in {"rebuilt", "drawn", "captions", "questions", "edits"} & set(answers):
        assert json.loads(json.dumps(run.answers[packed])) == answers[packed]
