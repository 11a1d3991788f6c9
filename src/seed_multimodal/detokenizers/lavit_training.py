"""What LaVIT's pixel decoders learn, without a loop: a U-Net and a code decoder's heads draw a picture from its codes.

The paper says: a U-Net that begins as Stable Diffusion's is conditioned by the features that the frozen code decoder
makes of a picture's own codes, and learns by its own noise-prediction loss. Neither repository nor paper tell the
following, which are our choices:

* the conditions of some pictures are left out (`LavitPixelLoss.dropout`), as guidance needs it: what stands in their
  place is what drawing steers away from, zeros for a U-Net of SDXL's kind, the empty text's embeddings and nothing
  beside them for one of Stable Diffusion 1's;
* the heads (`unet_proj*`, `unet_attnpool`) are trained with the U-Net, all before them is frozen;
* `min_snr` weighs time steps, and a base model that predicts velocities is trained to do so, see `denoising.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seed_multimodal.detokenizers.denoising import Noised
from seed_multimodal.detokenizers.lavit import LavitPixels
from seed_multimodal.detokenizers.lavit_unconditional import UNCONDITIONAL, empty_text, is_sdxl, unconditional
from seed_multimodal.detokenizers.pipelines import refuse_unfilled
from seed_multimodal.detokenizers.sdxl_adapter import Trained
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.lavit.decoder import CodeDecoder, Head
from seed_multimodal.settings import check_settings, check_value, setting

HEADS = ("unet_proj", "unet_attnpool")  # beginnings of the heads' names


class TrainedPixels(nn.Module):
    """U-Net and code decoder, of which the blocks are frozen.

    Args:
        unet: diffusers' `UNet2DConditionModel` of SDXL's kind, or of Stable Diffusion 1's.
        nothing: for the latter the empty text's embeddings `[1, L, W]`; None: zeros.

    Raises:
        ConfigError: the decoder makes other conditions than the U-Net reads.
    """

    nothing: Tensor | None

    def __init__(self, unet: Any, decoder: CodeDecoder, nothing: Tensor | None = None) -> None:
        super().__init__()
        self.unet, self.decoder = unet, decoder
        self.register_buffer("nothing", nothing, persistent=False)
        made = head_sizes(decoder.config.head, decoder.config.prompt_dim, decoder.config.pooled_dim)
        if made != (read := read_sizes(unet)):
            raise ConfigError(f"The code decoder makes {made}, but the U-Net reads {read}.")

    def forward(self, noisy_latents: Tensor, steps: Tensor, rows: Sequence[Tensor], time_ids: Tensor, without: Tensor
                ) -> Tensor:
        """The U-Net's prediction `[B, C, h, w]`.

        Args:
            noisy_latents: `[B, C, h, w]`; steps: `[B]`. rows: of the codebook, `[n, C]` of each picture.
            time_ids: `[B, 6]` (`size_ids`), for a U-Net of SDXL's kind. without: bool `[B]`, without conditions.
        """
        with torch.no_grad():
            features = self.decoder.features(rows)
        made, dtype = self.decoder.conditions(features), self.unet.dtype
        nothing, mask = unconditional(made.prompt_embeds, self.nothing)
        prompt = torch.where(without[:, None, None], nothing, made.prompt_embeds)
        told: dict[str, Any] = {}
        if made.pooled is not None:
            pooled = made.pooled.masked_fill(without[:, None], 0)
            told["added_cond_kwargs"] = {"text_embeds": pooled.to(dtype), "time_ids": time_ids}
        if mask is not None:
            told["encoder_attention_mask"] = mask | ~without[:, None]
        return self.unet(noisy_latents.to(dtype), steps, encoder_hidden_states=prompt.to(dtype), **told).sample

    def set_trainable(self, which: Trained = "all") -> None:
        """Switch on the heads and, of the U-Net, all or the keys and values of its attentions ("key_value")."""
        check_value(Trained, which, "What is trained")
        for name, parameter in self.unet.named_parameters():
            parameter.requires_grad_(which == "all" or name.split(".")[-2] in ("to_k", "to_v"))
        for name, parameter in self.decoder.named_parameters():
            parameter.requires_grad_(name.startswith(HEADS))


@dataclass(frozen=True)
class LavitPixelLoss:
    """The loss of a training step.

    Attributes:
        dropout: share of the pictures without conditions; min_snr: cap γ of the time steps' weights, None for none.
    """

    dropout: float = setting(0.1, least=0, most=1)
    min_snr: float | None = setting(None, above=0)

    def __post_init__(self) -> None:
        check_settings(self, "pixel loss")

    def __call__(self, model: nn.Module, schedule: Any, latents: Tensor, rows: Sequence[Tensor], time_ids: Tensor, *,
                 generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Noise the latents at random time steps, and compare what the U-Net predicts.

        Args:
            model: `TrainedPixels`, or a wrapper of it (DDP) that is called alike; other arguments as of its `forward`.
            schedule: of `training_schedule`. latents: times the autoencoder's scaling factor.
            generator: on the CPU, of all random choices.

        Returns:
            As `Noised.losses`.
        """
        without = torch.rand(len(latents), generator=generator) < self.dropout
        noised = Noised.draw(schedule, latents, self.min_snr, generator)
        return noised.losses(model(noised.latents, noised.steps, rows, time_ids, without.to(latents.device)))


