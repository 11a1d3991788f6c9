"""`seed export-gguf`: a LLaMA folder → a file for llama.cpp of 16, 8 or about 4.5 bits a weight."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from seed_multimodal.disk import atomic_path, writing
from seed_multimodal.entry import log_line
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.language.llm import BOS, EOS, ROTARY, llama_config
from seed_multimodal.language.tokenizer import TokenizerFiles, read_files
from seed_multimodal.progress import Progress
from seed_multimodal.weights import load_checkpoint, refuse_tensors

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from transformers import LlamaConfig

_loggers: list[object] = []  # keeps the callback alive for llama.cpp
# Names of tensors: transformers' → llama.cpp's, of the whole model and of a layer.
MODEL_TENSORS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
LAYER_TENSORS = {
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
# Kinds of tokens in llama.cpp.
NORMAL = 1
UNKNOWN = 2
CONTROL = 3
USER_DEFINED = 4
BYTE = 6
K_QUANT_BLOCK = 256  # weights that are quantised together: rows must be multiples of it


def export_gguf(folder: str | Path, tokenizer_dir: str | Path, out: str | Path, quant: str) -> Path:
    """Export the language model in `folder` to the file `out`, for llama.cpp.

    tokenizer_dir: the folder of the vocabulary. quant: "f16", "q8_0" or "q4_k_m".
    Raises CheckpointError: missing or damaged weights, or not matching config.json.
    """
    out = Path(out)
    tokenizer = read_files(Path(tokenizer_dir))
    config = llama_config(folder, tokenizer.vocabulary)

    # 1. What llama.cpp cannot compute, or not in so few bits.
    has_biases = config.attention_bias or config.mlp_bias
    if config.rope_parameters["rope_type"] != "default" or has_biases:
        raise ConfigError(
            f"{folder}: only LLaMAs without biases and with plain rotary positions can be exported."
        )
    if quant == "q4_k_m":
        widths = (config.hidden_size, config.intermediate_size)
        if any(width % K_QUANT_BLOCK for width in widths):
            log_line(
                f"{folder}: its widths are no multiples of 256: llama.cpp stores some tensors in "
                "more than 4 bits."
            )

    # 2. A file of 16 bits, which is then quantised.
    with writing(out, ConfigError):
        out.parent.mkdir(parents=True, exist_ok=True)
    with writing(out, ConfigError), atomic_path(out) as half:
        _write(half, folder, tokenizer, config)
        if quant != "f16":
            n_tensors = len(LAYER_TENSORS) * config.num_hidden_layers + len(MODEL_TENSORS)
            with atomic_path(half) as quantised:
                _quantise(half, quantised, quant, n_tensors)
    return out


def interleaved(weight: Tensor, n_heads: int) -> Tensor:
    """Rows of a query or key projection: halves of each head (transformers) → pairs (llama.cpp)."""
    halves = weight.unflatten(0, (n_heads, 2, -1))  # [heads, 2, head_dim / 2, in]
    return halves.transpose(1, 2).flatten(0, 2)


def _tensor_names(n_layers: int, tied: Sequence[str]) -> dict[str, str]:
    """transformers' name → llama.cpp's, of all tensors in the file."""
    names: dict[str, str] = {}
    for source, target in MODEL_TENSORS.items():
        if f"{source}.weight" not in tied:
            names[f"{source}.weight"] = f"{target}.weight"
    for layer in range(n_layers):
        for source, target in LAYER_TENSORS.items():
            names[f"model.layers.{layer}.{source}.weight"] = f"blk.{layer}.{target}.weight"
    return names


def _write(file: Path, folder: str | Path, tokenizer: TokenizerFiles, config: LlamaConfig) -> None:
    """Write the file with 16 bits per weight, 32 for norms; one tensor in memory at a time."""
    import gguf

    # 1. Every tensor of the checkpoint has a name here.
    tied = ("lm_head.weight",) if config.tie_word_embeddings else ()
    state = load_checkpoint(folder)
    names = _tensor_names(config.num_hidden_layers, tied)
    missing = [name for name in names if name not in state]
    refuse_tensors(missing, (), folder, "missing from the file")
    unknown = [name for name in state if name not in names]
    refuse_tensors(unknown, (ROTARY, *tied), folder, "unknown to the model")

    # 2. The header: settings, then names, shapes and types.
    writer = gguf.GGUFWriter(file, "llama")
    _add_settings(writer, config, tokenizer)
    for source, target in names.items():
        weight = state[source]
        dtype = np.dtype(np.float32 if weight.ndim == 1 else np.float16)
        writer.add_tensor_info(target, weight.shape, dtype, dtype.itemsize * weight.numel())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()

    # 3. The weights.
    n_heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    with Progress("write", len(names), "tensor") as bar:
        for source, target in names.items():
            weight = state.pop(source)
            layer_name = target.split(".")[-2]
            if layer_name in n_heads:
                weight = interleaved(weight, n_heads[layer_name])
            dtype = torch.float32 if weight.ndim == 1 else torch.float16
            writer.write_tensor_data(weight.to(dtype).numpy())
            bar.update()
    writer.close()


def _add_settings(writer: Any, config: LlamaConfig, tokenizer: TokenizerFiles) -> None:
    """Sizes and vocabulary: text tokens, then image tokens."""
    # 1. Sizes.
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(1)

    # 2. Vocabulary.
    pieces = tokenizer.processor
    image_tokens = sorted(tokenizer.added, key=tokenizer.added.__getitem__)
    tokens: list[str] = []
    scores: list[float] = []
    kinds: list[int] = []
    for id in range(pieces.GetPieceSize()):
        tokens.append(pieces.IdToPiece(id))
        scores.append(pieces.GetScore(id))
        kinds.append(_token_kind(pieces, id))
    for token in image_tokens:
        tokens.append(token)
        scores.append(0.0)
        kinds.append(USER_DEFINED)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)


def _token_kind(pieces: SentencePieceProcessor, id: int) -> int:
    if pieces.IsUnknown(id):
        return UNKNOWN
    if pieces.IsControl(id):
        return CONTROL
    if pieces.IsByte(id):
        return BYTE
    return NORMAL


def _quantise(source: Path, target: Path, quant: str, n_tensors: int) -> None:
    """Run llama.cpp's quantiser, which logs a line that begins with a bracket for each tensor."""
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quant.upper()}")
    with Progress("quantise", n_tensors, "tensor") as bar:

        def count_tensors(level: int, text: bytes, _: object) -> None:
            bar.update(text.startswith(b"["))

        _loggers.append(llama_cpp.llama_log_callback(count_tensors))
        llama_cpp.llama_log_set(_loggers[-1], None)
        if llama_cpp.llama_model_quantize(bytes(source), bytes(target), ctypes.byref(settings)):
            raise CheckpointError(
                f"{source.parent}: llama.cpp could not quantise the weights to {quant}."
            )
