"""Dataset builders, one for each set of the YAMLs: lists, shards, image folders or registered formats.

    datasets:
      conceptual_caption_3m:
        vis_processor:  {train: {name: blip2_image_train, image_size: 224}}
        text_processor: {train: {name: blip_caption}}
        build_info:
          annotations: {train: {storage: [cc3m.json]}}     lists (.json, .jsonl, .parquet) of pictures and captions
          images: {storage: /data/cc3m}                     folder of the paths in them (default: beside the list)
          storage: cc3m/{00000..00331}.tar                  or shards, or a folder of pictures and .txt files

`captioned: False` in build_info: pictures alone, whose captions are not read (for LaVIT's model, always). Nothing is
downloaded. A split is a `PairDataset`, addressed by (index, epoch).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from seed_lavis.compat import BaseDatasetBuilder, registry
from seed_lavis.log import log, log_rank
from seed_lavis.options import APPLICATION, locate, section_at
from seed_lavis.processors import BlipImageEval
from seed_multimodal.data.formats.pairs import PairSource, open_pairs
from seed_multimodal.data.formats.sources import registered
from seed_multimodal.data.stream.pair_dataset import PairDataset
from seed_multimodal.errors import ConfigError, DataError, first_line
from seed_multimodal.settings import check_keys

FORMATS = ("auto", "json", "jsonl", "parquet", "folder", "webdataset")
BUILD_KEYS = ("format", "annotations", "images", "storage", "splits", "image_key", "image_keys", "caption_key",
              "caption_file", "captioned", "cache")
DATASET_KEYS = ("type", "data_type", "dataset_card", "vis_processor", "text_processor", "build_info", "sample_ratio")
DEFAULTS = APPLICATION / "lavis" / "configs" / "datasets"


class PairBuilder(BaseDatasetBuilder):
    """Builds the splits that `build_info` names; random only by the run's seed."""

    name = ""
    train_dataset_cls = PairDataset
    eval_dataset_cls = PairDataset
    DATASET_CONFIG_DICT: dict[str, str] = {}

    def _download_data(self) -> None:
        """Nothing: sets are local files."""

    def build(self) -> dict[str, PairDataset]:
        """Split name → its samples.

        Raises:
            ConfigError: an unknown key, processor or format. DataError: files that are missing or malformed, by name.
        """
        run = registry.get("configuration").run_cfg
        built = {}
        for split, spec in self.sources().items():
            image, text = self.processors("train" if split in (run.get("train_splits") or ()) else "eval")
            source = self.open(spec)
            log(f"{self.name}: {len(source):,} pictures in split {split!r}.")
            built[split] = PairDataset(source, image, text, seed=int(run.get("seed", 42)), log=log_rank,
                                       max_bad_in_a_row=int(run.get("max_bad_in_a_row", 20)))
        return built

    def sources(self) -> dict[str, dict[str, Any]]:
        """For each split that the run uses, what `open_pairs` takes."""
        check_keys(map(str, self.config), DATASET_KEYS, f"datasets.{self.name}")
        run = registry.get("configuration").run_cfg
        wanted = {name for key in ("train_splits", "valid_splits", "test_splits") for name in run.get(key) or ()}
        info = self.build_info()
        specs = split_sources(info, f"datasets.{self.name}.build_info")
        model = registry.get_model_class(registry.get("configuration").model_cfg.arch)
        for spec in specs.values():
            if spec["format"] in registered():
                continue
            if not model.reads_captions:
                spec["captioned"] = False
        return {split: spec for split, spec in specs.items() if split in wanted}

    def build_info(self) -> dict[str, Any]:
        """The section `build_info` as plain values.

        Raises:
            ConfigError: it is empty or no section, or an interpolation in it fails.
        """
        where, section = f"datasets.{self.name}.build_info", self.config.get("build_info")
        if not isinstance(section, DictConfig):
            raise ConfigError(f"{where} must be a section of keys ({', '.join(BUILD_KEYS[:4])} …), it is {section!r}.")
        try:
            info = OmegaConf.to_container(section, resolve=True)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{where}: {first_line(error)}.") from error
        assert isinstance(info, dict)
        return info

    def open(self, spec: Mapping[str, Any]) -> PairSource:
        """The stored pairs of one split; errors also name the key that sets the files."""
        try:
            return open_pairs(spec)
        except DataError as error:
            raise DataError(f"{str(error).rstrip('.')} (set datasets.{self.name}.build_info in the YAML or with "
                            "--options).") from error

    def processors(self, kind: str) -> tuple[Any, Any]:
        """Picture and text processor for training or evaluation; evaluation's follow training's if not given."""
        if (self.config.get("vis_processor") or {}).get("train") is None:
            raise ConfigError(f"datasets.{self.name}.vis_processor.train is not given (blip2_image_train).")
        self.build_processors()
        image, text = self.vis_processors[kind], self.text_processors[kind]
        if image is None:
            image = BlipImageEval(int(self.config.vis_processor.train.get("image_size", 224)))
        if self.config.get("text_processor") is None:
            return image, None
        return image, text if text is not None else self.text_processors["train"]


