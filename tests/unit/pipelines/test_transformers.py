"""transformers' Auto classes and its pipeline "any-to-any": ids and pixels equal the system's."""

import copy
import pickle
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from random_images import same
from repository import FOX, NANO, ROOT

from seed_multimodal.errors import ConfigError, SeedError
from seed_multimodal.language.answer import ImagePart
from seed_multimodal.language.prompts import QA_SUFFIX

MODELS = ("nano", "nano-x", "nano-lavit")
BOTH = ROOT / "images" / "fox_and_snowman.png"
FAST = {"num_inference_steps": 2}
SCENE = "a fluent elephant left of a penguin in a meadow"
NIGHT = "Put it at night."
LEFT = "What is on the left?"


@pytest.fixture(scope="module")
def pipes():
    """The pipeline of each model, made when it is first used."""
    from transformers import pipeline

    pipes = {}

    def pipe(name):
        if name not in pipes:
            pipes[name] = pipeline("any-to-any", model=str(ROOT / "pretrained" / name))
            pipes[name].model.drawing = FAST
        return pipes[name]

    return pipe


@pytest.fixture
def nano(pipes):
    return pipes("nano")


def user(*content) -> list[dict]:
    """A conversation of one message in transformers' form; a path is an image."""
    parts = []
    for part in content:
        if isinstance(part, str):
            parts.append({"type": "text", "text": part})
        else:
            parts.append({"type": "image", "image": str(part)})
    return [{"role": "user", "content": parts}]


def inputs_of(pipe, messages):
    return pipe.processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=True
    )


# ---- equal to the system


@pytest.mark.parametrize("name", MODELS)
def test_texts_equal_those_of_the_system_alone_and_in_a_batch(name, pipes):
    # `pipeline(...)` of transformers answers as `seed chat`.
    pipe = pipes(name)
    conversations = [user(BOTH, f"What is on the {side}?") for side in ("left", "right")]
    expected = [pipe.model.system.chat(messages) for messages in conversations]
    texts = [answer.text for answer in expected]
    assert [text.lower().strip(".") for text in texts] == ["a fox", "a snowman"]
    for options in ({}, {"batch_size": 2}):
        rows = pipe(text=conversations, return_full_text=False, **options)
        assert [row[0]["generated_text"] for row in rows] == texts
    ids = pipe.model.generate(**inputs_of(pipe, conversations))
    for row, answer in zip(ids.tolist(), expected, strict=True):
        assert row[: len(answer.ids)] == list(answer.ids)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_drawings_and_edits_equal_those_of_the_system(name, pipes):
    # Edits in a batch are drawn from their own sources (SEED-X's second stage reads them).
    pipe = pipes(name)
    system = pipe.model.system
    options = {"generation_mode": "image"}
    [row] = pipe(text=user(system.family.tasks.draw_request(SCENE)), **options)
    assert same(row["generated_image"], system.draw(SCENE, **FAST))
    options["processor_kwargs"] = {"generation_mode": "image"}
    requests = [user(FOX, NIGHT), user(BOTH, NIGHT)]
    [alone] = pipe(text=requests[0], **options)
    assert same(alone["generated_image"], system.edit(FOX, NIGHT, **FAST))
    rows = pipe(text=requests, batch_size=2, **options)
    for [row], source in zip(rows, (FOX, BOTH), strict=True):
        expected = np.asarray(system.edit(source, NIGHT, **FAST), int)
        assert np.abs(np.asarray(row["generated_image"], int) - expected).mean() < 1


@pytest.mark.slow
def test_interleaved_answers_in_several_turns_equal_the_systems(nano):
    turns = [LEFT, NIGHT, "What is the background?"]
    messages = []
    expected_messages = []
    for index, turn in enumerate(turns):
        request = user(*([BOTH] if index == 0 else []), turn)
        messages += request
        expected_messages += request
        answer = nano.model.system.chat(expected_messages, read_back=False, **FAST)
        ids = nano.model.generate(**inputs_of(nano, messages))
        [content] = nano.processor.post_process_interleaved_output(ids, **FAST)

        # The same texts, codes and pixels in the same order.
        assert ids[0].tolist() == list(answer.ids)
        assert [part for part in content if part["type"] == "image"] == [
            {"type": "image", "image": part.image, "codes": part.codes}
            for part in answer.parts
            if isinstance(part, ImagePart)
        ]
        assert " ".join(part.get("text", "") for part in content).strip() == answer.text
        messages.append({"role": "assistant", "content": content})
        expected_messages.append({"role": "assistant", "content": answer})
    assert answer.text == "The night."
    assert [part["type"] for part in messages[3]["content"]] == ["text", "image"]


