"""What the lines that begin with a finished nano (nano-x, nano-lavit) have in common: a small U-Net of SDXL's kind, and
how they hand over to the applications and take back what these trained."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from seed_multimodal.errors import CheckpointError
from seed_multimodal.training.loop_settings import StageSettings
from seed_multimodal.training.stage import read_record
from seed_nano.train.unet import TRAIN_STEPS, cosine_betas
from seed_nano.train.workspace import Workspace, read_part

FINAL_SIGNAL = 0.98


def trainer_settings(space: Workspace, settings: StageSettings) -> dict[str, Any]:
    """Section `trainer` of a stage that one of the applications trains."""
    return {"max_steps": settings.steps, "gradient_accumulation_steps": settings.accumulate,
            "precision": settings.precision, "max_grad_norm": settings.clip,
            "seed": space.config.seed + settings.seed, "device": space.config.device,
            "dataloader_num_workers": space.config.workers, "logging_steps": settings.log_every,
            "save_steps": settings.save_every_steps or max(1, settings.steps // 10), "save_total_limit": 1,
            "report_to": ["tensorboard"] if settings.tensorboard else []}


def write_unet(folder: Path, autoencoder: Path, image_size: int, channels: list[int], heads: int, *, context: int,
               pooled: int, seed: int) -> None:
    """An untrained U-Net of SDXL's kind for latents of that autoencoder, and the scheduler, into a diffusion folder.

    Args:
        context, pooled: widths of prompt and pooled embeddings.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    vae = read_part(AutoencoderKL, autoencoder)
    levels, latent = len(channels), vae.config.latent_channels
    torch.manual_seed(seed)
    attends = [level == 1 or levels == 1 for level in range(levels)]
    UNet2DConditionModel(
        sample_size=image_size // 2**(len(vae.config.block_out_channels) - 1), in_channels=latent, out_channels=latent,
        down_block_types=tuple("CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attends)),
        block_out_channels=tuple(channels), layers_per_block=1, norm_num_groups=8, cross_attention_dim=context,
        attention_head_dim=heads, use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + pooled
        ).save_pretrained(folder / "unet")
    DDIMScheduler(num_train_timesteps=TRAIN_STEPS, trained_betas=cosine_betas(final_signal=FINAL_SIGNAL),
                  clip_sample=False, prediction_type="v_prediction", timestep_spacing="trailing",
                  set_alpha_to_one=True).save_pretrained(folder / "scheduler")


def trained_to_its_end(space: Workspace, name: str, steps: int, script: str) -> dict[str, Any]:
    """The record of a training by one of the applications.

    Raises:
        CheckpointError: it is not at its end.
    """
    file = space.work / name / "summary.json"
    record = read_record(file) if file.is_file() else {}
    if record.get("steps") != steps:
        raise CheckpointError(f"{file.parent}: {name} is not trained to its end; bash {script} continues it.")
    return record


def relative(place: Path, folder: Path) -> str:
    """A path as a file in a folder names it."""
    return Path(os.path.relpath(place.resolve(), folder.resolve())).as_posix()
