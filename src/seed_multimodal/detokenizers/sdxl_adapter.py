"""SEED-X's SDXL adapter: an SDXL U-Net whose text conditions a resampler makes from visual embeddings.

Two stages were released, each as one file of `unet.*` (1,680 keys, the complete U-Net) and `resampler.*` (62):

* the first draws from embeddings alone: 4 input channels;
* the second reads the latents of a condition picture, too: 8 input channels (editing, faithful reconstruction). Its
  first convolution is the first stage's with zeros for the new channels (`add_condition_channels`), so that training
  starts from a model that draws as before. The released code forgot to copy that convolution's bias.

How it is trained: `sdxl_training.py`; how it draws: `sdxl.py`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from seed_multimodal.detokenizers.sdxl_resampler import ResamplerSizes, ResamplerXLV2
from seed_multimodal.disk import read_json_object, replace_text
from seed_multimodal.errors import CheckpointError, ConfigError, first_line
from seed_multimodal.hub import SDXL_ADAPTER_WHERE, SDXL_WHERE, find_file
from seed_multimodal.settings import check_value, read_settings
from seed_multimodal.weights import LoadReport, assign_strictly, load_state_dict, save_state_dict

WEIGHTS, SIZES = "model.safetensors", "resampler.json"
FILES = (WEIGHTS, "pytorch_model.safetensors", "pytorch_model.bin")
FIRST_LAYER = "unet.conv_in.weight"
Trained = Literal["key_value", "all"]


class SDXLAdapter(nn.Module):
    """U-Net and resampler, the released checkpoints' two parts.

    Args:
        unet: diffusers' `UNet2DConditionModel` of SDXL's kind, with 4 input channels, or 8 to read a condition picture.

    Raises:
        ConfigError: the U-Net has not SDXL's conditions, or they have other widths than the resampler's results.

    Attributes:
        load_report: what the loader read into the model.
    """

    load_report: LoadReport | None = None

    def __init__(self, unet: Any, resampler: ResamplerXLV2) -> None:
        super().__init__()
        self.unet, self.resampler = unet, resampler
        config, sizes = unet.config, resampler.sizes
        if config.addition_embed_type != "text_time":
            raise ConfigError(f"The U-Net is none of SDXL's kind: its addition_embed_type is "
                              f"{config.addition_embed_type!r}, not 'text_time'.")
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        for what, made, read in (("prompt embeddings", sizes.prompt_dim, config.cross_attention_dim),
                                 ("pooled embeddings", sizes.output2_dim, pooled)):
            if made != read:
                raise ConfigError(f"The resampler makes {what} of width {made}, but the U-Net reads width {read}.")
        if config.in_channels not in (config.out_channels, 2 * config.out_channels):
            raise ConfigError(f"The U-Net has {config.in_channels} input channels; an adapter has "
                              f"{config.out_channels}, or {2 * config.out_channels} to read a condition picture.")

    @property
    def latent_channels(self) -> int:
        """Channels C of the latents that are drawn."""
        return int(self.unet.config.out_channels)

    @property
    def reads_condition(self) -> bool:
        """Whether this is the second stage, which reads the latents of a condition picture."""
        return int(self.unet.config.in_channels) > self.latent_channels

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, image_embeds: Tensor, time_ids: Tensor,
                condition_latents: Tensor | None = None) -> Tensor:
        """The U-Net's prediction `[B, C, h, w]`.

        Args:
            noisy_latents: `[B, C, h, w]`; timesteps: `[B]`. image_embeds: `[B, N, W]`.
            time_ids: `[B, 6]`, SDXL's original size, crop and target size (`size_ids`).
            condition_latents: `[B, C, h, w]` of the condition picture, for the second stage; None stands for zeros.

        Raises:
            ConfigError: condition latents for the first stage.
        """
        noisy_latents = noisy_latents.to(self.unet.dtype)  # under DeepSpeed the weights are in half precision
        prompt, pooled = self.resampler(image_embeds.to(self.resampler.latents.dtype))
        if self.reads_condition:
            condition = torch.zeros_like(noisy_latents) if condition_latents is None else condition_latents
            noisy_latents = torch.cat([noisy_latents, condition.to(noisy_latents.dtype)], dim=1)
        elif condition_latents is not None:
            raise ConfigError("This adapter is of the first stage and reads no condition picture.")
        return self.unet(noisy_latents, timesteps, encoder_hidden_states=prompt,
                         added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids}).sample

    def add_condition_channels(self) -> None:
        """Make a first stage a second one that draws as before, whatever the condition picture; else nothing."""
        if not self.reads_condition:
            self.unet.conv_in = widened(self.unet.conv_in, 2 * self.latent_channels)
            self.unet.register_to_config(in_channels=2 * self.latent_channels)

    def set_trainable(self, which: Trained = "key_value") -> list[nn.Parameter]:
        """Choose what is trained, switch `requires_grad` accordingly, and give those parameters.

        The resampler always is. "key_value" (the first stage by the paper: training the whole U-Net distorts details):
        the keys and values of the U-Net's attentions, and its first convolution if a condition picture is read. The
        released code handed them to the optimiser without ever switching them on. "all": the whole U-Net (the released
        second stage).
        """
        check_value(Trained, which, "What is trained")
        for name, parameter in self.unet.named_parameters():
            key_value = name.split(".")[-2] in ("to_k", "to_v")
            widened = self.reads_condition and name.startswith("conv_in.")
            parameter.requires_grad_(which == "all" or key_value or widened)
        self.resampler.requires_grad_(True)
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    @classmethod
    def from_pretrained(cls, checkpoint: str | Path, sdxl: str | Path, *, device: str | torch.device = "cpu",
                        dtype: torch.dtype = torch.float32, sizes: ResamplerSizes | None = None) -> SDXLAdapter:
        """An adapter in eval mode; its `load_report` counts what was read.

        Args:
            checkpoint: a `.bin` or `.safetensors` file, or the folder (or hub name) that holds one; `resampler.json`
                beside it gives the resampler's sizes, released ones otherwise.
            sdxl: SDXL's diffusers folder: only `unet/config.json` is read, the weights are in the checkpoint.
            sizes: of the resampler, where no `resampler.json` gives them.

        Raises:
            CheckpointError: a file that is not there, damaged, not complete, or of an adapter of another size.
        """
        from diffusers import UNet2DConditionModel

        file = find_file(checkpoint, FILES, SDXL_ADAPTER_WHERE)
        listed = file.parent / SIZES
        sizes = (sizes or ResamplerSizes()) if not listed.is_file() else read_settings(
            ResamplerSizes, read_json_object(listed, ConfigError), str(listed))
        config = read_json_object(Path(sdxl) / "unet" / "config.json", CheckpointError, SDXL_WHERE)
        state = load_state_dict(file, mapped=True)
        try:
            with torch.device("meta"):
                unet: Any = UNet2DConditionModel.from_config({**config, "in_channels": _input_channels(state, file)})
                adapter = cls(unet, ResamplerXLV2(sizes)).to(dtype)
        except (ConfigError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise CheckpointError(f"{file}: does not belong to the U-Net that {sdxl}/unet/config.json describes "
                                  f"({first_line(error)}).") from error
        adapter.load_report = assign_strictly(adapter, state, file, foreign=True, device=device)
        return adapter.eval()

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Write the weights (converted to `dtype`) and the resampler's sizes into a folder, for `from_pretrained`."""
        home = Path(folder)
        save_state_dict({name: value.to(dtype or value.dtype) for name, value in self.state_dict().items()},
                        home / WEIGHTS)
        replace_text(home / SIZES, json.dumps(dataclasses.asdict(self.resampler.sizes), indent=1) + "\n")
        return home


