"""One run of a program that ends in a contact sheet: its steps timed and told, its pictures saved."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from seed_multimodal.commands.common import save_picture
from seed_multimodal.errors import GenerationError
from seed_multimodal.images.sheet import Row
from seed_nano.world.scene import Scene, render


@dataclass
class Run:
    """One run: the system, the output folder, the results, the rows of the sheet; `steps` are planned."""

    system: Any
    out: Path
    seed: int
    result: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    failures: int = 0
    done: int = 0
    steps: int = 0

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
        print(f"[{self.done:2d}/{self.steps}] {self.seconds[name]:6.2f} s  {name}: {'; '.join(said)}", flush=True)

    def picture(self, scene: Scene) -> Image.Image:
        """A scene as large as the system sees it."""
        return Image.fromarray(render(scene, self.system.spec.image_size))

    def save(self, image: Image.Image, name: str) -> str:
        """Save one picture in the folder; returns its file name."""
        return save_picture(image, self.out / name).name
