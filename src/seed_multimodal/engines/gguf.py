"""`seed export-gguf`: a LLaMA folder → one file for llama.cpp, with 16, 8 or about 4.5 bits a weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seed_multimodal.disk import replacing_path, writing
from seed_multimodal.entry import log_line
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.language.llama import BOS, EOS, ROTARY, llama_config
from seed_multimodal.language.tokenizer import read_files
from seed_multimodal.progress import Progress
from seed_multimodal.weights import load_checkpoint, refuse_tensors

QUANTS = ("q4_k_m", "q8_0", "f16")
K_BLOCK = 256  # values of a block of the K-quants
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
IN_BLOCK = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
            "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def export_gguf(folder: str | Path, words: str | Path, out: str | Path, quant: str) -> Path:
    """Write the language model in `folder`, with the vocabulary of the tokenizer folder `words`, to the file `out`.

    Raises CheckpointError: weights that are missing, damaged or not those of config.json. ConfigError: another kind of
    rotary positions, or biases, or a place that cannot be written.
    """
    out, files = Path(out), read_files(Path(words))
    config = llama_config(folder, files.vocabulary)
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default" or config.attention_bias or config.mlp_bias:
        raise ConfigError(f"{folder}: only LLaMAs without biases and with plain rotary positions can be exported.")
    if quant == "q4_k_m" and (config.hidden_size % K_BLOCK or config.intermediate_size % K_BLOCK):
        log_line(f"{folder}: widths {config.hidden_size} and {config.intermediate_size} are no multiples of {K_BLOCK}: "
                 "llama.cpp stores the tensors concerned in more than 4 bits.")
    with writing(out, ConfigError), replacing_path(out) as scratch:
        if quant == "f16":
            _write(scratch, folder, files, config)
        else:
            half = scratch.with_name(f"{scratch.name}.f16")
            try:
                _write(half, folder, files, config)
                _quantise(half, scratch, quant, 9 * config.num_hidden_layers + 3)
            finally:
                half.unlink(missing_ok=True)
    return out


def tensor_names(config: Any) -> dict[str, str]:
    """Name in the checkpoint → name in the file, in the order of the file."""
    names = {f"{old}.weight": f"{new}.weight" for old, new in WHOLE.items()
             if old != "lm_head" or not config.tie_word_embeddings}
    return names | {f"model.layers.{layer}.{old}.weight": f"blk.{layer}.{new}.weight"
                    for layer in range(config.num_hidden_layers) for old, new in IN_BLOCK.items()}


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection, per head: first and second half (transformers) → pairs (llama.cpp)."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _write(file: Path, folder: str | Path, words: Any, config: Any) -> None:
    """The file with 16 bits a weight, 32 of the norms; one tensor in memory at a time."""
    import gguf

    names, state = tensor_names(config), load_checkpoint(folder)
    refuse_tensors([name for name in names if name not in state], (), folder, "missing from the file")
    unused = ("lm_head.weight",) if config.tie_word_embeddings else ()
    refuse_tensors([name for name in state if name not in names], (ROTARY, *unused), folder, "unknown to the model")
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    writer = gguf.GGUFWriter(file, "llama")
    _add_settings(writer, config)
    _add_words(writer, words)
    for old, new in names.items():
        kind = np.dtype(np.float32 if state[old].ndim == 1 else np.float16)
        writer.add_tensor_info(new, state[old].shape, kind, kind.itemsize * state[old].numel())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with Progress("write", len(names), "tensor") as bar:
        for old, new in names.items():
            weight, part = state.pop(old), new.split(".")[-2]
            weight = interleaved(weight, heads[part]) if part in heads else weight
            writer.write_tensor_data(weight.to(torch.float32 if weight.ndim == 1 else torch.float16).numpy())
            bar.update()
    writer.close()


def _add_settings(writer: Any, config: Any) -> None:
    for name, value in {
            "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
            "block_count": config.num_hidden_layers, "feed_forward_length": config.intermediate_size,
            "head_count": config.num_attention_heads, "head_count_kv": config.num_key_value_heads,
            "key_length": config.head_dim, "value_length": config.head_dim, "rope_dimension_count": config.head_dim,
            "rope_freq_base": config.rope_parameters["rope_theta"], "layer_norm_rms_eps": config.rms_norm_eps,
            "vocab_size": config.vocab_size, "file_type": 1, "bos_token_id": BOS, "eos_token_id": EOS}.items():
        getattr(writer, f"add_{name}")(value)


def _add_words(writer: Any, words: Any) -> None:
    """The pieces, and the image words behind them; only programs that read text ask for them."""
    from gguf import TokenType

    pieces, added = words.processor, sorted(words.added, key=words.added.__getitem__)
    count = pieces.GetPieceSize()
    kinds = [TokenType.UNKNOWN if pieces.IsUnknown(id) else TokenType.CONTROL if pieces.IsControl(id)
             else TokenType.BYTE if pieces.IsByte(id) else TokenType.NORMAL for id in range(count)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*(pieces.IdToPiece(id) for id in range(count)), *added])
    writer.add_token_scores([*(pieces.GetScore(id) for id in range(count)), *(0.0 for _ in added)])
    writer.add_token_types([*kinds, *(TokenType.USER_DEFINED for _ in added)])


def _quantise(source: Path, target: Path, quant: str, tensors: int) -> None:
    """llama.cpp's quantiser, which logs a line with a bracket first for each tensor."""
    import ctypes

    import llama_cpp
    from llama_cpp._logger import llama_log_callback as usual

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quant.upper()}")
    with Progress("quantise", tensors, "tensor") as bar:
        @llama_cpp.llama_log_callback
        def show(level: int, text: bytes, _: Any) -> None:
            bar.update(text.startswith(b"["))

        llama_cpp.llama_log_set(show, ctypes.c_void_p(0))
        try:
            failed = llama_cpp.llama_model_quantize(bytes(source), bytes(target), ctypes.byref(settings))
        finally:
            llama_cpp.llama_log_set(usual, ctypes.c_void_p(0))
    if failed:
        raise CheckpointError(f"{source.parent}: llama.cpp could not quantise the weights to {quant}.")
