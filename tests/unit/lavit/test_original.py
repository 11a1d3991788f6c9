"""`build_model` and the classes of LaVIT's original interface, on a tiny random model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from random_images import noise, same

from seed_multimodal.compat.lavit import LaVITDetokenizer, build_model
from seed_multimodal.errors import CheckpointError, CodesError, ConfigError

pytestmark = pytest.mark.filterwarnings(
    "ignore:Answers are not lemmatised", "ignore:.*holds no safety checker"
)
SMALL = {"width": 64, "height": 64, "num_inference_steps": 2, "max_length": 12, "min_length": 4}


@pytest.fixture(scope="module")
def understanding(tiny_lavit_folder):
    return build_model(
        tiny_lavit_folder, model_dtype="fp32", understanding=True, local_files_only=True
    )


@pytest.fixture(scope="module")
def generation(tiny_lavit_folder):
    return build_model(
        tiny_lavit_folder, model_dtype="fp32", understanding=False, check_safety=False
    )


def seeded(call, *arguments, **options):
    torch.manual_seed(1)
    return call(*arguments, **options)


def test_generate_captions_of_files_and_pixels(understanding, tiny_lavit, tmp_path):
    files = [tmp_path / "one.png", tmp_path / "two.png"]
    for index, file in enumerate(files):
        noise(index).save(file)
    limits = {"max_length": 6, "min_length": 1}
    captions = seeded(understanding.generate, {"image": [str(file) for file in files]}, **limits)
    assert len(captions) == 2 and captions == seeded(
        understanding.generate, {"image": files}, **limits
    )
    assert len(understanding.generate({"image": str(files[0])}, num_captions=2, **limits)) == 2
    pixels = torch.stack(
        [tiny_lavit.images.code_tokenizer.transform(Image.open(file)) for file in files]
    )
    assert len(understanding.generate({"image": pixels}, **limits)) == 2
    with pytest.raises(ConfigError, match="max_lenght"):
        understanding.generate({"image": files}, max_lenght=6)


def test_predict_answers_with_and_without_prompt(understanding):
    samples = {"image": [noise(1), noise(2)], "text_input": ["What is this?", "Where?"]}
    answers = seeded(understanding.predict_answers, samples)
    assert len(answers) == 2
    assert answers == seeded(
        understanding.predict_answers, samples, prompt="Question: {} Answer:", num_beams=5
    )


def test_generate_image_and_multimodal_synthesis(generation):
    texts = ["a red apple", "two dogs"]
    drawings = seeded(generation.generate_image, texts, num_return_images=2, **SMALL)
    again = seeded(generation.generate_image, texts, num_return_images=2, **SMALL)
    assert (
        len(drawings) == 4
        and all(map(same, drawings, again))
        and not same(drawings[0], drawings[1])
    )
    composed = generation.multimodal_synthesis(
        [(noise(1), "image"), ("in the snow", "text")], **SMALL
    )
    assert (
        len(composed) == 1
        and composed[0].size == (64, 64)
        and generation.ratio_size("3:2") == (56, 80)
    )
    with pytest.raises(ConfigError, match="multiples of 8"):
        generation.generate_image("a red apple", width=60, height=60)


def test_generate_image_tokenids_of_texts_and_ids(generation):
    llm_tokenizer = generation.system.tokenizer
    limits = {"max_length": 8, "min_length": 3}
    ids = seeded(generation.generate_image_tokenids, "a red apple", **limits)
    rows = [llm_tokenizer.text_ids("a red apple")]
    assert ids.equal(
        seeded(generation.generate_image_tokenids, rows, is_token_prompt=True, **limits)
    )
    assert ids.equal(
        seeded(
            generation.generate_image_tokenids,
            "a red apple",
            uncond_input_ids=[[llm_tokenizer.vocabulary.boi_id]],
            **limits,
        )
    )
    assert generation.generate_image_embeds(ids).prompt_embeds.shape == (1, 16, 16)
    with pytest.raises(CodesError):
        generation.generate_image_embeds(torch.tensor([[2, 2]]))


def test_reconstruct_from_token_of_pixels_of_any_size(tiny_lavit_folder):
    detokenizer = LaVITDetokenizer(tiny_lavit_folder, model_dtype="fp32").to("cpu").eval()
    pixels = torch.from_numpy(np.array(noise(1, (50, 20)))).permute(2, 0, 1)[None] / 255
    first, again = (
        seeded(
            detokenizer.reconstruct_from_token, pixels, width=40, height=32, num_inference_steps=1
        )[0]
        for _ in range(2)
    )
    assert first.size == (40, 32) and same(first, again)


def test_build_model_dtypes_and_missing_weights(tiny_lavit_folder, tmp_path, monkeypatch):
    half = build_model(
        tiny_lavit_folder, understanding=False, check_safety=False, load_tokenizer=False
    )
    assert half.system.llm.dtype == torch.bfloat16 and half.generate_image("a red apple", **SMALL)[
        0
    ].size == (64, 64)
    with pytest.raises(ConfigError, match="Unknown dtype 'int8'"):
        build_model(tiny_lavit_folder, model_dtype="int8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="pretrained/LaVIT-7B-v2"):
        build_model()
