"""A family of another package, known by its entry point alone, does what the library's own do."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import llm_runs
import pytest
import requests
import tiny_system
import yaml
from installed_package import install
from PIL import Image
from random_images import noise
from real_processes import run_process
from repository import ROOT
from served import Running, read, serving
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    PROCESSOR_MAPPING,
    pipeline,
)

from seed_multimodal.cli.init import templates
from seed_multimodal.cli.main import main
from seed_multimodal.data.formats.sources import open_records
from seed_multimodal.data.pretokenize.run import RunSettings
from seed_multimodal.data.pretokenize.run import run as make_codes
from seed_multimodal.errors import ConfigError, SeedWarning
from seed_multimodal.models.registry import families, find_family
from seed_multimodal.pipelines.base import MultimodalSystem
from seed_multimodal.pipelines.config import SystemConfig
from seed_multimodal.serving.chat_session import ChatSession
from seed_multimodal.serving.client import ModelClient
from seed_multimodal.training.cli import main as train
from seed_multimodal.transformers import registration

GROUP = "seed_multimodal.families"
PACKAGE = Path(tiny_system.__file__).with_name("mosaic_package")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed package."""
    site = tmp_path_factory.mktemp("site")
    shutil.copytree(PACKAGE / "mosaic", site / "mosaic")
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    install(site, project["name"], project["entry-points"])
    return site


@pytest.fixture(scope="module")
def installed(site: Path) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        patch.setenv("PYTHONPATH", f"{ROOT / 'src'}:{site}")  # of programs
        families.cache_clear()
        yield site
    families.cache_clear()


@pytest.fixture
def other_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for the metadata of another package."""
    monkeypatch.syspath_prepend(tmp_path)
    families.cache_clear()
    yield tmp_path
    families.cache_clear()


@pytest.fixture(scope="module")
def folder(installed: Path, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A system that `seed assemble` made of a tiny language model and its words."""
    out = tmp_path_factory.mktemp("mosaic") / "my_mosaic"
    settings = out.with_suffix(".json")
    settings.write_text(
        json.dumps({"tile": 6, "generation": {"max_new_tokens": 40, "do_sample": False}})
    )
    flags = ["--llm", str(tiny_folder / "seed_llama")]
    flags += ["--tokenizer", str(tiny_folder / "seed_tokenizer")]
    flags += ["--settings", str(settings), "--out", str(out)]
    assert main(["assemble", "mosaic", *flags]) == 0
    return out


@pytest.fixture(scope="module")
def system(folder: Path) -> MultimodalSystem:
    return MultimodalSystem.from_pretrained(folder, device="cpu", log=None)


def test_families_of_other_packages_come_last(installed: Path) -> None:
    assert [spec.name for spec in families()] == ["seed_llama", "seed_x", "lavit", "mosaic"]


def test_tokenize_and_reconstruct(system: MultimodalSystem) -> None:
    image = Image.new("RGB", (80, 40), (255, 0, 85))
    codes = system.tokenize(image)
    assert codes[0].tolist() == [9] * 32
    drawn = system.reconstruct(image)[0]
    assert drawn.size == (48, 24) and drawn.getpixel((0, 0)) == (255, 0, 85)
    with pytest.raises(ConfigError, match="Settings of drawing: unknown key 'codes'"):
        system.reconstruct(image, codes=4)


def test_describe_and_draw(system: MultimodalSystem) -> None:
    assert isinstance(system.describe(noise(1)), str)
    assert system.draw("a red apple").size == (48, 24)


def test_save_and_load(system: MultimodalSystem, tmp_path: Path) -> None:
    saved = system.save_pretrained(tmp_path / "saved")
    loaded = MultimodalSystem.from_pretrained(saved, device="cpu", log=None)
    assert loaded.config.tile == 6
    assert loaded.describe(noise(2)) == system.describe(noise(2))


