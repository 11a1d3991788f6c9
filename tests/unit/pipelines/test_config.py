"""`SystemConfig`: names and folders of systems, `system.json`, missing parts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from repository import ROOT

from seed_multimodal import hub
from seed_multimodal.cli.main import main
from seed_multimodal.compat.seed_llama_yaml import language_model
from seed_multimodal.config import instantiate
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.models.seed.pipeline import SeedLlama
from seed_multimodal.pipelines.base import MultimodalSystem
from seed_multimodal.pipelines.config import SystemConfig

FOX = str(ROOT / "images" / "fox.png")


@pytest.fixture
def no_weights(tmp_path, monkeypatch) -> Path:
    """A current folder and a repository without weights; `pretrained/` is searched for here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "__file__", str(tmp_path / "src" / "seed_multimodal" / "hub.py"))
    return tmp_path


def test_find_reads_the_system_json_of_a_folder(tiny_folder: Path, tmp_path):
    config = SystemConfig.find(tiny_folder)
    assert (
        config.llm == tiny_folder / "seed_llama"
        and config.template == "vicuna"
        and config.image_size == 32
    )
    assert config.detokenizer == tiny_folder / "seed_tokenizer" / "diffusion_model" and config.has(
        "detokenizer"
    )
    assert config.tasks.draw_request("a red apple.") == "Please draw a red apple."
    other = SystemConfig.find(tiny_folder, detokenizer=tmp_path, template="llama2")
    assert other.detokenizer == tmp_path and other.template == "llama2"


@pytest.mark.parametrize(
    ("name", "system", "llm"),
    [
        ("nano", "seed_llama", "nano/seed_llama"),
        ("NANO-X", "seed_x", "nano-x/llm"),
        ("nano-lavit", "lavit", "nano-lavit/llm"),
        ("8b", "seed_llama", "seed_llama_8b_sft"),
        ("AILab-CVC/seed-llama-14b-sft", "seed_llama", "seed_llama_14b_sft"),
        ("SEED-X-Edit", "seed_x", "seed_x_edit/llm"),
        ("AILab-CVC/SEED-X-17B", "seed_x", "seed_x_i/llm"),
        ("lavit", "lavit", "LaVIT-7B-v2/language_model"),
        ("rain1011/LaVIT-7B-v2", "lavit", "LaVIT-7B-v2/language_model"),
    ],
)
def test_find_of_names(name, system, llm):
    config = SystemConfig.find(name)
    assert config.system == system and str(config.llm).endswith(f"pretrained/{llm}")


def test_find_of_folders_without_system_json(tiny_folder: Path, no_weights: Path):
    alone = SystemConfig.find(tiny_folder / "seed_tokenizer")
    assert alone.transform["interpolation"] == "bicubic" and alone.llm is None
    assert alone.detokenizer == tiny_folder / "seed_tokenizer" / "diffusion_model"
    with pytest.raises(
        CheckpointError, match=r"seed_tokenizer: its language model is not there \(seed assemble"
    ):
        alone.require("llm")
    merged = SystemConfig.find(
        None, llm=tiny_folder / "seed_llama", tokenizer=tiny_folder / "seed_tokenizer"
    )
    assert (
        merged.require("llm", "tokenizer").template == "vicuna"
        and merged.generation["do_sample"] is True
    )
    assert merged.detokenizer == alone.detokenizer
    for part in ("llm", "agent"):
        (no_weights / "mine" / part).mkdir(parents=True)
    agent = SystemConfig.find("mine")
    assert (
        agent.system == "seed_x"
        and agent.agent == Path("mine/agent")
        and str(agent.vision) == "pretrained/QwenViT"
    )
    with pytest.raises(CheckpointError, match="holds no system"):
        SystemConfig.find(no_weights)


def test_find_of_a_run_names_its_newest_checkpoint(tmp_path):
    for step in (8, 10, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
    with pytest.raises(
        CheckpointError, match="is the folder of a run; name a checkpoint: .*/checkpoint-10"
    ):
        SystemConfig.find(tmp_path)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("8c", " (did you mean '8b'?)"),
        ("nanno", " (did you mean 'nano'?)"),
        ("no/such/folder", ""),
        ("me/mine", ""),
        ("nano-x", ""),
    ],
)
def test_find_of_missing_names(name, near, no_weights: Path):
    with pytest.raises(CheckpointError) as caught:
        SystemConfig.find(name)
    assert str(caught.value).startswith(
        f"{name}: no such folder{near}; give nano, nano-x, nano-lavit, 8b, "
    )


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (
            "8b",
            (
                "AILab-CVC/seed-tokenizer-2 and eva_vit_g.pth into pretrained/seed_tokenizer",
                "-8b-sft into",
                "unclip",
            ),
        ),
        (
            "seed-x",
            (
                "AILab-CVC/SEED-X-17B into pretrained/seed_x/llm",
                "qwen-vl (converted) into pretrained/QwenViT",
                "(seed fetch seed-x qwen-vit sdxl does so",
            ),
        ),
        (
            "lavit",
            (
                "rain1011/LaVIT-7B-v2 into pretrained/LaVIT-7B-v2/language_model",
                "eva_vitg_psz14.bin",
            ),
        ),
    ],
)
def test_require_names_all_parts_of_an_original(name, parts, no_weights: Path):
    with pytest.raises(CheckpointError) as caught:
        SystemConfig.find(name).require("tokenizer")
    assert all(part in str(caught.value) for part in parts) and str(caught.value).startswith(
        f"{name}: "
    )


