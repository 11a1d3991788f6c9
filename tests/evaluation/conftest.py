"""A tiny data set with the attributes of a NanoSet: coloured shapes, filled or outlined, some held out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from seed_multimodal.evaluation import train_judge
from seed_multimodal.evaluation.judge import Judge
from seed_multimodal.training.loop import train

COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 220), "orange": (240, 150, 20)}
SHAPES = ("disc", "square", "bar")
STYLES = ("flat", "line")


@dataclass
class Toy:
    """The part of NanoSet that evaluation reads."""

    records: list[SimpleNamespace]
    pixels: np.ndarray
    edits: list[SimpleNamespace] = field(default_factory=list)

    def images(self) -> np.ndarray:
        return self.pixels

    def split(self, name: str) -> list[int]:
        return [i for i, r in enumerate(self.records) if r.split == name]

    @property
    def index(self) -> dict[str, int]:
        return {r.key: i for i, r in enumerate(self.records)}


def picture(shape: str, colour: str, style: str) -> np.ndarray:
    canvas = Image.new("RGB", (64, 64), "white")
    draw = ImageDraw.Draw(canvas)
    paint = {"fill": COLOURS[colour]} if style == "flat" else {"outline": COLOURS[colour], "width": 5}
    box = {"disc": (8, 8, 56, 56), "square": (12, 12, 52, 52), "bar": (4, 26, 60, 38)}[shape]
    (draw.ellipse if shape == "disc" else draw.rectangle)(box, **paint)
    return np.asarray(canvas)


@pytest.fixture(scope="session")
def toy() -> Toy:
    records, pixels = [], []
    for shape in SHAPES:
        for colour in COLOURS:
            for style in STYLES:
                split = {("disc", "red"): "val", ("bar", "blue"): "val", ("square", "green"): "test_concept"}.get(
                    (shape, colour), "train")
                if colour == "orange" and style == "line":
                    split = "test_combo"
                label = f"{colour} {shape}"
                records.append(SimpleNamespace(
                    key=f"{style}_{colour}_{shape}", style=style, family=label, label=label, split=split,
                    captions=[f"a {style} drawing of {label}", label, f"{label}, a {shape}"], group="shapes",
                    subgroup=shape,
                    qa=[SimpleNamespace(question="What colour is it?", answer=colour, kind="colour"),
                        SimpleNamespace(question="Which shape is it?", answer=shape, kind="thing")]))
                pixels.append(picture(shape, colour, style))
    edits = [SimpleNamespace(source=f"flat_{c}_{s}", target=f"line_{c}_{s}", instruction="Redraw it in line style.",
                             response="Here it is.", kind="style",
                             split=next(r.split for r in records if r.key == f"line_{c}_{s}"))
             for c in COLOURS for s in SHAPES]
    return Toy(records, np.stack(pixels), edits)


@pytest.fixture(scope="session")
def run_judge(toy: Toy) -> Callable[..., Judge]:
    """Train a judge on the toy pictures: (folder of the checkpoint, steps, stop_after=None)."""
    corpus = train_judge.build_corpus(toy)

    def run(folder: Path, steps: int, stop_after: int | None = None) -> Judge:
        plan = train_judge.Plan(steps=steps, batch=24, seed=5)
        task = train_judge.JudgeTask(corpus, plan, torch.device("cpu"))
        if stop_after is not None:  # as data that ends: the checkpoint of that step is what is left
            task.begin_step = lambda step: step < stop_after
        train(task, task.settings, folder)
        return task.judge.eval()

    return run


@pytest.fixture(scope="session")
def trained(run_judge, tmp_path_factory) -> Judge:
    """A judge that really learned the toy pictures."""
    return run_judge(tmp_path_factory.mktemp("judge"), 60)