def test_pipeline_of_transformers(
    system: MultimodalSystem, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "meta_path", sys.meta_path[:])
    for mapping in (CONFIG_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING, PROCESSOR_MAPPING):
        monkeypatch.setattr(mapping, "_extra_content", dict(mapping._extra_content))
    registration.install()
    pipe = pipeline("any-to-any", model=str(folder))
    assert type(pipe.model).__name__ == "MosaicForConditionalGeneration"
    messages = [{"role": "user", "content": [{"type": "image", "image": noise(1)}, "What is it?"]}]
    [row] = pipe(text=messages, return_full_text=False)
    assert row["generated_text"] == system.chat(messages).text
    request = [{"role": "user", "content": system.tasks.draw_request("a red apple")}]
    [row] = pipe(text=request, generation_mode="image")
    assert row["generated_image"].tobytes() == system.draw("a red apple").tobytes()


@pytest.mark.filterwarnings("ignore:The use of")
def test_http_routes(system: MultimodalSystem) -> None:
    server = Running(system)
    answer = server.ask("USER: hi\nASSISTANT:", images=[], max_new_tokens=8).json()
    assert "text" in answer
    request = {"prompt": "a red apple", "n": 1, "seed": 1}
    drawing = requests.post(f"{server.root}/v1/images/generations", json=request, timeout=60)
    assert read(drawing.json()["data"][0]["b64_json"]).size == (48, 24)


@pytest.mark.process  # the scores of captions are Java's
def test_train_evaluate_and_load_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    # 1. Ten steps on captions and conversations.
    groups = {
        "model": {"path": str(folder / "llm"), "dtype": "fp32"},
        "data": llm_runs.write_data(tmp_path / "data", tiny_system.N_CODES, 32),
        "trainer": {**llm_runs.TRAINER, "max_steps": 10, "save_steps": 10},
        "optim": llm_runs.OPTIM,
        "tokenizer": {"pretrained_model_name_or_path": str(folder / "tokenizer")},
    }
    arguments = [f"output_dir={tmp_path / 'run'}"]
    for group, content in groups.items():
        file = tmp_path / f"{group}.yaml"
        file.write_text(yaml.safe_dump(content))
        arguments.append(f"{group}={file}")
    assert train("train_mosaic", llm_runs.APPLICATION / "configs", arguments) == 0
    losses = llm_runs.losses(tmp_path / "run")
    assert len(losses) == 10 and losses[10] < losses[1]

    # 2. The checkpoint, with the words of the system that it was trained on.
    checkpoint = tmp_path / "run" / "checkpoint-10"
    config = SystemConfig.find(checkpoint)
    assert config.system == "mosaic" and config.path("llm") == checkpoint
    assert config.path("tokenizer").samefile(folder / "tokenizer")

    # 3. Captions of two images; four tokens each, the family's default.
    for index in range(2):
        noise(index).save(tmp_path / f"{index}.png")
    captions = {
        "images": [{"id": index, "file_name": f"{index}.png"} for index in range(2)],
        "annotations": [{"image_id": index, "caption": "a tile"} for index in range(2)],
    }
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    command = ["eval", "caption", "--model", str(checkpoint), "--images", str(tmp_path)]
    command += ["--captions", str(tmp_path / "captions.json"), "--device", "cpu"]
    assert main([*command, "--out", str(tmp_path / "scores")]) == 0
    assert json.loads((tmp_path / "scores" / "summary.json").read_text())["answered"] == 2


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three images with captions."""
    folder = tmp_path_factory.mktemp("captioned")
    for index, colour in enumerate(("red", "lime", "blue")):
        Image.new("RGB", (40, 20), colour).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a {colour} image")
    return folder


def test_codes_of_a_data_set(folder: Path, captioned: Path, tmp_path: Path) -> None:
    settings = RunSettings(
        "caption",
        {"files": str(captioned)},
        str(tmp_path / "codes"),
        tokenizer=str(folder),
        device="cpu",
        workers=0,
    )
    assert make_codes(settings) == 0
    records = open_records(tmp_path / "codes")
    assert [records.read(index).fields["image_ids"] for index in range(3)] == [
        [8] * 32,
        [4] * 32,
        [3] * 32,
    ]


def test_eval_tokenizer(folder: Path, captioned: Path, tmp_path: Path) -> None:
    command = ["eval", "tokenizer", "--model", str(folder), "--data", str(captioned)]
    command += ["--device", "cpu", "--out", str(tmp_path / "out")]
    assert main([*command, "--stage1", "stage1.pth"]) == 2  # it has no such stage
    assert main(command) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["n"], report["reconstruction"]["rebuilt"]) == (3, 3)
    assert (report["codes"]["codebook"], report["codes"]["used"]) == (16, 3)
    assert Image.open(tmp_path / "out" / "reconstructions.jpg").width > 300


@pytest.mark.process
def test_init_prints_a_command_that_trains(
    installed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 1. A model with random weights, and data.
    out = tmp_path / "mine"
    assert main(["init", "--like", "mosaic", str(out), "--json"]) == 0
    command = json.loads(capsys.readouterr().out)["command"].split()
    data = llm_runs.write_data(tmp_path / "data", n_codes=16, per_image=32)
    (out / "data.yaml").write_text(yaml.safe_dump(data))

    # 2. Its training, a program of the library's.
    options = ["trainer.max_steps=2", "trainer.device=cpu", "trainer.report_to=[]"]
    environment = llm_runs.environment()
    environment["PYTHONPATH"] = f"{installed}{os.pathsep}{environment.get('PYTHONPATH', '')}"
    run = run_process(
        [sys.executable, *command[1:], *options], cwd=llm_runs.APPLICATION, env=environment
    )
    assert run.returncode == 0, run.stderr
    assert 2 in llm_runs.losses(out / "run")


def test_page_of_the_system(system: MultimodalSystem) -> None:
    """The page shows the family's card, and sliders of as many codes as an image has."""
    client = ModelClient(f"{Running(system).root}/generate", find_family("seed_llama").card)
    updates = asyncio.run(ChatSession([client], client).on_model(0))
    assert updates[1] == "# Mosaic"
    assert replace(find_family("mosaic"), card=None).page_card().title == "Mosaic"
    assert [update["maximum"] for update in updates[9:11]] == [32, 32]


