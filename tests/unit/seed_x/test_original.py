"""SEED-X's original programs in `src/inference/`, on a tiny checkpoint in the original layout.

The YAML files are the repository's with tiny sizes; as originally, the weights have no sizes next
to them.
"""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm_python
from PIL import Image
from random_images import noise
from real_processes import run_process
from repository import ROOT
from tiny.seed_x import (
    READS,
    WRITES,
    build_released_seed_x,
    forget_sizes,
    random_agent,
    write_seed_x_configs,
)

from seed_multimodal.compat.seed_x_programs import SCRIPTS, seed_x_script
from seed_multimodal.compat.seed_x_yaml import config_of_files
from seed_multimodal.config import load_yaml
from seed_multimodal.errors import ConfigError
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.models.seed_x.pipeline import SeedX
from seed_multimodal.models.seed_x.processing import seed_x_vocabulary
from seed_multimodal.pipelines.base import MultimodalSystem

SOLDIER = (
    "A cybernetic soldier, enhanced with advanced weapons systems and tactical analysis software, "
    "on a mission behind enemy lines."
)
# What each program writes to vis/ without flags: a square as the original's, or in the source's
# ratio.
IMAGES = {
    "eval_seed_x_detokenizer": {"men_recon.jpg": (16, 16)},
    "eval_seed_x_detokenizer_with_condition": {"men_recon_with_condition.jpg": (20, 13)},
    "eval_img2text_seed_x": {"car.png": (48, 30)},
    "eval_text2img_seed_x": {"A super math wizard cat, richly textured oil painting.png": (16, 16)},
    "eval_img2text_seed_x_i": {"ground.png": (48, 30)},
    "eval_text2img_seed_x_i": {f"{SOLDIER.rstrip('.')}.png": (16, 16)},
    "eval_img2edit_seed_x_edit": {"1_Make it under the sunset.jpg": (20, 13)},
}
FEW = ("--device", "cpu", "--max-new-tokens", "12")


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A folder with `pretrained/`, `configs/` and `demo_images/`."""
    project = tmp_path_factory.mktemp("original")
    build_released_seed_x(project / "pretrained")
    (project / "pretrained" / "stable-diffusion-xl-base-1.0" / "seed_decode.json").write_text(
        json.dumps({"num_inference_steps": 2})
    )
    write_seed_x_configs(project)
    forget_sizes(project / "pretrained")
    (project / "demo_images").mkdir()
    for index, name in enumerate(
        ("men.jpg", "men_condition.jpg", "cat_dog.jpeg", "car.jpg", "advisor.png", "ground.png")
    ):
        noise(index).save(project / "demo_images" / name)
    return project


@pytest.fixture
def project(original: Path, tmp_path, monkeypatch) -> Path:
    """The working directory: links to that folder, and a copy of `configs/`."""
    for name in ("pretrained", "demo_images"):
        (tmp_path / name).symlink_to(original / name)
    shutil.copytree(original / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def prompts(monkeypatch) -> list[list[int]]:
    """Prompts of the language model."""
    recorded: list[list[int]] = []
    real = MultimodalSystem.generate

    def generate(self: Any, prompts: Any, *rest: Any, **more: Any) -> Any:
        recorded.extend(list(prompt.ids) for prompt in prompts)
        return real(self, prompts, *rest, **more)

    monkeypatch.setattr(MultimodalSystem, "generate", generate)
    return recorded


# ---- without flags


@pytest.mark.process
def test_program_in_a_process(original: Path, tmp_path):
    for folder in ("pretrained", "demo_images", "configs"):
        (tmp_path / folder).symlink_to(original / folder)
    name = "eval_img2edit_seed_x_edit"
    done = run_process(
        [warm_python.PYTHON, str(ROOT / "src" / "inference" / f"{name}.py"), "--device", "cpu"],
        cwd=tmp_path,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr
    assert {file.name: Image.open(file).size for file in (tmp_path / "vis").iterdir()} == IMAGES[
        name
    ]
    assert all(f"vis/{image}" in done.stdout for image in IMAGES[name])


@pytest.mark.slow
def test_programs_have_the_original_images_and_prompts(
    project: Path, prompts: list[list[int]], monkeypatch
):
    programs = {file.stem: file for file in (ROOT / "src" / "inference").glob("eval_*.py")}
    assert set(programs) == set(SCRIPTS) == set(IMAGES)
    for name, images in IMAGES.items():
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--device", "cpu"])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(programs[name]), run_name="__main__")
        assert ended.value.code == 0
        assert {image: Image.open(project / "vis" / image).size for image in images} == images
    tokenizer = MultimodalTokenizer.from_pretrained(
        Path("pretrained/cvlm_llama2_tokenizer_100img_and_224loc_addpatch")
    )
    vocabulary = seed_x_vocabulary(tokenizer)
    encode = tokenizer.encode_parts
    # 48 x 30 pixels: 2x1 and the whole; edits: 1x1
    views = vocabulary.read_ids(3)
    square = vocabulary.read_ids(2)
    expected = [
        encode(["Question:", views, "Describe this image briefly.\nAnswer:"], add_bos=True),
        [
            *encode(
                [views, "In ths background with a blue sky on the road, there is a car [["],
                add_bos=True,
            ),
            vocabulary.boxes,
        ],
        encode(["A super math wizard cat, richly textured oil painting."], add_bos=True),
        encode(
            ["[INST]", views, "Can I conntect with an advisor on Sunday? [/INST]\n"], add_bos=True
        ),
        encode(
            [
                "[INST]",
                views,
                "Is there anything in the image that can protect me from catching the flu virus "
                "when I go out? Show me the location. [/INST]\n",
            ],
            add_bos=True,
        ),
        encode([f"[INST] Generate an image: {SOLDIER} [/INST]\n"], add_bos=True),
        encode(["[INST]", square, "Make it under the sunset [/INST]\n"], add_bos=True),
    ]
    once = [
        ids for index, ids in enumerate(prompts) if ids not in prompts[:index]
    ]  # a prompt may be used twice
    for ids, wanted in zip(once, expected, strict=True):
        assert ids == wanted, (tokenizer.decode(ids), tokenizer.decode(wanted))


# ---- flags


@pytest.mark.slow
def test_programs_with_flags_of_drawing(project: Path):
    name = "eval_img2edit_seed_x_edit"
    for ratio, size in {"square": (16, 16), "restore": (20, 13)}.items():
        assert seed_x_script(name, f"--device cpu --ratio {ratio} --out {ratio}.png".split()) == 0
        assert Image.open(f"{ratio}.png").size == size
    plain = Image.open("restore.png")
    for flag in (
        ("--seed", "1"),
        ("--steps", "3"),
        ("--image-guidance-scale", "3"),
        ("--prompt", "Make it snow."),
    ):
        assert seed_x_script(name, [*"--device cpu --out other.png".split(), *flag]) == 0
        assert not np.array_equal(plain, Image.open("other.png")), flag
    assert seed_x_script(name, "--device cpu --out same.png --offload --device_2 cpu".split()) == 0
    assert np.array_equal(plain, Image.open("same.png"))


@pytest.mark.slow
def test_programs_with_several_images(project: Path, prompts: list[list[int]], capsys):
    both = ["--image", "demo_images/men.jpg", "demo_images/car.jpg"]
    assert (
        seed_x_script("eval_img2text_seed_x_i", [*both, "--prompt", "<image> or <image>?", *FEW])
        == 0
    )
    assert len(prompts) == 1
    assert seed_x_script("eval_img2text_seed_x_i", [*both, "--detect", "the man", *FEW]) == 0
    assert sorted(file.name for file in Path("vis").iterdir()) == ["car.png", "men.png"]
    Path("torn.jpg").write_bytes(Path("demo_images/men.jpg").read_bytes()[:200])
    pair = "--image torn.jpg demo_images/car.jpg --device cpu".split()
    assert (
        seed_x_script("eval_seed_x_detokenizer", pair) == 1 and Path("vis/car_recon.jpg").is_file()
    )
    assert "torn.jpg" in capsys.readouterr().err


@pytest.mark.slow
def test_programs_with_another_model(
    tiny_x_folder: Path,
    tmp_path,
    monkeypatch,
    capsys,
):
    """The folder of a system, as with `--model nano-x`; the images are the repository's."""
    monkeypatch.chdir(tmp_path)
    for name in (
        "eval_seed_x_detokenizer_with_condition",
        "eval_img2text_seed_x_i",
        "eval_img2edit_seed_x_edit",
    ):
        assert (
            seed_x_script(
                name, ["--model", str(tiny_x_folder), *(FEW if SCRIPTS[name].model else FEW[:2])]
            )
            == 0
        )
    assert len(list(Path("vis").iterdir())) == 3
    flags = f"--model {tiny_x_folder} --device cpu --device_2 toaster".split()
    assert (
        seed_x_script("eval_text2img_seed_x", flags) == 2 and "toaster" in capsys.readouterr().err
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["eval_seed_x_detokenizer", "eval_seed_x_detokenizer_with_condition"]
)
def test_detokenizers_with_few_embeddings(name, tmp_path):
    """Of nano-x, whose layout decoder reads all 16 embeddings of an image."""
    results = []
    for count in ("1", "4", "8", "16"):
        flags = (
            f"--model nano-x --device cpu --embeddings {count} --out {tmp_path}/{count}.png".split()
        )
        assert seed_x_script(name, flags) == 0
        results.append(np.asarray(Image.open(tmp_path / f"{count}.png"), dtype=np.float32))
    assert np.abs(results[0] - results[-1]).mean() > np.abs(results[2] - results[-1]).mean() > 0


