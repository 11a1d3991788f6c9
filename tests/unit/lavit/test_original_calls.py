"""The calls of the original's notebooks and README, with their arguments, on nano-lavit."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from repository import ROOT

from seed_multimodal.compat import lavit as original
from seed_multimodal.errors import SeedWarning

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Answers are not lemmatised")]
NANO = str(ROOT / "pretrained" / "nano-lavit")
FOX, WHALE = (str(ROOT / "images" / f"{name}.png") for name in ("fox", "whale"))


@pytest.fixture(autouse=True)
def _original_folder(monkeypatch) -> Iterator[None]:
    """Modules are imported as in the original's folder: `models`, `utils`.

    Other tests do not see them.
    """
    monkeypatch.syspath_prepend(str(ROOT / "src" / "lavit"))
    forget_original_modules()
    yield
    forget_original_modules()


def forget_original_modules() -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] in ("models", "utils"):
            del sys.modules[name]


def test_calls_of_understanding():
    from models import LaVITforUnderstanding, build_model

    torch.manual_seed(42)
    model = build_model(
        model_path=NANO, model_dtype="fp32", device_id=None, use_xformers=False, understanding=True
    )
    model = model.to("cpu")
    with torch.autocast("cpu", enabled=False):
        assert "fox" in model.generate({"image": FOX})[0]
        answer = model.predict_answers(
            {"image": FOX, "text_input": "What is in the picture?"}, max_len=10, length_penalty=0
        )
    assert isinstance(answer[0], str)
    direct = LaVITforUnderstanding(
        img_size=224, model_path=NANO, model_dtype="fp32", apply_lemmatizer=False
    )
    with pytest.warns(
        SeedWarning, match="ignored unknown arguments: answer_list, num_ans_candidates"
    ):
        direct.predict_answers(
            {"image": FOX, "text_input": "What is it?"}, answer_list=None, num_ans_candidates=128
        )


def test_attributes_of_an_original_module():
    from models import LaVITforUnderstanding

    model = LaVITforUnderstanding(224, NANO, "fp32", None, False)
    assert isinstance(model, torch.nn.Module) and model.cuda().half().to("cuda:3").eval() is model
    assert model.device == torch.device("cpu") and {
        value.dtype for value in model.parameters()
    } == {torch.float32}
    ids = model.llama_tokenizer(
        "a red fox", add_special_tokens=False, return_tensors="pt"
    ).input_ids
    assert ids[0].tolist() == model.system.tokenizer.text_ids("a red fox")
    with torch.no_grad():
        assert model.llama_model(ids).logits.shape[1] == ids.shape[1]
    batch = model.llama_tokenizer(
        ["a fox", "a large red fox"], add_special_tokens=False, padding=True
    )
    assert batch["input_ids"][0][0] == 2 and batch["attention_mask"][0][0] == 0
    assert {"llama_model", "visual_tokenizer"} <= dict(model.named_children()).keys()


def test_calls_of_text2image_and_multimodal_synthesis():
    from models import LaVITforGeneration, build_model

    torch.manual_seed(1234)
    model = build_model(
        model_path=NANO,
        model_dtype="fp32",
        device_id=None,
        use_xformers=True,
        understanding=False,
        load_tokenizer=True,
        check_safety=False,
        pixel_decoding="highres",
    )
    model = model.to("cpu")
    height, width = model.ratio_size("1:1")
    drawings = model.generate_image(
        "a fox on the grass",
        width=width,
        height=height,
        num_return_images=1,
        guidance_scale_for_llm=4.0,
        num_inference_steps=2,
        top_k=50,
    )
    pair = model.multimodal_synthesis(
        [(FOX, "image"), ("It is running in the snow", "text")],
        width=width,
        height=height,
        guidance_scale_for_llm=5.0,
        num_inference_steps=2,
        top_k=50,
    )
    both = model.multimodal_synthesis(
        [(FOX, "image"), (WHALE, "image")],
        width=width,
        height=height,
        guidance_scale_for_llm=5.0,
        num_inference_steps=2,
    )
    assert [image.size for image in (*drawings, *pair, *both)] == [(width, height)] * 3
    ids = model.generate_image_tokenids("a fox")
    again = model.pixel_decoding_origin(
        ids, width=width, height=height, num_inference_steps=2, guidance_scale_for_decoder=5.0
    )
    assert again[0].size == (width, height)
    assert {"llama_model", "tokenizer_decoder", "unet", "vae"} <= dict(
        model.named_children()
    ).keys()
    third = LaVITforGeneration(NANO, "fp32", None, False, False, False, "highres")
    assert third.images.can_draw and third.device == torch.device("cpu")


def test_calls_of_image_detokenize():
    from utils import convert_weights_to_bf16

    from models import LaVITDetokenizer

    torch.manual_seed(42)
    model = LaVITDetokenizer(
        model_path=NANO, model_dtype="fp32", pixel_decoding="highres", use_xformers=False
    )
    for name, module in model.named_children():
        if name != "vae":
            convert_weights_to_bf16(module)
    model = model.to("cpu")
    pixels = torch.from_numpy(np.array(Image.open(FOX).convert("RGB"))).permute(2, 0, 1)[None] / 255
    height, width = model.ratio_size("1:1")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        images = model.reconstruct_from_token(
            pixels,
            width=width,
            height=height,
            original_size=(height, width),
            num_inference_steps=2,
            guidance_scale=7.0,
        )
    assert images[0].size == (width, height) and "vae" in dict(model.named_children())


def test_models_has_the_original_names():
    import models

    for name in (
        "build_model",
        "LaVITforGeneration",
        "LaVITforUnderstanding",
        "LaVITDetokenizer",
        "LaVITImageProcessor",
        "LaVITQuestionProcessor",
    ):
        assert getattr(models, name) is getattr(original, name)
    assert models.LaVITQuestionProcessor()('What is "3.5:1"?') == "what is 351?"
    assert models.LaVITImageProcessor()(Image.open(FOX)).shape == (3, 224, 224)
