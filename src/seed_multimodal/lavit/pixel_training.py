"""Training of LaVIT's pixel decoders: a U-Net and a code decoder's heads learn to draw an image from its codes.

In the paper a U-Net that begins as Stable Diffusion's is conditioned by the features that a frozen code decoder makes
of an image's own codes, and learns by its own noise-prediction loss. Our choices, where neither paper nor repository
say more: some images lose their conditions (`dropout`), replaced by what guidance steers away from; the heads
(`unet_proj*`, `unet_attnpool`) are trained with the U-Net, all before them is frozen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seed_multimodal.diffusion.base import empty_prompt
from seed_multimodal.diffusion.training import Noised, Trained, train_unet
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.lavit.decoder import CodeDecoder, Head
from seed_multimodal.lavit.diffusion import EMPTY_TEXT, LavitDetokenizer, is_sdxl, read_empty_text, unconditional
from seed_multimodal.settings import check_settings, check_value, setting

HEADS = ("unet_proj", "unet_attnpool")  # beginnings of the heads' names


class TrainedPixels(nn.Module):
    """U-Net and code decoder, whose blocks are frozen; null_embeds: as of `LavitDetokenizer`.

    Raises `ConfigError` where the decoder makes other conditions than the U-Net reads.
    """

    null_embeds: Tensor | None

    def __init__(self, unet: Any, decoder: CodeDecoder, null_embeds: Tensor | None = None) -> None:
        super().__init__()
        self.unet, self.decoder = unet, decoder
        self.register_buffer("null_embeds", null_embeds, persistent=False)
        made, read = (decoder.config.head, decoder.config.context_dim), (head_of(unet), unet.config.cross_attention_dim)
        if made != read:
            raise ConfigError(f"The code decoder makes conditions {made}, but the U-Net reads {read}.")

    def forward(self, noisy_latents: Tensor, steps: Tensor, rows: Sequence[Tensor], time_ids: Tensor, without: Tensor
                ) -> Tensor:
        """The U-Net's prediction `[B, C, h, w]`, from the codebook's rows `[n, C]` of each image.

        `time_ids`: `[B, 6]` (`size_ids`); `without`: bool `[B]`, which images have no conditions.
        """
        with torch.no_grad():
            features = self.decoder.features(rows)
        made, dtype = self.decoder.conditions(features), self.unet.dtype
        away, mask = unconditional(made.prompt_embeds, self.null_embeds)
        conditions: dict[str, Any] = {}
        if made.pooled is not None:
            pooled = made.pooled.masked_fill(without[:, None], 0)
            conditions["added_cond_kwargs"] = {"text_embeds": pooled.to(dtype), "time_ids": time_ids}
        if mask is not None:
            conditions["encoder_attention_mask"] = mask | ~without[:, None]
        prompt = torch.where(without[:, None, None], away, made.prompt_embeds).to(dtype)
        return self.unet(noisy_latents.to(dtype), steps, encoder_hidden_states=prompt, **conditions).sample

    def set_trainable(self, which: Trained = "all") -> None:
        """Switch on the heads and, of the U-Net, all or the keys and values of its attentions ("key_value")."""
        train_unet(self.unet, check_value(Trained, which, "What is trained"))
        for name, parameter in self.decoder.named_parameters():
            parameter.requires_grad_(name.startswith(HEADS))


@dataclass(frozen=True)
class LavitPixelLoss:
    """The loss of a training step; dropout: share without conditions; min_snr: as of `Noised.draw`."""

    dropout: float = setting(0.1, least=0, most=1)
    min_snr: float | None = setting(None, above=0)

    def __post_init__(self) -> None:
        check_settings(self, "pixel loss")

    def __call__(self, model: nn.Module, schedule: Any, latents: Tensor, rows: Sequence[Tensor], time_ids: Tensor, *,
                 generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Losses (`Noised.losses`) of `TrainedPixels`, or a wrapper of it, at random time steps; latents are multiplied
        by the autoencoder's scaling factor, `generator` (on the CPU) makes all random choices."""
        without = torch.rand(len(latents), generator=generator) < self.dropout
        noised = Noised.draw(schedule, latents, self.min_snr, generator)
        return noised.losses(model(noised.latents, noised.steps, rows, time_ids, without.to(latents.device)))


def head_of(unet: Any) -> Head:
    """The head that makes conditions for a U-Net."""
    return "highres" if is_sdxl(unet) else "lowres"


def load_empty_text(place: Path, width: int) -> Tensor:
    """The empty text's embeddings `[1, L, width]` of Stable Diffusion 1's kind: from their file, or computed."""
    if (place / EMPTY_TEXT).is_file() or not (place / "text_encoder").is_dir():
        return read_empty_text(place, width)
    encoder, tokenizer = (LavitDetokenizer.load_part(place, name) for name in ("text_encoder", "tokenizer"))
    with torch.no_grad():
        return empty_prompt(encoder, tokenizer, torch.device("cpu"))


def decoder_for(unet: Any, place: str | Path, seed: int = 0) -> tuple[CodeDecoder, bool]:
    """A code decoder with heads for this U-Net, and whether they are new: stage 1's may be for the other kind."""
    head, read = head_of(unet), unet.config
    try:
        return CodeDecoder.from_pretrained(place, head=head), False
    except CheckpointError:
        found = CodeDecoder.from_pretrained(place)
        if found.config.head == head:
            raise
    pooled = read.projection_class_embeddings_input_dim - 6 * read.addition_time_embed_dim if is_sdxl(unet) else 0
    config = dataclasses.replace(found.config, head=head, prompt_dim=read.cross_attention_dim - pooled,
                                 pooled_dim=pooled or found.config.pooled_dim)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = CodeDecoder(config)
    decoder.load_state_dict({name: value for name, value in found.state_dict().items() if not name.startswith(HEADS)},
                            strict=False)
    return decoder.eval(), True
