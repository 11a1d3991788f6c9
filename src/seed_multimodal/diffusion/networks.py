"""Networks of diffusers folders: denoisers (U-Nets, transformers) and autoencoders, by the
`_class_name` of their `config.json`.

A denoiser of another class is a row of `DENOISERS`: its folder, which says how it is called.
Classes that read packed latents (Flux) need more: sizes and unit of their images, and packing in
`predict`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Required, TypedDict

import torch
from torch import Tensor, nn

from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.settings import check_value, nearest

# ---- denoisers


class DenoiserConditions(TypedDict, total=False):
    """What a denoiser reads besides latents and time step, with R · B rows for R runs of each
    image."""

    encoder_hidden_states: Required[Tensor]  # prompt embeddings [R·B, N, D]
    encoder_attention_mask: Tensor  # [R·B, N]
    class_labels: Tensor  # of unCLIP's U-Net [R·B, 2 E]
    added_cond_kwargs: dict[str, Tensor]  # of SDXL's U-Net: pooled embeddings and sizes
    pooled_projections: Tensor  # of Stable Diffusion 3's transformer [R·B, P]
    # Of GLM-Image's transformer.
    prior_token_id: Tensor  # a code of each patch [B, N]
    prior_token_drop: Tensor  # patches without, bool [B, N]
    target_size: Tensor  # height and width [B, 2]
    crop_coords: Tensor  # top and left [B, 2]
    kv_caches: Any  # of source images
    image_rotary_emb: tuple[Tensor, ...]  # of the patches


class DenoiserKind(NamedTuple):
    """How a class of diffusers is stored."""

    folder: str
    context_dim: str  # the size of its config that is the width of `encoder_hidden_states`


DENOISERS = {
    "UNet2DConditionModel": DenoiserKind("unet", "cross_attention_dim"),
    "SanaTransformer2DModel": DenoiserKind("transformer", "caption_channels"),
    "SD3Transformer2DModel": DenoiserKind("transformer", "joint_attention_dim"),
    "GlmImageTransformer2DModel": DenoiserKind("transformer", "text_embed_dim"),
}


def denoiser_kind(denoiser: nn.Module) -> DenoiserKind:
    """The row of a loaded network."""
    return DENOISERS[type(denoiser).__name__]


def predict(
    denoiser: nn.Module, latents: Tensor, step: Tensor, conditions: DenoiserConditions
) -> Tensor:
    """A denoiser's prediction `[B, C, h, w]` for noisy latents, in its precision.

    step: the scheduler's time step, one for all or one each.
    """
    # SDXL's U-Net converts `added_cond_kwargs` itself: sizes stay exact.
    converted = conditions.copy()
    for name in ("encoder_hidden_states", "class_labels", "pooled_projections"):
        if name in conditions:
            converted[name] = conditions[name].to(denoiser.dtype)
    latents = latents.to(denoiser.dtype)
    if DENOISERS[type(denoiser).__name__].folder == "unet":
        return denoiser(latents, step, **converted).sample

    # A transformer. SANA has a scale; a variance, if it has learned one, is left out.
    steps = step.expand(len(latents)) * denoiser.config.get("timestep_scale", 1.0)
    prediction = denoiser(latents, timestep=steps, **converted).sample
    return prediction[:, : latents.shape[1]]


def context_dim(denoiser: nn.Module) -> int:
    """Width of the prompt embeddings that a denoiser reads."""
    return int(denoiser.config[denoiser_kind(denoiser).context_dim])


def is_sdxl(denoiser: nn.Module) -> bool:
    """Whether a denoiser reads pooled embeddings and sizes, as SDXL's U-Net."""
    return bool(denoiser.config.get("addition_embed_type") == "text_time")


def pooled_dim(denoiser: nn.Module) -> int:
    """Width of the one vector that a denoiser reads besides prompt embeddings; 0: none."""
    config = denoiser.config
    if is_sdxl(denoiser):
        n_size_inputs = 6 * config.addition_time_embed_dim
        return int(config.projection_class_embeddings_input_dim - n_size_inputs)
    if config.get("class_embed_type") == "projection":  # unCLIP
        return int(config.projection_class_embeddings_input_dim)
    return int(config.get("pooled_projection_dim") or 0)


def size_ids(
    size: tuple[int, int],
    *,
    original: tuple[int, int] | None = None,
    crop: tuple[int, int] = (0, 0),
    count: int = 1,
) -> Tensor:
    """SDXL's conditions `[count, 6]` (Podell et al.

    2023, 2.2): original size, crop (top, left), target size.
    """
    ids = torch.tensor([[*(original or size), *crop, *size]], dtype=torch.float32, device="cpu")
    return ids.expand(count, -1)


def conditions_of(
    denoiser: nn.Module,
    tokens: Tensor,
    pooled: Tensor | None = None,
    time_ids: Tensor | None = None,
    mask: Tensor | None = None,
) -> DenoiserConditions:
    """The conditions by the names that a denoiser has for them.

    tokens: prompt embeddings `[B, N, D]`; mask: those to attend to `[B, N]`, None: all.
    pooled: `[B, pooled_dim]`, not read by a denoiser without.
    time_ids: sizes for SDXL `[B, 6]`, see `size_ids`.
    """
    conditions: DenoiserConditions = {"encoder_hidden_states": tokens}
    if mask is not None:
        conditions["encoder_attention_mask"] = mask
    config = denoiser.config
    if pooled is None:
        return conditions
    if config.get("addition_embed_type") == "text_time":
        assert time_ids is not None
        conditions["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": time_ids}
    elif config.get("class_embed_type") == "projection":
        conditions["class_labels"] = pooled
    elif config.get("pooled_projection_dim"):
        conditions["pooled_projections"] = pooled
    return conditions


