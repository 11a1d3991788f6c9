"""What a small U-Net is told about the layout of the picture that an embedding shows.

A class embedding reaches every position of a U-Net alike, so a small one never learns where things belong. This
module reads the expected latents out of the embedding and offers them twice: as cross-attention tokens of the places
(`prompt_embeds`), and as the mean of the latents from which sampling starts (`warm_latents`; the noise
schedule of such a model ends at a signal share above zero). Released SEED-2 decoders have none and need none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.errors import CheckpointError, first_line
from seed_multimodal.vision.label_heads import LabelHeads
from seed_multimodal.weights import assign_strictly, load_state_dict, save_state_dict

UNSURE = 0.25  # share of the samples whose things are named less surely in training than the heads do
REACH = 1.2  # side of a thing's feature map over the side of its anchor: outlines and shadows stand out a little


class LayoutDecoder(nn.Module):
    """Embedding `[B, E]` → expected latents `[B, C, g, g]` and tokens of the places `[B, (g/p)², D]`.

    Linear heads name what the embedding shows. Name, style and embedding of each thing become one small feature map,
    which is placed wherever the named layout has that thing (a spatial transformer, Jaderberg et al. 2015, at
    anchors): a thing is learned once for all its places. Convolutions join these maps, a map of the background and a
    coarse picture that is read from the embedding. Embeddings do not tell the small shifts of a picture's things; while
    it is trained it is told the true spots, so that it does not learn to blur over them.

    Args:
        classes: classes of the labels `first` and `second` (things, of which the second's classes begin with the
            first's), `style`, `background`, `layout`.
        anchors: for each class of `layout` where things stand: (0 for the first thing or 1 for the second, x, y, side),
            in shares of the picture.
        width: of names; channels: of the latents; features, side: of a thing's map; hidden, depth: width and blocks of
            the convolutions; coarse: side of the coarse picture; patch: side p of the latents that a token stands for.
        cross_dim: width of the tokens; 0: there are none.
        keeps: width of the convolutions that decide where the latents of a condition picture stay; 0: it reads none.
        reading: (W, n): the embedding is that of several patches side by side, W numbers each, of which `reading` makes
            n first; everything else reads those.
    """

    def __init__(self, embedding: int, channels: int, grid: int, cross_dim: int, classes: Mapping[str, int],
                 anchors: Sequence[Sequence[Sequence[float]]], width: int = 256, features: int = 48, side: int = 8,
                 hidden: int = 96, depth: int = 2, coarse: int = 16, patch: int = 2, keeps: int = 0,
                 reading: Sequence[int] = ()) -> None:
        super().__init__()
        self.sizes: dict[str, Any] = {
            "embedding": embedding, "channels": channels, "grid": grid, "cross_dim": cross_dim,
            "classes": dict(classes), "anchors": anchors, "width": width, "features": features, "side": side,
            "hidden": hidden, "depth": depth, "coarse": coarse, "patch": patch, **({"keeps": keeps} if keeps else {}),
            **({"reading": list(reading)} if reading else {})}
        self.grid, self.patch = grid, patch
        self.reading = nn.Linear(*reading) if reading else None
        if reading:
            embedding = embedding // reading[0] * reading[1]
        self.heads = LabelHeads(embedding, classes)
        self.names = nn.ParameterDict({name: torch.randn(classes[name], width) * 0.5
                                       for name in ("second", "style", "layout")})
        self.context = nn.Linear(embedding, width)
        self.thing = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.GELU(),
            nn.Linear(3 * width, 3 * width // 2), nn.GELU(),
            nn.Linear(3 * width // 2, features * side**2), nn.Unflatten(1, (features, side, side)))
        self.background = nn.Parameter(torch.randn(classes["background"], features, grid, grid) * 0.1)
        spots = max(len(row) for row in anchors)
        filled = [[*row, *[(-1, 0.5, 0.5, 1.0)] * (spots - len(row))] for row in anchors]
        self.register_buffer("anchors", torch.tensor(filled))
        self.coarse = nn.Sequential(nn.Linear(embedding, 3 * coarse**2, bias=False),
                                    nn.Unflatten(1, (3, coarse, coarse)))
        self.join = nn.Conv2d(3 * features + 3, hidden, 3, padding=1)
        self.mood = nn.Linear(embedding, hidden)
        self.blocks = nn.ModuleList(_block(hidden) for _ in range(depth))
        self.mean = nn.Sequential(nn.GroupNorm(8, hidden), nn.SiLU(), nn.Conv2d(hidden, channels, 3, padding=1))
        self.token = nn.Linear(hidden * patch**2, cross_dim) if cross_dim else None
        self.keep = _keeping(channels, keeps) if keeps else None

    def forward(self, embedding: Tensor, spots: Tensor | None = None, condition: Tensor | None = None
                ) -> tuple[Tensor, Tensor]:
        """Expected latents and tokens.

        Args:
            spots: where things really stand, `[B, K, 4]` as `anchors`, first number -1 for none; None: at the anchors.
            condition: latents `[B, C, g, g]` of a picture that stays where the embedding does not say otherwise; a
                sample of zeros has none.
        """
        embedding = self.read(embedding)
        shares = self._shares(embedding)
        coarse = self.coarse(embedding)
        if coarse.shape[-1] != self.grid:
            coarse = F.interpolate(coarse.float(), (self.grid, self.grid), mode="bilinear", antialias=True)
        background = torch.einsum("bk,kchw->bchw", shares["background"], self.background)
        x = torch.cat([part.to(embedding.dtype) for part in (
            self._placed(embedding, shares, spots).flatten(1, 2), background, coarse)], 1)
        x = self.join(x) + self.mood(embedding)[:, :, None, None]
        for block in self.blocks:
            x = x + block(x)
        mean = self.mean(x)
        if self.keep is not None and condition is not None:
            mean = self._kept(mean, condition.to(mean.dtype))
        patches = F.pixel_unshuffle(x, self.patch).flatten(2).mT
        return mean, patches[..., :0] if self.token is None else self.token(patches)

    def read(self, embedding: Tensor) -> Tensor:
        """The embedding as the heads read it."""
        if self.reading is None:
            return embedding
        return self.reading(embedding.unflatten(1, (-1, self.reading.in_features))).flatten(1)

    def _kept(self, mean: Tensor, condition: Tensor) -> Tensor:
        """The mean with what stays of the condition: a share of each square, and a correction."""
        assert self.keep is not None
        share, correction = self.keep(torch.cat([mean, condition, condition - mean], 1)).split([1, mean.shape[1]], 1)
        joined = mean + share.sigmoid() * (condition - mean) + correction
        return torch.where((condition != 0).flatten(1).any(1)[:, None, None, None], joined, mean)

    def _shares(self, embedding: Tensor) -> dict[str, Tensor]:
        """Probabilities of every label's classes; in training some things are named less surely, so that the less sure
        a name is, the more is drawn from the embedding: things never seen are drawn so."""
        logits = self.heads(embedding)
        if self.training:
            unsure = torch.rand(2, len(embedding), 1, device=embedding.device)
            sureness = torch.where(unsure[0] < UNSURE, unsure[1], 1.0)
            logits |= {name: sureness * logits[name] for name in ("first", "second")}
        return {name: value.softmax(1).to(embedding.dtype) for name, value in logits.items()}

    def _placed(self, embedding: Tensor, shares: Mapping[str, Tensor], spots: Tensor | None) -> Tensor:
        """Feature maps of the first and of the second thing where they stand, float32 `[B, 2, F, g, g]`."""
        things, g = self.names["second"], self.grid
        common = (shares["style"] @ self.names["style"] + shares["layout"] @ self.names["layout"]
                  + self.context(embedding))
        first = shares["first"] @ things[: shares["first"].shape[1]]
        maps = self.thing(torch.stack([first + common, shares["second"] @ things + common], 1).flatten(0, 1)).float()
        spots = (self.anchors[shares["layout"].argmax(1)] if spots is None else spots).float()  # [B, K, 4]
        role, box = spots[..., 0], spots[..., 1:]
        steps = (torch.arange(g, device=maps.device) + 0.5) / g
        places = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1).view(1, g * g, 1, 2)
        offset = (places - box[:, None, :, :2]) / (0.5 * REACH * box[:, None, :, 2:])  # [B, g², K, 2]: ±1 are its edges
        far = offset.detach().abs().amax(-1)[:, None]  # [B, 1, g², K]
        others = role[:, None, None] != torch.arange(2, device=maps.device)[None, :, None, None]
        near, spot = far.masked_fill(others, torch.inf).min(-1)  # [B, 2, g²]
        found = offset[:, None].expand(-1, 2, -1, -1, -1).gather(3, spot[..., None, None].expand(-1, -1, -1, 1, 2))
        placed = F.grid_sample(maps, found.reshape(-1, g, g, 2), align_corners=False).unflatten(0, (-1, 2))
        return placed * near.isfinite().unflatten(2, (g, g))[:, :, None]

    def latents(self, embedding: Tensor, condition: Tensor | None = None) -> Tensor:
        """Expected latents `[B, C, g, g]`; `condition` as of `forward`."""
        return self(embedding, condition=condition)[0]

    def prompt_embeds(self, embedding: Tensor) -> Tensor:
        """One token for each square of latents, row by row: `[B, (g/p)², D]`."""
        return self(embedding)[1]

    def warm_latents(
        self, embedding: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None, scheduler: Any,
        condition: Tensor | None = None, size: tuple[int, int] | None = None
    ) -> Tensor:
        """Start of sampling: expected latents and noise, mixed as at the schedule's last training step.

        `size`: height and width of the latents, None for g × g; the layout is stretched over another one.
        """
        mean = self.latents(embedding, condition)
        if size is not None and size != tuple(mean.shape[2:]):
            mean = F.interpolate(mean.float(), size, mode="bilinear", antialias=True).to(mean.dtype)
        signal = float(scheduler.alphas_cumprod[-1])
        noise = _noise_like(mean, generator)
        return signal ** 0.5 * mean + (1.0 - signal) ** 0.5 * noise

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write `config.json` and `model.safetensors`."""
        home = Path(folder)
        home.mkdir(parents=True, exist_ok=True)
        (home / "config.json").write_text(json.dumps(self.sizes, indent=1))
        save_state_dict({n: t.to(dtype) for n, t in self.state_dict().items()}, home / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> LayoutDecoder:
        """Read what `save_pretrained` wrote.

        Raises:
            CheckpointError: no or damaged `config.json`, or weights of another size.
        """
        home = Path(folder)
        try:
            sizes = json.loads((home / "config.json").read_text())
            with torch.device("meta"):  # weights that are replaced use up none of the caller's random numbers
                module = cls(**sizes)
        except (OSError, ValueError, TypeError, RuntimeError) as error:  # also brackets nested without end
            raise CheckpointError(f"{home / 'config.json'}: not a layout configuration "
                                  f"({first_line(error)}).") from error
        assign_strictly(module, load_state_dict(home / "model.safetensors"), home / "model.safetensors")
        return module.eval()


def _block(width: int) -> nn.Sequential:
    """Two 3x3 convolutions of a residual block."""
    return nn.Sequential(*(layer for _ in range(2) for layer in (
        nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))))


def _keeping(channels: int, width: int) -> nn.Sequential:
    """Mean, condition and their difference → share and correction; it sees 15 × 15 squares."""
    last = nn.Conv2d(width, channels + 1, 3, padding=1)
    nn.init.zeros_(last.weight)
    return nn.Sequential(
        nn.Conv2d(3 * channels, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 3, padding=2, dilation=2),
        nn.SiLU(), nn.Conv2d(width, width, 3, padding=3, dilation=3), nn.SiLU(), last)


def _noise_like(value: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    """Gaussian noise of `value`'s shape; with a list of generators, sample i depends on generator i alone."""
    if isinstance(generator, Sequence):
        rows = [torch.randn(value.shape[1:], generator=g, device=g.device) for g in generator]
        return torch.stack(rows).to(value.device, value.dtype)
    device = generator.device if generator is not None else value.device
    return torch.randn(value.shape, generator=generator, device=device).to(value.device, value.dtype)
