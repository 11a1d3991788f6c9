"""SEED-X's vision encoder (Qwen-VL's ViT-bigG, 1.9 billion parameters) and Qwen-VL's resampler.

    encoder = QwenVit.from_pretrained("pretrained/QwenViT/qwen_vit_G.pt", device="cuda")
    features = encoder(pixels)                      # [B, 3, 448, 448] → [B, 256, 4096]

The encoder has no class token; its fused attention projection holds query, key and value head by
head; position tables are resized bicubically to the image's grid. A resampler is one
cross-attention from learned queries; its keys have positions, its values do not. SEED-X has three:
the encoder's attention pool, and the language model's input and output resampler.

Source: SEED-X's code (`qwen_visual.py`, from Qwen-VL); parameter names are the original ones.

Shape suffixes: B images, N patches, Q queries, W encoder width, D output width, K width of keys.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from seed_multimodal.disk import read_json_object, writing
from seed_multimodal.errors import CheckpointError
from seed_multimodal.images.transforms import ImageTransform, seed_image_processor
from seed_multimodal.nn.layers import LayerNorm, resize_square, scaled_dot_product
from seed_multimodal.nn.pretrained import PretrainedNetwork, saved_config
from seed_multimodal.nn.vision.base import State, VisionConfig, VisionEncoder
from seed_multimodal.settings import positive, setting
from seed_multimodal.state_dicts import INDEX_FILES, load_state_dict, save_torch, tensors_below
from seed_multimodal.weights.find import find_file, first_file

FILES = ("model.safetensors", "qwen_vit_G.safetensors", "qwen_vit_G.pt")
IN_QWEN_VL = "transformer.visual."  # before the encoder's names in Qwen-VL's own checkpoints
ADVICE = (
    "SEED-X's vision encoder is a part of Qwen/Qwen-VL-Chat; src/tools/reload_qwen_vit.py takes it "
    "out of pretrained/Qwen-VL-Chat and writes pretrained/QwenViT/qwen_vit_G.pt"
)


def extract(target: Path, qwen_vl: Path) -> int:
    """Write the vision encoder of Qwen-VL-Chat, a folder with shards, as one file; returns the
    number of its tensors. `target`: the file, or its folder.

    Raises CheckpointError: no shards, or the file cannot be written.
    """
    index = first_file(qwen_vl, INDEX_FILES)
    if index is None:
        raise CheckpointError(
            f"{qwen_vl}: there is no {' or '.join(INDEX_FILES)}; download Qwen/Qwen-VL-Chat to "
            "pretrained/Qwen-VL-Chat (seed fetch qwen-vl), or name its folder with --source."
        )
    # Its shards, memory-mapped, so that the language model's tensors in them are not read.
    files = read_json_object(index)["weight_map"].items()
    tensors: State = {}
    for shard in sorted({file for name, file in files if name.startswith(IN_QWEN_VL)}):
        tensors |= tensors_below(load_state_dict(qwen_vl / shard, mapped=True), IN_QWEN_VL)
    if not target.suffix:
        target = target / FILES[-1]
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        save_torch(tensors, target)
    return len(tensors)


# ---- resampler


@dataclass(frozen=True)
class ResamplerConfig:
    """Sizes of a resampler: learned queries attend to features."""

    grid_size: int = positive()  # its square is the number of queries
    embed_dim: int = positive()  # width of the queries
    num_heads: int = positive()
    kv_dim: int | None = positive(None)  # of the features; None: as wide, not projected
    norm_eps: float = setting(1e-5, above=0)


# Of SEED-X-17B.
INPUT_RESAMPLER = ResamplerConfig(grid_size=8, embed_dim=5120, num_heads=32, kv_dim=4096)
OUTPUT_RESAMPLER = ResamplerConfig(grid_size=8, embed_dim=4096, num_heads=32, kv_dim=5120)


def sine_table(width: int, grid: int) -> Tensor:
    """Position embeddings `[grid², width]`: sines and cosines of columns, then those of rows.

    Source: MAE's `get_2d_sincos_pos_embed`; frequencies are 10000^(-i / (width / 4)), in fp64.
    """
    options = {"dtype": torch.float64, "device": "cpu"}
    frequencies = 10000.0 ** -(torch.arange(width // 4, **options) / (width / 4))
    angles = torch.arange(grid, **options)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # [grid, width / 2]
    columns = waves[None].expand(grid, -1, -1)
    rows = waves[:, None].expand(-1, grid, -1)
    return torch.cat([columns, rows], dim=2).flatten(0, 1).float()


class Resampler(nn.Module):
    """One cross-attention from `grid_size`² learned queries to the features of an image."""

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.embed_dim
        kv_dim = config.kv_dim or width
        # Positions are fixed; the queries are learned.
        self.pos_embed = nn.Parameter(sine_table(width, config.grid_size), requires_grad=False)
        self.query = nn.Parameter(torch.zeros(config.grid_size**2, width))
        self.kv_proj = nn.Identity() if kv_dim == width else nn.Linear(kv_dim, width, bias=False)
        self.attn = nn.MultiheadAttention(width, config.num_heads, batch_first=True)
        self.ln_q = LayerNorm(width, eps=config.norm_eps)
        self.ln_kv = LayerNorm(width, eps=config.norm_eps)
        nn.init.trunc_normal_(self.query, std=0.02)
        for module in (self.kv_proj, self.attn.out_proj):
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)

    def forward(self, x_BNK: Tensor) -> Tensor:
        """Features `[B, g², kv_dim]`, row by row → `[B, grid_size², embed_dim]`."""
        # Positions are added to keys and queries, not to values.
        values_BND = self.ln_kv(self.kv_proj(x_BNK))
        positions = resize_square(self.pos_embed, math.isqrt(values_BND.shape[1]))
        keys_BND = values_BND + positions.to(values_BND.dtype)
        queries = (self.ln_q(self.query) + self.pos_embed).to(values_BND.dtype)
        queries_BQD = queries.expand(len(values_BND), -1, -1)
        return self.attn(queries_BQD, keys_BND, values_BND, need_weights=False)[0]


def position_features(centres_B2: Tensor, table_4D: Tensor) -> Tensor:
    """Centres (x, y) of views in [0, 1] → `½ · (x, y, 1 - x, 1 - y) · table`, `[B, D]`.

    The paper omits the ½.
    """
    centres_B2 = centres_B2.to(table_4D)
    return torch.cat([centres_B2, 1 - centres_B2], dim=-1) / 2 @ table_4D


# ---- vision encoder


@dataclass(frozen=True)
class QwenVitConfig(VisionConfig):
    """Sizes of the vision encoder; the defaults are the original ones.

    position_grid: side of the stored position table.
    pool_heads: of the attention pool; None: one for every 128 channels.
    patch_pos: adds the position of the view; off in every original model, whose agent adds it.
    """

    image_size: int = positive(448)
    patch_size: int = positive(14)
    width: int = positive(1664)
    layers: int = positive(48)
    heads: int = positive(16)
    mlp_ratio: float = setting(4.9231, above=0)
    output_dim: int = positive(4096)
    n_queries: int = positive(256)
    position_grid: int = positive(16)
    pool_heads: int | None = positive(None)
    patch_pos: bool = False

    @property
    def preprocessing(self) -> ImageTransform:
        """Squashed bicubically, with CLIP's mean."""
        return seed_image_processor(self.image_size)

    def build(self) -> QwenVit:
        return QwenVit(self)

    def read_weights(self, source: str) -> State:
        return read_qwen_vit(find_file(source, FILES, ADVICE))


