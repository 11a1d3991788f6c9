"""Layout decoders: conditioners that predict the expected latents of an image of a few named things
from its embedding, from which sampling starts (the noise schedule ends at a signal share above
zero), and cross-attention tokens of positions. nano's small U-Nets have them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.diffusion.conditioner import Generators, pooled_tokens, seeded_noise
from seed_multimodal.nn.pretrained import PretrainedNetwork
from seed_nano.labels import LabelHeads

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

LAYOUT = "layout"  # its folder, next to the U-Net's or an adapter's weights
UNSURE = 0.25  # share of the training samples whose logits of things are scaled down
# Side of a thing's feature map over the side of its anchor: outlines and shadows stand out a
# little.
REACH = 1.2


@dataclass(frozen=True)
class LayoutConfig:
    """Sizes of a `LayoutDecoder`."""

    embedding: int
    channels: int  # of the latents
    grid: int
    cross_dim: int  # width of the tokens; 0: none
    # Number of classes of the labels `first` and `second` (things, of which the second's begin with
    # the first's), `style`, `background` and `layout`.
    classes: dict[str, int]
    # For each class of `layout` where things stand, as (0 for the first thing or 1 for the second,
    # x, y, side) in shares of the image.
    anchors: Sequence[Sequence[tuple[float, float, float, float]]]
    width: int = 256  # of names
    features: int = 48  # channels and side of a thing's map
    side: int = 8
    hidden: int = 96  # width and number of the blocks of convolutions
    depth: int = 2
    coarse: int = 16  # side of the coarse image
    patch: int = 2  # side of the latents that one token stands for
    # Width of the convolutions that decide where latents of a condition image stay; 0: none.
    keeps: int = 0
    # (W, …, n): a small network first reduces each W numbers of the embedding to n.
    reading: tuple[int, ...] = ()


def reading_layers(sizes: Sequence[int]) -> nn.Module:
    """Rows of `sizes[0]` numbers → `sizes[-1]`: a linear layer, or several with GELU between."""
    layers: list[nn.Module] = []
    for width, reduced in pairwise(sizes):
        layers += [nn.Linear(width, reduced), nn.GELU()]
    del layers[-1]
    return nn.Sequential(*layers) if len(layers) > 1 else layers[0]


class LayoutDecoder(PretrainedNetwork[LayoutConfig]):
    """Embedding `[B, E]` → expected latents `[B, C, g, g]` and tokens `[B, (g/p)², D]`.

    Linear heads classify what the embedding shows. Each of the two things becomes one small feature
    map, placed wherever the layout has that thing (a spatial transformer, Jaderberg et al. 2015);
    convolutions join these maps, one of the background and a coarse image of the embedding.
    """

    config_class = LayoutConfig
    config: LayoutConfig
    anchors: Tensor  # [layouts, K, 4], role -1 for none

    def __init__(self, config: LayoutConfig) -> None:
        super().__init__()
        self.config = config
        self.grid = grid = config.grid
        self.patch = config.patch
        classes = config.classes
        width = config.width
        features = config.features
        hidden = config.hidden

        # 1. Heads, on the embedding or on its reduced rows.
        embedding = config.embedding
        self.reading = reading_layers(config.reading) if config.reading else None
        if config.reading:
            embedding = embedding // config.reading[0] * config.reading[-1]
        self.heads = LabelHeads(embedding, classes)

        # 2. Feature maps of things: the sum of the vectors of its classes → [features, side, side].
        names = {}
        for label in ("second", "style", "layout"):
            names[label] = nn.Parameter(torch.randn(classes[label], width) * 0.5)
        self.names = nn.ParameterDict(names)
        self.context = nn.Linear(embedding, width)
        self.thing = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.GELU(),
            nn.Linear(3 * width, 3 * width // 2),
            nn.GELU(),
            nn.Linear(3 * width // 2, features * config.side**2),
            nn.Unflatten(1, (features, config.side, config.side)),
        )

        # 3. Background, anchors (filled up to the largest number K) and coarse image.
        shape = (classes["background"], features, grid, grid)
        self.background = nn.Parameter(torch.randn(*shape) * 0.1)
        n_anchors = max(len(row) for row in config.anchors)
        no_anchor = (-1.0, 0.5, 0.5, 1.0)
        anchors = [[*row, *[no_anchor] * (n_anchors - len(row))] for row in config.anchors]
        self.register_buffer("anchors", torch.tensor(anchors))
        self.coarse = nn.Sequential(
            nn.Linear(embedding, 3 * config.coarse**2, bias=False),
            nn.Unflatten(1, (3, config.coarse, config.coarse)),
        )

        # 4. Convolutions, and their outputs.
        self.join = nn.Conv2d(3 * features + 3, hidden, 3, padding=1)
        self.mood = nn.Linear(embedding, hidden)
        self.blocks = nn.ModuleList(_residual_block(hidden) for _ in range(config.depth))
        self.mean = nn.Sequential(
            nn.GroupNorm(8, hidden), nn.SiLU(), nn.Conv2d(hidden, config.channels, 3, padding=1)
        )
        self.token = None
        if config.cross_dim:
            self.token = nn.Linear(hidden * self.patch**2, config.cross_dim)
        self.keep = _keep_network(config.channels, config.keeps) if config.keeps else None

    def forward(
        self, embedding: Tensor, spots: Tensor | None = None, condition: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Expected latents `[B, C, g, g]` and tokens `[B, (g/p)², D]`.

        spots: true anchors `[B, K, 4]`, role -1 for none; None: those of the most likely layout.
        condition: latents `[B, C, g, g]` of an image of which most stays, zeros for none.
        """
        # 1. Join the maps of what the embedding shows by convolutions, [B, hidden, g, g].
        embedding = self.read(embedding)
        x = self.join(self._input_maps(embedding, spots))
        x = x + self.mood(embedding)[:, :, None, None]
        for block in self.blocks:
            x = x + block(x)

        # 2. Latents, and a token for each patch.
        mean = self.mean(x)
        if self.keep is not None and condition is not None:
            mean = self._keep_condition(self.keep, mean, condition.to(mean.dtype))
        patches = F.pixel_unshuffle(x, self.patch).flatten(2).mT  # [B, (g/p)², hidden · p²]
        tokens = patches[..., :0] if self.token is None else self.token(patches)
        return mean, tokens

    def _input_maps(self, embedding: Tensor, spots: Tensor | None) -> Tensor:
        """Maps of two things, of the background and of a coarse image, `[B, 3 · F + 3, g, g]`."""
        probabilities = self._class_probabilities(embedding)
        things = self._place_things(embedding, probabilities, spots).flatten(1, 2)
        background = torch.einsum("bk,kchw->bchw", probabilities["background"], self.background)
        coarse = self.coarse(embedding)
        if coarse.shape[-1] != self.grid:
            size = (self.grid, self.grid)
            coarse = F.interpolate(coarse.float(), size, mode="bilinear", antialias=True)
        dtype = embedding.dtype
        return torch.cat([things.to(dtype), background.to(dtype), coarse.to(dtype)], 1)

    def read(self, embedding: Tensor) -> Tensor:
        """Input of the heads, `[B, E']`."""
        if self.reading is None:
            return embedding
        rows = embedding.unflatten(1, (-1, self.config.reading[0]))  # [B, E / W, W]
        return self.reading(rows).flatten(1)

    def _keep_condition(self, keep: nn.Module, mean: Tensor, condition: Tensor) -> Tensor:
        """The mean with what stays of the condition: a share of each square, and a correction."""
        output = keep(torch.cat([mean, condition, condition - mean], 1))  # [B, 1 + C, g, g]
        share, correction = output.split([1, mean.shape[1]], 1)
        joined = mean + share.sigmoid() * (condition - mean) + correction
        has_condition = (condition != 0).flatten(1).any(1)  # [B]
        return torch.where(has_condition[:, None, None, None], joined, mean)

    def _class_probabilities(self, embedding: Tensor) -> dict[str, Tensor]:
        """Probabilities of every label's classes; in training less sure ones for some things."""
        logits = self.heads(embedding)
        if self.training:
            unsure = torch.rand(2, len(embedding), 1, dtype=torch.float32, device=embedding.device)
            scale = torch.where(unsure[0] < UNSURE, unsure[1], 1.0)  # [B, 1]
            for label in ("first", "second"):
                logits[label] = scale * logits[label]
        return {label: value.softmax(1).to(embedding.dtype) for label, value in logits.items()}

    def _place_things(
        self, embedding: Tensor, probabilities: Mapping[str, Tensor], spots: Tensor | None
    ) -> Tensor:
        """Feature maps of both things at their anchors, float32 `[B, 2, F, g, g]`."""
        # 1. A small map of each thing, from its class and what both have in common.
        names = self.names["second"]  # [classes, W]
        style = probabilities["style"] @ self.names["style"]
        layout = probabilities["layout"] @ self.names["layout"]
        common = style + layout + self.context(embedding)  # [B, W]
        n_first = probabilities["first"].shape[1]  # the second's classes begin with the first's
        first = probabilities["first"] @ names[:n_first]
        second = probabilities["second"] @ names
        vectors = torch.stack([first + common, second + common], 1)  # [B, 2, W]
        maps = self.thing(vectors.flatten(0, 1)).float()  # [B · 2, F, s, s]

        # 2. The K anchors of each image, and the thing that stands there.
        if spots is None:
            spots = self.anchors[probabilities["layout"].argmax(1)]
        spots = spots.float()  # [B, K, 4]
        role = spots[..., 0]  # [B, K]
        centre = spots[..., 1:3]  # [B, K, 2]
        side = spots[..., 3:]  # [B, K, 1]

        # 3. Offset of each of the g² squares from each anchor; ±1 are the edges of the thing's map.
        g = self.grid
        steps = (torch.arange(g, dtype=torch.float32, device=maps.device) + 0.5) / g
        squares = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1).view(1, g * g, 1, 2)
        reach = 0.5 * REACH * side[:, None]  # [B, 1, K, 1]
        offset = (squares - centre[:, None]) / reach  # [B, g², K, 2]

        # 4. The nearest anchor of each thing, for each square; infinitely far if the layout lacks
        #    it.
        distance = offset.detach().abs().amax(-1)[:, None]  # [B, 1, g², K]
        thing = torch.arange(2, device=maps.device)[None, :, None, None]  # [1, 2, 1, 1]
        of_other_thing = role[:, None, None] != thing  # [B, 2, 1, K]
        distance, nearest = distance.masked_fill(of_other_thing, torch.inf).min(-1)  # [B, 2, g²]

        # 5. Sample each thing's map at the offsets from that anchor.
        offsets = offset[:, None].expand(-1, 2, -1, -1, -1)  # [B, 2, g², K, 2]
        index = nearest[..., None, None].expand(-1, -1, -1, 1, 2)  # [B, 2, g², 1, 2]
        points = offsets.gather(3, index).reshape(-1, g, g, 2)  # [B · 2, g, g, 2]
        placed = F.grid_sample(maps, points, align_corners=False).unflatten(0, (-1, 2))
        exists = distance.isfinite().unflatten(2, (g, g))  # [B, 2, g, g]
        return placed * exists[:, :, None]

    def tokens(self, embeds: Tensor) -> Tensor:
        """Tokens `[B, (g/p)², D]` of embeddings `[B, E]` or `[B, N, W]`."""
        return self(self.flat(embeds))[1]

    def flat(self, embeds: Tensor) -> Tensor:
        """Embeddings `[B, E]` in its precision.

        Of `[B, N, W]` neighbours are averaged or repeated, to as many as it reads.
        """
        if embeds.ndim == 3:
            n_tokens = embeds.shape[1]
            n_read = max(self.config.embedding // embeds.shape[2], 1)
            if n_tokens < n_read:  # each mean stands for its neighbours
                embeds = embeds.repeat_interleave(n_read // n_tokens, dim=1)
            embeds = pooled_tokens(embeds, n_read).flatten(1)
        return embeds.to(self.mood.weight.dtype)

    def expected_latents(self, embeds: Tensor) -> Tensor:
        """Expected latents `[B, C, g, g]` of embeddings `[B, E]` or `[B, N, W]`."""
        return self(self.flat(embeds))[0]

    def warm_latents(
        self,
        embeds: Tensor,
        generators: Generators,
        scheduler: SchedulerMixin,
        condition: Tensor | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Start of sampling, `[B, C, h, w]`: expected latents and noise.

        They are mixed as at the last training step.

        size: h and w, to which the expected latents are stretched.
        """
        # 1. Expected latents, [B, C, h, w].
        inputs = self.flat(embeds)
        if condition is not None:
            if condition.shape[-2:] != (self.grid, self.grid):
                condition = F.interpolate(condition.float(), (self.grid, self.grid), mode="area")
            condition = condition.to(inputs)
        mean = self(inputs, condition=condition)[0]
        if size is not None and size != tuple(mean.shape[2:]):
            stretched = F.interpolate(mean.float(), size, mode="bilinear", antialias=True)
            mean = stretched.to(mean.dtype)

        # 2. Noise by each image's generator.
        noise = seeded_noise(generators, mean.shape[1:]).to(mean)
        signal = float(scheduler.alphas_cumprod[-1])
        return signal**0.5 * mean + (1.0 - signal) ** 0.5 * noise


def _residual_block(width: int) -> nn.Sequential:
    """Two 3x3 convolutions of a residual block."""
    layers: list[nn.Module] = []
    for _ in range(2):
        layers += [nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)]
    return nn.Sequential(*layers)


def _keep_network(channels: int, width: int) -> nn.Sequential:
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