@pytest.mark.slow
def test_detokenizers_with_a_system_of_codes(
    tiny_folder: Path,
    tmp_path,
    monkeypatch,
    capsys,
):
    """As with `--model nano`, which has neither embeddings nor condition images."""
    monkeypatch.chdir(tmp_path)
    flags = ["--model", str(tiny_folder), "--device", "cpu"]
    assert seed_x_script("eval_seed_x_detokenizer", flags) == 0
    assert len(list(Path("vis").iterdir())) == 1
    capsys.readouterr()
    for name, more in (
        ("eval_seed_x_detokenizer", ["--embeddings", "4"]),
        ("eval_seed_x_detokenizer_with_condition", []),
    ):
        assert seed_x_script(name, [*flags, *more]) == 2
        assert "is not a SEED-X" in capsys.readouterr().err.splitlines()[-1]


# ---- missing weights, wrong configurations


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (
            "eval_img2text_seed_x",
            ("pretrained/seed_x/llm", "pretrained/seed_x/agent/pytorch_model.bin"),
        ),
        (
            "eval_seed_x_detokenizer",
            ("pretrained/stable-diffusion-xl-base-1.0", "pretrained/seed_detokenizer/"),
        ),
    ],
)
def test_programs_without_weights(
    name,
    parts,
    tmp_path,
    monkeypatch,
    capsys,
):
    if (ROOT / "pretrained" / "QwenViT").exists():
        pytest.skip("the original weights are on this disk")
    monkeypatch.chdir(tmp_path)
    assert seed_x_script(name, []) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    wanted = (*parts, "pretrained/QwenViT/qwen_vit_G.pt", "seed fetch ", "--model nano-x ")
    assert all(part in error for part in wanted), error


