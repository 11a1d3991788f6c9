"""Builders of the released YAML files: the language model, the tokenizer with encoder and decoder, the whole system.

The files keep the original's `_target_` names and keys (`config.ALIASES` leads here), so a configuration written for
the original code works unchanged; keys without meaning here (`low_cpu_mem_usage`, `encoder_url`) are accepted.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seed_multimodal.config import find_target, instantiate, load_yaml
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.hub import PARTS, is_hub_name, llm_kind, local_folder, locate, not_on_disk, released_folder

if TYPE_CHECKING:
    from seed_multimodal.systems.llama_tokenizer import SeedLlamaTokenizer
    from seed_multimodal.systems.picture_half import PictureHalf
    from seed_multimodal.systems.pictures import PictureCodec
    from seed_multimodal.systems.seed_llama import SeedLlama


def language_model(
    pretrained_model_name_or_path: str,
    torch_dtype: Any = "auto",
    low_cpu_mem_usage: bool = True,
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
    device_map: Any = None,
    device: str = "auto",
) -> Any:
    """A LLaMA from a folder or hub name, as `get_pretrained_llama_causal_model` and `from_pretrained` of the originals.

    Args:
        torch_dtype: fp16, bf16, float32, … or a torch dtype.
        device_map: the original's way to name a device (`"cuda:0"`); `device` is ours.
        low_cpu_mem_usage: always on here.

    Raises:
        CheckpointError, ConfigError: as `language.llama.load_llm` and `device.choose_device`.
    """
    from seed_multimodal.device import BESIDE_8BIT, choose_device
    from seed_multimodal.language.llama import load_llm

    if load_in_8bit and load_in_4bit:
        raise ConfigError("load_in_8bit and load_in_4bit exclude each other.")
    if device_map is not None and not isinstance(device_map, str):
        raise ConfigError("device_map must be the name of one device here, for example 'cuda:0'.")
    runtime = choose_device(device_map if device_map not in (None, "auto") else device, torch_dtype,
                            fp16=BESIDE_8BIT if load_in_8bit else "")
    quantization = "8bit" if load_in_8bit else "4bit" if load_in_4bit else None
    name, released = pretrained_model_name_or_path, released_folder(pretrained_model_name_or_path)
    place = locate(released) if released != name else None  # named as on the hub, but downloaded into pretrained/
    return load_llm(name if place is None else place, device=runtime.device, dtype=runtime.dtype,
                    quantization=quantization)


def seed_llama_tokenizer(
    pretrained_model_name_or_path: str, fp16: bool = True, load_diffusion: bool = False,
    encoder_url: str | None = None, diffusion_path: str | None = None, device: str = "auto", dtype: str = "auto",
) -> SeedLlamaTokenizer:
    """`SeedLlamaTokenizer.from_pretrained`, which says what the keys mean."""
    from seed_multimodal.systems.llama_tokenizer import SeedLlamaTokenizer

    return SeedLlamaTokenizer.from_pretrained(
        pretrained_model_name_or_path, fp16=fp16, load_diffusion=load_diffusion, encoder_url=encoder_url,
        diffusion_path=diffusion_path, device=device, dtype=dtype)


def picture_half(model: str, *, device: str = "auto", dtype: str = "auto") -> PictureHalf:
    """As `picture_codec`, of any system: SEED-X's reads and draws features, LaVIT's codes of any number."""
    from seed_multimodal.system.config import SystemConfig
    from seed_multimodal.systems.open_system import open_pictures

    if SystemConfig.find(model).system != "seed_llama":
        return open_pictures(model, device=device, dtype=dtype)
    return picture_codec(model, device=device, dtype=dtype)


def picture_codec(model: str, *, device: str = "auto", dtype: str = "auto") -> PictureCodec:
    """The picture half of a system with codes, without its language model.

    Args:
        model: `nano`, a system folder, `released` (also `8b`, `14b`, which share one tokenizer), or a tokenizer alone.

    Raises:
        CheckpointError: a part that is not there.
    """
    from seed_multimodal.device import RELEASED_FP16, choose_device
    from seed_multimodal.system.config import SystemConfig
    from seed_multimodal.system.domain import load_domain
    from seed_multimodal.systems.pictures import open_codec

    spec = SystemConfig.find(model, system="seed_llama").require("tokenizer")
    assert spec.tokenizer is not None
    runtime = choose_device(device, dtype, fp16=RELEASED_FP16)
    codec = open_codec(spec.tokenizer, vision=spec.vision, detokenizer=spec.detokenizer, transform=spec.transform,
                       device=runtime.device, dtype=runtime.dtype)
    codec.domain = load_domain(spec.domain, spec.domain_threshold)
    return codec


def system_from_configs(
    *, model: str | Path, tokenizer: str | Path, image_transform: str | Path | None = None, llm_device: str = "auto",
    tokenizer_device: str = "auto", offload_encoder: bool = False, offload_decoder: bool = True, dtype: str = "auto",
    quantization: str | None = None,
) -> SeedLlama:
    """A system from the released demo's three YAML files (its server's `--image_transform --tokenizer --model`).

    Args:
        model, tokenizer: or their folders, as `seed export-tokenizer` writes one; image_transform: None: the folder's.
        dtype, quantization: if given, in the place of what the files say (`fp16`, `torch_dtype`, `load_in_8bit`).

    Raises:
        CheckpointError: weights that are not there (names what to download and where to put it); `ConfigError` for a
            file that is missing or builds something else.
    """
    from seed_multimodal.language.prompts import template_for
    from seed_multimodal.language.tasks import RELEASED_TASKS
    from seed_multimodal.language.tokenizer import MultimodalTokenizer
    from seed_multimodal.system.config import RELEASED_GENERATION, SystemConfig
    from seed_multimodal.systems.llama_tokenizer import SeedLlamaTokenizer
    from seed_multimodal.systems.seed_llama import SeedLlama

    _refuse_missing(model, tokenizer)
    precision = {} if dtype == "auto" else {"dtype": dtype}
    if os.path.isdir(tokenizer):
        words: Any = SeedLlamaTokenizer(MultimodalTokenizer.from_pretrained(tokenizer),
                                        picture_codec(str(tokenizer), device=tokenizer_device, dtype=dtype))
    else:
        words = instantiate(tokenizer, device=tokenizer_device, **precision)
    if not isinstance(words, SeedLlamaTokenizer):
        raise ConfigError(f"{tokenizer}: describes a {type(words).__name__}, not a SEED tokenizer.")
    if image_transform is not None:
        words.pictures.transform = instantiate(image_transform)
    words.pictures.offload(encoder=offload_encoder, decoder=offload_decoder)
    precision = {} if dtype == "auto" else {"torch_dtype": dtype}
    packed = {} if quantization is None else {f"load_in_{bits}": bits == quantization for bits in ("8bit", "4bit")}
    start: Any = language_model if os.path.isdir(model) else instantiate
    llm = start(str(model), device_map=llm_device, **precision, **packed)
    spec = SystemConfig(name=str(model), tokenizer=Path(tokenizer), llm=Path(model),
                        image_size=words.pictures.model.config.vit.image_size, tasks=RELEASED_TASKS,
                        template=template_for(llm.config.hidden_size), generation=dict(RELEASED_GENERATION))
    return SeedLlama(spec, words.text, llm, words.pictures)


def _refuse_missing(model: str | Path, tokenizer: str | Path) -> None:
    """Name every released part that is missing, at once: the server needs them all before it can start.

    Raises:
        CheckpointError: what to download and where to put it, and what runs now; `ConfigError`: as `load_yaml`.
    """
    from huggingface_hub import constants

    fetched = not constants.HF_HUB_OFFLINE  # parts named as on the hub are then downloaded when needed
    named: list[tuple[str, str]] = []
    for file in (one for one in (tokenizer, model) if not os.path.isdir(one)):
        node = load_yaml(file)
        if not isinstance(node.get("_target_"), str):
            raise ConfigError(f"{file}: must name what to build by '_target_'.")
        builder, name = find_target(node["_target_"], str(file)), node.get("pretrained_model_name_or_path")
        if not isinstance(name, str):
            continue  # refused when it is built, by key
        if builder is language_model:
            named.append((llm_kind(name), name))
        elif builder is seed_llama_tokenizer:
            named.append(("tokenizer", name))
            folder = local_folder(name, cache=not fetched)
            drawing = node.get("diffusion_path")
            if drawing or folder is None or not (folder / "diffusion_model").is_dir():
                named.append(("unclip", str(drawing or PARTS["unclip"].folder)))
    missing = [(kind, name) for kind, name in named
               if not (fetched and is_hub_name(name)) and local_folder(name) is None]
    if missing:
        raise CheckpointError(f"{not_on_disk(missing)}, or start scripts/start_backend_nano.sh (--system nano), which "
                              "runs now.")
