"""transformers' Auto classes and its pipeline "any-to-any": ids and pixels equal the system's."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from repository import ROOT
from tiny.language import write_hub_tokenizer
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    PROCESSOR_MAPPING,
    AutoModelForMultimodalLM,
    AutoProcessor,
    BitsAndBytesConfig,
    LogitsProcessor,
    dynamic_module_utils,
    pipeline,
)

from seed_multimodal import transformers
from seed_multimodal.errors import ConfigError, GenerationError, RequestError
from seed_multimodal.inference.image_constraints import ImageConstraints, ImageLogitsProcessor
from seed_multimodal.language.answer import ImagePart
from seed_multimodal.language.hub_tokenizer import HubTokenizer, load_text_tokenizer
from seed_multimodal.language.prompts import QA_SUFFIX
from seed_multimodal.pipelines.modeling_seed_multimodal import CodesVocabulary, WellFormedImages
from seed_multimodal.transformers import registration

MODELS = ("nano", "nano-x", "nano-lavit")
BOTH = ROOT / "images/fox_and_snowman.png"
FOX = ROOT / "images/fox.png"
FAST = {"num_inference_steps": 2}
SCENE = "a fluent elephant left of a penguin in a meadow"


@pytest.fixture(scope="module")
def pipes():
    """The pipeline of each model, made when it is first asked for."""
    made = {}

    def pipe(name: str):
        if name not in made:
            made[name] = pipeline("any-to-any", model=str(ROOT / "pretrained" / name))
            made[name].model.drawing = FAST
        return made[name]

    return pipe


def user(*content: object) -> list[dict]:
    """A conversation of one message in transformers' form; a path is an image."""
    parts = []
    for part in content:
        if isinstance(part, str):
            parts.append({"type": "text", "text": part})
        else:
            parts.append({"type": "image", "image": str(part)})
    return [{"role": "user", "content": parts}]


def answers(pipe, conversations, **options) -> list[str]:
    rows = pipe(text=conversations, return_full_text=False, **options)
    return [row[0]["generated_text"] for row in rows]


class Never(LogitsProcessor):
    """Forbids an id."""

    def __init__(self, id: int) -> None:
        self.id = id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, self.id] = float("-inf")
        return scores


def assert_equal_images(image: Image.Image, expected: Image.Image) -> None:
    assert np.array_equal(np.asarray(image), np.asarray(expected))


def inputs_of(pipe, messages, **options):
    return pipe.processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=True, **options
    )


@pytest.mark.parametrize("name", MODELS)
def test_texts_equal_those_of_the_system_alone_and_in_a_batch(name, pipes):
    pipe = pipes(name)
    system = pipe.model.system
    conversations = [user(BOTH, f"What is on the {side}?") for side in ("left", "right")]
    expected = [system.chat(messages) for messages in conversations]
    texts = [answer.text for answer in expected]
    assert [text.lower().strip(".") for text in texts] == ["a fox", "a snowman"]
    assert answers(pipe, conversations) == texts
    assert answers(pipe, conversations, batch_size=2) == texts
    ids = pipe.model.generate(**inputs_of(pipe, conversations))
    for row, answer in zip(ids.tolist(), expected, strict=True):
        assert row[: len(answer.ids)] == list(answer.ids)


@pytest.mark.parametrize("name", MODELS)
def test_drawings_equal_those_of_the_system(name, pipes):
    pipe = pipes(name)
    system = pipe.model.system
    request = system.tasks.draw_request(SCENE)
    [row] = pipe(text=user(request), generation_mode="image")
    assert_equal_images(row["generated_image"], system.draw(SCENE, **FAST))


@pytest.mark.parametrize("name", MODELS)
def test_edits_equal_those_of_the_system(name, pipes):
    pipe = pipes(name)
    instruction = "Put it at night."
    [row] = pipe(
        text=user(FOX, instruction),
        generation_mode="image",
        processor_kwargs={"generation_mode": "image"},
    )
    assert_equal_images(row["generated_image"], pipe.model.system.edit(FOX, instruction, **FAST))


def test_edits_keep_their_own_sources(pipes, monkeypatch):
    """SEED-X's second stage draws from them; other calls of `generate` come between."""
    pipe = pipes("nano-x")
    decode = pipe.model.system.decode_images
    sources = []

    def recorded(inputs, prompts, *settings):
        sources.extend(prompt.source and prompt.source.size for prompt in prompts)
        return decode(inputs, prompts, *settings)

    monkeypatch.setattr(pipe.model.system, "decode_images", recorded)
    image = {"generation_mode": "image"}
    requests = [user(FOX, "Put it at night."), user(BOTH, "Put it at night.")]
    features = [
        pipe.model.generate(**inputs_of(pipe, request, **image), **image) for request in requests
    ]
    sizes = [Image.open(path).size for path in (FOX, BOTH)]
    pixels = [pipe.model.decode_image_tokens(rows.to("cpu")) for rows in features]
    assert sources == sizes and sizes[0] != sizes[1]

    rows = pipe(text=requests, batch_size=2, processor_kwargs=image, **image)
    assert sources[2:] == sizes
    for [row], alone in zip(rows, pixels, strict=True):
        assert np.abs(np.asarray(row["generated_image"], int) - alone[0].numpy()).mean() < 1
    pipe.model.decode_image_tokens(torch.cat(features))
    assert sources[4:] == [None, None], "of features that were put together, none are known"


