"""The three families behind the server: routes answer as the library does, in both directions."""

import shutil

import numpy as np
import pytest
from PIL import Image
from random_images import noise
from recorded_engine import RecordedEngine
from repository import FOX
from served import CHAT, PROMPTS, chat, generate, read, user
from systems import load
from yaml_tables import read_tables

TABLES = read_tables(__file__)
DRAW = "/v1/images/generations"
RESPONSES = "/v1/responses"
SETTINGS = {"max_new_tokens": 12, "temperature": 0.0, "seed": 1, "num_beams": 2}
FIELDS = {"max_tokens": 12, "seed": 1, "num_beams": 2}
pytestmark = pytest.mark.filterwarnings("ignore:Answers are not lemmatised")


# ---- every family


def test_generate_answers_as_the_library(system, family_client, prompt):
    text = prompt.format("<image>What is it?")
    answer = generate(family_client, text, noise(0), **SETTINGS)
    expected = system.chat([user_message(noise(0), "What is it?")], **SETTINGS)
    assert (answer["text"], answer["images"]) == (str(expected), [])
    # Codes of an image save encoding it again, where the family reads codes.
    codes = system.tokenize(noise(0)).tolist() if system.abilities.reads_codes else [None]
    assert answer["images_ids"] == codes
    if system.abilities.reads_codes:
        assert generate(family_client, text, *codes, **SETTINGS)["text"] == answer["text"]
    # An image has as many tokens as it needs, whatever the client asked for.
    drawing = generate(family_client, prompt.format("a fish"), force_boi=True, max_new_tokens=4)
    assert drawing["images"]


def test_descriptions_of_drawings_are_revised_prompts(family_client):
    # Systems that do not describe their drawings by themselves do so on request.
    post = family_client.post
    body = {"prompt": "a fish", "seed": 1}
    (plain,) = post(DRAW, json=body).json["data"]
    (described,) = post(DRAW, json={**body, "read_back": True}).json["data"]
    assert described.pop("revised_prompt") and described == plain
    message = {"messages": [user("a fish")], "force_image": True, "read_back": True}
    (part,) = post(CHAT, json=message).json["choices"][0]["message"]["images"]
    fields = {"input": "a fish", "tool_choice": "required", "read_back": True}
    output = post(RESPONSES, json=fields).json["output"]
    (call,) = (item for item in output if item["type"] == "image_generation_call")
    assert part["revised_prompt"] and call["revised_prompt"]


@pytest.mark.parametrize("text", ["", "\u0000", "\U0001f600", "</s><img>", "USER: \nASSISTANT:"])
def test_generate_answers_or_refuses_any_text(family_client, text):
    for force in (False, True):
        body = {"text": text, "images": [], "max_new_tokens": 2, "force_boi": force}
        assert family_client.post("/generate", json=body).status_code in (200, 400)


# ---- families that hold conversations


