"""The original data files: both mixtures, other files of that form, and errors."""

import pytest
from repository import APPLICATION
from yaml_tables import read_tables

from seed_multimodal.compat.data_files import BUILDERS
from seed_multimodal.config import load_yaml
from seed_multimodal.data.decoders import decoder_names
from seed_multimodal.data.stream.config import read_data_settings

DATA = APPLICATION / "configs" / "data"
OURS = ("packing", "length", "rows", "too_long")  # keys that the original's files do not have
TRAIN = "src.data.torchdata_train."
CAPTION = f"{TRAIN}build_caption_datapipes_for_llm"
MIXTURES = read_tables(__file__)


@pytest.mark.parametrize("name", MIXTURES)
def test_read_data_settings_of_a_mixture(name):
    # Other shares or lengths would train another model than the published one.
    settings = read_data_settings(load_yaml(DATA / f"{name}.yaml"))
    sources = [
        (source.decoder, source.max_length, source.batch_size, source.cycles, source.weight)
        for source in settings.sources
    ]
    assert sources[:6] == list(map(tuple, MIXTURES[name]))
    assert len({source.name for source in settings.sources}) == len(sources)
    assert (settings.concat_type, settings.packing, settings.length) == ("sample", True, 2048)


def test_read_data_settings_of_options_and_files():
    settings = read_data_settings(load_yaml(DATA / "multi_torchdata_pretrain.yaml"))
    assert settings.sources[3].options == {"reverse_ratio": 0.0, "max_images": 7}
    assert [source.format for source in settings.sources] == ["tar"] * 5 + ["jsonl"]
    folders = ["unsplash_cc3m", "coco"]
    files = [f"dataset/seed_v2_0828/caption/{folder}" for folder in folders]
    assert settings.sources[0].files == files


def test_read_data_settings_of_every_builder():
    # A user's own data file may name any of the original's functions.
    assert {*BUILDERS.values()} <= {*decoder_names()}
    keys = {"data_dir": "a", "max_length": 64, "batch_size": 2, "cycle_count": 3}
    unused = {"reverse_ratio": 0.0, "caption_prompt": None, "recursive": True}
    for target in BUILDERS:
        (source,) = read_data_settings({"_target_": target, **keys, **unused}).sources
        read = (source.files, source.max_length, source.batch_size, source.cycles)
        assert read == ("a", 64, 2, 3)


@pytest.mark.parametrize("name", [*MIXTURES, "sft_comprehension_gen", "sft_edit", "sft_caption"])
def test_read_data_settings_of_files_without_our_keys(name):
    # The original's file has our file's settings.
    config = load_yaml(DATA / f"{name}.yaml")
    original = {key: value for key, value in config.items() if key not in OURS}
    assert len(original) < len(config)
    assert read_data_settings(original) == read_data_settings(config)
