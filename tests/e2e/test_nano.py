"""The shipped weights: size, formats, and that diffusers runs them (what they see and draw:
`test_readme.py`, `unit/evaluation/test_tokenizer.py` and `test_verify.py`)."""

import pytest
import torch
from repository import NANO

from seed_multimodal.nn.vision.clip import load_clip_vision


def test_weights_are_safetensors_and_at_most_40_mb():
    files = list(NANO.rglob("*.safetensors"))
    assert len(files) >= 7 and sum(file.stat().st_size for file in files) <= 40e6
    assert not [
        file for file in NANO.rglob("*") if file.suffix in (".pt", ".pth", ".bin", ".ckpt", ".pkl")
    ]


@pytest.mark.nightly
def test_stock_pipeline_class_runs_the_decoder():
    from diffusers import StableUnCLIPImg2ImgPipeline

    folder = NANO / "seed_tokenizer" / "diffusion_model"
    pipeline = StableUnCLIPImg2ImgPipeline.from_pretrained(
        folder,
        tokenizer=None,
        text_encoder=None,
        image_encoder=load_clip_vision(folder / "image_encoder", log=None),
    )
    pipeline.set_progress_bar_config(disable=True)
    size = pipeline.unet.config.cross_attention_dim
    picture = pipeline(
        image_embeds=torch.zeros(1, pipeline.image_normalizer.mean.shape[1]),
        prompt_embeds=torch.zeros(1, 1, size),
        negative_prompt_embeds=torch.zeros(1, 1, size),
        num_inference_steps=2,
    ).images[0]
    assert picture.size == (64, 64)
