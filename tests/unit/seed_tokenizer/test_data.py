"""Data sets of a YAML's section `datasets`: builders, processors, joined sets."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from yaml_tables import read_tables

from seed_multimodal.data.formats.shards import write_shard
from seed_multimodal.errors import ConfigError, DataError
from seed_multimodal.images.io import image_to_bytes

TABLES = read_tables(__file__)


def build(name, info: dict, valid: str = "val", **more) -> dict:
    """The splits that LAVIS's task would build for this data set."""
    from omegaconf import OmegaConf
    from seed_lavis.compat import registry
    from seed_lavis.options import RunOptions

    run = OmegaConf.structured(RunOptions(seed=3, valid_splits=[valid]))
    registry.register(
        "configuration",
        SimpleNamespace(run_cfg=run, model_cfg=SimpleNamespace(arch="blip2_casual")),
    )
    builder = registry.get_builder_class(name)
    config = OmegaConf.merge(
        OmegaConf.load(builder.default_config_path()).datasets[name],
        {**TABLES["processors"], **more, "build_info": info},
    )
    return builder(config).build_datasets()


def pairs(images: Path) -> dict:
    """The section of a json list."""
    return {
        "annotations": {"train": {"storage": str(images / "pairs.json")}},
        "images": {"storage": str(images)},
    }


def test_build_datasets_of_a_json_list(images):
    # Training gets random views, another in each epoch; evaluation the whole image.
    built = build("conceptual_caption_3m", pairs(images), valid="train")
    assert list(built) == ["train", "train:eval"]
    sample, again, other = (built["train"].get(5, epoch) for epoch in (0, 0, 1))
    assert sample["image"].shape == (3, 32, 32)
    assert len(sample["caption"].split()) <= 3
    assert torch.equal(sample["image"], again["image"])
    assert not torch.equal(sample["image"], other["image"])
    assert torch.equal(*(built["train:eval"].get(5, epoch)["image"] for epoch in (0, 1)))


def test_build_datasets_of_shards_with_another_caption_key(tmp_path):
    # LAION-COCO has `top_caption`; a wrong key is named with the file.
    image = image_to_bytes(Image.new("RGB", (40, 30), (200, 10, 10)), "JPEG")
    sample = {"jpg": image, "json": b'{"top_caption": "A Red FIELD, far away"}'}
    for index in range(2):
        write_shard(tmp_path / f"{index:05d}.tar", [(f"{row}", sample) for row in range(3)])
    built = build(
        "laion_coco",
        {"files": str(tmp_path / "{00000..00001}.tar"), "cache": str(tmp_path / "copies")},
    )
    assert len(built["train"]) == 6
    assert built["train"].get(4)["caption"] == "a red field,"
    wrong = {"storage": str(tmp_path / "*.tar"), "caption_key": "caption"}
    with pytest.raises(DataError, match=r"00000\.tar.*'caption'"):
        build("laion_coco", wrong)["train"].get(0)


def test_joined_splits_of_a_set_that_is_never_drawn():
    from seed_lavis.datasets import joined_splits

    sets = {name: {"train": [0] * size} for name, size in (("a", 3), ("b", 5))}
    assert joined_splits(sets, ["train"], {"a": 4.0}) == ([[0] * 3, [0] * 5], [4.0, 1.0])
    for ratio in (0.0, -1.0, math.nan):
        with pytest.raises(ConfigError, match="train_dataset_ratios: b is"):
            joined_splits(sets, ["train"], {"a": 1.0, "b": ratio})


def test_build_datasets_of_nano():
    # Scenes are drawn, and held out ones never change.
    nano = build("nano", {})
    assert set(nano) == {"train", "val:eval"}
    assert torch.equal(nano["val:eval"].get(0)["image"], nano["val:eval"].get(0, 9)["image"])


@pytest.mark.parametrize("case", TABLES["wrong"], ids=str)
def test_build_datasets_with_a_wrong_section(case):
    with pytest.raises((ConfigError, DataError), match=case["named"]):
        build("unsplash", case["info"], **case["more"])
