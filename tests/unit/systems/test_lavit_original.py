"""`build_model` and the classes of the released programs, on a tiny random model."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_lavit import picture, same

from seed_multimodal.errors import CheckpointError, CodesError, ConfigError, ImageError, RequestError
from seed_multimodal.systems import lavit_original
from seed_multimodal.systems.lavit_original import LaVITDetokenizer, build_model

pytestmark = pytest.mark.filterwarnings("ignore:Answers are not lemmatised", "ignore:.*holds no safety checker")
ROOT = Path(__file__).resolve().parents[3]
DEFAULTS = {
    "build_model": {"model_path": "./", "model_dtype": "bf16", "device_id": None, "image_size": 224,
                    "use_xformers": False, "understanding": True, "load_tokenizer": True, "pixel_decoding": "highres",
                    "check_safety": True, "local_files_only": False, "model_sub_dir": "language_model"},
    "LaVITforUnderstanding.generate": {
        "use_nucleus_sampling": False, "num_beams": 2, "max_length": 36, "min_length": 8, "top_p": 1.0, "top_k": 50,
        "repetition_penalty": 1, "length_penalty": 1, "num_captions": 1, "temperature": 1},
    "LaVITforUnderstanding.predict_answers": {
        "use_nucleus_sampling": False, "num_beams": 5, "max_len": 10, "min_len": 2,
        "prompt": "Question: {} Answer:", "temperature": 1, "top_p": 1.0, "top_k": 50, "length_penalty": 0},
    "LaVITforGeneration.generate_image": {
        "width": 512, "height": 512, "original_size": None, "crops_coords_top_left": None, "use_nucleus_sampling": True,
        "top_p": 1.0, "top_k": 50, "num_beams": 1, "temperature": 1, "num_return_images": 1, "length_penalty": 1,
        "max_length": 200, "min_length": 20, "num_inference_steps": 25, "guidance_scale_for_llm": 4.0,
        "guidance_scale_for_decoder": 7.0, "uncond_input_ids": None, "is_token_prompt": False},
    "LaVITforGeneration.generate_image_tokenids": {"top_p": 0.9, "guidance_scale": 3.0},
    "LaVITforGeneration.multimodal_synthesis": {"guidance_scale_for_llm": 5.0},
    "LaVITforGeneration.__init__": {"check_safety": False, "load_tokenizer": False},
    "LaVITDetokenizer.__init__": {"model_path": "", "model_dtype": "bf16", "use_xformers": True,
                                  "pixel_decoding": "highres"},
    "LaVITDetokenizer.reconstruct_from_token": {"width": 1024, "height": 1024, "original_size": None,
                                                "num_inference_steps": 50, "guidance_scale": 5.0}}
SMALL = {"width": 64, "height": 64, "num_inference_steps": 2, "max_length": 12, "min_length": 4}


@pytest.fixture(scope="module")
def understands(tiny_lavit_folder):
    return build_model(tiny_lavit_folder, model_dtype="fp32", understanding=True, local_files_only=True)


@pytest.fixture(scope="module")
def draws(tiny_lavit_folder):
    return build_model(tiny_lavit_folder, model_dtype="fp32", understanding=False, check_safety=False)


@pytest.mark.parametrize("name", DEFAULTS)
def test_arguments_and_defaults_are_the_released_ones(name):
    function = lavit_original
    for part in name.split("."):
        function = getattr(function, part)
    parameters = inspect.signature(function).parameters
    assert {key: parameters[key].default for key in DEFAULTS[name]} == DEFAULTS[name]


def test_captions(understands, tiny_lavit, tmp_path):
    files = [tmp_path / "one.png", tmp_path / "two.png"]
    for number, file in enumerate(files):
        picture(number).save(file)
    torch.manual_seed(1)
    captions = understands.generate({"image": [str(file) for file in files]}, max_length=6, min_length=1)
    torch.manual_seed(1)
    assert captions == understands.generate({"image": [str(file) for file in files]}, max_length=6, min_length=1)
    assert len(captions) == 2 and all(isinstance(one, str) for one in captions)
    assert len(understands.generate({"image": str(files[0])}, num_captions=2, max_length=6, min_length=1)) == 2
    torch.manual_seed(1)
    pixels = torch.stack([tiny_lavit.pictures.writer.transform(Image.open(file)) for file in files])
    assert understands.generate({"image": pixels}, max_length=6, min_length=1) == captions
    plain, prompted = (understands.generate({"image": pixels[:1], **more}, max_length=6, min_length=1)
                       for more in ({}, {"prompt": "a red"}))
    assert len(plain) == len(prompted) == 1
    for wrong in ({}, {"picture": "x"}):
        with pytest.raises(RequestError, match="image"):
            understands.generate(wrong)


def test_answers(understands):
    samples = {"image": [picture(1), picture(2)], "text_input": ["What is this?", "Where?"]}
    torch.manual_seed(1)
    answers = understands.predict_answers(samples)
    torch.manual_seed(1)
    assert answers == understands.predict_answers(samples, prompt="Question: {} Answer:") and len(answers) == 2
    torch.manual_seed(1)
    bare = understands.predict_answers(
        {"image": picture(1), "text_input": "Question: What is this? Answer:"}, prompt="")
    torch.manual_seed(1)
    assert bare == understands.predict_answers({"image": picture(1), "text_input": "What is this?"})
    with pytest.raises(RequestError, match="text_input"):
        understands.predict_answers({"image": picture(1)})


def test_drawings(draws):
    torch.manual_seed(1)
    drawn = draws.generate_image(["a red apple", "two dogs"], num_return_images=2, **SMALL)
    torch.manual_seed(1)
    again = draws.generate_image(["a red apple", "two dogs"], num_return_images=2, **SMALL)
    assert len(drawn) == 4 and all(map(same, drawn, again)) and not same(drawn[0], drawn[1])
    assert draws.ratio_size("3:2") == (48, 80)
    with pytest.raises(ConfigError, match="multiple of 8"):
        draws.generate_image("a red apple", width=60, height=60)


def test_ids_negative_ids_and_prompts_of_ids(draws):
    words = draws.system.tokenizer
    torch.manual_seed(1)
    ids = draws.generate_image_tokenids("a red apple", max_length=8, min_length=3)
    torch.manual_seed(1)
    assert ids.equal(draws.generate_image_tokenids([words.text_ids("a red apple")], max_length=8, min_length=3,
                                                   is_token_prompt=True))
    torch.manual_seed(1)
    start = [[words.vocabulary.boi_id]]
    assert ids.equal(draws.generate_image_tokenids("a red apple", max_length=8, min_length=3, uncond_input_ids=start))
    short = draws.generate_image_tokenids([[5, 6]], max_length=12, min_length=4, is_token_prompt=True,
                                          legacy_max_length=True)
    assert short.shape[1] == 2  # as released: no longer than the prompt
    conditions = draws.generate_image_embeds(ids)
    assert conditions.prompt_embeds.shape == (1, 16, 16)


def test_pictures_and_words_together(draws):
    torch.manual_seed(1)
    drawn = draws.multimodal_synthesis([(picture(1), "image"), ("in the snow", "text")], **SMALL)
    assert len(drawn) == 1 and drawn[0].size == (64, 64)
    with pytest.raises(RequestError, match="'sound'"):
        draws.multimodal_synthesis([("x", "sound")])


def test_a_least_length_that_no_picture_reaches_does_not_forbid_its_end(draws):
    torch.manual_seed(1)
    asked = {"max_length": 200, "guidance_scale": 1.0}
    ids = [draws.generate_image_tokenids(["a red apple"] * 20, min_length=least, **asked) for least in (20, 16)]
    end = draws.system.tokenizer.vocabulary.eoi_id
    assert (ids[0] == end).any() and not (ids[1][:, :16] == end).any()  # 20 is the released default; a picture has 16


def test_wrong_prompts_and_pixels_are_one_sentence(draws, understands, tiny_lavit_folder):
    pixels = torch.zeros(2, 3, 16, 16)
    for error, words, call in (
            (RequestError, "not 'ab'", lambda: draws.multimodal_synthesis(["ab"], **SMALL)),
            (RequestError, "a text, not NoneType", lambda: draws.multimodal_synthesis([(None, "text")], **SMALL)),
            (RequestError, "one picture, not 2",
             lambda: draws.multimodal_synthesis([([picture(1), picture(2)], "image")], **SMALL)),
            (RequestError, "prompts must be a list, not NoneType", lambda: draws.generate_image(None, **SMALL)),
            (RequestError, "a list, not str", lambda: draws.generate_image("ab", is_token_prompt=True, **SMALL)),
            (CodesError, "rows of whole numbers", lambda: draws.generate_image([["a"]], is_token_prompt=True, **SMALL)),
            (CodesError, "rows of whole numbers", lambda: draws.generate_image("ab", uncond_input_ids=[5, 6], **SMALL)),
            (ImageError, "uint8", lambda: understands.generate({"image": pixels.byte()})),
            (ImageError, "NaN", lambda: understands.generate({"image": list(pixels * float("nan"))})),
            (ImageError, "3, 16, 17", lambda: understands.generate({"image": [pixels[0], torch.ones(3, 16, 17)]}))):
        with pytest.raises(error, match=words):
            call()
    ids = draws.generate_image_tokenids("a red apple", max_length=8, min_length=3)
    assert draws.generate_image_embeds(ids[0]).prompt_embeds.equal(draws.generate_image_embeds(ids).prompt_embeds)


def test_a_detokenizer_takes_pixels_of_any_size(tiny_lavit_folder):
    detokenizer = LaVITDetokenizer(tiny_lavit_folder, model_dtype="fp32").to("cpu").eval()
    pixels = torch.from_numpy(np.array(picture(1, (50, 20)))).permute(2, 0, 1)[None] / 255
    drawn = []
    for _ in range(2):
        torch.manual_seed(1)
        drawn += detokenizer.reconstruct_from_token(pixels, width=40, height=32, num_inference_steps=2)
    assert drawn[0].size == (40, 32) and same(*drawn)
    with pytest.raises(RequestError, match=r"\[B, 3, h, w\]"):
        detokenizer.reconstruct_from_token(pixels[0])
    for wrong in (pixels * 255, pixels[:, :, :0]):
        with pytest.raises(RequestError, match="in 0…1"):
            detokenizer.reconstruct_from_token(wrong)


def test_the_two_modes_have_different_mergers(understands, draws):
    one, other = (model.system.pictures for model in (understands, draws))
    assert one.writer is None and other.reader is None
    name = "causal_encoder.blocks.0.mlp.fc1.weight"
    assert not one.reader.get_parameter(name).equal(other.writer.get_parameter(name))


def test_wrong_arguments_and_missing_weights(tiny_lavit_folder, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="model_dtype 'int8'"):
        build_model(tiny_lavit_folder, model_dtype="int8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="pretrained/LaVIT-7B-v2"):
        build_model()


def test_half_precision_runs_on_a_cpu(tiny_lavit_folder):
    model = build_model(tiny_lavit_folder, understanding=False, check_safety=False, load_tokenizer=False)
    assert model.system.llm.dtype == torch.bfloat16
    assert model.to("cpu").eval().generate_image("a red apple", **SMALL)[0].size == (64, 64)


def test_models_can_be_imported_as_before(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "src" / "lavit"))
    monkeypatch.delitem(sys.modules, "models", raising=False)
    import models

    for name in ("build_model", "LaVITforGeneration", "LaVITforUnderstanding", "LaVITDetokenizer",
                 "LaVITImageProcessor", "LaVITQuestionProcessor"):
        assert getattr(models, name) is getattr(lavit_original, name)
    assert models.LaVITQuestionProcessor()('What is "3.5:1"?') == "what is 351?"
    assert models.LaVITImageProcessor()(picture(1)).shape == (3, 224, 224)
    monkeypatch.delitem(sys.modules, "models")
