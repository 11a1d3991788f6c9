"""Builders for the original YAML files (see `config.ALIASES`): the language model, and the demo's system."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from seed_multimodal.config import instantiate
from seed_multimodal.entry import MAX_RUNNING
from seed_multimodal.errors import ConfigError
from seed_multimodal.hub import locate, original_folder


def language_model(
    pretrained_model_name_or_path: str,
    torch_dtype: Any = "auto",
    low_cpu_mem_usage: bool = True,
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
    device_map: str | None = None,
    device: str = "auto",
    quantization: str | None = None,
) -> Any:
    """A LLaMA from a folder or hub name, as `get_pretrained_llama_causal_model` and `from_pretrained` of the originals;
    `device_map` (`"cuda:0"`) is the originals' `device`."""
    from seed_multimodal.device import FP16_WITH_8BIT, choose_device
    from seed_multimodal.language.lora import load_language_model

    if load_in_8bit and load_in_4bit:
        raise ConfigError("load_in_8bit and load_in_4bit exclude each other.")
    quantization = quantization or ("8bit" if load_in_8bit else "4bit" if load_in_4bit else None)
    runtime = choose_device(
        device_map if device_map not in (None, "auto") else device,
        torch_dtype,
        fp16=FP16_WITH_8BIT if quantization == "8bit" else "",
    )
    name, folder = pretrained_model_name_or_path, original_folder(pretrained_model_name_or_path)
    place = locate(folder) if folder != name else None  # a hub name downloaded into pretrained/
    return load_language_model(
        place or name, device=runtime.device, dtype=runtime.dtype, quantization=quantization
    )


def load_tokenizer(
    tokenizer: str | Path,
    image_transform: str | Path | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
) -> Any:
    """The `SeedLlamaTokenizer` of a YAML file or folder, which reads images by the transform of another YAML file.

    Raises:
        CheckpointError: missing weights. ConfigError: a missing file, one that builds something else, or a transform
            of another image size.
    """
    from seed_multimodal.language.tokenizer import MultimodalTokenizer
    from seed_multimodal.seed.original import SeedLlamaTokenizer
    from seed_multimodal.system.images import open_images

    if os.path.isdir(tokenizer):
        codec = open_images(tokenizer, device=device, dtype=dtype)
        words: Any = SeedLlamaTokenizer(MultimodalTokenizer.from_pretrained(tokenizer), codec)
    else:
        words = instantiate(
            tokenizer, device=device, **({} if dtype == "auto" else {"dtype": dtype})
        )
    if not isinstance(words, SeedLlamaTokenizer):
        raise ConfigError(f"{tokenizer}: describes a {type(words).__name__}, not a SEED tokenizer.")
    if image_transform is not None:
        transform, wanted = instantiate(image_transform), words.images.model.config.vit.image_size
        if transform.image_size != wanted:
            raise ConfigError(
                f"{image_transform}: image_size is {transform.image_size}, but the tokenizer reads "
                f"images of {wanted} pixels a side."
            )
        words.images.transform = transform
    return words


def system_from_configs(
    *,
    model: str | Path,
    tokenizer: str | Path,
    image_transform: str | Path | None = None,
    llm_device: str = "auto",
    tokenizer_device: str = "auto",
    offload_encoder: bool = False,
    offload_decoder: bool = True,
    offload_llm: bool = False,
    dtype: str = "auto",
    quantization: str | None = None,
    compiled: bool = False,
    max_running: int = MAX_RUNNING,
    kv_cache: float | None = None,
) -> Any:
    """A `SeedLlama` from the original demo's three YAML files (its server's `--image_transform --tokenizer --model`).

    `model` and `tokenizer` may be folders; `dtype` and `quantization` override the files. Raises as `load_tokenizer`.
    """
    from seed_multimodal.inference.opening import EngineOptions
    from seed_multimodal.language.prompts import ORIGINAL_TASKS, template_for
    from seed_multimodal.seed.pipeline import SeedLlama, check_unclip
    from seed_multimodal.system.config import ORIGINAL_GENERATION, SystemConfig

    words = load_tokenizer(tokenizer, image_transform, device=tokenizer_device, dtype=dtype)
    check_unclip(words.images.decoder_folder)  # before the language model is read
    parts = {"encoder": offload_encoder, "decoder": offload_decoder}
    words.images.offload([name for name, chosen in parts.items() if chosen])
    settings: dict[str, Any] = {} if dtype == "auto" else {"torch_dtype": dtype}
    if quantization is not None:
        settings |= {"quantization": quantization}
    build: Any = language_model if os.path.isdir(model) else instantiate
    llm = build(str(model), device_map=llm_device, **settings)
    name = Path(model).name.removesuffix(".yaml")
    config = SystemConfig(
        name=name,
        tokenizer=Path(tokenizer),
        llm=Path(model),
        tasks=ORIGINAL_TASKS,
        template=template_for(llm.config.hidden_size),
        generation=dict(ORIGINAL_GENERATION),
    )
    idle_on_cpu = (
        offload_llm and getattr(llm, "hf_quantizer", None) is None
    )  # quantised weights stay where they are
    device = llm.device if idle_on_cpu else None
    if idle_on_cpu:
        llm.to("cpu")
    options = EngineOptions(
        max_running=max_running, kv_cache=kv_cache, compiled=compiled, offload_device=device
    )
    options.check()
    return SeedLlama(config, words.text, llm, words.images, engine=options)
