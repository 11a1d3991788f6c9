"""`seed export-gguf`: a language model's folder → a file for llama.cpp of 16, 8 or about 4.5 bits a
weight."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from seed_multimodal.config import read_table
from seed_multimodal.disk import atomic_path, read_json_object, writing
from seed_multimodal.entry import log_line
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.inference.backends.torch import AttentionMasks
from seed_multimodal.language.hub_tokenizer import HubTokenizer, load_text_tokenizer
from seed_multimodal.language.llm import (
    EMBEDDING,
    HEAD,
    ROTARY,
    check_vocab_size,
    head_dim,
    llm_config,
    warn_untied,
)
from seed_multimodal.language.text_tokenizer import HUB_TOKENIZER, TextTokenizer
from seed_multimodal.language.tokenizer import TokenizerFiles, read_files
from seed_multimodal.progress import Progress
from seed_multimodal.state_dicts import load_checkpoint, refuse_tensors

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from transformers import PreTrainedConfig

_loggers: list[object] = []  # keeps the callback alive for llama.cpp


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp calls a `model_type`.

    name: of `gguf.MODEL_ARCH`. pairs: its rotary positions turn pairs of values, not halves of a
    head. pre_tokenizer: how a byte-level BPE splits texts.
    """

    name: str
    pairs: bool
    pre_tokenizer: str


ARCHITECTURES = {name: Architecture(**row) for name, row in read_table(__file__).items()}
NO_POSITIONS_EVERY = 4  # layers of a SmolLM 3 in llama.cpp
# Kinds of tokens in llama.cpp.
NORMAL = 1
UNKNOWN = 2
CONTROL = 3
USER_DEFINED = 4
UNUSED = 5
BYTE = 6
K_QUANT_BLOCK = 256  # weights that are quantised together: rows must be multiples of it


def llama_cpp_config(folder: str | Path) -> PreTrainedConfig:
    """The configuration of a model that llama.cpp computes.

    Raises CheckpointError, ConfigError: of another kind.
    """
    config = llm_config(folder)
    if config.model_type not in ARCHITECTURES:
        raise ConfigError(
            f"{folder}: model_type is {config.model_type!r}; llama.cpp files are written and read "
            f"of {', '.join(ARCHITECTURES)}."
        )
    # Nothing that llama.cpp would compute in another way.
    has_biases = getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)
    if config.rope_parameters["rope_type"] not in ("default", "llama3") or has_biases:
        raise ConfigError(
            f"{folder}: only models without biases, and with plain or Llama 3's rotary positions, "
            "can be exported."
        )
    window = AttentionMasks(config).window
    if window is not None and window < config.max_position_embeddings:
        raise ConfigError(f"{folder}: models with sliding windows cannot be exported.")
    rotary_layers = list(getattr(config, "no_rope_layers", None) or ())
    expected = [int((layer + 1) % NO_POSITIONS_EVERY != 0) for layer in range(len(rotary_layers))]
    if rotary_layers != expected:
        raise ConfigError(
            f"{folder}: llama.cpp leaves positions out in every fourth layer, but no_rope_layers "
            f"is {rotary_layers}."
        )
    return config


def export_gguf(folder: str | Path, tokenizer_dir: str | Path, out: str | Path, quant: str) -> Path:
    """Export the language model in `folder` to the file `out`, for llama.cpp.

    tokenizer_dir: the folder of the vocabulary. quant: "f16", "q8_0" or "q4_k_m".
    Raises CheckpointError: missing or damaged weights, or not matching config.json.
    """
    out = Path(out)
    tokenizer = load_text_tokenizer(tokenizer_dir)
    config = llama_cpp_config(folder)
    check_vocab_size(config.vocab_size, tokenizer.vocabulary, str(folder))

    # 1. What llama.cpp cannot compute in so few bits.
    if quant == "q4_k_m":
        widths = (config.hidden_size, config.intermediate_size)
        if any(width % K_QUANT_BLOCK for width in widths):
            log_line(
                f"{folder}: its widths are no multiples of 256: llama.cpp stores some tensors in "
                "more than 4 bits."
            )

    # 2. A file of 16 bits, which is then quantised.
    if isinstance(tokenizer, HubTokenizer):
        vocabulary = _hub_vocabulary(Path(tokenizer_dir), tokenizer, config.model_type)
    else:
        vocabulary = _original_vocabulary(read_files(Path(tokenizer_dir)))
    with writing(out, ConfigError):
        out.parent.mkdir(parents=True, exist_ok=True)
    with writing(out, ConfigError), atomic_path(out) as half:
        n_tensors = _write(half, folder, tokenizer, vocabulary, config)
        if quant != "f16":
            with atomic_path(half) as quantised:
                _quantise(half, quantised, quant, n_tensors)
    return out


def interleaved(weight: Tensor, n_heads: int) -> Tensor:
    """Rows of a query or key projection: halves of each head (transformers) → pairs (llama.cpp)."""
    halves = weight.unflatten(0, (n_heads, 2, -1))  # [heads, 2, head_dim / 2, in]
    return halves.transpose(1, 2).flatten(0, 2)


def _tensor_names(config: PreTrainedConfig, tied: tuple[str, ...]) -> dict[str, str]:
    """transformers' name → llama.cpp's, of all tensors of the model."""
    import gguf
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.get_default_dtype())
    architecture = gguf.MODEL_ARCH[ARCHITECTURES[config.model_type].name]
    table = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    return {
        name: str(table.get_name(name, try_suffixes=(".weight",)))
        for name in model.state_dict()
        if name not in tied
    }