def widened(first: nn.Conv2d, channels: int) -> nn.Conv2d:
    """A convolution of that many input channels that gives what `first` gives, whatever is in the new channels."""
    weight = first.weight
    made = nn.Conv2d(channels, first.out_channels, first.kernel_size, first.stride, first.padding,  # type: ignore[arg-type]
                     device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        made.weight.zero_()
        made.weight[:, :first.in_channels] = weight
        if made.bias is not None and first.bias is not None:
            made.bias.copy_(first.bias)
    return made


def size_ids(size: tuple[int, int], *, original: tuple[int, int] | None = None, crop: tuple[int, int] = (0, 0),
             count: int = 1) -> Tensor:
    """SDXL's size conditions `[count, 6]` (Podell et al. 2023, 2.2): original size, crop, target size.

    Args:
        size: (height, width) of the picture in pixels; original: of the file it was cut from, None for the same.
        crop: (top, left) of the cut.
    """
    return torch.tensor([[*(original or size), *crop, *size]], dtype=torch.float32).expand(count, -1)


def _input_channels(state: Mapping[str, Tensor], file: Path) -> int:
    """Of the U-Net in a checkpoint; 4: the first stage, 8: the second."""
    first = state.get(FIRST_LAYER)
    if first is None or first.ndim != 4:
        raise CheckpointError(f"{file}: no SDXL adapter: it holds no tensor {FIRST_LAYER!r}; {SDXL_ADAPTER_WHERE}.")
    return int(first.shape[1])
