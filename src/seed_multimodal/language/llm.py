"""Loading of a causal language model of transformers, with the special ids of the tokenizer.

The original 8B files have the ids of the first LLaMA conversion (bos 0, eos 1, pad -1, no cache),
with which generation never stops and padding uses the row of `</img>`; a LLaMA without a hub
tokenizer in its folder gets bos 1, eos 2, pad 0 before it is loaded.
"""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from seed_multimodal.device import return_freed_memory
from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import (
    CheckpointError,
    ConfigError,
    SeedWarning,
    first_line,
    install_hint,
)
from seed_multimodal.language.text_tokenizer import (
    HUB_TOKENIZER,
    LLAMA_IDS,
    SpecialIds,
    TextTokenizer,
)
from seed_multimodal.language.vocabulary import ImageVocabulary
from seed_multimodal.nn.pretrained import load_library_model
from seed_multimodal.plugins import import_entry, registered
from seed_multimodal.state_dicts import refuse_tensors, warn_tensors
from seed_multimodal.weights.catalogue import SHIPPED_LLMS, download_advice, part_of
from seed_multimodal.weights.find import find_file

if TYPE_CHECKING:
    from transformers import (
        BitsAndBytesConfig,
        GenerationMixin,
        PreTrainedConfig,
        PreTrainedModel,
        TorchAoConfig,
    )

    class LanguageModel(PreTrainedModel, GenerationMixin):
        """A model of `AutoModelForCausalLM`; the configuration's fields are its architecture's."""

        config: Any


LLAMA = "llama"
# Rows behind the vocabulary with which embedding tables are padded to round sizes: up to 2,385 in
# DeepSeek's. Tokenizers of other codebooks differ by more (8,192 codes from 1,024: 7,168 rows).
MAX_PADDING = 4096
# Of a configuration of text alone; a multimodal model has them inside, Mamba lacks some.
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
# Types of layers. Others carry a state from one packed sequence to the next, or need other masks.
FULL = "full_attention"
SLIDING = "sliding_attention"
BITSANDBYTES = ("8bit", "4bit")
TORCHAO = ("int8", "int4")
ROTARY = "*rotary_emb.inv_freq*"  # frequencies in old files; recomputed


def head_dim(config: PreTrainedConfig) -> int:
    """The width of an attention head."""
    width: int | None = getattr(config, "head_dim", None)
    return width or config.hidden_size // config.num_attention_heads


def output_scores(llm: LanguageModel, states: Tensor) -> Tensor:
    """Scores `[…, V]` float32 of the next tokens, from the decoder's states `[…, D]`."""
    scores: Tensor = llm.get_output_embeddings()(states).float()
    softcap: float | None = getattr(llm.config, "final_logit_softcapping", None)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    return scores


# ------------------------------------------------------------------------------------------ loading