def head_sizes(head: Head, prompt: int, pooled: int) -> str:
    """What a head makes, in words."""
    if head == "lowres":
        return f"prompts of width {prompt}"
    return f"prompts of width {prompt + pooled} and pooled embeddings of width {pooled}"


def read_sizes(unet: Any) -> str:
    """What a U-Net reads, in the same words."""
    width, pooled = unet_widths(unet)
    return head_sizes("highres", width - pooled, pooled) if is_sdxl(unet) else head_sizes("lowres", width, 0)


def unet_widths(unet: Any) -> tuple[int, int]:
    """Width of a U-Net's prompt embeddings, and of its pooled ones (0: it reads none)."""
    config = unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim if is_sdxl(unet) else 0
    return int(config.cross_attention_dim), int(pooled)


def read_unet(place: Path) -> Any:
    """A diffusers folder's U-Net in float32. Raises CheckpointError: not there, or not complete."""
    from diffusers import UNet2DConditionModel

    if not place.is_dir():  # diffusers would take it for a name of the hub
        raise CheckpointError(f"{place}: there is no such folder; {LavitPixels.where}.")
    with LavitPixels.reading(place):
        unet = UNet2DConditionModel.from_pretrained(place, subfolder="unet", torch_dtype=torch.float32,
                                                    local_files_only=True)
    refuse_unfilled(unet, place / "unet")
    unet.register_to_config(_name_or_path="")  # else this machine's path is saved with the result
    return unet


def empty_text_of(place: Path, width: int) -> Tensor:
    """The empty text's embeddings `[1, L, width]` of a folder of Stable Diffusion 1's kind: kept there, or made by its
    text encoder. Raises CheckpointError: neither is there, or damaged."""
    if (place / UNCONDITIONAL).is_file() or not (place / "text_encoder").is_dir():
        return empty_text(place, width)
    from transformers import CLIPTextModel, CLIPTokenizer

    with LavitPixels.reading(place):
        tokenizer = CLIPTokenizer.from_pretrained(place / "tokenizer", local_files_only=True)
        encoder = CLIPTextModel.from_pretrained(place / "text_encoder", local_files_only=True)
        words = tokenizer([""], padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt")
        with torch.no_grad():
            return encoder(words["input_ids"]).last_hidden_state.float()


def decoder_for(unet: Any, place: str | Path, seed: int = 0) -> tuple[CodeDecoder, bool]:
    """A code decoder with heads for this U-Net, and whether they are new: those of stage 1 may be for the other kind.

    Args:
        place: as `CodeDecoder.from_pretrained`. seed: of new heads.

    Raises:
        CheckpointError: no decoder is there, or it is damaged.
    """
    head: Head = "highres" if is_sdxl(unet) else "lowres"
    try:
        return CodeDecoder.from_pretrained(place, head=head), False
    except CheckpointError:
        found = CodeDecoder.from_pretrained(place)
        if found.config.head == head:
            raise
    width, pooled = unet_widths(unet)
    config = dataclasses.replace(found.config, head=head, prompt_dim=width - pooled,
                                 pooled_dim=pooled or found.config.pooled_dim)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = CodeDecoder(config)
    made.load_state_dict({name: value for name, value in found.state_dict().items() if not name.startswith(HEADS)},
                         strict=False)
    return made.eval(), True