# ---- forms of requests


@pytest.mark.parametrize("name", MODELS)
def test_begun_answers_are_continued(name, pipes):
    [row] = pipes(name)(text=[*user(FOX, LEFT), {"role": "assistant", "content": "A very large "}])
    assert "A very large twemoji fox" in row["generated_text"][-1]["content"]


def test_texts_without_template_are_continued(nano):
    prompt = f"USER: <image>{LEFT}{QA_SUFFIX}\nASSISTANT:"
    for image in (str(BOTH), Image.open(BOTH)):
        [row] = nano(text=prompt, images=image, return_full_text=False)
        assert row["generated_text"] == "a fox"


@pytest.fixture(scope="module")
def processors(tmp_path_factory):
    """Processors of the shipped systems, and of a tiny one with a hub tokenizer."""
    from tiny.seed import assemble_hub_seed_llama

    from seed_multimodal.transformers import LavitProcessor, SeedLlamaProcessor, SeedXProcessor

    hub = assemble_hub_seed_llama(tmp_path_factory.mktemp("hub"))
    classes = zip(MODELS, (SeedLlamaProcessor, SeedXProcessor, LavitProcessor), strict=True)
    made = {name: cls.from_pretrained(ROOT / "pretrained" / name) for name, cls in classes}
    return {**made, "hub": SeedLlamaProcessor.from_pretrained(hub)}


ANSWER = {"role": "assistant", "content": " A fox, of course."}
CONVERSATIONS = {
    "an image": user(FOX, LEFT),
    "an image behind": user("See \n", BOTH, LEFT),
    "two images": user(FOX, BOTH, LEFT),
    "white space": user(FOX, "  What is\n\n it?  "),
    "turns": [*user("Hello."), ANSWER, *user("Please draw a fox.")],
    "images in turns": [*user("See", FOX), ANSWER, *user(BOTH, LEFT)],
    "codes of an answer": [
        *user(FOX, "Put it at night."),
        {"role": "assistant", "content": ["Here:", [1, 2] * 16]},
        *user(BOTH, LEFT),
    ],
}
SINGLE = ("an image", "an image behind", "two images", "white space")  # messages that LaVIT takes


def without_images(messages: list[dict]) -> list[dict]:
    """A conversation whose images the processor gets apart, as in transformers' examples."""
    stripped = copy.deepcopy(messages)
    for message in stripped:
        for part in filter(lambda part: "image" in part, message["content"]):
            del part["image"]
    return stripped


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", [*MODELS, "hub"])
def test_texts_of_the_template_give_its_prompts(name, conversation, processors):
    # The two steps of transformers' examples: a text, then its ids with the images.
    if name == "nano-lavit" and conversation not in SINGLE:
        pytest.skip("LaVIT answers single messages")
    if (name, conversation) == ("nano-x", "codes of an answer"):
        pytest.skip("images of SEED-X have no codes")
    processor = processors[name]
    messages = CONVERSATIONS[conversation]
    options = {"add_generation_prompt": True}
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    text = processor.apply_chat_template(messages, **options)
    assert processor.apply_chat_template(without_images(messages), **options) == text
    contents = [part for message in messages for part in message["content"]]
    images = [part["image"] for part in contents if isinstance(part, dict) and "image" in part]
    for again in (
        processor(text=text, images=images, return_tensors="pt"),
        processor(text=[text], images=[images]),
        # As TRL's trainers.
        processor(text=text, images=images, add_special_tokens=False, padding_side="left"),
    ):
        assert again.keys() == inputs.keys()
        for key in ("input_ids", "attention_mask"):
            assert torch.equal(again[key], inputs[key])
        for made, expected in zip(again.get("prompts", ()), inputs.get("prompts", ()), strict=True):
            assert made.prefix_keys().tolist() == expected.prefix_keys().tolist()


