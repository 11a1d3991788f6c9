"""A system from the released demo's three YAML files, for its server's `--image_transform --tokenizer --model`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from seed_multimodal.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from seed_multimodal.systems.seed_llama import SeedLlama


def system_from_configs(
    *, model: str | Path, tokenizer: str | Path, image_transform: str | Path, llm_device: str = "auto",
    tokenizer_device: str = "auto", offload_encoder: bool = False, offload_decoder: bool = True,
) -> SeedLlama:
    """Build the parts the files describe and put them together.

    Raises:
        CheckpointError: weights that are not there (says what to download and where to put it); `ConfigError` for a
            file that is missing or builds something else.
    """
    from seed_multimodal.config import instantiate
    from seed_multimodal.configured import SeedLlamaTokenizer
    from seed_multimodal.language.tasks import RELEASED_TASKS
    from seed_multimodal.systems.seed_llama import SeedLlama
    from seed_multimodal.systems.system_spec import RELEASED_GENERATION, SystemSpec, template_for

    _refuse_missing(model, tokenizer)
    words = instantiate(tokenizer, device=tokenizer_device)
    if not isinstance(words, SeedLlamaTokenizer):
        raise ConfigError(f"{tokenizer}: describes a {type(words).__name__}, not a SEED tokenizer.")
    words.pictures.transform = instantiate(image_transform)
    words.pictures.offload(encoder=offload_encoder, decoder=offload_decoder)
    llm = instantiate(model, device_map=llm_device)
    spec = SystemSpec(name=str(model), tokenizer=Path(tokenizer), llm=Path(model), detokenizer=None,
                      template=template_for(llm.config.hidden_size), generation=dict(RELEASED_GENERATION),
                      tasks=RELEASED_TASKS)
    return SeedLlama(spec, words.text, llm, words.pictures)


def _refuse_missing(model: str | Path, tokenizer: str | Path) -> None:
    """Name every released part that is missing, at once: the server needs them all before it can start.

    Raises:
        CheckpointError: what to download and where to put it, and what runs now; `ConfigError`: as `load_yaml`.
    """
    from huggingface_hub import constants

    from seed_multimodal.config import find_target, load_yaml
    from seed_multimodal.configured import language_model, seed_llama_tokenizer
    from seed_multimodal.hub import PARTS, is_hub_name, llm_kind, local_folder, locate, not_on_disk, released_folder

    fetched = not constants.HF_HUB_OFFLINE  # then what is named as on the hub comes when it is needed
    named: list[tuple[str, str]] = []
    for file in (tokenizer, model):
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
            folder = locate(name) or locate(released_folder(name)) if fetched and is_hub_name(name) else (
                local_folder(name))
            drawing = node.get("diffusion_path")
            if drawing or folder is None or not (folder / "diffusion_model").is_dir():
                named.append(("unclip", str(drawing or PARTS["unclip"].folder)))
    missing = [(kind, name) for kind, name in named
               if not (fetched and is_hub_name(name)) and local_folder(name) is None]
    if missing:
        raise CheckpointError(f"{not_on_disk(missing)}, or start scripts/start_backend_nano.sh (--system nano), which "
                              "runs now.")