def load_llm(
    folder_or_id: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = torch.float32,
    quantization: str | None = None,
    tokenizer: TextTokenizer | None = None,
    layers: bool = True,
) -> LanguageModel:
    """Read a causal language model's folder or hub id for inference, straight to `device`.

    dtype: "auto" is that of the files, which then stay memory-mapped on a CPU.
    quantization: "8bit" or "4bit" through bitsandbytes, "int8" or "int4" through torchao; `dtype`
    is then that of the other weights.
    tokenizer: determines the special ids; None: see `llm_config`. Whether the model has a row for
    each of its tokens is checked by callers (`check_vocab_size`), since a base gets them later.
    layers: False reads the embeddings and the output layer alone.

    Raises `CheckpointError` for missing, damaged, unsafe or foreign files, `ConfigError` for an
    impossible quantisation.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    # 1. Load; transformers wants a GPU by its number.
    device = torch.device(device)
    device_map: dict[str, str | int] = {"": str(device)}
    if device.type == "cuda":
        device_map = {"": device.index or 0}
    quantization_config = _quantization_config(quantization if layers else None, device, dtype)
    quantized = {"quantization_config": quantization_config} if quantization_config else {}
    if quantized and device.type == "cpu":
        # Weights are packed as they are read, and again when bitsandbytes first uses them.
        return_freed_memory()
    ids = None if tokenizer is None else tokenizer.special_ids
    config = llm_config(folder_or_id, ids)
    if not layers:
        config.num_hidden_layers = 0
    # All other generation defaults of the folder are dropped.
    generation_config = GenerationConfig(use_cache=True)
    for name in LLAMA_IDS:
        setattr(generation_config, name, getattr(config, name, None))
    model, unknown = load_library_model(
        AutoModelForCausalLM,
        folder_or_id,
        "language model",
        "download its files again",
        has_blocks=layers,
        config=config,
        dtype=dtype,
        generation_config=generation_config,
        device_map=device_map,
        **quantized,
    )

    # 2. What the file holds besides: other layers are those of another model.
    in_layers = [name for name in unknown if name.startswith("model.layers.")]
    outside = [name for name in unknown if name not in in_layers]
    if layers:
        refuse_tensors(in_layers, (ROTARY,), folder_or_id, "unknown to the model of config.json")
    warn_tensors(outside, (ROTARY,), folder_or_id)
    if model.config.tie_word_embeddings and not model.all_tied_weights_keys:
        # transformers has loaded both tensors, since they differ.
        warn_untied(folder_or_id)
        model.config.tie_word_embeddings = False
    loaded: LanguageModel = model
    return loaded


def warn_untied(source: str | Path) -> None:
    """Warn that a file has different values for tensors that its configuration ties."""
    warnings.warn(
        f"{source}: config.json ties {HEAD} to {EMBEDDING} (tie_word_embeddings), but the file has "
        "different values for them; both are used.",
        SeedWarning,
        stacklevel=3,
    )


def force_special_ids(model: LanguageModel, tokenizer: TextTokenizer | None = None) -> None:
    """Set the tokenizer's special ids and the KV cache, and drop all other generation defaults.

    tokenizer: None: LLaMA's.
    """
    from transformers import GenerationConfig

    ids = LLAMA_IDS if tokenizer is None else tokenizer.special_ids
    model.generation_config = GenerationConfig(**ids, use_cache=True)
    for name, value in {**ids, "use_cache": True}.items():
        setattr(model.config, name, value)


def llm_config(source: str | Path, ids: SpecialIds | None = None) -> PreTrainedConfig:
    """The configuration of a folder or hub id, with special ids; raises as `load_llm`.

    ids: None: LLaMA's for a LLaMA without hub tokenizer, else the folder's.
    """
    from transformers import CONFIG_MAPPING

    # 1. The file; an original's folder is recognised by its name.
    advice = "give the folder of a language model (config.json and *.safetensors)"
    original = part_of(source)
    if original is not None:
        advice = f"{download_advice(original[0].name)}, or use a shipped one: {SHIPPED_LLMS}"
    file = find_file(source, ("config.json",), advice)
    values = read_json_object(file)
    model_type = values.get("model_type")
    register_class(model_type)
    if model_type not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{source}: model_type {model_type!r} is no model of this transformers version."
        )

    # 2. The configuration.
    if ids is None and model_type == LLAMA and not (file.parent / HUB_TOKENIZER).is_file():
        ids = LLAMA_IDS
    try:
        config: PreTrainedConfig = CONFIG_MAPPING[model_type].from_dict(
            {**values, **(ids or {}), "use_cache": True}
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: config.json is damaged ({first_line(error)}).") from error

    # 3. Of a multimodal model the language model, where a package has a class that reads it alone.
    if str(model_type) in registered("language_models"):
        config = config.get_text_config()
        for name, value in (ids or {}).items():
            setattr(config, name, value)
    check_sizes(config, source)
    return config


def register_class(model_type: object) -> None:
    """Make the class known to transformers that a package has for a type of language models: an
    entry point `TYPE = "module:Class"` of the group `seed_multimodal.language_models`.

    Raises ConfigError: it cannot be imported.
    """
    from transformers import AutoModelForCausalLM

    entry = registered("language_models").get(str(model_type))
    if entry is not None:
        model_class = import_entry(entry)
        # Without `exist_ok` transformers leaves out, in silence, classes of its configurations.
        AutoModelForCausalLM.register(model_class.config_class, model_class, exist_ok=True)


def check_sizes(config: PreTrainedConfig, label: str | Path) -> None:
    """Raise CheckpointError unless a configuration is that of a decoder of text alone, whose layers
    have full or sliding attention."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    # BERT and its kind read both ways unless they are made decoders.
    is_encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if is_encoder and not getattr(config, "is_decoder", True):
        raise CheckpointError(f"{label}: {config.model_type} is no decoder-only language model.")
    missing = [name for name in SIZES if not hasattr(config, name)]
    if missing:
        raise CheckpointError(
            f"{label}: {config.model_type} is no decoder-only language model of text with "
            f"attention (its configuration has no {' and no '.join(missing)})."
        )
    unknown = set(getattr(config, "layer_types", None) or ()) - {FULL, SLIDING}
    if unknown:
        raise CheckpointError(
            f"{label}: the language model has layers of {min(unknown)}; only full and sliding "
            "attention can be trained and computed."
        )


def check_vocab_size(n_rows: int, vocabulary: ImageVocabulary, label: str) -> None:
    """Raise CheckpointError unless a model has a row for each token, and little padding."""
    if not 0 <= n_rows - vocabulary.size <= MAX_PADDING:
        raise CheckpointError(
            f"{label}: the language model has {n_rows} tokens, but the tokenizer has "
            f"{vocabulary.size}; they do not belong together."
        )


def _quantization_config(
    name: str | None, device: torch.device, dtype: torch.dtype | str
) -> BitsAndBytesConfig | TorchAoConfig | None:
    """The quantization for `from_pretrained`. Raises `ConfigError`: not possible there."""
    from transformers import BitsAndBytesConfig, TorchAoConfig

    # 1. Whether the name, the device and the environment allow it.
    if name is None:
        return None
    if name not in (*BITSANDBYTES, *TORCHAO):
        raise ConfigError(
            f"Unknown quantisation {name!r}: use {', '.join((*BITSANDBYTES, *TORCHAO))}, or none."
        )
    package = "bitsandbytes" if name in BITSANDBYTES else "torchao"
    if device.type not in ("cuda", "cpu"):
        raise ConfigError(f"{name} weights need a CUDA device or a CPU, not {device}.")
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"{name} weights need the package {package}: {install_hint(package)}.")

    # 2. bitsandbytes.
    if name == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if name == "4bit":
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )

    # 3. torchao; 4 bits are groups of 64 weights, kept as int8 on a CPU.
    from torchao import quantization as torchao

    if name == "int8":
        return TorchAoConfig(torchao.Int8WeightOnlyConfig())
    if device.type == "cpu":
        return TorchAoConfig(torchao.IntxWeightOnlyConfig(torch.int4, torchao.PerGroup(64)))
    if dtype != torch.bfloat16:
        raise ConfigError(
            f"int4 weights on {device} need bfloat16 next to them, not {dtype}: give --dtype "
            "bfloat16."
        )
    return TorchAoConfig(
        torchao.Int4WeightOnlyConfig(group_size=64, int4_packing_format="tile_packed_to_4d")
    )