@pytest.mark.parametrize("name", [*MODELS, "hub"])
def test_processors_are_pickled_and_copied_before_and_after_their_use(name, processors):
    # `datasets.map(num_proc=…)` and spawned data loaders send them to workers.
    used = processors[name]
    messages = user(FOX, LEFT)
    ids = used.apply_chat_template(messages, tokenize=True)
    for processor in (type(used)(used.folder), used):
        for copied in (pickle.loads(pickle.dumps(processor)), copy.deepcopy(processor)):  # noqa: S301
            assert torch.equal(copied.apply_chat_template(messages, tokenize=True), ids)
    rows = used.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="np")
    assert isinstance(rows["attention_mask"], np.ndarray)
    assert rows["input_ids"].tolist() == ids.tolist()


@pytest.mark.parametrize("name", MODELS)
def test_processors_are_saved_next_to_an_adapter(name, processors, tmp_path):
    # Trainers save the processor next to each checkpoint.
    from transformers import AutoProcessor

    system = ROOT / "pretrained" / name
    before = (system / "processor_config.json").read_bytes()
    processor = processors[name]
    for folder in (tmp_path / "checkpoint-1", tmp_path / "checkpoint-2", system):
        processor.save_pretrained(folder)
        processor = AutoProcessor.from_pretrained(folder)
        assert type(processor) is type(processors[name]) and processor.folder == str(system)
    assert (system / "processor_config.json").read_bytes() == before


@pytest.mark.parametrize("name", MODELS)
def test_a_streamer_prints_the_answer(name, pipes, capsys):
    from transformers import TextStreamer

    pipe = pipes(name)
    streamer = TextStreamer(pipe.processor.tokenizer)
    ids = pipe.model.generate(**inputs_of(pipe, user(FOX, LEFT)), streamer=streamer, num_beams=1)
    # LaVIT's answers are cut at a full stop, which the streamer prints, with what follows.
    printed = capsys.readouterr().out.removesuffix("\n")
    answer = pipe.processor.tokenizer.decode(ids[0])
    assert printed.removesuffix(".</s>") == answer.removesuffix(".</s>")


@pytest.mark.parametrize("name", MODELS)
def test_a_copied_model_has_weights_and_an_engine_of_its_own(name, pipes):
    # As TRL's reference model: trained weights must not reach it.
    model = pipes(name).model
    copied = copy.deepcopy(model)
    assert copied.system.ask(BOTH, LEFT) == model.system.ask(BOTH, LEFT) == "a fox"
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    model.system.engine.forget()
    assert model.system.ask(BOTH, LEFT) == "a fox"


def test_generate_takes_options_of_transformers(nano):
    # Options of `generate` that our own interface has under other names, or not.
    messages = user(FOX, "Please describe it.")
    inputs = inputs_of(nano, messages)
    settings = {"num_beams": 2, "max_new_tokens": 40}
    ids = nano.model.generate(**inputs, **settings)
    assert ids[0].tolist() == list(nano.model.system.chat(messages, **settings).ids)
    assert len(nano.model.generate(**inputs, do_sample=True, num_return_sequences=3)) == 3
    logits = nano.model(**{key: inputs[key] for key in ("input_ids", "attention_mask")}).logits
    assert logits.shape[1] == inputs["input_ids"].shape[1]


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_prompt_at_the_end_of_the_context_does_not_shorten_other_answers(num_beams, nano):
    # A drawing in a batch would become a text.
    requests = [user(f"Please draw {SCENE}."), user("a fox " * 236)]
    options = {"max_new_tokens": 60, "num_beams": num_beams, "min_new_tokens": 36}
    drawn, cut = [nano.model.generate(**inputs_of(nano, one), **options)[0] for one in requests]
    together = nano.model.generate(**inputs_of(nano, requests), **options)
    assert len(cut) < len(drawn)
    assert torch.equal(together[0], drawn) and torch.equal(together[1, : len(cut)], cut)
    assert together[1, len(cut) :].eq(nano.processor.tokenizer.eos_token_id).all()


@pytest.mark.parametrize("name", MODELS)
def test_a_loss_trains_the_language_model(name, pipes):
    # Under transformers' Trainer, with activation checkpointing.
    pipe = pipes(name)
    inputs = inputs_of(pipe, user(FOX, "What is it?"))
    pipe.model.activation_checkpointing_enable()
    pipe.model.train()
    pipe.model(**inputs, labels=inputs["input_ids"]).loss.backward()
    pipe.model.eval()
    pipe.model.activation_checkpointing_disable()
    assert pipe.model.get_input_embeddings().weight.grad.abs().sum() > 0
    pipe.model.zero_grad()


