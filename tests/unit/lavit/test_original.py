"""LaVIT's original interface: the calls of its notebooks and README, with their arguments."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from random_images import same
from repository import ROOT

from seed_multimodal.errors import CheckpointError, CodesError, ConfigError, SeedWarning

pytestmark = pytest.mark.filterwarnings(
    "ignore:Answers are not lemmatised", "ignore:.*holds no safety checker"
)
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


# ---- on nano-lavit


@pytest.mark.slow
def test_calls_of_understanding(tmp_path):
    from models import LaVITforUnderstanding, build_model

    options = {"device_id": None, "use_xformers": False, "understanding": True}
    model = build_model(model_path=NANO, model_dtype="fp32", **options).to("cpu")
    samples = {"image": FOX, "text_input": "What is in the picture?"}
    with torch.autocast("cpu", enabled=False):
        [caption] = model.generate({"image": FOX})
        answer = model.predict_answers(samples, max_len=10, length_penalty=0)
    assert "fox" in caption
    assert isinstance(answer[0], str)
    # Files, images and pixels are one image.
    pixels = model.system.images.code_tokenizer.transform.batch([Image.open(FOX)])
    for image in ([Path(FOX)], pixels):
        assert model.generate({"image": image}) == [caption]
    assert len(model.generate({"image": FOX}, num_captions=2, max_length=6)) == 2
    with pytest.raises(ConfigError, match="max_lenght"):
        model.generate({"image": FOX}, max_lenght=6)
    with pytest.warns(SeedWarning, match="answer_list"):
        model.predict_answers(samples, answer_list=None)

    # Attributes of a torch module and of LLaMA's tokenizer.
    direct = LaVITforUnderstanding(224, NANO, "fp32", None, False)
    assert isinstance(direct, torch.nn.Module)
    assert direct.cuda().half().to("cuda:3").eval() is direct
    assert direct.device == torch.device("cpu")
    assert {value.dtype for value in direct.parameters()} == {torch.float32}
    assert {"llama_model", "visual_tokenizer"} <= dict(direct.named_children()).keys()
    tokenizer = direct.llama_tokenizer
    ids = tokenizer("a red fox", add_special_tokens=False, return_tensors="pt").input_ids
    assert ids[0].tolist() == direct.system.tokenizer.text_ids("a red fox")
    assert direct.llama_model(ids).logits.shape[1] == ids.shape[1]
    batch = tokenizer(["a fox", "a large red fox"], add_special_tokens=False, padding=True)
    assert batch["attention_mask"][0][0] == 0


@pytest.mark.slow
def test_calls_of_image_detokenize():
    # bf16 parts under autocast, as the notebook has them.
    from utils import convert_weights_to_bf16

    from models import LaVITDetokenizer

    model: Any = LaVITDetokenizer(
        model_path=NANO, model_dtype="fp32", pixel_decoding="highres", use_xformers=False
    )
    for name, module in model.named_children():
        if name != "vae":
            convert_weights_to_bf16(module)
    pixels = torch.from_numpy(np.array(Image.open(FOX).convert("RGB"))).permute(2, 0, 1)[None] / 255
    height, width = model.ratio_size("1:1")
    options = {"original_size": (height, width), "num_inference_steps": 2, "guidance_scale": 7.0}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        [image] = model.reconstruct_from_token(pixels, width=width, height=height, **options)
    assert image.size == (width, height)


def test_models_has_the_original_names():
    # `from models import …` of a user's script.
    import models
    from seed_multimodal.compat import lavit

    names = (
        "build_model LaVITforGeneration LaVITforUnderstanding LaVITDetokenizer "
        "LaVITImageProcessor LaVITQuestionProcessor"
    )
    for name in names.split():
        assert getattr(models, name) is getattr(lavit, name)
    assert models.LaVITQuestionProcessor()('What is "3.5:1"?') == "what is 351?"
    assert models.LaVITImageProcessor()(Image.open(FOX)).shape == (3, 224, 224)


# ---- on a tiny random model


def test_calls_of_text2image_and_multimodal_synthesis(tiny_lavit_folder):
    from models import LaVITforGeneration, build_model

    model = build_model(
        model_path=tiny_lavit_folder,
        model_dtype="fp32",
        device_id=None,
        use_xformers=True,
        understanding=False,
        load_tokenizer=True,
        check_safety=False,
        pixel_decoding="highres",
    ).to("cpu")
    height, width = model.ratio_size("1:1")
    options = {"width": width, "height": height, "num_inference_steps": 2}

    # Equal for equal seeds of torch, as in the notebooks.
    texts = ["a red apple", "two dogs"]
    several = {**options, "num_return_images": 2, "guidance_scale_for_llm": 4.0, "top_k": 50}
    drawings = seeded(model.generate_image, texts, **several)
    assert len(drawings) == 4
    assert all(map(same, drawings, seeded(model.generate_image, texts, **several)))
    assert not same(drawings[0], drawings[1])
    for second in (("in the snow", "text"), (WHALE, "image")):
        prompt = [(FOX, "image"), second]
        drawings += model.multimodal_synthesis(prompt, guidance_scale_for_llm=5.0, **options)
    ids = seeded(model.generate_image_tokenids, "a red apple")
    drawings += model.pixel_decoding_origin(ids, guidance_scale_for_decoder=5.0, **options)
    assert {image.size for image in drawings} == {(width, height)}
    with pytest.raises(ConfigError, match="8"):
        model.generate_image("a red apple", width=60, height=60)

    # Tokens of a text, of its ids, and with the default negative prompt in words.
    tokenizer = model.system.tokenizer
    rows = [tokenizer.text_ids("a red apple")]
    negative = [[tokenizer.vocabulary.boi_id]]
    for text, more in (
        (rows, {"is_token_prompt": True}),
        ("a red apple", {"uncond_input_ids": negative}),
    ):
        assert ids.equal(seeded(model.generate_image_tokenids, text, **more))
    assert model.generate_image_embeds(ids).prompt_embeds.shape == (1, 16, 16)
    with pytest.raises(CodesError):
        model.generate_image_embeds(torch.tensor([[2, 2]]))
    parts = {"llama_model", "tokenizer_decoder", "unet", "vae"}
    assert parts <= dict(model.named_children()).keys()
    direct = LaVITforGeneration(tiny_lavit_folder, "bf16", None, False, False, False, "highres")
    assert direct.system.llm.dtype == torch.bfloat16
    assert direct.images.can_draw


def seeded(call, *arguments, **options):
    torch.manual_seed(1)
    return call(*arguments, **options)


def test_build_model_of_another_dtype_and_without_weights(tiny_lavit_folder, tmp_path, monkeypatch):
    # Both errors name what to change.
    from models import build_model

    with pytest.raises(ConfigError, match="int8"):
        build_model(tiny_lavit_folder, model_dtype="int8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="pretrained/LaVIT-7B-v2"):
        build_model()
