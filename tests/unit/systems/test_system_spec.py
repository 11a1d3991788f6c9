"""Finding a system's parts: what is missing is said in one sentence, with what to put where."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from seed_multimodal import hub
from seed_multimodal.configured import language_model, picture_codec, seed_llama_tokenizer
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.hub import local_folder
from seed_multimodal.systems.lavit_files import find_lavit
from seed_multimodal.systems.seed_llama import SeedLlama
from seed_multimodal.systems.seed_x_spec import find_seed_x
from seed_multimodal.systems.system_spec import find_system


def test_a_system_folder_names_its_parts(tiny_folder: Path) -> None:
    spec = find_system(tiny_folder)
    assert spec.llm == tiny_folder / "seed_llama" and spec.template == "vicuna" and spec.image_size == 32
    assert spec.detokenizer == tiny_folder / "seed_tokenizer" / "diffusion_model"
    assert spec.tasks.draw_request("a red apple.") == "Please draw a red apple."


def test_single_parts_can_be_replaced(tiny_folder: Path, tmp_path: Path) -> None:
    spec = find_system(tiny_folder, detokenizer=tmp_path, template="llama2")
    assert spec.detokenizer == tmp_path and spec.template == "llama2"


def test_parts_given_apart_load(tiny_folder: Path) -> None:
    tokenizer = tiny_folder / "seed_tokenizer"
    spec = find_system(llm=tiny_folder / "seed_llama", tokenizer=tokenizer, detokenizer=tokenizer / "diffusion_model")
    assert spec.template == "vicuna" and spec.generation["do_sample"] is True and spec.image_size == 224
    assert spec.tasks.draw_response == ""


@pytest.mark.parametrize(("name", "words"), [
    ("no/such/folder", "no such folder"), ("8b", "seed-llama-8b-sft"), ("14b", "seed-llama-14b-sft"),
    ("pretrained/no_nano", "pretrained/nano")])
def test_missing_systems_say_what_to_do(name: str, words: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "__file__", str(tmp_path / "src" / "seed_multimodal" / "hub.py"))
    with pytest.raises(CheckpointError, match=words) as caught:
        find_system(name)
    assert "\n" not in str(caught.value) and "nano" in str(caught.value)


@pytest.fixture
def no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder, and a repository, without any weights; `pretrained/` is looked for here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "__file__", str(tmp_path / "src" / "seed_multimodal" / "hub.py"))
    return tmp_path


@pytest.mark.parametrize(("name", "near"), [
    ("8c", "'8b'"), ("nanno", "'nano'"), ("seed-x-ii", "'seed-x-i'"), ("weights/min", "weights/mine")])
def test_a_misspelt_system_offers_the_names(name: str, near: str, no_weights: Path) -> None:
    (no_weights / "weights" / "mine").mkdir(parents=True)
    with pytest.raises(CheckpointError) as caught:
        find_system(name)
    assert str(caught.value).startswith(f"{name}: there is no such folder (did you mean {near}?); give nano, 8b, 14b, ")


def test_a_shipped_system_that_is_not_there(no_weights: Path) -> None:
    """Also where the package is installed by itself: no other name is said to run, no other weights are asked for."""
    for name, find in (("nano-x", find_system), ("nano-x", find_seed_x), ("nano-lavit", find_lavit)):
        with pytest.raises(CheckpointError, match=f"^{name}: there is no such folder.* to pretrained/{name}.$") as it:
            find(name)
        assert "download" not in str(it.value)
    for name, find in (("8b", find_system), ("seed-x", find_seed_x), ("lavit", find_lavit)):
        with pytest.raises(CheckpointError) as it:
            find(name)
        assert "runs now" not in str(it.value)


def test_every_missing_part_of_a_released_system_is_named_at_once(no_weights: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        find_system("14b")
    said = str(caught.value)
    assert all(f"into pretrained/{part}" in said for part in (
        "seed_tokenizer", "seed_llama_14b_sft", "stable-diffusion-2-1-unclip")) and said.startswith("14b: ")
    (no_weights / "pretrained" / "seed_tokenizer").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="seed-llama-14b-sft") as caught:
        find_system("14b")
    assert "seed-tokenizer-2" not in str(caught.value)


def test_a_missing_tokenizer_belongs_where_it_is_looked_for_and_what_runs_fits_the_command(no_weights: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        seed_llama_tokenizer("pretrained/seed_llama_tokenizer", device="cpu")
    said = str(caught.value)
    assert "eva_vit_g.pth into pretrained/seed_llama_tokenizer" in said and "pretrained/seed_tokenizer" not in said
    assert "--tokenizer configs/tokenizer/nano.yaml" in said and "--model" not in said
    with pytest.raises(CheckpointError, match=r"into pretrained/seed_tokenizer .*`--model nano` runs now\."):
        picture_codec("released", device="cpu")


def test_what_is_named_as_on_the_hub_is_found_in_pretrained(no_weights: Path, tiny_folder: Path) -> None:
    assert local_folder("AILab-CVC/seed-tokenizer-2") is None
    (no_weights / "pretrained" / "seed_tokenizer").mkdir(parents=True)
    assert local_folder("AILab-CVC/seed-tokenizer-2") == Path("pretrained/seed_tokenizer")
    shutil.copytree(tiny_folder / "seed_llama", no_weights / "pretrained" / "seed_llama_8b_sft")
    assert language_model("AILab-CVC/seed-llama-8b-sft", device="cpu").config.model_type == "llama"


def test_a_folder_without_system_json(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="system.json"):
        find_system(tmp_path)
    with pytest.raises(ConfigError, match="Name a system"):
        find_system()


@pytest.mark.parametrize(("text", "words"), [
    ('{"transform": {"keepratio": true}}', "transform: unknown key 'keepratio'"),
    ("{", "not valid json"), ("[]", "json object"), ('{"tokeniser": "x"}', "unknown key 'tokeniser'"),
    ('{"tasks": {"paint": "x"}}', "'paint'"), ('{"tasks": {"draw": "no place"}}', "caption")])
def test_damaged_system_json(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "system.json").write_text(text)
    with pytest.raises(ConfigError, match=words):
        find_system(tmp_path)


def _copy(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


def test_an_incomplete_folder_names_the_part(tiny_folder: Path, tmp_path: Path) -> None:
    home = _copy(tiny_folder, tmp_path)
    shutil.rmtree(home / "seed_llama")
    with pytest.raises(CheckpointError, match="seed_llama: the language model"):
        SeedLlama.from_pretrained(home, device="cpu", log=None)


def test_wrong_defaults_show_at_loading(tiny_folder: Path, tmp_path: Path) -> None:
    home = _copy(tiny_folder, tmp_path)
    settings = json.loads((home / "system.json").read_text())
    (home / "system.json").write_text(json.dumps({**settings, "generation": {"max_tokens": 3}}))
    with pytest.raises(ConfigError, match="max_tokens"):
        SeedLlama.from_pretrained(home, device="cpu", log=None)


def test_a_half_written_language_model_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    home = _copy(tiny_folder, tmp_path)
    file = home / "seed_llama" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="seed_llama"):
        SeedLlama.from_pretrained(home, device="cpu", log=None)


def test_a_missing_detokenizer_shows_when_the_first_picture_is_drawn(tiny_folder: Path, tmp_path: Path) -> None:
    home = _copy(tiny_folder, tmp_path)
    shutil.rmtree(home / "seed_tokenizer" / "diffusion_model")
    system = SeedLlama.from_pretrained(home, device="cpu", log=None)
    with pytest.raises(CheckpointError, match="diffusion_model"):
        system.draw("a cat")
