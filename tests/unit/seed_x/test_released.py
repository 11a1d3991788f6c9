"""Facts about the original SEED-X, from the images that its authors committed with their scripts.

`vis/car.png` shows one box on `demo_images/car.jpg` (1200 x 1200). Its corners (302, 782) and (918, 1082) have one
preimage on the grid of 224 places, so the answer's words are known. The check itself needs the weights, that image and
a GPU; it skips with what is missing.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from seed_multimodal.errors import CheckpointError
from seed_multimodal.language.vocabulary import SeedXVocabulary
from seed_multimodal.seed_x.pipeline import SeedX
from seed_multimodal.seed_x.processing import Box
from seed_multimodal.system.config import SystemConfig

CAR = Path(__file__).resolve().parents[3] / "demo_images" / "car.jpg"
PHRASE = "In ths background with a blue sky on the road, there is a car"  # as in the original script
BOX, CORNERS, WORDS = Box(114, 174, 115, 56), (302, 782, 918, 1082), [32218, 32278, 32219, 32160]


def test_the_cars_box() -> None:
    try:
        SystemConfig.find("seed-x").require("llm", "agent", "tokenizer", "vision")
    except CheckpointError as error:
        pytest.skip(str(error))
    if not CAR.is_file() or not torch.cuda.is_available():
        pytest.skip(f"needs {CAR} of SEED-X's repository and a GPU: the published answer is that of float16")
    found = SeedX.from_pretrained("seed-x", load_decoder=False, log=None).detect(CAR, PHRASE)
    assert found.grid == [BOX] and found.boxes == [CORNERS] and not found.problems


def test_corners_and_words_belong_together() -> None:
    assert BOX.corners((1200, 1200)) == CORNERS == BOX.corners((1200, 1200), clip=False)
    assert list(BOX.ids(SeedXVocabulary()))[1:-1] == WORDS
    near = [(x, width) for x in range(224) for width in range(224)
            if Box(x, 174, width, 56).corners((1200, 1200), clip=False) == CORNERS]
    assert near == [(114, 115)]
