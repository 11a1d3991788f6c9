"""Inputs of pre-tokenisation: descriptions, shards, field mappings, transforms."""

from __future__ import annotations

import io
import json

import pytest
import torch
from data_files import jpeg
from PIL import Image
from repository import ROOT

from seed_multimodal.data.formats.shards import write_shard
from seed_multimodal.data.pretokenize.dataset import DecodedSample, TaskDataset, decode_shards
from seed_multimodal.data.pretokenize.encode import read_transform
from seed_multimodal.data.pretokenize.frames import augmented_view
from seed_multimodal.data.pretokenize.inputs import (
    InputSettings,
    list_shards,
    parse_fields,
    read_input_settings,
)
from seed_multimodal.data.pretokenize.record_types import RECORD_TYPES
from seed_multimodal.errors import ConfigError
from seed_multimodal.images.transforms import ImageTransform, get_transform
from seed_multimodal.language.prompts import DESCRIBE_PROMPT, QA_SUFFIX

CONFIGS = ROOT / "MultiModalLLM" / "configs"


def decode(
    kind: str, settings: InputSettings, workers: int = 0
) -> list[tuple[DecodedSample, torch.Tensor]]:
    """All samples of the inputs, and the pixels of each."""
    dataset = TaskDataset(RECORD_TYPES[kind], settings, ImageTransform(16))
    return [
        (sample, task.pixels[[row for rows in sample.rows for row in rows or ()]])
        for task in decode_shards(list_shards(settings, 4), dataset, 3, workers)
        for sample in task.samples
    ]


def test_read_input_settings_of_the_original():
    caption = read_input_settings({**load("caption_torchdata_preprocess"), "data_dir": ["a", "b"]})
    assert (caption.similarity_thr, caption.min_resolution, caption.min_aspect_ratio) == (
        0.25,
        180,
        0.55,
    )
    assert (
        caption.files == ["a", "b"]
        and caption.format == "tar"
        and not caption.use_caption_in_metadata
    )
    qa = read_input_settings(CONFIGS / "data" / "question_answer_torchdata_eval.yaml")
    assert qa.files == "data/sft_data/VQAv2" and qa.format == "json"
    target = load("caption_torchdata_preprocess")["_target_"]
    bare = read_input_settings({"_target_": target, "data_dir": "a"})
    assert (bare.similarity_thr, bare.min_resolution, bare.min_aspect_ratio) == (0.2, 180, 0.666)


def load(name: str) -> dict:
    from omegaconf import OmegaConf

    from seed_multimodal.config import load_yaml

    return OmegaConf.to_container(load_yaml(CONFIGS / "data" / f"{name}.yaml"))


@pytest.mark.parametrize(
    "path", sorted((CONFIGS / "data").glob("*_preprocess.yaml")), ids=lambda path: path.stem
)
def test_read_input_settings_of_the_repository(path):
    kind = path.stem.removesuffix("_preprocess").removeprefix("nano_").removesuffix("_torchdata")
    settings = read_input_settings(path)
    assert RECORD_TYPES[kind].keys(settings.fields) is not None


@pytest.mark.parametrize(
    "config, message",
    [
        (
            {
                "_target_": "src.data.torchdata_preprocess.build_caption_datapipes_with_pixel",
                "data_dir": "a",
            },
            "did you mean 'src.data.torchdata_preprocess.build_caption_datapipes_with_pixels'",
        ),
        ({"files": "a", "min_resolutoin": 3}, "did you mean 'min_resolution'"),
    ],
)
def test_read_input_settings_with_wrong_names(config, message):
    with pytest.raises(ConfigError, match=message):
        read_input_settings(config)


def test_keys_of_presets_and_mappings():
    qa = RECORD_TYPES["qa"]
    assert qa.keys({}) == {
        "image": "",
        "question": "question",
        "answer": "caption",
        "ask": DESCRIBE_PROMPT,
        "suffix": "",
    }
    assert qa.keys("vqa")["suffix"] == QA_SUFFIX and qa.keys("vqa")["ask"] == ""
    assert qa.keys(parse_fields("image=file_name,answer=a"))["image"] == "file_name"
    assert (
        qa.keys({"image": "file_name"})["ask"] == ""
    )  # the defaults of a mapping are those of plain questions
    with pytest.raises(ConfigError, match="did you mean 'vqa'"):
        qa.keys("vqaa")
    with pytest.raises(ConfigError, match="did you mean 'answer'"):
        qa.keys({"answers": "a"})


def test_decode_shards_of_a_folder(
    tmp_path,
):
    for file_index in range(3):
        (tmp_path / f"{file_index}.jpg").write_bytes(jpeg(file_index))
        if file_index:
            (tmp_path / f"{file_index}.txt").write_text(f"image {file_index}\n")
    entries = [entry for entry, _ in decode("caption", InputSettings(files=str(tmp_path)))]
    assert "0.jpg: has no caption: no .txt" in entries[0].error
    assert [entry.fields["text"] for entry in entries[1:]] == ["image 1", "image 2"]


