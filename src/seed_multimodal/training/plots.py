"""Curves of training runs, drawn from their logs `NAME.log.jsonl`: losses, learning rate, throughput, data wait, codes.

Each quantity has a panel of its own and each run a colour. Numbers of evaluations (`eval_loss`, `valid/SPLIT/loss`) are
dots in the panel of the quantity that they measure. Every run leaves `curves.png` beside its record (`save_curves`);
`seed plot RUN …` draws several runs over each other (`draw_runs`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seed_multimodal.disk import replacing, writing
from seed_multimodal.errors import ConfigError, DataError, SeedError, first_line, how_to_install

CURVES_FILE = "curves.png"
SUFFIX = ".log.jsonl"
FORMATS = (".png", ".pdf", ".svg")

# Key of a log -> title of its panel; panels that are no losses come last, in this order.
TITLES = {"grad": "gradient norm", "grad_norm": "gradient norm", "lr": "learning rate",
          "learning_rate": "learning rate", "samples_per_s": "samples/s", "tokens_per_s": "tokens/s",
          "wait_share": "share of time waiting for data", "codebook_used": "share of codes used",
          "perplexity": "perplexity of the codes"}
NOT_DRAWN = ("step", "epoch", "samples", "tokens", "useful_tokens_per_s", "seconds_per_step", "eta_seconds",
             "peak_memory_mib", "tflops", "mfu", "fill", "last_loss", "loss_scale", "bad_samples")
COLOURS = ("#3b6fb6", "#d9822b", "#4f9a5b", "#b5485d", "#7b62a8", "#8a6a4f", "#4a9fa8", "#777777")
COLUMNS = 4


@dataclass(frozen=True)
class Curves:
    """One run: quantity -> {step: value}, of training and (by the split's name, "" without one) of evaluations."""

    log: Path
    trained: dict[str, dict[int, float]]
    evaluated: dict[str, dict[str, dict[int, float]]]


def save_curves(folder: str | Path, log: Callable[[str], None] = print) -> None:
    """Draw all logs of a run's folder into its `curves.png`; a failure is logged, never raised.

    To be called at the end of a run, in the first process only.
    """
    out = Path(folder) / CURVES_FILE
    try:
        draw_runs([folder], out)
    except (SeedError, OSError, ValueError, RuntimeError) as error:
        log(f"{out}: the curves were not drawn ({first_line(error).rstrip('.')}).")


def draw_runs(runs: Sequence[str | Path], out: str | Path) -> list[Path]:
    """Draw runs over each other into one figure; returns the logs that were drawn.

    Args:
        runs: output folders (all their logs are drawn) or log files.
        out: .png, .pdf or .svg.

    Raises:
        DataError: no such run, no log in it, a log without numbers, a file that cannot be written.
        ConfigError: matplotlib is not installed, or `out` has another ending.
    """
    out = Path(out)
    if out.suffix.lower() not in FORMATS:
        raise ConfigError(f"{out}: a figure ends with {', '.join(FORMATS[:-1])} or {FORMATS[-1]}.")
    logs = list(dict.fromkeys(log for run in runs for log in find_logs(Path(run))))
    found = [read_curves(log) for log in logs]
    figure = _figure(found)
    with writing(out, DataError):
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as handle:
            figure.savefig(handle, format=out.suffix[1:].lower())
    return logs


def find_logs(run: Path) -> list[Path]:
    """The logs of a run: the file itself, or those in the folder except the ones that a new run has renamed.

    Raises:
        DataError: there is none.
    """
    if run.is_file():
        return [run]
    if not run.is_dir():
        raise DataError(f"{run}: there is no such run (an output folder or a log file).")
    logs = [file for file in sorted(run.glob(f"*{SUFFIX}")) if not file.name.endswith(".log.old.jsonl")]
    if not logs:
        raise DataError(f"{run}: holds no log of a training run (NAME{SUFFIX}).")
    return logs


def read_curves(log: Path) -> Curves:
    """The numbers of a log by quantity and step; of a step that is there twice (made again after a kill) the last.

    Lines that are empty, torn or without a step are skipped; so are values that are not numbers. NaN and infinity stay,
    as gaps.

    Raises:
        DataError: it cannot be read, or holds no numbers.
    """
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"{log}: cannot be read ({error.strerror}).") from error
    curves = Curves(log, {}, {})
    for line in _lines(text):
        step = int(line["step"])
        for key, value in line.items():
            if not isinstance(value, int | float) or isinstance(value, bool):
                continue
            split, quantity = _quantity(key)
            if quantity in NOT_DRAWN:
                continue
            series = curves.trained if split is None else curves.evaluated.setdefault(split, {})
            series.setdefault(TITLES.get(quantity, quantity), {})[step] = value if math.isfinite(value) else math.nan
    if not curves.trained and not curves.evaluated:
        raise DataError(f"{log}: holds no line with a step and its numbers.")
    return curves