def test_a_batch_of_images_holds_drawings_and_edits(pipes):
    pipe = pipes("nano")
    system = pipe.model.system
    requests = [user(system.tasks.draw_request(SCENE)), user(FOX, "Put it at night.")]
    ids = pipe.model.generate(**inputs_of(pipe, requests), generation_mode="image")
    single = [
        pipe.model.generate(**inputs_of(pipe, request), generation_mode="image")
        for request in requests
    ]
    assert torch.equal(ids, torch.cat(single)) and ids.shape == (2, 34)
    pixels = pipe.model.decode_image_tokens(ids[:1], seed=5)
    [image] = pipe.processor.post_process_multimodal_output(pixels, generation_mode="image")
    assert_equal_images(image, system.draw(SCENE, seed=5, num_inference_steps=2))


def test_interleaved_answers_in_several_turns_equal_the_systems(pipes):
    pipe = pipes("nano")
    turns = ["What is on the left?", "Put it at night.", "What is the background?"]
    messages = user(BOTH, turns[0])
    expected_messages = user(BOTH, turns[0])
    for turn in [*turns[1:], None]:
        answer = pipe.model.system.chat(expected_messages, **FAST)
        ids = pipe.model.generate(**inputs_of(pipe, messages))
        [content] = pipe.processor.post_process_interleaved_output(ids, **FAST)

        # The same texts, codes and pixels in the same order.
        assert ids[0].tolist() == list(answer.ids)
        assert [part for part in content if part["type"] == "image"] == [
            {"type": "image", "image": part.image, "codes": part.codes}
            for part in answer.parts
            if isinstance(part, ImagePart)
        ]
        assert " ".join(part.get("text", "") for part in content).strip() == answer.text
        if turn is not None:
            messages += [{"role": "assistant", "content": content}, *user(turn)]
            expected_messages += [{"role": "assistant", "content": answer}, *user(turn)]
    assert answer.text == "The night."
    assert [part["type"] for part in messages[3]["content"]] == ["text", "image"]


def test_the_pipeline_chats_in_several_turns(pipes):
    pipe = pipes("nano")
    [row] = pipe(text=user(BOTH, "What is on the left?"))
    messages = row["generated_text"]
    assert messages[-1]["role"] == "assistant"
    [row] = pipe(text=[*messages, *user("Put it at night.")], generation_mode="image")
    night = {"role": "assistant", "content": [{"type": "image", "image": row["generated_image"]}]}
    [row] = pipe(
        text=[*messages, *user("Put it at night."), night, *user("What is the background?")]
    )
    assert row["generated_text"][-1]["content"] == "The night."


def test_a_begun_answer_is_continued(pipes):
    pipe = pipes("nano")
    question = user(BOTH, f"What is on the left?{QA_SUFFIX}")
    [row] = pipe(text=[*question, {"role": "assistant", "content": "a "}])
    assert row["generated_text"][-1]["content"] == "a fox"


def test_texts_without_template_are_continued(pipes):
    pipe = pipes("nano")
    prompt = f"USER: <image>What is on the left?{QA_SUFFIX}\nASSISTANT:"
    [row] = pipe(text=prompt, images=str(BOTH), return_full_text=False)
    assert row["generated_text"] == "a fox"
    pixels = np.asarray(Image.open(BOTH).convert("RGB"))
    of_path = pipe.processor(text=prompt, images=str(BOTH))
    of_pixels = pipe.processor(text=prompt, images=pixels)
    assert torch.equal(of_pixels["input_ids"], of_path["input_ids"])
    with pytest.raises(RequestError, match="2 <image> placeholders for 1 images"):
        pipe.processor(text="<image><image>", images=str(BOTH))


def test_generate_takes_options_of_transformers(pipes):
    pipe = pipes("nano")
    inputs = inputs_of(pipe, user(FOX, "Please describe it."))
    settings = {"num_beams": 2, "max_new_tokens": 40}
    ids = pipe.model.generate(**inputs, **settings)
    assert ids[0].tolist() == list(
        pipe.model.system.chat(user(FOX, "Please describe it."), **settings).ids
    )
    several = pipe.model.generate(**inputs, do_sample=True, num_return_sequences=3)
    assert len(several) == 3
    logits = pipe.model(**{key: inputs[key] for key in ("input_ids", "attention_mask")}).logits
    assert logits.shape[1:] == (
        inputs["input_ids"].shape[1],
        pipe.model.config.text_config.vocab_size,
    )


