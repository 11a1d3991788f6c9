"""`SystemConfig`: names and folders of systems, `system.json`, missing parts."""

import shutil
from pathlib import Path

import pytest
from repository import ROOT
from systems import load
from tiny import write_json
from yaml_tables import read_tables

from seed_multimodal.cli.main import main
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.pipelines.config import SystemConfig
from seed_multimodal.weights import find

TABLES = read_tables(__file__)
FOX = str(ROOT / "images" / "fox.png")


@pytest.fixture
def no_weights(tmp_path, monkeypatch) -> Path:
    """A current folder and a repository without weights; `pretrained/` is searched for here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(find, "REPOSITORY", tmp_path)
    return tmp_path


# ---- finding systems


@pytest.mark.parametrize("case", TABLES["names"], ids=str)
def test_find_of_names(case):
    # Short names, hub names, in any case.
    config = SystemConfig.find(case["name"])
    assert config.system == case["system"]
    assert str(config.llm).endswith(f"pretrained/{case['llm']}")


def test_find_of_folders(tiny_folder, no_weights):
    tokenizer = tiny_folder / "seed_tokenizer"
    config = SystemConfig.find(tiny_folder, template="llama2")
    assert (config.llm, config.template) == (tiny_folder / "seed_llama", "llama2")
    assert config.detokenizer == tokenizer / "diffusion_model"

    # Without system.json: a tokenizer alone, separate parts, an agent.
    alone = SystemConfig.find(tokenizer)
    assert alone.detokenizer == tokenizer / "diffusion_model"
    with pytest.raises(CheckpointError, match="seed_tokenizer: its language model"):
        alone.require("llm")
    parts = SystemConfig.find(None, llm=tiny_folder / "seed_llama", tokenizer=tokenizer)
    assert parts.require("llm", "tokenizer").template == "vicuna"
    for part in ("llm", "agent"):
        (no_weights / "mine" / part).mkdir(parents=True)
    agent = SystemConfig.find("mine")
    assert agent.system == "seed_x"
    assert str(agent.vision) == "pretrained/QwenViT"


def test_find_of_what_is_no_system(tiny_folder, no_weights):
    # The nearest name is suggested.
    for name, named in (("nanno", "'nano'"), (no_weights, str(no_weights))):
        with pytest.raises(CheckpointError, match=named):
            SystemConfig.find(name)
    # A run: its newest checkpoint is named; a language model: what makes it a system.
    for step in (8, 10, 9):
        (no_weights / "run" / f"checkpoint-{step}").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="/checkpoint-10"):
        SystemConfig.find(no_weights / "run")
    alone = shutil.copytree(tiny_folder / "seed_llama", no_weights / "plain")
    with pytest.raises(CheckpointError, match=f"seed assemble seed-llama --llm {alone}"):
        SystemConfig.find(alone).require("llm", "tokenizer")


@pytest.mark.parametrize("name, parts", TABLES["parts"].items())
def test_require_names_all_parts_of_an_original(name, parts, no_weights):
    # A newcomer learns at once all that has to be downloaded.
    with pytest.raises(CheckpointError) as caught:
        SystemConfig.find(name).require("tokenizer")
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("case", TABLES["wrong"], ids=str)
def test_find_of_a_wrong_system_json(tmp_path, case):
    (tmp_path / "system.json").write_text(case["text"])
    with pytest.raises(ConfigError, match=case["named"]):
        SystemConfig.find(tmp_path)


# ---- missing parts


@pytest.mark.parametrize(
    "fixture, parts, has_codes",
    [
        ("tiny_folder", ("seed_llama",), True),
        ("tiny_x_folder", ("llm", "agent"), False),
        ("tiny_lavit_folder", ("llm",), True),
    ],
)
def test_commands_without_a_language_model(fixture, parts, has_codes, tmp_path, capsys, request):
    # A folder of images' parts alone encodes and rebuilds; what is missing is named.
    source = request.getfixturevalue(fixture)
    folder = shutil.copytree(source, tmp_path / "copy", ignore=shutil.ignore_patterns(*parts))
    assert main(["tokenize", FOX, "--model", str(folder)]) == (0 if has_codes else 2)
    assert main(f"reconstruct {FOX} --model {folder} --out {tmp_path}".split()) == 0
    capsys.readouterr()
    assert main(["describe", FOX, "--model", str(folder)]) == 2
    assert str(folder / parts[0]) in capsys.readouterr().err


@pytest.mark.parametrize("fixture, missing, llm", TABLES["missing"])
def test_missing_files_are_reported_before_weights_are_read(
    fixture, missing, llm, tmp_path, request
):
    # Minutes at original sizes. The damaged language model would be the error if it were read.
    folder = shutil.copytree(request.getfixturevalue(fixture), tmp_path / "copy")
    (folder / llm / "model.safetensors").write_bytes(b"damaged")
    (folder / missing).unlink()
    for needs_decoder, named in ((True, missing), (False, llm)):
        with pytest.raises(CheckpointError, match=named):
            load(folder, load_decoder=needs_decoder)


def test_a_missing_shard_is_reported_before_others_are_read(tiny_folder, tmp_path):
    # An incomplete download costs seconds, not the time of loading 14 GB.
    folder = shutil.copytree(tiny_folder, tmp_path / "copy")
    llm = folder / "seed_llama"
    (llm / "model.safetensors").unlink()
    first, second = (f"model-0000{index}-of-00002.safetensors" for index in (1, 2))
    (llm / first).write_bytes(b"damaged")
    index = {"weight_map": {"a": first, "b": second}}
    write_json(llm / "model.safetensors.index.json", index)
    with pytest.raises(CheckpointError, match=second):
        load(folder)
