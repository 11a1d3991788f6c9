"""A read-out of the image embedding that gives a small U-Net the layout of the picture.

A class embedding reaches every position of a U-Net alike, so a small one never learns where things belong. This
module reads the expected latents out of the embedding and offers them twice: as one cross-attention token a position
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


class LayoutDecoder(nn.Module):
    """Embedding `[B, E]` → expected latents `[B, C, g, g]` and position tokens `[B, (g/p)², D]`.

    Linear heads name what the embedding shows; places look at the names and at the embedding itself. From the embedding
    alone, without names, a decoder of this size learns colours and places, not what things look like.

    Args:
        classes: label -> number of its classes.
        patch: side p of the square of latents that one token stands for.
    """

    def __init__(self, embedding: int, channels: int, grid: int, cross_dim: int, classes: Mapping[str, int],
                 width: int = 128, depth: int = 3, heads: int = 4, patch: int = 2) -> None:
        super().__init__()
        self.sizes: dict[str, Any] = {
            "embedding": embedding, "channels": channels, "grid": grid, "cross_dim": cross_dim,
            "classes": dict(classes), "width": width, "depth": depth, "heads": heads, "patch": patch}
        self.heads = LabelHeads(embedding, classes)
        self.names = nn.ParameterDict({name: torch.randn(count, width) * 0.5 for name, count in classes.items()})
        self.context = nn.Linear(embedding, width)
        self.position = nn.Parameter(torch.randn(1, (grid // patch) ** 2, width) * 0.5)
        self.blocks = nn.ModuleList(
            nn.TransformerDecoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.mean = nn.Linear(width, channels * patch**2)
        self.token = nn.Linear(width, cross_dim)

    def forward(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Expected latents and tokens."""
        named = [logits.softmax(1) @ self.names[name] for name, logits in self.heads(embedding).items()]
        memory = torch.stack([*named, self.context(embedding)], 1).to(embedding.dtype)
        x = self.position.expand(len(embedding), -1, -1).to(embedding.dtype)
        for block in self.blocks:
            x = block(x, memory)
        x = self.norm(x)
        side = self.sizes["grid"] // self.sizes["patch"]
        return F.pixel_shuffle(self.mean(x).mT.unflatten(2, (side, side)), self.sizes["patch"]), self.token(x)

    def latents(self, embedding: Tensor) -> Tensor:
        """Expected latents `[B, C, g, g]`."""
        return self(embedding)[0]

    def prompt_embeds(self, embedding: Tensor) -> Tensor:
        """One token for each square of latents, row by row: `[B, (g/p)², D]`."""
        return self(embedding)[1]

    def warm_latents(
        self, embedding: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None, scheduler: Any
    ) -> Tensor:
        """Start of sampling: expected latents and noise, mixed as at the schedule's last training step."""
        mean = self.latents(embedding)
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



class LayoutReadout(nn.Module):
    """The layout of weights before the world of scenes; gives the same as `LayoutDecoder`.

    Args:
        patch: side p of the square of latents that one token stands for.
    """

    def __init__(self, embedding: int, channels: int, grid: int, cross_dim: int, hidden: int = 256,
                 patch: int = 1) -> None:
        super().__init__()
        self.sizes = {"embedding": embedding, "channels": channels, "grid": grid, "cross_dim": cross_dim,
                      "hidden": hidden, "patch": patch}
        latent = channels * grid * grid
        self.mean = nn.Linear(embedding, latent)
        self.refine = nn.Sequential(nn.Linear(embedding, hidden), nn.GELU(), nn.Linear(hidden, latent))
        nn.init.zeros_(self.refine[2].weight)
        nn.init.zeros_(self.refine[2].bias)
        self.value = nn.Linear(channels * patch**2, cross_dim)
        self.context = nn.Linear(embedding, cross_dim)
        self.position = nn.Parameter(torch.randn(1, (grid // patch) ** 2, cross_dim) * 0.5)

    def latents(self, embedding: Tensor) -> Tensor:
        """Expected latents `[B, C, g, g]`."""
        flat = self.mean(embedding) + self.refine(embedding)
        return flat.view(len(embedding), self.sizes["channels"], self.sizes["grid"], self.sizes["grid"])

    def prompt_embeds(self, embedding: Tensor) -> Tensor:
        """One token for each square of latents, row by row: `[B, (g/p)², D]`."""
        mean = F.pixel_unshuffle(self.latents(embedding), self.sizes["patch"])
        return self.value(mean.flatten(2).transpose(1, 2)) + self.position + self.context(embedding)[:, None]

    def warm_latents(
        self, embedding: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None, scheduler: Any
    ) -> Tensor:
        """Start of sampling: expected latents and noise, mixed as at the schedule's last training step."""
        mean = self.latents(embedding)
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
    def from_pretrained(cls, folder: str | Path) -> LayoutReadout:
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


def _noise_like(value: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    """Gaussian noise of `value`'s shape; with a list of generators, sample i depends on generator i alone."""
    if isinstance(generator, Sequence):
        rows = [torch.randn(value.shape[1:], generator=g, device=g.device) for g in generator]
        return torch.stack(rows).to(value.device, value.dtype)
    device = generator.device if generator is not None else value.device
    return torch.randn(value.shape, generator=generator, device=device).to(value.device, value.dtype)


def load_layout(folder: str | Path) -> LayoutDecoder | LayoutReadout:
    """The layout of a decoder's folder; raises `CheckpointError` as `from_pretrained`."""
    config = Path(folder) / "config.json"
    named = config.is_file() and '"classes"' in config.read_text(encoding="utf-8", errors="replace")
    return (LayoutDecoder if named else LayoutReadout).from_pretrained(folder)
