"""From 30 drawn pictures and a CLIP folder to a tokenizer in use, by the commands that each run prints."""

from __future__ import annotations

import base64
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lavis_runs import ROOT, log_of

from seed_multimodal.cli.main import main

NANO = ROOT / "pretrained" / "nano" / "seed_tokenizer"
WIDTH = 16  # of the image embedding, as the tiny system's decoder draws it
STAGE1 = {
    "model": {
        "arch": "blip2_casual", "model_type": "pretrain", "load_pretrained": False, "vit_precision": "fp32",
        "image_size": 48, "vit": {"patch_size": 16, "width": 32, "depth": 2, "heads": 2, "mlp_width": 64,
                                  "pre_norm": True},
        "qformer": {"width": 32, "depth": 2, "heads": 2, "mlp_width": 64, "max_positions": 64, "dropout": 0.0},
        "embed_dim": 16, "max_txt_len": 24, "lm_head": False, "text_tokenizer": str(NANO)},
    "datasets": {"unsplash": {"vis_processor": {"train": {"name": "blip2_image_train", "image_size": 48}},
                              "text_processor": {"train": {"name": "blip_caption"}}}},
    "run": {"task": "image_text_pretrain", "lr_sched": "linear_warmup_cosine_lr", "max_epoch": 1, "iters_per_epoch": 2,
            "batch_size_train": 6, "num_workers": 0, "warmup_steps": 1}}


def clip_folder(home: Path) -> Path:
    """A whole CLIP in transformers' layout."""
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config={**sizes, "vocab_size": 99, "num_hidden_layers": 1},
                         vision_config={**sizes, "image_size": 48, "patch_size": 16}, projection_dim=WIDTH)
              ).save_pretrained(home)
    return home


def drawn_pictures(folder: Path) -> Path:
    """30 scenes, each with its caption beside it."""
    from PIL import Image

    from seed_nano.world.scene import render
    from seed_nano.world.splits import scene_at
    from seed_nano.world.words import describe

    folder.mkdir()
    for number in range(30):
        scene = scene_at(0, number)
        Image.fromarray(render(scene)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(describe(scene))
    return folder


def test_a_tokenizer_on_a_clip_folder_is_used_by_the_commands_that_runs_print(
    tmp_path: Path, tiny_folder: Path, run: Callable[[list[str]], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    from omegaconf import OmegaConf
    from transformers import LlamaConfig, LlamaForCausalLM

    from seed_multimodal.configured import system_from_configs
    from seed_multimodal.data.pretokenize.encode import EncoderSettings
    from seed_multimodal.data.pretokenize.run import RunSettings
    from seed_multimodal.data.pretokenize.run import run as extract
    from seed_multimodal.language.tokenizer import MultimodalTokenizer
    from seed_multimodal.serving.flask_app import create_app

    def next_step() -> list[str]:
        (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("Next: "))
        return shlex.split(line.removeprefix("Next: "))

    data, clip, out = drawn_pictures(tmp_path / "data"), clip_folder(tmp_path / "clip"), tmp_path / "tokenizer"
    config = OmegaConf.merge(STAGE1, {
        "model": {"vit_weights": str(clip)}, "run": {"output_dir": str(tmp_path / "q")},
        "datasets": {"unsplash": {"build_info": {"storage": str(data)}}}})
    OmegaConf.save(config, tmp_path / "stage1.yaml")
    run(["--cfg-path", str(tmp_path / "stage1.yaml")])
    settings, *script = next_step()
    assert Path(script[-1]).name == "codebook.sh" and settings.startswith("CONFIG=")
    run(["--cfg-path", settings.removeprefix("CONFIG="), "--options", "run.iters_per_epoch=2", "run.max_epoch=1",
         "model.kmeans_images=12"])
    assert log_of(tmp_path / "q_codebook", "stage2")
    program, *command = next_step()
    assert program == "seed" and main([*command[:-1], str(out)]) == 0

    picture, kept = str(data / "3.png"), tmp_path / "kept"
    assert main(["eval", "tokenizer", "--model", str(out), "--data", str(data), "--out", str(tmp_path / "eval"),
                 "--stage1", str(tmp_path / "q" / "checkpoint_0.pth"), "--clip", str(clip), "--device", "cpu"]) == 0
    capsys.readouterr()
    assert main(["tokenize", picture, "--model", str(out), "--json"]) == 0
    codes = json.loads(capsys.readouterr().out)["codes"]
    assert len(codes) == 32 and len(set(codes)) > 1
    assert main(["reconstruct", picture, "--model", str(out), "--out", str(kept)]) == 2
    assert f"put a stable-unCLIP folder that draws its embeddings at {out}/diffusion_model" in capsys.readouterr().err
    assert main(["describe", picture, "--model", str(out)]) == 2
    assert "its language model is not there" in capsys.readouterr().err

    assert extract(RunSettings("caption", {"files": str(data)}, str(tmp_path / "codes"),
                               EncoderSettings(str(out), device="cpu"), workers=0)) == 0
    words = MultimodalTokenizer.from_pretrained(out)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0)).save_pretrained(tmp_path / "llm")
    system = system_from_configs(model=tmp_path / "llm", tokenizer=out, llm_device="cpu", tokenizer_device="cpu")
    assert system.tokenize(Path(picture))[0].tolist() == codes
    image = base64.b64encode(Path(picture).read_bytes()).decode()
    asked = {"text": "What is it? <image>", "images": [image], "max_new_tokens": 4}
    answer = create_app(system).test_client().post("/generate", json=asked)
    assert answer.status_code == 200, answer.text

    shutil.copytree(tiny_folder / "seed_tokenizer" / "diffusion_model", out / "diffusion_model")
    assert main(["reconstruct", picture, "--model", str(out), "--out", str(kept), "--steps", "2"]) == 0
    assert len(list(kept.glob("*.png"))) == 1
