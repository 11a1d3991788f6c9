"""Qwen-VL's vision tower (ViT-bigG, 1.9 billion parameters): pixels → 256 features of a picture, as SEED-X uses it.

    tower = QwenVit.from_pretrained("pretrained/QwenViT/qwen_vit_G.pt", device="cuda", dtype=torch.float16)
    features = tower(pixels)                      # [B, 3, 448, 448] → [B, 256, 4096]

Note: there is no class token; the position table is stored for 16 × 16 patches and resized bicubically to the image's
grid when it is needed; the fused projection of a block holds query, key and value of the first head, then those of the
second, and so on, not three blocks of the whole width; a resampler pools the patches, a norm and a matrix follow it.
Source: SEED-X's released code (`qwen_visual.py`, from Qwen-VL); parameter names are the released ones.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.disk import read_json_object, replace_text
from seed_multimodal.errors import ConfigError, ImageError
from seed_multimodal.hub import find_file
from seed_multimodal.images.any_resolution import position_features
from seed_multimodal.nn.layers import LayerNorm, checkpoint_layers, heads_last
from seed_multimodal.settings import check_settings, read_settings, setting
from seed_multimodal.vision.positions import SquarePositions
from seed_multimodal.vision.resampler import Resampler, ResamplerConfig
from seed_multimodal.weights import LoadReport, assign_strictly, load_state_dict, save_state_dict

MODEL_TYPE = "qwen_vit"
FILES = ("model.safetensors", "qwen_vit_G.safetensors", "qwen_vit_G.pt")
IN_QWEN_VL = "transformer.visual."  # before the tower's names in Qwen-VL's own checkpoints
ADVICE = ("SEED-X's vision tower is a part of Qwen/Qwen-VL-Chat; src/tools/reload_qwen_vit.py takes it out of "
          "pretrained/Qwen-VL-Chat and writes pretrained/QwenViT/qwen_vit_G.pt")
POOL_HEAD_WIDTH = 128  # of the attention pool, at every size


@dataclass(frozen=True)
class QwenVitConfig:
    """Sizes of the vision tower; the defaults are the released ones.

    `image_size` is what pictures are resized to; the tower itself takes any square of whole patches. `position_grid`:
    side of the stored position table. `patch_pos`: adds where a part of a picture lies (off in every released model,
    where the language model's input does that). `pool_heads` (ours): None is the released rule, one for every 128
    channels. `grad_checkpoint`: computes the blocks again going backward instead of keeping their activations; the
    released code does so always.
    """

    image_size: int = setting(448, least=1)
    patch_size: int = setting(14, least=1)
    width: int = setting(1664, least=1)
    layers: int = setting(48, least=1)
    heads: int = setting(16, least=1)
    mlp_ratio: float = setting(4.9231, above=0)
    output_dim: int = setting(4096, least=1)
    n_queries: int = setting(256, least=1)
    position_grid: int = setting(16, least=1)
    pool_heads: int | None = setting(None, least=1)
    patch_pos: bool = False
    grad_checkpoint: bool = False

    def __post_init__(self) -> None:
        check_settings(self, "vision tower")
        if self.image_size % self.patch_size:
            raise ConfigError(f"The image size {self.image_size} is not a multiple of the patch {self.patch_size}.")
        if self.width % self.heads:
            raise ConfigError(f"The vision width {self.width} does not divide into {self.heads} heads.")
        if math.isqrt(self.n_queries) ** 2 != self.n_queries:
            raise ConfigError(f"The attention pool's {self.n_queries} queries are not a square grid.")
        self.pool  # noqa: B018  (its sizes are checked, too)

    @property
    def mlp_width(self) -> int:
        """Width inside a block's MLP."""
        return int(self.width * self.mlp_ratio)

    @property
    def pool(self) -> ResamplerConfig:
        """Sizes of the attention pool."""
        heads = self.pool_heads or max(1, self.output_dim // POOL_HEAD_WIDTH)
        return ResamplerConfig(grid_size=math.isqrt(self.n_queries), embed_dim=self.output_dim, num_heads=heads,
                               kv_dim=self.width, norm_eps=1e-6)


class QwenAttention(nn.Module):
    """Full self-attention; the fused projection is laid out per head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x_BNW: Tensor) -> Tensor:
        """`[B, N, W]` → `[B, N, W]`."""
        fused = self.in_proj(x_BNW).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, N, 3 W / heads]
        query, key, value = fused.chunk(3, dim=-1)
        return self.out_proj(heads_last(F.scaled_dot_product_attention(query, key, value)))


class QwenBlock(nn.Module):
    """Pre-norm transformer block with exact GELU."""

    def __init__(self, config: QwenVitConfig) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.width, eps=1e-6)
        self.ln_2 = LayerNorm(config.width, eps=1e-6)
        self.attn = QwenAttention(config.width, config.heads)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(config.width, config.mlp_width), gelu=nn.GELU(),
            c_proj=nn.Linear(config.mlp_width, config.width)))

    def forward(self, x_BNW: Tensor) -> Tensor:
        """`[B, N, W]` → `[B, N, W]`."""
        x_BNW = x_BNW + self.attn(self.ln_1(x_BNW))
        return x_BNW + self.mlp(self.ln_2(x_BNW))


class QwenBlocks(nn.Module):
    """The blocks, one after the other."""

    def __init__(self, config: QwenVitConfig) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(QwenBlock(config) for _ in range(config.layers))

    def forward(self, x_BNW: Tensor) -> Tensor:
        """`[B, N, W]` → `[B, N, W]`."""
        for block in self.resblocks:
            x_BNW = block(x_BNW)
        return x_BNW


class QwenVit(nn.Module):
    """The vision tower; `forward` returns the pooled, projected features, not normalised.

    Attributes:
        load_report: what the loader read into the model.
    """

    def __init__(self, config: QwenVitConfig) -> None:
        super().__init__()
        self.config = config
        self.load_report: LoadReport | None = None
        self.positional_embedding = nn.Parameter(torch.zeros(config.position_grid**2, config.width))
        self.proj = nn.Parameter(torch.zeros(config.output_dim, config.output_dim))
        if config.patch_pos:
            self.patch_pos_embed = nn.Parameter(torch.zeros(4, config.output_dim))
        self.conv1 = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size, bias=False)
        self.ln_pre = LayerNorm(config.width, eps=1e-6)
        self.transformer = QwenBlocks(config)
        self.attn_pool = Resampler(config.pool)
        self.ln_post = LayerNorm(config.output_dim, eps=1e-6)
        self.positions = SquarePositions()
        self.init_weights()
        if config.grad_checkpoint:
            checkpoint_layers(self)

    def init_weights(self) -> None:
        """A start for training from scratch (ours: the released tower came trained); residual projections shrink with
        depth."""
        nn.init.trunc_normal_(self.positional_embedding, std=0.02)
        nn.init.normal_(self.proj, std=self.config.output_dim**-0.5)
        if self.config.patch_pos:
            nn.init.normal_(self.patch_pos_embed, std=self.config.output_dim**-0.5)
        for module in self.transformer.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            for number, block in enumerate(self.transformer.resblocks, start=1):
                for name in ("attn.out_proj", "mlp.c_proj"):
                    block.get_parameter(f"{name}.weight").div_(math.sqrt(2 * number))

    def forward(self, images: Tensor, patch_positions: Tensor | None = None) -> Tensor:
        """Normalised pixels `[B, 3, S, S]` of whole patches → features `[B, n_queries, output_dim]`.

        Args:
            patch_positions: with `patch_pos` only: centre (x, y) in [0, 1] of each image in its picture, `[B, 2]`.

        Raises:
            ImageError: images that are not square, or not of whole patches; ConfigError: positions without `patch_pos`,
                or the reverse.
        """
        self.check_images(images)
        if (patch_positions is not None) != self.config.patch_pos:
            raise ConfigError("Patch positions belong to vision towers with patch_pos, and to no others.")
        patches = self.conv1(images.to(self.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        positions = self.positions(self.positional_embedding, patches.shape[1], "The image")
        x_BNW = self.transformer(self.ln_pre(patches + positions.to(patches.dtype)))
        x_BQD = self.attn_pool(x_BNW)
        if patch_positions is not None:
            where = position_features(patch_positions.to(x_BQD)) @ self.patch_pos_embed
            x_BQD = x_BQD + where[:, None]
        return self.ln_post(x_BQD) @ self.proj

    def check_images(self, images: Tensor) -> None:
        """Raises `ImageError` for pixels of another shape than `[B, 3, S, S]` with S a multiple of the patch."""
        patch, shape = self.config.patch_size, list(images.shape)
        if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3] or not shape[3] or shape[3] % patch:
            size = self.config.image_size
            raise ImageError(f"Images must be [B, 3, {size}, {size}] or other squares of a multiple of {patch} pixels, "
                             f"got {shape}.")

    @classmethod
    def from_pretrained(cls, source: str | Path, *, config: QwenVitConfig | None = None,
                        device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
                        log: Callable[[str], None] | None = None) -> Self:
        """A tower in eval mode, its parameters frozen, its `load_report` filled.

        Args:
            source: a file of weights (`qwen_vit_G.pt`, safetensors) or a folder that holds one.
            config: sizes; None: those of a `config.json` beside the weights that `save_pretrained` wrote, else the
                released ones.
            log: receives one line about what was loaded.

        Raises:
            CheckpointError: nothing there, a damaged or unsafe file, another model's weights, missing tensors, another
                size; ConfigError: a config.json that does not fit.
        """
        file = find_file(Path(source).expanduser(), FILES, ADVICE)
        state = tower_tensors(load_state_dict(file, mapped=True))
        with torch.device("meta"):
            tower = cls(config or _config_beside(file)).to(dtype)
        tower.load_report = assign_strictly(tower, state, file, foreign=True, device=device)
        if log is not None:
            log(tower.load_report.describe())
        return tower.requires_grad_(False).eval()

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `config.json` and `model.safetensors` (weights in their present dtype); each appears whole or not."""
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        save_state_dict(self.state_dict(), place / FILES[0])
        values = {"model_type": MODEL_TYPE, **dataclasses.asdict(self.config)}
        replace_text(place / "config.json", json.dumps(values, indent=2) + "\n")
        return place


def count_tower(source: str | Path, config: QwenVitConfig | None = None) -> int:
    """Numbers of a tower's weights, which are not read; arguments and errors as of `QwenVit.from_pretrained`."""
    file = find_file(Path(source).expanduser(), FILES, ADVICE)
    with torch.device("meta"):
        return sum(one.numel() for one in QwenVit(config or _config_beside(file)).parameters())


def tower_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tower's tensors by their names in it; of a checkpoint of Qwen-VL, its `transformer.visual.*`."""
    inside = {name.removeprefix(IN_QWEN_VL): value for name, value in state.items() if name.startswith(IN_QWEN_VL)}
    return inside or dict(state)


def _config_beside(file: Path) -> QwenVitConfig:
    """Sizes of weights from the `config.json` beside them, if it is a tower's; else the released ones."""
    place = file.with_name("config.json")
    values = dict(read_json_object(place)) if place.is_file() else {}
    if values.pop("model_type", None) != MODEL_TYPE:
        return QwenVitConfig()
    return read_settings(QwenVitConfig, values, str(place))
