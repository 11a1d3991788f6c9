"""`seed export-gguf`: a LLaMA folder → one file for llama.cpp, with 16, 8 or about 4.5 bits a weight."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seed_multimodal.disk import atomic_path, writing
from seed_multimodal.entry import log_line
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.language.llama import BOS, EOS, ROTARY, llama_config
from seed_multimodal.language.tokenizer import read_files
from seed_multimodal.progress import Progress
from seed_multimodal.weights import load_checkpoint, refuse_tensors

loggers: list[Any] = []  # keeps the callback alive for llama.cpp
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
IN_BLOCK = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def export_gguf(folder: str | Path, words: str | Path, out: str | Path, quant: str) -> Path:
    """Export the language model in `folder`, with the vocabulary of the tokenizer folder `words`, to the file `out`.
    Raises CheckpointError: missing or damaged weights, or not matching config.json."""
    out, files = Path(out), read_files(Path(words))
    config = llama_config(folder, files.vocabulary)
    if config.rope_parameters["rope_type"] != "default" or config.attention_bias or config.mlp_bias:
        raise ConfigError(
            f"{folder}: only LLaMAs without biases and with plain rotary positions can be exported."
        )
    if quant == "q4_k_m" and (config.hidden_size % 256 or config.intermediate_size % 256):
        log_line(
            f"{folder}: its widths are no multiples of 256: llama.cpp stores some tensors in more than 4 bits."
        )
    with writing(out, ConfigError):
        out.parent.mkdir(parents=True, exist_ok=True)
    with writing(out, ConfigError), atomic_path(out) as half:
        _write(half, folder, files, config)
        if quant != "f16":
            with atomic_path(half) as quantised:
                _quantise(half, quantised, quant, 9 * config.num_hidden_layers + 3)
    return out


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection, per head: first and second half (transformers) → pairs (llama.cpp)."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _write(file: Path, folder: str | Path, words: Any, config: Any) -> None:
    """Write the file with 16 bits per weight, 32 for norms; one tensor in memory at a time."""
    import gguf

    tied, state = ("lm_head.weight",) if config.tie_word_embeddings else (), load_checkpoint(folder)
    names = {
        f"{old}.weight": f"{new}.weight"
        for old, new in WHOLE.items()
        if f"{old}.weight" not in tied
    }
    names |= {
        f"model.layers.{layer}.{old}.weight": f"blk.{layer}.{new}.weight"
        for layer in range(config.num_hidden_layers)
        for old, new in IN_BLOCK.items()
    }
    refuse_tensors(
        [name for name in names if name not in state], (), folder, "missing from the file"
    )
    refuse_tensors(
        [name for name in state if name not in names],
        (ROTARY, *tied),
        folder,
        "unknown to the model",
    )
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    writer = gguf.GGUFWriter(file, "llama")
    _add_settings(writer, config, words)
    for old, new in names.items():
        kind = np.dtype(np.float32 if state[old].ndim == 1 else np.float16)
        writer.add_tensor_info(new, state[old].shape, kind, kind.itemsize * state[old].numel())
    for part in ("header", "kv_data", "ti_data"):
        getattr(writer, f"write_{part}_to_file")()
    with Progress("write", len(names), "tensor") as bar:
        for old, new in names.items():
            weight, part = state.pop(old), new.split(".")[-2]
            weight = interleaved(weight, heads[part]) if part in heads else weight
            writer.write_tensor_data(
                weight.to(torch.float32 if weight.ndim == 1 else torch.float16).numpy()
            )
            bar.update()
    writer.close()


def _add_settings(writer: Any, config: Any, words: Any) -> None:
    """Sizes and vocabulary: text tokens, then image tokens."""
    pieces, added = words.processor, sorted(words.added, key=words.added.__getitem__)
    ids = range(pieces.GetPieceSize())
    kinds = [
        2 if pieces.IsUnknown(id) else 3 if pieces.IsControl(id) else 6 if pieces.IsByte(id) else 1
        for id in ids
    ]
    for name, value in {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "key_length": config.head_dim,
        "value_length": config.head_dim,
        "rope_dimension_count": config.head_dim,
        "rope_freq_base": config.rope_parameters["rope_theta"],
        "layer_norm_rms_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "file_type": 1,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "tokenizer_model": "llama",
        "token_list": [*map(pieces.IdToPiece, ids), *added],
        "token_scores": [*map(pieces.GetScore, ids), *(0.0 for _ in added)],
        "token_types": [*kinds, *(4 for _ in added)],
    }.items():  # 4: of the user
        getattr(writer, f"add_{name}")(value)


def _quantise(source: Path, target: Path, quant: str, tensors: int) -> None:
    """llama.cpp's quantiser, which logs a line with a bracket first for each tensor."""
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quant.upper()}")
    with Progress("quantise", tensors, "tensor") as bar:
        loggers.append(
            llama_cpp.llama_log_callback(lambda level, text, _: bar.update(text.startswith(b"[")))
        )
        llama_cpp.llama_log_set(loggers[-1], None)
        if llama_cpp.llama_model_quantize(bytes(source), bytes(target), ctypes.byref(settings)):
            raise CheckpointError(
                f"{source.parent}: llama.cpp could not quantise the weights to {quant}."
            )