@pytest.mark.process
def test_server_program(folder: Path) -> None:
    """It starts without a de-tokenizer, and tells the page which family it serves."""
    with serving(folder) as (address, _):
        models = requests.get(address.replace("/generate", "/v1/models"), timeout=20).json()
    assert models["data"][0]["family"] == "mosaic"
    assert find_family("mosaic").card.title == "Mosaic"


def test_families_without_one_that_cannot_be_imported(other_site: Path) -> None:
    install(other_site, "broken", {GROUP: {"broken": "no_such_module:SPEC"}})
    with pytest.warns(SeedWarning, match="broken of seed_multimodal.families cannot be imported"):
        assert families()[-1].name != "broken"


def test_starts_with_a_name_twice(other_site: Path) -> None:
    install(other_site, "copy", {GROUP: {"copy": "other_starts:SPEC"}})
    (other_site / "starts.yaml").write_text("seed-x: {}\n")
    (other_site / "other_starts.py").write_text(
        "from pathlib import Path\n"
        "from seed_multimodal.models.registry import FamilySpec\n"
        "from seed_multimodal.pipelines.config import SystemConfig\n"
        "class Config(SystemConfig):\n    system = 'copy'\n"
        "STARTS = Path(__file__).with_name('starts.yaml')\n"
        "SPEC = FamilySpec(title='Copy', config=Config, system='', images='', starts=STARTS)\n"
    )
    with pytest.raises(ConfigError, match="SEED-X and Copy both have the start 'seed-x'"):
        templates()


def test_families_with_a_name_twice(other_site: Path) -> None:
    install(other_site, "copy", {GROUP: {"copy": "copied:SPEC"}})
    (other_site / "copied.py").write_text(
        "from dataclasses import replace\nfrom seed_multimodal.models.seed import spec\n"
        "SPEC = replace(spec.SPEC, title='Copy')\n"
    )
    with pytest.raises(ConfigError, match="SEED-LLaMA and Copy both have the family 'seed_llama'"):
        families()


@pytest.mark.process
def test_a_package_that_is_imported_before_the_library(installed):
    program = (
        "import transformers.models.auto.configuration_auto, mosaic.spec\n"
        "from seed_multimodal.models.registry import find_family\n"
        "assert find_family('mosaic') is mosaic.spec.SPEC\n"
    )
    run = run_process([sys.executable, "-c", program])
    assert run.returncode == 0 and "cannot be imported" not in run.stderr, run.stderr
