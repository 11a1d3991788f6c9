"""LaVIT's decoder: a variable number of codebook rows becomes a fixed number of features, and a U-Net's conditions.

    decoder = CodeDecoder.from_pretrained("LaVIT-7B-v2", head="highres")
    conditions = decoder([tokenizer.embed_codes(codes) for codes in pictures])

Learned queries, one for each patch of the picture, look at the rows and at each other. A row's position is its rank
among the picture's rows: where its patch stood is told by the row itself alone. Two heads were released: `highres`
gives what SDXL's two text encoders would, `lowres` what Stable Diffusion 1's would. Parameter names are the released.
Source: Jin et al. 2024, "Unified Language-Vision Pretraining in LLM with Dynamic Discrete Visual Tokenization".

Note: rows that pad a shorter picture are hidden from the attention completely; the released code subtracts 10,000 from
their scores, which is the same number wherever a picture has a row of its own.

Shape suffixes: B pictures, n rows of one picture, L rows of the longest, C code width, N queries, D width, F features.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from seed_multimodal.disk import read_json_object, replace_text
from seed_multimodal.errors import CheckpointError, CodesError, ConfigError, counted
from seed_multimodal.hub import LAVIT_WHERE, find_file
from seed_multimodal.nn.layers import (
    Attention,
    AttentionPool,
    LayerNorm,
    Mlp,
    checkpoint_layers,
    heads_first,
    heads_last,
)
from seed_multimodal.settings import check_settings, read_settings, setting
from seed_multimodal.weights import LoadReport, assign_strictly, load_state_dict, save_state_dict

Head = Literal["highres", "lowres"]
RELEASED: dict[Head, str] = {"highres": "highres_tokenizer_decoder.bin", "lowres": "tokenizer_decoder.bin"}
FOLDER = "visual_tokenizer"  # of the released files, below the model's
CONFIG, WEIGHTS = "config.json", "model.safetensors"
EPS = 1e-5


@dataclass(frozen=True)
class LavitDecoderConfig:
    """Sizes of `CodeDecoder`; the defaults are the released ones.

    Attributes:
        head: "highres": prompt embeddings of two widths, side by side, and pooled ones; "lowres": of one width alone.
        tokens: N, queries, features and the most rows of a picture. code_dim: C, numbers of a codebook row.
        width, depth, heads, mlp_width: of the blocks; the pool has as many heads.
        feature_dim: of the patch features that stage 1 rebuilds. prompt_dim: width of a prompt embedding, of the
            first text encoder's part for `highres`; pooled_dim: of the second's part and the pooled embedding.
        grad_checkpoint: computes the blocks again going backward instead of keeping their activations.
    """

    head: Head = "highres"
    tokens: int = setting(256, least=1)
    code_dim: int = setting(32, least=1)
    width: int = setting(1408, least=1)
    depth: int = setting(12, least=1)
    heads: int = setting(16, least=1)
    mlp_width: int = setting(6144, least=1)
    feature_dim: int = setting(1408, least=1)
    prompt_dim: int = setting(768, least=1)
    pooled_dim: int = setting(1280, least=1)
    grad_checkpoint: bool = False

    def __post_init__(self) -> None:
        check_settings(self, "LaVIT's decoder")
        pooled = self.feature_dim if self.head == "highres" else self.heads
        for name, value in (("width", self.width), ("feature width", pooled)):
            if value % self.heads:
                raise ConfigError(f"LaVIT's decoder: the {name} {value} does not divide into {self.heads} heads.")

    @property
    def context_dim(self) -> int:
        """Width of the prompt embeddings, which the U-Net's cross-attention reads (released: 2048 and 768)."""
        return self.prompt_dim + (self.pooled_dim if self.head == "highres" else 0)


class Conditions(NamedTuple):
    """What a U-Net is told of B pictures: `prompt_embeds` `[B, N, context_dim]`, `pooled` `[B, pooled_dim]` or None.

    `features`: `[B, N, F]`, of which they were made; a small U-Net's layout decoder reads them.
    """

    prompt_embeds: Tensor
    pooled: Tensor | None = None
    features: Tensor | None = None


