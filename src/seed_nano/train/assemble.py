"""Stage `assemble`: half-precision weights, the pipeline's index and `system.json`: the folder loads as a system."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from seed_multimodal.tokenizers.released import TOWER
from seed_multimodal.vision.shared_encoder import share_encoder
from seed_multimodal.weights import load_state_dict, save_state_dict
from seed_nano.train.workspace import Workspace
from seed_nano.world.verdicts import VERDICT_END


def assemble(space: Workspace) -> dict[str, Any]:
    """Finish the system folder (idempotent) and report its size in MB.

    Raises:
        CheckpointError: a part is not there.
    """
    out, decoder = space.out, space.decoder_folder
    for stage, folder in (("vae", decoder / "vae"), ("clip", decoder / "image_encoder"),
                          ("tokenizer", space.tokenizer_folder), ("unet2", decoder / "unet"),
                          ("llm", out / "seed_llama")):
        space.need(stage, folder / "config.json")
    (decoder / "model_index.json").write_text(json.dumps(PIPELINE_INDEX, indent=1))
    extractor = decoder / "feature_extractor"
    extractor.mkdir(exist_ok=True)
    size = space.config.image_size
    (extractor / "preprocessor_config.json").write_text(json.dumps(
        {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": size}, "do_center_crop": True,
         "crop_size": {"height": size, "width": size}, "do_convert_rgb": True}, indent=1))
    settings = {"tokenizer": "seed_tokenizer", "llm": "seed_llama", "detokenizer": "seed_tokenizer/diffusion_model",
                "template": "vicuna", "image_size": size,
                "transform": {"type": "clip", "keep_ratio": False, "interpolation": "bicubic"},
                "generation": {"do_sample": False, "max_new_tokens": 256}, "previews": [8, 16],
                "tasks": {"edit_words": 64, "answer_after": VERDICT_END}}
    (out / "system.json").write_text(json.dumps(settings, indent=1))
    for file in sorted(out.rglob("*.safetensors")):
        halve(file)
    share_encoder(decoder / "image_encoder", space.tokenizer_folder / "model.safetensors", TOWER)
    weights = sum(f.stat().st_size for f in out.rglob("*.safetensors"))
    return {"weights_mb": round(weights / 1e6, 2), "folder": str(out)}


def halve(file: Path) -> None:
    """Rewrite float32 tensors as float16, keeping metadata; loaders compute in float32 again."""
    tensors = load_state_dict(file)
    with safe_open(file, framework="pt") as handle:
        metadata = dict(handle.metadata() or {})
    if any(t.dtype == torch.float32 for t in tensors.values()):
        save_state_dict({n: t.half() if t.dtype == torch.float32 else t for n, t in tensors.items()}, file, metadata)


PIPELINE_INDEX = {
    "_class_name": "StableUnCLIPImg2ImgPipeline",
    "_diffusers_version": "0.39.0",
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    "image_normalizer": ["stable_diffusion", "StableUnCLIPImageNormalizer"],
    "image_noising_scheduler": ["diffusers", "DDPMScheduler"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": [None, None],
    "tokenizer": [None, None],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
