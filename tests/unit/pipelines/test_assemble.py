"""`seed assemble` and `save_system`: a folder of separate parts answers as the system that they
are from."""

import shutil
from pathlib import Path

import pytest
from random_images import same
from repository import FOX, ROOT
from systems import load
from tiny import read_json, write_json

from seed_multimodal import MultimodalSystem
from seed_multimodal.cli.main import main


def assemble(kind: str, out, **parts: Path) -> int:
    flags = [word for name, path in parts.items() for word in (f"--{name}", str(path))]
    return main(["assemble", kind, *flags, "--out", str(out)])


def assert_equal_systems(system: MultimodalSystem, expected: MultimodalSystem):
    options = {"seed": 3, "num_beams": 1}
    assert system.describe(FOX, **options) == expected.describe(FOX, **options)
    images = [part.draw("a red apple", 1, num_inference_steps=1) for part in (system, expected)]
    assert same(*images)


@pytest.mark.parametrize(
    "kind, fixture, parts",
    [
        ("seed-llama", "tiny", {"tokenizer": "seed_tokenizer", "llm": "seed_llama"}),
        ("seed-x", "tiny_x", dict.fromkeys("llm agent tokenizer vision sdxl detokenizer".split())),
    ],
)
def test_assemble_of_the_parts_of_a_system(kind, fixture, parts, request, tmp_path):
    # Separate trainings end in separate folders; together they must be the system.
    source = request.getfixturevalue(f"{fixture}_folder")
    folders = {name: source / (path or name) for name, path in parts.items()}
    assert assemble(kind, tmp_path / "system", **folders, settings=source / "system.json") == 0
    assert_equal_systems(load(tmp_path / "system"), request.getfixturevalue(fixture))


def test_assemble_of_the_outputs_of_lavits_trainings(tiny_lavit_folder, tiny_lavit, tmp_path):
    # 1. An exported tokenizer, pixel decoders with a decoder of their own, a checkpoint.
    source = tiny_lavit_folder
    exported = tmp_path / "exported"
    checkpoint = tmp_path / "checkpoint-9"
    pixels = tmp_path / "pixels"
    for name in ("tokenizer", "decoder"):
        shutil.copytree(source / name, exported / name)
    (exported / "decoder" / "model.safetensors").write_bytes(b"random")  # that of --pixels is used
    shutil.copytree(source / "pixels", pixels)
    shutil.copytree(source / "decoder", pixels / "decoder")
    shutil.copytree(source / "llm", checkpoint)
    merger = exported / "tokenizer" / "visual_weight.safetensors"
    merger.rename(checkpoint / merger.name)
    settings = tmp_path / "settings.json"
    record = read_json(source / "system.json")
    write_json(settings, {"generation": record["generation"]})

    # 2. The system.
    out = tmp_path / "system"
    parts = {"tokenizer": exported, "pixels": pixels, "llm": checkpoint}
    assert assemble("lavit", out, **parts, settings=settings) == 0
    assert_equal_systems(load(out), tiny_lavit)
    assert assemble("lavit", out, **parts) == 2  # it exists


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nano", "nano-x", "nano-lavit"])
def test_save_system_writes_a_complete_folder(name, tmp_path):
    # With what nano's sisters share: it must work in another place, where no path leads back.
    original = load(ROOT / "pretrained" / name)
    out = original.save_pretrained(tmp_path / "saved")
    saved = load(out.rename(tmp_path / name))
    assert_equal_systems(saved, original)
    assert saved.config.notice == original.config.notice
    assert not (tmp_path / name / "report").exists()
