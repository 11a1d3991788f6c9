"""LaVIT's original interface: the calls of its notebooks and README, with their arguments."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from random_images import same
from repository import ROOT

from seed_multimodal.errors import CodesError, ConfigError, SeedWarning

pytestmark = pytest.mark.filterwarnings(
    "ignore:Answers are not lemmatised", "ignore:.*holds no safety checker"
)
NANO = str(ROOT / "pretrained" / "nano-lavit")
FOX = str(ROOT / "images" / "fox.png")


@pytest.fixture(autouse=True)
def _original_folder(monkeypatch) -> Iterator[None]:
    """Modules are imported as in the original's folder: `models`, `utils`.

    Other tests do not see them.
    """
    monkeypatch.syspath_prepend(str(ROOT / "src" / "lavit"))
    forget_original_modules()
    yield
    forget_original_modules()


def forget_original_modules():
    for name in list(sys.modules):
        if name.partition(".")[0] in ("models", "utils"):
            del sys.modules[name]


# ---- on nano-lavit


@pytest.mark.slow
def test_calls_of_understanding():
    from models import (
        LaVITforUnderstanding,
        LaVITImageProcessor,
        LaVITQuestionProcessor,
        build_model,
    )

    options = {"device_id": None, "use_xformers": False, "understanding": True}
    model = build_model(model_path=NANO, model_dtype="fp32", **options).to("cpu")
    samples = {"image": FOX, "text_input": LaVITQuestionProcessor()("What is in the picture?")}
    with torch.autocast("cpu", enabled=False):
        [caption] = model.generate({"image": FOX})
        answer = model.predict_answers(samples, max_len=10, length_penalty=0)
    assert "fox" in caption
    assert isinstance(answer[0], str)
    # Files, images and pixels are one image.
    for image in ([Path(FOX)], LaVITImageProcessor()(Image.open(FOX))[None]):
        assert model.generate({"image": image}) == [caption]
    assert len(model.generate({"image": FOX}, num_captions=2, max_length=6)) == 2
    with pytest.raises(ConfigError, match="max_lenght"):
        model.generate({"image": FOX}, max_lenght=6)
    with pytest.warns(SeedWarning, match="answer_list"):
        model.predict_answers(samples, answer_list=None)

    # Attributes of a torch module and of LLaMA's tokenizer.
    direct = LaVITforUnderstanding(224, NANO, "fp32", None, False)
    assert direct.cuda().half().to("cuda:3").eval() is direct
    assert direct.device == torch.device("cpu")
    assert {value.dtype for value in direct.parameters()} == {torch.float32}
    batch = direct.llama_tokenizer(["a fox", "a red fox"], padding=True, return_tensors="pt")
    assert batch.attention_mask[0, 0] == 0
    assert direct.llama_model(batch.input_ids).logits.shape[:2] == batch.input_ids.shape


@pytest.mark.slow
def test_calls_of_image_detokenize():
    # bf16 parts under autocast, as the notebook has them.
    from utils import convert_weights_to_bf16

    from models import LaVITDetokenizer

    model = LaVITDetokenizer(
        model_path=NANO, model_dtype="fp32", pixel_decoding="highres", use_xformers=False
    )
    for name, module in model.named_children():
        if name != "vae":
            convert_weights_to_bf16(module)
    pixels = torch.rand(1, 3, 90, 70)
    options = {"original_size": (64, 64), "num_inference_steps": 2, "guidance_scale": 7.0}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        [image] = model.reconstruct_from_token(pixels, width=64, height=64, **options)
    assert image.size == (64, 64)


# ---- on a tiny random model (calls of multimodal_synthesis: its notebook, `test_commands.py`)


def test_calls_of_text2image_synthesis(tiny_lavit_folder):
    from models import build_model

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
    ids = seeded(model.generate_image_tokenids, "a red apple")
    drawings += model.pixel_decoding_origin(ids, guidance_scale_for_decoder=5.0, **options)
    assert {image.size for image in drawings} == {(width, height)}

    # Of a text's ids.
    rows = [model.system.tokenizer.text_ids("a red apple")]
    assert ids.equal(seeded(model.generate_image_tokenids, rows, is_token_prompt=True))
    with pytest.raises(CodesError):
        model.generate_image_embeds(torch.tensor([[2, 2]]))


def seeded(call, *arguments, **options):
    torch.manual_seed(1)
    return call(*arguments, **options)
