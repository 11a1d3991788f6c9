"""FLOP per token of a language model's training, and the final summary of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from seed_multimodal.data.stream.stream import merge_counts
from seed_multimodal.disk import JsonObject
from seed_multimodal.language.llm import head_dim
from seed_multimodal.training.llm.loss import find_llama
from seed_multimodal.training.meters import TokenFlops

# FLOP per token and matrix element, forward and backward (multiply-add: 2).
FROZEN_FLOP = 4
TRAINED_FLOP = 6


def token_flops(model: nn.Module, length: float) -> TokenFlops:
    """Training FLOP per token of sequences of `length`; recomputation does not count."""
    llama = find_llama(model)
    config = llama.config

    # Matrices of the layers; PEFT keeps an unused original of each copied module.
    body = 0
    for name, parameter in llama.model.layers.named_parameters():
        if "original_module." not in name:
            flop = TRAINED_FLOP if parameter.requires_grad else FROZEN_FLOP
            body += flop * _matrix_size(parameter)

    is_head_trained = any(
        parameter.requires_grad for parameter in llama.get_output_embeddings().parameters()
    )
    head_flop = TRAINED_FLOP if is_head_trained else FROZEN_FLOP
    n_heads = config.num_attention_heads
    width = n_heads * head_dim(config)
    return TokenFlops(
        body=body,
        head=head_flop * config.vocab_size * config.hidden_size,
        # Scores and values: two products with half of the keys (causal), times 3 for forward and
        # backward.
        attention=3.0 * config.num_hidden_layers * 2 * length * width,
    )


def _matrix_size(parameter: nn.Parameter) -> int:
    """Number of elements of a matrix, 0 for vectors; bitsandbytes packs two 4-bit values into a
    byte."""
    quant_state = getattr(parameter, "quant_state", None)
    shape = getattr(quant_state, "shape", None) or parameter.shape
    return shape[0] * shape[1] if len(shape) == 2 else 0


def join_reports(reports: Sequence[JsonObject]) -> JsonObject:
    """Merge the data reports of all processes (`LlmBatches.report`): sums of counts, first listed
    records."""
    tokens = 0
    positions = 0
    sources: dict[str, JsonObject] = {}
    for report in reports:
        tokens += report["tokens"]
        positions += report["positions"]
        for name, source in report["sources"].items():
            empty = {"sequences": 0, "tokens": 0, "epochs": 0.0, "skipped": {}}
            merge_counts(sources.setdefault(name, empty), source)
    return {
        "tokens": tokens,
        "positions": positions,
        "sources": sources,
        "fill": tokens / max(1, positions),
    }


def summary_lines(record: JsonObject) -> list[str]:
    """The final summary: steps, tokens, sources, skipped records, output folder."""
    # The run.
    fill = 100 * record["data"]["fill"]
    loss = record["loss"] or math.nan
    lines = [
        f"{record['steps']} steps in {record['seconds']:.0f} s, {record['tokens']:,.0f} tokens in "
        f"{fill:.1f} % filled rows; the last loss was {loss:.4g}."
    ]

    # Its sources, with the records that were not used.
    for name, source in record["data"]["sources"].items():
        lines.append(
            f"  {name}: {source['sequences']:,} sequences, {source['tokens']:,} tokens, "
            f"{source['epochs']:.2f} epochs"
        )
        for reason, entry in source["skipped"].items():
            first = "; ".join(entry["first"])
            lines.append(f"    {entry['count']:,} skipped or truncated ({reason}): {first}")
        if not source["sequences"]:
            lines.append("    warning: no sequence of it was used")
    return [*lines, f"  checkpoint: {record['checkpoint']}"]