def with_unconditional(
    conditions: DenoiserConditions, null: DenoiserConditions, n_runs: int
) -> DenoiserConditions:
    """Conditions of R runs for guidance: unconditional ones, and those of the images last."""

    def repeat(rows: Tensor, null_rows: Tensor) -> Tensor:
        return torch.cat([null_rows] * (n_runs - 1) + [rows])

    combined: DenoiserConditions = _combine(repeat, conditions, null)
    return combined


def drop_conditions(
    conditions: DenoiserConditions, null: DenoiserConditions, without: Tensor
) -> DenoiserConditions:
    """Conditions of training: unconditional ones in the rows where `without` `[B]` is true."""

    def drop(rows: Tensor, null_rows: Tensor) -> Tensor:
        return torch.where(without.view(-1, *[1] * (rows.ndim - 1)), null_rows, rows)

    combined: DenoiserConditions = _combine(drop, conditions, null)
    return combined


def _combine(function: Callable[[Tensor, Tensor], Tensor], conditions: Any, null: Any) -> Any:
    """The function of each tensor of both conditions."""
    if isinstance(conditions, Tensor):
        return function(conditions, null)
    return {name: _combine(function, value, null[name]) for name, value in conditions.items()}


def compile_blocks(denoiser: nn.Module) -> None:
    """Fuse the attentions' projections if they can be, and compile each block that repeats."""
    if hasattr(denoiser, "fuse_qkv_projections"):
        denoiser.fuse_qkv_projections()
    if denoiser._repeated_blocks:
        denoiser.compile_repeated_blocks()
        return
    # Transformers of which diffusers does not name the blocks.
    for block in denoiser.transformer_blocks:
        block.compile()


def denoiser_folder(folder: Path) -> Path:
    """The sub-folder of a diffusion folder's denoiser."""
    transformer = folder / "transformer"
    return transformer if transformer.is_dir() else folder / "unet"


# ---- autoencoders

AUTOENCODERS = ("AutoencoderKL", "AutoencoderDC", "AutoencoderTiny")
NO_VARIANCE = -30.0  # log variance of latents that are not a distribution: the least of diffusers'


def spatial_factor(vae: nn.Module) -> int:
    """Pixels of a latent's side."""
    config = vae.config
    blocks = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    return int(2 ** (len(blocks) - 1))


def encode_moments(vae: nn.Module, pixels: Tensor) -> Tensor:
    """Pixels in -1…1 → mean and log variance of their unscaled latents `[N, 2 C, h, w]`."""
    encoded = vae.encode(pixels)
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.parameters
    latents: Tensor = encoded[0]
    return torch.cat([latents, torch.full_like(latents, NO_VARIANCE)], dim=1)


def scaled_latents(vae: nn.Module, latents: Tensor) -> Tensor:
    """An autoencoder's latents as a denoiser's: shifted and scaled, or standardised by channel."""
    config = vae.config
    if config.get("latents_mean") is not None:
        mean = latents.new_tensor(config.latents_mean)[:, None, None]
        return (latents - mean) / latents.new_tensor(config.latents_std)[:, None, None]
    return (latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor


def unscaled_latents(vae: nn.Module, latents: Tensor) -> Tensor:
    """The inverse of `scaled_latents`."""
    config = vae.config
    if config.get("latents_mean") is not None:
        mean = latents.new_tensor(config.latents_mean)[:, None, None]
        return latents * latents.new_tensor(config.latents_std)[:, None, None] + mean
    return latents / config.scaling_factor + (config.get("shift_factor") or 0.0)


def check_statistics(vae: nn.Module) -> None:
    """Raise ConfigError: means and deviations that are not one of each channel."""
    statistics = [vae.config.get(name) for name in ("latents_mean", "latents_std")]
    if statistics == [None, None]:
        return
    for row in statistics:
        channels = check_value(list[float], row, "vae: latents_mean and latents_std")
        if len(channels) != vae.config.latent_channels:
            raise ConfigError(
                f"vae: latents_mean and latents_std have {len(channels)} values for "
                f"{vae.config.latent_channels} channels."
            )


# ---- both


def size_unit(denoiser: nn.Module, vae: nn.Module) -> int:
    """Pixels of which an image's height and width are multiples."""
    # A transformer reads patches of latents.
    patch = int(denoiser.config.get("patch_size") or 1)
    return max(8, spatial_factor(vae) * patch)


def check_class(
    name: object, allowed: Sequence[str], label: str | Path, key: str = "_class_name"
) -> str:
    """The name of a class in a configuration. Raises CheckpointError: not one of these."""
    if name not in allowed:
        raise CheckpointError(
            f"{label}: {key} is {name!r}{nearest(str(name), allowed)}; "
            f"{', '.join(allowed)} can be loaded."
        )
    return str(name)
