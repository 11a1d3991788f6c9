"""Dataset builders, one for each set of the YAMLs: lists, shards, image folders or registered formats.

`build_info`: files, see the YAMLs in `lavis/configs/datasets`; nothing is downloaded. With `captioned: False` (always
for LaVIT's model) captions are not read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from omegaconf import OmegaConf

from seed_lavis import log
from seed_lavis.compat import BaseDatasetBuilder, registry
from seed_lavis.options import APPLICATION, locate
from seed_lavis.processors import Processor
from seed_multimodal.data.formats.pairs import open_pairs
from seed_multimodal.data.formats.sources import registered_formats
from seed_multimodal.data.stream.pairs_dataset import JoinedPairs, PairDataset
from seed_multimodal.data.stream.sampler import MixedOrder
from seed_multimodal.device import copy_to
from seed_multimodal.errors import ConfigError, DataError
from seed_multimodal.images.transforms import normalise, seed_image_processor
from seed_multimodal.settings import check_keys

OF_PAIRS = ("image_key", "caption_key", "captioned", "cache")
BUILD_KEYS = ("format", "annotations", "images", "storage", "splits", *OF_PAIRS)
DATASET_KEYS = (
    "type",
    "data_type",
    "dataset_card",
    "vis_processor",
    "text_processor",
    "build_info",
)
SETS = {
    "conceptual_caption_3m": "conceptual_caption/defaults_3m",
    "unsplash": "unsplash/defaults",
    "laion_coco": "laion/defaults_coco",
    "laion_400m": "laion/defaults_400m",
    "pictures": "pictures/defaults",
    "coco_caption": "coco/defaults_cap",
    "nano": "nano/defaults",
}


class PairBuilder(BaseDatasetBuilder):
    """Builds the splits of `build_info`; randomness only from the run's seed."""

    name = ""
    train_dataset_cls = eval_dataset_cls = PairDataset

    def build_datasets(self) -> dict[str, PairDataset]:
        """`SPLIT` → its samples for training, `SPLIT:eval` → those for evaluation, of the splits that the run uses."""
        configuration, built = registry.get("configuration"), {}
        run, captioned = (
            configuration.run_cfg,
            registry.get_model_class(configuration.model_cfg.arch).reads_captions,
        )
        train = run.get("train_splits", ())
        held_out = (*run.get("valid_splits", ()), *run.get("test_splits", ()))
        used = [
            (split, spec) for split, spec in self.sources().items() if split in (*train, *held_out)
        ]
        for split, spec in used:
            if not captioned and spec["format"] not in registered_formats():
                spec["captioned"] = False
            try:
                source = open_pairs(spec)
            except DataError as error:
                raise DataError(
                    f"{str(error).rstrip('.')} (set datasets.{self.name}.build_info in the YAML or with "
                    "--options)."
                ) from error
            log(f"{self.name}: {len(source):,} images in split {split!r}.")
            for name, wanted in ((split, split in train), (f"{split}:eval", split in held_out)):
                if wanted:
                    built[name] = PairDataset(
                        source,
                        *self.transforms(name == split),
                        seed=int(run.get("seed", 42)),
                        max_bad_in_a_row=int(run.get("max_bad_in_a_row", 20)),
                    )
        return built

    def transforms(self, training: bool) -> tuple[Any, Any]:
        """Image and text processor; evaluation's follow training's if not given."""
        self.build_processors()
        image, text = (
            processors["train" if training else "eval"]
            for processors in (self.vis_processors, self.text_processors)
        )
        if self.config.get("vis_processor", {}).get("train") is None:
            raise ConfigError(
                f"datasets.{self.name}.vis_processor.train is not given (blip2_image_train)."
            )
        image = image or Processor(
            seed_image_processor(self.config.vis_processor.train.get("image_size", 224))
        )
        return image, (text or self.text_processors["train"]) if self.config.get(
            "text_processor"
        ) else None

    def sources(self) -> dict[str, dict[str, Any]]:
        """Split → arguments of `open_pairs`, from `build_info`."""
        where = f"datasets.{self.name}.build_info"
        check_keys(map(str, self.config), DATASET_KEYS, f"datasets.{self.name}")
        info: Any = OmegaConf.to_container(
            self.config.get("build_info") or OmegaConf.create({}), resolve=True
        )
        kind, splits = info.get("format") or "auto", info.get("splits")
        if kind in registered_formats():
            more = {
                key: value
                for key, value in info.items()
                if key not in ("splits", "files") and value is not None
            }
            more |= {"files": locate(info["files"])} if info.get("files") else {}
            return {
                split: {"split": name, **more}
                for split, name in (splits or {"train": "train", "val": "val"}).items()
            }
        check_keys(info, BUILD_KEYS, where)
        root = (info.get("images") or {}).get("storage")
        more = {"image_root": locate(root)} if root else {}
        more |= {key: info[key] for key in OF_PAIRS if info.get(key) is not None}
        lists = {
            split: part.get("storage")
            for split, part in (info.get("annotations") or {"train": {}}).items()
        }
        found = {}
        for split, names in (
            splits or ({"train": info["storage"]} if info.get("storage") else lists)
        ).items():
            if not names:
                raise ConfigError(f"{where} names no files for split {split!r}.")
            files = [locate(str(name)) for name in ([names] if isinstance(names, str) else names)]
            found[split] = {"format": kind, **more, "files": files}
        return found


for _name, _defaults in SETS.items():
    registry.register_builder(_name)(
        type(
            _name,
            (PairBuilder,),
            {
                "name": _name,
                "DATASET_CONFIG_DICT": {
                    "default": str(APPLICATION / "lavis/configs/datasets" / f"{_defaults}.yaml")
                },
            },
        )
    )


def split_of(
    datasets: Mapping[str, Mapping[str, PairDataset]], names: Sequence[str]
) -> PairDataset | JoinedPairs:
    """The concatenated splits `names` of all data sets."""
    parts = [splits[name] for splits in datasets.values() for name in names if name in splits]
    if not parts:
        wanted = " or ".join(repr(name.removesuffix(":eval")) for name in names)
        raise ConfigError(f"No data set of the configuration has a split {wanted}.")
    return parts[0] if len(parts) == 1 else JoinedPairs(parts)


def mixed_order(
    datasets: Mapping[str, Mapping[str, PairDataset]],
    names: Sequence[str],
    ratios: Mapping[str, float],
    seed: int,
) -> MixedOrder | None:
    """The order in which `split_of(datasets, names)` is drawn with `ratios`; None without them or for a single set."""
    parts = [
        (owner, splits[name])
        for owner, splits in datasets.items()
        for name in names
        if name in splits
    ]
    if not ratios or len(parts) < 2:
        return None
    whole = {owner: sum(len(part) for other, part in parts if other == owner) for owner, _ in parts}
    weights = [ratios.get(owner, 1.0) * len(part) / whole[owner] for owner, part in parts]
    return MixedOrder(
        [len(part) for _, part in parts], weights, seed, layouts=[part.layout for _, part in parts]
    )


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on `device`, images (uint8 from the data workers) normalised there."""
    moved = {
        key: copy_to(device, value) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
    }
    if moved["image"].dtype == torch.uint8:
        moved["image"] = normalise(moved["image"])
    return moved
