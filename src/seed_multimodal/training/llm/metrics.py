"""Metrics of a language model's run: log lines, FLOP per token, final summary.

Losses of a line are means over the steps since the previous line, rates use those steps' seconds. `tokens` are useful
(non-padding) positions, `positions` all positions including padding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from seed_multimodal.data.stream.mixture import merge_counts
from seed_multimodal.training.llm.loss import find_llama
from seed_multimodal.training.metrics import Meter

# Numbers summed over micro-steps and processes.
_SUMS = (
    "loss",
    "text_sum",
    "text_count",
    "image_sum",
    "image_count",
    "tokens",
    "positions",
    "squares",
)
FROZEN, TRAINED = 4, 6  # FLOP per token and matrix element, forward and backward


class TokenMeter(Meter):
    """Sums since the last log line; saved in checkpoints, so that a resumed run writes the same lines.

    Attention is within sequences, so its FLOP are proportional to the sum of squared lengths.
    """

    def __init__(self) -> None:
        super().__init__(samples=0)
        self.flops: tuple[float, float, float] = (
            0.0,
            0.0,
            0.0,
        )  # `token_flops` of sequences of length 1
        self.peak: float | None = None  # of one device, in TFLOP/s
        self.divisor = 1.0  # of the loss summed over processes; set before each step
        self.total = {"tokens": 0.0, "positions": 0.0}  # over the run
        self.timed = dict.fromkeys(_SUMS, 0.0)  # since the last line, in this process
        self.last: dict[str, float] = {}

    def combine(
        self, found: Sequence[Mapping[str, Any]], norm: Tensor | None, rate: float
    ) -> dict[str, float]:
        """Sums over the micro-steps, with this step's `divisor`."""
        sums = {key: sum((one[key] for one in found[1:]), found[0][key]) for key in _SUMS}
        return super().combine([{**sums, "divisor": self.divisor}], norm, rate)

    def shared(self, numbers: Mapping[str, float]) -> list[float]:
        """All sums."""
        return [numbers[key] for key in _SUMS]

    def add(self, numbers: Mapping[str, float], sums: Sequence[float]) -> None:
        """Add a step."""
        step = dict(zip(_SUMS, sums, strict=True))
        step["loss"] /= max(numbers["divisor"], 1e-8)
        self.last |= {"learning_rate": numbers["lr"], "grad_norm": numbers.get("grad", math.nan)}
        for key, value in {**step, "steps": 1.0}.items():
            self.smooth[key] = self.smooth.get(key, 0.0) + value
        for sums_of in (self.total, self.timed):
            for key in sums_of:
                sums_of[key] += step[key]

    def line_metrics(self) -> dict[str, float]:
        """Empty: all are summed over processes already."""
        return {}

    def rates(self, step: int, steps: int, seconds: float, world: int) -> dict[str, float]:
        """The line for the steps since the last one."""
        sums, timed, (body, head, attention) = self.smooth, self.timed, self.flops
        self.last["loss"] = sums["loss"] / sums["steps"]
        line = dict(self.last)
        for kind in ("text", "image"):
            if sums[f"{kind}_count"] and sums["image_count"]:
                line[f"{kind}_loss"] = sums[f"{kind}_sum"] / sums[f"{kind}_count"]
        work = (
            timed["tokens"] * body
            + timed["squares"] * attention
            + (timed["text_count"] + timed["image_count"]) * head
        )
        tflops = work / seconds / world / 1e12  # of one process
        line |= {
            "tokens_per_s": timed["positions"] / seconds,
            "useful_tokens_per_s": timed["tokens"] / seconds,
            "tflops": tflops,
            "fill": sums["tokens"] / max(1.0, sums["positions"]),
            "tokens": self.total["tokens"],
        }
        self.smooth.clear()
        self.timed = dict.fromkeys(_SUMS, 0.0)
        return {**line, "mfu": tflops / self.peak} if self.peak else line

    def text(self, line: Mapping[str, float]) -> tuple[str, str]:
        """A line as text."""
        shown = [
            f"{key} {line[key]:.4g}" for key in ("loss", "text_loss", "image_loss") if key in line
        ]
        shown += [f"lr {line['learning_rate']:.3g}", f"grad {line['grad_norm']:.3g}"]
        return " ".join(shown), (
            f"{line['useful_tokens_per_s']:,.0f} useful of {line['tokens_per_s']:,.0f} tokens/s, "
            f"fill {100 * line['fill']:.1f} %"
        )

    def state_dict(self) -> dict[str, Any]:
        """Sums since the last log line and of the run, and the last loss."""
        return {**super().state_dict(), "total": dict(self.total), "last": self.last}

    def process_state(self) -> dict[str, Any]:
        """Empty: sums are global."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.total.update(state.get("total", {}))
        self.last.update(state.get("last", {}))


def token_flops(model: nn.Module, length: float) -> tuple[int, int, float]:
    """Training FLOP per token (multiply-add: 2) in the layers' matrices, in the head (learned tokens), and in causal
    attention over a sequence of `length`; recomputation does not count."""
    llama = find_llama(model)
    config = llama.config
    body = sum(
        (TRAINED if parameter.requires_grad else FROZEN) * _numbers(parameter)
        for name, parameter in llama.model.layers.named_parameters()
        if "original_module." not in name
    )
    trained_head = any(parameter.requires_grad for parameter in llama.lm_head.parameters())
    width = config.num_attention_heads * llama.model.layers[0].self_attn.head_dim
    return (
        body,
        (TRAINED if trained_head else FROZEN) * config.vocab_size * config.hidden_size,
        3.0 * config.num_hidden_layers * 2 * length * width,
    )


def _numbers(parameter: nn.Parameter) -> int:
    """Number of elements of a matrix, 0 for vectors; bitsandbytes packs two 4-bit values into a byte."""
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None) or parameter.shape
    return shape[0] * shape[1] if len(shape) == 2 else 0


def join_reports(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge the data reports of all processes (`LlmBatches.report`): sums of counts, first listed records."""
    tokens, positions = (sum(report[key] for report in reports) for key in ("tokens", "positions"))
    sources: dict[str, dict[str, Any]] = {}
    for report in reports:
        for name, source in report["sources"].items():
            merge_counts(
                sources.setdefault(
                    name, {"sequences": 0, "tokens": 0, "epochs": 0.0, "skipped": {}}
                ),
                source,
            )
    return {
        "tokens": tokens,
        "positions": positions,
        "sources": sources,
        "fill": tokens / max(1, positions),
    }


def summary_lines(record: Mapping[str, Any]) -> list[str]:
    """The final summary: steps, tokens, sources, skipped records, output folder."""
    lines = [
        f"{record['steps']} steps in {record['seconds']:.0f} s, {record['tokens']:,.0f} tokens in "
        f"{record['data']['fill'] * 100:.1f} % filled rows; the last loss was {record['loss'] or math.nan:.4g}."
    ]
    for name, source in record["data"]["sources"].items():
        lines.append(
            f"  {name}: {source['sequences']:,} sequences, {source['tokens']:,} tokens, "
            f"{source['epochs']:.2f} epochs"
        )
        lines += [
            f"    {entry['count']:,} skipped or truncated ({reason}): {'; '.join(entry['first'])}"
            for reason, entry in source["skipped"].items()
        ]
        if not source["sequences"]:
            lines.append("    warning: no sequence of it was used")
    return [*lines, f"  checkpoint: {record['checkpoint']}"]