@dataclass(frozen=True)
class QwenEncoderConfig(QwenVitConfig):
    """The same in the configuration of another model, with its type."""

    type: str = setting("qwen_vit", choices=("qwen_vit",))


def read_qwen_vit(file: Path) -> State:
    """The tensors of the encoder; in Qwen-VL's own checkpoints they are a part of the model's."""
    state = load_state_dict(file, mapped=True)
    return tensors_below(state, IN_QWEN_VL) or state


class QwenAttention(nn.Module):
    """Full self-attention; the fused projection is laid out per head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x_BNW: Tensor) -> Tensor:
        """`[B, N, W]` → `[B, N, W]`."""
        fused = self.in_proj(x_BNW).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        query, key, value = fused.chunk(3, dim=-1)  # [B, heads, N, W / heads]
        attended = scaled_dot_product(query, key, value)  # [B, heads, N, d]
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class QwenBlock(nn.Module):
    """Pre-norm transformer block with exact GELU."""

    def __init__(self, config: QwenVitConfig) -> None:
        super().__init__()
        hidden = int(config.width * config.mlp_ratio)
        self.ln_1 = LayerNorm(config.width, eps=1e-6)
        self.ln_2 = LayerNorm(config.width, eps=1e-6)
        self.attn = QwenAttention(config.width, config.heads)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(config.width, hidden),
                gelu=nn.GELU(),
                c_proj=nn.Linear(hidden, config.width),
            )
        )

    def forward(self, x_BNW: Tensor) -> Tensor:
        """`[B, N, W]` → `[B, N, W]`."""
        x_BNW = x_BNW + self.attn(self.ln_1(x_BNW))
        return x_BNW + self.mlp(self.ln_2(x_BNW))


class QwenVit(PretrainedNetwork[QwenVitConfig], VisionEncoder):
    """The vision encoder; `forward` returns the pooled, projected features, not normalised."""

    config_class = QwenVitConfig
    model_type = "qwen_vit"
    config: QwenVitConfig

    def __init__(self, config: QwenVitConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.width = output_dim = config.output_dim
        self.n_tokens = config.n_queries
        self.n_class_tokens = 0
        scale = output_dim**-0.5

        # 1. Parameters that are no layers.
        self.positional_embedding = nn.Parameter(0.02 * torch.randn(config.position_grid**2, width))
        self.proj = nn.Parameter(scale * torch.randn(output_dim, output_dim))
        if config.patch_pos:
            self.patch_pos_embed = nn.Parameter(scale * torch.randn(4, output_dim))

        # 2. Patches and blocks.
        self.conv1 = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size, bias=False)
        self.ln_pre = LayerNorm(width, eps=1e-6)
        blocks = nn.Sequential(*(QwenBlock(config) for _ in range(config.layers)))
        self.transformer = nn.Sequential(OrderedDict(resblocks=blocks))

        # 3. The attention pool.
        pool_config = ResamplerConfig(
            grid_size=math.isqrt(config.n_queries),
            embed_dim=output_dim,
            kv_dim=width,
            norm_eps=1e-6,
            num_heads=config.pool_heads or max(1, output_dim // 128),
        )
        self.attn_pool = Resampler(pool_config)
        self.ln_post = LayerNorm(output_dim, eps=1e-6)

    def forward(self, images: Tensor, patch_positions: Tensor | None = None) -> Tensor:
        """Normalised pixels `[B, 3, S, S]` → features `[B, n_queries, output_dim]`.

        S is a multiple of the patch size.

        patch_positions: `[B, 2]`, centre (x, y) in [0, 1] of each view in its image; with
            `patch_pos` only.
        """
        # 1. Patches in raster order with their positions.
        x_BNW = self.conv1(images.to(self.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        positions = resize_square(self.positional_embedding, math.isqrt(x_BNW.shape[1]))
        x_BNW = self.ln_pre(x_BNW + positions.to(x_BNW.dtype))

        # 2. Through the transformer, pooled to the queries, and projected.
        x_BQD = self.attn_pool(self.transformer(x_BNW))
        if patch_positions is not None:
            x_BQD = x_BQD + position_features(patch_positions, self.patch_pos_embed)[:, None]
        return self.ln_post(x_BQD) @ self.proj

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        config: QwenVitConfig | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        log: Callable[[str], None] | None = None,
    ) -> Self:
        """A vision encoder in eval mode, frozen.

        folder: folder of weights, or their file (`qwen_vit_G.pt`, safetensors, or Qwen-VL's).
        config: sizes, where no `config.json` is next to the weights; None: the original ones.
        log: receives one line about what was loaded.

        Raises:
            CheckpointError: no file, a damaged or unsafe one, missing tensors or another size.
        """
        file = find_file(Path(folder).expanduser(), FILES, ADVICE)
        stored = saved_config(QwenVitConfig, cls.model_type, file.parent)
        config = stored or config or QwenVitConfig()
        encoder = cls.from_state_dict(
            config, read_qwen_vit(file), file, device=device, dtype=dtype, foreign=True
        )
        if log is not None and encoder.load_report is not None:
            log(encoder.load_report.describe())
        return encoder
