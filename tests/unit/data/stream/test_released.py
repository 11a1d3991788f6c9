"""The original data files: both mixtures, other files of that form, and errors."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml
from repository import ROOT

from seed_multimodal.compat.data_files import BUILDERS
from seed_multimodal.config import load_yaml
from seed_multimodal.data.decoders import decoder_names
from seed_multimodal.data.pretokenize.inputs import read_input_settings
from seed_multimodal.data.stream.config import LlmDataSettings, read_data_settings
from seed_multimodal.data.stream.llm_batches import LlmBatches
from seed_multimodal.errors import ConfigError

DATA = ROOT / "MultiModalLLM" / "configs" / "data"
PRETRAIN = DATA / "multi_torchdata_pretrain.yaml"
SFT = DATA / "multi_torchdata_sft.yaml"
OURS = ("packing", "length", "rows", "too_long")  # keys that the original's files do not have
CAPTION = "src.data.torchdata_train.build_caption_datapipes_for_llm"


def rows(settings: LlmDataSettings) -> list[tuple[Any, ...]]:
    return [
        (
            source.decoder,
            source.max_length,
            source.options.get("reverse_ratio"),
            source.batch_size,
            source.cycles,
            source.weight,
        )
        for source in settings.sources
    ]


def test_read_data_settings_of_the_pretraining_mixture():
    settings = read_data_settings(load_yaml(PRETRAIN))
    assert rows(settings) == [
        ("pretrain.caption", 200, 0.5, 116, 7, 0.5),
        ("pretrain.caption", 140, 0.5, 164, 2, 5.0),
        ("pretrain.interleaved", 1024, 0.5, 26, 3, 2.0),
        ("pretrain.interleaved", 1024, 0.0, 26, 1, 1.0),
        ("pretrain.video", 200, None, 116, 5, 0.5),
        ("pretrain.text", 1024, None, 26, 3, 1.0),
    ]
    assert [source.options.get("max_images") for source in settings.sources] == [
        None,
        None,
        7,
        7,
        None,
        None,
    ]
    assert settings.sources[0].files == [
        "dataset/seed_v2_0828/caption/unsplash_cc3m",
        "dataset/seed_v2_0828/caption/coco",
    ]
    assert [source.format for source in settings.sources] == ["tar"] * 5 + ["jsonl"]
    assert settings.concat_type == "sample" and settings.packing and settings.length == 2048
    positions = [source.max_length * source.batch_size for source in settings.sources]
    assert positions == [23200, 22960, 26624, 26624, 23200, 26624]


def test_read_data_settings_of_the_instruction_mixture():
    settings = read_data_settings(load_yaml(SFT))
    assert rows(settings) == [
        ("sft.difference", 200, 0.0, 160, 100, 0.15),
        ("sft.story", 360, 0.0, 80, 100, 0.08),
        ("sft.edit", 100, None, 256, 30, 0.5),
        ("sft.conversation", 512, None, 60, 100, 0.15),
        ("sft.conversation", 1024, None, 32, 50, 0.2),
        ("sft.qa", 100, 0.0, 256, 30, 0.2),
        ("sft.qa", 100, 0.0, 256, 100, 0.1),
        ("sft.conversation", 360, None, 80, 100, 0.15),
        ("sft.qa", 100, 0.5, 256, 30, 0.2),
        ("sft.video", 200, None, 160, 100, 0.1),
        ("sft.video", 360, None, 80, 100, 0.15),
        ("sft.video", 512, None, 60, 100, 0.2),
        ("sft.visual_question", 400, None, 80, 20, 0.4),
        ("sft.qa", 128, -1.0, 200, 30, 0.5),
        ("sft.qa", 100, -1.0, 256, 30, 0.5),
        ("sft.qa", 100, 0.0, 256, 100, 0.1),
        ("sft.conversation", 360, None, 80, 100, 0.08),
        ("sft.qa", 100, 0.0, 256, 30, 0.05),
    ]
    assert sum(source.weight for source in settings.sources) == pytest.approx(3.81)
    padded = read_data_settings({**load_yaml(SFT), "packing": False})
    assert [round(100 * weight, 2) for weight in padded.sampling_weights()[:5]] == [
        3.94,
        2.10,
        13.12,
        3.94,
        5.25,
    ]
    assert len({source.name for source in settings.sources}) == 18


def test_read_data_settings_of_every_builder():
    assert {decoder for decoder, _ in BUILDERS.values()} <= {*decoder_names()}
    for target in BUILDERS:
        config = {
            "_target_": target,
            "data_dir": "somewhere",
            "max_length": 64,
            "batch_size": 2,
            "cycle_count": 3,
            "reverse_ratio": 0.0,
            "caption_prompt": None,
            "recursive": True,
        }
        (source,) = read_data_settings(config).sources
        assert (source.files, source.max_length, source.batch_size, source.cycles) == (
            "somewhere",
            64,
            2,
            3,
        )


def small_sets(sets: Path, tmp_path: Path, **more: object) -> LlmDataSettings:
    """The pre-training file with the folders of small sets instead of the original ones, read from
    YAML.
    """
    config = yaml.safe_load(PRETRAIN.read_text())
    folders = {
        "caption": sets / "captions",
        "interleaved": sets / "documents",
        "text": sets / "texts",
    }
    config["datapipes"] = [pipe for pipe in config["datapipes"] if "video" not in pipe["_target_"]]
    for pipe in config["datapipes"]:
        decoder = BUILDERS[pipe["_target_"]][0].partition(".")[2]
        pipe["data_dir"] = str(folders[decoder])
        pipe["cycle_count"] = None
    del config["sample_weights"][4]
    config.update(more)
    config = {key: value for key, value in config.items() if value is not None}
    file = tmp_path / "data.yaml"
    file.write_text(yaml.safe_dump(config))
    return read_data_settings(load_yaml(file))


@pytest.mark.parametrize(
    "file",
    [
        PRETRAIN,
        SFT,
        DATA / "sft_comprehension_gen.yaml",
        DATA / "sft_edit.yaml",
        DATA / "sft_caption.yaml",
    ],
    ids=lambda file: file.stem,
)
def test_read_data_settings_of_files_without_our_keys(file):
    """The original's file has our file's settings."""
    config = load_yaml(file)
    original = {key: value for key, value in config.items() if key not in OURS}
    assert len(original) < len(config)
    assert read_data_settings(original) == read_data_settings(config)


def test_next_of_a_mixture_without_our_keys(sets: Path, tokenizer, tmp_path):
    tokens = []
    for more in ({}, dict.fromkeys(OURS)):
        batches = LlmBatches(small_sets(sets, tmp_path, **more), tokenizer)
        tokens.append([batch.tokens for batch in itertools.islice(batches, 4)])
    assert tokens[0] == tokens[1] and min(tokens[0]) > 6 * 1900


def test_next_of_the_pretraining_mixture(sets: Path, tokenizer, tmp_path):
    for packing in (True, False):
        batches = LlmBatches(small_sets(sets, tmp_path, packing=packing, length=256), tokenizer)
        read = list(itertools.islice(batches, 20))
        assert all(batch.learned > 0 for batch in read)
        assert set(batches.report()["sources"]) == {
            "captions",
            "captions-2",
            "documents",
            "documents-2",
            "texts",
        }
        assert not packing or {batch.input_ids.shape for batch in read} == {(6, 256)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_target_": "os.system"}, "'os.system' is not one of the original data builders"),
        ({"_target_": CAPTION.replace("caption", "captions")}, f"did you mean '{CAPTION}'"),
        (
            {"reverse_ration": 0.5},
            r"datapipes\[0\]: unknown key 'reverse_ration' \(did you mean 'reverse_ratio'",
        ),
        ({"data_dir": None}, "needs a value for 'data_dir'"),
    ],
)
def test_read_data_settings_with_wrong_keys(change, message):
    pipe = {"_target_": CAPTION, "data_dir": "a", **change}
    with pytest.raises(ConfigError, match=message):
        read_data_settings({"datapipes": [pipe], "sample_weights": [1.0]})


@pytest.mark.parametrize(
    ("target", "replacement"),
    [
        (
            "torchdata_train.build_retrieval_augmented_datapipes_for_llm",
            "decoder pretrain.interleaved",
        ),
        ("torchdata_train.build_coco_caption_eval_datapipes_for_llm", "seed eval caption"),
        ("torchdata_train.build_caption_datapipes_with_pixels", "an extract_image_ids_… tool"),
        ("torchdata_sft.build_video_gen_datapipes_for_llm", "not generated"),
        ("torchdata_eval.build_edit_datapipes", "parallel_edit.py"),
        ("torchdata_preprocess.build_m3it_datapipes_with_pixel_values", "--fields plain"),
    ],
)
def test_read_data_settings_of_pipes_without_a_counterpart(target, replacement):
    with pytest.raises(
        ConfigError, match=f"is not one of the original data builders; here: .*{replacement}"
    ):
        read_data_settings({"_target_": f"src.data.{target}", "data_dir": "a"})


@pytest.mark.parametrize(
    "target",
    [
        "torchdata_eval.build_edit_datapipes",
        "torchdata_eval.build_video_datapipes",
        "torchdata_eval.build_coco_caption_datapipes",
        "torchdata_eval.build_caption_datapipes_with_pixels",
        "torchdata_preprocess.build_mmc4_datapipes_with_pixels",
        "torchdata_train.build_caption_datapipes_with_pixels",
    ],
)
def test_read_input_settings_of_other_pipes(target):
    settings = read_input_settings(
        {"_target_": f"src.data.{target}", "data_dir": "a", "max_length": 77}
    )
    assert (settings.files, settings.format) == ("a", "auto")
    with pytest.raises(ConfigError, match="--fields plain"):
        read_input_settings(
            {"_target_": "src.data.torchdata_preprocess.build_m3it_datapipes_with_pixel_values"}
        )
