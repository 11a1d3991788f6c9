"""Metrics of a language model's run: log lines, FLOP per token, final summary.

Losses of a line are means over the steps since the previous line, rates use those steps' seconds.
`tokens` are useful (non-padding) positions, `positions` all positions including padding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from seed_multimodal.data.stream.mixture import merge_counts
from seed_multimodal.disk import JsonObject
from seed_multimodal.language.llm import head_dim
from seed_multimodal.training.llm.loss import find_llama
from seed_multimodal.training.metrics import Meter, Metrics, sum_of

# Metrics summed over micro-steps and processes.
SUMMED = (
    "loss",
    "text_sum",
    "text_count",
    "image_sum",
    "image_count",
    "tokens",
    "positions",
    "squares",
)
# FLOP per token and matrix element, forward and backward (multiply-add: 2).
FROZEN_FLOP = 4
TRAINED_FLOP = 6


class TokenFlops(NamedTuple):
    """Training FLOP per token; `attention` is for each position of the token's sequence."""

    body: float
    head: float  # of learned tokens only
    attention: float


class TokenMeter(Meter):
    """Sums since the last log line; saved in checkpoints, so that a resumed run writes the same
    lines.

    Attention is within sequences, so its FLOP are proportional to the sum of squared lengths.

    Attributes:
        flops: `token_flops` of sequences of length 1.
        peak: of one device, in TFLOP/s.
        divisor: of the loss summed over processes; set before each step.
        total: sums over the run.
        timed: sums since the last line, without those of a resumed run's checkpoint.
        last: loss, learning rate and gradient norm of the last line or step.
    """

    def __init__(self) -> None:
        super().__init__(samples=0)
        self.flops = TokenFlops(0.0, 0.0, 0.0)
        self.peak: float | None = None
        self.divisor = 1.0
        self.total = {"tokens": 0.0, "positions": 0.0}
        self.timed = dict.fromkeys(SUMMED, 0.0)
        self.last: dict[str, float] = {}

    def combine(
        self, micro_metrics: Sequence[Metrics], grad_norm: Tensor | None, lr: float
    ) -> dict[str, float]:
        """Sums over the micro-steps, with this step's `divisor`."""
        sums = {key: sum_of(micro_metrics, key) for key in SUMMED}
        return super().combine([{**sums, "divisor": self.divisor}], grad_norm, lr)

    def shared(self, metrics: Mapping[str, float]) -> list[float]:
        """All sums."""
        return [metrics[key] for key in SUMMED]

    def add(self, metrics: Mapping[str, float], sums: Sequence[float]) -> None:
        """Add a step."""
        step = dict(zip(SUMMED, sums, strict=True))
        step["loss"] /= max(metrics["divisor"], 1e-8)
        self.last["learning_rate"] = metrics["lr"]
        self.last["grad_norm"] = metrics.get("grad", math.nan)
        # Sums since the last line, of the run, and since the last line in this process.
        for key, value in {**step, "steps": 1.0}.items():
            self.smooth[key] = self.smooth.get(key, 0.0) + value
        for key in self.total:
            self.total[key] += step[key]
        for key in self.timed:
            self.timed[key] += step[key]

    def line_metrics(self) -> dict[str, float]:
        """Empty: all are summed over processes already."""
        return {}

    def rates(self, step: int, steps: int, seconds: float, world: int) -> dict[str, float]:
        """The line for the steps since the last one."""
        # 1. Mean losses; by token type only if there are image tokens.
        sums = self.smooth
        self.last["loss"] = sums["loss"] / sums["steps"]
        line = dict(self.last)
        for kind in ("text", "image"):
            if sums[f"{kind}_count"] and sums["image_count"]:
                line[f"{kind}_loss"] = sums[f"{kind}_sum"] / sums[f"{kind}_count"]

        # 2. Speed of all processes; TFLOP/s of one.
        timed = self.timed
        learned = timed["text_count"] + timed["image_count"]
        work = (
            timed["tokens"] * self.flops.body
            + timed["squares"] * self.flops.attention
            + learned * self.flops.head
        )
        tflops = work / seconds / world / 1e12
        line["tokens_per_s"] = timed["positions"] / seconds
        line["useful_tokens_per_s"] = timed["tokens"] / seconds
        line["tflops"] = tflops
        line["fill"] = sums["tokens"] / max(1.0, sums["positions"])
        line["tokens"] = self.total["tokens"]
        if self.peak:
            line["mfu"] = tflops / self.peak

        # 3. The next line starts from zero.
        self.smooth.clear()
        self.timed = dict.fromkeys(SUMMED, 0.0)
        return line

    def text(self, line: Mapping[str, float]) -> tuple[str, str]:
        """A line as text."""
        losses = [key for key in ("loss", "text_loss", "image_loss") if key in line]
        metrics = [f"{key} {line[key]:.4g}" for key in losses]
        metrics += [f"lr {line['learning_rate']:.3g}", f"grad {line['grad_norm']:.3g}"]
        speed = (
            f"{line['useful_tokens_per_s']:,.0f} useful of {line['tokens_per_s']:,.0f} tokens/s, "
            f"fill {100 * line['fill']:.1f} %"
        )
        return " ".join(metrics), speed

    def state_dict(self) -> JsonObject:
        """Sums since the last log line and of the run, and the last loss."""
        return {**super().state_dict(), "total": dict(self.total), "last": self.last}

    def process_state(self) -> JsonObject:
        """Empty: sums are global."""
        return {}

    def load_state_dict(self, state: JsonObject) -> None:
        super().load_state_dict(state)
        self.total.update(state.get("total", {}))
        self.last.update(state.get("last", {}))


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