def test_a_model_of_another_dtype_reads_and_draws():
    pipe = pipeline("any-to-any", model=str(ROOT / "pretrained/nano"), dtype="float64")
    assert pipe.model.dtype == torch.float64
    pipe.model.drawing = FAST
    pipe.model.to(torch.bfloat16)
    assert answers(pipe, [user(BOTH, f"What is on the left?{QA_SUFFIX}")]) == ["a fox"]
    [row] = pipe(text=user(FOX, "Put it at night."), generation_mode="image")
    assert row["generated_image"].size == (64, 64)


@pytest.mark.parametrize("name", MODELS)
def test_a_loss_trains_the_language_model(name, pipes):
    pipe = pipes(name)
    inputs = inputs_of(pipe, user(FOX, "What is it?"))
    pipe.model.activation_checkpointing_enable()
    pipe.model.train()
    pipe.model(**inputs, labels=inputs["input_ids"]).loss.backward()
    pipe.model.eval()
    pipe.model.activation_checkpointing_disable()
    weight = pipe.model.get_input_embeddings().weight
    assert weight.grad.abs().sum() > 0
    pipe.model.zero_grad()


def test_a_model_is_saved_into_a_folder_with_checkpoints(pipes, saved):
    (saved / "checkpoint-1").mkdir()
    pipe = pipes("nano")
    trained = pipe.model.state_dict()
    name = "language_model.model.norm.weight"
    trained[name] = trained[name] + 1
    pipe.model.save_pretrained(saved, state_dict=trained)
    assert (saved / "checkpoint-1").is_dir()
    model = AutoModelForMultimodalLM.from_pretrained(saved)
    assert torch.equal(model.state_dict()[name], trained[name])
    pipe.save_pretrained(saved)  # the weights as before, for the tests below


def test_attention_of_transformers(pipes):
    model = AutoModelForMultimodalLM.from_pretrained(
        ROOT / "pretrained/nano", attn_implementation="eager"
    )
    assert model.language_model.config._attn_implementation == "eager"
    # The engine's masks are those of this attention.
    answers = [["a noto fox in a meadow"]]
    [[eager]] = model.system.likelihoods([FOX], "What is it?", answers)
    [[default]] = pipes("nano").model.system.likelihoods([FOX], "What is it?", answers)
    assert eager.log_probs == pytest.approx(default.log_probs, abs=1e-3)


def test_quantization_of_transformers():
    folder = ROOT / "pretrained/nano"
    model = AutoModelForMultimodalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    )
    assert model.language_model.is_loaded_in_8bit
    with pytest.raises(ConfigError, match="quantization='8bit'"):
        AutoModelForMultimodalLM.from_pretrained(
            folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True)
        )


def test_what_cannot_be_answered_is_an_error(pipes):
    pipe = pipes("nano")
    with pytest.raises(GenerationError, match="context ends at 512"):
        pipe(text=user("tell me " * 300))
    with pytest.raises(ConfigError, match=r"pipeline set model\.drawing"):
        pipe(
            text=user("Please draw a fox."),
            generation_mode="image",
            generate_kwargs={"num_inference_steps": 2},
        )
    with pytest.raises(RequestError, match="'image': IMAGE"):
        pipe(text=[{"role": "user", "content": [{"type": "image"}]}])
    text = pipe.processor.apply_chat_template(user(FOX, "What is it?"))
    with pytest.raises(RequestError, match="return_dict=True"):
        pipe.processor(text=text, images=[Image.open(FOX)])
    video = [{"role": "user", "content": [{"type": "video", "url": str(FOX)}]}]
    with pytest.raises(RequestError, match="'video'"):
        pipe(text=video)


def test_what_a_family_cannot_answer_is_an_error(pipes):
    lavit = pipes("nano-lavit")
    with pytest.raises(ConfigError, match="can only draw this"):
        lavit(text=user("a noto fox in a meadow"))
    with pytest.raises(ConfigError, match="processor_kwargs"):
        lavit(text=user(FOX, "at night"), generation_mode="image")
    with pytest.raises(ConfigError, match="draws images from hidden states"):
        pipes("nano-x").processor.post_process_interleaved_output([[1]])


def test_a_processor_alone_reads_no_language_model(tmp_path, pipes):
    for part in (ROOT / "pretrained/nano").iterdir():
        (tmp_path / part.name).symlink_to(part)
    processor = AutoProcessor.from_pretrained(tmp_path)
    messages = user(FOX, "What is it?")
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True)
    assert torch.equal(inputs["input_ids"], inputs_of(pipes("nano"), messages)["input_ids"])
    assert processor.system.llm is None
    with pytest.raises(ConfigError, match="without its language model"):
        processor.system.describe(FOX)