def test_local_folder_of_names_on_the_hub(no_weights: Path, tiny_folder: Path):
    assert hub.local_folder("AILab-CVC/seed-tokenizer-2") is None
    with pytest.raises(
        CheckpointError, match=r"eva_vit_g.pth into pretrained/seed_llama_tokenizer.*--tokenizer"
    ):
        instantiate(
            {
                "_target_": "models.seed_llama_tokenizer.SeedLlamaTokenizer.from_pretrained",
                "pretrained_model_name_or_path": "pretrained/seed_llama_tokenizer",
            },
            device="cpu",
        )
    (no_weights / "pretrained" / "seed_tokenizer").mkdir(parents=True)
    assert hub.local_folder("AILab-CVC/seed-tokenizer-2") == Path("pretrained/seed_tokenizer")
    shutil.copytree(tiny_folder / "seed_llama", no_weights / "pretrained" / "seed_llama_8b_sft")
    assert language_model("AILab-CVC/seed-llama-8b-sft", device="cpu").config.model_type == "llama"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"transform": {"keepratio": true}}', "transform: unknown key 'keepratio'"),
        ("{", "not valid json"),
        ('{"tokeniser": "x"}', r"unknown key 'tokeniser' \(did you mean 'tokenizer'"),
        ('{"system": "seed_y"}', "system must be one of"),
        ('{"system": "lavit", "grids": ["1x1"]}', "'grids'"),
        ('{"grids": ["1x1"]}', "without the key system, read as seed_llama.*'grids'"),
        ('{"system": "lavit", "generation": {"draw": 3}}', "generation: draw: input should"),
        ('{"image_size": 0}', "at least 1"),
    ],
)
def test_find_of_a_wrong_system_json(tmp_path, text, message):
    (tmp_path / "system.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        SystemConfig.find(tmp_path)


def test_require_of_a_folder_that_does_not_name_its_system(tiny_folder: Path, no_weights: Path):
    (no_weights / "system.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match="no key system, so it is read as seed_llama; its lan"
    ):
        SystemConfig.find(no_weights).require("llm")
    alone = shutil.copytree(tiny_folder / "seed_llama", no_weights / "plain")
    command = f"seed assemble seed-llama --llm {alone} --tokenizer"
    with pytest.raises(CheckpointError, match=f"is a language model alone. A system.*{command}"):
        SystemConfig.find(alone).require("llm", "tokenizer")


def test_commands_without_a_language_model(
    tiny_folder: Path,
    tiny_x_folder: Path,
    tiny_lavit_folder: Path,
    tmp_path,
    capsys,
):
    for source, parts in (
        (tiny_folder, ("seed_llama",)),
        (tiny_x_folder, ("llm", "agent", "tokenizer")),
        (tiny_lavit_folder, ("llm",)),
    ):
        folder = shutil.copytree(
            source, tmp_path / source.name, ignore=shutil.ignore_patterns(*parts[:2])
        )
        assert main(["tokenize", FOX, "--model", str(folder)]) == (
            2 if source == tiny_x_folder else 0
        )
        assert main(f"reconstruct {FOX} --model {folder} --out {tmp_path}".split()) == 0
        capsys.readouterr()
        assert main(["describe", FOX, "--model", str(folder)]) == 2
        assert (
            f"its language model is not there: put it at {folder / parts[0]}"
            in capsys.readouterr().err
        )


def test_draw_without_a_diffusion_model(tiny_folder: Path, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "copy")
    shutil.rmtree(folder / "seed_tokenizer" / "diffusion_model")
    system = SeedLlama.from_pretrained(folder, device="cpu", log=None)
    with pytest.raises(CheckpointError, match="diffusion_model"):
        system.draw("a cat")


@pytest.mark.parametrize(
    ("folder", "missing", "language_model"),
    [
        (
            "tiny_folder",
            "seed_tokenizer/diffusion_model/unet/diffusion_pytorch_model.safetensors",
            "seed_llama",
        ),
        (
            "tiny_folder",
            "seed_tokenizer/diffusion_model/scheduler/scheduler_config.json",
            "seed_llama",
        ),
        (
            "tiny_folder",
            "seed_tokenizer/diffusion_model/image_normalizer/config.json",
            "seed_llama",
        ),
        ("tiny_x_folder", "sdxl/vae/config.json", "llm"),
        ("tiny_lavit_folder", "pixels/unet/config.json", "llm"),
    ],
)
def test_missing_files_are_reported_before_weights_are_read(
    folder, missing, language_model, tmp_path, request
):
    """The language model's weights are damaged, which would be the error if they were read."""
    copy = shutil.copytree(request.getfixturevalue(folder), tmp_path / "copy")
    (copy / language_model / "model.safetensors").write_bytes(b"damaged")
    (copy / missing).unlink()
    with pytest.raises(
        CheckpointError, match=f"{missing}: no such file, so the .* folder is not complete"
    ):
        MultimodalSystem.from_pretrained(copy, device="cpu", log=None)
    with pytest.raises(CheckpointError, match="weights cannot be read"):
        MultimodalSystem.from_pretrained(copy, device="cpu", log=None, load_decoder=False)


def test_a_missing_shard_is_reported_before_others_are_read(tiny_folder: Path, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "copy")
    (folder / "seed_llama" / "model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match="model.safetensors: no such file, so the language model of"
    ):
        MultimodalSystem.from_pretrained(folder, device="cpu", log=None)
    first, second = (f"model-0000{index}-of-00002.safetensors" for index in (1, 2))
    (folder / "seed_llama" / first).write_bytes(b"damaged")
    (folder / "seed_llama" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": first, "b": second}})
    )
    with pytest.raises(CheckpointError, match=f"{second}: no such file, so the language model of"):
        MultimodalSystem.from_pretrained(folder, device="cpu", log=None)
