"""`seed check-llm`: whether a completion server (vLLM, SGLang) can read a language model.

Such a server has transformers, but not this package: it reads `config.json`, the weights and the
tokenizer's files as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from seed_multimodal.disk import JsonObject, read_json_object
from seed_multimodal.errors import CheckpointError, first_line
from seed_multimodal.language.hub_tokenizer import load_text_tokenizer
from seed_multimodal.language.llm import ROTARY, check_vocab_size, llm_config
from seed_multimodal.progress import quiet_loading
from seed_multimodal.state_dicts import load_checkpoint, refuse_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from seed_multimodal.language.text_tokenizer import TextTokenizer

HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Finding:
    """One thing that a server reads.

    problem: why it cannot, or "". note: what to know otherwise.
    """

    what: str
    problem: str = ""
    note: str = ""


def check_llm(llm: Path, tokenizer_folder: Path, served_tokenizer: Path) -> list[Finding]:
    """What a completion server reads of a language model's folder and a tokenizer's.

    tokenizer_folder: this package's. served_tokenizer: the server's, often the same.

    Raises CheckpointError: config.json or the tokenizer is missing, or cannot be read.
    """
    tokenizer = load_text_tokenizer(tokenizer_folder)
    config = llm_config(llm, tokenizer.special_ids)
    return [
        _check_config(llm, config),
        _check_vocabulary(llm, config, tokenizer),
        *_check_weights(llm, config),
        _check_tokenizer(served_tokenizer, tokenizer),
        _check_special_ids(llm, tokenizer),
    ]


def serve_command(llm: Path, tokenizer_folder: Path) -> str:
    """The command that starts vLLM with these folders."""
    return f"vllm serve {llm} --tokenizer {tokenizer_folder} --generation-config vllm"


def _check_config(llm: Path, config: PreTrainedConfig) -> Finding:
    """The class of the model, by which a server finds its own."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if not config.architectures:
        return Finding("config", problem=f"{llm / 'config.json'} names no class in architectures")
    if config.architectures[0] not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return Finding(
            "config",
            problem=f"{llm / 'config.json'}: {config.architectures[0]} is no language model of "
            "transformers",
        )
    quantization = getattr(config, "quantization_config", None)
    note = f"{config.architectures[0]}, context {config.max_position_embeddings}"
    if quantization is not None:
        note += f"; quantized by {quantization.get('quant_method')}, which the server must know"
    return Finding("config", note=note)


def _check_vocabulary(llm: Path, config: PreTrainedConfig, tokenizer: TextTokenizer) -> Finding:
    """A row of the embedding for each token."""
    vocabulary = tokenizer.vocabulary
    try:
        check_vocab_size(config.vocab_size, vocabulary, str(llm))
    except CheckpointError as error:
        return Finding("vocabulary", problem=first_line(error))
    codes = f"codes {vocabulary.code_start} … {vocabulary.code_start + vocabulary.n_codes - 1}"
    return Finding(
        "vocabulary", note=f"{config.vocab_size} rows, {vocabulary.size} tokens, {codes}"
    )


def _check_weights(llm: Path, config: PreTrainedConfig) -> list[Finding]:
    """All tensors in their sizes, and whether the head is the embedding."""
    from transformers import AutoModelForCausalLM

    if getattr(config, "quantization_config", None) is not None:
        return [Finding("weights", note="quantized, so their sizes are not compared")]

    # 1. Names and sizes.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = {name: weight.shape for name, weight in model.state_dict().items()}
    table = model.get_input_embeddings()
    embedding = next(name for name, module in model.named_modules() if module is table) + ".weight"
    is_tied = config.tie_word_embeddings
    try:
        state = load_checkpoint(llm)
        missing = [name for name in expected if name not in state]
        refuse_tensors(missing, (HEAD,) if is_tied else (), llm, "missing from the file")
        unknown = [name for name in state if name not in expected]
        refuse_tensors(unknown, (ROTARY,), llm, "unknown to the model of config.json")
        resized = [
            name for name in state if expected.get(name, state[name].shape) != state[name].shape
        ]
        refuse_tensors(resized, (), llm, "of another size")
    except CheckpointError as error:
        return [Finding("weights", problem=first_line(error))]
    dtypes = sorted({str(weight.dtype).removeprefix("torch.") for weight in state.values()})
    weights = Finding("weights", note=f"{len(state)} tensors, {', '.join(dtypes)}")

    # 2. A tied head is not read, so one in the file must not differ.
    if not is_tied:
        return [weights, Finding("head", note="a tensor of its own")]
    if HEAD in state and not torch.equal(state[HEAD], state[embedding]):
        problem = (
            f"{HEAD} differs from the embedding, but config.json has tie_word_embeddings: true, "
            "so a server would not read it"
        )
        return [weights, Finding("head", problem=problem)]
    return [weights, Finding("head", note="tied to the embedding")]


