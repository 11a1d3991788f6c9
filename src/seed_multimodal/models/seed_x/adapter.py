"""SEED-X's SDXL adapter: a U-Net, and a resampler that turns visual embeddings into its prompt.

The resampler is a perceiver (Jaegle et al. 2021, as in IP-Adapter). Two stages were published, each
as one file of `unet.*` (1,680 keys) and `resampler.*` (62):

    first    draws from embeddings only (4 input channels)
    second   also reads the latents of a condition image (8 input channels)

The second's first convolution starts as the first's with zeros for the new channels; the original
code forgot to copy that convolution's bias.

Shape suffixes: B images, N embeddings of an image, Q queries, D width of the queries, H heads, d
width of a head.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.device import seeded
from seed_multimodal.diffusion.training import reads_images
from seed_multimodal.disk import read_json_object, replace_json
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.nn.layers import SdxlHead, multi_head
from seed_multimodal.settings import non_negative, positive, read_settings
from seed_multimodal.state_dicts import (
    LoadReport,
    assign_strictly,
    load_state_dict,
    save_state_dict,
)
from seed_multimodal.weights.catalogue import download_advice
from seed_multimodal.weights.find import find_file

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

WEIGHTS = "model.safetensors"
RESAMPLER_CONFIG = "resampler.json"
FILES = (WEIGHTS, "pytorch_model.safetensors", "pytorch_model.bin")
FIRST_LAYER = "unet.conv_in.weight"


@dataclass(frozen=True)
class ResamplerXLConfig:
    """Sizes of `ResamplerXLV2`; the defaults are those of both original adapters.

    num_queries: Q, the length of the prompt.
    output1_dim, output2_dim: widths of the two text encoders' hidden states; the pooled output has
        the second.
    normalize: scale each channel's values over the embeddings of an image to length 1.
    """

    dim: int = positive(1024)
    depth: int = non_negative(4)
    dim_head: int = positive(64)
    heads: int = positive(16)
    num_queries: int = positive(64)
    embedding_dim: int = positive(4096)
    output1_dim: int = positive(768)
    output2_dim: int = positive(1280)
    ff_mult: int = positive(4)
    normalize: bool = False


class ResamplerXLV2(SdxlHead):
    """Visual embeddings `[B, N, embedding_dim]` → prompt and pooled embeddings; N: 64 or 256."""

    def __init__(self, config: ResamplerXLConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or ResamplerXLConfig()
        width = config.dim
        # 1. Learned queries, and layers in which they attend to the embeddings.
        self.latents = nn.Parameter(torch.randn(1, config.num_queries, width) / width**0.5)
        self.proj_in = nn.Linear(config.embedding_dim, width)
        self.norm_out = nn.LayerNorm(width)
        self.layers = nn.ModuleList()
        for _ in range(config.depth):
            attention = PerceiverAttention(width, config.heads, config.dim_head)
            feed_forward = nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, config.ff_mult * width, bias=False),
                nn.GELU(),
                nn.Linear(config.ff_mult * width, width, bias=False),
            )
            self.layers.append(nn.ModuleList([attention, feed_forward]))
        # 2. Outputs.
        self.add_head(
            config.num_queries, width, config.heads, config.output1_dim, config.output2_dim
        )

    def forward(self, embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Prompt `[B, Q, output1_dim + output2_dim]` and pooled embeddings `[B, output2_dim]`."""
        # 1. The same learned queries attend to the embeddings of each image, layer by layer.
        queries_BQD = self.latents.expand(len(embeds), -1, -1)
        embeds = embeds.to(self.latents.dtype)
        if self.config.normalize:
            embeds = F.normalize(embeds, dim=1)
        x_BND = self.proj_in(embeds)
        for attention, feed_forward in self.layers:  # type: ignore[misc]
            queries_BQD = queries_BQD + attention(x_BND, queries_BQD)
            queries_BQD = queries_BQD + feed_forward(queries_BQD)

        # 2. Outputs.
        return self.head(self.norm_out(queries_BQD))