def test_decode_shards_of_tars_with_text_or_metadata(
    tmp_path,
):
    samples = [
        (
            "000",
            {"jpg": jpeg(0), "txt": b" a text \n", "json": b'{"top_caption": "a top", "n": 1}'},
        ),
        ("001", {"png": jpeg(1), "json": b'{"caption": "only json"}'}),
        ("002", {"txt": b"no image"}),
        ("003", {"jpg": jpeg(3)}),
        ("004", {"jpg": jpeg(4), "txt": b"\xff\xfe"}),
        ("005", {"jpg": jpeg(5)[:-300], "txt": b"cut off"}),
        ("006", {"jpg": jpeg(6), "json": b"[1"}),
    ]
    write_shard(tmp_path / "a.tar", samples)
    settings = InputSettings(files=str(tmp_path / "a.tar"))
    entries = [entry for entry, _ in decode("caption", settings)]
    assert entries[0].fields["text"] == "a text" and entries[0].fields["metadata"] == {
        "top_caption": "a top",
        "n": 1,
    }
    assert entries[1].fields["text"] == "only json"
    for entry, phrase in zip(
        entries[2:],
        (
            "has no image: no .jpg",
            "has no caption",
            "not UTF-8",
            "truncated or damaged",
            "is not JSON",
        ),
        strict=True,
    ):
        assert phrase in entry.error and f"a.tar: sample 00{entry.index}" in entry.error
    settings.use_caption_in_metadata = True
    entries = [entry for entry, _ in decode("caption", settings)]
    assert (
        entries[0].fields["text"] == "a top"
        and "nothing under key 'top_caption'" in entries[1].error
    )


@pytest.mark.process
def test_decode_shards_with_workers(
    tmp_path,
):
    write_shard(
        tmp_path / "a.tar", [(f"{n:03d}", {"jpg": jpeg(n), "txt": b"w"}) for n in range(10)]
    )
    alone, parallel = (
        decode("caption", InputSettings(files=str(tmp_path / "a.tar")), workers)
        for workers in (0, 2)
    )
    assert [entry.index for entry, _ in parallel] == list(range(10))
    assert all((a == b).all() for (_, a), (_, b) in zip(alone, parallel, strict=True))


def test_list_shards_of_tars_and_blocks(
    tmp_path,
):
    for name in ("b", "a", "deep/a"):
        write_shard(tmp_path / "tars" / f"{name}.tar", [("0", {"jpg": jpeg(0), "txt": b"words"})])
    assert sorted(
        shard.name for shard in list_shards(InputSettings(files=str(tmp_path / "tars")), 10)
    ) == ["a", "b", "deep/a"]
    for name in ("one.jpg", "in/two.jpg"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(jpeg(0))
    (shard,) = list_shards(InputSettings(files=str(tmp_path / "images")), 10)
    assert shard.name == "images-00000" and [
        shard.file.locate(file_index).key for file_index in (0, 1)
    ] == ["in/two.jpg", "one.jpg"]
    rows = [{"image": "x.jpg", "n": n} for n in range(7)]
    (tmp_path / "coco.json").write_text(json.dumps({"info": {"a": [1]}, "annotations": rows}))
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    for name in ("coco.json", "lines.jsonl"):
        shards = list_shards(InputSettings(files=str(tmp_path / name)), 3)
        assert [(shard.start, shard.stop) for shard in shards] == [(0, 3), (3, 6), (6, 7)]
        assert (
            shards[1]
            .file.locate(3)
            .location.endswith("line 4" if name == "lines.jsonl" else "item 3")
        )


def test_read_transform(
    tmp_path,
):
    from transformers import CLIPImageProcessor

    blip = get_transform("blip", False, 224)
    assert read_transform(None, blip) is blip
    assert (
        read_transform(CONFIGS / "processer" / "blip_transform.yaml", ImageTransform(224)) == blip
    )
    with pytest.raises(ConfigError, match="64 x 64 pixels, but the tokenizer expects 224 x 224"):
        read_transform(CONFIGS / "processer" / "nano_transform.yaml", blip)
    config = tmp_path / "processor.yaml"
    config.write_text(
        "_target_: transformers.CLIPImageProcessor.from_pretrained\n"
        f"pretrained_model_name_or_path: {tmp_path}\n"
    )
    with pytest.raises(ConfigError, match="preprocessor_config"):
        read_transform(config, blip)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(
            {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}, "resample": 3}
        )
    )
    transform = read_transform(config, ImageTransform(64))
    image = Image.open(io.BytesIO(jpeg(3, 90, 60)))
    assert transform == ImageTransform(64, True, "bicubic")
    processor = CLIPImageProcessor(
        **json.loads((tmp_path / "preprocessor_config.json").read_text())
    )
    expected = processor(image, return_tensors="pt").pixel_values[0]
    assert (transform(image) - expected).abs().max() < 0.1  # rounding by one or two grey levels
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"size": {"height": 48, "width": 48}, "resample": 2})
    )
    assert read_transform(config, ImageTransform(48)) == ImageTransform(48, False, "bilinear")


def test_view_depends_on_image_and_number():
    image = Image.open(io.BytesIO(jpeg(1, 64, 64)))
    assert augmented_view(image, 0, 5, "a") is image
    first, again, second, other = (
        augmented_view(image, n, 5, name) for n, name in ((1, "a"), (1, "a"), (2, "a"), (1, "b"))
    )
    assert first.tobytes() == again.tobytes()
    assert len({one.tobytes() for one in (image, first, second, other)}) == 4
    plain = Image.new("RGB", (64, 64), (255, 255, 255))
    assert (
        augmented_view(plain, 3, 0, "x").tobytes() == plain.tobytes()
    )  # white stays white at the borders
