"""`seed assemble` and `save_system`: a folder of separate parts answers as the system that they
are from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from repository import FOX, ROOT

from seed_multimodal.cli.main import main
from seed_multimodal.models.lavit.pipeline import Lavit
from seed_multimodal.models.seed.pipeline import SeedLlama
from seed_multimodal.pipelines.assemble import save_system
from seed_multimodal.pipelines.base import MultimodalSystem
from seed_multimodal.pipelines.config import SystemConfig


def assemble(kind: str, out: Path, **parts: Path) -> int:
    flags = [word for name, path in parts.items() for word in (f"--{name}", str(path))]
    return main(["assemble", kind, *flags, "--out", str(out)])


def test_assemble_of_the_outputs_of_lavits_trainings(
    tiny_lavit_folder: Path, tiny_lavit: Lavit, tmp_path
):
    source = tiny_lavit_folder
    parts = tmp_path / "parts"
    for name in ("tokenizer", "decoder"):
        shutil.copytree(source / name, parts / "exported" / name)
    (parts / "exported" / "decoder" / "model.safetensors").write_bytes(
        b"random"
    )  # that of --pixels is used
    shutil.copytree(source / "pixels", parts / "pixels")
    shutil.copytree(source / "decoder", parts / "pixels" / "decoder")
    shutil.copytree(source / "llm", parts / "checkpoint-9")
    (parts / "exported" / "tokenizer" / "visual_weight.safetensors").rename(
        parts / "checkpoint-9" / "visual_weight.safetensors"
    )
    (parts / "checkpoint-9" / "optimizer.safetensors").write_bytes(b"moments")
    out = tmp_path / "system"
    settings = tmp_path / "settings.json"
    settings.write_text(
        json.dumps({"generation": json.loads((source / "system.json").read_text())["generation"]})
    )
    outputs = {
        "tokenizer": parts / "exported",
        "pixels": parts / "pixels",
        "llm": parts / "checkpoint-9",
    }
    assert assemble("lavit", out, **outputs, settings=settings) == 0
    assert (
        not (out / "llm" / "optimizer.safetensors").exists()
        and not (out / "pixels" / "decoder").exists()
    )
    assembled = Lavit.from_pretrained(out, device="cpu", log=None)
    assert assembled.describe(FOX, seed=3) == tiny_lavit.describe(FOX, seed=3)
    image, expected = (
        system.draw("a red apple", seed=1, num_inference_steps=2)
        for system in (assembled, tiny_lavit)
    )
    assert image.tobytes() == expected.tobytes()
    assert assemble("lavit", out, **outputs) == 2  # it exists


def test_assemble_rewrites_paths_to_other_systems(tmp_path):
    lavit = ROOT / "pretrained" / "nano-lavit"
    nano = ROOT / "pretrained" / "nano" / "seed_tokenizer"
    assert (
        assemble(
            "lavit",
            tmp_path / "a" / "system",
            **{name: lavit / name for name in ("tokenizer", "pixels", "decoder")},
        )
        == 0
    )
    assert (
        assemble(
            "seed-llama",
            tmp_path / "b" / "system",
            llm=nano.parent / "seed_llama",
            tokenizer=nano,
            detokenizer=nano / "diffusion_model",
        )
        == 0
    )
    for name, key in (
        ("a/system/tokenizer/tower.json", "file"),
        ("a/system/pixels/vae.json", "folder"),
        ("b/system/detokenizer/image_encoder/tower.json", "file"),
        ("b/system/tokenizer/diffusion_model/image_encoder/tower.json", "file"),
    ):
        file = tmp_path / name
        assert (file.parent / json.loads(file.read_text())[key]).exists()


@pytest.mark.parametrize("kind", ["seed-x", "seed-llama"])
def test_assemble_of_the_parts_of_a_system(kind, tiny_folder: Path, tiny_x_folder: Path, tmp_path):
    source = tiny_folder
    parts = {"tokenizer": tiny_folder / "seed_tokenizer", "llm": tiny_folder / "seed_llama"}
    if kind == "seed-x":
        source = tiny_x_folder
        parts = {
            name: source / name
            for name in ("llm", "agent", "tokenizer", "vision", "sdxl", "detokenizer")
        }
    assert assemble(kind, tmp_path / "system", **parts, settings=source / "system.json") == 0
    assembled, original = (
        MultimodalSystem.from_pretrained(folder, device="cpu", log=None)
        for folder in (tmp_path / "system", source)
    )
    greedy = {"do_sample": False, "max_new_tokens": 8}
    assert (
        assembled.describe(FOX, **greedy) == original.describe(FOX, **greedy)
        and assembled.images.can_draw
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nano", "nano-x", "nano-lavit"])
def test_save_system_writes_a_complete_folder(name, tmp_path):
    out = save_system(SystemConfig.find(ROOT / "pretrained" / name), tmp_path / "saved")
    for file in (*out.rglob("tower.json"), *out.rglob("vae.json")):
        values = json.loads(file.read_text())
        assert (
            (file.parent / (values.get("file") or values["folder"]))
            .resolve()
            .is_relative_to(out.resolve())
        )
    saved, original = (
        MultimodalSystem.from_pretrained(folder, device="cpu", log=None)
        for folder in (out, ROOT / "pretrained" / name)
    )
    assert saved.describe(FOX) == original.describe(FOX) and saved.images.can_draw
    image, expected = (
        system.draw("a dog", seed=1, num_inference_steps=1) for system in (saved, original)
    )
    assert image.tobytes() == expected.tobytes()
    changed = {
        key
        for key in vars(saved.config)
        if getattr(saved.config, key) != getattr(original.config, key)
    }
    assert changed <= {"name", "read_as", *saved.config.parts(), "known_words"}
    assert (out / "README.md").is_file() and not (out / "report").exists()


def test_assemble_with_wrong_settings_and_missing_parts(
    tiny_folder: Path, tiny: SeedLlama, tmp_path, capsys
):
    parts = {"tokenizer": tiny_folder / "seed_tokenizer"}
    out = tmp_path / "system"
    assert assemble("seed-llama", out, **parts, llm=tmp_path / "absent") == 2
    assert f"{tmp_path / 'absent'}: no such folder for --llm" in capsys.readouterr().err
    wrong = tmp_path / "settings.json"
    wrong.write_text('{"templat": "vicuna"}')
    assert assemble("seed-llama", out, **parts, settings=wrong) == 2
    assert "--settings: unknown key 'templat'" in capsys.readouterr().err and not out.exists()
    assert assemble("seed-llama", out, **parts) == 0
    capsys.readouterr()
    assert main(["tokenize", str(FOX), "--model", str(out)]) == 0  # no language model is needed
    assert " ".join(map(str, tiny.tokenize(FOX)[0].tolist())) in capsys.readouterr().out