@pytest.mark.slow
@pytest.mark.parametrize("name, question, force", TABLES["conversations"])
def test_conversation_with_images_in_both_directions(client_of, request, name, question, force):
    # A drawn image is sent back (its codes, or for SEED-X the image itself), and what nano compares
    # before its answer.
    system = request.getfixturevalue(name)
    client = client_of(system)
    image = Image.open(FOX.with_stem("fox_and_snowman"))
    settings = {**SETTINGS, "max_new_tokens": 80}
    messages = [user_message(image, question)]
    expected = system.chat(messages, force_image=force, **settings)
    again = system.chat(
        [*messages, {"role": "assistant", "content": expected}, user_message("And now?")],
        **SETTINGS,
    )

    # 1. OpenAI's routes; some clients send the reasoning by another name, too.
    fields = {**FIELDS, "max_tokens": 80, "force_image": force}
    opening = user(image, question)
    message = chat(client, [opening], **fields)
    for part, drawing in zip(message["images"], expected.images, strict=True):
        assert np.array_equal(read(part["image_url"]["url"]), drawing)
        assert str(expected.shown[0]).endswith(message["content"][: part["offset"]])
    assert message.pop("finish_reason") == expected.finish_reason
    assert message.pop("usage")["total_tokens"] == expected.prompt_tokens + len(expected.ids)
    message["reasoning"] = message.get("reasoning_content", "")
    assert message["reasoning"] == expected.reasoning
    follow_up = chat(client, [opening, message, user("And now?")], **FIELDS)
    assert follow_up["content"].strip() == again.text.strip()
    assert follow_up["usage"]["prompt_tokens"] == again.prompt_tokens
    body = {"input": [opening], "max_output_tokens": 80, "num_beams": 2, "temperature": 0}
    body["tool_choice"] = "required" if force else "auto"
    body["input"] += [*client.post(RESPONSES, json=body).json["output"], user("And now?")]
    usage = client.post(RESPONSES, json=body).json["usage"]
    assert usage["input_tokens"] == again.prompt_tokens

    # 2. The original's route, with one text.
    prompt = PROMPTS[system.config.system]
    text = prompt.format(f"<image>{question}")
    drawing = generate(client, text, image, force_boi=force, **settings)
    assert drawing["text"].startswith(expected.reasoning)
    codes = drawing["images_ids"][1:]
    images = [row or read(data) for row, data in zip(codes, drawing["images"], strict=True)]
    text = f"{text} {drawing['text']}\n" + prompt.format("And now?")
    answer = generate(client, text, image, *images, **SETTINGS)
    assert answer["text"] == str(again)


@pytest.mark.parametrize("name", ["tiny", "tiny_x"])
def test_generate_continues_a_text_without_template(client_of, request, name):
    from seed_multimodal.language.messages import Message
    from seed_multimodal.pipelines.tasks import Task

    system = request.getfixturevalue(name)
    message = Message("raw", ("Question: ", noise(1), "What is this?\nAnswer:"))
    task = Task("chat", [message], system.settings(**SETTINGS))
    [[expected]] = system.generate([task])
    text = "Question: <image>What is this?\nAnswer:"
    answer = generate(client_of(system), text, noise(1), **SETTINGS)
    assert answer["text"] == str(expected.answer)


def test_generate_leaves_out_an_image_of_an_answer_that_broke_off(client_of, tiny, tiny_x):
    # The original's clients send all images of the conversation, also unfinished ones.
    codes = [*range(16)] * 2
    text = "USER: <image>Draw.\nASSISTANT: <image> and <image>\nUSER: What is it?\nASSISTANT:"
    answer = generate(client_of(tiny), text, codes, codes[:23], [])
    assert answer["images_ids"][:3] == [codes, codes[:23], []]
    assert len([note for note in answer["error_msg"] if "left out" in note]) == 2
    text = "[INST] Draw. [/INST]\nHere <image>\n[INST] And? [/INST]\n"
    answer = generate(client_of(tiny_x), text, [0, 1], **SETTINGS)
    assert answer["images_ids"][0] == [0, 1]
    assert any("left out" in note for note in answer["error_msg"])


REFUSED = TABLES["refused"]
REFUSED["a long prompt"] = {
    **REFUSED["nothing to draw"],
    "text": "a fish " * 4000,
    "named": "prompt",
}


@pytest.mark.parametrize("row", REFUSED.values(), ids=REFUSED)
def test_generate_names_what_a_family_cannot_read(client_of, request, row):
    system = request.getfixturevalue(row["system"])
    text = PROMPTS[system.config.system].format(row["text"])
    body = {"text": text, "images": row["images"], "force_boi": row.get("force_boi", False)}
    response = client_of(system).post("/generate", json=body)
    assert response.status_code == 400 and row["named"] in response.json["error"]


# ---- SEED-X: images have no codes, answers have boxes


def answering(system, text):
    """A system whose answers are recorded."""
    copy = object.__new__(type(system))
    vars(copy).update(vars(system))
    ids = system.tokenizer.encode(text)
    copy.engine = RecordedEngine(system.tokenizer, ids)
    return copy