@pytest.mark.parametrize(
    ("file", "before", "after", "sentence"),
    [
        (
            "clm_models/llm_seed_x",
            "src.models.mllm.modeling_llama_xformer.LlamaForCausalLM.from_pretrained",
            "os.system",
            "_target_ 'os.system' is not allowed",
        ),
        ("clm_models/agent_seed_x", "grid_size: 2", "grid_szie: 2", "did you mean 'grid_size'"),
        ("clm_models/agent_seed_x", "embed_dim: 32", "embed_dim: 48", "tensors have another size"),
    ],
)
def test_programs_with_wrong_yaml_files(
    file,
    before,
    after,
    sentence,
    project: Path,
    capsys,
):
    path = project / "configs" / f"{file}.yaml"
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))
    assert seed_x_script("eval_img2text_seed_x", ["--device", "cpu"]) == 2
    assert sentence in capsys.readouterr().err


def test_programs_with_the_stray_key_of_the_original(project: Path):
    file = Path("configs/visual_encoder/qwen_vitg_448.yaml")
    file.write_text(file.read_text() + 'image_start_id": 151857\n')
    assert seed_x_script("eval_seed_x_detokenizer", ["--device", "cpu"]) == 0


@pytest.mark.slow
def test_programs_with_sizes_next_to_the_weights(tmp_path, monkeypatch):
    """They override those of the repository's YAML files."""
    build_released_seed_x(tmp_path / "pretrained")
    monkeypatch.chdir(tmp_path)
    assert (
        seed_x_script("eval_text2img_seed_x_i", "--device cpu --out a.png --steps 1".split()) == 0
    )
    assert Image.open("a.png").size == (16, 16)


# ---- tuned agents


