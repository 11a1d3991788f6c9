"""Random weights in the layout, size and precision of the originals' files, for `rehearsal.py`.

Names and shapes are the recorded ones of tests/golden/data/*_keys_full, or of transformers' and
diffusers' networks at published sizes. Files are sparse: each tensor has one block of random
values, then zeros.

    python benchmarks/original_layouts.py 8b FOLDER/pretrained
"""

from __future__ import annotations

import gzip
import json
import mmap
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
from shared import ROOT
from torch import Tensor

from seed_multimodal.language.tokenizer import ADDED, MODEL
from seed_multimodal.language.vocabulary import ImageVocabulary, SeedXVocabulary
from seed_multimodal.models.lavit.processing import LavitVocabulary

N_TEXT = 32000  # pieces of LLaMA's tokenizer
BLOCK = 1_000_003  # random values of a tensor
LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}
LLAMA_13B = {
    **LLAMA_7B,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
}
UNET = {
    "sample_size": 96,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
    "class_embed_type": "projection",
    "projection_class_embeddings_input_dim": 2048,
}
SDXL_UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 768,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
SDXL_VAE = {**VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}
BETA = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
Shapes = Mapping[str, Tensor]  # tensors on the meta device


def recorded(name: str, prefix: str = "", without: tuple[str, ...] = ()) -> Shapes:
    """Recorded names that begin with `prefix` (it is removed), and not with one of `without`."""
    file = ROOT / f"tests/golden/data/{name}.json.gz"
    rows = json.loads(gzip.decompress(file.read_bytes()))
    return {
        key.removeprefix(prefix): torch.empty(row["shape"], device="meta")
        for key, row in rows.items()
        if key.startswith(prefix) and not key.startswith(without)
    }


def write_weights(file: Path, shapes: Shapes, dtype: torch.dtype) -> None:
    """A torch file of these tensors, written without holding them in memory."""
    # 1. The file with space for the tensors; memory of `empty` is not used until it is written.
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: torch.empty(shape.shape, dtype=dtype) for name, shape in shapes.items()}
    with torch.serialization.skip_data():
        torch.save(tensors, file)

    # 2. The values, in the mapped file.
    del tensors
    torch.serialization.set_default_mmap_options(mmap.MAP_SHARED)
    block = 0.02 * torch.randn(BLOCK, generator=torch.Generator().manual_seed(0))
    for name, tensor in torch.load(file, mmap=True, weights_only=True).items():
        start = tensor.flatten()[:BLOCK]
        is_normalisation = tensor.ndim == 1 and name.endswith("weight")
        start.copy_(torch.ones_like(start) if is_normalisation else block[: len(start)])


def write_network(folder: Path, network: Any, sizes: Mapping[str, object]) -> None:
    """A network of diffusers in fp32, with its `config.json`."""
    with torch.device("meta"):
        model = network(**sizes)
    model.save_config(folder)
    write_weights(folder / "diffusion_pytorch_model.bin", model.state_dict(), torch.float32)


def write_llm(folder: Path, sizes: Mapping[str, object], dtype: torch.dtype) -> None:
    """A LLaMA with its `config.json`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**sizes, dtype=str(dtype).removeprefix("torch."))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = LlamaForCausalLM(config).state_dict()
    write_weights(folder / "pytorch_model.bin", shapes, dtype)


def write_text_tokenizer(folder: Path, added: Mapping[str, int]) -> None:
    """LLaMA's number of pieces: nano's, and others that texts do not have."""
    model = ModelProto()
    model.ParseFromString((ROOT / "pretrained/nano/seed_tokenizer" / MODEL).read_bytes())
    for index in range(len(model.pieces), N_TEXT):
        model.pieces.add(piece=f"▁▁{index}", score=-1e4 - index)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MODEL).write_bytes(model.SerializeToString())
    if added:
        (folder / ADDED).write_text(json.dumps(added))


def write_8b(pretrained: Path) -> None:
    """SEED-2's tokenizer, SEED-LLaMA 8B, and Stable Diffusion 2.1 unCLIP."""
    from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
        StableUnCLIPImageNormalizer,
    )

    # 1. The tokenizer.
    folder = pretrained / "seed_tokenizer"
    keys = "seed2_keys_full/inference_quantizer.default"
    encoder = "visual_encoder."
    write_text_tokenizer(folder, ImageVocabulary().added_tokens)
    write_weights(folder / "seed_quantizer.pt", recorded(keys, without=(encoder,)), torch.float32)
    write_weights(folder / "eva_vit_g.pth", recorded(keys, encoder), torch.float16)

    # 2. The language model, with the ids of its config.json.
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}
    sizes = {**LLAMA_7B, **ids, "vocab_size": ImageVocabulary().size, "use_cache": False}
    write_llm(pretrained / "seed_llama_8b_sft", sizes, torch.bfloat16)

    # 3. The de-tokenizer; the embedding of the empty prompt is a constant.
    folder = pretrained / "stable-diffusion-2-1-unclip"
    write_network(folder / "unet", UNet2DConditionModel, UNET)
    write_network(folder / "vae", AutoencoderKL, VAE)
    StableUnCLIPImageNormalizer(1024).save_pretrained(folder / "image_normalizer")
    scheduler = DDIMScheduler(**BETA, prediction_type="v_prediction", clip_sample=False)
    scheduler.save_pretrained(folder / "scheduler")
    noising = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    noising.save_pretrained(folder / "image_noising_scheduler")


