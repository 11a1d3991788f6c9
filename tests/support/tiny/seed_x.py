"""SEED-X in a system folder (fixture `tiny_x_folder`) or in the original layout."""

import dataclasses
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from repository import ROOT
from yaml_tables import read_tables

from seed_multimodal import MultimodalTokenizer
from seed_multimodal.language.hub_tokenizer import HubTokenizer
from seed_multimodal.models.seed_x.modeling import AgentSettings, ContinuousLVLM
from seed_multimodal.nn.vision.qwen import (
    IN_QWEN_VL,
    QwenVit,
    QwenVitConfig,
    Resampler,
    ResamplerConfig,
)
from seed_multimodal.state_dicts import load_state_dict, save_state_dict
from seed_nano.train.words import train_text_tokenizer
from tiny import spread, write_json
from tiny.diffusion import FEATURES, RESAMPLER, random_adapter, write_sdxl
from tiny.language import LLM_WIDTH, llama, random_llm, write_hub_tokenizer

WORDS = 4  # tokens of an image, a grid of 2 x 2
GRID = 16  # location tokens of boxes
VIEW = 16  # pixels a side of a view
SENTENCES = [
    "[INST] Describe this image briefly. [/INST]\nA red apple beside a blue fish.",
    "Question: What is this animal?\nAnswer: It is a cat. In the picture there is a car [[",
    "[INST] Generate an image: a small house. [/INST]\nHere is it.",
    "[INST] Where is the tree? Show me the location. [/INST]\n12 345",
] * 8
TOWER = QwenVitConfig(
    image_size=VIEW,
    patch_size=4,
    width=16,
    layers=1,
    heads=2,
    mlp_ratio=2.0,
    output_dim=FEATURES,
    n_queries=16,
    position_grid=2,
    pool_heads=2,
)
READS = ResamplerConfig(grid_size=2, embed_dim=LLM_WIDTH, num_heads=2, kv_dim=FEATURES)
WRITES = ResamplerConfig(grid_size=2, embed_dim=FEATURES, num_heads=2, kv_dim=LLM_WIDTH)


def build_seed_x(folder: str | Path, *, stage: int = 1, hub: bool = False) -> Path:
    """Write a system folder with a de-tokenizer of that stage, and return it.

    hub: with a Qwen 3 and a hub tokenizer.
    """
    root = Path(folder)
    if hub:
        write_hub_parts(root)
    else:
        tokenizer = write_seed_x_tokenizer(root / "tokenizer")
        write_llm(root / "llm", len(tokenizer))
    write_agent(root / "agent")
    write_tower(root / "vision")
    write_sdxl(root / "sdxl", complete=False)
    random_adapter(stage).save_pretrained(root / "detokenizer")
    write_json(root / "system.json", read_tables(__file__))
    return root


def build_released_seed_x(base: str | Path) -> Path:
    """The same parts in a `pretrained` folder of the original layout: seed_x, seed_x_i and
    seed_x_edit.

    Unlike the original, folders contain the sizes of the models (see `forget_sizes`).
    """
    root = Path(base)
    tokenizer = write_seed_x_tokenizer(root / "cvlm_llama2_tokenizer_100img_and_224loc_addpatch")
    # Three agents of different seeds, their language models in several files.
    for index, name in enumerate(("seed_x", "seed_x_i", "seed_x_edit")):
        write_llm(root / name / "llm", len(tokenizer), index, max_shard_size="40KB")
        write_agent(root / name / "agent", index)
        _as_torch(root / name / "agent" / "model.safetensors", "pytorch_model.bin")
    # One vision encoder, and de-tokenizers of both stages.
    write_tower(root / "QwenViT")
    _as_torch(root / "QwenViT" / "model.safetensors", "qwen_vit_G.pt")
    write_sdxl(root / "stable-diffusion-xl-base-1.0", complete=False)
    for stage, name in enumerate(("first_stage", "second_stage"), 1):
        saved = random_adapter(stage).save_pretrained(root / "seed_detokenizer" / name)
        _as_torch(saved / "model.safetensors", "pytorch_model.bin")
    return root


def _as_torch(file, name):
    torch.save(load_state_dict(file), file.with_name(name))
    file.unlink()