def _tuned(project: Path) -> tuple[Any, Path]:
    """An agent whose language model has a LoRA, as the original's training saves it.

    And its file.
    """
    from peft import LoraConfig, get_peft_model

    from seed_multimodal.language.llm import load_llm

    node = load_yaml(project / "configs" / "clm_models" / "llm_seed_x_lora.yaml")
    fields = {
        key: list(value) if "ListConfig" in type(value).__name__ else value
        for key, value in node.peft_config.items()
        if not key.startswith("_")
    }
    torch.manual_seed(5)
    llm = get_peft_model(
        load_llm(Path(node.model.pretrained_model_name_or_path)), LoraConfig(**fields)
    )
    agent = random_agent(llm, seed=9)
    with torch.no_grad():
        for name, parameter in agent.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    file = project / "checkpoint-10" / "pytorch_model.bin"
    file.parent.mkdir()
    # peft 0.4 had no base_layer
    torch.save(
        {name.replace(".base_layer.", "."): value for name, value in agent.state_dict().items()},
        file,
    )
    return agent.eval(), file


@pytest.mark.slow
def test_from_pretrained_of_a_tuned_agent_and_the_yaml_of_its_lora(project: Path, capsys):
    """As in the original: llm_seed_x_lora.yaml, and the checkpoint in an agent's YAML."""
    agent, file = _tuned(project)
    text = (project / "configs" / "clm_models" / "agent_seed_x.yaml").read_text()
    (project / "tuned.yaml").write_text(
        text.replace("pretrained/seed_x/agent/pytorch_model.bin", str(file))
    )
    files = {
        **SCRIPTS["eval_img2text_seed_x"].files,
        "agent": "tuned.yaml",
        "llm": "configs/clm_models/llm_seed_x_lora.yaml",
    }
    system = SeedX.from_pretrained(
        config_of_files(files), device="cpu", log=None, load_decoder=False
    )
    ids = torch.tensor([[1, 5, 9, 13, 40]])
    assert torch.allclose(
        system.llm(input_ids=ids).logits, agent.llm(input_ids=ids).logits, atol=1e-4
    )
    assert torch.equal(system.agent.patch_pos_embed, agent.patch_pos_embed)
    assert seed_x_script("eval_img2text_seed_x", ["--agent", "tuned.yaml", *FEW]) == 2
    assert "q_proj" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="leave the quantisation out"):
        SeedX.from_pretrained(
            config_of_files(files), device="cpu", log=None, load_decoder=False, quantization="8bit"
        )


@pytest.mark.slow
def test_from_pretrained_of_a_checkpoint_with_its_lora(project: Path):
    agent, file = _tuned(project)
    (file.parent / "agent.json").write_text(
        json.dumps(
            {
                "input_resampler": vars(READS),
                "output_resampler": vars(WRITES),
                "losses": {"rec_loss_scale": 3.0},
                "lora": {
                    "r": 4,
                    "lora_alpha": 32,
                    "target_modules": [
                        "q_proj",
                        "v_proj",
                        "k_proj",
                        "o_proj",
                        "gate_proj",
                        "down_proj",
                        "up_proj",
                    ],
                    "modules_to_save": ["input_layernorm", "post_attention_layernorm", "norm"],
                },
            }
        )
    )
    (project / "pretrained").unlink()
    weights = build_released_seed_x(project / "pretrained")
    system = SeedX.from_pretrained(
        weights, llm=weights / "seed_x" / "llm", agent=file.parent, device="cpu", log=None
    )
    ids = torch.tensor([[1, 5, 9, 13, 40]])
    assert torch.allclose(
        system.llm(input_ids=ids).logits, agent.llm(input_ids=ids).logits, atol=1e-4
    )


@pytest.mark.parametrize(
    "name", ["get_full_model_with_resize_embedding", "get_model_with_resize_embedding"]
)
def test_language_models_of_builders_without_a_lora(name):
    from seed_multimodal.compat.seed_x_yaml import TARGETS, Described
    from seed_multimodal.config import instantiate_by

    base = {
        "_target_": "src.models.mllm.modeling_llama_xformer.LlamaForCausalLM.from_pretrained",
        "pretrained_model_name_or_path": "llm",
    }
    target = f"src.models.mllm.peft_models.{name}"
    part = instantiate_by(
        TARGETS, {"_target_": target, "model": base, "vocab_size": 32330, "torch_dtype": "bf16"}
    )
    assert part == Described("llm", Path("llm"))
