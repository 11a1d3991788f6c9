"""Loading of the language model: stock `LlamaForCausalLM` with corrected special ids.

The original 8B files have the ids of the first LLaMA conversion (bos 0, eos 1, pad -1, no cache),
with which generation never stops and padding uses the row of `</img>`; bos 1, eos 2, pad 0 are set
before loading.
"""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import CheckpointError, ConfigError, first_line, install_hint
from seed_multimodal.hub import ORIGINAL_PARTS, SHIPPED_LLMS, find_file
from seed_multimodal.language.vocabulary import ImageVocabulary
from seed_multimodal.progress import quiet_loading
from seed_multimodal.weights import refuse_tensors, warn_tensors

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, LlamaConfig, TorchAoConfig

    from seed_multimodal.language.llm import LanguageModel

BOS = 1
EOS = 2
PAD = 0
SPECIAL = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "use_cache": True}
BITSANDBYTES = ("8bit", "4bit")
TORCHAO = ("int8", "int4")
ROTARY = "*rotary_emb.inv_freq*"  # frequencies in old files; recomputed


def load_llm(
    folder_or_id: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = torch.float32,
    quantization: str | None = None,
    vocabulary: ImageVocabulary | None = None,
) -> LanguageModel:
    """Read a LLaMA folder or hub id for inference, straight to `device`.

    dtype: "auto" is that of the files, which then stay memory-mapped on a CPU.
    quantization: "8bit" or "4bit" through bitsandbytes, "int8" or "int4" through torchao; `dtype`
    is then that of the other weights.
    vocabulary: of the tokenizer, whose size the model must have.

    Raises `CheckpointError` for missing, damaged, unsafe or foreign files, `ConfigError` for an
    impossible quantisation.
    """
    from transformers import GenerationConfig, LlamaForCausalLM

    # 1. Load; transformers wants a GPU by its number.
    device = torch.device(device)
    device_map: dict[str, str | int] = {"": str(device)}
    if device.type == "cuda":
        device_map = {"": device.index or 0}
    quantization_config = _quantization_config(quantization, device, dtype)
    quantized = {"quantization_config": quantization_config} if quantization_config else {}
    config = llama_config(folder_or_id, vocabulary)
    model: LanguageModel
    try:
        with quiet_loading("transformers"):
            model, report = LlamaForCausalLM.from_pretrained(
                str(folder_or_id),
                config=config,
                dtype=dtype,
                generation_config=GenerationConfig(**SPECIAL),
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                device_map=device_map,
                **quantized,
            )
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001  (damaged files raise many error types)
        reason = first_line(error)
        if isinstance(error, pickle.UnpicklingError):
            reason = "they have unsafe pickle content; re-save them as safetensors"
        raise CheckpointError(f"{folder_or_id}: the weights cannot be read ({reason}).") from error

    # 2. What they held.
    _check_loading(report, folder_or_id)
    force_special_ids(model)
    return model.eval()


def _check_loading(report: dict[str, Any], folder_or_id: str | Path) -> None:
    """Raise CheckpointError unless the file has all tensors of the model, in their size.

    report: transformers' `loading_info`. Unknown tensors outside of the layers are ignored.
    """
    resized = [
        f"{name} (file {tuple(stored)}, model {tuple(expected)})"
        for name, stored, expected in report["mismatched_keys"]
    ]
    refuse_tensors(sorted(resized), (), folder_or_id, "of another size")
    refuse_tensors(sorted(report["missing_keys"]), (), folder_or_id, "missing from the file")
    unknown = sorted(report["unexpected_keys"])
    in_layers = [name for name in unknown if name.startswith("model.layers.")]
    outside = [name for name in unknown if name not in in_layers]
    refuse_tensors(in_layers, (ROTARY,), folder_or_id, "unknown to the model of config.json")
    warn_tensors(outside, (ROTARY,), folder_or_id)


def force_special_ids(model: LanguageModel) -> None:
    """Set bos 1, eos 2, pad 0 and the KV cache, and drop all other generation defaults."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(**SPECIAL)
    for name, value in SPECIAL.items():
        setattr(model.config, name, value)


def llama_config(source: str | Path, vocabulary: ImageVocabulary | None) -> LlamaConfig:
    """The sizes in a folder's config.json, with corrected special ids; raises as `load_llm`."""
    from transformers import LlamaConfig

    # An original's folder is recognised by its name.
    advice = "give the folder of a LLaMA (config.json and *.safetensors)"
    for part in ORIGINAL_PARTS.values():
        if Path(part.folder).name == Path(source).name:
            advice = (
                f"download huggingface.co/{part.hub} into {source}, or use a shipped one: "
                f"{SHIPPED_LLMS}"
            )
            break
    values = read_json_object(find_file(source, ("config.json",), advice))
    if values.get("model_type") != "llama":
        raise CheckpointError(
            f"{source}: a checkpoint of another model: model_type is {values.get('model_type')!r}, "
            f"not 'llama'."
        )
    if vocabulary is not None and values.get("vocab_size") != vocabulary.size:
        raise CheckpointError(
            f"{source}: the model has {values.get('vocab_size')} words, but the tokenizer has "
            f"{vocabulary.size}; they do not belong together."
        )
    return LlamaConfig.from_dict({**values, **SPECIAL})


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
