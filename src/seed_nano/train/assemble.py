"""Stages without training: initial weights, language models, finished system folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from seed_multimodal.disk import read_json_object, replace_text
from seed_multimodal.models.lavit.spec import LavitConfig
from seed_multimodal.models.seed.spec import SeedLlamaConfig
from seed_multimodal.models.seed_x.spec import SeedXConfig
from seed_multimodal.models.seed_x.train_agent import build_agent, read_agent
from seed_multimodal.pipelines.assemble import join, write_hub_files
from seed_multimodal.state_dicts import load_state_dict, save_state_dict
from seed_multimodal.weights.catalogue import AGENT_CONFIG, VISUAL_WEIGHTS
from seed_nano.train.diffusion import write_successor_unet
from seed_nano.train.lavit import decoder_sizes
from seed_nano.train.pipeline import TEMPLATES
from seed_nano.train.workspace import LavitWorkspace, Workspace, XWorkspace
from seed_nano.world.things import write_known_words


def start(space: Any) -> None:
    """The text tokenizer; for nano-x and nano-lavit an untrained U-Net, and nano's VAE."""
    space.train_text_tokenizer()
    config = space.config
    if space.system == "nano_x":
        width, seed = config.unet.prompt, config.seed + 4
        write_successor_unet(space, width, width // 2, seed)
    elif space.system == "nano_lavit":
        width, seed = decoder_sizes(space).context_dim, config.seed + 5
        write_successor_unet(space, width, config.unet.pooled, seed)
    if space.system != "nano":
        shutil.copytree(space.autoencoder, space.decoder_folder / "vae", dirs_exist_ok=True)


def trained_folder(space: Workspace, stage: str) -> Path:
    """The last checkpoint of a stage."""
    return space.work / stage / f"checkpoint-{read_json_object(space.record(stage))['steps']}"


def install_llm(space: Workspace) -> dict[str, Any]:
    """Stage `llm` of nano and nano-lavit: the trained model into the system; returns nano's
    held-out losses."""
    lavit = space.system == "nano_lavit"
    stage = "language" if lavit else "llm_sft"
    target = space.out / ("llm" if lavit else "seed_llama")
    trained = trained_folder(space, stage)
    target.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(trained / name, target)
    if lavit:
        shutil.copy(trained / VISUAL_WEIGHTS, space.out / "tokenizer")
    # Held-out losses of the training's record.
    losses = read_json_object(space.record(stage)).get("evaluation", {})
    held_out = {}
    for key in ("text_loss", "image_loss"):
        if f"eval_{key}" in losses:
            held_out[key] = round(losses[f"eval_{key}"], 4)
    return held_out


def install_agent(space: Workspace) -> None:
    """Stage `agent` of nano-x: the tuned model as `{out}/llm` and `{out}/agent`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = trained_folder(space, "sft")
    about = read_json_object(folder / AGENT_CONFIG)
    parts = {name: about[name] for name in ("input_resampler", "output_resampler")}
    # The language model and the agent are saved as two parts.
    llm = LlamaForCausalLM(LlamaConfig(**about["llm"]))
    agent = build_agent(llm, read_agent({**parts, "losses": about["losses"], "path": str(folder)}))
    llm.save_pretrained(space.out / "llm")
    state = agent.state_dict()
    state = {name: value for name, value in state.items() if not name.startswith("llm.")}
    save_state_dict(state, space.out / "agent" / "model.safetensors")
    settings = json.dumps({**parts, "settings": about["losses"]}, indent=1)
    replace_text(space.out / "agent" / "config.json", settings)


def assemble_nano(space: Workspace) -> dict[str, Any]:
    """Half precision, the pipeline's index, `system.json`."""
    from transformers import CLIPImageProcessor

    decoder = space.decoder_folder
    templates = TEMPLATES / "nano"
    size = space.config.image_size
    CLIPImageProcessor(size=size, crop_size=size).save_pretrained(decoder / "feature_extractor")
    shutil.copy(templates / "model_index.json", decoder)
    replace_text(
        space.out / "system.json",
        json.dumps({**read_json_object(templates / "system.json"), "image_size": size}, indent=1),
    )
    write_hub_files(SeedLlamaConfig, space.out)
    return _finished(space.out)


def assemble_x(space: XWorkspace) -> dict[str, Any]:
    """The de-tokenizer, half precision, `system.json`."""
    join(
        SeedXConfig,
        space.out,
        {"detokenizer": space.work / "second" / "adapter"},
        read_json_object(TEMPLATES / "nano_x" / "system.json"),
    )
    return _finished(space.out)


def assemble_lavit(space: LavitWorkspace) -> dict[str, Any]:
    """Pixel decoder and code decoder, half precision, `system.json`."""
    trained = space.work / "pixels" / "pixels"
    join(
        LavitConfig,
        space.out,
        {"pixels/unet": trained / "unet", "decoder": trained / "decoder"},
        read_json_object(TEMPLATES / "nano_lavit" / "system.json"),
    )
    return _finished(space.out)


def _finished(out: Path) -> dict[str, Any]:
    """Write the known words and float32 weights as float16 (loaders compute in float32 again);
    returns the MB."""
    write_known_words(out / "known_words.json")
    files = sorted(out.rglob("*.safetensors"))
    for file in files:
        with safe_open(file, framework="pt") as handle:
            metadata = dict(handle.metadata() or {})
        state = load_state_dict(file)
        for name, value in state.items():
            if value.dtype == torch.float32:
                state[name] = value.half()
        save_state_dict(state, file, metadata)
    n_bytes = sum(file.stat().st_size for file in files)
    return {"weights_mb": round(n_bytes / 1e6, 2)}
