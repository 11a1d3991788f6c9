"""Loading the language model: stock `LlamaForCausalLM`, with the special ids corrected.

Released 8B files carry the ids of the first LLaMA conversion (bos 0, eos 1, pad -1, no cache); with them generation
never stops and padding takes the row of `</img>`. bos 1, eos 2, pad 0 are forced before the weights are read. Old files
also hold rotary frequencies, which are computed here.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import os
import pickle
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from seed_multimodal.disk import read_json_object
from seed_multimodal.errors import CheckpointError, ConfigError, first_line, how_to_install
from seed_multimodal.hub import PARTS, is_hub_name
from seed_multimodal.language.vocabulary import ImageVocabulary
from seed_multimodal.quiet import quiet_loading
from seed_multimodal.weights import refuse_tensors, warn_tensors

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

BOS, EOS, PAD = 1, 2, 0
QUANTIZATIONS = (None, "8bit", "4bit")
ROTARY = "*rotary_emb.inv_freq*"  # frequencies in old files
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def load_llm(
    folder_or_id: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    quantization: str | None = None,
    vocabulary: ImageVocabulary | None = None,
) -> LlamaForCausalLM:
    """Read a LLaMA folder (or, on machines that may reach the hub, a hub id) for inference.

    Every tensor goes straight to `device` in `dtype`; on the CPU in the file's precision it stays a view of the file.
    Tensors that a LLaMA does not have are left out with a warning.

    Args:
        dtype: precision of the weights (with quantisation: of the rest).
        quantization: "8bit" or "4bit" through bitsandbytes, on CUDA devices and on CPUs (smaller there, not faster).
        vocabulary: the tokenizer's; the model must have exactly its words.

    Raises:
        CheckpointError: missing or damaged files, another architecture, tensors missing or of another size, layers
            beyond those of config.json, another vocabulary.
        ConfigError: a quantisation this machine cannot do.
    """
    device = torch.device(device)
    packed = _quantization(quantization, device, dtype)
    config = _config(folder_or_id, vocabulary)
    model, info = _read_weights(folder_or_id, config, dtype, {"device_map": {"": _place(device)}, **packed})
    _check_names(info, folder_or_id, config.num_hidden_layers)
    force_special_ids(model)
    return model.eval()


def force_special_ids(model: Any) -> None:
    """bos 1, eos 2, pad 0 and the key-value cache on, in both configurations of a model.

    No other setting of generation stays: transformers would fill from it whatever a call does not name (penalties,
    forced or forbidden words, least lengths, …).
    """
    config = model.config
    config.bos_token_id, config.eos_token_id, config.pad_token_id, config.use_cache = BOS, EOS, PAD, True
    model.generation_config = plain_generation()


def plain_generation() -> Any:
    """A `GenerationConfig` that sets the special ids and the key-value cache, and nothing else."""
    from transformers import GenerationConfig

    return GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, use_cache=True)


def _config(source: str | Path, vocabulary: ImageVocabulary | None) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import LlamaConfig

    folder = Path(source)
    if not _on_hub(source):
        if not os.path.isdir(folder):  # Path.is_dir raises for a name too long
            raise CheckpointError(_missing(folder))
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder}: there is no config.json in it, so this is not a language model's folder.")
        if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
            raise CheckpointError(f"{folder}: there are no weights in it (*.safetensors or *.bin).")
    try:
        for file in (folder / "config.json", folder / "generation_config.json"):
            if file.is_file():
                read_json_object(file)  # transformers fails inside if it holds something else than an object
        values, _ = LlamaConfig.get_config_dict(str(source))
    except (OSError, ValueError, CheckpointError) as error:
        if _on_hub(source):
            raise CheckpointError(f"{source}: not in the local cache of the model hub, and not fetched from it (set "
                                  f"HF_HUB_OFFLINE=0 to allow that, or give a folder).") from error
        raise CheckpointError(f"{source}: its configuration cannot be read ({first_line(error)}).") from error
    if values.get("model_type") != "llama":
        raise CheckpointError(f"{source}: a checkpoint of another model: model_type is {values.get('model_type')!r}, "
                              f"not 'llama'.")
    if vocabulary is not None and values.get("vocab_size") != vocabulary.size:
        raise CheckpointError(f"{source}: the model has {values.get('vocab_size')} words, but the tokenizer has "
                              f"{vocabulary.size}; they do not belong together.")
    values.update(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, use_cache=True)
    try:
        return LlamaConfig.from_dict(values)
    except (StrictDataclassError, ValueError, TypeError) as error:  # a value of another type
        raise CheckpointError(f"{source}: its configuration cannot be read "
                              f"({' '.join(str(error).split())[:300].rstrip('.')}).") from error


def _on_hub(source: str | Path) -> bool:
    """Whether a source is a hub name; a `Path` is always a folder."""
    return isinstance(source, str) and is_hub_name(source)


def _missing(folder: Path) -> str:
    origin = next((part.hub for part in PARTS.values() if Path(part.folder).name == folder.name), None)
    if origin is None:
        return f"{folder}: there is no such folder; put a LLaMA folder (config.json and *.safetensors) there."
    return (f"{folder}: the weights are not there; download huggingface.co/{origin} into {folder} "
            f"(or use the nano model, which is in pretrained/nano).")


def _quantization(name: str | None, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    if name not in QUANTIZATIONS:
        raise ConfigError(f"Unknown quantisation {name!r}: use 8bit or 4bit, or none.")
    if name is None:
        return {}
    if device.type not in ("cuda", "cpu"):
        raise ConfigError(f"{name} weights need a CUDA device or a CPU, not {device}.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"{name} weights need the package bitsandbytes: {how_to_install('bitsandbytes')}.")

    from transformers import BitsAndBytesConfig

    bits = (BitsAndBytesConfig(load_in_8bit=True) if name == "8bit" else
            BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype))
    return {"quantization_config": bits}


def _place(device: torch.device) -> str | int:
    """A device as a `device_map` names it."""
    return (device.index or 0) if device.type == "cuda" else str(device)


def _read_weights(source: str | Path, config: Any, dtype: torch.dtype, extra: dict[str, Any]) -> tuple[Any, Any]:
    from safetensors import SafetensorError
    from transformers import LlamaForCausalLM

    try:
        # Old .bin shards are read by transformers through torch.load(weights_only=True). Its own report of wrong
        # tensors becomes one sentence in `_check_names`.
        with quiet_loading("transformers"):
            return LlamaForCausalLM.from_pretrained(
                str(source), config=config, dtype=dtype, generation_config=plain_generation(),
                output_loading_info=True, ignore_mismatched_sizes=True, **extra)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{source}: its weights were refused, because they hold more than tensors (unsafe pickle "
                              f"content) or are damaged; re-save them as safetensors from a source you trust."
                              ) from error
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError, LookupError, TypeError,
            AttributeError) as error:  # the last two: an index of shards with values of other types
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        raise CheckpointError(f"{source}: the weights cannot be read ({first_line(error)}).") from error


def _check_names(info: Any, source: str | Path, layers: int) -> None:
    resized = sorted(f"{name} (file {tuple(there)}, model {tuple(here)})"
                     for name, there, here in info["mismatched_keys"])
    refuse_tensors(resized, (), source, "of another size")
    refuse_tensors(sorted(info["missing_keys"]), (), source, "missing from the file")
    extra = sorted(name for name in info["unexpected_keys"] if not fnmatch.fnmatchcase(name, ROTARY))
    deeper = {int(found[1]) for name in extra if (found := _LAYER.match(name))}
    if deeper and max(deeper) >= layers:
        raise CheckpointError(f"{source}: config.json says {layers} layers, but the weights have {max(deeper) + 1}; "
                              f"they do not belong together.")
    warn_tensors(extra, (), source)
