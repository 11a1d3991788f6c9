"""Merging of trained checkpoints (PEFT adapters, output of DeepSpeed's `zero_to_fp32.py`, tuned SEED-X agents) into a
plain LLaMA folder.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seed_multimodal.device import DTYPES
from seed_multimodal.disk import atomic_folder, output_folder, read_json_object
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.hub import ADAPTER_CONFIG, AGENT_CONFIG, VISUAL_WEIGHTS, local_folder
from seed_multimodal.language.llama import force_special_ids, load_llm
from seed_multimodal.language.vocabulary import ImageVocabulary
from seed_multimodal.weights import load_checkpoint, save_state_dict

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
LLM_FOLDER, AGENT_FOLDER = "llm", "agent"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PREFIX = "base_model.model."
_AGENT = ("input_resampler.", "output_resampler.", "patch_pos_embed")
_OUTER = re.compile(r"^(?:module\.|_orig_mod\.|llm\.)+")
_FROZEN = (
    ".original_module.",
    ".base_layer.",
    "rotary_emb.inv_freq",
)  # base weights saved with the adapter
_SHAPE = (
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "fan_in_fan_out",
)


@dataclass
class TrainedWeights:
    """The tensors of a trained checkpoint."""

    source: Path
    lora: dict[str, Tensor] = field(
        default_factory=dict
    )  # low-rank matrices, PEFT names without prefix
    whole: dict[str, Tensor] = field(
        default_factory=dict
    )  # tensors that replace the base's, by its names
    agent: dict[str, Tensor] = field(default_factory=dict)  # SEED-X's resamplers
    agent_config: dict[str, Any] = field(default_factory=dict)  # the content of `agent.json`
    config: dict[str, Any] = field(default_factory=dict)  # fields of `peft.LoraConfig`


def read_trained(source: str | Path, lora: Mapping[str, Any] | None = None) -> TrainedWeights:
    """Read an adapter folder, a checkpoint of SEED-X's tuning, or a file or folder of `zero_to_fp32.py`; `lora`: fields
    of `LoraConfig` if there is no `adapter_config.json` or `agent.json`."""
    place = Path(source)
    trained = TrainedWeights(place)
    adapter = next((place / name for name in ADAPTER_FILES if (place / name).is_file()), place)
    for name, value in load_checkpoint(adapter).items():
        name = _OUTER.sub("", name)
        if name.startswith(_AGENT):
            trained.agent[name] = value
            continue
        name = name.removeprefix(PREFIX).replace(".base_layer.bias", ".bias")
        if not any(part in name for part in _FROZEN):
            name = re.sub(r"\.default(?=\.|$)", "", name.replace(".modules_to_save.default.", "."))
            (trained.lora if ".lora_" in name else trained.whole)[name] = value
    home = place if place.is_dir() else place.parent
    file = next(
        (
            folder / AGENT_CONFIG
            for folder in (home, home.parent)
            if (folder / AGENT_CONFIG).is_file()
        ),
        None,
    )
    if trained.agent and file is not None:
        trained.agent_config = read_json_object(file)
    trained.config = (
        read_json_object(home / ADAPTER_CONFIG)
        if (home / ADAPTER_CONFIG).is_file()
        else dict(trained.agent_config.get("lora") or lora or {})
    )
    return trained


@torch.no_grad()
def merge_into(llama: Any, trained: TrainedWeights) -> None:
    """Put whole tensors in their places, and merge low-rank matrices. Raises `CheckpointError` for tensors that the
    model does not have, or of another size."""
    embedding, head = (trained.whole.get(name) for name in (EMBEDDING, HEAD))
    apart = (head is not None and (embedding is None or not torch.equal(embedding, head))) or any(
        name.startswith(("model.embed_tokens.", "lm_head.")) for name in trained.lora
    )
    if llama.config.tie_word_embeddings and apart:  # one matrix cannot be both embeddings any more
        llama.config.tie_word_embeddings = False
        llama.lm_head.weight = torch.nn.Parameter(llama.model.embed_tokens.weight.clone())
    own = dict(llama.named_parameters(remove_duplicate=False))
    for name, value in trained.whole.items():
        if name not in own or own[name].shape != value.shape:
            size = tuple(own[name].shape) if name in own else "missing"
            raise CheckpointError(
                f"{trained.source}: {name!r} is {tuple(value.shape)}, but in the base it is {size}."
            )
        own[name].data = value.to(own[name])  # not in place, since it may be memory-mapped
    if trained.lora:
        _merge_lora(llama, trained)


def _merge_lora(llama: Any, trained: TrainedWeights) -> None:
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    config = trained.config
    if not config.get("r") or not config.get("lora_alpha"):
        raise CheckpointError(
            f"{trained.source}: has LoRA matrices, but no r and lora_alpha "
            f"({ADAPTER_CONFIG}, or peft_config of the model's configuration)."
        )
    values = {key: config[key] for key in _SHAPE if key in config}
    values |= {"target_modules": sorted({name.rpartition(".lora_")[0] for name in trained.lora})}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tied embeddings, deprecated names in transformers
        try:
            model = get_peft_model(llama, LoraConfig(**values)).eval()
            result = set_peft_model_state_dict(
                model, {PREFIX + name: value for name, value in trained.lora.items()}
            )
        except (TypeError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[-1].strip().rstrip(".")
            raise CheckpointError(
                f"{trained.source}: not an adapter of this model ({reason})."
            ) from error
    wrong = [*result.unexpected_keys, *(name for name in result.missing_keys if ".lora_" in name)]
    if wrong:
        raise CheckpointError(
            f"{trained.source}: not a complete adapter of this model, first {wrong[0]!r}."
        )
    model.merge_and_unload()


def merge_adapter(
    base: str | Path | None,
    trained: str | Path,
    out: str | Path,
    *,
    tokenizer: Any = None,
    lora: Mapping[str, Any] | None = None,
    dtype: str = "fp32",
    max_shard_size: str | int = "5GB",
    force: bool = False,
    agent: Callable[[TrainedWeights], Mapping[str, Any]] | None = None,
) -> str:
    """Write a plain LLaMA folder, complete or not at all; of a tuned SEED-X its subfolders `llm` and `agent`, for which
    `agent` gives the content of `config.json`. `trained`: as of `read_trained`, or the folder of a whole model, which
    needs no `base`; `tokenizer`: saved next to the weights. Returns a summary for the log."""
    place = Path(trained)
    target = output_folder(out, force=force, label="the merged model", inputs=(base, place))
    is_whole = (place / "config.json").is_file() and not (place / ADAPTER_CONFIG).is_file()
    changes = TrainedWeights(place) if is_whole else read_trained(place, lora)
    agent_config = agent(changes) if agent is not None and changes.agent else None
    llama = load_base(place if is_whole else base, changes, tokenizer)
    merge_into(llama, changes)
    force_special_ids(llama.to(DTYPES[dtype]))
    with atomic_folder(target, out) as folder:
        inner = folder / LLM_FOLDER if changes.agent else folder
        llama.save_pretrained(inner, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(inner)
        if (place / VISUAL_WEIGHTS).is_file():
            shutil.copyfile(place / VISUAL_WEIGHTS, inner / VISUAL_WEIGHTS)
        if changes.agent:
            save_state_dict(changes.agent, folder / AGENT_FOLDER / "model.safetensors")
        if agent_config is not None:
            (folder / AGENT_FOLDER / "config.json").write_text(
                json.dumps(agent_config, indent=1), encoding="utf-8"
            )
    return (
        f"{out}: {len(llama.state_dict())} tensors, {len(changes.lora) // 2} with LoRA merged in, "
        f"{len(changes.whole)} replaced by trained ones; {len(changes.agent)} tensors of resamplers."
    )


def load_language_model(
    folder_or_id: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    quantization: str | None = None,
    vocabulary: ImageVocabulary | None = None,
) -> Any:
    """As `load_llm`; an adapter's folder is merged, in memory, into the base that its `adapter_config.json` names."""
    folder = Path(folder_or_id)
    if not (folder / ADAPTER_CONFIG).is_file():
        return load_llm(
            folder_or_id,
            device=device,
            dtype=dtype,
            quantization=quantization,
            vocabulary=vocabulary,
        )

    # The base.
    merge = "src/tools/merge_lora_weights.py (in MultiModalLLM) writes a merged folder"
    if quantization is not None:
        raise ConfigError(
            f"{folder}: a LoRA cannot be merged into {quantization} weights; {merge}."
        )
    recorded = str(read_json_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "")
    base = local_folder(recorded) if recorded else None
    if base is None:
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG}: base_model_name_or_path is {recorded!r}, no base model on "
            f"this disk; correct it, or {merge}, with --base_model."
        )
    trained = read_trained(folder)
    llama = load_base(base, trained, device=device, dtype=dtype)

    # The adapter.
    merge_into(llama, trained)
    force_special_ids(llama)
    if vocabulary is not None and llama.config.vocab_size != vocabulary.size:
        raise CheckpointError(
            f"{folder}: the model has {llama.config.vocab_size} words, but the tokenizer has "
            f"{vocabulary.size}; they do not belong together."
        )
    return llama.requires_grad_(False).eval()


def load_base(
    base: str | Path | None,
    trained: TrainedWeights,
    tokenizer: Any = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Any:
    """The base, resized to the trained embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if base is not None:
        llama = load_llm(base, device=device, dtype=dtype)
    elif trained.agent_config.get("llm"):  # fully trained; configuration in agent.json
        llama = LlamaForCausalLM(LlamaConfig(**trained.agent_config["llm"])).eval()
        missing = [name for name, _ in llama.named_parameters() if name not in trained.whole]
        if missing:
            raise CheckpointError(f"{trained.source}: {missing[0]!r} is missing from it.")
    else:
        raise ConfigError(
            "A base model is needed: the LLaMA folder that the adapter was trained on."
        )
    words = min(
        len(trained.whole.get(name, llama.model.embed_tokens.weight)) for name in (EMBEDDING, HEAD)
    )
    if tokenizer is not None and words != tokenizer.vocabulary.size:
        raise CheckpointError(
            f"{trained.source}: has {words} words, but the tokenizer has "
            f"{tokenizer.vocabulary.size}; they do not belong together."
        )
    if words != llama.config.vocab_size:
        llama.resize_token_embeddings(words, mean_resizing=False)
    return llama
