"""Conditioners: small networks of other packages next to a U-Net, which compute from an embedding
where its sampling starts and what its cross-attention reads.

A package registers a class by an entry point:

    [project.entry-points."seed_multimodal.conditioners"]
    mine = "my_package.conditioner:MyConditioner"

Its weights are in a folder `conditioner/` whose `config.json` has `"model_type": "mine"`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import CheckpointError
from seed_multimodal.plugins import import_entry, registered
from seed_multimodal.settings import nearest

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

Generators = Sequence[torch.Generator]  # one for each image

# Next to the U-Net's or an adapter's weights. Without `model_type` the folder's name is the type.
CONDITIONER_FOLDERS = ("conditioner", "layout")


class Conditioner(Protocol):
    """A module that computes further conditions from embeddings `[B, E]` or `[B, N, W]`."""

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load a folder. Raises `CheckpointError`."""

    def expected_latents(self, embeds: Tensor) -> Tensor:
        """Latents `[B, C, h, w]` without noise, in its own size, for `known_images`."""

    def warm_latents(
        self,
        embeds: Tensor,
        generators: Generators,
        scheduler: SchedulerMixin,
        condition: Tensor | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Start of sampling, `[B, C, h, w]`.

        condition: latents of SEED-X's condition images, zeros for none.
        size: h and w.
        """

    def tokens(self, embeds: Tensor) -> Tensor:
        """Input of a U-Net's cross-attention that has no other prompt (unCLIP's), `[B, n, D]`."""


def load_conditioner(folder: Path) -> Conditioner | None:
    """The conditioner in the folder of a U-Net; None: there is none.

    Raises CheckpointError: no package has registered its type.
    """
    parts = [folder / name for name in CONDITIONER_FOLDERS if (folder / name).is_dir()]
    if not parts:
        return None
    file = parts[0] / "config.json"
    config = read_json_object(file, CheckpointError)
    name = str(config.get("model_type", parts[0].name))
    entries = registered("conditioners")
    if name not in entries:
        raise CheckpointError(
            f"{file}: no installed package has a conditioner {name!r}{nearest(name, entries)}; "
            "install the one that made this model."
        )
    conditioner_class: type[Conditioner] = import_entry(entries[name])
    return conditioner_class.from_pretrained(parts[0])


def seeded_noise(
    generators: Generators, shape: Sequence[int], dtype: torch.dtype | None = None
) -> Tensor:
    """Noise `[B, *shape]` on the CPU, each image's by its own generator."""
    options = {"dtype": dtype or torch.float32, "device": "cpu"}
    return torch.stack([torch.randn(*shape, generator=row, **options) for row in generators])


def pooled_tokens(features: Tensor, count: int) -> Tensor:
    """`[B, N, W]` → `[B, count, W]`: means of neighbours in raster order.

    Unchanged if N is no multiple of `count`.
    """
    n_tokens = features.shape[1]
    if n_tokens % count or n_tokens < 2 * count:
        return features
    return F.avg_pool1d(features.mT, n_tokens // count).mT
