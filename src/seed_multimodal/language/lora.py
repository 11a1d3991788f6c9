"""Merging of trained checkpoints into a plain LLaMA folder.

A checkpoint is a PEFT adapter, output of DeepSpeed's `zero_to_fp32.py`, or a tuned SEED-X agent.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from seed_multimodal.device import DTYPES
from seed_multimodal.disk import atomic_folder, output_folder, read_json_object, replace_json
from seed_multimodal.errors import CheckpointError, ConfigError, SeedError
from seed_multimodal.language.llm import (
    EMBEDDING,
    HEAD,
    check_vocab_size,
    force_special_ids,
    load_llm,
)
from seed_multimodal.language.text_tokenizer import TextTokenizer
from seed_multimodal.state_dicts import INDEX_FILES, load_checkpoint, save_state_dict
from seed_multimodal.weights.catalogue import ADAPTER_CONFIG, AGENT_CONFIG, VISUAL_WEIGHTS
from seed_multimodal.weights.find import find_path, first_file

if TYPE_CHECKING:
    from peft import PeftModel

    from seed_multimodal.language.llm import LanguageModel

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
LLM_FOLDER = "llm"
AGENT_FOLDER = "agent"
PREFIX = "base_model.model."
_AGENT = ("input_resampler.", "output_resampler.", "patch_pos_embed")
_OUTER = re.compile(r"^(?:module\.|_orig_mod\.|llm\.)+")
# Weights of the base that are saved with the adapter.
_FROZEN = (".original_module.", ".base_layer.", "rotary_emb.inv_freq")
# Fields of `LoraConfig` that determine the merged weights.
_MERGE_FIELDS = (
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "fan_in_fan_out",
)
# Further fields that merging follows by the names of the tensors, or that do not change the weights
# of a trained adapter.
_OTHER_FIELDS = (
    "target_modules exclude_modules modules_to_save layers_to_transform layers_pattern bias "
    "lora_dropout ensure_weight_tying task_type peft_type peft_version auto_mapping "
    "base_model_name_or_path revision inference_mode runtime_config"
).split()
# Initial matrices that were subtracted from the base's weights.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_mergeable(
    config: Mapping[str, Any], label: str, kind: type[SeedError] = CheckpointError
) -> None:
    """Raise `kind` for fields of `LoraConfig` with which the merged weights are not the trained
    ones."""
    from peft import LoraConfig

    initialization = str(config.get("init_lora_weights")).lower()
    if initialization.startswith(_CHANGED_BASE):
        raise kind(
            f"{label}: init_lora_weights {initialization} is not supported: it changes the base's "
            "weights, and the adapter does not fit the base on the disk."
        )
    supported = (*_MERGE_FIELDS, *_OTHER_FIELDS, "init_lora_weights")
    for item in fields(LoraConfig):
        # Null, false and empty switch a field off.
        value = config.get(item.name)
        if item.name not in supported and value and value != item.default:
            raise kind(f"{label}: {item.name} is not supported, since merging does not follow it.")


@dataclass
class TrainedWeights:
    """The tensors of a trained checkpoint.

    lora: low-rank matrices, by PEFT's names without prefix.
    full: tensors that replace the base's, by its names.
    agent: SEED-X's resamplers. agent_config: the content of `agent.json`.
    config: fields of `peft.LoraConfig`.
    """

    source: Path
    lora: dict[str, Tensor] = field(default_factory=dict)
    full: dict[str, Tensor] = field(default_factory=dict)
    agent: dict[str, Tensor] = field(default_factory=dict)
    agent_config: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, value: Tensor) -> None:
        """Sort a tensor in, without the names of the modules around it in training."""
        name = _OUTER.sub("", name)
        if name.startswith(_AGENT):
            self.agent[name] = value
            return
        name = name.removeprefix(PREFIX).replace(".base_layer.bias", ".bias")
        if any(part in name for part in _FROZEN):
            return
        name = name.replace(".modules_to_save.default.", ".")
        name = re.sub(r"\.default(?=\.|$)", "", name)
        if ".lora_" in name:
            self.lora[name] = value
        else:
            self.full[name] = value


def read_trained(source: str | Path, lora: Mapping[str, Any] | None = None) -> TrainedWeights:
    """Read an adapter folder, a checkpoint of SEED-X's tuning, or output of `zero_to_fp32.py`.

    lora: fields of `LoraConfig` if there is no `adapter_config.json` or `agent.json`.
    """
    path = Path(source)
    trained = TrainedWeights(path)

    # 1. The tensors.
    for name, value in load_checkpoint(first_file(path, ADAPTER_FILES) or path).items():
        trained.add(name, value)

    # 2. The configuration, in the checkpoint's folder or (an agent's) in the run's.
    folder = path if path.is_dir() else path.parent
    agent_file = first_file(folder, [AGENT_CONFIG]) or first_file(folder.parent, [AGENT_CONFIG])
    if trained.agent and agent_file is not None:
        trained.agent_config = read_json_object(agent_file)
    if (folder / ADAPTER_CONFIG).is_file():
        trained.config = read_json_object(folder / ADAPTER_CONFIG)
    else:
        trained.config = dict(trained.agent_config.get("lora") or lora or {})
    check_mergeable(trained.config, str(path))
    return trained


@torch.no_grad()
def merge_into(llama: LanguageModel, trained: TrainedWeights) -> None:
    """Replace tensors by trained ones, and merge low-rank matrices, in memory.

    Raises `CheckpointError` for tensors that the model does not have, or of another size.
    """
    # Not in place, since the weights may be memory-mapped.
    parameters = _fit_to(llama, trained)
    for name, value in trained.full.items():
        parameters[name].data = value.to(parameters[name])
    if trained.lora:
        _add_lora(llama, trained).merge_and_unload()


def _fit_to(llama: LanguageModel, trained: TrainedWeights) -> dict[str, nn.Parameter]:
    """All parameters by name, tied ones twice, after checking that trained tensors replace some.

    Errors as of `merge_into`.
    """
    # 1. One matrix cannot be both embeddings any more if they were trained apart.
    if llama.config.tie_word_embeddings and _embeddings_differ(trained):
        llama.config.tie_word_embeddings = False
        embeddings = llama.get_input_embeddings().weight
        llama.get_output_embeddings().weight = nn.Parameter(embeddings.clone())

    # 2. Names and sizes.
    parameters = dict(llama.named_parameters(remove_duplicate=False))
    for name, value in trained.full.items():
        if name not in parameters or parameters[name].shape != value.shape:
            size = tuple(parameters[name].shape) if name in parameters else "missing"
            raise CheckpointError(
                f"{trained.source}: {name!r} is {tuple(value.shape)}, but in the base it is {size}."
            )
    return parameters


def _embeddings_differ(trained: TrainedWeights) -> bool:
    """Whether input and output embeddings were trained to different values."""
    # Of tied ones a checkpoint has the embedding alone, or the same values twice.
    embedding = trained.full.get(EMBEDDING)
    head = trained.full.get(HEAD)
    if head is not None and (embedding is None or not torch.equal(embedding, head)):
        return True
    return any(name.startswith(("model.embed_tokens.", "lm_head.")) for name in trained.lora)


def _add_lora(llama: LanguageModel, trained: TrainedWeights) -> PeftModel:
    """The model with its low-rank matrices next to the weights."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    # 1. The configuration of the adapter.
    config = trained.config
    if not config.get("r") or not config.get("lora_alpha"):
        raise CheckpointError(
            f"{trained.source}: has LoRA matrices, but no r and lora_alpha "
            f"({ADAPTER_CONFIG}, or peft_config of the model's configuration)."
        )
    values = {key: config[key] for key in _MERGE_FIELDS if key in config}
    values["target_modules"] = sorted({name.rpartition(".lora_")[0] for name in trained.lora})
    state = {PREFIX + name: value for name, value in trained.lora.items()}

    # 2. The model with its matrices, all of which must be in the checkpoint.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tied embeddings, deprecated names in transformers
        try:
            model = get_peft_model(llama, LoraConfig(**values)).eval()
            report = set_peft_model_state_dict(model, state)
        except (TypeError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[-1].strip().rstrip(".")
            raise CheckpointError(
                f"{trained.source}: not an adapter of this model ({reason})."
            ) from error
    missing = [name for name in report.missing_keys if ".lora_" in name]
    wrong = [*report.unexpected_keys, *missing]
    if wrong:
        raise CheckpointError(
            f"{trained.source}: not a complete adapter of this model, first {wrong[0]!r}."
        )
    return model


@torch.no_grad()
def _save_merged(
    llama: LanguageModel,
    trained: TrainedWeights,
    folder: Path,
    dtype: torch.dtype,
    max_shard_size: str | int,
) -> int:
    """Merge into `folder`, a file at a time, so that no more than a file is in memory.

    Returns the number of tensors. Errors as of `merge_into`.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers.core_model_loading import revert_weight_conversion

    # 1. All tensors by name, tied ones once, and those with low-rank matrices.
    parameters = _fit_to(llama, trained)
    unique = dict(llama.named_parameters())
    layers: dict[nn.Parameter, BaseTunerLayer] = {}
    if trained.lora:
        for module in _add_lora(llama, trained).modules():
            if isinstance(module, BaseTunerLayer):
                layers[module.get_base_layer().weight] = module

    # 2. The sizes of the files.
    shapes = {
        name: torch.empty(value.shape, dtype=dtype, device="meta") for name, value in unique.items()
    }
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=max_shard_size)

    # 3. Each file. PEFT merges in place, in float32, into a copy of the base's weight.
    weight_map: dict[str, str] = {}
    n_bytes = 0
    for file, names in split.filename_to_tensors.items():
        tensors: dict[str, Tensor] = {}
        for name in names:
            parameter = parameters[name]
            value = trained.full.get(name, parameter.data)
            if parameter in layers:
                stored = parameter.data
                parameter.data = value.to(torch.float32, copy=True)
                layers[parameter].merge()
                value = parameter.data
                parameter.data = stored
            tensors[name] = value.to(dtype)
        tensors = dict(revert_weight_conversion(llama, tensors))
        weight_map |= dict.fromkeys(tensors, file)
        n_bytes += sum(tensor.nbytes for tensor in tensors.values())
        save_state_dict(tensors, folder / file)

    # 4. The index of several files, and the configuration.
    if split.is_sharded:
        index = {"metadata": {"total_size": n_bytes}, "weight_map": weight_map}
        replace_json(folder / INDEX_FILES[0], index)
    llama.config.dtype = dtype
    llama.config.architectures = [type(llama).__name__]
    llama.config.save_pretrained(folder)
    llama.generation_config.save_pretrained(folder)
    return len(parameters) if llama.config.tie_word_embeddings else len(unique)


def merge_adapter(
    base: str | Path | None,
    trained: str | Path,
    out: str | Path,
    *,
    tokenizer: TextTokenizer | None = None,
    lora: Mapping[str, Any] | None = None,
    dtype: str = "fp32",
    max_shard_size: str | int = "5GB",
    force: bool = False,
    agent: Callable[[TrainedWeights], Mapping[str, Any]] | None = None,
) -> str:
    """Write a plain LLaMA folder, complete or not at all. Returns a summary for the log.

    trained: as of `read_trained`, or the folder of a complete model, which needs no `base`.
    tokenizer: saved next to the weights.
    agent: returns `config.json` of a tuned SEED-X, whose folder has subfolders `llm` and `agent`.
    """
    # 1. Read the checkpoint and its base.
    path = Path(trained)
    target = output_folder(out, force=force, label="the merged model", inputs=(base, path))
    is_complete = (path / "config.json").is_file() and not (path / ADAPTER_CONFIG).is_file()
    if is_complete:
        weights = TrainedWeights(path)
        base = path
    else:
        weights = read_trained(path, lora)
    agent_config = agent(weights) if agent is not None and weights.agent else None
    llama = load_base(base, weights, tokenizer, dtype="auto")  # mapped, not read

    # 2. Merge and write.
    with atomic_folder(target, out) as folder:
        llm_folder = folder / LLM_FOLDER if weights.agent else folder
        n_tensors = _save_merged(llama, weights, llm_folder, DTYPES[dtype], max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(llm_folder)
        if (path / VISUAL_WEIGHTS).is_file():
            shutil.copyfile(path / VISUAL_WEIGHTS, llm_folder / VISUAL_WEIGHTS)
        agent_folder = folder / AGENT_FOLDER
        if weights.agent:
            save_state_dict(weights.agent, agent_folder / "model.safetensors")
        if agent_config is not None:
            replace_json(agent_folder / "config.json", agent_config)
    return (
        f"{out}: {n_tensors} tensors, {len(weights.lora) // 2} with LoRA merged in, "
        f"{len(weights.full)} replaced by trained ones; {len(weights.agent)} tensors of resamplers."
    )


def load_llm_or_adapter(
    folder_or_id: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    quantization: str | None = None,
    tokenizer: TextTokenizer | None = None,
    layers: bool = True,
) -> LanguageModel:
    """As `load_llm`, also of an adapter's folder.

    The adapter is merged, in memory, into the base that its `adapter_config.json` names.
    """
    folder = Path(folder_or_id)
    if not (folder / ADAPTER_CONFIG).is_file():
        return load_llm(
            folder_or_id,
            device=device,
            dtype=dtype,
            quantization=quantization,
            tokenizer=tokenizer,
            layers=layers,
        )

    # 1. The base.
    merge = "src/tools/merge_lora_weights.py (in MultiModalLLM) writes a merged folder"
    if quantization is not None or not layers:
        raise ConfigError(
            f"{folder}: a LoRA can be merged neither into quantised weights nor into those of a "
            f"server; {merge}."
        )
    recorded = str(read_json_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "")
    base = find_path(recorded) if recorded else None
    if base is None:
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG}: base_model_name_or_path is {recorded!r}, no base model on "
            f"this disk; correct it, or {merge}, with --base_model."
        )
    trained = read_trained(folder)
    llama = load_base(base, trained, tokenizer, device=device, dtype=dtype)

    # 2. The adapter.
    merge_into(llama, trained)
    llama.requires_grad_(False)
    return llama


def load_base(
    base: str | Path | None,
    trained: TrainedWeights,
    tokenizer: TextTokenizer | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = torch.float32,
) -> LanguageModel:
    """The base, resized to the trained embeddings; arguments as of `load_llm`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    # 1. The base, or of a fully trained model the sizes in its `agent.json`.
    if base is not None:
        llama = load_llm(base, device=device, dtype=dtype, tokenizer=tokenizer)
    elif trained.agent_config.get("llm"):
        sizes = {"model_type": "llama", **trained.agent_config["llm"]}
        with torch.device("meta"):  # every tensor is replaced
            llama = AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes)).eval()
        force_special_ids(llama, tokenizer)
        missing = [name for name, _ in llama.named_parameters() if name not in trained.full]
        if missing:
            raise CheckpointError(f"{trained.source}: {missing[0]!r} is missing from it.")
    else:
        raise ConfigError(
            "A base model is needed: the LLaMA folder that the adapter was trained on."
        )

    # 2. The size of its vocabulary.
    embeddings = llama.get_input_embeddings().weight
    head = trained.full.get(HEAD, embeddings)
    if len(head) == len(llama.get_output_embeddings().weight):
        head = embeddings  # of GLM-Image it has fewer rows: codes alone are written
    vocab_size = min(len(trained.full.get(EMBEDDING, embeddings)), len(head))
    if tokenizer is not None:
        check_vocab_size(vocab_size, tokenizer.vocabulary, str(trained.source))
    if vocab_size != llama.config.vocab_size:
        llama.resize_token_embeddings(vocab_size, mean_resizing=False)
    return llama