def sdxl_unet() -> Any:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**SDXL_UNET)


def write_sdxl(folder: Path, scheduler: Any) -> None:
    """SDXL base 1.0 without the weights of its U-Net."""
    from diffusers import AutoencoderKL

    write_network(folder / "vae", AutoencoderKL, SDXL_VAE)
    sdxl_unet().save_config(folder / "unet")
    scheduler.save_pretrained(folder / "scheduler")


def write_seed_x(pretrained: Path) -> None:
    """SEED-X-I: LLaMA2-13B in fp32, as published; resamplers, vision encoder, adapter of SDXL."""
    from diffusers import EulerDiscreteScheduler

    # 1. The language model and its agent.
    vocabulary = SeedXVocabulary()
    tokenizer = pretrained / "cvlm_llama2_tokenizer_100img_and_224loc_addpatch"
    write_text_tokenizer(tokenizer, vocabulary.added_tokens)
    sizes = {**LLAMA_13B, "vocab_size": vocabulary.size, "rms_norm_eps": 1e-5}
    write_llm(pretrained / "seed_x_i/llm", sizes, torch.float32)
    agent = recorded("seedx_keys_full/multimodal_model_with_llm", without=("llm.",))
    write_weights(pretrained / "seed_x_i/agent/pytorch_model.bin", agent, torch.float32)

    # 2. What reads and draws images.
    encoder = recorded("seedx_keys_full/visual_encoder")
    write_weights(pretrained / "QwenViT/qwen_vit_G.pt", encoder, torch.bfloat16)
    adapter = dict(recorded("seedx_keys_full/detokenizer_resampler"))
    adapter |= {f"unet.{name}": shape for name, shape in sdxl_unet().state_dict().items()}
    file = pretrained / "seed_detokenizer/first_stage/pytorch_model.bin"
    write_weights(file, adapter, torch.float32)
    scheduler = EulerDiscreteScheduler(**BETA, steps_offset=1, timestep_spacing="leading")
    write_sdxl(pretrained / "stable-diffusion-xl-base-1.0", scheduler)


def write_lavit(pretrained: Path) -> None:
    """LaVIT-7B-v2 with its decoder of 1024 pixels, without safety checker."""
    from diffusers import DDIMScheduler

    from seed_multimodal.models.lavit.checkpoints import ENCODER

    # 1. The language model, and the second token merger.
    folder = pretrained / "LaVIT-7B-v2"
    keys = "lavit_keys_full/visual_tokenizer"
    write_text_tokenizer(folder / "language_model", {})
    sizes = {**LLAMA_7B, "vocab_size": LavitVocabulary().size, "rms_norm_eps": 1e-5}
    write_llm(folder / "language_model", sizes, torch.bfloat16)
    codec = recorded(keys, without=(ENCODER, "vit_proj."))
    prefixes = ("causal_encoder.", "vit_proj.")
    merger = {name: v for name, v in codec.items() if name.startswith(prefixes)}
    write_weights(folder / "language_model/visual_weight.bin", merger, torch.float32)

    # 2. The tokenizer.
    tokenizer = folder / "visual_tokenizer"
    write_weights(tokenizer / "eva_vitg_psz14.bin", recorded(keys, ENCODER), torch.float16)
    write_weights(tokenizer / "tokenizer_encoder.bin", codec, torch.float32)
    decoder = recorded("lavit_keys_full/decoder_highres")
    write_weights(tokenizer / "highres_tokenizer_decoder.bin", decoder, torch.float32)

    # 3. The pixel decoder.
    pixels = folder / "highres_pixel_decoding"
    write_sdxl(pixels, DDIMScheduler(clip_sample=False, steps_offset=1))
    file = pixels / "unet/diffusion_pytorch_model.bin"
    write_weights(file, sdxl_unet().state_dict(), torch.float16)


MODELS: dict[str, Callable[[Path], None]] = {
    "8b": write_8b,
    "seed-x-i": write_seed_x,
    "lavit": write_lavit,
}

if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    MODELS[sys.argv[1]](Path(sys.argv[2]))