def forget_sizes(root):
    """Delete the files that the original weights do not have; sizes are then those of
    `write_seed_x_configs`."""
    for file in (
        *root.glob("*/agent/config.json"),
        root / "QwenViT" / "config.json",
        *root.glob("seed_detokenizer/*/resampler.json"),
    ):
        file.unlink()


def write_seed_x_configs(root) -> Path:
    """The repository's YAML files for SEED-X with the sizes of these parts, in `home/configs`."""
    from omegaconf import OmegaConf

    # Folder of configurations → what changes in its files.
    sizes = {
        "visual_encoder": dataclasses.asdict(TOWER),
        "processer": {"image_size": VIEW},
        "clm_models": {"input_resampler": vars(READS), "output_resampler": vars(WRITES)},
        "sdxl_adapter": {"resampler": dataclasses.asdict(RESAMPLER)},
        "tokenizer": {},
        "discrete_model": {},
    }
    for folder, changes in sizes.items():
        (root / "configs" / folder).mkdir(parents=True)
        for file in sorted((ROOT / "configs" / folder).glob("*.yaml")):
            if folder != "tokenizer" or file.name.startswith("clm"):
                config = OmegaConf.merge(
                    OmegaConf.load(file), {} if file.name.startswith("llm") else changes
                )
                # As wide as the tiny model allows.
                if "lora" in file.name:
                    config.peft_config.r = 4
                OmegaConf.save(config, root / "configs" / folder / file.name)
    return root / "configs"


def write_qwen_vl(folder, *, torch_files: bool) -> QwenVit:
    """A Qwen-VL-Chat, with the vision encoder that is returned behind the first shard."""
    torch.manual_seed(7)
    model = spread(QwenVit(TOWER), 0.4).to(torch.bfloat16)
    folder.mkdir(parents=True)
    state = {"transformer.h.0.attn.c_attn.weight": torch.zeros(100, 100)}  # a shard of its own
    state |= {IN_QWEN_VL + name: value for name, value in model.state_dict().items()}
    options = {"max_shard_size": "20KB", "safe_serialization": not torch_files}
    save_torch_state_dict(state, folder, **options)
    # The sizes stand in the configuration, next to a key of no size.
    visual = {**dataclasses.asdict(TOWER), "image_start_id": 151857}
    write_json(folder / "config.json", {"model_type": "qwen", "visual": visual})
    return model


def write_seed_x_tokenizer(folder) -> MultimodalTokenizer:
    return train_text_tokenizer(
        MultimodalTokenizer,
        SENTENCES,
        folder,
        vocab_size=330,
        n_codes=6,
        tokens_per_image=WORDS,
        n_locations=GRID,
    )


def write_hub_parts(root):
    """A hub tokenizer with SEED-X's tokens, and a language model with its rows."""
    hub = write_hub_tokenizer(root / "hub", SENTENCES)
    tokenizer = HubTokenizer.create(hub, 6, WORDS, n_locations=GRID)
    tokenizer.save_pretrained(root / "tokenizer")
    ids = dict(tokenizer.special_ids)
    random_llm("qwen3", len(tokenizer), **ids).save_pretrained(root / "llm")


def write_llm(folder, n_words, seed=0, **options):
    torch.manual_seed(seed)
    llama(n_words).save_pretrained(folder, **options)


def random_agent(llm, seed=0) -> ContinuousLVLM:
    """A language model with random resamplers."""
    torch.manual_seed(10 + seed)
    model = ContinuousLVLM(llm, Resampler(READS), Resampler(WRITES), AgentSettings())
    return spread(model, 0.4)


def write_agent(folder, seed=0):
    from types import SimpleNamespace

    model = random_agent(SimpleNamespace(config=SimpleNamespace(hidden_size=LLM_WIDTH)), seed)
    save_state_dict(model.state_dict(), folder / "model.safetensors")
    sizes = {"input_resampler": READS, "output_resampler": WRITES}
    write_json(
        folder / "config.json", {name: dataclasses.asdict(size) for name, size in sizes.items()}
    )


def write_tower(folder):
    torch.manual_seed(20)
    spread(QwenVit(TOWER), 0.4).save_pretrained(folder)
