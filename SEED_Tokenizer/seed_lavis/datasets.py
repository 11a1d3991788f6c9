"""Dataset builders, one for each set of the YAMLs: lists, shards, image folders or other formats.

`build_info` names the files, see the YAMLs in `lavis/configs/datasets`; nothing is downloaded. With
`captioned: False` (by default for LaVIT's model) captions are not read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf

from seed_lavis import log
from seed_lavis.compat import BaseDatasetBuilder, registry
from seed_lavis.options import APPLICATION, locate
from seed_multimodal.config import load_yaml
from seed_multimodal.data.formats.contents import registered_formats
from seed_multimodal.data.formats.pairs import open_pairs
from seed_multimodal.data.stream.loader import SampleDataset
from seed_multimodal.data.stream.pairs_dataset import CaptionedImage, PairDataset, join_pairs
from seed_multimodal.data.stream.sampler import MixedOrder
from seed_multimodal.errors import ConfigError, DataError
from seed_multimodal.settings import check_keys

PAIR_KEYS = "image_key caption_key captioned cache".split()  # of `open_pairs`
BUILD_KEYS = ["format", "annotations", "images", "storage", "files", "splits", *PAIR_KEYS]
DATASET_KEYS = "type data_type dataset_card vis_processor text_processor build_info".split()


class PairBuilder(BaseDatasetBuilder):
    """Builds the splits of `build_info`; randomness only from the run's seed."""

    name = ""
    train_dataset_cls = eval_dataset_cls = PairDataset

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
            ("", run.get("train_splits", ()), "train"),
            (":eval", (*run.get("valid_splits", ()), *run.get("test_splits", ())), "eval"),
        )

        datasets: dict[str, PairDataset] = {}
        for split, spec in self.sources().items():
            if not any(split in splits for _, splits, _ in uses):
                continue
            try:
                source = open_pairs(spec, captioned=model_class.reads_captions)
            except DataError as error:
                raise DataError(
                    f"{str(error).rstrip('.')} (set datasets.{self.name}.build_info in the YAML or "
                    "with --options)."
                ) from error
            log(f"{self.name}: {len(source):,} images in split {split!r}.")

            for ending, splits, processors in uses:
                if split in splits:
                    datasets[split + ending] = PairDataset(
                        source,
                        self.vis_processors[processors],
                        self.text_processors[processors] or self.text_processors["train"],
                        seed=int(run.get("seed", 42)),
                        max_bad_in_a_row=int(run.get("max_bad_in_a_row", 20)),
                    )
        return datasets

    def sources(self) -> dict[str, dict[str, Any]]:
        """Split → arguments of `open_pairs`, from `build_info`."""
        config_key = f"datasets.{self.name}.build_info"
        build_info: Any = OmegaConf.to_container(self.config.build_info, resolve=True)
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
        sources: dict[str, dict[str, Any]] = {}
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
    seed: int = 0,
) -> tuple[SampleDataset[CaptionedImage], MixedOrder | None]:
    """The splits `names` of all data sets as one, and its order, see `join_pairs`.

    ratios: how often each data set is sampled; its weight is divided among its splits by their
        sizes.
    """
    parts: list[PairDataset] = []
    weights: list[float] = []
    for owner, splits in datasets.items():
        chosen = [splits[name] for name in names if name in splits]
        total = sum(map(len, chosen))
        parts += chosen
        weights += [ratios.get(owner, 1.0) * len(part) / total for part in chosen]
    if not parts:
        wanted = " or ".join(repr(name.removesuffix(":eval")) for name in names)
        raise ConfigError(f"No data set of the configuration has a split {wanted}.")
    return join_pairs(parts, weights if ratios else (), seed)
