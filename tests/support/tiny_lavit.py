"""A complete LaVIT with random weights, small enough to build and run in a test: all parts, the layout of a system
folder of ours, or that of the released weights.

Built once per test session by the fixture `tiny_lavit_folder` (tests/conftest.py), or by hand:
`python tests/support/tiny_lavit.py FOLDER`. It talks nonsense, but every part does its work.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tiny_sdxl import SIZES as SDXL
from tiny_sdxl import sdxl_folder, unet

from seed_multimodal.lavit.checkpoints import reading_state, save_dynamic_tokenizer
from seed_multimodal.lavit.decoder import CodeDecoder, LavitDecoderConfig
from seed_multimodal.lavit.modeling import DynamicTokenizer, LavitTokenizerConfig
from seed_multimodal.lavit.processing import LavitTokenizer
from seed_multimodal.nn.eva import EvaConfig

WIDTH = 32  # of the language model
CODES, CODE_DIM, PATCHES = 24, 8, 16
SIZE = 16  # pixels a side of what the tower reads
SIDE = 64  # of a square drawing
SENTENCES = ["a red apple beside a blue fish", "Question: What is this animal? Answer: It is a cat.",
             "an old photo of a horse and a small house", "two dogs run in the snow, near 3 trees"] * 8
TOKENIZER = LavitTokenizerConfig(
    vit=EvaConfig(image_size=SIZE, patch_size=4, width=32, depth=2, heads=2, mlp_width=48), vit_head=6, merger_depth=2,
    merger_heads=2, merger_mlp_width=48, codebook_size=CODES, codebook_dim=CODE_DIM, llm_width=WIDTH)
DECODER = LavitDecoderConfig(tokens=PATCHES, code_dim=CODE_DIM, width=24, depth=1, heads=2, mlp_width=32,
                             feature_dim=32, prompt_dim=SDXL.output1_dim, pooled_dim=SDXL.output2_dim)
LOWRES = LavitDecoderConfig(head="lowres", tokens=PATCHES, code_dim=CODE_DIM, width=24, depth=1, heads=2, mlp_width=32,
                            feature_dim=32, prompt_dim=10)


def build(folder: str | Path, seed: int = 0) -> Path:
    """Write a system folder of ours, and return it."""
    home = Path(folder)
    words = write_language(home / "llm", seed)
    first, second = tokenizer(seed), tokenizer(seed, merger=seed + 1)
    save_dynamic_tokenizer(first, home / "tokenizer", second)
    decoder(DECODER, seed).save_pretrained(home / "decoder")
    pixels(home / "pixels")
    shorter = {"max_new_tokens": 6, "min_new_tokens": 1}
    (home / "system.json").write_text(json.dumps({"system": "lavit", "generation": {
        "describe": shorter, "draw": {"max_new_tokens": words.vocabulary.tokens_per_image, "min_new_tokens": 4},
        "compose": {"max_new_tokens": words.vocabulary.tokens_per_image, "min_new_tokens": 4}}}))
    return home


def build_released(folder: str | Path, seed: int = 0) -> Path:
    """The same sizes in the published layout and files (`.bin`, no sizes beside them)."""
    home = Path(folder)
    write_language(home / "language_model", seed, safe_serialization=True)
    first, second = tokenizer(seed), tokenizer(seed, merger=seed + 1)
    visual = home / "visual_tokenizer"
    visual.mkdir(parents=True)
    state = first.state_dict()
    _save({name.removeprefix("encoder."): value for name, value in state.items() if name.startswith("encoder.")},
          visual / "eva_vitg_psz14.bin")
    _save({name: value for name, value in state.items() if not name.startswith(("encoder.", "vit_proj."))},
          visual / "tokenizer_encoder.bin")
    _save(reading_state(second), home / "language_model" / "visual_weight.bin")
    _save(decoder(DECODER, seed).state_dict(), visual / "highres_tokenizer_decoder.bin")
    _save(decoder(LOWRES, seed).state_dict(), visual / "tokenizer_decoder.bin")
    pixels(home / "highres_pixel_decoding", as_torch=True)
    pixels(home / "pixel_decoding", lowres=True, as_torch=True)
    return home


def sizes(head: str = "highres") -> dict[str, Any]:
    """What a released folder does not say: `LavitSpec.sizes`."""
    return {"tokenizer": TOKENIZER, "decoder": DECODER if head == "highres" else LOWRES}


def tokenizer(seed: int = 0, merger: int | None = None) -> DynamicTokenizer:
    """Weights large enough to tell pictures apart; `merger`: seed of another merger and projector."""
    torch.manual_seed(seed)
    made = _spread(DynamicTokenizer(TOKENIZER))
    if merger is not None:
        torch.manual_seed(100 + merger)
        _spread(made.causal_encoder)
        _spread(made.vit_proj)
    return made.requires_grad_(False).eval()


def decoder(config: LavitDecoderConfig = DECODER, seed: int = 0) -> CodeDecoder:
    torch.manual_seed(seed)
    return _spread(CodeDecoder(config)).eval()


def write_language(folder: Path, seed: int = 0, context: int = 256, **options: Any) -> LavitTokenizer:
    """A language model with its tokenizer in the same folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    words = LavitTokenizer.train(SENTENCES, folder, 330, CODES, PATCHES)
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=words.vocabulary.size, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=context, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, tie_word_embeddings=False, initializer_range=0.5)).save_pretrained(folder, **options)
    return words


def pixels(folder: Path, *, lowres: bool = False, as_torch: bool = False) -> Path:
    """A pixel decoder of either kind; `as_torch`: the U-Net in a torch file, as released."""
    from diffusers import DDIMScheduler

    sdxl_folder(folder, whole=False)
    made = _stable_diffusion_unet() if lowres else unet()
    made.register_to_config(sample_size=SIDE // 2)
    made.save_pretrained(folder / "unet", safe_serialization=not as_torch)
    DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1).save_pretrained(folder / "scheduler")
    (folder / "seed_decode.json").write_text(json.dumps({"num_inference_steps": 2}))
    if lowres:
        torch.manual_seed(6)
        torch.save(torch.randn(1, 5, LOWRES.prompt_dim), folder / "uncond_embeddings.bin")
    return folder


def _stable_diffusion_unet() -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(5)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=LOWRES.prompt_dim)


def _save(state: dict[str, Any], file: Path) -> None:
    torch.save({name: value.clone() for name, value in state.items()}, file)


def _spread(model: Any) -> Any:
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1


if __name__ == "__main__":
    print(build(sys.argv[1]))