def _write(
    file: Path,
    folder: str | Path,
    tokenizer: TextTokenizer,
    vocabulary: Vocabulary,
    config: PreTrainedConfig,
) -> int:
    """Write the file with 16 bits per weight, 32 for norms; one tensor in memory at a time.

    Returns the number of tensors.
    """
    import gguf

    # 1. Every tensor of the checkpoint has a name here.
    architecture = ARCHITECTURES[config.model_type]
    state = load_checkpoint(folder)
    tied = (HEAD,) if config.tie_word_embeddings else ()
    if tied and HEAD in state and not torch.equal(state[HEAD], state[EMBEDDING]):
        warn_untied(folder)
        tied = ()
    names = _tensor_names(config, tied)
    missing = [name for name in names if name not in state]
    refuse_tensors(missing, (), folder, "missing from the file")
    unknown = [name for name in state if name not in names]
    refuse_tensors(unknown, (ROTARY, *tied), folder, "unknown to the model")
    if config.rope_parameters["rope_type"] != "default":
        state["rope_freqs"] = _frequency_factors(config)
        names["rope_freqs"] = "rope_freqs.weight"

    # 2. The header: settings, then names, shapes and types.
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[architecture.name]])
    _add_settings(writer, config)
    _add_vocabulary(writer, vocabulary, tokenizer, config.vocab_size)
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
            if layer_name in n_heads and architecture.pairs:
                weight = interleaved(weight, n_heads[layer_name])
            dtype = torch.float32 if weight.ndim == 1 else torch.float16
            writer.write_tensor_data(weight.to(dtype).numpy())
            bar.update()
    writer.close()
    return len(names)


def _frequency_factors(config: PreTrainedConfig) -> Tensor:
    """By how much Llama 3's rotary frequencies are slower than plain ones `[head_dim / 2]`."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, "cpu")
    exponents = torch.arange(len(scaled), dtype=torch.float32, device="cpu") / len(scaled)
    plain = config.rope_parameters["rope_theta"] ** -exponents
    return plain / scaled


def _add_settings(writer: Any, config: PreTrainedConfig) -> None:
    """Sizes and positions."""
    width = head_dim(config)
    rotary_share = config.rope_parameters.get("partial_rotary_factor", 1.0)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(int(width * rotary_share))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_scaling_orig_ctx_len(config.max_position_embeddings)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(1)


# --------------------------------------------------------------------------------------- vocabulary


@dataclass
class Vocabulary:
    """Text tokens in llama.cpp's form.

    model: "llama" (SentencePiece) or "gpt2" (byte-level BPE, with `pre_tokenizer` and `merges`).
    """

    model: str
    tokens: list[str]
    scores: list[float]
    kinds: list[int]
    pre_tokenizer: str = ""
    merges: list[str] = field(default_factory=list)


def _original_vocabulary(files: TokenizerFiles) -> Vocabulary:
    """Of a SentencePiece model."""
    pieces = files.processor
    ids = range(pieces.GetPieceSize())
    return Vocabulary(
        "llama",
        [pieces.IdToPiece(id) for id in ids],
        [pieces.GetScore(id) for id in ids],
        [_token_kind(pieces, id) for id in ids],
    )


def _token_kind(pieces: SentencePieceProcessor, id: int) -> int:
    if pieces.IsUnknown(id):
        return UNKNOWN
    if pieces.IsControl(id):
        return CONTROL
    if pieces.IsByte(id):
        return BYTE
    return NORMAL


def _hub_vocabulary(folder: Path, tokenizer: HubTokenizer, model_type: str) -> Vocabulary:
    """Of a byte-level BPE, or of one with tokens for bytes. Raises ConfigError: another kind."""
    # 1. The tokens of the file.
    content: Mapping[str, Any] = read_json_object(folder / HUB_TOKENIZER)
    model = content["model"]
    if model["type"] != "BPE":
        raise ConfigError(
            f"{folder / HUB_TOKENIZER}: is a {model['type']} tokenizer; llama.cpp files are "
            "written with BPE tokenizers only."
        )
    n_text = tokenizer.vocabulary.n_text
    tokens = [_unused(id) for id in range(n_text)]
    kinds = [UNUSED] * n_text
    has_bytes = bool(model.get("byte_fallback"))
    for token, id in model["vocab"].items():
        tokens[id] = token
        is_byte = has_bytes and len(token) == len("<0x00>") and token.startswith("<0x")
        kinds[id] = BYTE if is_byte else NORMAL
    for added in content.get("added_tokens", ()):
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED

    # 2. In the order of the ids, in which BPE models merge.
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    scores = [-float(id) for id in range(n_text)]
    if has_bytes:
        return Vocabulary("llama", tokens, scores, kinds)
    pre_tokenizer = ARCHITECTURES[model_type].pre_tokenizer
    return Vocabulary("gpt2", tokens, scores, kinds, pre_tokenizer, merges)


def _unused(id: int) -> str:
    return f"[PAD{id}]"


def _add_vocabulary(
    writer: Any, vocabulary: Vocabulary, tokenizer: TextTokenizer, n_rows: int
) -> None:
    """Text tokens, image tokens, and names for rows of padding."""
    sizes = tokenizer.vocabulary
    image_tokens = tokenizer.tokens(range(sizes.n_text, sizes.size))
    padding = [_unused(id) for id in range(sizes.size, n_rows)]
    n_added = len(image_tokens) + len(padding)
    kinds = [USER_DEFINED] * len(image_tokens) + [UNUSED] * len(padding)
    writer.add_tokenizer_model(vocabulary.model)
    if vocabulary.pre_tokenizer:
        writer.add_tokenizer_pre(vocabulary.pre_tokenizer)
    writer.add_token_list([*vocabulary.tokens, *image_tokens, *padding])
    writer.add_token_scores([*vocabulary.scores, *[0.0] * n_added])
    writer.add_token_types([*vocabulary.kinds, *kinds])
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(bool(tokenizer.start_ids))


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
