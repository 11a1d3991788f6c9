"""Training curves from logs `NAME.log.jsonl`: a panel per quantity, a colour per run.

Evaluations (`eval_loss`, `valid/SPLIT/loss`) are dots in the panel of their quantity.
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
    from matplotlib.axes import Axes
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
# (quantity, split of an evaluation or "") -> {step: value}
Series = dict[tuple[str, str], dict[int, float]]


def save_curves(folder: str | Path, log: Callable[[str], None] = print) -> None:
    """Plot all logs of a run's folder to its `curves.png`; errors are logged, not raised."""
    out = Path(folder) / "curves.png"
    try:
        draw_runs([folder], out)
    except Exception as error:  # noqa: BLE001 (training is complete)
        log(f"{out}: the curves were not plotted ({first_line(error)}).")


def draw_runs(runs: Sequence[str | Path], out: str | Path) -> list[Path]:
    """Plot runs (output folders with all their logs, or log files) in one figure; returns the
    plotted logs.

    Raises:
        DataError: no such run, no log in it, a log without numbers, a file that cannot be written.
        ConfigError: `out` has a suffix that matplotlib does not support.
    """
    out = Path(out)
    logs: list[Path] = []
    # A run is a log, or a folder of them.
    for run in map(Path, runs):
        run_logs = [run] if run.is_file() else sorted(run.glob(f"*{SUFFIX}"))
        if not run_logs:
            raise DataError(f"{run}: no log of a training run (NAME{SUFFIX}).")
        logs += run_logs

    # Drawn completely before the file is replaced.
    figure = _figure({str(log).removesuffix(SUFFIX): read_log(log) for log in logs})
    with writing(out, DataError):
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            with atomic_open(out) as handle:
                figure.savefig(handle, format=out.suffix[1:].lower())
        except ValueError as error:
            raise ConfigError(f"{out}: {first_line(error)}.") from error
    return logs


def read_log(log: Path) -> Series:
    """The numbers of a log; of a repeated step the last. Raises DataError: no numbers."""
    series: Series = {}
    for text in log.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
            step = int(line["step"])
        except (ValueError, TypeError, KeyError):  # being written
            continue
        for key, value in line.items():
            quantity, split = _quantity_and_split(key)
            if quantity not in UNPLOTTED and isinstance(value, int | float):
                series.setdefault((quantity, split), {})[step] = value
    if not series:
        raise DataError(f"{log}: contains no line with a step and numbers.")
    return series


def _quantity_and_split(key: str) -> tuple[str, str]:
    """A key of a log line -> quantity, and split of an evaluation ("": training)."""
    if key.startswith("eval_"):
        return key.removeprefix("eval_"), "evaluation"
    if key.startswith("valid/"):
        split, quantity = key.removeprefix("valid/").split("/", 1)
        return quantity, split
    return key, ""


def _figure(runs: dict[str, Series]) -> Figure:
    """A matplotlib figure with a panel for each quantity, the losses first."""
    from matplotlib.figure import Figure

    # 1. The panels.
    all_quantities = {quantity for series in runs.values() for quantity, _ in series}
    losses = sorted(quantity for quantity in all_quantities if "loss" in quantity)
    quantities = losses + sorted(all_quantities.difference(losses))
    rows = math.ceil(len(quantities) / COLUMNS)
    columns = min(COLUMNS, len(quantities))
    figure = Figure(figsize=(3.6 * columns + 0.3, 2.5 * rows + 0.7), dpi=110, layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)

    # 2. The curves.
    for axes, quantity in zip(panels, quantities, strict=False):
        axes.set_title(quantity, fontsize=9, loc="left")
        axes.grid(alpha=0.4)
        for index, series in enumerate(runs.values()):
            _plot_quantity(axes, quantity, series, color=f"C{index}")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    for axes in panels[len(quantities) :]:
        axes.remove()

    # 3. The legend of the runs' colours, from empty lines of the first panel.
    handles = [panels[0].plot([], [], color=f"C{index}")[0] for index in range(len(runs))]
    figure.legend(handles, list(runs), loc="outside upper center", fontsize=8)
    return figure


def _plot_quantity(axes: Axes, quantity: str, series: Series, color: str) -> None:
    """Plot a run's values of a quantity: training as a line, each split's evaluations as dots."""
    for (name, split), values in series.items():
        if name != quantity:
            continue
        steps = sorted(values)
        axes.plot(
            steps,
            [values[step] for step in steps],
            color=color,
            linestyle=":" if split else "-",
            marker="o" if split or len(steps) == 1 else None,  # a line needs two points
            label=split or None,
        )
