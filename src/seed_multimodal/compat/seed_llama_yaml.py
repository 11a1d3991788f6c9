"""SEED-LLaMA from the original YAML files: the language model that one builds (`targets.ALIASES`),
and the parts of the demo's system."""

from __future__ import annotations

import os
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING

from seed_multimodal.compat.part_files import LLM_PATH, base_keys, read_part, read_transform
from seed_multimodal.compat.seed_llama import SeedLlamaTokenizer, tokenizer_config
from seed_multimodal.compat.targets import arguments_of, check_target
from seed_multimodal.device import FP16_WITH_8BIT, choose_device
from seed_multimodal.disk import JsonObject
from seed_multimodal.errors import ConfigError
from seed_multimodal.language.lora import load_llm_or_adapter
from seed_multimodal.models.seed.pipeline import SeedImageCodec
from seed_multimodal.models.seed.spec import BICUBIC, SeedLlamaConfig
from seed_multimodal.pipelines.config import Found
from seed_multimodal.pipelines.images import ImageCodec
from seed_multimodal.settings import check_keys
from seed_multimodal.weights.find import find_path

if TYPE_CHECKING:
    from torch import dtype as TorchDtype

    from seed_multimodal.language.llm import LanguageModel


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


def parts_of_files(
    tokenizer: str | Path,
    model: str | Path | None = None,
    *,
    dtype: str = "auto",
    quantization: str | None = None,
) -> tuple[SeedLlamaConfig, JsonObject]:
    """The parts that the original demo's YAML files (or folders) name, and the keywords of
    `SeedLlama.from_pretrained` that they set.

    model: None: the image tokenizer alone.
    dtype, quantization: override those of the files.

    Raises ConfigError: a missing file, or one that describes another part.
    """
    # 1. The image tokenizer; a folder alone resizes images as in its evaluation.
    label = str(tokenizer)
    keys: JsonObject = {LLM_PATH: tokenizer}
    if not os.path.isdir(tokenizer):
        node = read_part(tokenizer)
        check_target(node, "seed_tokenizer", label)
        keys = arguments_of(node)
    check_keys(keys, signature(SeedLlamaTokenizer.from_pretrained).parameters, label)
    if not keys.get(LLM_PATH):
        raise ConfigError(f"{label}: {LLM_PATH} is required: the folder of a SEED-2 tokenizer.")
    config = tokenizer_config(keys[LLM_PATH], keys.get("diffusion_path"))
    if os.path.isdir(tokenizer):
        config.transform = dict(BICUBIC)
    if not keys.get("diffusion_path") and not config.has("detokenizer"):
        config.detokenizer = None  # such a system reads images
    image_dtype = keys.get("dtype", "auto" if keys.get("fp16", True) else "float32")

    # 2. The language model; its device is that of a flag.
    config.llm = None
    llm: JsonObject = {"dtype": image_dtype}
    if model is not None:
        llm = {"path": model}
        if not os.path.isdir(model):
            node = read_part(model)
            devices = ("device_map", "device")
            node = {key: value for key, value in node.items() if key not in devices}
            llm = base_keys(node, str(model))
        config.llm = find_path(llm["path"]) or Path(llm["path"])
        if config.has("llm"):
            config.template = SeedLlamaConfig.find(config.llm).template
        config.found = Found(Path(model).name.removesuffix(".yaml"))

    # 3. Precision.
    options: JsonObject = {"dtype": dtype, "image_dtype": dtype}
    if dtype == "auto":
        options = {"dtype": llm.get("dtype", "auto"), "image_dtype": image_dtype}
    options["quantization"] = quantization or llm.get("quantization")
    return config, options


def use_transform(images: ImageCodec, file: str | Path) -> None:
    """Resize images as a YAML file's transform. Raises ConfigError: it is of another size."""
    assert isinstance(images, SeedImageCodec)  # of `parts_of_files`
    transform = read_transform(file)
    preprocessing = images.model.visual_encoder.preprocessing
    if transform.image_size != preprocessing.image_size:
        raise ConfigError(
            f"{file}: image_size is {transform.image_size}, but the tokenizer reads images of "
            f"{preprocessing.image_size} pixels a side."
        )
    images.transform = preprocessing.with_resizing_of(transform)