def test_boxes_are_shares_of_the_last_image(client_of, tiny_x):
    # The page draws them on it.
    text = "a cat<box_start><loc-8><loc-4><loc-4><loc-2><box_end></s>"
    client = client_of(answering(tiny_x, text))
    message = chat(client, [user(noise(0), noise(1), "Where is it?")])
    assert message["boxes"] == [{"image": 1, "box": [0.375, 0.1875, 0.625, 0.3125]}]
    assert message["notes"] == []
    assert chat(client, [user("Where is it?")])["boxes"] == []
    # The words of a box are in the text, which the next turn sends back.
    assert "<loc-8>" in generate(client, "[INST] Where is it? [/INST]\n")["text"]


BOX = "<box_start><loc-1><loc-2><loc-3><loc-4><box_end>"


@pytest.mark.parametrize(
    "malformed",
    [
        "<box_start><loc-1><loc-2><loc-3><box_end>",
        "<box_start><loc-1> a <loc-2><loc-3><loc-4><box_end>",
        "<box_start><loc-1><loc-2><loc-3><loc-224><box_end>",
        "<box_start><loc-1><loc-2><loc-3><loc-4>",
        "</img> a cat",
        "<img><img_00000><img_00001>",
    ],
    ids=["three", "a word", "too large", "no end", "no image", "half an image"],
)
def test_malformed_answers_have_a_note(client_of, tiny_x, malformed):
    # The well-formed box behind it is drawn nevertheless.
    client = client_of(answering(tiny_x, f"{malformed} it {BOX}."))
    message = chat(client, [user(noise(0), "Where is it?")])
    assert len(message["boxes"]) == len(message["notes"]) == 1
    response = generate(client, "[INST] <image>? [/INST]\n", noise(0))
    assert response["text"].count("<image>") == len(response["images"])


# ---- LaVIT: single messages, six ratios, its own settings


def test_lavit_composes_text_images_and_codes(client_of, tiny_lavit):
    image = noise(1)
    codes = [1, 2, 3]
    text = "<image> and <image> in the snow"
    answer = generate(client_of(tiny_lavit), text, image, codes, seed=3, force_boi=True)
    expected = tiny_lavit.compose([image, "and", codes, "in the snow"], seed=3)
    assert np.array_equal(read(answer["images"][0]), expected)
    assert answer["images_ids"][:2] == [None, codes]


def test_lavit_answers_the_last_message_alone(client_of, tiny_lavit):
    client = client_of(tiny_lavit)
    shown = user(noise(1))
    shown["content"][0]["codes"] = [1, 2]  # an image is read rather than its codes
    turns = [{"role": "system", "content": "Be kind."}, user("a fish"), shown]
    expected = tiny_lavit.chat([user_message(noise(1))], num_beams=1, seed=3)
    body = {"messages": turns, "seed": 3}
    message = client.post(CHAT, json=body).json["choices"][0]["message"]
    assert message["content"] == expected.text


def test_lavit_draws_in_a_ratio(client_of, tiny_lavit):
    client = client_of(tiny_lavit)
    body = {"prompt": "a fish", "seed": 3, "ratio": "2:3"}
    (item,) = client.post(DRAW, json=body).json["data"]
    expected = tiny_lavit.draw("a fish", seed=3, ratio="2:3")
    assert np.array_equal(read(item["b64_json"]), expected)
    # A size is its ratio, resized.
    (item,) = client.post(DRAW, json={"prompt": "a fish", "size": "200x300"}).json["data"]
    assert read(item["b64_json"]).size == (200, 300)


def test_a_folder_without_its_pixel_decoder_is_read_only(client_of, tiny_lavit_folder, tmp_path):
    folder = shutil.copytree(tiny_lavit_folder, tmp_path / "tiny")
    shutil.rmtree(folder / "pixels")
    client = client_of(load(folder))
    assert generate(client, "<image>", noise(1))["text"]
    body = {"text": "a fish", "images": [], "force_boi": True}
    response = client.post("/generate", json=body)
    assert response.status_code == 400 and "pixel decoder" in response.json["error"]


def user_message(*content) -> dict:
    return {"role": "user", "content": [*content]}