def test_registration_when_transformers_was_imported_before(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", sys.meta_path[:])
    mappings = (CONFIG_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING, PROCESSOR_MAPPING)
    registered = [mapping._extra_content.copy() for mapping in mappings]
    for mapping in mappings:
        mapping._extra_content.clear()
    registration.install()
    assert [mapping._extra_content for mapping in mappings] == registered
    assert registered[0].keys() >= {"seed_llama", "seed_x", "lavit"}


def test_classes_have_names_of_their_families():
    assert transformers.SeedLlamaProcessor is transformers.processing.class_of("seed_llama")
    assert transformers.LavitConfig.model_type == "lavit"
    with pytest.raises(AttributeError, match="SeedZ"):
        _ = transformers.SeedZConfig


@pytest.fixture(scope="module")
def saved(pipes, tmp_path_factory):
    """A folder that the model of nano has written."""
    folder = tmp_path_factory.mktemp("saved") / "nano"
    pipes("nano").model.save_pretrained(folder)
    return folder


@pytest.fixture
def unregistered(monkeypatch, tmp_path):
    """Transformers as it is before `import seed_multimodal`, with a cache for remote code."""
    for mapping in (CONFIG_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING, PROCESSOR_MAPPING):
        monkeypatch.setattr(mapping, "_extra_content", {})
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "transformers_modules", raising=False)


def test_a_saved_folder_is_loaded_by_its_auto_map(saved, unregistered):
    pipe = pipeline("any-to-any", model=str(saved), trust_remote_code=True)
    assert isinstance(pipe.model, transformers.SeedLlamaForConditionalGeneration)
    assert isinstance(pipe.processor, transformers.SeedLlamaProcessor)
    question = user(BOTH, f"What is on the left?{QA_SUFFIX}")
    assert answers(pipe, [question]) == ["a fox"]


@pytest.mark.parametrize("kind", ["nano", "hub"])
def test_the_saved_module_constrains_images_as_the_package(kind, tmp_path):
    """The module imports nothing of the package, so its rules are a copy."""
    if kind == "hub":
        write_hub_tokenizer(tmp_path / "hub", ["a fox and a snowman"])
        folder = HubTokenizer.create(tmp_path / "hub", 40, 4).save_pretrained(tmp_path / "saved")
    else:
        folder = ROOT / "pretrained/nano/seed_tokenizer"
    vocabulary = load_text_tokenizer(folder).vocabulary
    length = vocabulary.tokens_per_image
    budget = 3 * length
    copied = WellFormedImages(CodesVocabulary(folder), budget)
    package = ImageLogitsProcessor(ImageConstraints(vocabulary), budget=budget)
    assert copied.vocabulary.eoi_id == vocabulary.eoi_id

    # Texts, each number of codes of an image, and what follows it, up to the end of the budget.
    text = [5, 7, 6]
    image = vocabulary.image_ids(list(range(length)))
    answer = [*text, *image, *text, *image]
    for end in range(min(len(answer), budget) + 1):
        ids = torch.tensor([answer[:end], (image + text * budget)[:end]])
        scores = torch.randn(2, vocabulary.size + 6)
        assert torch.equal(copied(ids, scores), package(ids, scores)), end


def test_a_saved_folder_without_the_package_reads_texts_and_codes(
    saved, unregistered, monkeypatch, pipes, tmp_path
):
    monkeypatch.setitem(sys.modules, "seed_multimodal.transformers", None)  # importing it fails
    model = AutoModelForMultimodalLM.from_pretrained(saved, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(saved, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.")

    # A prompt of texts and codes, and an answer of a text and codes.
    system = pipes("nano").model.system
    codes = system.tokenize(FOX)[0].tolist()
    inputs = processor(["USER: ", codes, "Put it at night.\nASSISTANT:"])
    answer = system.chat([{"role": "user", "content": [codes, "Put it at night."]}], **FAST)
    ids = model.generate(**inputs)[0].tolist()
    assert ids[: len(answer.ids)] == list(answer.ids)
    text, image = processor.decode(ids)
    assert (text, image) == (answer.text, answer.codes[0])
    assert processor.batch_decode([ids]) == [[text, image]]
    first = ids[0]
    changed = model.generate(**inputs, max_new_tokens=2, logits_processor=[Never(first)])
    assert first not in changed[0]

    # It is saved as a whole; a pipeline names what is missing.
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForMultimodalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert again.generate(**inputs)[0].tolist() == ids
    with pytest.raises(ImportError, match="Chat templates: this needs the package"):
        pipeline("any-to-any", model=str(saved), trust_remote_code=True)(text=user("Hello"))
    with pytest.raises(ImportError, match="Drawing of images: this needs the package"):
        processor.post_process_multimodal_output()
