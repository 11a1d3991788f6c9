"""Facts about the released SEED-X, from the pictures that its authors committed with their scripts.

`vis/car.png` shows one box on `demo_images/car.jpg` (1200 x 1200). Its corners (302, 782) and (918, 1082) have one
preimage on the grid of 224 places, so the answer's words are known. The check itself needs the weights, that picture
and a GPU; it skips with what is missing.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from seed_multimodal.errors import CheckpointError
from seed_multimodal.language.messages import user_message
from seed_multimodal.language.vocabulary import SeedXVocabulary
from seed_multimodal.seed_x.pipeline import Detection, SeedX
from seed_multimodal.seed_x.processing import Box
from seed_multimodal.system.config import SystemConfig

ROOT = Path(__file__).resolve().parents[3]
CAR = ROOT / "demo_images" / "car.jpg"
PHRASE = "In ths background with a blue sky on the road, there is a car"  # as in the released script
BOX, CORNERS, WORDS = Box(114, 174, 115, 56), (302, 782, 918, 1082), [32218, 32278, 32219, 32160]


def missing() -> str:
    """What the check lacks on this machine, "" for nothing."""
    try:
        SystemConfig.find("seed-x").require("llm", "agent", "tokenizer", "vision")
    except CheckpointError as error:
        return str(error)
    if not CAR.is_file():
        return f"{CAR}: put the picture of SEED-X's repository (demo_images/car.jpg) there."
    return "" if torch.cuda.is_available() else "The released answer is that of float16 on a GPU; there is none here."


def find_the_car(system: SeedX, picture: Path | Image.Image) -> Detection:
    found: Detection = system.detect(picture, PHRASE)
    return found


def test_the_car_s_box() -> None:
    reason = missing()
    if reason:
        pytest.skip(reason)
    found = find_the_car(SeedX.from_pretrained("seed-x", load_decoder=False, log=None), CAR)
    assert found.image.size == (1200, 1200)
    assert found.grid == [BOX] and found.boxes == [CORNERS] and not found.problems


def test_what_it_expects() -> None:
    """The corners and the words belong together, and no other box of the grid draws these corners."""
    assert BOX.corners((1200, 1200)) == CORNERS and list(BOX.ids(SeedXVocabulary()))[1:-1] == WORDS
    for size, middle in (("width", "x"), ("height", "y")):
        near = [(centre, extent) for centre in range(224) for extent in range(224)
                if Box(**{"x": 114, "y": 174, "width": 115, "height": 56, middle: centre, size: extent}).corners(
                    (1200, 1200), clip=False) == CORNERS]
        assert near == [(getattr(BOX, middle), getattr(BOX, size))]


def test_the_check_runs_on_another_model(tiny_x_folder: Path) -> None:
    """With random weights: the same prompt, the picture in five views; what is found is another matter."""
    system = SeedX.from_pretrained(tiny_x_folder, tuned=False, device="cpu", log=None, load_decoder=False)
    words = system.tokenizer.vocabulary
    picture = Image.new("RGB", (1200, 1200), (90, 120, 200))
    assert find_the_car(system, picture).image.size == (1200, 1200)
    ids = list(system.requests([user_message([picture, PHRASE])], "detect")[0].ids)
    assert ids.count(words.patches) == 4 and ids.count(words.boi_id) == 1 and ids[-1] == words.boxes
    assert ids[:2] == [1, words.patches]