class CrossAttention(nn.Module):
    """Queries look at the rows of their own picture; four projections with biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x_BND: Tensor, rows_BLD: Tensor, seen_BL: Tensor) -> Tensor:
        """`[B, N, D]`, `[B, L, D]` → `[B, N, D]`; `seen_BL`: true for a picture's own rows."""
        q, k, v = (heads_first(one, self.heads)
                   for one in (self.query(x_BND), self.key(rows_BLD), self.value(rows_BLD)))
        return self.proj(heads_last(F.scaled_dot_product_attention(q, k, v, attn_mask=seen_BL[:, None, None])))


class DecoderBlock(nn.Module):
    """`x += self(norm0 x); x += cross(norm1 x, rows); x += mlp(norm2 x)`; the rows are not normalised."""

    def __init__(self, config: LavitDecoderConfig) -> None:
        super().__init__()
        width = config.width
        self.norm0 = LayerNorm(width, eps=EPS)
        self.self_attn = Attention(width, config.heads)
        self.norm1 = LayerNorm(width, eps=EPS)
        self.cross_attn = CrossAttention(width, config.heads)
        self.norm2 = LayerNorm(width, eps=EPS)
        self.mlp = Mlp(width, config.mlp_width)

    def forward(self, x_BND: Tensor, rows_BLD: Tensor, seen_BL: Tensor) -> Tensor:
        """`[B, N, D]`, `[B, L, D]` → `[B, N, D]`."""
        x_BND = x_BND + self.self_attn(self.norm0(x_BND))
        x_BND = x_BND + self.cross_attn(self.norm1(x_BND), rows_BLD, seen_BL)
        return x_BND + self.mlp(self.norm2(x_BND))


