"""`seed assemble`: parts that lie apart, as trainings leave them, become a folder that does what the system did."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from seed_multimodal.cli import main
from seed_multimodal.systems.lavit import Lavit
from seed_multimodal.systems.seed_llama import SeedLlama
from seed_multimodal.systems.seed_x import SeedX

FOX = Path(__file__).resolve().parents[3] / "images" / "fox.png"


def test_assemble_lavit_of_an_export_a_pixel_decoder_and_a_checkpoint(
    tiny_lavit_folder: Path, tiny_lavit: Lavit, tmp_path: Path
) -> None:
    source, parts = tiny_lavit_folder, tmp_path / "parts"
    shutil.copytree(source / "tokenizer", parts / "exported" / "tokenizer")
    shutil.copytree(source / "decoder", parts / "exported" / "decoder")
    (parts / "exported" / "decoder" / "model.safetensors").write_bytes(b"random heads")  # those of the pixels win
    shutil.copytree(source / "pixels", parts / "pixels")
    shutil.copytree(source / "decoder", parts / "pixels" / "decoder")
    shutil.copytree(source / "llm", parts / "checkpoint-9")
    (parts / "exported" / "tokenizer" / "visual_weight.safetensors").rename(
        parts / "checkpoint-9" / "visual_weight.safetensors")
    (parts / "checkpoint-9" / "optimizer.safetensors").write_bytes(b"moments")
    out, settings = tmp_path / "system", tmp_path / "settings.json"
    settings.write_text(json.dumps({"generation": json.loads((source / "system.json").read_text())["generation"]}))
    command = ["assemble", "lavit", "--tokenizer", str(parts / "exported"), "--pixels", str(parts / "pixels"),
               "--llm", str(parts / "checkpoint-9"), "--settings", str(settings), "--out", str(out)]
    assert main(command) == 0
    assert not (out / "llm" / "optimizer.safetensors").exists() and not (out / "pixels" / "decoder").exists()
    made = Lavit.from_pretrained(out, device="cpu", log=None)
    assert made.describe(FOX, seed=3) == tiny_lavit.describe(FOX, seed=3)
    drawn, wanted = (system.draw("a red apple", seed=1, num_inference_steps=2) for system in (made, tiny_lavit))
    assert drawn.tobytes() == wanted.tobytes()
    assert main(command) == 2  # it is there


def test_assemble_lavit_of_a_tokenizer_alone_tokenizes(
    tiny_lavit_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["assemble", "lavit", "--tokenizer", str(tiny_lavit_folder / "tokenizer"), "--out"]
    assert main([*command, str(tmp_path / "system")]) == 0
    capsys.readouterr()
    assert main(["tokenize", str(FOX), "--model", str(tmp_path / "system")]) == 0
    codes = capsys.readouterr().out
    assert main(["tokenize", str(FOX), "--model", str(tiny_lavit_folder)]) == 0
    assert codes == capsys.readouterr().out != ""


def test_assemble_keeps_what_a_part_names_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = FOX.parents[1] / "pretrained" / "nano-lavit"
    assert main(["assemble", "lavit", "--tokenizer", str(source / "tokenizer"), "--pixels", str(source / "pixels"),
                 "--decoder", str(source / "decoder"), "--out", str(tmp_path / "a" / "system")]) == 0
    nano = source.parent / "nano" / "seed_tokenizer"
    assert main(["assemble", "seed-llama", "--llm", str(nano.parent / "seed_llama"), "--tokenizer", str(nano),
                 "--detokenizer", str(nano / "diffusion_model"), "--out", str(tmp_path / "b" / "system")]) == 0
    for name, key in (("a/system/tokenizer/tower.json", "file"), ("a/system/pixels/vae.json", "folder"),
                      ("b/system/detokenizer/image_encoder/tower.json", "file"),
                      ("b/system/tokenizer/diffusion_model/image_encoder/tower.json", "file")):
        file = tmp_path / name
        assert (file.parent / json.loads(file.read_text())[key]).exists()


def test_assemble_seed_x_is_the_system(tiny_x_folder: Path, tiny_x: SeedX, tmp_path: Path) -> None:
    parts = ("llm", "agent", "tokenizer", "vision", "sdxl", "detokenizer")
    settings = tmp_path / "settings.json"
    settings.write_text((tiny_x_folder / "system.json").read_text())
    assert main(["assemble", "seed-x", *(word for part in parts for word in (f"--{part}", str(tiny_x_folder / part))),
                 "--settings", str(settings), "--out", str(tmp_path / "system")]) == 0
    made = SeedX.from_pretrained(tmp_path / "system", device="cpu", log=None)
    assert made.describe(FOX, seed=3) == tiny_x.describe(FOX, seed=3)
    assert made.pictures.can_draw


def test_assemble_seed_llama_reads_and_draws_as_before(
    tiny_folder: Path, tiny: SeedLlama, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["assemble", "seed-llama", "--tokenizer", str(tiny_folder / "seed_tokenizer"), "--out",
               str(tmp_path / "system")]
    assert main([*command, "--llm", str(tmp_path / "absent")]) == 2
    assert f"{tmp_path / 'absent'}: there is no such folder for --llm" in capsys.readouterr().err
    wrong = tmp_path / "settings.json"
    wrong.write_text('{"templat": "vicuna"}')
    assert main([*command, "--llm", str(tiny_folder / "seed_llama"), "--settings", str(wrong)]) == 2
    assert f"{tmp_path / 'system'}/system.json: " in capsys.readouterr().err and not (tmp_path / "system").exists()
    assert main([*command, "--llm", str(tiny_folder / "seed_llama")]) == 0
    made = SeedLlama.from_pretrained(tmp_path / "system", device="cpu", log=None)
    rebuilt, wanted = (system.reconstruct(FOX, seed=1)[0] for system in (made, tiny))
    assert rebuilt.tobytes() == wanted.tobytes()
    greedy = {"do_sample": False, "max_new_tokens": 8}
    assert made.describe(FOX, **greedy) == tiny.describe(FOX, **greedy)
