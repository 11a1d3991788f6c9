"""A family of another package in the library's programs and pages (its tasks: test_systems.py)."""

import asyncio
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from installed_package import install
from PIL import Image
from random_images import noise
from repository import ROOT
from systems import load
from warm_processes import PYTHON

from seed_multimodal.errors import ConfigError, SeedWarning
from seed_multimodal.models.registry import LACKS, families, find_family

GROUP = "seed_multimodal.families"
CONFIGS = ROOT / "MultiModalLLM" / "configs"


@pytest.fixture
def other_site(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder for the metadata of a package with another family."""
    monkeypatch.syspath_prepend(tmp_path)
    families.cache_clear()
    yield tmp_path
    families.cache_clear()


@pytest.mark.slow
def test_pipeline_of_transformers(mosaic, mosaic_folder, monkeypatch):
    from transformers import (
        CONFIG_MAPPING,
        MODEL_FOR_MULTIMODAL_LM_MAPPING,
        PROCESSOR_MAPPING,
        pipeline,
    )

    from seed_multimodal.transformers import registration

    monkeypatch.setattr(sys, "meta_path", sys.meta_path[:])
    for mapping in (CONFIG_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING, PROCESSOR_MAPPING):
        monkeypatch.setattr(mapping, "_extra_content", dict(mapping._extra_content))
    registration.install()
    pipe = pipeline("any-to-any", model=str(mosaic_folder))
    assert type(pipe.model).__name__ == "MosaicForConditionalGeneration"
    messages = [{"role": "user", "content": [{"type": "image", "image": noise(1)}, "What is it?"]}]
    [row] = pipe(text=messages, return_full_text=False)
    assert row["generated_text"] == mosaic.chat(messages).text
    request = [{"role": "user", "content": mosaic.family.tasks.draw_request("a red apple")}]
    [row] = pipe(text=request, generation_mode="image")
    assert row["generated_image"].tobytes() == mosaic.draw("a red apple").tobytes()


def test_a_family_does_not_take_the_place_of_a_model_of_transformers(monkeypatch):
    from transformers import CONFIG_MAPPING, LlamaConfig
    from transformers.models.auto import configuration_auto

    from seed_multimodal.transformers import registration

    monkeypatch.setattr(find_family("mosaic").config, "system", "llama")
    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", dict(CONFIG_MAPPING._extra_content))
    with pytest.warns(SeedWarning, match="llama"):
        registration._register(configuration_auto)
    assert CONFIG_MAPPING["llama"] is LlamaConfig


@pytest.mark.slow
def test_init_prints_a_command_whose_checkpoint_is_a_system(mosaic, tmp_path, capsys):
    # From nothing to a trained model of a family that the library does not know.
    import llm_runs
    import yaml

    from seed_multimodal.cli.main import main
    from seed_multimodal.training.cli import main as train

    # 1. A model with random weights, and data.
    out = tmp_path / "mine"
    assert main(["init", "--like", "mosaic", str(out), "--json"]) == 0
    command = json.loads(capsys.readouterr().out)["command"].split()
    data = llm_runs.write_data(tmp_path / "data", n_codes=16, per_image=32)
    (out / "data.yaml").write_text(yaml.safe_dump(data))

    # 2. Its training, a program of the library's.
    start = command.index("train_mosaic")
    options = ["trainer.max_steps=2", "trainer.save_steps=2", "trainer.device=cpu"]
    overrides = [*command[start + 1 :], *options, "trainer.report_to=[]"]
    assert train("train_mosaic", CONFIGS, overrides) == 0

    # 3. The checkpoint, with the tokenizer of the system that it was trained on.
    checkpoint = out / "run" / "checkpoint-2"
    trained = load(checkpoint)
    assert type(trained) is type(mosaic)
    assert trained.config.path("llm") == checkpoint
    assert isinstance(trained.describe(noise(1)), str)


@pytest.mark.slow
def test_codes_of_a_data_set(mosaic_folder, tmp_path):
    # A tile's code is its colour: they can be told by hand.
    from seed_multimodal.data.formats.records import open_records
    from seed_multimodal.pretokenize.run import RunSettings, run

    folder = tmp_path / "captioned"
    folder.mkdir()
    for index, colour in enumerate(("red", "lime", "blue")):
        Image.new("RGB", (40, 20), colour).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a {colour} image")
    out = str(tmp_path / "codes")
    options = {"tokenizer": str(mosaic_folder), "device": "cpu", "workers": 0}
    assert run(RunSettings("caption", {"files": str(folder)}, out, **options)) == 0
    records = open_records(tmp_path / "codes")
    codes = [records.read(index).fields["image_ids"] for index in range(3)]
    assert codes == [[8] * 32, [4] * 32, [3] * 32]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The use of")
def test_server_and_page_of_the_system(mosaic, monkeypatch):
    # The page shows the family's card, and sliders of as many codes as an image has.
    import requests
    from served import Running

    from seed_multimodal.serving.chat_session import ChatSession
    from seed_multimodal.serving.client import ModelClient

    server = Running(mosaic)
    models = requests.get(f"{server.root}/v1/models", timeout=20).json()
    assert models["data"][0]["family"] == "mosaic"
    client = ModelClient(f"{server.root}/generate", find_family("seed_llama").page_cards().family)
    updates = asyncio.run(ChatSession([client], client).on_model(0, None))
    assert updates[1]["value"].startswith("<h1>Mosaic") and not updates[1]["elem_classes"]
    sliders = [update for update in updates if isinstance(update, dict) and "maximum" in update]
    assert [slider["maximum"] for slider in sliders] == [32, 32]
    assert replace(find_family("mosaic"), cards=None).page_cards().family.title == "Mosaic"
    # The page of one that writes no text has no chat, and begins with its drawings.
    config = type(mosaic.config)
    monkeypatch.setattr(config, "abilities", replace(config.abilities, writes=False))
    updates = asyncio.run(ChatSession([client], client).on_model(0, None))
    assert updates[1]["elem_classes"] == ["no-chat"]
    assert {"selected": "draw", "__type__": "update"} in updates


# ---- packages that cannot be used


LESS = {
    "writes": [
        lambda system: system.describe(noise(1)),
        lambda system: system.ask(noise(1), "What is it?"),
        lambda system: system.chat([{"role": "user", "content": "Hello."}]),
    ],
    "edits": [lambda system: system.edit(noise(1), "Make it red.")],
    "draws_codes": [lambda system: system.tokenize(noise(1))],
    "reads_codes": [lambda system: system.use_plain_prompts()],
}


@pytest.mark.parametrize("ability", LESS)
def test_what_a_family_does_not_do_is_refused_by_one_sentence(ability, mosaic, monkeypatch):
    config = type(mosaic.config)
    monkeypatch.setattr(config, "abilities", replace(config.abilities, **{ability: False}))
    for task in LESS[ability]:
        with pytest.raises(ConfigError, match=f"{re.escape(LACKS[ability])}.*nano"):
            task(mosaic)
    assert mosaic.draw("a red apple").size == (48, 24)


@pytest.mark.parametrize(
    ("module", "named"),
    [("no_such_module", "broken"), ("mistyped", "unknown key 'tab' .did you mean 'tabs'")],
    ids=["import", "cards"],
)
def test_a_family_that_cannot_be_used_is_left_out(other_site, module, named):
    # A broken package must not break the others.
    install(other_site, "broken", {GROUP: {"broken": f"{module}:SPEC"}})
    (other_site / "cards.yaml").write_text("family: {title: Mistyped, tab: [draw]}")
    (other_site / "mistyped.py").write_text(
        "from pathlib import Path\n"
        "from seed_multimodal.models.registry import PageCards\n"
        "SPEC = PageCards.read(Path(__file__).with_name('cards.yaml'))\n"
    )
    with pytest.warns(SeedWarning, match=named):
        assert families()[-1].name != "broken"


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("replace(seed.SPEC, title='Copy')", "seed_llama"),
        ("FamilySpec(title='Copy', config=Config, family='', images='', starts=STARTS)", "seed-x"),
    ],
    ids=["family", "start"],
)
def test_a_name_that_two_families_have(other_site, monkeypatch, spec, named):
    # Of the family, and of a start of `seed init`.
    from seed_multimodal.cli.init import templates

    monkeypatch.delitem(sys.modules, "copied", raising=False)
    install(other_site, "copy", {GROUP: {"copy": "copied:SPEC"}})
    (other_site / "starts.yaml").write_text("seed-x: {}\n")
    (other_site / "copied.py").write_text(
        "from dataclasses import replace\n"
        "from pathlib import Path\n"
        "from seed_multimodal.models.registry import FamilySpec\n"
        "from seed_multimodal.models.seed import spec as seed\n"
        "from seed_multimodal.pipelines.config import SystemConfig\n"
        "class Config(SystemConfig):\n    system = 'copy'\n"
        "STARTS = Path(__file__).with_name('starts.yaml')\n"
        f"SPEC = {spec}\n"
    )
    with pytest.raises(ConfigError, match=named):
        templates()


@pytest.mark.slow
@pytest.mark.process
def test_a_package_that_is_imported_before_the_library(installed):
    from real_processes import run_checked

    program = (
        "import transformers.models.auto.configuration_auto, mosaic.spec\n"
        "from seed_multimodal.models.registry import find_family\n"
        "assert find_family('mosaic') is mosaic.spec.SPEC\n"
    )
    run = run_checked([PYTHON, "-c", program])
    assert "cannot be imported" not in run.stderr, run.stderr