class CodeDecoder(nn.Module):
    """Codebook rows of each picture → patch features (`features`) → a U-Net's conditions (`forward`).

    Released: 287 keys and 414.0 M parameters with `highres`, 276 and 404.1 M with `lowres`.

    Attributes:
        load_report: what the loader read into the model.
    """

    load_report: LoadReport | None = None

    def __init__(self, config: LavitDecoderConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or LavitDecoderConfig()
        width, features = config.width, config.feature_dim
        self.pos_embed = nn.Parameter(torch.zeros(1, config.tokens, width))
        self.query_embed = nn.Parameter(torch.zeros(1, config.tokens, width))
        self.in_proj = nn.Linear(config.code_dim, width)
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.depth))
        self.norm = LayerNorm(width, eps=EPS)
        self.decode_task_layer = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, features))
        if config.head == "highres":
            self.unet_proj_1 = nn.Linear(features, config.prompt_dim)
            self.unet_proj_2 = nn.Linear(features, config.pooled_dim)
            self.unet_attnpool = AttentionPool(config.tokens, features, config.heads, config.pooled_dim)
        else:
            self.unet_proj = nn.Linear(features, config.prompt_dim)
        self.init_weights()
        if config.grad_checkpoint:
            checkpoint_layers(self)

    def init_weights(self) -> None:
        """A start for training from scratch (how the released one started is not known)."""
        for table in (self.pos_embed, self.query_embed):
            nn.init.trunc_normal_(table, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def features(self, rows: Sequence[Tensor]) -> Tensor:
        """Patch features `[B, N, F]`, which stage 1 compares with the tower's.

        Args:
            rows: of each picture `[n, C]`, 1 ≤ n ≤ N, in raster order of the patches kept. In training, a picture of
                which nothing was kept may give one row of zeros.

        Raises:
            CodesError: no picture, a picture without rows or with more than N, or rows of another width.
        """
        self._check(rows)
        lengths = torch.tensor([len(one) for one in rows], device=self.pos_embed.device)
        rows_BLC = pad_sequence([one.to(self.in_proj.weight.device) for one in rows], batch_first=True)
        if not torch.is_autocast_enabled(rows_BLC.device.type):
            rows_BLC = rows_BLC.to(self.in_proj.weight.dtype)
        longest = rows_BLC.shape[1]
        rows_BLD = self.in_proj(rows_BLC)
        rows_BLD = rows_BLD + self.pos_embed[:, :longest].to(rows_BLD.dtype)
        seen_BL = torch.arange(longest, device=lengths.device) < lengths[:, None]
        x_BND = self.query_embed.expand(len(rows), -1, -1)
        for block in self.blocks:
            x_BND = block(x_BND, rows_BLD, seen_BL)
        return self.decode_task_layer(self.norm(x_BND))

    def forward(self, rows: Sequence[Tensor]) -> Conditions:
        """Conditions of the pictures; arguments and errors as of `features`."""
        return self.conditions(self.features(rows))

    def conditions(self, features_BNF: Tensor) -> Conditions:
        """What the head makes of features `[B, N, F]`."""
        if self.config.head == "lowres":
            return Conditions(self.unet_proj(features_BNF), None, features_BNF)
        prompt = torch.cat([self.unet_proj_1(features_BNF), self.unet_proj_2(features_BNF)], dim=-1)
        return Conditions(prompt, self.unet_attnpool(features_BNF), features_BNF)

    def _check(self, rows: Sequence[Tensor]) -> None:
        config = self.config
        if isinstance(rows, Tensor) or not len(rows):
            raise CodesError("LaVIT's decoder takes a list with the codebook rows of one picture or more.")
        for number, one in enumerate(rows, start=1):
            if not isinstance(one, Tensor) or one.ndim != 2 or one.shape[1] != config.code_dim \
                    or not one.is_floating_point():
                got = list(one.shape) if isinstance(one, Tensor) else type(one).__name__
                raise CodesError(f"The codebook rows of picture {number} must be a floating tensor "
                                 f"[n, {config.code_dim}], got {got}.")
            if not len(one):
                raise CodesError(f"Picture {number} has no codes: there is nothing to decode.")
            if len(one) > config.tokens:
                raise CodesError(f"Picture {number} has {counted(len(one), 'code')}, but LaVIT's decoder takes "
                                 f"{config.tokens} of a picture at most.")

    @classmethod
    def from_pretrained(cls, place: str | Path, *, head: Head | None = None, config: LavitDecoderConfig | None = None,
                        device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> CodeDecoder:
        """A decoder in eval mode; every tensor of the file is accounted for.

        Args:
            place: LaVIT's folder or its `visual_tokenizer`, one of the two files, or a folder of `save_pretrained`.
            head: which of the two; None for the one that the file holds (`highres` of a folder that has both).
            config: sizes, where no `config.json` beside the file gives them; None for the released ones.

        Raises:
            CheckpointError: a file that is not there, damaged, not complete, or of another size or head.
        """
        names = [*(name for kind, name in RELEASED.items() if head in (None, kind)), WEIGHTS]
        inner = Path(place) / FOLDER
        file = find_file(inner if inner.is_dir() else place, names, LAVIT_WHERE)
        state = load_state_dict(file, mapped=True)
        found = _head_of(state)
        if head is not None and found != head:
            raise CheckpointError(f"{file}: holds the {found} decoder, not the {head} one.")
        listed = file.parent / CONFIG
        sizes = read_json_object(listed, CheckpointError) if listed.is_file() else {}
        if sizes and "model_type" not in sizes:  # beside the released files it may be the dynamic tokenizer's
            config = read_settings(LavitDecoderConfig, sizes, str(listed))
        elif config is None and file.name == WEIGHTS:
            raise CheckpointError(f"{listed}: there is no such file, which tells the sizes of {WEIGHTS} beside it.")
        config = dataclasses.replace(config or LavitDecoderConfig(), head=found)
        with torch.device("meta"):
            decoder = cls(config).to(dtype)
        decoder.load_report = assign_strictly(decoder, state, file, device=device)
        return decoder.eval()

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> Path:
        """Write `config.json` and `model.safetensors` (converted to `dtype`), for `from_pretrained`."""
        home = Path(folder)
        save_state_dict({name: value.to(dtype or value.dtype) for name, value in self.state_dict().items()},
                        home / WEIGHTS)
        sizes = dataclasses.asdict(self.config)
        del sizes["grad_checkpoint"]  # a choice of the training, not of the weights
        replace_text(home / CONFIG, json.dumps(sizes, indent=1) + "\n")
        return home


def _head_of(state: Mapping[str, Tensor]) -> Head:
    return "lowres" if "unet_proj.weight" in state else "highres"
