"""SEED-X's original programs in `src/inference/`, on a tiny checkpoint in the original layout.

The YAML files are the repository's with tiny sizes; as originally, the weights have no sizes next
to them.
"""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from random_images import noise
from repository import ROOT
from systems import load
from yaml_tables import read_tables

from seed_multimodal import MultimodalTokenizer
from seed_multimodal.compat.programs import read_programs, run_original

SOLDIER = (
    "A cybernetic soldier, enhanced with advanced weapons systems and tactical analysis software, "
    "on a mission behind enemy lines."
)
IMAGES = read_tables(__file__)
DEMO_IMAGES = "men.jpg men_condition.jpg cat_dog.jpeg car.jpg advisor.png ground.png"
SHORT = ("--device", "cpu", "--max-new-tokens", "12")


@pytest.fixture
def project(released_seed_x, tmp_path, monkeypatch) -> Path:
    """The working directory: a link to the weights, a copy of `configs/`, and `demo_images/`."""
    (tmp_path / "pretrained").symlink_to(released_seed_x / "pretrained")
    shutil.copytree(released_seed_x / "configs", tmp_path / "configs")
    (tmp_path / "demo_images").mkdir()
    for index, name in enumerate(DEMO_IMAGES.split()):
        noise(index).save(tmp_path / "demo_images" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def prompts(monkeypatch) -> list[list[int]]:
    """Prompts of the language model."""
    from seed_multimodal.inference.engine import Engine

    recorded = []
    real = Engine.run

    def run(self, prompts, *rest, **more):
        recorded.extend(list(prompt.ids) for prompt in prompts)
        return real(self, prompts, *rest, **more)

    monkeypatch.setattr(Engine, "run", run)
    return recorded


def run(name, flags: str) -> int:
    return run_original(name, "", ["--device", "cpu", *flags.split()])


# ---- without flags


@pytest.mark.slow
def test_programs_have_the_original_images_and_prompts(project, prompts):
    programs = (ROOT / "src" / "inference").glob("eval_*.py")
    assert {file.stem for file in programs} == set(IMAGES)
    for name, images in IMAGES.items():
        assert run(name, "") == 0
        assert {image: [*Image.open(project / "vis" / image).size] for image in images} == images

    # The prompts, an # for each view: 48 x 30 pixels are two views and the whole, edits one view
    # and the whole.
    tokenizer = MultimodalTokenizer.from_pretrained(
        Path("pretrained/cvlm_llama2_tokenizer_100img_and_224loc_addpatch")
    )
    view = re.compile(r" ?<(patch|img)>.*?</\1> ?")
    assert list(dict.fromkeys(view.sub("#", tokenizer.decode(ids[1:])) for ids in prompts)) == [
        "Question:###Describe this image briefly.\nAnswer:",
        "###In ths background with a blue sky on the road, there is a car [[ <box_start>",
        "A super math wizard cat, richly textured oil painting.",
        "[INST]###Can I conntect with an advisor on Sunday? [/INST]\n",
        "[INST]###Is there anything in the image that can protect me from catching the flu virus "
        "when I go out? Show me the location. [/INST]\n",
        f"[INST] Generate an image: {SOLDIER} [/INST]\n",
        "[INST]##Make it under the sunset [/INST]\n",
    ]


# ---- flags


@pytest.mark.slow
def test_programs_with_several_images(project, prompts):
    # One prompt of two images; boxes are drawn into each.
    name = "eval_img2text_seed_x_i"
    both = ["--image", "demo_images/men.jpg", "demo_images/car.jpg"]
    assert run_original(name, "", [*both, "--prompt", "<image> or <image>?", *SHORT]) == 0
    assert len(prompts) == 1
    assert run_original(name, "", [*both, "--detect", "the man", *SHORT]) == 0
    assert sorted(file.name for file in Path("vis").iterdir()) == ["car.png", "men.png"]


# ---- missing weights, wrong configurations


@pytest.mark.parametrize(
    "before, after, named",
    [
        ("grid_size: 2", "grid_szie: 2", "grid_szie"),
        ("embed_dim: 32", "embed_dim: 48", "another size"),
    ],
)
def test_programs_with_wrong_yaml_files(before, after, named, project, capsys):
    # The original's YAML files hold the sizes of the weights.
    path = project / "configs" / "clm_models" / "agent_seed_x.yaml"
    text = path.read_text()
    path.write_text(text.replace(before, after))
    assert before in text
    assert run("eval_img2text_seed_x", "") == 2
    assert named in capsys.readouterr().err


def test_programs_with_the_stray_key_of_the_original(project):
    # The published YAML file has a quote too many.
    file = Path("configs/visual_encoder/qwen_vitg_448.yaml")
    file.write_text(file.read_text() + 'image_start_id": 151857\n')
    assert run("eval_seed_x_detokenizer", "") == 0


# ---- tuned agents


def tuned_agent(project: Path) -> tuple[Any, Path]:
    """An agent whose language model has a LoRA, as the original saves it, and its file."""
    from tiny.seed_x import random_agent

    from seed_multimodal.config import instantiate

    torch.manual_seed(5)
    file = "configs/clm_models/llm_seed_x_lora.yaml"
    llm = instantiate(file, torch_dtype="fp32", vocab_size=None)
    agent = random_agent(llm, seed=9)
    with torch.no_grad():
        for name, parameter in agent.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    file = project / "checkpoint-10" / "pytorch_model.bin"
    file.parent.mkdir()
    state = agent.state_dict()
    # peft 0.4 had no base_layer.
    torch.save({name.replace(".base_layer.", "."): state[name] for name in state}, file)
    return agent.eval(), file


@pytest.mark.slow
def test_a_tuned_agent_by_its_yaml_files(project, capsys):
    # As in the original: llm_seed_x_lora.yaml, and the checkpoint in an agent's YAML.
    from seed_multimodal.compat.part_files import config_of_files
    from seed_multimodal.errors import ConfigError

    agent, file = tuned_agent(project)
    text = (project / "configs" / "clm_models" / "agent_seed_x.yaml").read_text()
    yaml = text.replace("pretrained/seed_x/agent/pytorch_model.bin", str(file))
    (project / "tuned.yaml").write_text(yaml)
    files = dict(read_programs()["eval_img2text_seed_x"].files)
    files |= {"agent": "tuned.yaml", "llm": "configs/clm_models/llm_seed_x_lora.yaml"}
    system = load(config_of_files(files), load_decoder=False)
    ids = torch.tensor([[1, 5, 9, 13, 40]])
    with torch.no_grad():
        logits, expected = (part.llm(input_ids=ids).logits for part in (system, agent))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigError):
        load(config_of_files(files), quantization="8bit", load_decoder=False)

    # Without the LoRA's YAML its tensors are unknown.
    assert run("eval_img2text_seed_x", "--agent tuned.yaml") == 2
    assert "q_proj" in capsys.readouterr().err