# What the error names, the call.
REFUSED = {
    "drawing settings": (
        r"model\.drawing",
        lambda pipe: pipe(text=user("Draw."), generation_mode="image", generate_kwargs=FAST),
    ),
    "placeholders": (
        "2 <image>",
        lambda pipe: pipe.processor(text="<image><image>", images=str(BOTH)),
    ),
    "assistant": (
        "assistant_model",
        lambda pipe: pipe(text=user("Hi."), generate_kwargs={"assistant_model": pipe.model}),
    ),
    "guidance": (
        "guidance_scale",
        lambda pipe: pipe(text=user("Hi."), generate_kwargs={"guidance_scale": 1.5}),
    ),
    "tensors of a library": (
        "'tf'",
        lambda pipe: pipe.processor(text="Hi.", return_tensors="tf"),
    ),
    "images next to a chat": (
        "the image itself is missing",
        lambda pipe: pipe(images=str(BOTH), text=without_images(user(FOX, LEFT))),
    ),
    "an unknown option": (
        "truncation",
        lambda pipe: pipe.processor(text="Hi.", truncation=True),
    ),
}


@pytest.mark.parametrize("named, call", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_answered_is_named(named, call, nano):
    with pytest.raises(SeedError, match=named):
        call(nano)


def test_what_a_family_cannot_answer_is_an_error(pipes):
    lavit = pipes("nano-lavit")
    for text, options in ((user(SCENE), {}), (user(FOX, "at night"), {"generation_mode": "image"})):
        with pytest.raises(ConfigError):
            lavit(text=text, **options)
    with pytest.raises(ConfigError):  # its images are hidden states
        pipes("nano-x").processor.post_process_interleaved_output([[1]])


# ---- loading and saving


@pytest.mark.slow
def test_a_model_of_another_dtype_reads_and_draws():
    from transformers import pipeline

    pipe = pipeline("any-to-any", model=str(NANO), dtype="float64")
    assert pipe.model.dtype == torch.float64
    pipe.model.drawing = FAST
    pipe.model.to(torch.bfloat16)
    assert pipe.model.system.ask(BOTH, LEFT) == "a fox"
    [row] = pipe(text=user(FOX, NIGHT), generation_mode="image")
    assert row["generated_image"].size == (64, 64)


def test_quantization_of_transformers():
    from transformers import AutoModelForMultimodalLM, BitsAndBytesConfig

    load = AutoModelForMultimodalLM.from_pretrained
    model = load(NANO, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    assert model.language_model.is_loaded_in_8bit
    with pytest.raises(ConfigError, match="8bit"):
        load(NANO, quantization_config=BitsAndBytesConfig(load_in_4bit=True))


def test_a_processor_alone_reads_no_language_model(nano, tmp_path):
    from transformers import AutoProcessor

    for part in NANO.iterdir():  # a folder that no other test has loaded
        (tmp_path / part.name).symlink_to(part)
    processor = AutoProcessor.from_pretrained(tmp_path)
    messages = user(FOX, LEFT)
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True)
    assert torch.equal(inputs["input_ids"], inputs_of(nano, messages)["input_ids"])
    assert processor.system.llm is None
    with pytest.raises(ConfigError):
        processor.system.describe(FOX)


def test_a_model_is_saved_into_a_folder_with_checkpoints(nano, tmp_path, monkeypatch):
    # As Trainer saves it, and loaded where the package is not imported, by `auto_map`.
    from transformers import (
        CONFIG_MAPPING,
        MODEL_FOR_MULTIMODAL_LM_MAPPING,
        PROCESSOR_MAPPING,
        dynamic_module_utils,
        pipeline,
    )

    (tmp_path / "checkpoint-1").mkdir()
    trained = nano.model.state_dict()
    name = "language_model.model.norm.weight"
    trained[name] = trained[name] * 1.001
    nano.model.save_pretrained(tmp_path, state_dict=trained)
    nano.processor.save_pretrained(tmp_path)
    assert (tmp_path / "checkpoint-1").is_dir()
    for mapping in (CONFIG_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING, PROCESSOR_MAPPING):
        monkeypatch.setattr(mapping, "_extra_content", {})
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "transformers_modules", raising=False)
    pipe = pipeline("any-to-any", model=str(tmp_path), trust_remote_code=True)
    assert torch.equal(pipe.model.state_dict()[name], trained[name])
    assert pipe.model.system.ask(BOTH, LEFT) == "a fox"
