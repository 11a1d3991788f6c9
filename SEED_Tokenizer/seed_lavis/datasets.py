"""Dataset builders and processors of the YAMLs, by their LAVIS names.

A set (lists, shards, image folders or other formats) has a YAML file in `lavis/configs/datasets`,
whose `build_info` names the files; nothing is downloaded. With `captioned: False` (by default for
LaVIT's model) captions are not read.

blip2_image_train   random crop, flip, CLIP normalisation
blip_image_eval     resize, normalise
blip_caption        text clean-up
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from seed_lavis import log
from seed_lavis.compat import BaseDatasetBuilder, BaseProcessor, registry
from seed_lavis.options import APPLICATION, locate
from seed_multimodal.config import load_yaml
from seed_multimodal.data.formats.contents import registered_formats
from seed_multimodal.data.formats.pairs import open_pairs
from seed_multimodal.data.stream.pairs_dataset import PairDataset
from seed_multimodal.errors import ConfigError, DataError
from seed_multimodal.images.augment import TrainTransform
from seed_multimodal.images.transforms import seed_image_processor
from seed_multimodal.models.seed.captions import BlipCaption
from seed_multimodal.settings import check_keys

PAIR_KEYS = ("image_key", "caption_key", "captioned", "cache")  # of `open_pairs`
BUILD_KEYS = ("format", "annotations", "images", "storage", "files", "splits", *PAIR_KEYS)
DATASET_KEYS = (
    "type", "data_type", "dataset_card", "vis_processor", "text_processor", "build_info",
)  # fmt: skip


class PairBuilder(BaseDatasetBuilder):
    """Builds the splits of `build_info`; randomness only from the run's seed."""

    def build_datasets(self) -> dict[str, PairDataset]:
        """The splits that the run uses: `SPLIT` for training, `SPLIT:eval` for evaluation."""
        check_keys(map(str, self.config), DATASET_KEYS, f"datasets.{self.name}")
        self.build_processors()
        if not self.config.get("text_processor"):
            self.text_processors = {"train": None, "eval": None}
        configuration = registry.get("configuration")
        run = configuration.run_cfg
        model_class = registry.get_model_class(configuration.model_cfg.arch)
        # Ending of a split's name, its splits, and the processors of its samples.
        uses = (
            ("", run.train_splits, "train"),
            (":eval", [*run.valid_splits, *run.test_splits], "eval"),
        )

        datasets = {}
        for split, spec in self.sources().items():
            if not any(split in splits for _, splits, _ in uses):
                continue
            try:
                source = open_pairs(spec, captioned=model_class.reads_captions)
            except DataError as error:
                raise DataError(f"datasets.{self.name}.build_info: {error}") from error
            log(f"{spec.get('files') or self.name}: {len(source):,} images in split {split!r}.")

            for ending, splits, processors in uses:
                if split in splits:
                    datasets[split + ending] = PairDataset(
                        source,
                        self.vis_processors[processors],
                        self.text_processors[processors] or self.text_processors["train"],
                        seed=run.seed,
                    )
        return datasets

    def sources(self) -> dict[str, Any]:
        """Split → arguments of `open_pairs`, from `build_info`."""
        config_key = f"datasets.{self.name}.build_info"
        build_info = OmegaConf.to_container(self.config.build_info, resolve=True)
        spec = {key: value for key, value in build_info.items() if value is not None}
        splits = spec.pop("splits", None)

        # 1. A format of a plug-in has splits itself.
        if spec.get("format") in registered_formats():
            if "files" in spec:
                spec["files"] = locate(spec["files"])
            splits = splits or {"train": "train", "val": "val"}
            return {split: {**spec, "split": name} for split, name in splits.items()}

        # 2. The files of each split: by `splits`, by `files` or LAVIS's `storage`, or by
        #    `annotations`.
        check_keys(spec, BUILD_KEYS, config_key)
        annotations = spec.pop("annotations", {})
        images = spec.pop("images", {})
        storage = spec.pop("storage", None)
        files = spec.pop("files", None) or storage
        if splits is None and files:
            splits = {"train": files}
        elif splits is None:
            splits = {split: entry.get("storage") for split, entry in annotations.items()}

        # 3. With what all splits have in common.
        if images.get("storage"):
            spec["image_root"] = locate(images["storage"])
        sources = {}
        for split, names in splits.items():
            if not names:
                raise ConfigError(f"{config_key} names no files for split {split!r}.")
            if isinstance(names, str):
                names = [names]
            sources[split] = {**spec, "files": [locate(str(name)) for name in names]}
        return sources


# A set is registered by the file of its defaults.
for _file in sorted((APPLICATION / "lavis/configs/datasets").glob("*/*.yaml")):
    (_name,) = load_yaml(_file)["datasets"]
    _attributes = {"name": _name, "DATASET_CONFIG_DICT": {"default": str(_file)}}
    registry.register_builder(_name)(type(_name, (PairBuilder,), _attributes))


def joined_splits(
    datasets: Mapping[str, Mapping[str, PairDataset]],
    names: Sequence[str],
    ratios: Mapping[str, float],
) -> tuple[list[PairDataset], list[float]]:
    """The splits `names` of all data sets, and their weights (without ratios none), see
    `StepBatches`.

    ratios: how often each data set is sampled; its weight is divided among its splits by their
        sizes.
    """
    for owner, ratio in ratios.items():
        if not ratio > 0:
            raise ConfigError(
                f"run.train_dataset_ratios: {owner} is {ratio} and would never be drawn; leave the "
                "data set out."
            )
    parts = []
    weights = []
    for owner, splits in datasets.items():
        chosen = [splits[name] for name in names if name in splits]
        total = sum(map(len, chosen))
        parts += chosen
        weights += [ratios.get(owner, 1.0) * len(part) / total for part in chosen]
    if not parts:
        wanted = " or ".join(repr(name.removesuffix(":eval")) for name in names)
        raise ConfigError(f"No data set of the configuration has a split {wanted}.")
    return parts, weights if ratios else []


class Processor(BaseProcessor):
    """Builds one of the library's transforms from the keys of the YAML's section."""

    @classmethod
    def from_config(cls, cfg: DictConfig) -> Any:
        """The transform; an unknown key is a `ConfigError`."""
        keys = OmegaConf.to_container(cfg, resolve=True)
        name = keys.pop("name")
        check_keys(keys, inspect.signature(cls.make).parameters, f"processor {name}")
        return cls.make(**keys)


@registry.register_processor("blip2_image_train")
class TrainImageProcessor(Processor):
    make = TrainTransform


@registry.register_processor("blip_image_eval")
class EvalImageProcessor(Processor):
    make = staticmethod(seed_image_processor)


@registry.register_processor("blip_caption")
class CaptionProcessor(Processor):
    make = BlipCaption