def _lines(text: str) -> Iterator[dict[str, Any]]:
    for row in text.splitlines():
        try:
            line = json.loads(row)
        except ValueError:
            continue
        step = line.get("step") if isinstance(line, dict) else None
        if isinstance(step, int | float) and not isinstance(step, bool) and math.isfinite(step):
            yield line


def _quantity(key: str) -> tuple[str | None, str]:
    """A log's key as (None: of training; else "" or the split of an evaluation, quantity)."""
    if key.startswith("valid/") and key.count("/") == 2:
        return key.split("/")[1], key.split("/")[2]
    return ("", key.removeprefix("eval_")) if key.startswith("eval_") else (None, key)


def figure_kind() -> Any:
    """matplotlib's `Figure`.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(f"Drawing plots needs the package matplotlib: {how_to_install('matplotlib')}.") from error
    return Figure


def _figure(runs: Sequence[Curves]) -> Any:
    """A matplotlib figure, drawn without a window and without changing matplotlib's own state."""
    kind = figure_kind()
    panels = _panels(runs)
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = kind(figsize=(3.6 * columns + 0.3, 2.5 * rows + 0.7), dpi=110, layout="constrained")
    labels = _labels([run.log for run in runs])
    for number, title in enumerate(panels):
        axes = figure.add_subplot(rows, columns, number + 1)
        for run, colour in zip(runs, _colours(len(runs)), strict=True):
            _draw(axes, run, title, colour)
        _dress(axes, title)
        if number >= len(panels) - columns:
            axes.set_xlabel("step", fontsize=8)
    if len(runs) == 1:
        figure.suptitle(labels[0], fontsize=11)
    else:
        from matplotlib.lines import Line2D

        keys = [Line2D([], [], color=colour, linewidth=2) for colour in _colours(len(runs))]
        figure.legend(keys, labels, loc="outside upper center", ncols=min(len(labels), 5), frameon=False, fontsize=9)
    return figure


def _draw(axes: Any, run: Curves, title: str, colour: str) -> None:
    trained = sorted(run.trained.get(title, {}).items())
    if trained:
        alone = len(trained) == 1  # a line of one point is not seen
        axes.plot(*zip(*trained, strict=True), color=colour, linewidth=1.3, marker="." if alone else None)
    for split, series in run.evaluated.items():
        points = sorted(series.get(title, {}).items())
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=0.8, linestyle=":", marker="o", markersize=4,
                      markerfacecolor="white", label=split or "evaluation")


def _dress(axes: Any, title: str) -> None:
    """Title, grid and scale of a panel; quantities that fall by more than a factor of 30 get a logarithmic axis."""
    axes.set_title(title, fontsize=9, loc="left")
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, color="#999999")
    axes.margins(x=0.02)
    values = [float(y) for line in axes.get_lines() for y in line.get_ydata() if math.isfinite(y)]
    if title.startswith("share of"):
        axes.set_ylim(0.0, max([1.05 * value for value in values if value > 0.02], default=0.05))
    elif title not in TITLES.values() and values and min(values) > 0 and max(values) > 30 * min(values):
        axes.set_yscale("log")
    if any(not line.get_label().startswith("_") for line in axes.get_lines()):
        handles, labels = axes.get_legend_handles_labels()
        chosen = dict(zip(labels, handles, strict=True))  # one entry of each name, whatever the run
        legend = axes.legend(chosen.values(), chosen, fontsize=7, frameon=False)
        for handle in legend.legend_handles:
            handle.set(color="#777777")


def _panels(runs: Sequence[Curves]) -> list[str]:
    """Titles in order: the total loss, other losses as the logs have them, then all else as in `TITLES`."""
    every = (series for run in runs for series in (run.trained, *run.evaluated.values()))
    found = dict.fromkeys(title for series in every for title in series)
    rest = [title for title in dict.fromkeys(TITLES.values()) if title in found]
    return sorted((title for title in found if title not in rest), key=lambda title: title != "loss") + rest


def _labels(logs: Sequence[Path]) -> list[str]:
    """A short label of each run: the parts of folder and log name that differ."""
    places = [(*log.absolute().parent.parts, log.name.removesuffix(SUFFIX)) for log in logs]
    if len(places) == 1:
        return ["/".join(places[0][-2:])]
    same = next((i for i, parts in enumerate(zip(*places, strict=False)) if len(set(parts)) > 1), 0)
    if len({place[-1] for place in places}) == 1 and all(len(place) > same + 1 for place in places):
        places = [place[:-1] for place in places]
    return ["/".join(place[same:]) for place in places]


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]
