"""Stable Diffusion 1 in one file of the original layout (`sd-v1-4.ckpt`), without the hub.

The file is a pickle of a training program that holds more than tensors. Each object that is no
tensor becomes an empty placeholder: no code of the file is run (`torch_files`). diffusers converts
the U-Net and the autoencoder by the original's YAML configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from seed_multimodal.errors import CheckpointError, ConfigError, first_line
from seed_multimodal.nn.pretrained import load_diffusers_network
from seed_multimodal.progress import import_library
from seed_multimodal.state_dicts import assign_strictly, load_state_dict, tensors_below

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Params = dict[str, Any]  # `model.params` of an original YAML file

SUFFIXES = (".ckpt", ".safetensors")
# The U-Net's first layer: its number of rows is the width of the U-Net.
FIRST_LAYER = "model.diffusion_model.input_blocks.0.0.weight"
TEXT_PREFIX = "cond_stage_model.transformer.text_model."  # of the text encoder's tensors
PARAMS = "model.params"  # of the sizes in a YAML file
V1 = Path(__file__).with_name("v1-inference.yaml")  # Stable Diffusion 1's sizes


def load_single_file(
    file: Path, dtype: torch.dtype, config: str | Path | None = None
) -> dict[str, Any]:
    """The parts of Stable Diffusion, as arguments of `StableDiffusionDetokenizer`; the autoencoder
    is only its decoder, and a file may have no text encoder.

    config: the original's YAML file; None: `V1`.

    Raises:
        CheckpointError: not such a file, or another model's.
        ConfigError: an unusable `config`.
    """
    params = _read_config(V1)
    if config is not None:
        params |= _read_config(Path(config))
    tensors = load_state_dict(file, mapped=True, placeholders=True)

    # 1. A file of a Stable Diffusion with the configuration's width.
    width = params["unet_config"]["params"]["model_channels"]
    first_layer = tensors.get(FIRST_LAYER)
    if first_layer is None or len(first_layer) != width:
        content = "no U-Net of Stable Diffusion"
        if first_layer is not None:
            content = f"a U-Net of width {len(first_layer)}"
        raise CheckpointError(
            f"{file}: holds {content}, where width {width} is expected (demo_recon.py: --config "
            "YAML)."
        )

    # 2. Its parts; the autoencoder only draws.
    diffusers = import_library("diffusers")
    unet = _convert(diffusers.UNet2DConditionModel, "unet", tensors, params, file, dtype)
    vae = _convert(diffusers.AutoencoderKL, "vae", tensors, params, file, dtype)
    vae.encoder = None
    vae.quant_conv = None
    scheduler = diffusers.PNDMScheduler(  # the original's PLMS
        num_train_timesteps=params["timesteps"],
        beta_start=params["linear_start"],
        beta_end=params["linear_end"],
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return {
        "denoiser": unet,
        "vae": vae,
        "scheduler": scheduler,
        "text_encoder": _text_encoder(tensors, params, file, dtype),
    }


def _read_config(file: Path) -> Params:
    """`model.params` of an original YAML file."""
    from omegaconf import OmegaConf

    from seed_multimodal.config import load_yaml

    params = OmegaConf.select(load_yaml(file), PARAMS)
    sections = {"unet_config", "first_stage_config"}
    if not OmegaConf.is_dict(params) or not sections <= params.keys():
        raise ConfigError(
            f"{file}: {PARAMS} must hold unet_config and first_stage_config, as v1-inference.yaml."
        )
    sizes: Params = OmegaConf.to_container(params)  # type: ignore[assignment]
    return sizes


def _convert(
    network_class: Any,
    name: str,
    tensors: dict[str, Tensor],
    params: Params,
    file: Path,
    dtype: torch.dtype,
) -> nn.Module:
    """The U-Net or the autoencoder; name: of diffusers' functions."""
    library = import_library("diffusers.loaders.single_file_utils")
    read_sizes = getattr(library, f"create_{name}_diffusers_config_from_ldm")
    rename = getattr(library, f"convert_ldm_{name}_checkpoint")
    config = read_sizes({"model": {"params": params}}, tensors)
    try:
        state = rename(dict(tensors), config)
    except KeyError as error:  # another model's file
        raise CheckpointError(
            f"{file}: not Stable Diffusion 1's {name} ({first_line(error)})."
        ) from error
    return load_diffusers_network(network_class, config, state, f"{file}: {name}", dtype)


def _text_encoder(
    tensors: Mapping[str, Tensor], params: Params, file: Path, dtype: torch.dtype
) -> PreTrainedModel | None:
    """CLIP's text model; None: the file has no text encoder."""
    from transformers import CLIPTextConfig, CLIPTextModel

    state = tensors_below(tensors, TEXT_PREFIX)
    if not state:
        return None
    model = CLIPTextModel(CLIPTextConfig(**params["text_encoder"])).to(dtype)
    assign_strictly(model, state, file, allow_unexpected=["*position_ids"])
    return model.eval()
