"""Layout decoders of the shipped models' small U-Nets: predict expected latents from an embedding, from which sampling
starts (their noise schedules end at a signal share above zero), and cross-attention tokens of positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.nn.pretrained import PretrainedNetwork

LAYOUT = "layout"  # folder of a layout decoder, next to the U-Net's or an adapter's weights
UNSURE = 0.25  # share of the training samples whose things are named less surely than the heads do
REACH = 1.2  # side of a thing's feature map over the side of its anchor: outlines and shadows stand out a little


def pooled_tokens(features: Tensor, count: int) -> Tensor:
    """`[B, N, W]` → `[B, count, W]`: means of neighbours in raster order; unchanged if N is no multiple of `count`."""
    group, rest = divmod(features.shape[1], count)
    return features if rest or group < 2 else F.avg_pool1d(features.mT, group).mT


class LabelHeads(nn.Module):
    """Linear classifiers of an embedding, one for each label; `classes`: label → number of classes."""

    def __init__(self, width: int, classes: Mapping[str, int]) -> None:
        super().__init__()
        self.width, self.classes = width, dict(classes)
        self.layers = nn.ModuleDict(
            {name: nn.Linear(width, count) for name, count in classes.items()}
        )

    def forward(self, embedding: Tensor) -> dict[str, Tensor]:
        """Logits `[B, classes]` of every label from embeddings `[B, E]`."""
        return {name: layer(embedding).float() for name, layer in self.layers.items()}


@dataclass(frozen=True)
class LayoutConfig:
    """Sizes of a `LayoutDecoder`.

    `classes`: number of classes of the labels `first` and `second` (things, of which the second's begin with the
    first's), `style`, `background`, `layout`. `anchors`: for each class of `layout` where things stand, as (0 for the
    first thing or 1 for the second, x, y, side) in shares of the image.
    """

    embedding: int
    channels: int  # of the latents
    grid: int
    cross_dim: int  # width of the tokens; 0: none
    classes: dict[str, int]
    anchors: Sequence[Sequence[tuple[float, float, float, float]]]
    width: int = 256  # of names
    features: int = 48  # channels and side of a thing's map
    side: int = 8
    hidden: int = 96  # width and number of the blocks of convolutions
    depth: int = 2
    coarse: int = 16  # side of the coarse image
    patch: int = 2  # side of the latents that one token stands for
    keeps: int = (
        0  # width of the convolutions that decide where latents of a condition image stay; 0: none
    )
    reading: tuple[
        int, ...
    ] = ()  # (W, n): a linear layer first reduces each W numbers of the embedding to n


class LayoutDecoder(PretrainedNetwork):
    """Embedding `[B, E]` → expected latents `[B, C, g, g]` and tokens of the places `[B, (g/p)², D]`.

    Linear heads name what the embedding shows. Each named thing becomes one small feature map, placed wherever the
    layout has that thing (a spatial transformer, Jaderberg et al. 2015); convolutions join these maps, one of the
    background and a coarse image of the embedding.
    """

    config_class = LayoutConfig
    config: LayoutConfig

    def __init__(self, config: LayoutConfig) -> None:
        super().__init__()
        self.config, self.grid, self.patch = config, config.grid, config.patch
        embedding, classes, width, features = (
            config.embedding,
            config.classes,
            config.width,
            config.features,
        )
        grid, side, hidden, coarse = config.grid, config.side, config.hidden, config.coarse
        self.reading = nn.Linear(*config.reading) if config.reading else None
        if config.reading:
            embedding = embedding // config.reading[0] * config.reading[1]
        self.heads = LabelHeads(embedding, classes)
        self.names = nn.ParameterDict(
            {
                name: torch.randn(classes[name], width) * 0.5
                for name in ("second", "style", "layout")
            }
        )
        self.context = nn.Linear(embedding, width)
        self.thing = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.GELU(),
            nn.Linear(3 * width, 3 * width // 2),
            nn.GELU(),
            nn.Linear(3 * width // 2, features * side**2),
            nn.Unflatten(1, (features, side, side)),
        )
        self.background = nn.Parameter(
            torch.randn(classes["background"], features, grid, grid) * 0.1
        )
        spots = max(len(row) for row in config.anchors)
        filled = [[*row, *[(-1.0, 0.5, 0.5, 1.0)] * (spots - len(row))] for row in config.anchors]
        self.register_buffer("anchors", torch.tensor(filled))
        self.coarse = nn.Sequential(
            nn.Linear(embedding, 3 * coarse**2, bias=False), nn.Unflatten(1, (3, coarse, coarse))
        )
        self.join = nn.Conv2d(3 * features + 3, hidden, 3, padding=1)
        self.mood = nn.Linear(embedding, hidden)
        self.blocks = nn.ModuleList(_block(hidden) for _ in range(config.depth))
        self.mean = nn.Sequential(
            nn.GroupNorm(8, hidden), nn.SiLU(), nn.Conv2d(hidden, config.channels, 3, padding=1)
        )
        self.token = (
            nn.Linear(hidden * self.patch**2, config.cross_dim) if config.cross_dim else None
        )
        self.keep = _keeping(config.channels, config.keeps) if config.keeps else None

    def forward(
        self, embedding: Tensor, spots: Tensor | None = None, condition: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Expected latents and tokens; `spots`: true places `[B, K, 4]` as `anchors`, first number -1 for none;
        `condition`: latents `[B, C, g, g]` of an image of which most stays, zeros for none."""
        embedding = self.read(embedding)
        shares = self._shares(embedding)
        coarse = self.coarse(embedding)
        if coarse.shape[-1] != self.grid:
            coarse = F.interpolate(
                coarse.float(), (self.grid, self.grid), mode="bilinear", antialias=True
            )
        background = torch.einsum("bk,kchw->bchw", shares["background"], self.background)
        x = torch.cat(
            [
                part.to(embedding.dtype)
                for part in (
                    self._placed(embedding, shares, spots).flatten(1, 2),
                    background,
                    coarse,
                )
            ],
            1,
        )
        x = self.join(x) + self.mood(embedding)[:, :, None, None]
        for block in self.blocks:
            x = x + block(x)
        mean = self.mean(x)
        if self.keep is not None and condition is not None:
            mean = self._kept(mean, condition.to(mean.dtype))
        patches = F.pixel_unshuffle(x, self.patch).flatten(2).mT
        return mean, patches[..., :0] if self.token is None else self.token(patches)

    def read(self, embedding: Tensor) -> Tensor:
        """Input of the heads."""
        if self.reading is None:
            return embedding
        return self.reading(embedding.unflatten(1, (-1, self.reading.in_features))).flatten(1)

    def _kept(self, mean: Tensor, condition: Tensor) -> Tensor:
        """The mean with what stays of the condition: a share of each square, and a correction."""
        assert self.keep is not None
        share, correction = self.keep(torch.cat([mean, condition, condition - mean], 1)).split(
            [1, mean.shape[1]], 1
        )
        joined = mean + share.sigmoid() * (condition - mean) + correction
        return torch.where((condition != 0).flatten(1).any(1)[:, None, None, None], joined, mean)

    def _shares(self, embedding: Tensor) -> dict[str, Tensor]:
        """Probabilities of every label's classes; in training less sure ones for some things."""
        logits = self.heads(embedding)
        if self.training:
            unsure = torch.rand(2, len(embedding), 1, device=embedding.device)
            sureness = torch.where(unsure[0] < UNSURE, unsure[1], 1.0)
            logits |= {name: sureness * logits[name] for name in ("first", "second")}
        return {name: value.softmax(1).to(embedding.dtype) for name, value in logits.items()}

    def _placed(
        self, embedding: Tensor, shares: Mapping[str, Tensor], spots: Tensor | None
    ) -> Tensor:
        """Feature maps of the first and of the second thing where they stand, float32 `[B, 2, F, g, g]`."""
        things, g = self.names["second"], self.grid
        common = (
            shares["style"] @ self.names["style"]
            + shares["layout"] @ self.names["layout"]
            + self.context(embedding)
        )
        first = shares["first"] @ things[: shares["first"].shape[1]]
        maps = self.thing(
            torch.stack([first + common, shares["second"] @ things + common], 1).flatten(0, 1)
        ).float()
        spots = (
            self.anchors[shares["layout"].argmax(1)] if spots is None else spots
        ).float()  # [B, K, 4]
        role, box = spots[..., 0], spots[..., 1:]
        steps = (torch.arange(g, device=maps.device) + 0.5) / g
        places = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1).view(1, g * g, 1, 2)
        offset = (places - box[:, None, :, :2]) / (
            0.5 * REACH * box[:, None, :, 2:]
        )  # [B, g², K, 2]: ±1 are its edges
        far = offset.detach().abs().amax(-1)[:, None]  # [B, 1, g², K]
        others = role[:, None, None] != torch.arange(2, device=maps.device)[None, :, None, None]
        near, spot = far.masked_fill(others, torch.inf).min(-1)  # [B, 2, g²]
        nearest = (
            offset[:, None]
            .expand(-1, 2, -1, -1, -1)
            .gather(3, spot[..., None, None].expand(-1, -1, -1, 1, 2))
        )
        placed = F.grid_sample(maps, nearest.reshape(-1, g, g, 2), align_corners=False).unflatten(
            0, (-1, 2)
        )
        return placed * near.isfinite().unflatten(2, (g, g))[:, :, None]

    def flat(self, embeds: Tensor) -> Tensor:
        """Embeddings `[B, E]`, or `[B, N, W]` averaged or repeated to as many as it reads, in its precision."""
        if embeds.ndim == 3:
            needed = max(self.config.embedding // embeds.shape[2], 1)
            if embeds.shape[1] < needed:  # each mean stands for its neighbours
                embeds = embeds.repeat_interleave(needed // embeds.shape[1], dim=1)
            embeds = pooled_tokens(embeds, needed).flatten(1)
        return embeds.to(self.mood.weight.dtype)

    def warm_latents(
        self,
        embeds: Tensor,
        generators: Sequence[torch.Generator],
        scheduler: Any,
        condition: Tensor | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Start of sampling: expected latents, stretched to `size`, and noise, mixed as at the last training step."""
        flat = self.flat(embeds)
        if condition is not None and condition.shape[-2:] != (self.grid, self.grid):
            condition = F.interpolate(condition.float(), (self.grid, self.grid), mode="area")
        mean = self(flat, condition=None if condition is None else condition.to(flat))[0]
        if size is not None and size != tuple(mean.shape[2:]):
            mean = F.interpolate(mean.float(), size, mode="bilinear", antialias=True).to(mean.dtype)
        noise = torch.stack([torch.randn(mean.shape[1:], generator=one) for one in generators]).to(
            mean
        )
        signal = float(scheduler.alphas_cumprod[-1])
        return signal**0.5 * mean + (1.0 - signal) ** 0.5 * noise


def _block(width: int) -> nn.Sequential:
    """Two 3x3 convolutions of a residual block."""
    return nn.Sequential(
        *(
            layer
            for _ in range(2)
            for layer in (nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
        )
    )


def _keeping(channels: int, width: int) -> nn.Sequential:
    """Mean, condition and their difference → share and correction; it sees 15 × 15 squares."""
    last = nn.Conv2d(width, channels + 1, 3, padding=1)
    nn.init.zeros_(last.weight)
    return nn.Sequential(
        nn.Conv2d(3 * channels, width, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(width, width, 3, padding=2, dilation=2),
        nn.SiLU(),
        nn.Conv2d(width, width, 3, padding=3, dilation=3),
        nn.SiLU(),
        last,
    )
