"""Inputs of pre-tokenisation: descriptions, shards, field mappings, transforms.

Faulty samples: test_faults.py.
"""

import pytest
from data_files import jpeg, lines
from repository import APPLICATION

from seed_multimodal.config import load_yaml
from seed_multimodal.data.formats.shards import write_shard
from seed_multimodal.errors import ConfigError
from seed_multimodal.images.transforms import ImageTransform, get_transform
from seed_multimodal.language.prompts import QA_SUFFIX
from seed_multimodal.pretokenize.dataset import DecodedSample, TaskDecoder, decode_shards
from seed_multimodal.pretokenize.encode import read_transform
from seed_multimodal.pretokenize.inputs import (
    InputSettings,
    list_shards,
    parse_fields,
    read_input_settings,
)
from seed_multimodal.pretokenize.record_types import RECORD_TYPES

CONFIGS = APPLICATION / "configs"


# ---- descriptions


def test_read_input_settings_of_the_original():
    # Other thresholds would keep other images than the original.
    settings = read_input_settings(CONFIGS / "data" / "caption_torchdata_preprocess.yaml")
    filters = (settings.similarity_thr, settings.min_resolution, settings.min_aspect_ratio)
    assert filters == (0.25, 180, 0.55)
    assert (settings.format, settings.use_caption_in_metadata) == ("tar", False)
    # Without these keys the builder's own defaults.
    target = load_yaml(CONFIGS / "data" / "caption_torchdata_preprocess.yaml")["_target_"]
    bare = read_input_settings({"_target_": target, "data_dir": "a"})
    assert bare.files == "a"
    assert (bare.similarity_thr, bare.min_resolution, bare.min_aspect_ratio) == (0.2, 180, 0.666)


@pytest.mark.parametrize(
    "path", sorted((CONFIGS / "data").glob("*_preprocess.yaml")), ids=lambda path: path.stem
)
def test_read_input_settings_of_the_repository(path):
    kind = path.stem.removesuffix("_preprocess").removeprefix("nano_").removesuffix("_torchdata")
    settings = read_input_settings(path)
    assert RECORD_TYPES[kind].keys(settings.fields) is not None


def test_keys_of_presets_and_mappings():
    # Which fields of a published list are the question and the answer.
    qa = RECORD_TYPES["qa"]
    assert qa.keys("vqa")["suffix"] == QA_SUFFIX
    assert qa.keys(parse_fields("image=file_name,answer=a"))["image"] == "file_name"
    for wrong, named in (("vqaa", "'vqa'"), ({"answers": "a"}, "'answer'")):
        with pytest.raises(ConfigError, match=named):
            qa.keys(wrong)


# ---- samples and shards


def decode(settings: InputSettings) -> DecodedSample:
    """The only sample of captions."""
    decoder = TaskDecoder(RECORD_TYPES["caption"], settings, ImageTransform(16))
    (task,) = decode_shards(list_shards(settings, 4), decoder, 3, workers=0)
    (sample,) = task.samples
    return sample


@pytest.mark.parametrize(
    "members, text, top",
    [
        ({"txt": b" a text \n", "json": b'{"top_caption": "a top", "n": 1}'}, "a text", "a top"),
        ({"json": b'{"caption": "only json"}'}, "only json", None),
    ],
)
def test_decode_shards_of_text_or_metadata(tmp_path, members, text, top):
    write_shard(tmp_path / "a.tar", [("000", {"jpg": jpeg(0), **members})])
    settings = InputSettings(files=str(tmp_path / "a.tar"))
    sample = decode(settings)
    assert sample.record["text"] == text
    settings.use_caption_in_metadata = True
    sample = decode(settings)
    if top is None:
        assert "a.tar: sample 000" in str(sample.note)
    else:
        assert sample.record["text"] == top


def test_list_shards(tmp_path):
    # An output shard for each tar; lists are cut into blocks.
    for name in ("a", "deep/a"):
        write_shard(tmp_path / "tars" / f"{name}.tar", [("0", {"txt": b"words"})])
    tars = list_shards(InputSettings(files=str(tmp_path / "tars")), 10)
    assert sorted(shard.name for shard in tars) == ["a", "deep/a"]
    lines(tmp_path / "a.jsonl", [{"image": "x.jpg"}] * 7)
    shards = list_shards(InputSettings(files=str(tmp_path / "a.jsonl")), 3)
    assert [(shard.start, shard.stop) for shard in shards] == [(0, 3), (3, 6), (6, 7)]


# ---- pixels


def test_read_transform_of_our_files():
    blip = get_transform("blip", False, 224)
    assert read_transform(None, blip) is blip
    path = CONFIGS / "processer" / "blip_transform.yaml"
    assert read_transform(path, ImageTransform(224)) == blip
    with pytest.raises(ConfigError, match="64 x 64 .* 224 x 224"):
        read_transform(CONFIGS / "processer" / "nano_transform.yaml", blip)
