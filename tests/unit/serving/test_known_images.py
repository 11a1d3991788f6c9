"""Images of kinds that nano's systems never learned are noted, at each door; images of their world
are not."""

import random
from io import BytesIO

import pytest
import torch
from PIL import Image
from repository import FOX, ROOT
from served import chat, user
from systems import load

from seed_multimodal import MultimodalSystem
from seed_multimodal.images.io import image_to_base64, image_to_bytes
from seed_multimodal.language.messages import Message, user_message
from seed_multimodal.pipelines.config import KnownImages
from seed_multimodal.pipelines.known_images import PREFACE, ImageFamiliarity
from seed_nano.known import UNKNOWN, known_images, unknown_images

SAID = "unlike those that this system learned"
# Of eight; some charts look like large drawings.
LEAST = {"text": 7, "chart": 6, "noise": 8, "blank": 8, "screen": 8}


@pytest.fixture(scope="module", params=["nano", "nano-x", "nano-lavit"])
def shipped(request):
    lines = []
    system = MultimodalSystem.from_pretrained(
        ROOT / "pretrained" / request.param, device="cpu", log=lines.append
    )
    system.lines = lines
    return system


def noted(system, images) -> int:
    threshold = system.config.known_images.threshold
    return sum(image.distance > threshold for image in system.images.read(images))


@pytest.mark.parametrize("kind", UNKNOWN)
def test_unknown_kinds_are_noted(shipped, kind):
    assert noted(shipped, unknown_images(kind, 8)) >= LEAST[kind]


def test_known_images_are_not_noted(shipped):
    files = [Image.open(path) for path in sorted((ROOT / "images").glob("*.*g"))]
    assert noted(shipped, files) == 0
    assert noted(shipped, random.Random(0).sample(known_images(3), 100)) <= 3


def test_unusual_colours_of_corners_are_farther():
    class Blind:
        """Expects an empty image, with which nothing is correlated."""

        def expected_latents(self, embeds):
            return torch.zeros(len(embeds), 1, 8, 8)

    pixels = torch.zeros(2, 3, 32, 32)
    pixels[1, 0, 0, -1] = 8.0  # one of four corners, in red
    plain, coloured = (
        ImageFamiliarity(KnownImages(1, ((0.0, 0.0),) * 3, corners), Blind())
        for corners in ((), ((0.0, 0.0, 0.0), (6.0, 0.0, 0.0)))
    )
    before = plain.distances(pixels, pixels)
    assert before[0] == 1
    assert coloured.distances(pixels, pixels) == pytest.approx([1, before[1] + 0.5])


def test_notes_at_each_door(shipped, client_of):
    (screen,) = unknown_images("screen", 1)
    lines = shipped.lines
    lines.clear()
    # Python: `Answer.note`, and the log where a method returns texts or images.
    shipped.describe([Image.open(FOX), screen])
    assert [SAID in line for line in lines] == [True] and lines[0].startswith("Request 1: ")
    answers = [shipped.chat([{"role": "user", "content": [image]}]) for image in (screen, FOX)]
    assert [SAID in answer.note for answer in answers] == [True, False]
    assert [answer.text.startswith(PREFACE) for answer in answers] == [True, False]
    lines.clear()
    shipped.edit(screen, "Add a star.", num_inference_steps=1)
    assert SAID in lines[0]

    # The server: messages, and edits.
    client = client_of(shipped)
    notes = [chat(client, [user(image)])["notes"] for image in (screen, Image.open(FOX))]
    assert [SAID in " ".join(of_image) for of_image in notes] == [True, False]
    if shipped.family.prompts_are_ids:  # codes of an earlier request, as the page sends them
        images = {"images": [f"data:;base64,{image_to_base64(screen)}"]}
        (row,) = client.post("/v1/images/tokens", json=images).json["data"]
        part = {"type": "image_url", "codes": row["codes"]}
        assert SAID in " ".join(chat(client, [{"role": "user", "content": [part]}])["notes"])
    form = {"prompt": "Add a star.", "image": (BytesIO(image_to_bytes(screen)), "screen.png")}
    body = client.post("/v1/images/edits", data=form).json
    assert sum(SAID in note for note in body["notes"]) == 1
    form = {"prompt": "Remove the banana.", "image": (FOX.open("rb"), "fox.png")}
    body = client.post("/v1/images/edits", data=form).json
    assert "no banana" in body["notes"][-1]


def test_preface_of_a_guess(shipped):
    (screen,) = unknown_images("screen", 1)
    question = [{"role": "user", "content": [screen, "Is there a dog in the picture?"]}]
    answer = shipped.chat(question)
    texts = [event["text"] for event in shipped.chat(question, stream=True) if "text" in event]
    assert shipped.chat(question, constrain=False).text.startswith(PREFACE)
    assert "".join(texts).count(PREFACE) == answer.text.count(PREFACE) == 1
    assert PREFACE not in answer.reasoning and answer.text.startswith(PREFACE)
    if shipped.family.answers_only_about_images:  # single messages
        return
    # A model reads its own words only.
    said, told = (
        shipped.family.prompts([[*user_message(["a dog"]), Message("assistant", (text,))]], "chat")
        for text in ("A dog.", PREFACE + "A dog.")
    )
    assert said[0].ids == told[0].ids


def test_command_notes_unknown_images(run_seed, tmp_path):
    (screen,) = unknown_images("screen", 1)
    screen.save(tmp_path / "screen.png")
    code, _, errors = run_seed("nano", "describe", FOX, tmp_path / "screen.png")
    assert code == 0 and errors.count(SAID) == 1


def test_system_without_the_key_has_no_notes(shipped):
    (screen,) = unknown_images("screen", 1)
    config = shipped.config
    plain = load(config.name)
    plain.config.known_images = plain.images.familiarity = None
    assert plain.chat([{"role": "user", "content": [screen]}]).note == ""
    assert shipped.describe(screen) == PREFACE + plain.describe(screen)
