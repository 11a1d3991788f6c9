"""Builders for the original YAML files (see `targets.ALIASES`): the language model, and the demo's
system."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from seed_multimodal.config import instantiate
from seed_multimodal.entry import MAX_RUNNING
from seed_multimodal.errors import ConfigError
from seed_multimodal.weights.find import find_path

if TYPE_CHECKING:
    from torch import dtype as TorchDtype

    from seed_multimodal.compat.seed_llama import SeedLlamaTokenizer
    from seed_multimodal.language.llm import LanguageModel
    from seed_multimodal.models.seed.pipeline import SeedLlama


def language_model(
    pretrained_model_name_or_path: str,
    torch_dtype: str | TorchDtype = "auto",
    low_cpu_mem_usage: bool = True,
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
    device_map: str | None = None,
    device: str = "auto",
    quantization: str | None = None,
) -> LanguageModel:
    """A LLaMA from a folder or hub name, as `get_pretrained_llama_causal_model` and
    `from_pretrained` of the originals; `device_map` (`"cuda:0"`) is the originals' `device`."""
    from seed_multimodal.device import FP16_WITH_8BIT, choose_device
    from seed_multimodal.language.lora import load_llm_or_adapter

    # 1. The originals' flags by our names.
    if load_in_8bit and load_in_4bit:
        raise ConfigError("load_in_8bit and load_in_4bit exclude each other.")
    if load_in_8bit or load_in_4bit:
        quantization = quantization or ("8bit" if load_in_8bit else "4bit")
    if device_map not in (None, "auto"):
        device = device_map

    # 2. With 8-bit weights bitsandbytes computes in float16.
    fp16 = FP16_WITH_8BIT if quantization == "8bit" else ""
    runtime = choose_device(device, torch_dtype, fp16=fp16)

    # 3. A hub name may be a folder in pretrained/.
    path = find_path(pretrained_model_name_or_path)
    return load_llm_or_adapter(
        path or pretrained_model_name_or_path,
        device=runtime.device,
        dtype=runtime.dtype,
        quantization=quantization or None,
    )


def load_tokenizer(
    tokenizer: str | Path,
    image_transform: str | Path | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
) -> SeedLlamaTokenizer:
    """The `SeedLlamaTokenizer` of a YAML file or folder.

    image_transform: YAML file of the transform by which it reads images; None: its own.

    Raises CheckpointError: missing weights. Raises ConfigError: a missing file, one that builds
    something else, or a transform of another image size.
    """
    from seed_multimodal.compat.seed_llama import SeedLlamaTokenizer
    from seed_multimodal.language.tokenizer import MultimodalTokenizer
    from seed_multimodal.pipelines.images import open_images

    if os.path.isdir(tokenizer):
        codec = open_images(tokenizer, device=device, dtype=dtype)
        loaded: object = SeedLlamaTokenizer(MultimodalTokenizer.from_pretrained(tokenizer), codec)
    else:
        overrides = {} if dtype == "auto" else {"dtype": dtype}
        loaded = instantiate(tokenizer, device=device, **overrides)
    if not isinstance(loaded, SeedLlamaTokenizer):
        raise ConfigError(
            f"{tokenizer}: describes a {type(loaded).__name__}, not a SEED tokenizer."
        )

    # The transform of the file replaces the codec's own.
    if image_transform is not None:
        codec = loaded.images
        transform = instantiate(image_transform)
        preprocessing = codec.model.visual_encoder.preprocessing
        expected_size = preprocessing.image_size
        if transform.image_size != expected_size:
            raise ConfigError(
                f"{image_transform}: image_size is {transform.image_size}, but the tokenizer reads "
                f"images of {expected_size} pixels a side."
            )
        codec.transform = preprocessing.with_resizing_of(transform)
    return loaded


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
) -> SeedLlama:
    """A `SeedLlama` from the original demo's three YAML files.

    model, tokenizer, image_transform: the files, as the flags of the demo's server; the first two
        may be folders.
    dtype, quantization: override the files.

    Raises as `load_tokenizer`.
    """
    from seed_multimodal.inference.opening import EngineOptions
    from seed_multimodal.language.prompts import get_template, template_for
    from seed_multimodal.models.seed.pipeline import (
        SeedLlama,
        SeedLlamaFamily,
        check_detokenizer,
    )
    from seed_multimodal.models.seed.spec import SeedLlamaConfig
    from seed_multimodal.pipelines.config import Found

    # 1. The image tokenizer; a missing diffusion model is reported before the language model is
    # read.
    seed_tokenizer = load_tokenizer(
        tokenizer, image_transform, device=tokenizer_device, dtype=dtype
    )
    codec = seed_tokenizer.images
    check_detokenizer(codec.decoder_folder)
    offloaded = {"encoder": offload_encoder, "decoder": offload_decoder}
    codec.offload([part for part, chosen in offloaded.items() if chosen])

    # 2. The language model.
    overrides: dict[str, str] = {"device_map": llm_device}
    if dtype != "auto":
        overrides["torch_dtype"] = dtype
    if quantization is not None:
        overrides["quantization"] = quantization
    build: Callable[..., LanguageModel] = instantiate
    if os.path.isdir(model):
        build = language_model
    llm = build(str(model), **overrides)
    original = SeedLlamaConfig.of_original("8b")
    config = SeedLlamaConfig(
        found=Found(Path(model).name.removesuffix(".yaml")),
        tokenizer=Path(tokenizer),
        llm=Path(model),
        tasks=original.tasks,
        template=template_for(llm.config.hidden_size),
        generation=original.generation,
    )

    # 3. Its engine. Quantised weights cannot be moved.
    offload_device = None
    if offload_llm and getattr(llm, "hf_quantizer", None) is None:
        offload_device = llm.device
        llm.to("cpu")
    options = EngineOptions(
        max_running=max_running,
        kv_cache=kv_cache,
        compiled=compiled,
        offload_device=offload_device,
    )
    template = get_template(config.template)
    family = SeedLlamaFamily(config, seed_tokenizer.text, llm, codec, template)
    return SeedLlama(family, options)
