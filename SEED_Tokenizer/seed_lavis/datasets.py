"""Dataset builders, one for each set of the YAMLs: lists, shards, image folders or other formats.

`build_info` names the files, see the YAMLs in `lavis/configs/datasets`; nothing is downloaded. With
`captioned: False` (always for LaVIT's model) captions are not read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from omegaconf import OmegaConf

from seed_lavis import log
from seed_lavis.compat import BaseDatasetBuilder, registry
from seed_lavis.options import APPLICATION, locate
from seed_multimodal.data.formats.contents import registered_formats
from seed_multimodal.data.formats.pairs import open_pairs
from seed_multimodal.data.stream.pairs_dataset import JoinedPairs, PairDataset
from seed_multimodal.data.stream.sampler import MixedOrder
from seed_multimodal.device import copy_to
from seed_multimodal.errors import ConfigError, DataError
from seed_multimodal.images.transforms import ImageTransform
from seed_multimodal.settings import check_keys

PAIR_KEYS = ("image_key", "caption_key", "captioned", "cache")  # of `open_pairs`
BUILD_KEYS = ("format", "annotations", "images", "storage", "files", "splits", *PAIR_KEYS)
DATASET_KEYS = (
    "type",
    "data_type",
    "dataset_card",
    "vis_processor",
    "text_processor",
    "build_info",
)
# Data set → file of its defaults below `lavis/configs/datasets`.
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
        """The splits that the run uses: `SPLIT` for training, `SPLIT:eval` for evaluation."""
        configuration = registry.get("configuration")
        run = configuration.run_cfg
        train = run.get("train_splits", ())
        held_out = (*run.get("valid_splits", ()), *run.get("test_splits", ()))
        reads_captions = registry.get_model_class(configuration.model_cfg.arch).reads_captions

        datasets: dict[str, PairDataset] = {}
        for split, spec in self.sources().items():
            if split not in train and split not in held_out:
                continue

            # 1. The files of the split.
            if not reads_captions and spec["format"] not in registered_formats():
                spec["captioned"] = False
            try:
                source = open_pairs(spec)
            except DataError as error:
                raise DataError(
                    f"{str(error).rstrip('.')} (set datasets.{self.name}.build_info in the YAML or "
                    "with --options)."
                ) from error
            log(f"{self.name}: {len(source):,} images in split {split!r}.")

            # 2. Its samples, by the processors of training or evaluation.
            for name, splits in ((split, train), (f"{split}:eval", held_out)):
                if split in splits:
                    image, text = self.transforms(training=name == split)
                    datasets[name] = PairDataset(
                        source,
                        image,
                        text,
                        seed=int(run.get("seed", 42)),
                        max_bad_in_a_row=int(run.get("max_bad_in_a_row", 20)),
                    )
        return datasets

    def transforms(self, training: bool) -> tuple[Any, Any]:
        """Image and text processor; evaluation's default to those of training."""
        self.build_processors()
        name = "train" if training else "eval"
        image = self.vis_processors[name]
        text = self.text_processors[name]
        if self.config.get("vis_processor", {}).get("train") is None:
            raise ConfigError(
                f"datasets.{self.name}.vis_processor.train is not given (blip2_image_train)."
            )
        if not self.config.get("text_processor"):
            return image, None
        return image, text or self.text_processors["train"]

    def sources(self) -> dict[str, dict[str, Any]]:
        """Split → arguments of `open_pairs`, from `build_info`."""
        config_key = f"datasets.{self.name}.build_info"
        check_keys(map(str, self.config), DATASET_KEYS, f"datasets.{self.name}")
        build_info = self.config.get("build_info") or OmegaConf.create({})
        info: Any = OmegaConf.to_container(build_info, resolve=True)
        if info.get("format") in registered_formats():
            return _registered_sources(info)
        check_keys(info, BUILD_KEYS, config_key)

        # 1. What all splits have in common.
        common: dict[str, Any] = {"format": info.get("format") or "auto"}
        image_root = (info.get("images") or {}).get("storage")
        if image_root:
            common["image_root"] = locate(image_root)
        for key in PAIR_KEYS:
            if info.get(key) is not None:
                common[key] = info[key]

        # 2. The files of each: by `splits`, by `files` or LAVIS's `storage`, or by `annotations`.
        names_by_split: dict[str, Any] = {}
        if info.get("splits"):
            names_by_split = info["splits"]
        elif info.get("files") or info.get("storage"):
            names_by_split = {"train": info.get("files") or info["storage"]}
        else:
            for split, annotation in (info.get("annotations") or {"train": {}}).items():
                names_by_split[split] = annotation.get("storage")
        sources: dict[str, dict[str, Any]] = {}
        for split, names in names_by_split.items():
            if not names:
                raise ConfigError(f"{config_key} names no files for split {split!r}.")
            if isinstance(names, str):
                names = [names]
            sources[split] = {**common, "files": [locate(str(name)) for name in names]}
        return sources


def _registered_sources(info: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Split → arguments of `open_pairs`, of a format of a plug-in, which has splits itself."""
    common = {
        key: value
        for key, value in info.items()
        if key not in ("splits", "files") and value is not None
    }
    if info.get("files"):
        common["files"] = locate(info["files"])
    splits = info.get("splits") or {"train": "train", "val": "val"}
    return {split: {"split": name, **common} for split, name in splits.items()}


for _name, _defaults in SETS.items():
    _file = str(APPLICATION / "lavis/configs/datasets" / f"{_defaults}.yaml")
    _attributes = {"name": _name, "DATASET_CONFIG_DICT": {"default": _file}}
    registry.register_builder(_name)(type(_name, (PairBuilder,), _attributes))


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
    """The order of the samples of `split_of(datasets, names)`.

    ratios: how often each data set is sampled.

    Returns None without ratios, or for a single split.
    """
    # 1. The splits, and the number of samples of each data set.
    owners: list[str] = []
    parts: list[PairDataset] = []
    totals: Counter[str] = Counter()
    for owner, splits in datasets.items():
        for name in names:
            if name in splits:
                owners.append(owner)
                parts.append(splits[name])
                totals[owner] += len(splits[name])
    if not ratios or len(parts) < 2:
        return None

    # 2. A data set's weight is divided among its splits by their sizes.
    weights: list[float] = []
    for owner, part in zip(owners, parts, strict=True):
        weights.append(ratios.get(owner, 1.0) * len(part) / totals[owner])
    sizes = [len(part) for part in parts]
    shard_sizes = [part.shard_sizes for part in parts]
    return MixedOrder(sizes, weights, seed, shard_sizes=shard_sizes)


def to_device(
    batch: Mapping[str, Any], device: torch.device, preprocessing: ImageTransform
) -> dict[str, Any]:
    """The batch with its tensors on `device`; images, uint8 from the workers, are normalised.

    preprocessing: of the model's vision encoder.
    """
    moved: dict[str, Any] = {}
    for key, value in batch.items():
        moved[key] = copy_to(device, value) if isinstance(value, torch.Tensor) else value
    if moved["image"].dtype == torch.uint8:
        moved["image"] = preprocessing.normalise(moved["image"])
    return moved