class PerceiverAttention(nn.Module):
    """Queries attend to the embeddings and to themselves; no biases."""

    def __init__(self, width: int, heads: int, dim_head: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(width, 2 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, width, bias=False)

    def forward(self, x_BND: Tensor, queries_BQD: Tensor) -> Tensor:
        """`[B, N, D]`, `[B, Q, D]` → `[B, Q, D]`."""
        # Keys and values: of the embeddings, then of the queries themselves.
        queries_BQD = self.norm2(queries_BQD)
        sources = torch.cat([self.norm1(x_BND), queries_BQD], dim=1)  # [B, N + Q, D]
        key, value = self.to_kv(sources).chunk(2, dim=-1)
        return self.to_out(multi_head(self.to_q(queries_BQD), key, value, self.heads))


class SDXLAdapter(nn.Module):
    """U-Net and resampler, the two parts of the original checkpoints.

    unet: 4 input channels, or 8 to read a condition image.
    """

    load_report: LoadReport | None = None

    def __init__(self, unet: UNet2DConditionModel, resampler: ResamplerXLV2) -> None:
        super().__init__()
        self.unet = unet
        self.resampler = resampler

    @property
    def latent_channels(self) -> int:
        """Channels C of the latents that are drawn."""
        return int(self.unet.config.out_channels)

    def add_condition_channels(self) -> None:
        """Turn a first stage into a second one that does not use the condition image yet."""
        if reads_images(self.unet):
            return
        narrow = self.unet.conv_in
        in_channels = 2 * self.latent_channels
        wide = nn.Conv2d(
            in_channels,
            narrow.out_channels,
            narrow.kernel_size,
            narrow.stride,
            narrow.padding,
            device=narrow.weight.device,
            dtype=narrow.weight.dtype,
        )
        # Zeros for the new channels: the output is the narrow layer's until they are trained.
        with torch.no_grad():
            wide.weight.zero_()
            wide.weight[:, : narrow.in_channels] = narrow.weight
            wide.bias.copy_(narrow.bias)
        self.unet.conv_in = wide
        self.unet.register_to_config(in_channels=in_channels)

    @classmethod
    def from_unet(
        cls, unet: UNet2DConditionModel, sizes: ResamplerXLConfig | None = None, seed: int = 0
    ) -> SDXLAdapter:
        """The start of a training: SDXL's own U-Net and a resampler of random weights."""
        # The random weights leave torch's global generator as it was.
        with seeded(seed):
            return cls(unet, ResamplerXLV2(sizes).to(unet.dtype)).train()

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path,
        sdxl: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        sizes: ResamplerXLConfig | None = None,
    ) -> SDXLAdapter:
        """An adapter in eval mode; its `load_report` counts what was read.

        checkpoint: a file, or the folder or hub name that holds one.
        sdxl: SDXL's folder, for `unet/config.json`.
        sizes: of the resampler, where no `resampler.json` is next to the weights; None: the
            original ones.

        Raises:
            CheckpointError: a file that is missing, damaged, not complete, or of an adapter of
                another size.
        """
        from diffusers import UNet2DConditionModel

        # 1. Files.
        file = find_file(checkpoint, FILES, download_advice("seed-x"))
        resampler_file = file.parent / RESAMPLER_CONFIG
        if resampler_file.is_file():
            values = read_json_object(resampler_file, ConfigError)
            sizes = read_settings(ResamplerXLConfig, values, str(resampler_file))
        config = read_json_object(
            Path(sdxl) / "unet" / "config.json", CheckpointError, download_advice("sdxl")
        )

        # 2. The network, and its weights.
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(config)
            adapter = cls(unet, ResamplerXLV2(sizes)).to(dtype)
        adapter.load(file, device)
        return adapter.eval()

    def load(self, file: Path, device: str | torch.device = "cpu") -> None:
        """Read a checkpoint; the U-Net of a second stage has more input channels. Raises
        CheckpointError: damaged or incomplete weights, or tensors of another size."""
        state = load_state_dict(file, mapped=True)
        first_layer = state.get(FIRST_LAYER)
        if first_layer is not None and first_layer.shape[1] > self.latent_channels:
            self.add_condition_channels()
        self.load_report = assign_strictly(self, state, file, foreign=True, device=device)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the weights and the resampler's sizes."""
        path = Path(folder)
        save_state_dict(self.state_dict(), path / WEIGHTS)
        replace_json(path / RESAMPLER_CONFIG, dataclasses.asdict(self.resampler.config))
        return path
