"""The numbers of a language model's log lines: losses by kind of token, tokens per second, utilisation.

Losses of a line are means over the steps since the line before; rates count those steps' seconds. `tokens` are
positions that hold a token (useful), `positions` all that the model computed, padding included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from seed_multimodal.training.metrics import Meter, StepNumbers

# Numbers of a step that are summed over micro-steps and processes.
_SUMS = ("loss", "text_sum", "text_count", "image_sum", "image_count", "tokens", "positions", "squares")
_LINE = ("text_sum", "text_count", "image_sum", "image_count", "tokens", "positions")
_LEAST = 1e-8  # of a step with nothing to learn


class TokenMeter(Meter):
    """Sums since the last log line; part of a checkpoint, so that a resumed run writes the same lines.

    Attributes:
        flops: of one token: in the layers, in the head (learned tokens only), and in attention per token of its
            sequence; see `flops.token_flops`. Padding is no work, and a token attends within its own sequence, so
            attention goes by the sum of the squares of the sequences' lengths.
        peak: of one device, in TFLOP/s, if it is known.
        divisor: what the loss summed over all processes is divided by; set before each step.
        total: over the run. history: the last thousand lines.
    """

    own_evaluation_line = True

    def __init__(self) -> None:
        super().__init__(samples=0)
        self.flops: tuple[float, float, float] = (0.0, 0.0, 0.0)
        self.peak: float | None = None
        self.divisor = 1.0
        self.total = {"tokens": 0.0, "positions": 0.0}
        self.timed = dict.fromkeys(("tokens", "positions", "squares", "learned"), 0.0)  # since the line before
        self.history: list[dict[str, float]] = []
        self.last: dict[str, float] = {}

    def combine(self, found: Sequence[Mapping[str, Any]], norm: Tensor | None, rate: float) -> StepNumbers:
        """Sums over the micro-steps; `divisor` as it is for this step."""
        keys = [key for key in _SUMS if isinstance(found[0][key], Tensor)]
        known = {"lr": rate, "divisor": self.divisor,
                 **{key: float(sum(one[key] for one in found)) for key in _SUMS if key not in keys}}
        parts = [one[key].detach().float() for one in found for key in keys]

        def named(values: list[float]) -> dict[str, float]:
            by_micro_step = torch.tensor(values[:len(parts)], dtype=torch.float64).view(len(found), len(keys))
            sums = dict(zip(keys, by_micro_step.sum(0).tolist(), strict=True))
            return {**known, **sums, **({} if norm is None else {"grad": values[-1]})}

        return StepNumbers(torch.stack([*parts, *([] if norm is None else [norm.detach().float()])]), named)

    def shared(self, numbers: Mapping[str, float]) -> list[float]:
        """All sums."""
        return [numbers[key] for key in _SUMS]

    def add(self, numbers: Mapping[str, float], sums: Sequence[float]) -> None:
        """Fold in a step."""
        step = dict(zip(_SUMS, sums, strict=True))
        step["loss"] /= max(numbers["divisor"], _LEAST)
        self.last = {"lr": numbers["lr"], "grad": numbers.get("grad", math.nan)}
        for key, value in {"loss": step["loss"], "steps": 1.0, **{key: step[key] for key in _LINE}}.items():
            self.smooth[key] = self.smooth.get(key, 0.0) + value
        for key in self.total:
            self.total[key] += step[key]
        step["learned"] = step["text_count"] + step["image_count"]
        for key in self.timed:
            self.timed[key] += step[key]

    def numbers(self) -> dict[str, float]:
        """Nothing: all are sums over the processes already."""
        return {}

    def rates(self, step: int, steps: int, seconds: float, world: int) -> dict[str, float]:
        """The line of the steps since the last one."""
        sums, timed = self.smooth, self.timed
        line = {"loss": sums["loss"] / sums["steps"]}
        for kind in ("text", "image"):
            if sums[f"{kind}_count"] and sums["image_count"]:
                line[f"{kind}_loss"] = sums[f"{kind}_sum"] / sums[f"{kind}_count"]
        body, head, attention = self.flops
        work = timed["tokens"] * body + timed["squares"] * attention + timed["learned"] * head
        tflops = work / seconds / world / 1e12  # of one process
        line |= {"learning_rate": self.last["lr"], "grad_norm": self.last["grad"],
                 "tokens_per_s": timed["positions"] / seconds, "useful_tokens_per_s": timed["tokens"] / seconds,
                 "tflops": tflops, "fill": sums["tokens"] / max(1.0, sums["positions"]), "tokens": self.total["tokens"]}
        if self.peak:
            line["mfu"] = tflops / self.peak
        self.smooth.clear()
        self.timed = dict.fromkeys(self.timed, 0.0)
        shown = {"step": step, **{key: line[key] for key in ("loss", "learning_rate", "grad_norm")}}
        self.history = [*self.history[-999:], shown]
        return line

    def text(self, line: Mapping[str, float]) -> tuple[str, str]:
        """A line in words."""
        shown = [f"{key} {line[key]:.4g}" for key in ("loss", "text_loss", "image_loss") if key in line]
        shown += [f"lr {line['learning_rate']:.3g}", f"grad {line['grad_norm']:.3g}"]
        return " ".join(shown), (f"{line['useful_tokens_per_s']:,.0f} useful of {line['tokens_per_s']:,.0f} tokens/s, "
                                 f"fill {100 * line['fill']:.1f} %")

    def state_dict(self) -> dict[str, Any]:
        """Sums since the last log line and of the run, and the last lines."""
        return {**super().state_dict(), "total": dict(self.total), "log_history": self.history}

    def own_state(self) -> dict[str, Any]:
        """Nothing: sums are of all processes."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        super().load_state_dict(state)
        self.total.update(state.get("total", {}))
        self.history.extend(state.get("log_history", []))
