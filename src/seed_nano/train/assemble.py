"""Stages without training: initial weights, language models, finished system folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open

from seed_multimodal.disk import JsonObject, read_json_object, replace_json, replace_text
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.models.lavit.processing import LavitTokenizer
from seed_multimodal.models.lavit.spec import LavitConfig
from seed_multimodal.models.seed.spec import SeedLlamaConfig
from seed_multimodal.models.seed_x.spec import SeedXConfig
from seed_multimodal.pipelines.assemble import join, write_hub_files
from seed_multimodal.recipes.seed_x.train_agent import build_agent, read_agent
from seed_multimodal.state_dicts import load_state_dict, save_state_dict
from seed_multimodal.weights.catalogue import AGENT_CONFIG, VISUAL_WEIGHTS
from seed_nano.train.diffusion import write_successor_unet
from seed_nano.train.lavit import decoder_sizes
from seed_nano.train.pipeline import TEMPLATES
from seed_nano.train.words import train_text_tokenizer
from seed_nano.train.workspace import LavitWorkspace, Workspace, XWorkspace
from seed_nano.world.records import X_KINDS, sentences, texts_of, x_record_at
from seed_nano.world.source import open_nano
from seed_nano.world.things import write_known_words

# Records of each kind that the text tokenizers are trained on.
X_TEXTS = 60
LAVIT_TEXTS = 400


def start_nano(space: Workspace) -> None:
    """The text tokenizer."""
    write_text_tokenizer(space, space.config.tokenizer.codes, space.config.quantizer.queries)


def write_text_tokenizer(space: Workspace, n_codes: int, tokens_per_image: int) -> None:
    """Learn nano's text tokenizer, with tokens of `n_codes` codes."""
    train_text_tokenizer(
        MultimodalTokenizer,
        sentences(),
        space.tokenizer_folder,
        space.config.llm.text_vocabulary,
        n_codes,
        tokens_per_image,
    )


def start_x(space: XWorkspace) -> None:
    """The text tokenizer, in which an image's tokens are only placeholders; an untrained U-Net, and
    nano's autoencoder."""
    config = space.config
    texts = sentences()
    for kind in X_KINDS:
        for index in range(X_TEXTS):
            texts += [text for text in texts_of(x_record_at(kind, 0, index)) if "<" not in text]
    tokens = config.vision.grid**2
    train_text_tokenizer(
        MultimodalTokenizer,
        texts,
        space.tokenizer_folder,
        config.llm.text_vocabulary,
        n_codes=tokens,
        tokens_per_image=tokens,
        n_locations=config.llm.locations,
    )
    width = config.unet.prompt
    write_successor_unet(space, width, width // 2, config.seed + 4)


def start_lavit(space: LavitWorkspace) -> None:
    """The text tokenizer, an untrained U-Net, and nano's autoencoder."""
    config = space.config
    texts = sentences()
    for content, fields in (("qa", ("question", "answer")), ("edits", ("instruction",))):
        records = open_nano(None, content=content, number=LAVIT_TEXTS)
        for row in range(LAVIT_TEXTS):
            record = records.locate(row).fields
            texts += [str(record[name]) for name in fields]
    train_text_tokenizer(
        LavitTokenizer,
        texts,
        space.tokenizer_folder,
        config.llm.text_vocabulary,
        config.tokenizer.codes,
        space.encoder_sizes.grid**2,
    )
    context = decoder_sizes(space).context_dim
    write_successor_unet(space, context, config.unet.pooled, config.seed + 5)


def trained_folder(space: Workspace, stage: str) -> Path:
    """The last checkpoint of a stage."""
    return space.work / stage / f"checkpoint-{read_json_object(space.record(stage))['steps']}"


def install_llm(space: Workspace) -> JsonObject:
    """Stage `llm` of nano: the trained model into the system; returns the held-out losses."""
    copy_llm(trained_folder(space, "llm_sft"), space.out / "seed_llama")
    losses = read_json_object(space.record("llm_sft")).get("evaluation", {})
    held_out = {}
    for key in ("text_loss", "image_loss"):
        if f"eval_{key}" in losses:
            held_out[key] = round(losses[f"eval_{key}"], 4)
    return held_out


def install_lavit_llm(space: Workspace) -> None:
    """Stage `llm` of nano-lavit: the trained model and its part of the tokenizer."""
    trained = trained_folder(space, "language")
    copy_llm(trained, space.out / "llm")
    shutil.copy(trained / VISUAL_WEIGHTS, space.out / "tokenizer")


def copy_llm(trained: Path, target: Path) -> None:
    """The files of a language model, without those of its training."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(trained / name, target)


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
    for name in list(state):
        if name.startswith("llm."):
            del state[name]
    save_state_dict(state, space.out / "agent" / "model.safetensors")
    settings = json.dumps({**parts, "settings": about["losses"]}, indent=1)
    replace_text(space.out / "agent" / "config.json", settings)


def assemble_nano(space: Workspace) -> JsonObject:
    """The autoencoder, half precision, the pipeline's index, `system.json`."""
    from transformers import CLIPImageProcessor

    # 1. The autoencoder: the small one, unless its stage is left out.
    decoder = space.decoder_folder
    is_small = space.config.train_tiny.max_steps > 0
    autoencoder = space.work / "tiny" / "vae" if is_small else space.autoencoder
    shutil.copytree(autoencoder, decoder / "vae", dirs_exist_ok=True)

    # 2. The pipeline's index, with its class, and the settings.
    index = read_json_object(TEMPLATES / "nano" / "model_index.json")
    index["vae"][1] = read_json_object(autoencoder / "config.json")["_class_name"]
    replace_json(decoder / "model_index.json", index)
    size = space.config.image_size
    CLIPImageProcessor(size=size, crop_size=size).save_pretrained(decoder / "feature_extractor")
    settings = {**system_settings(space), "image_size": size}
    replace_text(space.out / "system.json", json.dumps(settings, indent=1))
    write_hub_files(SeedLlamaConfig, space.out)
    return finish(space.out)


def assemble_x(space: Workspace) -> JsonObject:
    """The de-tokenizer, half precision, `system.json`."""
    parts = {"detokenizer": space.work / "second" / "adapter"}
    join(SeedXConfig, space.out, parts, system_settings(space))
    return finish(space.out)


def assemble_lavit(space: Workspace) -> JsonObject:
    """Pixel decoder and code decoder, half precision, `system.json`."""
    trained = space.work / "pixels" / "pixels"
    parts = {"pixels/unet": trained / "unet", "decoder": trained / "decoder"}
    join(LavitConfig, space.out, parts, system_settings(space))
    return finish(space.out)


def system_settings(space: Workspace) -> JsonObject:
    """The template of the system's `system.json`."""
    return read_json_object(TEMPLATES / space.system / "system.json")


def finish(out: Path) -> JsonObject:
    """Write the known words, and float32 weights as float16 (loaders compute in float32 again);
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
