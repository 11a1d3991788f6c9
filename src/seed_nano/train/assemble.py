"""Stages `start` and `assemble`: what is copied or written rather than trained, and the finished system folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from seed_multimodal.detokenizers.autoencoder import ELSEWHERE
from seed_multimodal.detokenizers.sdxl import LAYOUT
from seed_multimodal.disk import replace_text
from seed_multimodal.system_folder import join
from seed_multimodal.tokenizers.released import TOWER
from seed_multimodal.vision.shared_encoder import name_encoder, share_encoder
from seed_multimodal.weights import count_parameters, load_state_dict, save_state_dict
from seed_nano.train.unet import write_successor_unet
from seed_nano.train.workspace import PREFIX, LavitWorkspace, SuccessorWorkspace, Workspace, XWorkspace
from seed_nano.world.tasks import VERDICT_END

PIPELINE_INDEX = {
    "_class_name": "StableUnCLIPImg2ImgPipeline", "_diffusers_version": "0.39.0",
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    "image_normalizer": ["stable_diffusion", "StableUnCLIPImageNormalizer"],
    "image_noising_scheduler": ["diffusers", "DDPMScheduler"], "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": [None, None], "tokenizer": [None, None], "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
DRAWING = {"guidance": 1.0, "do_sample": False, "min_new_tokens": 2, "max_new_tokens": 17}
LAVIT_GENERATION = {"describe": {"num_beams": 1, "min_new_tokens": 1, "max_new_tokens": 48},
                    "ask": {"num_beams": 1, "min_new_tokens": 1, "max_new_tokens": 64},
                    "draw": DRAWING, "compose": DRAWING}


def start_nano(space: Workspace) -> dict[str, Any]:
    """The text tokenizer."""
    return {"words": len(space.words)}


def start_x(space: XWorkspace) -> dict[str, Any]:
    """nano's autoencoder, an untrained U-Net, the text tokenizer."""
    shutil.copytree(space.autoencoder, space.decoder_folder / "vae", dirs_exist_ok=True)
    prompt = space.config.unet.prompt
    write_successor_unet(space, prompt, prompt // 2, space.config.seed + 4)
    return {"words": len(space.words)}


def start_lavit(space: LavitWorkspace) -> dict[str, Any]:
    """Where nano's autoencoder is, an untrained U-Net, the text tokenizer."""
    write_successor_unet(space, space.decoder_sizes.context_dim, space.config.unet.pooled, space.config.seed + 5)
    _name_autoencoder(space)
    return {"words": len(space.words)}


def lavit_pixels(space: LavitWorkspace) -> dict[str, Any]:
    """The layout decoder, into the diffusion folder."""
    shutil.copytree(space.work / "layout", space.decoder_folder / LAYOUT, dirs_exist_ok=True)
    return {}


def assemble_nano(space: Workspace) -> dict[str, Any]:
    """Half precision, the vision encoder stored once, the pipeline's index, `system.json`."""
    decoder, size = space.decoder_folder, space.config.image_size
    replace_text(decoder / "model_index.json", json.dumps(PIPELINE_INDEX, indent=1))
    (decoder / "feature_extractor").mkdir(exist_ok=True)
    replace_text(decoder / "feature_extractor" / "preprocessor_config.json", json.dumps(
        {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": size}, "do_center_crop": True,
         "crop_size": {"height": size, "width": size}, "do_convert_rgb": True}, indent=1))
    replace_text(space.out / "system.json", json.dumps(
        {"tokenizer": "seed_tokenizer", "llm": "seed_llama", "detokenizer": "seed_tokenizer/diffusion_model",
         "template": "vicuna", "image_size": size,
         "transform": {"type": "clip", "keep_ratio": False, "interpolation": "bicubic"},
         "generation": {"do_sample": False, "max_new_tokens": 256}, "previews": [8, 16],
         "tasks": {"edit_words": 64, "answer_after": VERDICT_END}}, indent=1))
    sizes = _halved(space.out)
    share_encoder(decoder / "image_encoder", space.words_folder / "model.safetensors", TOWER)
    return sizes


def assemble_x(space: XWorkspace) -> dict[str, Any]:
    """The de-tokenizer with its layout decoder, half precision, `system.json`."""
    join("seed_x", space.out, {"detokenizer": space.work / "second" / "adapter"}, {
        "tuned": True, "grids": ["1x1", "2x2"], "edit_grids": ["1x1", "2x2"],
        "generation": {"max_new_tokens": 120, "do_sample": False},
        "tasks": {"draw_words": 0, "edit_words": 64, "answer_after": VERDICT_END}})
    shutil.copytree(space.work / "layout", space.out / "detokenizer" / LAYOUT, dirs_exist_ok=True)
    # A system in the folder of its nano names that one's autoencoder instead of keeping a copy.
    if space.autoencoder.resolve().is_relative_to(space.out.resolve().parent):
        shutil.rmtree(space.decoder_folder / "vae", ignore_errors=True)
        _name_autoencoder(space)
    return _halved(space.out)


def assemble_lavit(space: LavitWorkspace) -> dict[str, Any]:
    """Pixel decoder and code decoder, half precision, `system.json`, relative paths of nano's parts."""
    trained = space.work / "pixels" / "pixels"
    join("lavit", space.out, {"pixels/unet": trained / "unet", "decoder": trained / "decoder"},
         {"selection": "draw", "generation": LAVIT_GENERATION, "answer_after": VERDICT_END})
    _name_autoencoder(space)
    name_encoder(space.out / "tokenizer", space.nano / "model.safetensors", PREFIX)
    return _halved(space.out)


def _name_autoencoder(space: SuccessorWorkspace) -> None:
    folder = space.decoder_folder
    place = Path(os.path.relpath(space.autoencoder.resolve(), folder.resolve())).as_posix()
    replace_text(folder / ELSEWHERE, json.dumps({"folder": place}))


def _halved(out: Path) -> dict[str, Any]:
    """Rewrite float32 weights as float16 (loaders compute in float32 again); returns sizes in MB and parameters."""
    files = sorted(out.rglob("*.safetensors"))
    for file in files:
        tensors = load_state_dict(file)
        if any(value.dtype == torch.float32 for value in tensors.values()):
            with safe_open(file, framework="pt") as handle:
                metadata = dict(handle.metadata() or {})
            save_state_dict({name: value.half() if value.dtype == torch.float32 else value
                             for name, value in tensors.items()}, file, metadata)
    return {"weights_mb": round(sum(file.stat().st_size for file in files) / 1e6, 2),
            "parameters": sum(map(count_parameters, files)), "folder": str(out)}