def _check_tokenizer(folder: Path, tokenizer: TextTokenizer) -> Finding:
    """Whether transformers alone reads the tokenizer, with the names of all image tokens.

    vLLM refuses `allowed_token_ids` beyond its tokenizer's length.
    """
    plain = _plain_tokenizer(folder)
    token = _first_unknown_token(plain, tokenizer)
    if token is not None:
        problem = f"transformers finds no {token} in {folder}; --tokenizer-out DIR writes it"
        return Finding("tokenizer", problem=problem)
    return Finding("tokenizer", note=f"{type(plain).__name__}, {len(plain)} tokens")


def write_server_tokenizer(folder: Path, out: Path) -> None:
    """Write the tokenizer of `folder` to `out`, with image tokens that transformers reads.

    Raises CheckpointError: they would get other ids.
    """
    tokenizer = load_text_tokenizer(folder)
    plain = _plain_tokenizer(folder)
    vocabulary = tokenizer.vocabulary
    if _first_unknown_token(plain, tokenizer) is not None:
        plain.add_tokens(tokenizer.tokens(range(vocabulary.n_text, vocabulary.size)))
    if _first_unknown_token(plain, tokenizer) is not None:
        raise CheckpointError(
            f"{folder}: has unused ids before {vocabulary.n_text}, so image tokens that "
            "transformers adds would get other ids."
        )
    plain.save_pretrained(out)


def _plain_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer as transformers alone reads it. Raises CheckpointError."""
    from transformers import AutoTokenizer

    try:
        with quiet_loading("transformers"):
            plain: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                str(folder), trust_remote_code=False
            )
    except (ImportError, OSError, TypeError, ValueError) as error:
        reason = first_line(error)
        raise CheckpointError(f"{folder}: transformers cannot read it ({reason}).") from error
    return plain


def _first_unknown_token(plain: PreTrainedTokenizerBase, tokenizer: TextTokenizer) -> str | None:
    """The first image token that transformers has not at its id."""
    vocabulary = tokenizer.vocabulary
    ids = list(range(vocabulary.n_text, vocabulary.size))
    names = plain.convert_ids_to_tokens(ids)
    for name, expected in zip(names, tokenizer.tokens(ids), strict=True):
        if name != expected:
            return expected
    return None


def _check_special_ids(llm: Path, tokenizer: TextTokenizer) -> Finding:
    """Ends of an answer: those in the files are replaced, since requests name theirs."""
    wrong: list[str] = []
    for name in ("config.json", "generation_config.json"):
        file = llm / name
        values: JsonObject = read_json_object(file) if file.is_file() else {}
        eos = values.get("eos_token_id")
        ends = eos if isinstance(eos, list) else [eos]
        if eos is not None and not set(tokenizer.eos_token_ids) & set(ends):
            wrong.append(f"{name} has {eos}")
    if not wrong:
        return Finding("end ids", note=f"{list(tokenizer.eos_token_ids)}")
    return Finding(
        "end ids",
        note=f"{' and '.join(wrong)}, the tokenizer {list(tokenizer.eos_token_ids)}: "
        "--generation-config vllm ignores the files', and each request sends the tokenizer's",
    )
