"""The set `nano_views`: the nano speed run's work folder as training batches for both stages.

    datasets:
      nano_views:
        build_info:
          work: runs/pico              views.u8, embeddings.safetensors and config.yaml of the speed run
          data: data/nano64            captions and splits (default: $SEED_NANO_DATA, else data/nano64)
          canonical_target: False      True: the target of any view is the embedding of the picture itself

A sample is one kept view of a picture, one of its captions, and the image embedding that the codes must carry. Both
choices are functions of (seed, epoch, index). Batches are gathered as a whole, so no data workers are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seed_lavis.builders import DATASET_KEYS, DEFAULTS, PairBuilder
from seed_lavis.compat import registry
from seed_lavis.log import log
from seed_lavis.options import locate
from seed_multimodal.errors import ConfigError, DataError
from seed_multimodal.settings import check_keys, read_settings
from seed_multimodal.training.nano.config import load_config
from seed_multimodal.training.nano.views import open_views, to_clip
from seed_multimodal.training.nano.workspace import Workspace
from seed_multimodal.weights import load_state_dict

SPLITS = ("train", "val")
MAKE = "make it with: bash scripts/nano_speedrun.sh, or python -m seed_multimodal.training.nano --only vae,clip,recipe"


class NanoViews:
    """Some pictures of the work folder, in batches.

    Args:
        views: uint8 `[N, V, 3, S, S]`; embeddings: `[N, V, E]`; captions: texts of each of the N pictures.
        index: which of the N pictures are in this set.
        canonical_target: the target is the embedding of view 0 whatever view is seen.
    """

    def __init__(self, views: Tensor, embeddings: Tensor, captions: Sequence[Sequence[str]], index: Sequence[int],
                 *, seed: int = 0, canonical_target: bool = False) -> None:
        self.views, self.embeddings, self.captions = views, embeddings, captions
        self.index = torch.tensor(list(index), dtype=torch.long)
        self.counts = torch.tensor([len(captions[i]) for i in index], dtype=torch.long)
        self.seed, self.canonical_target = seed, canonical_target
        self.features: Tensor | None = None
        self._epoch = -1
        self._view = self._caption = torch.zeros(0, dtype=torch.long)

    def __len__(self) -> int:
        return len(self.index)

    def get(self, index: int, epoch: int = 0) -> dict[str, Any]:
        """One sample: `get_batch` of one, without the batch's axis."""
        return {name: value[0] for name, value in self.get_batch(np.array([index]), epoch).items()}

    def get_batch(self, indices: np.ndarray, epoch: int = 0) -> dict[str, Any]:
        """`image` float32 `[B, 3, S, S]` normalised for CLIP, `caption` `[B]` texts, `target` float32 `[B, E]`."""
        self._choose(epoch)
        places = torch.as_tensor(indices, dtype=torch.long)
        chosen, view = self.index[places], self._view[places]
        texts = [self.captions[i][c] for i, c in zip(chosen.tolist(), self._caption[places].tolist(), strict=True)]
        seen = torch.zeros_like(view) if self.canonical_target else view
        known = {} if self.features is None else {"vit_features": self.features[places, view].float()}
        return {"image": to_clip(self.views[chosen, view]), "caption": texts,
                "target": self.embeddings[chosen, seen].float(), **known}

    @torch.no_grad()
    def cache_tower(self, tower: Callable[[Tensor], Tensor], device: torch.device, batch: int = 256) -> None:
        """Run a frozen vision tower once over every view; batches then hold its output `vit_features` `[B, T, W]`.

        In batches of a fixed size, so that a resumed run gets the same numbers.
        """
        flat = self.views[self.index].flatten(0, 1)
        parts = [tower(to_clip(part, device)).half().cpu() for part in flat.split(batch)]
        self.features = torch.cat(parts).unflatten(0, (len(self), self.views.shape[1]))

    def _choose(self, epoch: int) -> None:
        """View and caption of every sample in an epoch, drawn at once."""
        if epoch == self._epoch:
            return
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        self._view = torch.randint(self.views.shape[1], (len(self),), generator=generator)
        self._caption = (torch.rand(len(self), generator=generator, dtype=torch.float64) * self.counts).long()
        self._epoch = epoch


@dataclass
class ViewsInfo:
    """The section `build_info`."""

    work: str
    data: str | None = None
    canonical_target: bool = False


@registry.register_builder("nano_views")
class NanoViewsBuilder(PairBuilder):
    """Builds `NanoViews` for the splits that the run uses: train (up to the speed run's `limit`) and val."""

    name = "nano_views"
    train_dataset_cls = NanoViews
    eval_dataset_cls = NanoViews
    DATASET_CONFIG_DICT = {"default": str(DEFAULTS / "nano" / "defaults_views.yaml")}

    def _download_data(self) -> None:
        """Everything is local."""

    def build(self) -> dict[str, NanoViews]:  # type: ignore[override]
        """Split name → its samples.

        Raises:
            ConfigError: an unknown key or split. DataError: the work folder lacks a file, or its files disagree.
        """
        check_keys(map(str, self.config), DATASET_KEYS, f"datasets.{self.name}")
        info = read_settings(ViewsInfo, self.build_info(), f"datasets.{self.name}.build_info")
        run = registry.get("configuration").run_cfg
        wanted = [name for key in ("train_splits", "valid_splits", "test_splits") for name in run.get(key) or ()]
        unknown = [name for name in wanted if name not in SPLITS]
        if unknown:
            raise ConfigError(f"{self.name} has the splits {' and '.join(SPLITS)}, not {unknown[0]!r}.")
        parts = read_work(Path(locate(info.work)), info.data)
        built = {}
        for split in dict.fromkeys(wanted):
            index = parts["space"].train if split == "train" else parts["space"].held_out
            built[split] = NanoViews(parts["views"], parts["embeddings"], parts["captions"], index,
                                     seed=int(run.get("seed", 42)), canonical_target=info.canonical_target)
            log(f"{self.name}: {len(index):,} pictures in split {split!r}, {parts['views'].shape[1]} views of each.")
        return built


def read_work(work: Path, data: str | None) -> dict[str, Any]:
    """`space`, `views` `[N, V, 3, S, S]`, `embeddings` `[N, V, E]` and `captions` of a speed run's work folder."""
    for name in ("config.yaml", "views.u8", "embeddings.safetensors"):
        if not (work / name).is_file():
            raise DataError(f"{work}: holds no {name}; {MAKE}.")
    config = load_config(work / "config.yaml")
    space = Workspace(config, Path(locate(data)) if data else None, work, work / "system")
    captions = [record.captions for record in space.nano.records]
    views = open_views(work / "views.u8", len(captions), config.views, config.image_size)
    embeddings = load_state_dict(work / "embeddings.safetensors")["value"]
    if embeddings.shape[:2] != views.shape[:2]:
        raise DataError(f"{work}/embeddings.safetensors: is for {tuple(embeddings.shape[:2])} pictures and views, "
                        f"views.u8 holds {tuple(views.shape[:2])}; remove both and {MAKE}.")
    return {"space": space, "views": views, "embeddings": embeddings, "captions": captions}
