"""Training curves from logs `NAME.log.jsonl`: a panel per quantity, a colour per run.

Evaluations (`eval_loss`, `valid/SPLIT/loss`) are dots in the panel of their quantity. A positive
loss that changes by more than a factor of ten has a logarithmic axis.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from seed_multimodal.disk import atomic_open, writing
from seed_multimodal.errors import ConfigError, DataError, first_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIX = ".log.jsonl"
COLUMNS = 4
UNPLOTTED = (
    "step",
    "epoch",
    "samples",
    "tokens",
    "useful_tokens_per_s",
    "seconds_per_step",
    "eta_seconds",
    "peak_memory_mib",
    "tflops",
    "mfu",
    "fill",
    "last_loss",
    "loss_scale",
    "bad_samples",
)
# Quantity → split of an evaluation ("": training) → {step: value}
Series = dict[str, dict[str, dict[int, float]]]


def save_curves(folder: str | Path, log: Callable[[str], None]) -> None:
    """Plot all logs of a run's folder to its `curves.png`; errors are logged, not raised."""
    out = Path(folder) / "curves.png"
    try:
        draw_runs([folder], out)
    except Exception as error:  # noqa: BLE001 (training is complete)
        log(f"{out}: the curves were not plotted ({first_line(error)}).")


def draw_runs(runs: Sequence[str | Path], out: str | Path, names: Sequence[str] = ()) -> list[Path]:
    """Plot runs (output folders with all their logs, or log files) in one figure; returns the
    plotted logs.

    names: of the runs in the legend (default: those of the logs); equal ones share a colour.

    Raises:
        DataError: no such run, no log in it, a log without numbers, a file that cannot be written.
        ConfigError: `out` has a suffix that matplotlib does not support.
    """
    out = Path(out)
    logs: list[Path] = []
    series: list[tuple[str, Series]] = []
    # A run is a log, or a folder of them.
    for index, run in enumerate(map(Path, runs)):
        run_logs = [run] if run.is_file() else sorted(run.glob(f"*{SUFFIX}"))
        if not run_logs:
            raise DataError(f"{run}: no log of a training run (NAME{SUFFIX}).")
        logs += run_logs
        for log in run_logs:
            name = names[index] if names else str(log).removesuffix(SUFFIX)
            series.append((name, read_log(log)))

    # Drawn completely before the file is replaced.
    save_figure(_figure(series), out)
    return logs


def save_figure(figure: Figure, out: Path) -> None:
    """Write a figure in the format of the suffix. Raises as `draw_runs`."""
    with writing(out, DataError):
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            with atomic_open(out) as handle:
                figure.savefig(handle, format=out.suffix[1:].lower())
        except ValueError as error:
            raise ConfigError(f"{out}: {first_line(error)}.") from error


def read_log(log: Path) -> Series:
    """The numbers of a log; of a repeated step the last. Raises DataError: no numbers."""
    series: Series = {}
    for text in log.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
            step = int(line["step"])
        except (ValueError, TypeError, KeyError, OverflowError):  # being written
            continue
        for key, value in line.items():
            quantity, split = _quantity_and_split(key)
            if quantity not in UNPLOTTED and isinstance(value, int | float):
                series.setdefault(quantity, {}).setdefault(split, {})[step] = value
    if not series:
        raise DataError(f"{log}: contains no line with a step and numbers.")
    return series


def _quantity_and_split(key: str) -> tuple[str, str]:
    """A key of a log line -> quantity, and split of an evaluation ("": training)."""
    if key.startswith("eval_"):
        return key.removeprefix("eval_"), "evaluation"
    if key.startswith("valid/"):
        split, _, quantity = key.removeprefix("valid/").partition("/")
        return (quantity, split) if quantity else (split, "validation")
    return key, ""


def _figure(runs: Sequence[tuple[str, Series]]) -> Figure:
    """A matplotlib figure with a panel for each quantity, the losses first, and a colour for each
    name."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    quantities = {quantity for _, series in runs for quantity in series}
    panels = sorted(quantities, key=lambda name: ("loss" not in name, name))
    n_columns = min(COLUMNS, len(panels))
    n_rows = math.ceil(len(panels) / COLUMNS)
    names = list(dict.fromkeys(name for name, _ in runs))
    size = (3.6 * n_columns + 0.3, 2.5 * n_rows + 0.7)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    for index, quantity in enumerate(panels, start=1):
        axes = figure.add_subplot(n_rows, n_columns, index)
        axes.set_title(quantity, fontsize=9, loc="left")
        axes.grid(alpha=0.4)
        splits = {}
        for name, series in runs:
            for split, values in series.get(quantity, {}).items():
                # A run's training is a line, each split's evaluations are dots.
                steps = sorted(values)
                is_dotted = bool(split) or len(steps) == 1  # a line needs two points
                (line,) = axes.plot(
                    steps,
                    [values[step] for step in steps],
                    color=color_of(names.index(name), len(names)),
                    linestyle=":" if split else "-",
                    marker="o" if is_dotted else None,
                )
                if split:
                    splits[split] = line
        if splits:
            axes.legend(splits.values(), splits, fontsize=7)
        # Beside the first values of such a loss, late differences are too small to see.
        plotted = [value for line in axes.get_lines() for value in line.get_ydata()]
        if "loss" in quantity and 0 < 10 * min(plotted) < max(plotted):
            axes.set_yscale("log")
    # The names of all panels, from empty lines.
    lines = [Line2D([], [], color=color_of(index, len(names))) for index in range(len(names))]
    figure.legend(lines, names, fontsize=7, ncols=n_columns, loc="outside upper left")
    return figure


def color_of(index: int, n: int) -> tuple[float, float, float, float]:
    """The colour of one of `n` runs."""
    from matplotlib import colormaps

    return colormaps["tab10" if n <= 10 else "tab20"](index % 20)
