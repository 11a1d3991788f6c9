"""LaVIT's decoder: a variable number of codebook rows → patch features → conditions of a U-Net.

    decoder = CodeDecoder.from_pretrained("LaVIT-7B-v2", head="highres")
    conditions = decoder([tokenizer.embed_codes(codes) for codes in images])

Learned queries, one per patch, attend to the rows and to each other. The position of a row is its
index in the image. Two heads exist: `highres` for SDXL, `lowres` for Stable Diffusion 1. Padding
rows are masked (the original subtracts 10,000 from their scores, with equal results).

Source: arXiv 2309.04669 and its code; parameter names are the original ones. Shape suffixes: B
images, n rows of an image, L rows of the longest, C code width, N queries, D width, F features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from seed_multimodal.models.lavit.modeling import NORM_EPSILON, CrossBlock
from seed_multimodal.nn.layers import LayerNorm, SdxlHead, checkpoint_layers, task_layer
from seed_multimodal.nn.pretrained import CONFIG, WEIGHTS, PretrainedNetwork
from seed_multimodal.settings import positive
from seed_multimodal.state_dicts import load_state_dict
from seed_multimodal.weights.catalogue import download_advice
from seed_multimodal.weights.find import find_file

Head = Literal["highres", "lowres"]
ORIGINAL_FOLDER = "visual_tokenizer"
ORIGINAL_FILES: dict[Head, str] = {
    "highres": "highres_tokenizer_decoder.bin",
    "lowres": "tokenizer_decoder.bin",
}
INIT_STD = 0.02


@dataclass(frozen=True)
class LavitDecoderConfig:
    """Sizes of `CodeDecoder`; the defaults are the original ones.

    Attributes:
        tokens: N, the maximum number of rows of an image.
        prompt_dim: width of a prompt embedding (`highres`: of its first part).
        pooled_dim: width of the second part of a prompt embedding, and of the pooled embedding.
    """

    head: Head = "highres"
    tokens: int = positive(256)
    code_dim: int = positive(32)
    width: int = positive(1408)
    depth: int = positive(12)
    heads: int = positive(16)
    mlp_width: int = positive(6144)
    feature_dim: int = positive(1408)
    prompt_dim: int = positive(768)
    pooled_dim: int = positive(1280)
    grad_checkpoint: bool = False

    @property
    def context_dim(self) -> int:
        """Width of the prompt embeddings (original: 2048 and 768)."""
        if self.head == "lowres":
            return self.prompt_dim
        return self.prompt_dim + self.pooled_dim


class DecodedCodes(NamedTuple):
    """Conditions of a U-Net, and the features that they are computed from."""

    prompt_embeds: Tensor  # [B, N, context_dim]
    pooled: Tensor | None  # [B, pooled_dim], for SDXL
    features: Tensor  # [B, N, F]


class CodeDecoder(PretrainedNetwork[LavitDecoderConfig], SdxlHead):
    """Codebook rows of each image → patch features (`features`) → conditions (`forward`)."""

    config_class = LavitDecoderConfig
    config: LavitDecoderConfig

    def __init__(self, config: LavitDecoderConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or LavitDecoderConfig()
        width = config.width
        features = config.feature_dim

        # 1. Rows → features.
        self.pos_embed = nn.Parameter(torch.zeros(1, config.tokens, width))
        self.query_embed = nn.Parameter(torch.zeros(1, config.tokens, width))
        self.in_proj = nn.Linear(config.code_dim, width)
        self.blocks = nn.ModuleList(
            CrossBlock(width, config.heads, config.mlp_width) for _ in range(config.depth)
        )
        self.norm = LayerNorm(width, eps=NORM_EPSILON)
        self.decode_task_layer = task_layer(width, features)

        # 2. Features → conditions.
        if config.head == "highres":
            self.add_head(
                config.tokens, features, config.heads, config.prompt_dim, config.pooled_dim
            )
        else:
            self.unet_proj = nn.Linear(features, config.prompt_dim)

        for table in (self.pos_embed, self.query_embed):
            nn.init.trunc_normal_(table, std=INIT_STD)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=INIT_STD)
                nn.init.zeros_(module.bias)
        if config.grad_checkpoint:
            checkpoint_layers(self)

    def features(self, rows: Sequence[Tensor]) -> Tensor:
        """Rows of each image `[n, C]`, 1 ≤ n ≤ N, in raster order → patch features `[B, N, F]`."""
        device = self.pos_embed.device

        # 1. The images' rows, padded to the longest image; `valid_BL` masks the padding.
        lengths = [len(image_rows) for image_rows in rows]
        lengths_B = torch.tensor(lengths, dtype=torch.long, device=device)
        rows_BLC = pad_sequence([image_rows.to(device) for image_rows in rows], batch_first=True)
        if not torch.is_autocast_enabled(device.type):
            rows_BLC = rows_BLC.to(self.in_proj.weight.dtype)
        longest = rows_BLC.shape[1]
        rows_BLD = self.in_proj(rows_BLC)
        rows_BLD = rows_BLD + self.pos_embed[:, :longest].to(rows_BLD.dtype)
        valid_BL = torch.arange(longest, device=device) < lengths_B[:, None]

        # 2. The queries, which are the same for all images.
        x_BND = self.query_embed.expand(len(rows), -1, -1)
        for block in self.blocks:
            x_BND = block(x_BND, rows_BLD, None, valid_BL[:, None, None])
        return self.decode_task_layer(self.norm(x_BND))

    def forward(self, rows: Sequence[Tensor]) -> DecodedCodes:
        """Rows of each image (as for `features`) → conditions."""
        return self.conditions(self.features(rows))

    def conditions(self, features_BNF: Tensor) -> DecodedCodes:
        """Features `[B, N, F]` → conditions of the head."""
        if self.config.head == "lowres":
            return DecodedCodes(self.unet_proj(features_BNF), None, features_BNF)
        return DecodedCodes(*self.head(features_BNF), features_BNF)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        head: Head | None = None,
        config: LavitDecoderConfig | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> CodeDecoder:
        """As `PretrainedNetwork`; also LaVIT's folder or one of its two files.

        head: of which file, if the folder has both.
        config: sizes without a config.json; None: the original ones.
        """
        # 1. Our file, the file of `head`, or the other one.
        heads = sorted(ORIGINAL_FILES, key=lambda file_head: file_head != head)
        names = [WEIGHTS, *(ORIGINAL_FILES[file_head] for file_head in heads)]
        inner = Path(folder) / ORIGINAL_FOLDER
        file = find_file(inner if inner.is_dir() else folder, names, download_advice("lavit"))

        # 2. Its sizes. An original file has none, and its name says which head it has.
        if file.name == WEIGHTS:
            config = cls.read_config(file.with_name(CONFIG))
        else:
            file_head: Head = "highres" if file.stem.startswith("highres") else "lowres"
            config = dataclasses.replace(config or LavitDecoderConfig(), head=file_head)
        state = load_state_dict(file, mapped=True)
        return cls.from_state_dict(config, state, file, device=device, dtype=dtype)
