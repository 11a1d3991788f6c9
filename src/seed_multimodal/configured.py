"""Builders of the original YAML files: the language model, the tokenizer, and the whole system of the demo.

The files keep the original's `_target_` names and keys (`config.ALIASES` leads here); keys without meaning
(`low_cpu_mem_usage`, `encoder_url`) are accepted.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from seed_multimodal.config import find_target, instantiate, load_yaml
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.hub import PARTS, is_hub_name, llm_kind, local_folder, locate, not_on_disk, released_folder


def language_model(pretrained_model_name_or_path: str, torch_dtype: Any = "auto", low_cpu_mem_usage: bool = True,
                   load_in_8bit: bool = False, load_in_4bit: bool = False, device_map: str | None = None,
                   device: str = "auto") -> Any:
    """A LLaMA from a folder or hub name, as `get_pretrained_llama_causal_model` and `from_pretrained` of the originals.

    Args:
        torch_dtype: fp16, bf16, float32, … or a torch dtype.
        device_map: the original's way to name a device (`"cuda:0"`); `device` is ours.

    Raises:
        CheckpointError, ConfigError: as `language.llama.load_llm` and `device.choose_device`.
    """
    from seed_multimodal.device import BESIDE_8BIT, choose_device
    from seed_multimodal.language.llama import load_llm

    if load_in_8bit and load_in_4bit:
        raise ConfigError("load_in_8bit and load_in_4bit exclude each other.")
    runtime = choose_device(device_map if device_map not in (None, "auto") else device, torch_dtype,
                            fp16=BESIDE_8BIT if load_in_8bit else "")
    name, folder = pretrained_model_name_or_path, released_folder(pretrained_model_name_or_path)
    place = locate(folder) if folder != name else None  # named as on the hub, but downloaded into pretrained/
    return load_llm(place or name, device=runtime.device, dtype=runtime.dtype,
                    quantization="8bit" if load_in_8bit else "4bit" if load_in_4bit else None)


def seed_llama_tokenizer(pretrained_model_name_or_path: str, fp16: bool = True, load_diffusion: bool = False,
                         encoder_url: str | None = None, diffusion_path: str | None = None, device: str = "auto",
                         dtype: str = "auto") -> Any:
    """`SeedLlamaTokenizer.from_pretrained`, which documents the keys."""
    from seed_multimodal.seed.original import SeedLlamaTokenizer

    return SeedLlamaTokenizer.from_pretrained(
        pretrained_model_name_or_path, fp16=fp16, load_diffusion=load_diffusion, encoder_url=encoder_url,
        diffusion_path=diffusion_path, device=device, dtype=dtype)


def image_codec(model: str, device: str = "auto", dtype: str = "auto") -> Any:
    """`system.base.open_images`: encoder and de-tokenizer of a system, or of an image tokenizer alone."""
    from seed_multimodal.system.images import open_images

    return open_images(model, device=device, dtype=dtype)


def system_from_configs(*, model: str | Path, tokenizer: str | Path, image_transform: str | Path | None = None,
                        llm_device: str = "auto", tokenizer_device: str = "auto", offload_encoder: bool = False,
                        offload_decoder: bool = True, dtype: str = "auto", quantization: str | None = None) -> Any:
    """A `SeedLlama` from the original demo's three YAML files (its server's `--image_transform --tokenizer --model`).

    Args:
        model, tokenizer: or their folders, as `seed export-tokenizer` writes one; image_transform: None: the folder's.
        dtype, quantization: if given, instead of what the files say (`fp16`, `torch_dtype`, `load_in_8bit`).

    Raises:
        CheckpointError: weights that are not there (names what to download and where to put it). ConfigError: a file
            that is missing or builds something else.
    """
    from seed_multimodal.language.prompts import template_for
    from seed_multimodal.language.tasks import RELEASED_TASKS
    from seed_multimodal.language.tokenizer import MultimodalTokenizer
    from seed_multimodal.seed.original import SeedLlamaTokenizer
    from seed_multimodal.seed.pipeline import SeedLlama
    from seed_multimodal.system.config import RELEASED_GENERATION, SystemConfig

    _require_weights(model, tokenizer)
    if os.path.isdir(tokenizer):
        codec = image_codec(str(tokenizer), device=tokenizer_device, dtype=dtype)
        words: Any = SeedLlamaTokenizer(MultimodalTokenizer.from_pretrained(tokenizer), codec)
    else:
        words = instantiate(tokenizer, device=tokenizer_device, **({} if dtype == "auto" else {"dtype": dtype}))
    if not isinstance(words, SeedLlamaTokenizer):
        raise ConfigError(f"{tokenizer}: describes a {type(words).__name__}, not a SEED tokenizer.")
    if image_transform is not None:
        words.images.transform = instantiate(image_transform)
    parts = {"encoder": offload_encoder, "decoder": offload_decoder}
    words.images.offload([name for name, chosen in parts.items() if chosen])
    settings: dict[str, Any] = {} if dtype == "auto" else {"torch_dtype": dtype}
    if quantization is not None:
        settings |= {f"load_in_{bits}": bits == quantization for bits in ("8bit", "4bit")}
    build: Any = language_model if os.path.isdir(model) else instantiate
    llm = build(str(model), device_map=llm_device, **settings)
    config = SystemConfig(name=str(model), tokenizer=Path(tokenizer), llm=Path(model), tasks=RELEASED_TASKS,
                          template=template_for(llm.config.hidden_size), generation=dict(RELEASED_GENERATION))
    return SeedLlama(config, words.text, llm, words.images)


def _require_weights(model: str | Path, tokenizer: str | Path) -> None:
    """Name every original part that is missing, at once.

    Raises:
        CheckpointError: what to download and where to put it, and what runs now. ConfigError: as `load_yaml`.
    """
    from huggingface_hub import constants

    fetched = not constants.HF_HUB_OFFLINE  # parts named as on the hub are then downloaded when needed
    named: list[tuple[str, str]] = []
    for file in (one for one in (tokenizer, model) if not os.path.isdir(one)):
        node = load_yaml(file)
        builder, name = find_target(str(node.get("_target_")), str(file)), node.get("pretrained_model_name_or_path")
        if builder is language_model:
            named.append((llm_kind(str(name)), str(name)))
        elif builder is seed_llama_tokenizer:
            named.append(("tokenizer", str(name)))
            folder = local_folder(str(name), cache=not fetched)
            diffusion = node.get("diffusion_path")
            if diffusion or folder is None or not (folder / "diffusion_model").is_dir():
                named.append(("unclip", str(diffusion or PARTS["unclip"].folder)))
    missing = [(PARTS.get(kind), name) for kind, name in named
               if not (fetched and is_hub_name(name)) and local_folder(name) is None]
    if missing:
        raise CheckpointError(f"{not_on_disk(missing)}, or start scripts/start_backend_nano.sh (--system nano), which "
                              "runs now.")
