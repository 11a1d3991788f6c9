"""Images of kinds that nano's systems never learned are noted, at each door; images of their world
are not."""

from io import BytesIO

import pytest
from PIL import Image
from repository import FOX, ROOT
from served import chat, user
from systems import load

from seed_multimodal import MultimodalSystem
from seed_multimodal.images.io import image_to_base64, image_to_bytes
from seed_multimodal.language.messages import Message, user_message
from seed_multimodal.pipelines.world import PREFACE, Familiarity, unknown_images_note
from seed_nano.known import OTHERS, images_of, known, measure, screen

SAID = "unlike those that this system learned"
# Of 20; turned things may look as they did, and halves of two things as one of them.
LEAST = {"turned": 11, "recoloured": 15, "hybrid": 9}


@pytest.fixture(scope="module", params=["nano", "nano-x", "nano-lavit"])
def shipped(request):
    lines = []
    system = MultimodalSystem.from_pretrained(
        ROOT / "pretrained" / request.param, device="cpu", log=lines.append
    )
    system.lines = lines
    return system


@pytest.fixture
def a_screen():
    return images_of(screen, 1)[0]


def noted(system, images) -> int:
    return sum(distance > 0 for distance in measure(system.images, images))


@pytest.mark.parametrize("kind", OTHERS)
def test_unknown_kinds_are_noted(shipped, kind):
    assert noted(shipped, images_of(OTHERS[kind], 20)) >= LEAST.get(kind, 17)


def test_known_images_are_not_noted(shipped):
    files = [Image.open(path) for path in sorted((ROOT / "images").glob("*.*g"))]
    assert noted(shipped, files) == 0
    assert noted(shipped, images_of(known, 100)) <= 4


def test_own_drawings_are_not_noted(shipped):
    drawings = shipped.draw(["a noto tiger left of a penguin in a meadow", "a red car"], seed=0)
    assert noted(shipped, drawings) == 0


def test_notes_name_the_images_above_zero():
    assert unknown_images_note([None, 0.0, -3.0], "Own notice.") == ""
    for distances, which in (
        ([0.1], "The image is"),
        ([0.1, -1, None], "Image 0 is"),
        ([-1, 2, 3], "Images 1, 2 are"),
    ):
        note = unknown_images_note(distances, "Own notice.")
        assert note.startswith(which) and note.endswith("Own notice.")


def test_notes_at_each_door(shipped, client_of, a_screen):
    lines = shipped.lines
    lines.clear()
    # Python: `Answer.note`, and the log where a method returns texts or images.
    shipped.describe([Image.open(FOX), a_screen])
    assert [SAID in line for line in lines] == [True] and lines[0].startswith("Request 1: ")
    answers = [shipped.chat([{"role": "user", "content": [image]}]) for image in (a_screen, FOX)]
    assert [SAID in answer.note for answer in answers] == [True, False]
    assert [answer.text.startswith(PREFACE) for answer in answers] == [True, False]
    lines.clear()
    shipped.edit(a_screen, "Add a star.", num_inference_steps=1)
    assert SAID in lines[0]

    # The server: messages, and edits.
    client = client_of(shipped)
    notes = [chat(client, [user(image)])["notes"] for image in (a_screen, Image.open(FOX))]
    assert [SAID in " ".join(of_image) for of_image in notes] == [True, False]
    if shipped.abilities.reads_codes:  # a new image beside its codes, as the page sends it
        images = {"images": [f"data:;base64,{image_to_base64(a_screen)}"]}
        (row,) = client.post("/v1/images/tokens", json=images).json["data"]
        part = {"type": "image_url", "codes": row["codes"], "image_url": images["images"][0]}
        assert SAID in " ".join(chat(client, [{"role": "user", "content": [part]}])["notes"])
    form = {"prompt": "Add a star.", "image": (BytesIO(image_to_bytes(a_screen)), "screen.png")}
    body = client.post("/v1/images/edits", data=form).json
    assert sum(SAID in note for note in body["notes"]) == 1
    form = {"prompt": "Remove the banana.", "image": (FOX.open("rb"), "fox.png")}
    body = client.post("/v1/images/edits", data=form).json
    assert "no banana" in body["notes"][-1]


def test_preface_of_a_guess(shipped, a_screen):
    question = [{"role": "user", "content": [a_screen, "Is there a dog in the picture?"]}]
    answer = shipped.chat(question)
    texts = [event["text"] for event in shipped.chat(question, stream=True) if "text" in event]
    assert shipped.chat(question, constrain=False).text.startswith(PREFACE)
    assert "".join(texts).count(PREFACE) == answer.text.count(PREFACE) == 1
    assert PREFACE not in answer.reasoning and answer.text.startswith(PREFACE)
    if not shipped.abilities.converses:  # single messages
        return
    # A model reads its own words only.
    said, told = (
        shipped.family.prompts([[*user_message(["a dog"]), Message("assistant", (text,))]], "chat")
        for text in ("A dog.", PREFACE + "A dog.")
    )
    assert said[0].ids == told[0].ids


def test_command_notes_unknown_images(run_seed, tmp_path, a_screen):
    a_screen.save(tmp_path / "screen.png")
    code, _, errors = run_seed("nano", "describe", FOX, tmp_path / "screen.png")
    assert code == 0 and errors.count(SAID) == 1


def test_system_without_the_key_has_no_notes(shipped, a_screen):
    config = shipped.config
    plain = load(config.name)
    plain.config.known_images = None
    plain.images.familiarity = Familiarity()
    assert plain.chat([{"role": "user", "content": [a_screen]}]).note == ""
    assert shipped.describe(a_screen) == PREFACE + plain.describe(a_screen)