def split_sources(info: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """`build_info` → for each split what `open_pairs` takes."""
    kind = info.get("format") or "auto"
    if kind in registered():
        more = {key: value for key, value in info.items() if key not in ("splits", "files") and value is not None}
        more |= {"files": locate(info["files"])} if info.get("files") else {}
        return {split: {"split": own, **more}
                for split, own in (section_at(info, "splits", where) or {"train": "train", "val": "val"}).items()}
    check_keys(map(str, info), BUILD_KEYS, where)
    if kind not in FORMATS:
        raise ConfigError(f"{where}.format must be {', '.join((*FORMATS, *registered()))}, not {kind!r}.")
    root = section_at(info, "images", where).get("storage")
    keys = ("image_key", "image_keys", "caption_key", "caption_file", "captioned", "cache")
    more = {**({"image_root": locate(root)} if root else {}), **_given(info, keys)}
    if kind == "webdataset" or (kind != "json" and (info.get("storage") or info.get("splits"))):
        shards = section_at(info, "splits", where) or {"train": info.get("storage")}
        return {split: {"format": kind, "files": _located(pattern, f"{where}.storage"), **more}
                for split, pattern in shards.items()}
    parts = section_at(info, "annotations", where) or {"train": None}
    lists = {split: section_at(parts, split, f"{where}.annotations").get("storage") for split in parts}
    return {split: {"format": kind, "files": _located(files, f"{where}.annotations.{split}.storage"), **more}
            for split, files in lists.items()}


def _given(info: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: info[key] for key in keys if info.get(key) is not None}


def _located(files: Any, where: str) -> list[str]:
    if not files:
        raise ConfigError(f"{where} names no files.")
    if not isinstance(files, str | list):
        raise ConfigError(f"{where} must be a path, a pattern or a list of them, not {files!r}.")
    return [locate(str(file)) for file in ([files] if isinstance(files, str) else files)]


def _register(name: str, defaults: str) -> type[PairBuilder]:
    builder = type(f"{name.title().replace('_', '')}Builder", (PairBuilder,), {
        "name": name, "DATASET_CONFIG_DICT": {"default": str(DEFAULTS / defaults)}, "__doc__": f"The set `{name}`."})
    return registry.register_builder(name)(builder)


ConceptualCaption3MBuilder = _register("conceptual_caption_3m", "conceptual_caption/defaults_3m.yaml")
UnsplashBuilder = _register("unsplash", "unsplash/defaults.yaml")
LaionCocoBuilder = _register("laion_coco", "laion/defaults_coco.yaml")
Laion400MBuilder = _register("laion_400m", "laion/defaults_400m.yaml")
PicturesBuilder = _register("pictures", "pictures/defaults.yaml")
CocoCaptionBuilder = _register("coco_caption", "coco/defaults_cap.yaml")
NanoBuilder = _register("nano", "nano/defaults.yaml")


def dataset_section(section: Any) -> DictConfig:
    """The section `datasets` of a YAML, or a `ConfigError` if there is none."""
    if not isinstance(section, DictConfig) or not len(section):
        raise ConfigError("The section 'datasets' names no data set.")
    return section
