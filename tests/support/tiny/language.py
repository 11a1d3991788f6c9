"""Language models with random weights, and a BPE tokenizer of transformers' fast kind."""

from collections.abc import Iterable
from pathlib import Path

import torch
from chat_templates import TemplateCase
from yaml_tables import read_tables

from seed_multimodal.cli.tiny_parts import CHATML, CHATML_TOKENS, write_bpe_tokenizer

LLM_WIDTH = 32
CHATML_CASE = TemplateCase(CHATML, CHATML_TOKENS, eos="<|im_end|>", pad="<|endoftext|>")
TABLES = read_tables(__file__)
ARCHITECTURES = TABLES["architectures"]


def random_llm(architecture: str, vocab_size, seed=0, **fields):
    """A model of `ARCHITECTURES`; torch's own generator stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _llm(architecture, vocab_size, {**ARCHITECTURES.get(architecture, {}), **fields})


def llama(vocab_size, mlp_width=64, context: int = 512):
    """The one layer of the tiny systems, drawn from torch's own generator."""
    sizes = {"intermediate_size": mlp_width, "max_position_embeddings": context}
    return _llm("llama", vocab_size, {**sizes, "num_hidden_layers": 1, "num_attention_heads": 2})


def _llm(architecture: str, vocab_size, fields):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        architecture.split()[0], vocab_size=vocab_size, **{**TABLES["sizes"], **fields}
    )
    return AutoModelForCausalLM.from_config(config).eval()


def write_hub_tokenizer(folder, texts: Iterable[str], case: TemplateCase = CHATML_CASE) -> Path:
    """Train a small BPE tokenizer and write its files, with ChatML as its chat template."""
    write_bpe_tokenizer(
        folder,
        texts,
        case.text,
        case.special,
        eos=case.eos,
        pad=case.pad,
        bos=case.bos,
        added=case.added,
        vocab_size=300,
    )
    return folder
